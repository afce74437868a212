package netdev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/netfilter"
)

// Network is the slots of this node and the host's table that serves them.
type Network struct {
	// Fixed after New.
	cfg  Config
	home int  // the namespace that New was called in: where the node lives and slots get their way out
	ipv6 bool // the kernel has it

	flows netfilter.Flows // of home

	mu    sync.Mutex // guards the fields below; never held across a kernel call
	slots map[int]*Slot
	raSet []string // accept_ra files that Setup changed from 1 to 2
	full  bool     // it was said that the slots can fill the host's table of flows

	// tableMu is held for every change of the host's table, kernel calls and all, and guards the fields below. A Setup that listed
	// the slots before an Acquire must not replace the table after it.
	tableMu sync.Mutex
	made    string   // the table's state after Setup
	noted   []string // the notes that belong in it
}

// New takes the caller's network namespace for the node's own. It changes nothing; Setup does.
func New(cfg Config) (*Network, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	home, err := openThreadNetNS()
	if err != nil {
		return nil, err
	}
	_, err = os.Stat("/proc/sys/net/ipv6")
	if err != nil {
		cfg.Log.Warn("no ipv6 in this kernel: slots have ipv4 only")
	}
	return &Network{cfg: cfg, home: home, ipv6: err == nil, slots: map[int]*Slot{}}, nil
}

// Capacity is how many slots the prefixes hold: indexes run from 0 to one less.
func (n *Network) Capacity() int { return n.cfg.capacity() }

// Path is where the network namespace of a slot is bound, whether it exists or not.
func (n *Network) Path(index int) string { return n.cfg.path(index) }

// Setup puts the host's table in place and lets the kernel forward. It may be called again at any time: the table is replaced
// in one step, with the slots that exist.
func (n *Network) Setup(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return inNetNS(n.home, func() error {
		n.tableMu.Lock()
		defer n.tableMu.Unlock()
		return n.setupLocked()
	})
}

// Maintain looks whether the host's table is still as Setup left it, with every slot in it, and does what Setup does when somebody
// flushed or changed it. Looking is cheap enough for every few seconds, and disturbs nothing.
func (n *Network) Maintain(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return inNetNS(n.home, func() error {
		n.tableMu.Lock()
		defer n.tableMu.Unlock()
		whole, err := n.wholeLocked()
		if err != nil {
			return fmt.Errorf("look at host table %s: %w", n.cfg.tableName(), err)
		}
		if whole {
			return nil
		}
		n.cfg.Log.Warn("host table of the slots was flushed or changed: putting it back")
		return n.setupLocked()
	})
}

// Close removes what Setup made, and forgets the slots without touching them: one that still exists keeps what runs in it but
// loses its way out. The Network is of no use afterwards.
func (n *Network) Close(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := inNetNS(n.home, n.removeTable)
	n.mu.Lock()
	slots := n.slots
	n.slots = map[int]*Slot{}
	n.mu.Unlock()
	for _, slot := range slots {
		slot.close()
	}
	return errors.Join(err, os.NewSyscallError("close", unix.Close(n.home)))
}

// Acquire makes slot index: namespace, veth pair, addresses, routes, its place in the host's table. The caller keeps the record
// of who has which index. When it fails nothing of the slot is left.
func (n *Network) Acquire(ctx context.Context, index int) (*Slot, error) {
	p, err := n.cfg.plan(index)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var ns int
	err = inNetNS(n.home, func() (err error) {
		ns, err = n.build(p)
		return err
	})
	if err != nil {
		if !errors.Is(err, errExists) { // somebody else's, or our own living one: hands off
			err = errors.Join(err, n.Release(context.WithoutCancel(ctx), index))
		}
		return nil, fmt.Errorf("acquire slot %d: %w", index, err)
	}
	return n.keep(newSlot(p, ns, n.ipv6, n.cfg.Tap)), nil
}

// errExists means that the slot, or a part of it, is there already.
var errExists = errors.New("it exists; release or adopt it first")

// build runs on a thread of its own that starts in the home namespace and ends in the new one.
func (n *Network) build(p plan) (ns int, err error) {
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("open netlink: %w", err)
	}
	defer host.Close()
	if _, err := host.LinkByName(p.hostDev); err == nil {
		return -1, fmt.Errorf("device %s: %w", p.hostDev, errExists)
	}
	if err := createMountPoint(p.netns); err != nil {
		return -1, err
	}
	step("mount point")
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return -1, os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("/proc/thread-self/ns/net", p.netns, "none", unix.MS_BIND, ""); err != nil {
		return -1, &os.PathError{Op: "bind network namespace to", Path: p.netns, Err: err}
	}
	step("namespace")
	ns, err = openThreadNetNS()
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			_ = unix.Close(ns)
		}
	}()
	if err := writeSysctls(guestSysctls(n.ipv6, n.cfg.Tap)); err != nil { // before eth0 exists, so that it is born with the defaults
		return -1, err
	}
	veth := &netlink.Veth{
		LinkAttrs:        netlink.LinkAttrs{Name: p.hostDev, HardwareAddr: p.hostMAC, TxQLen: 1000},
		PeerName:         guestDev,
		PeerHardwareAddr: p.guestMAC,
		PeerNamespace:    netlink.NsFd(ns),
	}
	if err := host.LinkAdd(veth); err != nil {
		return -1, fmt.Errorf("add veth pair %s: %w", p.hostDev, err)
	}
	step("veth")
	guest, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("open netlink inside: %w", err)
	}
	defer guest.Close()
	if err := n.configureGuest(guest, p); err != nil {
		return -1, fmt.Errorf("configure inside: %w", err)
	}
	step("guest")
	if err := unix.Setns(n.home, unix.CLONE_NEWNET); err != nil {
		return -1, fmt.Errorf("return to the home namespace: %w", err)
	}
	if err := n.configureHost(host, p); err != nil {
		return -1, fmt.Errorf("configure %s: %w", p.hostDev, err)
	}
	step("host")
	if err := n.addToTable(p); err != nil {
		return -1, fmt.Errorf("add to host table %s: %w", n.cfg.tableName(), err)
	}
	if err := errors.Join(awaitCarrier(host, p.hostDev), awaitCarrier(guest, guestDev)); err != nil {
		return -1, err
	}
	if n.ipv6 {
		if err := awaitLocal(guest, p.guest6); err != nil {
			return -1, err
		}
	}
	return ns, nil
}

// patience bounds the waits for what the kernel does in its own time.
const patience = 3 * time.Second

// awaitCarrier waits until the kernel sends on a device. Both ends are up and see each other, but the kernel takes notice in its
// own time, up to a second later, and drops every packet until then. Asking for the device makes it take notice at once since
// Linux 6.9; older ones are asked until they have.
func awaitCarrier(h *netlink.Handle, name string) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		link, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s has no carrier: it is %s", name, link.Attrs().OperState)
		}
	}
}

// step is called after each step of build; tests stop there.
var step = func(string) {}

// createMountPoint makes the empty file that the namespace is bound to. The file is the claim on the slot: only one can make it.
func createMountPoint(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", path, errExists)
	}
	if err != nil {
		return err
	}
	return f.Close()
}

// configureGuest sets up the inside: lo with the constant address, or a tap for whom it belongs to, eth0 with the slot's, and everything
// else by way of the host.
func (n *Network) configureGuest(h *netlink.Handle, p plan) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if !n.cfg.Tap {
		if err := h.AddrAdd(lo, address(GuestConstant, 32)); err != nil {
			return fmt.Errorf("add address %s: %w", GuestConstant, err)
		}
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	eth0, err := h.LinkByName(guestDev)
	if err != nil {
		return fmt.Errorf("find %s: %w", guestDev, err)
	}
	err = n.configureEnd(h, eth0, end{
		addr: p.guest, addr6: p.guest6, bits: p.prefixLen, bits6: p.prefix6L,
		peer: p.host, peer6: p.host6, peerMAC: p.hostMAC, viaPeer: true,
	})
	if err != nil || !n.cfg.Tap {
		return err
	}
	return n.configureTap(h, eth0, p)
}

// configureHost sets up the host's end. The thread is in the home namespace, which /proc/sys shows.
func (n *Network) configureHost(h *netlink.Handle, p plan) error {
	if err := writeSysctls(hostDevSysctls(p.hostDev, n.ipv6)); err != nil {
		return err
	}
	dev, err := h.LinkByName(p.hostDev)
	if err != nil {
		return fmt.Errorf("find it: %w", err)
	}
	return n.configureEnd(h, dev, end{
		addr: p.host, addr6: p.host6, bits: p.prefixLen, bits6: p.prefix6L,
		peer: p.guest, peer6: p.guest6, peerMAC: p.guestMAC,
	})
}

// end is one end of the veth pair: its own addresses, and the neighbour on the other side.
type end struct {
	addr, addr6 netip.Addr
	bits, bits6 int
	peer, peer6 netip.Addr
	peerMAC     net.HardwareAddr
	viaPeer     bool // the peer is the way to everywhere
}

func (n *Network) configureEnd(h *netlink.Handle, link netlink.Link, e end) error {
	addrs := []*netlink.Addr{address(e.addr, e.bits)}
	peers := []netip.Addr{e.peer}
	if n.ipv6 {
		addr6 := address(e.addr6, e.bits6)
		addr6.Flags = unix.IFA_F_NODAD // the pair has two ends and both addresses are ours: usable at once
		addrs, peers = append(addrs, addr6), append(peers, e.peer6)
	}
	for _, addr := range addrs {
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %s: %w", addr.IPNet, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set it up: %w", err)
	}
	for _, peer := range peers {
		neigh := &netlink.Neigh{LinkIndex: link.Attrs().Index, State: unix.NUD_PERMANENT, IP: peer.AsSlice(), HardwareAddr: e.peerMAC}
		if err := h.NeighSet(neigh); err != nil {
			return fmt.Errorf("set neighbour %s: %w", peer, err)
		}
		if !e.viaPeer {
			continue
		}
		if err := h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: peer.AsSlice()}); err != nil {
			return fmt.Errorf("add default route by %s: %w", peer, err)
		}
	}
	return nil
}

func address(a netip.Addr, bits int) *netlink.Addr {
	return &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}}
}

// awaitLocal waits until an IPv6 address is routed to the namespace itself. The kernel does that a moment after it added the
// address; a program that connects to its own address in between looks for it on the wire for seconds.
func awaitLocal(h *netlink.Handle, addr netip.Addr) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		routes, err := h.RouteGet(addr.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("address %s is not local yet: %w", addr, errors.Join(err, unix.ETIMEDOUT))
		}
	}
}

// Adopt takes over a slot that an earlier process made, after making sure that it is whole, and puts it back into the host's
// table. When it fails the slot is as it was; Release removes it.
func (n *Network) Adopt(index int) (*Slot, error) {
	p, err := n.cfg.plan(index)
	if err != nil {
		return nil, err
	}
	ns, err := openNetNS(p.netns)
	if err != nil {
		return nil, fmt.Errorf("adopt slot %d: %w", index, err)
	}
	err = inNetNS(ns, func() error { return n.checkGuest(p) })
	if err == nil {
		err = inNetNS(n.home, func() error {
			if err := checkLink(p.hostDev, p.hostMAC, n.addrs(p.host, p.host6)); err != nil {
				return err
			}
			return n.addToTable(p)
		})
	}
	if err != nil {
		_ = unix.Close(ns)
		return nil, fmt.Errorf("adopt slot %d: %w", index, err)
	}
	return n.keep(newSlot(p, ns, n.ipv6, n.cfg.Tap)), nil
}

func (n *Network) checkGuest(p plan) error {
	own := []netip.Addr{GuestConstant}
	if n.cfg.Tap {
		own = nil
	}
	if err := checkLink("lo", nil, own); err != nil {
		return err
	}
	if err := checkLink(guestDev, p.guestMAC, n.addrs(p.guest, p.guest6)); err != nil || !n.cfg.Tap {
		return err
	}
	return n.checkTap(p)
}

func (n *Network) addrs(v4, v6 netip.Addr) []netip.Addr {
	if n.ipv6 {
		return []netip.Addr{v4, v6}
	}
	return []netip.Addr{v4}
}

// checkLink finds a device of the thread's namespace up, with its hardware address (unless nil) and these addresses.
func checkLink(name string, mac net.HardwareAddr, want []netip.Addr) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		return fmt.Errorf("%s is down", name)
	}
	if mac != nil && !slices.Equal(link.Attrs().HardwareAddr, mac) {
		return fmt.Errorf("%s has hardware address %s, want %s", name, link.Attrs().HardwareAddr, mac)
	}
	addrs, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", name, err)
	}
	for _, addr := range want {
		if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.Equal(addr.AsSlice()) }) {
			return fmt.Errorf("%s lacks address %s", name, addr)
		}
	}
	return nil
}

// keep remembers the slot for Release, and forgets an older view of it.
func (n *Network) keep(s *Slot) *Slot {
	n.mu.Lock()
	old := n.slots[s.Index]
	n.slots[s.Index] = s
	count, said := len(n.slots), n.full
	n.mu.Unlock()
	if old != nil {
		old.close()
	}
	if !said {
		n.warnIfFull(count)
	}
	return s
}

// warnIfFull says once that the slots that there are can together fill the host's table of flows, and cut off everybody.
func (n *Network) warnIfFull(slots int) {
	var text string
	err := inNetNS(n.home, func() (err error) {
		text, err = readSysctl("netfilter/nf_conntrack_max")
		return err
	})
	limit, parseErr := strconv.ParseUint(text, 10, 64)
	if err != nil || parseErr != nil || uint64(slots)*uint64(n.cfg.MaxFlows) <= limit {
		return
	}
	n.mu.Lock()
	said := n.full
	n.full = true
	n.mu.Unlock()
	if !said {
		n.cfg.Log.Warn("slots together may fill the host's table of flows: raise net.netfilter.nf_conntrack_max",
			zap.Int("slots", slots), zap.Uint32("flows_per_slot", n.cfg.MaxFlows), zap.Uint64("flows", limit))
	}
}

// Release removes slot index, whole or half made, ours or a dead process's; one that does not exist is no error. It goes on
// after a failure, so that calling it again finishes the work. Processes inside are the caller's to end: they keep the
// namespace, without its way out, until they are gone.
func (n *Network) Release(_ context.Context, index int) error {
	p, err := n.cfg.plan(index)
	if err != nil {
		return err
	}
	n.mu.Lock()
	slot := n.slots[index]
	delete(n.slots, index)
	n.mu.Unlock()
	if slot != nil {
		slot.close()
	}
	err = errors.Join(
		n.unplug(p),
		// The host forgets the flows too, so that late answers to them find nobody: the next tenant of the slot has the same addresses.
		inNetNS(n.home, func() error {
			return errors.Join(n.removeFromTable(p), removeLink(p.hostDev), n.flows.Forget(n.addrs(p.guest, p.guest6)...))
		}),
		removeNetNS(p.netns),
	)
	if err != nil {
		return fmt.Errorf("release slot %d: %w", index, err)
	}
	return nil
}

func removeLink(name string) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find device %s: %w", name, err)
	}
	if err := h.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete device %s: %w", name, err)
	}
	return nil
}

// removeNetNS unmounts until nothing is mounted, because a crash between two attempts can leave one over another.
func removeNetNS(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			return &os.PathError{Op: "unmount", Path: path, Err: err}
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// List returns the indexes of which anything exists on this host, in order: namespaces and host devices.
func (n *Network) List(ctx context.Context) (indexes []int, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	err = inNetNS(n.home, func() error {
		indexes, err = n.list()
		return err
	})
	return indexes, err
}

// list runs in the home namespace.
func (n *Network) list() ([]int, error) {
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var indexes []int
	for _, entry := range entries {
		if index, ok := n.cfg.index(entry.Name()); ok {
			indexes = append(indexes, index)
		}
	}
	devices, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	for _, dev := range devices {
		if index, ok := n.cfg.index(dev.Name); ok {
			indexes = append(indexes, index)
		}
	}
	slices.Sort(indexes)
	return slices.Compact(indexes), nil
}
