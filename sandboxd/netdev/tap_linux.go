package netdev

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/netfilter"
)

// tapFlags are how a machine's network card is attached: whole frames, each with the header that says which of its checksums and
// segments are still to be made.
const tapFlags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR

// vnetHeaderSize is that of a modern virtio device's header.
const vnetHeaderSize = 12

// devGroup marks the devices of a slot that has a tap, so that they can be removed at once.
const devGroup = 0x534c

// natTable translates the machine's addresses, in every namespace that has a tap. It is apart from the rules of sandboxd/egress, which
// come and go: without them nothing passes, and without this one nothing passes the host's table.
const natTable = "sluice_nat"

// configureTap makes the machine's end of a slot. The thread is in the slot's namespace.
func (n *Network) configureTap(h *netlink.Handle, eth0 netlink.Link, p plan) error {
	if err := createTap(); err != nil {
		return err
	}
	step("tap")
	tap, err := h.LinkByName(TapName)
	if err != nil {
		return fmt.Errorf("find %s: %w", TapName, err)
	}
	for _, dev := range []netlink.Link{eth0, tap} {
		if err := h.LinkSetGroup(dev, devGroup); err != nil {
			return fmt.Errorf("set group of %s: %w", dev.Attrs().Name, err)
		}
	}
	if err := h.LinkSetHardwareAddr(tap, TapMAC); err != nil {
		return fmt.Errorf("set hardware address of %s: %w", TapName, err)
	}
	addrs := []*netlink.Addr{address(GuestGateway, linkBits)}
	if n.ipv6 {
		addr6 := address(GuestGateway6, linkBits6)
		addr6.Flags = unix.IFA_F_NODAD
		addrs = append(addrs, addr6)
	}
	for _, addr := range addrs {
		if err := h.AddrAdd(tap, addr); err != nil {
			return fmt.Errorf("add address %s to %s: %w", addr.IPNet, TapName, err)
		}
	}
	if err := h.LinkSetUp(tap); err != nil {
		return fmt.Errorf("set %s up: %w", TapName, err)
	}
	if err := n.replaceNAT(p); err != nil {
		return fmt.Errorf("replace table %s: %w", natTable, err)
	}
	return writeSysctls(flowSysctls()) // which exist since the table does
}

// createTap makes the device, to stay when its descriptor is closed.
func createTap() error {
	tun, err := attachTap(tapFlags | unix.IFF_TUN_EXCL)
	if err != nil {
		return fmt.Errorf("make %s: %w", TapName, err)
	}
	defer unix.Close(tun)
	if err := unix.IoctlSetInt(tun, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make %s stay: %w", TapName, os.NewSyscallError("ioctl", err))
	}
	return nil
}

// attachTap opens a descriptor of the tap in the thread's namespace.
func attachTap(flags uint16) (int, error) {
	const path = "/dev/net/tun"
	tun, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	request, err := unix.NewIfreq(TapName)
	if err == nil {
		request.SetUint16(flags)
		err = os.NewSyscallError("ioctl", unix.IoctlIfreq(tun, unix.TUNSETIFF, request))
	}
	if err == nil {
		err = os.NewSyscallError("ioctl", unix.IoctlSetPointerInt(tun, unix.TUNSETVNETHDRSZ, vnetHeaderSize))
	}
	if err != nil {
		_ = unix.Close(tun)
		return -1, err
	}
	return tun, nil
}

// OpenTap returns a descriptor of the slot's tap for the machine to be plugged in: reads and writes of it are frames behind a header of 12
// bytes. There can be one at a time; while another process holds it the error is unix.EBUSY. What the two may do to each other's work
// (TUNSETOFFLOAD) is for whoever runs the machine to say.
func (s *Slot) OpenTap() (*os.File, error) {
	var tun int
	err := s.within(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer h.Close()
		// The kernel would make a device that is not there, without addresses and past the rules for the one that was.
		before, err := h.LinkByName(TapName)
		if err != nil {
			return err
		}
		if tun, err = attachTap(tapFlags); err != nil {
			return err
		}
		after, err := h.LinkByName(TapName)
		if err == nil && after.Attrs().Index != before.Attrs().Index {
			err = errors.New("it was replaced meanwhile")
		}
		if err == nil {
			err = awaitCarrier(h, TapName)
		}
		if err != nil {
			_ = unix.Close(tun)
		}
		return err
	})
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("open %s of slot %d: a process that has not ended holds it: %w", TapName, s.Index, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s of slot %d: %w", TapName, s.Index, err)
	}
	return os.NewFile(uintptr(tun), TapName), nil
}

// SetGuest says which hardware address the machine behind the tap has. The namespace then knows its neighbour for good, asks for nobody
// and believes nobody. It may be called again.
func (s *Slot) SetGuest(mac net.HardwareAddr) error {
	err := s.within(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer h.Close()
		tap, err := h.LinkByName(TapName)
		if err != nil {
			return err
		}
		for _, addr := range s.constants() {
			neigh := &netlink.Neigh{LinkIndex: tap.Attrs().Index, State: unix.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: mac}
			if err := h.NeighSet(neigh); err != nil {
				return fmt.Errorf("set neighbour %s: %w", addr, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("set guest of slot %d: %w", s.Index, err)
	}
	return nil
}

// constants are the addresses that a machine has in this slot as in any other.
func (s *Slot) constants() []netip.Addr {
	if s.GuestAddr6.IsValid() {
		return []netip.Addr{GuestConstant, GuestConstant6}
	}
	return []netip.Addr{GuestConstant}
}

// within is inNetNS for a slot, which stays open meanwhile.
func (s *Slot) within(fn func() error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.ns < 0 {
		return fmt.Errorf("slot %d is released: %w", s.Index, net.ErrClosed)
	}
	return inNetNS(s.ns, fn)
}

// checkTap makes sure that a slot is one for a machine, and puts its translation back. The thread is in the slot's namespace.
func (n *Network) checkTap(p plan) error {
	if err := checkLink(TapName, TapMAC, n.addrs(GuestGateway, GuestGateway6)); err != nil {
		return err
	}
	tap, err := netlink.LinkByName(TapName)
	if err != nil {
		return fmt.Errorf("find %s: %w", TapName, err)
	}
	if tuntap, ok := tap.(*netlink.Tuntap); !ok || tuntap.Mode != netlink.TUNTAP_MODE_TAP {
		return fmt.Errorf("%s is no tap but a %s device", TapName, tap.Type())
	}
	if err := n.replaceNAT(p); err != nil {
		return fmt.Errorf("replace table %s: %w", natTable, err)
	}
	return nil
}

// unplug removes the tap of a slot, and the veth pair with it: together they take the time of one. A machine that still has the tap open
// would keep both, and the namespace.
func (n *Network) unplug(p plan) error {
	if !n.cfg.Tap {
		return nil
	}
	ns, err := openNetNS(p.netns)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EINVAL) {
		return nil // of a slot that was never whole
	}
	if err != nil {
		return err
	}
	defer unix.Close(ns)
	return inNetNS(ns, func() error {
		request := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
		request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		request.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(devGroup)))
		if _, err := request.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("delete devices of %s: %w", p.netns, err)
		}
		return removeLink(TapName) // which was made, and not yet put into the group
	})
}

// replaceNAT puts the translation of the thread's namespace in place, in one transaction; flows that it has translated go on as they are:
//
//	table inet sluice_nat {
//		chain source { type nat hook postrouting priority srcnat
//			oifname "eth0" ip saddr 169.254.0.21 snat ip to 10.12.0.1
//			oifname "eth0" ip6 saddr fd73:6c75:6963:65ff::2 snat ip6 to fd73:6c75:6963:6500::1 } }
func (n *Network) replaceNAT(p plan) error {
	conn, err := netfilter.NewConn()
	if err != nil {
		return err
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: natTable}
	conn.AddTable(table) // so that there is one to delete
	conn.DelTable(table)
	conn.AddTable(table)
	chain := conn.AddChain(&nftables.Chain{Table: table, Name: "source", Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
	translate := func(from, to netip.Addr, family uint32) {
		exprs := []expr.Any{
			&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ifname(guestDev)},
		}
		exprs = append(exprs, nfproto(from.Is6())...)
		exprs = append(exprs,
			loadAddr(from.Is6(), true, 1),
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: from.AsSlice()},
			&expr.Immediate{Register: 1, Data: to.AsSlice()},
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: family, RegAddrMin: 1},
		)
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
	}
	translate(GuestConstant, p.guest, unix.NFPROTO_IPV4)
	if n.ipv6 {
		translate(GuestConstant6, p.guest6, unix.NFPROTO_IPV6)
	}
	return conn.Flush()
}
