package egress

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
)

// tableName is the one table in a sandbox's namespace, or two: where a virtual machine is behind a tap, the family netdev has one of this
// name as well.
const tableName = "sluice"

// uplink is the way out of every namespace, see sandboxd/netdev.
const uplink = "eth0"

// link is what a virtual machine shares with the namespace, see sandboxd/netdev: its own address there, the gateway, and the group in
// which neighbours ask for the gateway of IPv6.
var (
	link4, link6       = netip.MustParsePrefix("169.254.0.20/30"), netip.MustParsePrefix("fd73:6c75:6963:65ff::/126")
	gateway4, gateway6 = netip.MustParseAddr("169.254.0.22"), netip.MustParseAddr("fd73:6c75:6963:65ff::1")
	gatewayGroup6      = netip.MustParseAddr("ff02::1:ff00:1")
)

// Placement says where a sandbox's packets pass.
type Placement struct {
	tap   string // of a virtual machine; empty when the sandbox's processes live in the namespace itself
	mac   net.HardwareAddr
	guest []netip.Addr
}

// Local is for processes that live in the namespace: their packets pass the output and input hooks. guest are the addresses that
// they may send from; none means that the source is not checked here.
func Local(guest ...netip.Addr) Placement { return Placement{guest: valid(guest)} }

// Forwarded is for a virtual machine behind a tap device of the namespace: its packets pass the forward hook, and what the node
// itself sends through the tap passes freely. Whoever is root in the machine can send any frame at all; it may be one from the hardware
// address mac with a source among guest, to the gateway, or it goes no further than the device. See docs/decisions/0017.
func Forwarded(tap string, mac net.HardwareAddr, guest ...netip.Addr) Placement {
	return Placement{tap: tap, mac: slices.Clone(mac), guest: valid(guest)}
}

// valid drops zero addresses, which a slot has for a family that the host lacks.
func valid(addrs []netip.Addr) (list []netip.Addr) {
	for _, a := range addrs {
		if a.IsValid() {
			list = append(list, a.Unmap())
		}
	}
	return list
}

// Ruleset is a compiled policy: a value, complete, that can be printed, compared by its text, and applied.
type Ruleset struct {
	tap                     string           // as in Placement
	mac                     net.HardwareAddr // as well
	own                     *netipx.IPSet
	reserved, allowed, deny *netipx.IPSet
	tables                  []table
}

// table is what is in force for one of the kernel's families, all under the same name.
type table struct {
	family   family
	counters []string
	sets     []set
	chains   []chain
}

// family says what the rules of a table get to see.
type family uint8

const (
	inet   family = iota // packets, put together from their fragments
	netdev               // frames, as they come in by a device
)

// set is a named set of addresses of one family.
type set struct {
	name   string
	v6     bool
	ranges []netipx.IPRange
}

// chain is a list of rules; with a hook it is where packets enter, and drops what no rule accepts.
type chain struct {
	name  string
	hook  string // "output", "input", "forward", "ingress" or none
	dev   string // of ingress
	rules []rule
}

// rule is matches and, last, what to do: see the terms.
type rule []term

// term is one piece of a rule. Its text is nft's; the kernel's form is made from op and the arguments.
type term struct {
	op   op
	not  bool   // the opposite, of the terms that have one
	name string // of a device, a set, a chain, a counter, or whatever the term matches
	addr netip.Addr
	mac  net.HardwareAddr
	v6   bool
	max  uint32 // of flows
}

type op uint8

const (
	opIIF        op = iota // iifname "name"
	opOIF                  // oifname "name"
	opDaddrIn              // ip daddr @name
	opSaddrIn              // ip saddr @name
	opDaddrIs              // ip daddr addr
	opState                // ct state name
	opConfirmed            // ct status confirmed
	opFlowsOver            // ct count over max
	opTCP                  // meta l4proto tcp
	opICMP                 // icmp type name
	opFrom                 // ether saddr mac
	opEtherType            // ether type name
	opToUs                 // meta pkttype host
	opVersion              // ip version 4
	opNoOptions            // ip hdrlength 5
	opExtension            // exthdr name exists
	opARPRequest           // arp operation request, for IPv4 over Ethernet
	opARPFrom              // arp saddr ether mac
	opARPSource            // arp saddr ip addr
	opARPTarget            // arp daddr ip addr
	opCount                // counter name "name"
	opAccept               // accept
	opDrop                 // drop
	opGoto                 // goto name
	opResetTCP             // reject with tcp reset
	opProhibit             // reject with icmpx admin-prohibited
)

func iif(dev string) term        { return term{op: opIIF, name: dev} }
func oif(dev string) term        { return term{op: opOIF, name: dev} }
func state(name string) term     { return term{op: opState, name: name} }
func count(reason string) term   { return term{op: opCount, name: reason} }
func gotoChain(name string) term { return term{op: opGoto, name: name} }
func icmp(kind string) term      { return term{op: opICMP, name: kind} }
func icmp6(kind string) term     { return term{op: opICMP, name: kind, v6: true} }

// not is the opposite of a term.
func not(t term) term {
	t.not = true
	return t
}

var (
	accept = term{op: opAccept}
	drop   = term{op: opDrop}
)

// Compile turns a policy into rules. It is pure: the same policy and placement give the same text.
func Compile(p Policy, where Placement) Ruleset {
	deny := p.Deny
	if !p.AllowInternet {
		deny = []netip.Prefix{all4, all6}
	}
	r := Ruleset{
		tap:      where.tap,
		mac:      where.mac,
		own:      setOf(singles(where.guest)),
		reserved: setOf(append(Reserved(), p.Protected...)),
		allowed:  setOf(p.Allow),
		deny:     setOf(deny),
	}
	r.tables = []table{r.packets(p, where)}
	if where.tap != "" {
		r.tables = append(r.tables, r.frames(where))
	}
	return r
}

// packets are the rules of the policy.
func (r Ruleset) packets(p Policy, where Placement) table {
	t := table{family: inet, counters: []string{reasonReserved, reasonDenied, reasonSpoofed, reasonInbound, reasonFlows}}
	forwarded := where.tap != ""
	checkSource := forwarded || len(where.guest) > 0
	if checkSource {
		t.addSets("own", r.own)
	}
	t.addSets("reserved", r.reserved)
	t.addSets("allowed", r.allowed)
	t.addSets("denied", r.deny)

	outbound := []rule{
		{{op: opDaddrIs, addr: igmpReports}, drop}, // the kernel's own noise, not worth a count
		{{op: opDaddrIs, addr: mldReports, v6: true}, drop},
	}
	if checkSource {
		outbound = append(outbound, both(not(term{op: opSaddrIn, name: "own"}), count(reasonSpoofed), drop)...)
	}
	outbound = append(outbound, both(term{op: opDaddrIn, name: "reserved"}, count(reasonReserved), gotoChain("refuse"))...)
	outbound = append(outbound, both(term{op: opDaddrIn, name: "allowed"}, gotoChain("admit"))...)
	outbound = append(outbound, both(term{op: opDaddrIn, name: "denied"}, count(reasonDenied), gotoChain("refuse"))...)
	outbound = append(outbound, rule{gotoChain("admit")})

	// Each flow is counted once, when it begins: counting walks through all that the sandbox has.
	admit := []rule{
		{{op: opConfirmed}, accept},
		{state("new"), {op: opFlowsOver, max: cmp.Or(p.MaxFlows, DefaultMaxFlows)}, count(reasonFlows), gotoChain("refuse")},
		{accept},
	}
	if forwarded {
		// A machine that resumes in another place takes up connections that are unknown there. Each is reset at its next packet.
		t.counters = append(t.counters, reasonStale)
		admit = slices.Insert(admit, 1, rule{state("invalid"), count(reasonStale), gotoChain("refuse")})
	}

	// Answers are judged by where they come from, in the same order: a flow that is now forbidden is deaf as well as dumb. Errors
	// about a flow (related) come from any router on its way.
	replies := both(term{op: opSaddrIn, name: "reserved"}, drop)
	replies = append(replies, both(term{op: opSaddrIn, name: "allowed"}, accept)...)
	replies = append(replies, both(term{op: opSaddrIn, name: "denied"}, drop)...)
	replies = append(replies, rule{accept})

	t.chains = []chain{
		{name: "refuse", rules: []rule{{{op: opTCP}, {op: opResetTCP}}, {{op: opProhibit}}}},
		{name: "admit", rules: admit},
		{name: "outbound", rules: outbound},
		{name: "replies", rules: replies},
		{name: "inbound", rules: []rule{{state("related"), accept}, {state("established"), gotoChain("replies")}, {count(reasonInbound), drop}}},
	}
	if !forwarded {
		t.chains = append(t.chains,
			chain{name: "output", hook: "output", rules: []rule{{oif("lo"), accept}, {oif(uplink), gotoChain("outbound")}}},
			chain{name: "input", hook: "input", rules: []rule{{iif("lo"), accept}, {iif(uplink), gotoChain("inbound")}}},
			chain{name: "forward", hook: "forward"}, // nothing is
		)
		return t
	}
	t.chains = append(t.chains,
		// What the machine sends to the namespace itself: answers to the node, and questions for the gateway's hardware address.
		chain{name: "from_guest", rules: []rule{
			{state("established"), accept},
			{state("related"), accept},
			{icmp6("nd-neighbor-solicit"), accept},
			{state("invalid"), count(reasonStale), gotoChain("refuse")},
			{count(reasonReserved), gotoChain("refuse")},
		}},
		chain{name: "forward", hook: "forward", rules: []rule{
			{iif(where.tap), oif(uplink), gotoChain("outbound")},
			{iif(uplink), oif(where.tap), gotoChain("inbound")},
		}},
		chain{name: "input", hook: "input", rules: []rule{
			{iif("lo"), accept},
			{iif(where.tap), gotoChain("from_guest")},
			{iif(uplink), gotoChain("inbound")},
		}},
		// The namespace speaks to the machine alone, and has nothing to say to the world.
		chain{name: "output", hook: "output", rules: []rule{{oif("lo"), accept}, {oif(where.tap), accept}}},
	)
	return t
}

// frames are the rules for what comes out of a machine, before the kernel makes anything of it: whatever is not the packet of an ordinary
// host to its gateway goes no further. They know nothing of the policy, and see fragments one by one.
func (r Ruleset) frames(where Placement) table {
	t := table{family: netdev, counters: []string{reasonFrame, reasonSpoofed, reasonReserved}}
	t.addSets("own", r.own)
	t.addSets("nowhere", nowhere())
	toUs := term{op: opToUs}
	fromOwn := term{op: opSaddrIn, name: "own"}
	notFrame := []term{count(reasonFrame), drop}
	refuse := func(match term) rule { return append(rule{match}, notFrame...) }

	guest4 := []rule{
		{{op: opDaddrIs, addr: igmpReports}, drop}, // every kernel's noise
		refuse(not(toUs)),
		refuse(not(term{op: opVersion})),
		refuse(not(term{op: opNoOptions})), // source routes among them
		refuse(icmp("redirect")),
		refuse(icmp("router-advertisement")),
		refuse(icmp("router-solicitation")),
		{not(inFamily(fromOwn, false)), count(reasonSpoofed), drop},
		{inFamily(term{op: opDaddrIn, name: "nowhere"}, false), count(reasonReserved), drop},
		{accept},
	}
	own6 := inFamily(fromOwn, true)
	guest6 := []rule{
		{{op: opDaddrIs, addr: mldReports, v6: true}, drop},
		{own6, {op: opDaddrIs, addr: gateway6, v6: true}, icmp6("nd-neighbor-solicit"), accept},
		{own6, {op: opDaddrIs, addr: gatewayGroup6, v6: true}, icmp6("nd-neighbor-solicit"), accept},
		refuse(not(toUs)),
		refuse(not(term{op: opVersion, v6: true})),
		refuse(term{op: opExtension, name: "hbh"}),
		refuse(term{op: opExtension, name: "rt"}), // source routes
		refuse(icmp6("nd-router-solicit")),
		refuse(icmp6("nd-router-advert")),
		refuse(icmp6("nd-neighbor-solicit")),
		refuse(icmp6("nd-neighbor-advert")), // the namespace does not ask
		refuse(icmp6("nd-redirect")),
		{not(own6), count(reasonSpoofed), drop},
		{inFamily(term{op: opDaddrIn, name: "nowhere"}, true), count(reasonReserved), drop},
		{accept},
	}
	guestARP := []rule{{not(term{op: opARPFrom, mac: where.mac}), count(reasonSpoofed), drop}}
	for _, addr := range where.guest {
		if addr.Is4() { // there is one
			guestARP = append(guestARP,
				rule{not(term{op: opARPSource, addr: addr}), count(reasonSpoofed), drop},
				rule{{op: opARPRequest}, {op: opARPTarget, addr: gateway4}, accept},
			)
		}
	}
	guestARP = append(guestARP, notFrame)
	t.chains = []chain{
		{name: "guest4", rules: guest4},
		{name: "guest6", rules: guest6},
		{name: "guest_arp", rules: guestARP},
		{name: "ingress", hook: "ingress", dev: where.tap, rules: []rule{
			{not(term{op: opFrom, mac: where.mac}), count(reasonSpoofed), drop},
			{{op: opEtherType, name: "ip"}, gotoChain("guest4")}, // the type as it was sent: that of a frame with a VLAN tag is vlan
			{{op: opEtherType, name: "ip6"}, gotoChain("guest6")},
			{{op: opEtherType, name: "arp"}, gotoChain("guest_arp")},
			notFrame,
		}},
	}
	return t
}

// nowhere is what a machine has no business to send to its gateway, and routing would throw away before a rule could count it: loopback,
// multicast, broadcast, and the machine's own link but for the gateway.
func nowhere() *netipx.IPSet {
	var builder netipx.IPSetBuilder
	for _, text := range []string{"0.0.0.0/32", "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32", "::/127", "ff00::/8"} {
		builder.AddPrefix(netip.MustParsePrefix(text))
	}
	for _, link := range []netip.Prefix{link4, link6} {
		builder.AddPrefix(link)
	}
	builder.Remove(gateway4)
	builder.Remove(gateway6)
	set, err := builder.IPSet()
	if err != nil {
		panic(fmt.Sprintf("BUG: addresses that lead nowhere: %v", err))
	}
	return set
}

var (
	igmpReports = netip.MustParseAddr("224.0.0.22")
	mldReports  = netip.MustParseAddr("ff02::16")
)

func singles(addrs []netip.Addr) (prefixes []netip.Prefix) {
	for _, a := range addrs {
		prefixes = append(prefixes, netip.PrefixFrom(a, a.BitLen()))
	}
	return prefixes
}

// both is a rule for IPv4 and the same for IPv6. The first term matches a set.
func both(match term, rest ...term) []rule {
	return []rule{append(rule{inFamily(match, false)}, rest...), append(rule{inFamily(match, true)}, rest...)}
}

// inFamily is a match of a set for one family, whose number its name gets.
func inFamily(match term, v6 bool) term {
	match.v6 = v6
	if v6 {
		match.name += "6"
	} else {
		match.name += "4"
	}
	return match
}

func (t *table) addSets(name string, addrs *netipx.IPSet) {
	v4, v6 := set{name: name + "4"}, set{name: name + "6", v6: true}
	for _, rg := range addrs.Ranges() {
		if rg.From().Is4() {
			v4.ranges = append(v4.ranges, rg)
		} else {
			v6.ranges = append(v6.ranges, rg)
		}
	}
	t.sets = append(t.sets, v4, v6)
}

// Verdict is what the rules say of a destination outside the namespace: the same answer as the kernel's, without asking it.
func (r Ruleset) Verdict(dst netip.Addr) Verdict {
	dst = dst.Unmap().WithZone("")
	switch {
	case r.reserved.Contains(dst):
		return RefusedReserved
	case r.allowed.Contains(dst):
		return Allowed
	case r.deny.Contains(dst):
		return RefusedDenied
	}
	return Allowed
}

// forbids reports whether a flow from src to dst has to end. Flows within the namespace are nobody's business.
func (r Ruleset) forbids(src, dst netip.Addr) bool {
	src, dst = src.Unmap().WithZone(""), dst.Unmap().WithZone("")
	if !dst.IsValid() || dst.IsUnspecified() || dst.IsLoopback() || src == dst || r.own.Contains(dst) {
		return false
	}
	if r.tap != "" && !r.own.Contains(src) {
		return false // of the node itself, not of the machine behind the tap
	}
	return r.Verdict(dst) != Allowed
}

// String is the ruleset as `nft -f` takes it: it replaces the tables as Apply does, but for the counters, which Apply carries over.
func (r Ruleset) String() string {
	var b strings.Builder
	for _, t := range r.tables {
		fmt.Fprintf(&b, "table %s %s\ndelete table %s %s\n", t.family, tableName, t.family, tableName)
	}
	for _, t := range r.tables {
		t.appendTo(&b)
	}
	return b.String()
}

func (f family) String() string {
	if f == netdev {
		return "netdev"
	}
	return "inet"
}

func (t table) appendTo(b *strings.Builder) {
	fmt.Fprintf(b, "table %s %s {\n", t.family, tableName)
	for _, reason := range t.counters {
		fmt.Fprintf(b, "\tcounter %s {\n\t}\n\n", reason)
	}
	for _, s := range t.sets {
		s.appendTo(b)
	}
	for i, c := range t.chains {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(b, "\tchain %s {\n", c.name)
		switch {
		case c.dev != "":
			fmt.Fprintf(b, "\t\ttype filter hook %s device %q priority filter; policy drop;\n", c.hook, c.dev)
		case c.hook != "":
			fmt.Fprintf(b, "\t\ttype filter hook %s priority filter; policy drop;\n", c.hook)
		}
		for _, rule := range c.rules {
			b.WriteString("\t\t")
			for j, t := range rule {
				if j > 0 {
					b.WriteByte(' ')
				}
				b.WriteString(t.String())
			}
			b.WriteByte('\n')
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
}

func (s set) appendTo(b *strings.Builder) {
	family := "ipv4_addr"
	if s.v6 {
		family = "ipv6_addr"
	}
	fmt.Fprintf(b, "\tset %s {\n\t\ttype %s\n\t\tflags interval\n", s.name, family)
	for i, r := range s.ranges {
		if i == 0 {
			b.WriteString("\t\telements = { ")
		} else {
			b.WriteString(",\n\t\t\t     ")
		}
		b.WriteString(rangeText(r))
	}
	if len(s.ranges) > 0 {
		b.WriteString(" }\n")
	}
	b.WriteString("\t}\n\n")
}

// rangeText is a range as nft lists it: an address, a prefix, or both ends.
func rangeText(r netipx.IPRange) string {
	if r.From() == r.To() {
		return r.From().String()
	}
	if p, ok := r.Prefix(); ok {
		return p.String()
	}
	return r.String()
}

// String is the term in nft's words, as nft itself lists them.
func (t term) String() string {
	ip, icmp, version := "ip", "icmp", 4
	if t.v6 {
		ip, icmp, version = "ip6", "icmpv6", 6
	}
	is := " " // between a match and what it wants
	if t.not {
		is = " != "
	}
	switch t.op {
	case opIIF:
		return fmt.Sprintf("iifname %q", t.name)
	case opOIF:
		return fmt.Sprintf("oifname %q", t.name)
	case opDaddrIn:
		return ip + " daddr @" + t.name
	case opSaddrIn:
		return ip + " saddr" + is + "@" + t.name
	case opDaddrIs:
		return ip + " daddr " + t.addr.String()
	case opState:
		return "ct state " + t.name
	case opConfirmed:
		return "ct status confirmed"
	case opFlowsOver:
		return fmt.Sprintf("ct count over %d", t.max)
	case opTCP:
		return "meta l4proto tcp"
	case opICMP:
		return icmp + " type " + t.name
	case opFrom:
		return "ether saddr" + is + t.mac.String()
	case opEtherType:
		return "ether type " + t.name
	case opToUs:
		return "meta pkttype" + is + "host"
	case opVersion:
		return fmt.Sprintf("%s version%s%d", ip, is, version)
	case opNoOptions:
		return "ip hdrlength" + is + "5"
	case opExtension:
		return "exthdr " + t.name + " exists"
	case opARPRequest:
		return "arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp operation request"
	case opARPFrom:
		return "arp saddr ether" + is + t.mac.String()
	case opARPSource:
		return "arp saddr ip" + is + t.addr.String()
	case opARPTarget:
		return "arp daddr ip" + is + t.addr.String()
	case opCount:
		return fmt.Sprintf("counter name %q", t.name)
	case opAccept:
		return "accept"
	case opDrop:
		return "drop"
	case opGoto:
		return "goto " + t.name
	case opResetTCP:
		return "reject with tcp reset"
	case opProhibit:
		return "reject with icmpx admin-prohibited"
	}
	panic(fmt.Sprintf("BUG: term %d has no text", t.op))
}
