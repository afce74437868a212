package netdev

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"go4.org/netipx"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/netfilter"
)

// The host's table is constant: rules that know the slots by the beginning of their devices' names, and two sets that say which
// source address belongs to which device. In nft's words, for the prefix "sl":
//
//	set slots4 { type ifname . ipv4_addr }      # sl-0 . 10.12.0.1
//	set slots6 { type ifname . ipv6_addr }
//	set private4, private6 { flags interval }   # nothing of a slot goes there, whatever its own rules say
//	chain spoofed { hook prerouting priority raw
//		iifname "sl-*" meta nfproto ipv4 iifname . ip saddr != @slots4 drop
//		iifname "sl-*" meta nfproto ipv6 iifname . ip6 saddr != @slots6 drop }
//	chain input { hook input priority filter
//		iifname "sl-*" drop }                    # sandbox to node: never
//	chain forward { hook forward priority filter
//		iifname "sl-*" goto from_slot
//		oifname "sl-*" goto to_slot }
//	chain from_slot {
//		oifname "sl-*" drop                      # sandbox to sandbox: never
//		ip daddr @private4 drop
//		ip6 daddr @private6 drop
//		ct state invalid drop                    # would leave with the slot's own address
//		accept }
//	chain to_slot {
//		ct state established,related accept
//		drop }
//	chain masquerade { type nat hook postrouting priority srcnat
//		oifname != "sl-*" ip saddr 10.12.0.0/16 masquerade
//		oifname != "sl-*" ip6 saddr fd73:6c75:6963:6500::/64 masquerade }

// private is what no sandbox may reach at all. The rules inside the namespace refuse more, and in a way that programs see;
// these are the ones that must hold even if those were not there.
var private = mustPrefixes(
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
	"224.0.0.0/4", "240.0.0.0/4",
	"::/127", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
)

func mustPrefixes(texts ...string) (prefixes []netip.Prefix) {
	for _, text := range texts {
		prefixes = append(prefixes, netip.MustParsePrefix(text))
	}
	return prefixes
}

func (n *Network) table() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: n.cfg.tableName()}
}

func slotSet(t *nftables.Table, v6 bool) *nftables.Set {
	set := &nftables.Set{Table: t, Name: "slots4", Concatenation: true,
		KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr)}
	if v6 {
		set.Name = "slots6"
		set.KeyType = nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIP6Addr)
	}
	return set
}

// slotElement is the key "device . address".
func slotElement(dev string, addr netip.Addr) []nftables.SetElement {
	return []nftables.SetElement{{Key: append(ifname(dev), addr.AsSlice()...)}}
}

// ifname is a device name as the kernel compares it: padded with zeros to its full 16 bytes.
func ifname(dev string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, dev)
	return b
}

// replaceTable puts the table in place in one transaction, with these slots in it. It keeps the notes of the one before.
func (n *Network) replaceTable(indexes []int) error {
	notes, err := n.notes(n.cfg.tableName())
	if err != nil {
		return err
	}
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	table := n.table()
	conn.AddTable(table) // so that there is one to delete
	conn.DelTable(table)
	conn.AddTable(table)
	for _, note := range notes {
		conn.AddChain(&nftables.Chain{Table: table, Name: note})
	}
	slots4, slots6 := slotSet(table, false), slotSet(table, true)
	var elements4, elements6 []nftables.SetElement
	for _, index := range indexes {
		p, err := n.cfg.plan(index)
		if err != nil {
			return err
		}
		elements4 = append(elements4, slotElement(p.hostDev, p.guest)...)
		elements6 = append(elements6, slotElement(p.hostDev, p.guest6)...)
	}
	private4, private6, err := addPrivateSets(conn, table)
	if err != nil {
		return err
	}
	if err := errors.Join(conn.AddSet(slots4, elements4), conn.AddSet(slots6, elements6)); err != nil {
		return err
	}
	n.addRules(conn, table, slots4, slots6, private4, private6)
	return conn.Flush()
}

func (n *Network) addRules(conn *nftables.Conn, table *nftables.Table, slots4, slots6, private4, private6 *nftables.Set) {
	drop, accept := &expr.Verdict{Kind: expr.VerdictDrop}, &expr.Verdict{Kind: expr.VerdictAccept}
	chain := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
		return conn.AddChain(&nftables.Chain{Table: table, Name: name, Type: typ, Hooknum: hook, Priority: priority})
	}
	rule := func(c *nftables.Chain, parts ...[]expr.Any) {
		conn.AddRule(&nftables.Rule{Table: table, Chain: c, Exprs: slices.Concat(parts...)})
	}
	end := func(v *expr.Verdict) []expr.Any { return []expr.Any{v} }
	from := n.device(expr.MetaKeyIIFNAME, expr.CmpOpEq)
	to := n.device(expr.MetaKeyOIFNAME, expr.CmpOpEq)
	notTo := n.device(expr.MetaKeyOIFNAME, expr.CmpOpNeq)

	spoofed := chain("spoofed", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	rule(spoofed, from, notOf(slots4, false), end(drop))
	rule(spoofed, from, notOf(slots6, true), end(drop))

	input := chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	rule(input, from, end(drop))

	fromSlot, toSlot := chain("from_slot", "", nil, nil), chain("to_slot", "", nil, nil)
	rule(fromSlot, to, end(drop))
	rule(fromSlot, daddrIn(private4, false), end(drop))
	rule(fromSlot, daddrIn(private6, true), end(drop))
	rule(fromSlot, ctState(expr.CtStateBitINVALID), end(drop))
	rule(fromSlot, end(accept))
	rule(toSlot, ctState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), end(accept))
	rule(toSlot, end(drop))

	forward := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	rule(forward, from, end(&expr.Verdict{Kind: expr.VerdictGoto, Chain: fromSlot.Name}))
	rule(forward, to, end(&expr.Verdict{Kind: expr.VerdictGoto, Chain: toSlot.Name}))

	nat := chain("masquerade", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	rule(nat, notTo, saddrIn(n.cfg.Prefix), []expr.Any{&expr.Masq{}})
	rule(nat, notTo, saddrIn(n.cfg.Prefix6), []expr.Any{&expr.Masq{}})
}

// device matches the beginning of a device's name: `iifname "sl-*"`.
func (n *Network) device(key expr.MetaKey, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: []byte(n.cfg.NamePrefix + "-")},
	}
}

func nfproto(v6 bool) []expr.Any {
	proto := byte(unix.NFPROTO_IPV4)
	if v6 {
		proto = unix.NFPROTO_IPV6
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

// loadAddr puts the source or destination address into a register.
func loadAddr(v6, source bool, register uint32) expr.Any {
	load := &expr.Payload{Base: expr.PayloadBaseNetworkHeader, DestRegister: register, Offset: 16, Len: 4}
	switch {
	case v6 && source:
		load.Offset, load.Len = 8, 16
	case v6:
		load.Offset, load.Len = 24, 16
	case source:
		load.Offset = 12
	}
	return load
}

// notOf matches packets whose device and source address are not in set together.
func notOf(set *nftables.Set, v6 bool) []expr.Any {
	// The device's name takes the first 16 bytes of the registers, the address follows it.
	return append(nfproto(v6),
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: unix.NFT_REG32_00},
		loadAddr(v6, true, unix.NFT_REG32_04),
		&expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: set.Name, SetID: set.ID, Invert: true},
	)
}

func daddrIn(set *nftables.Set, v6 bool) []expr.Any {
	return append(nfproto(v6), loadAddr(v6, false, 1), &expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID})
}

func saddrIn(p netip.Prefix) []expr.Any {
	v6 := p.Addr().Is6()
	size := p.Addr().BitLen() / 8
	mask := make([]byte, size)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return append(nfproto(v6),
		loadAddr(v6, true, 1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(size), Mask: mask, Xor: make([]byte, size)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
	)
}

func ctState(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func addPrivateSets(conn *nftables.Conn, table *nftables.Table) (v4, v6 *nftables.Set, err error) {
	var builder netipx.IPSetBuilder
	for _, p := range private {
		builder.AddPrefix(p)
	}
	all, err := builder.IPSet()
	if err != nil {
		return nil, nil, err
	}
	v4 = &nftables.Set{Table: table, Name: "private4", Interval: true, KeyType: nftables.TypeIPAddr}
	v6 = &nftables.Set{Table: table, Name: "private6", Interval: true, KeyType: nftables.TypeIP6Addr}
	var elements4, elements6 []nftables.SetElement
	for _, r := range all.Ranges() {
		start := nftables.SetElement{Key: r.From().AsSlice()}
		interval := []nftables.SetElement{start}
		// The end is exclusive, and the last address of all has none after it: that interval stays open.
		if next := r.To().Next(); next.IsValid() {
			interval = append(interval, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
		} else {
			interval[0].IntervalOpen = true
		}
		if r.From().Is4() {
			elements4 = append(elements4, interval...)
		} else {
			elements6 = append(elements6, interval...)
		}
	}
	return v4, v6, errors.Join(conn.AddSet(v4, elements4), conn.AddSet(v6, elements6))
}

// addToTable lets a slot's addresses pass; it may be there already.
func (n *Network) addToTable(p plan) error { return n.editSets(p, (*nftables.Conn).SetAddElements) }

// removeFromTable undoes addToTable. Neither the elements nor the table need exist.
func (n *Network) removeFromTable(p plan) error {
	err := n.editSets(p, (*nftables.Conn).SetDestroyElements)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func (n *Network) editSets(p plan, edit func(*nftables.Conn, *nftables.Set, []nftables.SetElement) error) error {
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	table := n.table()
	err = errors.Join(
		edit(conn, slotSet(table, false), slotElement(p.hostDev, p.guest)),
		edit(conn, slotSet(table, true), slotElement(p.hostDev, p.guest6)),
	)
	if err != nil {
		return err
	}
	return conn.Flush()
}

// addNote leaves an empty chain in the table.
func (n *Network) addNote(note string) error {
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	conn.AddChain(&nftables.Chain{Table: n.table(), Name: note})
	return conn.Flush()
}

// notes returns the notes in a node's table, none when there is no such table.
func (n *Network) notes(tableName string) (notes []string, err error) {
	conn, err := netfilter.NewConn()
	if err != nil {
		return nil, err
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	for _, chain := range chains {
		isNote := slices.ContainsFunc(forwarding, func(f struct{ path, note string }) bool { return f.note == chain.Name })
		if chain.Table.Name == tableName && isNote {
			notes = append(notes, chain.Name)
		}
	}
	return notes, nil
}

// removeTable deletes the table and puts forwarding back. Another node's table on this host means that it is still needed: then
// that one inherits the notes, and the last to go restores.
func (n *Network) removeTable() error {
	notes, err := n.notes(n.cfg.tableName())
	if err != nil {
		return err
	}
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list tables: %w", err)
	}
	var own, heir *nftables.Table
	for _, table := range tables {
		switch {
		case table.Name == n.cfg.tableName():
			own = table
		case strings.HasPrefix(table.Name, tablePrefix):
			heir = table
		}
	}
	if own == nil {
		return nil
	}
	if heir == nil {
		err = n.restoreForwarding(notes)
	} else {
		for _, note := range notes {
			conn.AddChain(&nftables.Chain{Table: heir, Name: note})
		}
	}
	conn.DelTable(own)
	if flushErr := conn.Flush(); flushErr != nil {
		return errors.Join(err, fmt.Errorf("delete table %s: %w", own.Name, flushErr))
	}
	return err
}
