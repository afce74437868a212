package egress

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	"go4.org/netipx"
)

// tableName is the one table in a sandbox's namespace.
const tableName = "sluice"

// uplink is the way out of every namespace, see sandboxd/netdev.
const uplink = "eth0"

// Placement says where a sandbox's packets pass.
type Placement struct {
	tap   string // of a virtual machine; empty when the sandbox's processes live in the namespace itself
	guest []netip.Addr
}

// Local is for processes that live in the namespace: their packets pass the output and input hooks. guest are the addresses that
// they may send from; none means that the source is not checked here.
func Local(guest ...netip.Addr) Placement { return Placement{guest: valid(guest)} }

// Forwarded is for a virtual machine behind a tap device of the namespace: its packets pass the forward hook, and what the node
// itself sends through the tap passes freely.
func Forwarded(tap string, guest ...netip.Addr) Placement {
	return Placement{tap: tap, guest: valid(guest)}
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
	local                   bool
	own                     *netipx.IPSet
	reserved, allowed, deny *netipx.IPSet
	sets                    []set
	chains                  []chain
}

// set is a named set of addresses of one family.
type set struct {
	name   string
	v6     bool
	ranges []netipx.IPRange
}

// chain is a list of rules; with a hook it is where packets enter, and drops what no rule accepts.
type chain struct {
	name  string
	hook  string // "output", "input", "forward" or none
	rules []rule
}

// rule is matches and, last, what to do: see the terms.
type rule []term

// term is one piece of a rule. Its text is nft's; the kernel's form is made from op and the arguments.
type term struct {
	op   op
	name string // of a device, a set, a chain, a counter, or a state
	addr netip.Addr
	v6   bool
	max  uint32 // of flows
}

type op uint8

const (
	opIIF        op = iota // iifname "name"
	opOIF                  // oifname "name"
	opDaddrIn              // ip daddr @name
	opSaddrIn              // ip saddr @name
	opSaddrNotIn           // ip saddr != @name
	opDaddrIs              // ip daddr addr
	opState                // ct state name
	opConfirmed            // ct status confirmed
	opFlowsOver            // ct count over max
	opTCP                  // meta l4proto tcp
	opNeighbour            // icmpv6 type name
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
		local:    where.tap == "",
		own:      setOf(singles(where.guest)),
		reserved: setOf(append(Reserved(), p.Protected...)),
		allowed:  setOf(p.Allow),
		deny:     setOf(deny),
	}
	checkSource := len(where.guest) > 0
	if checkSource {
		r.addSets("own", r.own)
	}
	r.addSets("reserved", r.reserved)
	r.addSets("allowed", r.allowed)
	r.addSets("denied", r.deny)

	outbound := []rule{
		{{op: opDaddrIs, addr: igmpReports}, drop}, // the kernel's own noise, not worth a count
		{{op: opDaddrIs, addr: mldReports, v6: true}, drop},
	}
	if checkSource {
		outbound = append(outbound, both(term{op: opSaddrNotIn, name: "own"}, count(reasonSpoofed), drop)...)
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

	// Answers are judged by where they come from, in the same order: a flow that is now forbidden is deaf as well as dumb. Errors
	// about a flow (related) come from any router on its way.
	replies := both(term{op: opSaddrIn, name: "reserved"}, drop)
	replies = append(replies, both(term{op: opSaddrIn, name: "allowed"}, accept)...)
	replies = append(replies, both(term{op: opSaddrIn, name: "denied"}, drop)...)
	replies = append(replies, rule{accept})

	r.chains = []chain{
		{name: "refuse", rules: []rule{{{op: opTCP}, {op: opResetTCP}}, {{op: opProhibit}}}},
		{name: "admit", rules: admit},
		{name: "outbound", rules: outbound},
		{name: "replies", rules: replies},
		{name: "inbound", rules: []rule{{state("related"), accept}, {state("established"), gotoChain("replies")}, {count(reasonInbound), drop}}},
	}
	if r.local {
		r.chains = append(r.chains,
			chain{name: "output", hook: "output", rules: []rule{{oif("lo"), accept}, {oif(uplink), gotoChain("outbound")}}},
			chain{name: "input", hook: "input", rules: []rule{{iif("lo"), accept}, {iif(uplink), gotoChain("inbound")}}},
			chain{name: "forward", hook: "forward"}, // nothing is
		)
		return r
	}
	r.chains = append(r.chains,
		// What the machine sends to the namespace itself: answers to the node, and the neighbour protocol of the tap.
		chain{name: "from_guest", rules: []rule{
			{state("established"), accept},
			{state("related"), accept},
			{{op: opNeighbour, name: "nd-neighbor-solicit"}, accept},
			{{op: opNeighbour, name: "nd-neighbor-advert"}, accept},
			{count(reasonReserved), drop},
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
	)
	return r
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

// both is a rule for IPv4 and the same for IPv6. The first term matches a set, whose name gets the family's number.
func both(match term, rest ...term) []rule {
	match4, match6 := match, match
	match4.name, match6.name = match.name+"4", match.name+"6"
	match6.v6 = true
	return []rule{append(rule{match4}, rest...), append(rule{match6}, rest...)}
}

func (r *Ruleset) addSets(name string, addrs *netipx.IPSet) {
	v4, v6 := set{name: name + "4"}, set{name: name + "6", v6: true}
	for _, rg := range addrs.Ranges() {
		if rg.From().Is4() {
			v4.ranges = append(v4.ranges, rg)
		} else {
			v6.ranges = append(v6.ranges, rg)
		}
	}
	r.sets = append(r.sets, v4, v6)
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
	if !r.local && !r.own.Contains(src) {
		return false // of the node itself, not of the machine behind the tap
	}
	return r.Verdict(dst) != Allowed
}

// String is the ruleset as `nft -f` takes it: it replaces the table as Apply does, but for the counters, which Apply carries over.
func (r Ruleset) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s\ndelete table inet %s\ntable inet %s {\n", tableName, tableName, tableName)
	for _, reason := range reasons {
		fmt.Fprintf(&b, "\tcounter %s {\n\t}\n\n", reason)
	}
	for _, s := range r.sets {
		s.appendTo(&b)
	}
	for i, c := range r.chains {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "\tchain %s {\n", c.name)
		if c.hook != "" {
			fmt.Fprintf(&b, "\t\ttype filter hook %s priority filter; policy drop;\n", c.hook)
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
	return b.String()
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
	ip := "ip"
	if t.v6 {
		ip = "ip6"
	}
	switch t.op {
	case opIIF:
		return fmt.Sprintf("iifname %q", t.name)
	case opOIF:
		return fmt.Sprintf("oifname %q", t.name)
	case opDaddrIn:
		return ip + " daddr @" + t.name
	case opSaddrIn:
		return ip + " saddr @" + t.name
	case opSaddrNotIn:
		return ip + " saddr != @" + t.name
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
	case opNeighbour:
		return "icmpv6 type " + t.name
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

var reasons = [...]string{reasonReserved, reasonDenied, reasonSpoofed, reasonInbound, reasonFlows}
