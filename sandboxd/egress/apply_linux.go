package egress

import (
	"errors"
	"fmt"
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
	var have standing
	err = inNetNS(ns, func() (err error) {
		if have, err = r.standing(); err != nil {
			return err
		}
		return r.replace(have)
	})
	if err != nil {
		return fmt.Errorf("replace egress rules: %w", err)
	}
	if !have.table {
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
	var counters map[string]expr.Counter
	err = inNetNS(ns, func() (err error) {
		counters, err = readCounters()
		return err
	})
	if err != nil {
		return Refusals{}, err
	}
	return Refusals{
		Reserved: counters[reasonReserved].Packets,
		Denied:   counters[reasonDenied].Packets,
		Spoofed:  counters[reasonSpoofed].Packets,
		Inbound:  counters[reasonInbound].Packets,
		Flows:    counters[reasonFlows].Packets,
	}, nil
}

func openNetNS(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open network namespace", Path: path, Err: err}
	}
	return fd, nil
}

// readCounters returns the counters in the thread's namespace by name, none when there is no table yet.
func readCounters() (map[string]expr.Counter, error) {
	conn, err := netfilter.NewConn()
	if err != nil {
		return nil, err
	}
	objects, err := conn.GetNamedObjects(table())
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

func table() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: tableName}
}

// standing is what a namespace holds already.
type standing struct {
	table    bool // of any shape
	shape    bool // with exactly the sets and chains of the ruleset to come
	counters map[string]expr.Counter
	sets     map[string]bool // of the right shape: whose elements are right as well
}

// standing looks at the thread's namespace. Only Apply changes the table, and its caller does one thing at a time to a sandbox.
func (r Ruleset) standing() (have standing, err error) {
	conn, err := netfilter.NewConn()
	if err != nil {
		return have, err
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return have, fmt.Errorf("list tables: %w", err)
	}
	if have.table = slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == tableName }); !have.table {
		return have, nil
	}
	if have.counters, err = readCounters(); err != nil {
		return have, err
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return have, fmt.Errorf("list chains: %w", err)
	}
	sets, err := conn.GetSets(table())
	if err != nil {
		return have, fmt.Errorf("list sets: %w", err)
	}
	have.shape = slices.Equal(
		names(chains, func(c *nftables.Chain) string { return c.Name }),
		names(r.chains, func(c chain) string { return c.name }),
	) && slices.Equal(
		names(sets, func(s *nftables.Set) string { return s.Name }),
		names(r.sets, func(s set) string { return s.name }),
	)
	if !have.shape {
		return have, nil
	}
	have.sets = map[string]bool{}
	for _, s := range r.sets {
		elements, err := conn.GetSetElements(s.kernel(table()))
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

// replace sends the ruleset to the thread's namespace. A table of the same shape stays, with its hooks, and only its rules and the
// sets that differ are exchanged: deleting it would leave a moment in which packets find the old chains with sets already empty,
// and the new ones with no rules yet and a policy of drop.
func (r Ruleset) replace(have standing) error {
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	table := table()
	if have.shape {
		conn.FlushTable(table) // the rules
	} else if have.table {
		conn.DelTable(table)
	}
	conn.AddTable(table)
	for _, reason := range reasons {
		counter := have.counters[reason] // the kernel takes it for a new one only
		conn.AddObj(&nftables.NamedObj{Table: table, Name: reason, Type: nftables.ObjTypeCounter, Obj: &counter})
	}
	sets := map[string]*nftables.Set{}
	for _, s := range r.sets {
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
	for _, c := range r.chains { // in order: a chain comes before those that go to it
		kernelChain := conn.AddChain(c.kernel(table))
		for _, rule := range c.rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: kernelChain, Exprs: rule.exprs(sets)})
		}
	}
	return conn.Flush()
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
	}
	if c.hook == "" {
		return &nftables.Chain{Table: table, Name: c.name}
	}
	policy := nftables.ChainPolicyDrop
	return &nftables.Chain{Table: table, Name: c.name, Type: nftables.ChainTypeFilter,
		Hooknum: hooks[c.hook], Priority: nftables.ChainPriorityFilter, Policy: &policy}
}

// exprs is the rule as the kernel runs it: each match leaves its result in register 1 and ends the rule when it fails.
func (r rule) exprs(sets map[string]*nftables.Set) []expr.Any {
	var all []expr.Any
	for _, t := range r {
		all = append(all, t.exprs(sets)...)
	}
	return all
}

var ctStates = map[string]uint32{
	"new": expr.CtStateBitNEW, "related": expr.CtStateBitRELATED, "established": expr.CtStateBitESTABLISHED,
}

// statusConfirmed is the kernel's IPS_CONFIRMED: a packet of the flow has passed all hooks.
const statusConfirmed = 1 << 3

var icmpTypes = map[string]byte{"nd-neighbor-solicit": 135, "nd-neighbor-advert": 136}

func (t term) exprs(sets map[string]*nftables.Set) []expr.Any {
	switch t.op {
	case opIIF:
		return meta(expr.MetaKeyIIFNAME, ifname(t.name))
	case opOIF:
		return meta(expr.MetaKeyOIFNAME, ifname(t.name))
	case opDaddrIn, opSaddrIn, opSaddrNotIn:
		return append(t.loadAddr(), &expr.Lookup{
			SourceRegister: 1, SetName: t.name, SetID: sets[t.name].ID, Invert: t.op == opSaddrNotIn,
		})
	case opDaddrIs:
		return append(t.loadAddr(), equal(t.addr.AsSlice()))
	case opState:
		return flow(expr.CtKeySTATE, ctStates[t.name])
	case opConfirmed:
		return flow(expr.CtKeySTATUS, statusConfirmed)
	case opFlowsOver:
		return []expr.Any{&expr.Connlimit{Count: t.max, Flags: expr.NFT_CONNLIMIT_F_INV}}
	case opTCP:
		return meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_TCP})
	case opNeighbour:
		return slices.Concat(
			meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_ICMPV6}),
			[]expr.Any{
				&expr.Payload{Base: expr.PayloadBaseTransportHeader, DestRegister: 1, Offset: 0, Len: 1},
				equal([]byte{icmpTypes[t.name]}),
			})
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

// loadAddr leaves the source or destination address in register 1, for packets of the term's family only.
func (t term) loadAddr() []expr.Any {
	load := &expr.Payload{Base: expr.PayloadBaseNetworkHeader, DestRegister: 1, Offset: 16, Len: 4}
	proto := byte(unix.NFPROTO_IPV4)
	source := t.op == opSaddrIn || t.op == opSaddrNotIn
	if source {
		load.Offset = 12
	}
	if t.v6 {
		load.Offset, load.Len, proto = 24, 16, unix.NFPROTO_IPV6
		if source {
			load.Offset = 8
		}
	}
	return append(meta(expr.MetaKeyNFPROTO, []byte{proto}), load)
}

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

// ifname is a device name as the kernel compares it: padded with zeros to its full 16 bytes.
func ifname(dev string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, dev)
	return b
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
