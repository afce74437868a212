package egress

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/netfilter"
)

// Apply puts r in force in the network namespace at the path netns, in place of whatever was there, in one transaction: at no
// instant is the namespace open or half fenced, and packets that both rulesets allow do not notice. The counters go on. Then
// it ends the flows that r forbids; an error that says so means that the rules are in force all the same.
func Apply(netns string, r Ruleset) error {
	ns, err := openNetNS(netns)
	if err != nil {
		return err
	}
	defer unix.Close(ns)
	var before bool
	err = inNetNS(ns, func() (err error) {
		if err := r.checkTap(); err != nil {
			return err
		}
		before, err = r.replace()
		return r.explain(err)
	})
	if err != nil {
		return fmt.Errorf("replace egress rules: %w", err)
	}
	if !before {
		return nil // there were no rules, so nothing ran that they could forbid
	}
	if err := r.cut(ns); err != nil {
		return fmt.Errorf("rules are in force, but not every flow that they forbid was ended: %w", err)
	}
	return nil
}

// Counters reads what the rules in a namespace have refused since the first Apply; zeros before it.
func Counters(netns string) (Refusals, error) {
	ns, err := openNetNS(netns)
	if err != nil {
		return Refusals{}, err
	}
	defer unix.Close(ns)
	packets := map[string]uint64{}
	err = inNetNS(ns, func() error {
		for _, family := range []family{inet, netdev} {
			counters, err := family.counters()
			if err != nil {
				return err
			}
			for reason, counter := range counters {
				packets[reason] += counter.Packets
			}
		}
		return nil
	})
	if err != nil {
		return Refusals{}, err
	}
	return Refusals{
		Reserved: packets[reasonReserved],
		Denied:   packets[reasonDenied],
		Spoofed:  packets[reasonSpoofed],
		Inbound:  packets[reasonInbound],
		Flows:    packets[reasonFlows],
		Frames:   packets[reasonFrame],
		Stale:    packets[reasonStale],
	}, nil
}

func openNetNS(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open network namespace", Path: path, Err: err}
	}
	return fd, nil
}

// counters returns those of the family's table in the thread's namespace by name, none when there is no table yet.
func (f family) counters() (map[string]expr.Counter, error) {
	conn, err := netfilter.NewConn()
	if err != nil {
		return nil, err
	}
	objects, err := conn.GetNamedObjects(f.kernel())
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("read egress counters: %w", err)
	}
	counters := map[string]expr.Counter{}
	for _, object := range objects {
		named, ok := object.(*nftables.NamedObj)
		if !ok || named.Table.Name != tableName {
			continue
		}
		if counter, ok := named.Obj.(*expr.Counter); ok {
			counters[named.Name] = *counter
		}
	}
	return counters, nil
}

// kernel is the family's table.
func (f family) kernel() *nftables.Table {
	number := nftables.TableFamilyINet
	if f == netdev {
		number = nftables.TableFamilyNetdev
	}
	return &nftables.Table{Family: number, Name: tableName}
}

// standing is what a namespace holds already of a table.
type standing struct {
	table    bool // of any shape
	shape    bool // with exactly the sets and chains of the table to come
	counters map[string]expr.Counter
	sets     map[string]bool // of the right shape: whose elements are right as well
}

// standing looks at the thread's namespace. Only Apply changes the table, and its caller does one thing at a time to a sandbox.
func (t table) standing() (have standing, err error) {
	conn, err := netfilter.NewConn()
	if err != nil {
		return have, err
	}
	table := t.family.kernel()
	tables, err := conn.ListTablesOfFamily(table.Family)
	if err != nil {
		return have, fmt.Errorf("list tables: %w", err)
	}
	if have.table = slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == tableName }); !have.table {
		return have, nil
	}
	if have.counters, err = t.family.counters(); err != nil {
		return have, err
	}
	chains, err := conn.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return have, fmt.Errorf("list chains: %w", err)
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != tableName })
	sets, err := conn.GetSets(table)
	if err != nil {
		return have, fmt.Errorf("list sets: %w", err)
	}
	have.shape = slices.Equal(
		names(chains, func(c *nftables.Chain) string { return c.Name }),
		names(t.chains, func(c chain) string { return c.name }),
	) && slices.Equal(
		names(sets, func(s *nftables.Set) string { return s.Name }),
		names(t.sets, func(s set) string { return s.name }),
	)
	if !have.shape {
		return have, nil
	}
	have.sets = map[string]bool{}
	for _, s := range t.sets {
		elements, err := conn.GetSetElements(s.kernel(table))
		if err != nil {
			return have, fmt.Errorf("read set %s: %w", s.name, err)
		}
		have.sets[s.name] = slices.Equal(names(elements, boundary), names(s.elements(), boundary))
	}
	return have, nil
}

// boundary is an element as a string: the kernel gives them in its own order.
func boundary(e nftables.SetElement) string { return fmt.Sprintf("%x %v", e.Key, e.IntervalEnd) }

func names[T any](list []T, name func(T) string) []string {
	sorted := make([]string, len(list))
	for i, item := range list {
		sorted[i] = name(item)
	}
	slices.Sort(sorted)
	return sorted
}

// replace sends the ruleset to the thread's namespace, and reports whether there were rules before.
func (r Ruleset) replace() (before bool, err error) {
	conn, err := netfilter.NewConn()
	if err != nil {
		return false, err
	}
	for _, family := range []family{inet, netdev} {
		i := slices.IndexFunc(r.tables, func(t table) bool { return t.family == family })
		wanted := table{family: family}
		if i >= 0 {
			wanted = r.tables[i]
		}
		have, err := wanted.standing()
		if err != nil {
			return false, err
		}
		before = before || have.table
		switch {
		case i >= 0:
			err = wanted.replace(conn, have)
		case have.table:
			conn.DelTable(family.kernel())
		}
		if err != nil {
			return false, err
		}
	}
	if err := conn.Flush(); err != nil {
		return false, err
	}
	return before, nil
}

// replace adds the table to a transaction. One of the same shape stays, with its hooks, and only its rules and the sets that differ are
// exchanged: deleting it would leave a moment in which packets find the old chains with sets already empty, and the new ones with no
// rules yet and a policy of drop.
func (t table) replace(conn *nftables.Conn, have standing) (err error) {
	table := t.family.kernel()
	if have.shape {
		conn.FlushTable(table) // the rules
	} else if have.table {
		conn.DelTable(table)
	}
	conn.AddTable(table)
	for _, reason := range t.counters {
		counter := have.counters[reason] // the kernel takes it for a new one only
		conn.AddObj(&nftables.NamedObj{Table: table, Name: reason, Type: nftables.ObjTypeCounter, Obj: &counter})
	}
	sets := map[string]*nftables.Set{}
	for _, s := range t.sets {
		kernelSet := s.kernel(table)
		sets[s.name] = kernelSet
		if have.sets[s.name] {
			continue
		}
		if have.shape {
			conn.FlushSet(kernelSet)
			err = conn.SetAddElements(kernelSet, s.elements())
		} else {
			err = conn.AddSet(kernelSet, s.elements())
		}
		if err != nil {
			return fmt.Errorf("set %s: %w", s.name, err)
		}
	}
	for _, c := range t.chains { // in order: a chain comes before those that go to it
		kernelChain := conn.AddChain(c.kernel(table))
		for _, rule := range c.rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: kernelChain, Exprs: rule.exprs(t.family, sets)})
		}
	}
	return nil
}

func (s set) kernel(table *nftables.Table) *nftables.Set {
	key := nftables.TypeIPAddr
	if s.v6 {
		key = nftables.TypeIP6Addr
	}
	return &nftables.Set{Table: table, Name: s.name, Interval: true, KeyType: key}
}

// elements are the intervals of a set: each start, and the first address after its end. There is none after the last
// address of all: an interval up to it stays open.
func (s set) elements() []nftables.SetElement {
	elements := make([]nftables.SetElement, 0, 2*len(s.ranges))
	for _, r := range s.ranges {
		start := nftables.SetElement{Key: r.From().AsSlice()}
		after := r.To().Next()
		start.IntervalOpen = !after.IsValid()
		elements = append(elements, start)
		if after.IsValid() {
			elements = append(elements, nftables.SetElement{Key: after.AsSlice(), IntervalEnd: true})
		}
	}
	return elements
}

func (c chain) kernel(table *nftables.Table) *nftables.Chain {
	hooks := map[string]*nftables.ChainHook{
		"output":  nftables.ChainHookOutput,
		"input":   nftables.ChainHookInput,
		"forward": nftables.ChainHookForward,
		"ingress": nftables.ChainHookIngress,
	}
	if c.hook == "" {
		return &nftables.Chain{Table: table, Name: c.name}
	}
	policy := nftables.ChainPolicyDrop
	return &nftables.Chain{Table: table, Name: c.name, Type: nftables.ChainTypeFilter,
		Hooknum: hooks[c.hook], Priority: nftables.ChainPriorityFilter, Policy: &policy, Device: c.dev}
}

// exprs is the rule as the kernel runs it: each match leaves its result in register 1 and ends the rule when it fails.
func (r rule) exprs(in family, sets map[string]*nftables.Set) []expr.Any {
	var all []expr.Any
	for _, t := range r {
		all = append(all, t.exprs(in, sets)...)
	}
	return all
}

var ctStates = map[string]uint32{
	"new": expr.CtStateBitNEW, "related": expr.CtStateBitRELATED, "established": expr.CtStateBitESTABLISHED,
	"invalid": expr.CtStateBitINVALID,
}

// statusConfirmed is the kernel's IPS_CONFIRMED: a packet of the flow has passed all hooks.
const statusConfirmed = 1 << 3

var (
	icmpTypes  = map[string]byte{"redirect": 5, "router-advertisement": 9, "router-solicitation": 10}
	icmp6Types = map[string]byte{
		"nd-router-solicit": 133, "nd-router-advert": 134, "nd-neighbor-solicit": 135, "nd-neighbor-advert": 136, "nd-redirect": 137,
	}
	etherTypes = map[string]uint16{"ip": unix.ETH_P_IP, "ip6": unix.ETH_P_IPV6, "arp": unix.ETH_P_ARP}
	extensions = map[string]byte{"hbh": unix.IPPROTO_HOPOPTS, "rt": unix.IPPROTO_ROUTING}
)

// arpRequest begins every request of ARP: Ethernet, IPv4, the lengths of their addresses, and that it asks.
var arpRequest = []byte{0, 1, 8, 0, 6, 4, 0, 1}

func (t term) exprs(in family, sets map[string]*nftables.Set) []expr.Any {
	switch t.op {
	case opIIF:
		return meta(expr.MetaKeyIIFNAME, ifname(t.name))
	case opOIF:
		return meta(expr.MetaKeyOIFNAME, ifname(t.name))
	case opDaddrIn, opSaddrIn:
		return append(t.loadAddr(in), &expr.Lookup{SourceRegister: 1, SetName: t.name, SetID: sets[t.name].ID, Invert: t.not})
	case opDaddrIs:
		return append(t.loadAddr(in), t.is(t.addr.AsSlice()))
	case opState:
		return flow(expr.CtKeySTATE, ctStates[t.name])
	case opConfirmed:
		return flow(expr.CtKeySTATUS, statusConfirmed)
	case opFlowsOver:
		return []expr.Any{&expr.Connlimit{Count: t.max, Flags: expr.NFT_CONNLIMIT_F_INV}}
	case opTCP:
		return meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_TCP})
	case opICMP:
		proto, kind := byte(unix.IPPROTO_ICMP), icmpTypes[t.name]
		if t.v6 {
			proto, kind = unix.IPPROTO_ICMPV6, icmp6Types[t.name]
		}
		return slices.Concat(t.ofFamily(in), meta(expr.MetaKeyL4PROTO, []byte{proto}),
			[]expr.Any{load(expr.PayloadBaseTransportHeader, 0, 1), t.is([]byte{kind})})
	case opFrom:
		return append(ethernet(), load(expr.PayloadBaseLLHeader, 6, 6), t.is(t.mac))
	case opEtherType:
		return append(ethernet(), load(expr.PayloadBaseLLHeader, 12, 2), t.is(etherType(t.name)))
	case opToUs:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyPKTTYPE, Register: 1}, t.is([]byte{unix.PACKET_HOST})}
	case opVersion:
		version := byte(0x40)
		if t.v6 {
			version = 0x60
		}
		return append(t.ofFamily(in), load(expr.PayloadBaseNetworkHeader, 0, 1), mask(0xf0), t.is([]byte{version}))
	case opNoOptions:
		return append(t.ofFamily(in), load(expr.PayloadBaseNetworkHeader, 0, 1), mask(0x0f), t.is([]byte{5}))
	case opExtension:
		exists := &expr.Exthdr{DestRegister: 1, Type: extensions[t.name], Len: 1, Flags: unix.NFT_EXTHDR_F_PRESENT, Op: expr.ExthdrOpIpv6}
		return append(meta(expr.MetaKeyPROTOCOL, etherType("ip6")), exists, equal([]byte{1}))
	case opARPRequest:
		return append(meta(expr.MetaKeyPROTOCOL, etherType("arp")),
			load(expr.PayloadBaseNetworkHeader, 0, uint32(len(arpRequest))), equal(arpRequest))
	case opARPFrom:
		return append(meta(expr.MetaKeyPROTOCOL, etherType("arp")), load(expr.PayloadBaseNetworkHeader, 8, 6), t.is(t.mac))
	case opARPSource:
		return append(meta(expr.MetaKeyPROTOCOL, etherType("arp")), load(expr.PayloadBaseNetworkHeader, 14, 4), t.is(t.addr.AsSlice()))
	case opARPTarget:
		return append(meta(expr.MetaKeyPROTOCOL, etherType("arp")), load(expr.PayloadBaseNetworkHeader, 24, 4), t.is(t.addr.AsSlice()))
	case opCount:
		return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: t.name}}
	case opAccept:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	case opDrop:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	case opGoto:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: t.name}}
	case opResetTCP:
		return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}
	case opProhibit:
		return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
	}
	panic(fmt.Sprintf("BUG: term %d has no form for the kernel", t.op))
}

// ofFamily matches packets of the term's family only; the rules for packets and those for frames know them by different marks.
func (t term) ofFamily(in family) []expr.Any {
	switch {
	case in == netdev && t.v6:
		return meta(expr.MetaKeyPROTOCOL, etherType("ip6"))
	case in == netdev:
		return meta(expr.MetaKeyPROTOCOL, etherType("ip"))
	case t.v6:
		return meta(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV6})
	}
	return meta(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV4})
}

// loadAddr leaves the source or destination address in register 1, for packets of the term's family only.
func (t term) loadAddr(in family) []expr.Any {
	offset, size := uint32(16), uint32(4)
	if t.op == opSaddrIn {
		offset = 12
	}
	if t.v6 {
		offset, size = 24, 16
		if t.op == opSaddrIn {
			offset = 8
		}
	}
	return append(t.ofFamily(in), load(expr.PayloadBaseNetworkHeader, offset, size))
}

// load leaves a piece of the packet in register 1.
func load(base expr.PayloadBase, offset, size uint32) expr.Any {
	return &expr.Payload{Base: base, DestRegister: 1, Offset: offset, Len: size}
}

// mask keeps some bits of the byte in register 1.
func mask(bits byte) expr.Any {
	return &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{bits}, Xor: []byte{0}}
}

// ethernet matches devices whose frames have such a header.
func ethernet() []expr.Any {
	return meta(expr.MetaKeyIIFTYPE, binaryutil.NativeEndian.PutUint16(unix.ARPHRD_ETHER))
}

func etherType(name string) []byte { return binary.BigEndian.AppendUint16(nil, etherTypes[name]) }

// flow matches packets of flows that have one of these bits.
func flow(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func meta(key expr.MetaKey, want []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, equal(want)}
}

func equal(want []byte) *expr.Cmp { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: want} }

// is compares register 1 with what the term wants, or does not want.
func (t term) is(want []byte) *expr.Cmp {
	cmp := equal(want)
	if t.not {
		cmp.Op = expr.CmpOpNeq
	}
	return cmp
}

// ifname is a device name as the kernel compares it: padded with zeros to its full 16 bytes.
func ifname(dev string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, dev)
	return b
}

// checkTap makes sure that the tap is there, before rules for its frames are hung on it.
func (r Ruleset) checkTap() error {
	if r.tap == "" {
		return nil
	}
	if _, err := net.InterfaceByName(r.tap); err != nil {
		return fmt.Errorf("find %s: %w", r.tap, err)
	}
	return nil
}

// explain finds out whether the kernel refused the rules because it cannot do what all rules for frames need.
func (r Ruleset) explain(err error) error {
	if r.tap == "" || !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	if hookErr := tryIngress(r.tap); hookErr != nil {
		return fmt.Errorf("this kernel cannot filter what comes in by a device (nftables family netdev; CONFIG_NF_TABLES_NETDEV, CONFIG_NETFILTER_INGRESS): %w", err)
	}
	return err
}

// tryIngress makes a chain for the frames of a device in the thread's namespace, and takes it away in the same transaction.
func tryIngress(dev string) error {
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	table := &nftables.Table{Family: nftables.TableFamilyNetdev, Name: tableName + "_try"}
	conn.AddTable(table)
	conn.AddChain(chain{name: "ingress", hook: "ingress", dev: dev}.kernel(table))
	conn.DelTable(table)
	return conn.Flush()
}

// inNetNS runs fn on an operating system thread of its own inside the namespace. The thread ends with fn, and is never the
// process's first, which cannot end and would keep the namespace for good.
func inNetNS(ns int, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			done <- inNetNS(ns, fn) // this goroutine holds the first thread meanwhile, so the next one gets another
			runtime.UnlockOSThread()
			return
		}
		// Never unlocked: the runtime discards the thread when its goroutine ends.
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			done <- os.NewSyscallError("setns", err)
			return
		}
		done <- fn()
	}()
	return <-done
}
