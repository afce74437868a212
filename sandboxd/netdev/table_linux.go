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
//	set flows { type ifname; flags dynamic }    # how many each slot has in the host's table of flows
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
//		ct status confirmed accept
//		ct state new add @flows { iifname ct count over 16384 } drop
//		ct state new,established,related accept
//		drop }                                   # untracked: nobody would translate it
//	chain to_slot {
//		ct state established,related accept
//		drop }
//	chain masquerade { type nat hook postrouting priority srcnat
//		oifname != "sl-*" ip saddr 10.12.0.0/16 masquerade
//		oifname != "sl-*" ip6 saddr fd73:6c75:6963:6500::/64 masquerade }
//	chain untranslated { hook postrouting priority srcnat + 1
//		oifname != "sl-*" ip saddr 10.12.0.0/16 drop
//		oifname != "sl-*" ip6 saddr fd73:6c75:6963:6500::/64 drop }

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

func flowSet(t *nftables.Table) *nftables.Set {
	return &nftables.Set{Table: t, Name: "flows", Dynamic: true, KeyType: nftables.TypeIFName}
}

func privateSet(t *nftables.Table, v6 bool) *nftables.Set {
	if v6 {
		return &nftables.Set{Table: t, Name: "private6", Interval: true, KeyType: nftables.TypeIP6Addr}
	}
	return &nftables.Set{Table: t, Name: "private4", Interval: true, KeyType: nftables.TypeIPAddr}
}

// setupLocked runs in the home namespace. It puts the table in place in one transaction, with the slots that exist in it and the
// notes of the one before, lets the kernel forward, and remembers what it made.
func (n *Network) setupLocked() error {
	indexes, err := n.list()
	if err != nil {
		return err
	}
	if err := n.replaceTableLocked(indexes); err != nil {
		return fmt.Errorf("replace host table %s: %w", n.cfg.tableName(), err)
	}
	if err := n.enableForwardingLocked(); err != nil {
		return err
	}
	n.made, err = n.tableState()
	return err
}

func (n *Network) replaceTableLocked(indexes []int) error {
	notes, err := n.notes(n.cfg.tableName())
	if err != nil {
		return err
	}
	for _, note := range notes {
		n.noteLocked(note)
	}
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	table := n.table()
	conn.AddTable(table) // so that there is one to delete
	conn.DelTable(table)
	conn.AddTable(table)
	for _, note := range n.noted {
		conn.AddChain(&nftables.Chain{Table: table, Name: note})
	}
	sets := hostSets{
		slots4: slotSet(table, false), slots6: slotSet(table, true),
		private4: privateSet(table, false), private6: privateSet(table, true),
		flows: flowSet(table),
	}
	var elements4, elements6 []nftables.SetElement
	for _, index := range indexes {
		p, err := n.cfg.plan(index)
		if err != nil {
			return err
		}
		elements4 = append(elements4, slotElement(p.hostDev, p.guest)...)
		elements6 = append(elements6, slotElement(p.hostDev, p.guest6)...)
	}
	private4, private6, err := privateElements()
	if err != nil {
		return err
	}
	err = errors.Join(
		conn.AddSet(sets.slots4, elements4), conn.AddSet(sets.slots6, elements6),
		conn.AddSet(sets.private4, private4), conn.AddSet(sets.private6, private6),
		conn.AddSet(sets.flows, nil),
	)
	if err != nil {
		return err
	}
	n.addRules(conn, table, sets)
	return conn.Flush()
}

// tableState tells one state of the table from another: by its chains, the handles of their rules, which the kernel gives out once,
// and the number of private ranges. It is empty without a table. Slots come and go without changing it.
func (n *Network) tableState() (string, error) {
	conn, err := netfilter.NewConn()
	if err != nil {
		return "", err
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return "", fmt.Errorf("list chains: %w", err)
	}
	var state strings.Builder
	for _, chain := range chains {
		if chain.Table.Name != n.cfg.tableName() || isNote(chain.Name) {
			continue
		}
		rules, err := conn.GetRules(n.table(), chain)
		if err != nil {
			return "", fmt.Errorf("list rules of %s: %w", chain.Name, err)
		}
		state.WriteString(chain.Name)
		for _, rule := range rules {
			fmt.Fprintf(&state, " %d", rule.Handle)
		}
		state.WriteByte('\n')
	}
	if state.Len() == 0 {
		return "", nil
	}
	for _, v6 := range []bool{false, true} {
		elements, err := conn.GetSetElements(privateSet(n.table(), v6))
		if err != nil {
			return "", fmt.Errorf("read private ranges: %w", err)
		}
		fmt.Fprintln(&state, len(elements))
	}
	return state.String(), nil
}

// wholeLocked reports whether the table is as setupLocked made it, and has every slot that we know in it.
func (n *Network) wholeLocked() (bool, error) {
	state, err := n.tableState()
	if errors.Is(err, unix.ENOENT) { // it is going
		return false, nil
	}
	if err != nil || state == "" || state != n.made {
		return false, err
	}
	conn, err := netfilter.NewConn()
	if err != nil {
		return false, err
	}
	there := map[string]bool{}
	for _, v6 := range []bool{false, true} {
		elements, err := conn.GetSetElements(slotSet(n.table(), v6))
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("read slots: %w", err)
		}
		for _, e := range elements {
			there[string(e.Key)] = true
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for index := range n.slots {
		p, err := n.cfg.plan(index)
		if err != nil {
			return false, err
		}
		if !there[string(slotElement(p.hostDev, p.guest)[0].Key)] || !there[string(slotElement(p.hostDev, p.guest6)[0].Key)] {
			return false, nil
		}
	}
	return true, nil
}

// hostSets are the sets that the rules refer to.
type hostSets struct{ slots4, slots6, private4, private6, flows *nftables.Set }

func (n *Network) addRules(conn *nftables.Conn, table *nftables.Table, sets hostSets) {
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
	rule(spoofed, from, notOf(sets.slots4, false), end(drop))
	rule(spoofed, from, notOf(sets.slots6, true), end(drop))

	input := chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	rule(input, from, end(drop))

	fromSlot, toSlot := chain("from_slot", "", nil, nil), chain("to_slot", "", nil, nil)
	rule(fromSlot, to, end(drop))
	rule(fromSlot, daddrIn(sets.private4, false), end(drop))
	rule(fromSlot, daddrIn(sets.private6, true), end(drop))
	rule(fromSlot, flowHas(expr.CtKeySTATE, expr.CtStateBitINVALID), end(drop))
	rule(fromSlot, flowHas(expr.CtKeySTATUS, statusConfirmed), end(accept)) // counted when it began
	rule(fromSlot, flowHas(expr.CtKeySTATE, expr.CtStateBitNEW), n.tooMany(sets.flows), end(drop))
	rule(fromSlot, flowHas(expr.CtKeySTATE, expr.CtStateBitNEW|expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), end(accept))
	rule(fromSlot, end(drop)) // untracked: nobody would translate it
	rule(toSlot, flowHas(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), end(accept))
	rule(toSlot, end(drop))

	forward := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	rule(forward, from, end(&expr.Verdict{Kind: expr.VerdictGoto, Chain: fromSlot.Name}))
	rule(forward, to, end(&expr.Verdict{Kind: expr.VerdictGoto, Chain: toSlot.Name}))

	nat := chain("masquerade", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	rule(nat, notTo, saddrIn(n.cfg.Prefix), []expr.Any{&expr.Masq{}})
	rule(nat, notTo, saddrIn(n.cfg.Prefix6), []expr.Any{&expr.Masq{}})

	// Behind the translation, whatever kept it from translating: a slot's address is nobody's business outside.
	bare := chain("untranslated", nftables.ChainTypeFilter, nftables.ChainHookPostrouting, nftables.ChainPriorityRef(*nftables.ChainPriorityNATSource+1))
	rule(bare, notTo, saddrIn(n.cfg.Prefix), end(drop))
	rule(bare, notTo, saddrIn(n.cfg.Prefix6), end(drop))
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

// statusConfirmed is the kernel's IPS_CONFIRMED: a packet of the flow has passed all hooks.
const statusConfirmed = 1 << 3

// flowHas matches packets of flows that have one of these bits.
func flowHas(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// tooMany counts a flow of the device that it comes from, and matches when there are more than a slot may have.
func (n *Network) tooMany(flows *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Dynset{SrcRegKey: 1, SetName: flows.Name, SetID: flows.ID, Operation: unix.NFT_DYNSET_OP_ADD,
			Exprs: []expr.Any{&expr.Connlimit{Count: n.cfg.MaxFlows, Flags: expr.NFT_CONNLIMIT_F_INV}}},
	}
}

// privateElements are the elements of the private sets.
func privateElements() (v4, v6 []nftables.SetElement, err error) {
	var builder netipx.IPSetBuilder
	for _, p := range private {
		builder.AddPrefix(p)
	}
	all, err := builder.IPSet()
	if err != nil {
		return nil, nil, err
	}
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
			v4 = append(v4, interval...)
		} else {
			v6 = append(v6, interval...)
		}
	}
	return v4, v6, nil
}

// addToTable lets a slot's addresses pass; it may be there already. Without a table to add it to it puts the whole table back.
func (n *Network) addToTable(p plan) error {
	n.tableMu.Lock()
	defer n.tableMu.Unlock()
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	table := n.table()
	err = errors.Join(
		conn.SetAddElements(slotSet(table, false), slotElement(p.hostDev, p.guest)),
		conn.SetAddElements(slotSet(table, true), slotElement(p.hostDev, p.guest6)),
	)
	if err != nil {
		return err
	}
	err = conn.Flush()
	if errors.Is(err, unix.ENOENT) {
		n.cfg.Log.Warn("host table of the slots is gone: putting it back")
		return n.setupLocked() // which finds this slot's namespace
	}
	return err
}

// removeFromTable undoes addToTable, and forgets the slot's count of flows. Neither the elements nor the table need exist. The elements go
// one by one: to delete what is not there is an error that takes the whole transaction with it, and kernels before 6.3 know no other way.
func (n *Network) removeFromTable(p plan) error {
	n.tableMu.Lock()
	defer n.tableMu.Unlock()
	table := n.table()
	var failed []error
	for _, gone := range []struct {
		set      *nftables.Set
		elements []nftables.SetElement
	}{
		{slotSet(table, false), slotElement(p.hostDev, p.guest)},
		{slotSet(table, true), slotElement(p.hostDev, p.guest6)},
		{flowSet(table), []nftables.SetElement{{Key: ifname(p.hostDev)}}},
	} {
		failed = append(failed, deleteElements(gone.set, gone.elements))
	}
	return errors.Join(failed...)
}

// deleteElements deletes elements of a set if they, the set and its table are there.
func deleteElements(set *nftables.Set, elements []nftables.SetElement) error {
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	if err := conn.SetDeleteElements(set, elements); err != nil {
		return err
	}
	if err := conn.Flush(); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// addNoteLocked leaves an empty chain in the table.
func (n *Network) addNoteLocked(note string) error {
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	conn.AddChain(&nftables.Chain{Table: n.table(), Name: note})
	n.noteLocked(note)
	return conn.Flush()
}

// noteLocked remembers a note, for a table that somebody flushes.
func (n *Network) noteLocked(note string) {
	if !slices.Contains(n.noted, note) {
		n.noted = append(n.noted, note)
	}
}

func isNote(chain string) bool {
	return slices.ContainsFunc(forwarding, func(f struct{ path, note string }) bool { return f.note == chain })
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
		if chain.Table.Name == tableName && isNote(chain.Name) {
			notes = append(notes, chain.Name)
		}
	}
	return notes, nil
}

// removeTable deletes the table and puts forwarding back. Another node's table on this host means that it is still needed: then
// that one inherits the notes, and the last to go restores.
func (n *Network) removeTable() error {
	n.tableMu.Lock()
	defer n.tableMu.Unlock()
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
