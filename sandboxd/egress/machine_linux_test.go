package egress_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

var machineMAC = net.HardwareAddr{0x02, 'S', 'L', 0, 0, 2}

// machine is a computer behind the tap of a slot, without a virtual machine: a network namespace whose card's frames, with what is still
// to be made of them, are carried to the slot's tap and back.
type machine struct {
	netns string // the machine's own
	card  *os.File
	tap   atomic.Pointer[os.File] // of the slot that it is in
	pumps sync.WaitGroup
	large [2]atomic.Int64 // frames that were larger than fits the wire: out of the machine, and into it
}

// newMachine plugs a machine into a slot. Its kernel asks for the gateway's hardware address as any would.
func (w *world) newMachine(slot *netdev.Slot) *machine {
	w.Helper()
	m := &machine{}
	if err := lab.Enter(slot.NetNS, func() {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			w.Fatal(err)
		}
		ns, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			w.Fatal(err)
		}
		w.Cleanup(func() { unix.Close(ns) })
		m.netns = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns)
		m.card = newCard(w.T)
	}); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		m.card.Close()
		m.tap.Load().Close()
		m.pumps.Wait()
	})
	m.plug(w, slot)
	m.pumps.Go(func() { // until the card is closed; what is sent while the machine is plugged in nowhere is lost
		_ = pump(m.card, &m.large[0], func(frame []byte) error {
			_, _ = m.tap.Load().Write(frame)
			return nil
		})
	})
	return m
}

// plug puts the machine into a slot, out of the one that it is in.
func (m *machine) plug(w *world, slot *netdev.Slot) {
	w.Helper()
	tap := w.plug(slot)
	if before := m.tap.Swap(tap); before != nil {
		before.Close()
	}
	m.pumps.Go(func() {
		_ = pump(tap, &m.large[1], func(frame []byte) error {
			_, err := m.card.Write(frame)
			return err
		})
	})
}

// plug opens the tap of a slot as a machine's process would, and says who is behind it.
func (w *world) plug(slot *netdev.Slot) *os.File {
	w.Helper()
	tap, err := slot.OpenTap()
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { tap.Close() })
	offload(w.T, tap)
	if err := slot.SetGuest(machineMAC); err != nil {
		w.Fatal(err)
	}
	return tap
}

// offload says that the reader of a tap takes what is not finished: checksums to be made and frames of many segments.
func offload(t *testing.T, tap *os.File) {
	t.Helper()
	raw, err := tap.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	const csum, tso4, tso6 = 1, 2, 4
	if ctlErr := raw.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, csum|tso4|tso6) }); ctlErr != nil || err != nil {
		t.Fatal(ctlErr, err)
	}
}

// newCard makes the network card of a machine in the thread's namespace, which is the machine's, and gives it what guestd would.
func newCard(t *testing.T) *os.File {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, setting := range []string{"ipv6/conf/default/accept_ra", "ipv6/conf/default/accept_dad", "ipv6/conf/default/router_solicitations"} {
		must(os.WriteFile("/proc/sys/net/"+setting, []byte("0"), 0))
	}
	must(os.WriteFile("/proc/sys/net/ipv6/conf/default/addr_gen_mode", []byte("1"), 0))
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	must(err)
	request, err := unix.NewIfreq("eth0")
	must(err)
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	must(unix.IoctlIfreq(fd, unix.TUNSETIFF, request))
	must(unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHeader))
	card := os.NewFile(uintptr(fd), "eth0")
	offload(t, card)
	eth0, err := netlink.LinkByName("eth0")
	must(err)
	lo, err := netlink.LinkByName("lo")
	must(err)
	must(netlink.LinkSetUp(lo))
	must(netlink.LinkSetHardwareAddr(eth0, machineMAC))
	for addr, bits := range map[netip.Addr]int{netdev.GuestConstant: 30, netdev.GuestConstant6: 126} {
		ipNet := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(bits, addr.BitLen())}
		flags := 0
		if addr.Is6() {
			flags = unix.IFA_F_NODAD
		}
		must(netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet, Flags: flags}))
	}
	must(netlink.LinkSetUp(eth0))
	for _, gateway := range []netip.Addr{netdev.GuestGateway, netdev.GuestGateway6} {
		must(netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: gateway.AsSlice()}))
	}
	return card // which had a carrier from the start: there is nothing to wait for
}

// vnetHeader is the size of what precedes each frame of a tap.
const vnetHeader = 12

// pump hands over frames until it cannot read or write.
func pump(from *os.File, large *atomic.Int64, write func(frame []byte) error) error {
	frame := make([]byte, 1<<17)
	for {
		n, err := from.Read(frame)
		if err != nil {
			return err
		}
		if n > vnetHeader+1514 {
			large.Add(1)
		}
		if err := write(frame[:n]); err != nil {
			return err
		}
	}
}

// fenceMachine puts the policy in force for what is behind the tap.
func (w *world) fenceMachine(slot *netdev.Slot, p egress.Policy) {
	w.Helper()
	p.Protected = append(p.Protected, netip.PrefixFrom(lab.HostAddr, 32), netip.PrefixFrom(lab.HostAddr6, 128))
	where := egress.Forwarded(netdev.TapName, machineMAC, netdev.GuestConstant, netdev.GuestConstant6)
	if err := egress.Apply(slot.NetNS, egress.Compile(p, where)); err != nil {
		w.Fatal(err)
	}
}
