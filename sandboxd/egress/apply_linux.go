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
)

// Apply puts r in force in the network namespace at the path netns, in place of whatever was there, in one transaction: at no
// instant is the namespace open or half fenced. The counters go on. Then it ends the flows that r forbids; an error that says
// so means that the rules are in force all the same.
func Apply(netns string, r Ruleset) error {
	ns, err := openNetNS(netns)
	if err != nil {
		return err
	}
	defer unix.Close(ns)
	counters, err := readCounters(ns)
	if err != nil {
		return err
	}
	if err := r.replace(ns, counters); err != nil {
		return fmt.Errorf("replace egress rules: %w", err)
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
	counters, err := readCounters(ns)
	if err != nil {
		return Refusals{}, err
	}
	return Refusals{
		Reserved: counters[reasonReserved].Packets,
		Denied:   counters[reasonDenied].Packets,
		Spoofed:  counters[reasonSpoofed].Packets,
		Inbound:  counters[reasonInbound].Packets,
	}, nil
}

func openNetNS(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open network namespace", Path: path, Err: err}
	}
	return fd, nil
}

// readCounters returns the counters by name, none when there is no table yet.
func readCounters(ns int) (map[string]expr.Counter, error) {
	conn, err := nftables.New(nftables.WithNetNSFd(ns))
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

// replace sends the ruleset. The connection is new each time: one that failed would replay what it could not send.
func (r Ruleset) replace(ns int, counters map[string]expr.Counter) error {
	conn, err := nftables.New(nftables.WithNetNSFd(ns))
	if err != nil {
		return err
	}
	table := table()
	conn.AddTable(table) // so that there is one to delete
	conn.DelTable(table)
	conn.AddTable(table)
	for _, reason := range reasons {
		counter := counters[reason]
		conn.AddObj(&nftables.NamedObj{Table: table, Name: reason, Type: nftables.ObjTypeCounter, Obj: &counter})
	}
	sets := map[string]*nftables.Set{}
	for _, s := range r.sets {
		kernelSet := &nftables.Set{Table: table, Name: s.name, Interval: true, KeyType: nftables.TypeIPAddr}
		if s.v6 {
			kernelSet.KeyType = nftables.TypeIP6Addr
		}
		if err := conn.AddSet(kernelSet, s.elements()); err != nil {
			return fmt.Errorf("set %s: %w", s.name, err)
		}
		sets[s.name] = kernelSet
	}
	for _, c := range r.chains { // in order: a chain comes before those that go to it
		kernelChain := conn.AddChain(c.kernel(table))
		for _, rule := range c.rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: kernelChain, Exprs: rule.exprs(sets)})
		}
	}
	return conn.Flush()
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

var ctStates = map[string]uint32{"related": expr.CtStateBitRELATED, "established": expr.CtStateBitESTABLISHED}

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
		return []expr.Any{
			&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
				Mask: binaryutil.NativeEndian.PutUint32(ctStates[t.name]), Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
		}
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

// inNetNS runs fn on an operating system thread of its own inside the namespace. The thread ends with fn.
func inNetNS(ns int, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime discards the thread when its goroutine ends
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			done <- os.NewSyscallError("setns", err)
			return
		}
		done <- fn()
	}()
	return <-done
}
