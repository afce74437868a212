package lab

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/netfilter"
)

// The door is where the cable enters the internet. Counters there see packets of every protocol and to every port, so that a test
// need not trust that a server was listening.
const (
	counterTrapped  = "trapped"
	counterStranger = "strangers"
)

var door = &nftables.Table{Family: nftables.TableFamilyINet, Name: "door"}

// Trapped counts the packets that reached any address of the trap ranges.
func (l *Lab) Trapped() uint64 { return l.doorCounter(counterTrapped) }

// Strangers counts the packets whose source address was not the host's: spoofed, or not translated.
func (l *Lab) Strangers() uint64 { return l.doorCounter(counterStranger) }

func (l *Lab) doorCounter(name string) uint64 {
	conn, err := netfilter.NewConn()
	if err != nil {
		panic(fmt.Sprintf("BUG: open the door's table: %v", err))
	}
	var obj nftables.Obj
	if enterErr := visit(l.internet, func() {
		obj, err = conn.GetObject(&nftables.NamedObj{Table: door, Name: name, Type: nftables.ObjTypeCounter})
	}); enterErr != nil || err != nil {
		panic(fmt.Sprintf("BUG: read the door's counter %s: %v", name, errors.Join(enterErr, err)))
	}
	return obj.(*nftables.NamedObj).Obj.(*expr.Counter).Packets
}

// installDoor runs inside the internet's namespace.
func installDoor() error {
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	conn.AddTable(door)
	for _, name := range []string{counterTrapped, counterStranger} {
		conn.AddObj(&nftables.NamedObj{Table: door, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
	}
	chain := conn.AddChain(&nftables.Chain{Table: door, Name: "arrivals", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw})
	var failed error
	for _, family := range []struct {
		proto        byte
		size         uint32
		saddr, daddr uint32 // offsets in the header
		key          nftables.SetDatatype
		host         netip.Addr
	}{
		{unix.NFPROTO_IPV4, 4, 12, 16, nftables.TypeIPAddr, HostAddr},
		{unix.NFPROTO_IPV6, 16, 8, 24, nftables.TypeIP6Addr, HostAddr6},
	} {
		traps := &nftables.Set{Table: door, Name: fmt.Sprintf("traps%d", family.size), Interval: true, KeyType: family.key}
		known := &nftables.Set{Table: door, Name: fmt.Sprintf("known%d", family.size), Interval: true, KeyType: family.key}
		var trapElements []nftables.SetElement
		for _, p := range trapRanges {
			if p.Addr().BitLen() == int(family.size)*8 {
				trapElements = append(trapElements, interval(p)...)
			}
		}
		knownElements := interval(netip.PrefixFrom(family.host, family.host.BitLen()))
		if family.size == 16 { // neighbour discovery
			knownElements = append(knownElements, interval(netip.MustParsePrefix("::/128"))...)
			knownElements = append(knownElements, interval(netip.MustParsePrefix("fe80::/10"))...)
		}
		failed = errors.Join(failed, conn.AddSet(traps, trapElements), conn.AddSet(known, knownElements))
		rule := func(offset uint32, set *nftables.Set, invert bool, counter string) {
			conn.AddRule(&nftables.Rule{Table: door, Chain: chain, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append([]byte("lan0"), make([]byte, 12)...)},
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family.proto}},
				&expr.Payload{Base: expr.PayloadBaseNetworkHeader, DestRegister: 1, Offset: offset, Len: family.size},
				&expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID, Invert: invert},
				&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: counter},
			}})
		}
		rule(family.daddr, traps, false, counterTrapped)
		rule(family.saddr, known, true, counterStranger)
	}
	if failed != nil {
		return failed
	}
	return conn.Flush()
}

// interval is a prefix as the kernel's sets want it: its first address, and the first one after it.
func interval(p netip.Prefix) []nftables.SetElement {
	last := p.Addr().AsSlice()
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	end, _ := netip.AddrFromSlice(last)
	return []nftables.SetElement{{Key: p.Addr().AsSlice()}, {Key: end.Next().AsSlice(), IntervalEnd: true}}
}
