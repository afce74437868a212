package sandboxd

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// spoofMark is in every frame that must not come out of a slot.
var spoofMark = []byte("not-from-this-sandbox")

// testSpoof is root in a guest, with a socket for raw frames, against the fence: what it sends as somebody else or to somebody it must not
// know is counted, and never seen on the slot's outer side. Package egress has the longer table, written to the tap.
func (h *vmHost) testSpoof(t *testing.T) {
	ctx := t.Context()
	must := mustOf(t)
	m := h.machine(t)
	must("setup", m.Setup(ctx))
	p := Place{ID: "ispoof", Slot: 1, Root: h.template, CPUs: 1, MemoryMiB: 192, DiskMiB: 64}
	p.Dir = filepath.Join(h.dir(t, p.ID), p.ID)
	instance, err := m.Start(ctx, p, egress.Policy{AllowInternet: true}, func(Step) {})
	must("start", err)
	must("init", instance.Init(ctx, guest.InitRequest{MergeEnv: true, Timestamp: time.Now()}))
	slot := instance.(*vmSandbox).slot
	outside := watchDevice(t, slot.HostDev)
	before, err := instance.Refusals()
	must("refusals", err)

	own, other := guestMAC(p.ID), net.HardwareAddr{2, 9, 9, 9, 9, 9}
	broadcast := net.HardwareAddr{255, 255, 255, 255, 255, 255}
	me, somebody := netdev.GuestConstant, netip.MustParseAddr("1.2.3.4")
	me6, somebody6 := netdev.GuestConstant6, netip.MustParseAddr("2606:4700::1")
	far, far6 := netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("2606:4700::2")
	frames := map[string][]byte{
		"another hardware address":          ethernet(netdev.TapMAC, other, unix.ETH_P_IP, packet4(me, far)),
		"another IPv4 address":              ethernet(netdev.TapMAC, own, unix.ETH_P_IP, packet4(somebody, far)),
		"the gateway's IPv4 address":        ethernet(netdev.TapMAC, own, unix.ETH_P_IP, packet4(netdev.GuestGateway, far)),
		"the slot's own address":            ethernet(netdev.TapMAC, own, unix.ETH_P_IP, packet4(slot.GuestAddr, far)),
		"loopback":                          ethernet(netdev.TapMAC, own, unix.ETH_P_IP, packet4(netip.MustParseAddr("127.0.0.1"), far)),
		"another IPv6 address":              ethernet(netdev.TapMAC, own, unix.ETH_P_IPV6, packet6(somebody6, far6)),
		"another IPv6 and hardware address": ethernet(netdev.TapMAC, other, unix.ETH_P_IPV6, packet6(me6, far6)),
		"a VLAN tag":                        ethernet(netdev.TapMAC, own, unix.ETH_P_8021Q, append([]byte{0, 7, 8, 0}, packet4(me, far)...)),
		"a double tag":                      ethernet(netdev.TapMAC, own, unix.ETH_P_8021AD, append([]byte{0, 7, 8, 0}, packet4(me, far)...)),
		"MPLS":                              ethernet(netdev.TapMAC, own, unix.ETH_P_MPLS_UC, append([]byte{0, 1, 1, 64}, packet4(me, far)...)),
		"LLDP":                              ethernet(broadcast, own, 0x88cc, spoofMark),
		"the gateway's ARP":                 ethernet(broadcast, own, unix.ETH_P_ARP, arpReply(own, netdev.GuestGateway, far)),
		"another one's ARP":                 ethernet(broadcast, own, unix.ETH_P_ARP, arpReply(other, me, netdev.GuestGateway)),
	}
	for what, frame := range frames {
		was, err := instance.Refusals()
		must("refusals", err)
		if _, err := instance.(*vmSandbox).tell(ctx, "frame "+hex.EncodeToString(frame)); err != nil {
			t.Fatalf("send a frame with %s: %v", what, err)
		}
		counted := false
		for deadline := time.Now().Add(10 * time.Second); !counted && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			now, err := instance.Refusals()
			must("refusals", err)
			counted = now.Spoofed+now.Frames > was.Spoofed+was.Frames
		}
		if !counted {
			t.Errorf("a frame with %s was not counted", what)
		}
	}
	for what, address := range map[string]string{
		"metadata": "169.254.169.254:80", "the node": slot.HostAddr.String() + ":22", "another sandbox": "10.12.0.9:49983", "a private network": "192.168.1.1:80",
		"the namespace": netdev.GuestGateway.String() + ":22", "the namespace over IPv6": "[" + netdev.GuestGateway6.String() + "]:22",
	} {
		said, err := instance.(*vmSandbox).tell(ctx, "reach "+address)
		if err != nil || !strings.Contains(said, "refused") && !strings.Contains(said, "no route") && !strings.Contains(said, "prohibited") && !strings.Contains(said, "denied") {
			t.Errorf("the way to %s: %q, %v, want it refused", what, said, err)
		}
	}
	after, err := instance.Refusals()
	must("refusals", err)
	if total(after)-total(before) < uint64(len(frames)) {
		t.Errorf("refused before %+v, after %+v, want %d more", before, after, len(frames))
	}
	t.Logf("refused: %+v", after)
	if seen := outside(); len(seen) > 0 {
		t.Errorf("%d frames came out of the slot: %q", len(seen), seen)
	}
	must("destroy", m.Destroy(ctx, p, func(Step) {}))
	must("close", m.Close(ctx))
}

// watchDevice listens on a device; what it returns gives the frames so far that bear the mark.
func watchDevice(t *testing.T, name string) func() [][]byte {
	t.Helper()
	dev, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: dev.Index}); err != nil {
		t.Fatal(err)
	}
	return func() (marked [][]byte) {
		for frame := make([]byte, 64<<10); ; {
			n, _, err := unix.Recvfrom(fd, frame, 0)
			if err != nil {
				return marked
			}
			if bytes.Contains(frame[:n], spoofMark) {
				marked = append(marked, bytes.Clone(frame[:n]))
			}
		}
	}
}

func ethernet(to, from net.HardwareAddr, kind uint16, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint16(append(append([]byte{}, to...), from...), kind), payload...)
}

// packet4 is UDP with the mark; the checksum of its header is right.
func packet4(from, to netip.Addr) []byte {
	size := 20 + 8 + len(spoofMark)
	head := []byte{0x45, 0, byte(size >> 8), byte(size), 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	head = append(append(head, from.AsSlice()...), to.AsSlice()...)
	sum := uint32(0)
	for i := 0; i < len(head); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(head[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(head[10:], ^uint16(sum))
	return append(head, datagram()...)
}

func packet6(from, to netip.Addr) []byte {
	size := 8 + len(spoofMark)
	head := append([]byte{0x60, 0, 0, 0, byte(size >> 8), byte(size), unix.IPPROTO_UDP, 64}, from.AsSlice()...)
	return append(append(head, to.AsSlice()...), datagram()...)
}

func datagram() []byte {
	size := 8 + len(spoofMark)
	return append([]byte{0x10, 0x92, 0x10, 0x92, byte(size >> 8), byte(size), 0, 0}, spoofMark...)
}

// arpReply says that from has an address, to whoever has another.
func arpReply(from net.HardwareAddr, has, to netip.Addr) []byte {
	reply := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, from...)
	reply = append(append(reply, has.AsSlice()...), netdev.TapMAC...)
	return fmt.Appendf(append(reply, to.AsSlice()...), "%s", spoofMark)
}
