package egress_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// hostile is root in a machine: it writes to the tap what it likes, and watches what comes of it on the slot's outer side.
type hostile struct {
	*world
	slot    *netdev.Slot
	tap     *os.File
	outside int // a socket for all that comes out of the slot
	turn    int
}

func newHostile(w *world, slot *netdev.Slot) *hostile {
	w.Helper()
	h := &hostile{world: w, slot: slot, tap: w.plug(slot)}
	w.lab.Host.Run(func() {
		dev, err := net.InterfaceByName(slot.HostDev)
		if err != nil {
			w.Fatal(err)
		}
		if h.outside, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			w.Fatal(err)
		}
		const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8
		if err := unix.Bind(h.outside, &unix.SockaddrLinklayer{Protocol: all & 0xffff, Ifindex: dev.Index}); err != nil {
			w.Fatal(err)
		}
	})
	w.Cleanup(func() { unix.Close(h.outside) })
	return h
}

// write sends frames whose checksums are made.
func (h *hostile) write(frames ...[]byte) {
	h.Helper()
	for _, f := range frames {
		if _, err := h.tap.Write(append(make([]byte, vnetHeader), f...)); err != nil {
			h.Fatalf("write %x: %v", f, err)
		}
	}
}

// writeUnchecked sends a frame of whose checksums nobody will find anything wrong: the header's is made, and that of what it carries is
// said to be the next card's work.
func (h *hostile) writeUnchecked(f []byte) {
	h.Helper()
	header, at := make([]byte, vnetHeader), 14+40
	if binary.BigEndian.Uint16(f[12:]) == unix.ETH_P_IP {
		at = 14 + 20
		if len(f) >= at {
			f[24], f[25] = 0, 0
			binary.BigEndian.PutUint16(f[24:], ^sum(0, f[14:at]))
		}
	}
	if len(f) >= at+8 {
		const needsChecksum = 1
		header[0] = needsChecksum
		binary.NativeEndian.PutUint16(header[6:], uint16(at))
		binary.NativeEndian.PutUint16(header[8:], 6)
	}
	if _, err := h.tap.Write(append(header, f...)); err != nil {
		h.Fatalf("write %x: %v", f, err)
	}
}

// settle sends a datagram that may pass, waits until its echo is back, and returns what else came out of the slot and what else was
// sent to the machine meanwhile.
func (h *hostile) settle() (outside, answers [][]byte) {
	h.Helper()
	h.turn++
	mark := fmt.Appendf(nil, "turn %d of the test", h.turn)
	src, dst := netip.AddrPortFrom(netdev.GuestConstant, uint16(40000+h.turn)), netip.MustParseAddrPort(fmt.Sprintf("1.1.1.1:%d", lab.PortEcho))
	h.write(frame{machineMAC, netdev.TapMAC, unix.ETH_P_IP,
		ip4{src: src.Addr(), dst: dst.Addr(), proto: unix.IPPROTO_UDP, payload: udp(src, dst, mark)}.bytes()}.bytes())
	if err := h.tap.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		h.Fatal(err)
	}
	b := make([]byte, 1<<17)
	for {
		n, err := h.tap.Read(b)
		if err != nil {
			h.Fatalf("the echo of a datagram that may pass: %v", err)
		}
		f := slices.Clone(b[vnetHeader:n])
		if bytes.Contains(f, mark) && f[0]&1 == 0 {
			break
		}
		if f[0]&1 == 0 { // what goes to groups is the namespace's own noise
			answers = append(answers, f)
		}
	}
	passed := 0
	for {
		n, from, err := unix.Recvfrom(h.outside, b, 0)
		if err != nil {
			break // EAGAIN: that was all
		}
		switch ll := from.(*unix.SockaddrLinklayer); {
		case ll.Pkttype == unix.PACKET_OUTGOING:
		case bytes.Contains(b[:n], mark):
			passed++
		default:
			outside = append(outside, slices.Clone(b[:n]))
		}
	}
	if passed != 1 {
		h.Fatalf("the capture saw %d of one datagram that may pass", passed)
	}
	return outside, answers
}

// difference is what was refused between two looks.
func difference(before, after egress.Refusals) egress.Refusals {
	return egress.Refusals{
		Reserved: after.Reserved - before.Reserved, Denied: after.Denied - before.Denied, Spoofed: after.Spoofed - before.Spoofed,
		Inbound: after.Inbound - before.Inbound, Flows: after.Flows - before.Flows,
		Frames: after.Frames - before.Frames, Stale: after.Stale - before.Stale,
	}
}

// attempt is something that root in a machine tries.
type attempt struct {
	what    string
	frames  [][]byte
	count   egress.Refusals
	refused bool // and not just dropped: the machine is told
}

var (
	own4, own6 = netdev.GuestConstant, netdev.GuestConstant6
	far4, far6 = netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr(cloudflare6)
)

// datagram is one from src to the echo port of dst, in a frame from the machine to its gateway.
func datagram(src, dst netip.Addr) frame {
	from, to := netip.AddrPortFrom(src, 30000), netip.AddrPortFrom(dst, lab.PortEcho)
	payload := udp(from, to, []byte("spoof"))
	if dst.Is4() {
		return frame{machineMAC, netdev.TapMAC, unix.ETH_P_IP, ip4{src: src, dst: dst, proto: unix.IPPROTO_UDP, payload: payload}.bytes()}
	}
	return frame{machineMAC, netdev.TapMAC, unix.ETH_P_IPV6, ip6{src: src, dst: dst, next: unix.IPPROTO_UDP, payload: payload}.bytes()}
}

// segment is one of TCP, as datagram is one of UDP.
func segment(src, dst netip.Addr, flags byte) frame {
	f := datagram(src, dst)
	payload := tcp(netip.AddrPortFrom(src, 30000), netip.AddrPortFrom(dst, lab.PortEcho), 1000, 2000, flags, nil)
	f.payload = ip6{src: src, dst: dst, next: unix.IPPROTO_TCP, payload: payload}.bytes()
	if dst.Is4() {
		f.payload = ip4{src: src, dst: dst, proto: unix.IPPROTO_TCP, payload: payload}.bytes()
	}
	return f
}

// control is a message of ICMP.
func control(src, dst netip.Addr, kind byte, body []byte) frame {
	f := datagram(src, dst)
	if dst.Is4() {
		f.payload = ip4{src: src, dst: dst, proto: unix.IPPROTO_ICMP, payload: icmp(src, dst, kind, 0, body)}.bytes()
		return f
	}
	f.payload = ip6{src: src, dst: dst, next: unix.IPPROTO_ICMPV6, hops: 255, payload: icmp(src, dst, kind, 0, body)}.bytes()
	return f
}

func (f frame) sentBy(mac net.HardwareAddr) frame {
	f.from = mac
	return f
}

func (f frame) sentTo(mac net.HardwareAddr) frame {
	f.to = mac
	return f
}

// tagged puts VLAN tags around what a frame carries, the innermost last.
func (f frame) tagged(protocol uint16, ids ...uint16) frame {
	for _, id := range slices.Backward(ids) {
		tag := binary.BigEndian.AppendUint16(nil, id)
		f.payload, f.kind = slices.Concat(binary.BigEndian.AppendUint16(tag, f.kind), f.payload), protocol
	}
	return f
}

// ofKind says that the frame carries something else than it does.
func (f frame) ofKind(kind uint16) frame {
	f.kind = kind
	return f
}

// with4 is a datagram with options of IPv4.
func with4(dst netip.Addr, options ...byte) frame {
	f := datagram(own4, dst)
	payload := udp(netip.AddrPortFrom(own4, 30000), netip.AddrPortFrom(dst, lab.PortEcho), []byte("spoof"))
	f.payload = ip4{src: own4, dst: dst, proto: unix.IPPROTO_UDP, options: options, payload: payload}.bytes()
	return f
}

// with6 is a datagram behind an extension header of IPv6.
func with6(dst netip.Addr, header byte, body ...byte) frame {
	f := datagram(own6, dst)
	payload := udp(netip.AddrPortFrom(own6, 30000), netip.AddrPortFrom(dst, lab.PortEcho), []byte("spoof"))
	extension := append([]byte{unix.IPPROTO_UDP, byte(len(body)+2)/8 - 1}, body...)
	f.payload = ip6{src: own6, dst: dst, next: header, payload: append(extension, payload...)}.bytes()
	return f
}

// fragments4 is a datagram of IPv4 in pieces of that many bytes.
func fragments4(src, dst netip.Addr, size, piece int) (frames [][]byte) {
	whole := udp(netip.AddrPortFrom(src, 30000), netip.AddrPortFrom(dst, lab.PortEcho), bytes.Repeat([]byte("x"), size))
	for offset := 0; offset < len(whole); offset += piece {
		end := min(offset+piece, len(whole))
		p := ip4{src: src, dst: dst, proto: unix.IPPROTO_UDP, id: uint16(size), fragment: uint16(offset / 8), payload: whole[offset:end]}
		if end < len(whole) {
			p.fragment |= 0x2000
		}
		frames = append(frames, frame{machineMAC, netdev.TapMAC, unix.ETH_P_IP, p.bytes()}.bytes())
	}
	return frames
}

// fragments6 is one of IPv6.
func fragments6(src, dst netip.Addr, size, piece int) (frames [][]byte) {
	whole := udp(netip.AddrPortFrom(src, 30000), netip.AddrPortFrom(dst, lab.PortEcho), bytes.Repeat([]byte("x"), size))
	for offset := 0; offset < len(whole); offset += piece {
		end := min(offset+piece, len(whole))
		header := []byte{unix.IPPROTO_UDP, 0, byte(offset >> 8), byte(offset), 0, 0, 0, byte(size)}
		if end < len(whole) {
			header[3] |= 1
		}
		p := ip6{src: src, dst: dst, next: unix.IPPROTO_FRAGMENT, payload: append(header, whole[offset:end]...)}
		frames = append(frames, frame{machineMAC, netdev.TapMAC, unix.ETH_P_IPV6, p.bytes()}.bytes())
	}
	return frames
}

func attempts(slot, neighbour *netdev.Slot) (list []attempt) {
	one := func(f frame) [][]byte { return [][]byte{f.bytes()} }
	spoofed, noFrame, reserved := egress.Refusals{Spoofed: 1}, egress.Refusals{Frames: 1}, egress.Refusals{Reserved: 1}
	add := func(count egress.Refusals, what string, f frame) {
		list = append(list, attempt{what: what, frames: one(f), count: count})
	}
	otherMAC := net.HardwareAddr{0x02, 'S', 'L', 0, 0, 9}
	everybody := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	nobody := net.HardwareAddr{0, 0, 0, 0, 0, 0}
	addr := netip.MustParseAddr
	ask := frame{machineMAC, everybody, unix.ETH_P_ARP, arp(1, machineMAC, own4, nobody, netdev.GuestGateway)}
	allRouters, allNodes := net.HardwareAddr{0x33, 0x33, 0, 0, 0, 2}, net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}

	// Somebody else's hardware address.
	for _, mac := range []net.HardwareAddr{otherMAC, netdev.TapMAC, everybody, nobody} {
		add(spoofed, "IPv4 from "+mac.String(), datagram(own4, far4).sentBy(mac))
		add(spoofed, "IPv6 from "+mac.String(), datagram(own6, far6).sentBy(mac))
		add(spoofed, "ARP from "+mac.String(), ask.sentBy(mac))
	}
	// Somebody else's address.
	for _, src := range []netip.Addr{
		slot.GuestAddr, slot.HostAddr, neighbour.GuestAddr, netdev.GuestGateway, addr("169.254.0.20"), addr("169.254.0.23"), lab.HostAddr,
		addr("9.9.9.9"), far4, addr("127.0.0.1"), addr("0.0.0.0"), addr("255.255.255.255"), addr("224.0.0.1"), addr("240.0.0.1"),
		addr("169.254.169.254"), addr("10.99.0.1"),
	} {
		add(spoofed, "IPv4 source "+src.String(), datagram(src, far4))
		add(spoofed, "IPv4 source "+src.String()+" to the gateway", segment(src, netdev.GuestGateway, flagACK))
	}
	for _, src := range []netip.Addr{
		slot.GuestAddr6, neighbour.GuestAddr6, netdev.GuestGateway6, addr("fd73:6c75:6963:65ff::3"), lab.HostAddr6, far6, addr(google6),
		addr("::1"), addr("::"), addr("fe80::1"), addr("ff02::1"), addr("::ffff:169.254.0.21"), addr("fd00:99::1"),
	} {
		add(spoofed, "IPv6 source "+src.String(), datagram(src, far6))
		add(spoofed, "IPv6 source "+src.String()+" to the gateway", segment(src, netdev.GuestGateway6, flagACK))
	}
	// Other protocols, and frames that say something else than they carry.
	for kind, what := range map[uint16]string{
		0x88cc: "LLDP", 0x8863: "PPPoE discovery", 0x8864: "PPPoE", 0x8847: "MPLS", 0x8848: "MPLS multicast", 0x888e: "EAPOL", 0x8035: "RARP",
		0x8137: "IPX", 0x9000: "loopback", 0x88e5: "MACsec", 0x894f: "NSH", 0x22f0: "AVTP", 0x6558: "bridged Ethernet", 0xffff: "the last", 0x0000: "none",
		0x0026: "a length, as 802.3 has it", 0x05dc: "a long length",
	} {
		add(noFrame, "EtherType "+what, datagram(own4, far4).ofKind(kind))
	}
	snap := datagram(own4, far4)
	snap.payload = append([]byte{0xaa, 0xaa, 3, 0, 0, 0, 8, 0}, snap.payload...)
	add(noFrame, "IPv4 in SNAP", snap.ofKind(uint16(len(snap.payload))))
	add(noFrame, "IPv6 in a frame of IPv4", datagram(own6, far6).ofKind(unix.ETH_P_IP))
	add(noFrame, "IPv4 in a frame of IPv6", datagram(own4, far4).ofKind(unix.ETH_P_IPV6))
	for _, f := range []struct {
		what string
		frame
	}{{"IPv4", datagram(own4, far4)}, {"IPv6", datagram(own6, far6)}, {"ARP", ask}, {"IPv4 with a false source", datagram(far4, far4)}} {
		add(noFrame, f.what+" in VLAN 5", f.tagged(unix.ETH_P_8021Q, 5))
		add(noFrame, f.what+" in VLAN 0", f.tagged(unix.ETH_P_8021Q, 0))
		add(noFrame, f.what+" in a priority tag", f.tagged(unix.ETH_P_8021Q, 7<<13))
		add(noFrame, f.what+" in service VLAN 5", f.tagged(unix.ETH_P_8021AD, 5))
		add(noFrame, f.what+" in two tags", f.tagged(unix.ETH_P_8021Q, 0, 0))
		add(noFrame, f.what+" in three tags", f.tagged(unix.ETH_P_8021AD, 1, 2, 3))
		add(noFrame, f.what+" in QinQ of old", f.tagged(0x9100, 5))
	}
	// To others on the link, to all, to groups.
	for _, mac := range []net.HardwareAddr{otherMAC, machineMAC, everybody, {0x01, 0, 0x5e, 0, 0, 0xfb}, {0x01, 0x80, 0xc2, 0, 0, 0}} {
		add(noFrame, "IPv4 to "+mac.String(), datagram(own4, far4).sentTo(mac))
		add(noFrame, "IPv6 to "+mac.String(), datagram(own6, far6).sentTo(mac))
	}
	dhcp := datagram(addr("0.0.0.0"), addr("255.255.255.255")).sentTo(everybody)
	dhcp.payload = ip4{src: addr("0.0.0.0"), dst: addr("255.255.255.255"), proto: unix.IPPROTO_UDP,
		payload: udp(netip.MustParseAddrPort("0.0.0.0:68"), netip.MustParseAddrPort("255.255.255.255:67"), make([]byte, 300))}.bytes()
	add(noFrame, "DHCP", dhcp)
	add(noFrame, "DHCP for IPv6", datagram(own6, addr("ff02::1:2")).sentTo(net.HardwareAddr{0x33, 0x33, 0, 1, 0, 2}))
	add(noFrame, "multicast DNS", datagram(own4, addr("224.0.0.251")).sentTo(net.HardwareAddr{0x01, 0, 0x5e, 0, 0, 0xfb}))
	add(noFrame, "broadcast on the link", datagram(own4, addr("169.254.0.23")).sentTo(everybody))
	// Source routes and other options that routers act on.
	far := far4.As4()
	route := append([]byte{7, 4, 10, 99, 0, 1}, 0)
	add(noFrame, "loose source route", with4(netdev.GuestGateway, append([]byte{0x83}, route...)...))
	add(noFrame, "strict source route", with4(netdev.GuestGateway, append([]byte{0x89}, route...)...))
	add(noFrame, "loose source route by the internet", with4(far4, append([]byte{0x83}, route...)...))
	add(noFrame, "record route", with4(far4, 7, 7, 4, 0, 0, 0, 0, 0))
	add(noFrame, "time stamps", with4(far4, 68, 8, 5, 0, 0, 0, 0, 0))
	add(noFrame, "router alert", with4(far4, 148, 4, 0, 0))
	add(noFrame, "no options", with4(far4, 1, 1, 1, 0))
	hop := addr("fd00:99::1").As16()
	add(noFrame, "routing header", with6(netdev.GuestGateway6, unix.IPPROTO_ROUTING, append([]byte{0, 1, 0, 0, 0, 0}, hop[:]...)...))
	add(noFrame, "routing header by the internet", with6(far6, unix.IPPROTO_ROUTING, append([]byte{0, 1, 0, 0, 0, 0}, hop[:]...)...))
	add(noFrame, "segment routing", with6(far6, unix.IPPROTO_ROUTING, append([]byte{4, 1, 0, 0, 0, 0}, hop[:]...)...))
	add(noFrame, "hop-by-hop options", with6(far6, unix.IPPROTO_HOPOPTS, 5, 2, 0, 0, 1, 0))
	// Messages that would change the namespace's ways.
	quoted := ip4{src: netdev.GuestGateway, dst: own4, proto: unix.IPPROTO_UDP, payload: make([]byte, 8)}.bytes()
	redirect := append(far[:], quoted...)
	add(noFrame, "redirect to the gateway", control(own4, netdev.GuestGateway, 5, redirect))
	add(noFrame, "redirect to the internet", control(own4, far4, 5, redirect))
	add(noFrame, "redirect to another slot", control(own4, neighbour.GuestAddr, 5, redirect))
	add(noFrame, "router advertisement of IPv4", control(own4, netdev.GuestGateway, 9, make([]byte, 12)))
	add(noFrame, "router solicitation of IPv4", control(own4, netdev.GuestGateway, 10, make([]byte, 4)))
	gateway6, mine6, else6 := netdev.GuestGateway6.As16(), own6.As16(), slot.GuestAddr6.As16()
	linkOption := append([]byte{1, 1}, machineMAC...)
	for _, to := range []struct {
		ip  netip.Addr
		mac net.HardwareAddr
	}{{addr("ff02::1"), allNodes}, {addr("ff02::2"), allRouters}, {netdev.GuestGateway6, netdev.TapMAC}, {far6, netdev.TapMAC}} {
		at := " to " + to.ip.String()
		add(noFrame, "router advertisement"+at, control(own6, to.ip, 134, make([]byte, 12)).sentTo(to.mac))
		add(noFrame, "router advertisement of fe80::1"+at, control(addr("fe80::1"), to.ip, 134, make([]byte, 12)).sentTo(to.mac))
		add(noFrame, "router solicitation"+at, control(own6, to.ip, 133, make([]byte, 4)).sentTo(to.mac))
		add(noFrame, "redirect"+at, control(own6, to.ip, 137, slices.Concat(make([]byte, 4), gateway6[:], hop[:])).sentTo(to.mac))
		for what, target := range map[string][16]byte{"the gateway": gateway6, "itself": mine6, "the slot": else6} {
			advert := slices.Concat([]byte{0x60, 0, 0, 0}, target[:], append([]byte{2, 1}, machineMAC...))
			add(noFrame, "neighbour advertisement of "+what+at, control(own6, to.ip, 136, advert).sentTo(to.mac))
		}
	}
	solicit := func(src, dst netip.Addr, target [16]byte) frame {
		return control(src, dst, 135, slices.Concat(make([]byte, 4), target[:], linkOption))
	}
	add(noFrame, "neighbour solicitation for another", solicit(own6, addr("ff02::1:ff00:b"), else6).sentTo(net.HardwareAddr{0x33, 0x33, 0xff, 0, 0, 0xb}))
	add(noFrame, "neighbour solicitation to all", solicit(own6, addr("ff02::1"), gateway6).sentTo(allNodes))
	add(noFrame, "neighbour solicitation into the internet", solicit(own6, far6, gateway6))
	add(noFrame, "neighbour solicitation of another", solicit(addr("fe80::1"), netdev.GuestGateway6, gateway6))
	add(noFrame, "neighbour solicitation of nobody", solicit(addr("::"), addr("ff02::1:ff00:1"), gateway6).sentTo(net.HardwareAddr{0x33, 0x33, 0xff, 0, 0, 1}))
	// ARP that says or asks something else.
	says := func(count egress.Refusals, what string, payload []byte) {
		add(count, "ARP "+what, frame{machineMAC, everybody, unix.ETH_P_ARP, payload})
		add(count, "ARP "+what+", to the gateway alone", frame{machineMAC, netdev.TapMAC, unix.ETH_P_ARP, payload})
	}
	says(spoofed, "of the gateway's address", arp(1, machineMAC, netdev.GuestGateway, nobody, netdev.GuestGateway))
	says(spoofed, "answer for the gateway", arp(2, machineMAC, netdev.GuestGateway, everybody, own4))
	says(spoofed, "of the slot's address", arp(1, machineMAC, slot.GuestAddr, nobody, netdev.GuestGateway))
	says(spoofed, "of no address", arp(1, machineMAC, addr("0.0.0.0"), nobody, netdev.GuestGateway))
	says(spoofed, "of another card", arp(1, otherMAC, own4, nobody, netdev.GuestGateway))
	says(spoofed, "of the gateway's card", arp(2, netdev.TapMAC, own4, nobody, netdev.GuestGateway))
	says(noFrame, "for itself", arp(1, machineMAC, own4, nobody, own4))
	says(noFrame, "for the slot's address", arp(1, machineMAC, own4, nobody, slot.GuestAddr))
	says(noFrame, "for the node", arp(1, machineMAC, own4, nobody, lab.HostAddr))
	says(noFrame, "answer", arp(2, machineMAC, own4, netdev.TapMAC, netdev.GuestGateway))
	says(noFrame, "in reverse", arp(3, machineMAC, own4, nobody, netdev.GuestGateway))
	says(noFrame, "inverse", arp(8, machineMAC, own4, nobody, netdev.GuestGateway))
	strange := arp(1, machineMAC, own4, nobody, netdev.GuestGateway)
	strange[1] = 6
	says(noFrame, "for another hardware", strange)
	says(spoofed, "cut short", strange[:10])

	// True to its address, to where it must not go. Routing would discard the first of them without a word.
	for _, dst := range []netip.Addr{
		addr("0.0.0.0"), addr("127.0.0.1"), addr("127.255.255.255"), addr("224.0.0.1"), addr("239.255.255.250"), addr("255.255.255.255"),
		addr("169.254.0.20"), addr("169.254.0.23"), own4,
		addr("::"), addr("::1"), addr("ff02::1"), addr("ff02::2"), addr("ff05::2"), addr("ff0e::1"), addr("fd73:6c75:6963:65ff::"),
		addr("fd73:6c75:6963:65ff::3"), own6,
	} {
		src := own4
		if dst.Is6() {
			src = own6
		}
		add(reserved, "a datagram to "+dst.String(), datagram(src, dst))
		add(reserved, "a segment to "+dst.String(), segment(src, dst, flagSYN))
	}
	told := func(what string, count egress.Refusals, frames [][]byte) {
		list = append(list, attempt{what: what, frames: frames, count: count, refused: true})
	}
	for _, dst := range append([]netip.Addr{
		netdev.GuestGateway, netdev.GuestGateway6, slot.GuestAddr, slot.GuestAddr6, slot.HostAddr, neighbour.GuestAddr, neighbour.GuestAddr6,
		neighbour.HostAddr, lab.HostAddr, lab.HostAddr6, addr("169.254.0.99"), addr("240.0.0.1"), addr("255.255.255.254"), addr("0.0.0.1"),
		addr("::10.99.0.1"), addr("2002:0a63:1::1"), addr("fec0::1"), addr("100::1"), addr("fdff::1"),
	}, lab.Traps...) {
		src := own4
		if dst.Is6() {
			src = own6
		}
		told("a datagram to "+dst.String(), reserved, one(datagram(src, dst)))
		told("a segment to "+dst.String(), reserved, one(segment(src, dst, flagSYN)))
		ping := byte(8)
		if dst.Is6() {
			ping = 128
		}
		told("a ping of "+dst.String(), reserved, one(control(src, dst, ping, make([]byte, 60))))
	}
	told("a datagram to a mapped address", reserved, one(datagram(own6, addr("::ffff:10.99.0.1"))))
	add(reserved, "a segment to a mapped address, from which no reset can come", segment(own6, addr("::ffff:10.99.0.1"), flagSYN))
	// In pieces: each is put together before it is judged. The pieces are as small as they can be, and no ports in the first of IPv6.
	for _, piece := range []int{8, 24, 512} {
		told(fmt.Sprintf("pieces of %d bytes to 10.99.0.1", piece), reserved, fragments4(own4, addr("10.99.0.1"), 600+piece, piece))
		told(fmt.Sprintf("pieces of %d bytes to the gateway", piece), reserved, fragments4(own4, netdev.GuestGateway, 700+piece, piece))
		told(fmt.Sprintf("pieces of %d bytes to fd00:99::1", piece), reserved, fragments6(own6, addr("fd00:99::1"), 100+piece%100, piece))
	}
	list = append(list,
		attempt{what: "pieces with a false source", frames: fragments4(addr("9.9.9.9"), far4, 800, 512), count: egress.Refusals{Spoofed: 2}},
		attempt{what: "pieces of IPv6 with a false source", frames: fragments6(addr(google6), far6, 200, 96), count: egress.Refusals{Spoofed: 3}},
	)
	// Of connections that were never made here.
	stale := egress.Refusals{Stale: 1}
	for _, f := range []struct{ src, dst netip.Addr }{
		{own4, far4}, {own6, far6}, {own4, netdev.GuestGateway}, {own6, netdev.GuestGateway6},
	} {
		told("an unknown connection to "+f.dst.String(), stale, one(segment(f.src, f.dst, flagACK)))
		told("an answer to a connection that nobody made from "+f.dst.String(), stale, one(segment(f.src, f.dst, flagSYN|flagACK)))
		add(stale, "the reset of an unknown connection to "+f.dst.String(), segment(f.src, f.dst, flagRST))
	}
	return list
}

// TestHostileMachine is root in a machine that tries everything but what is allowed: each attempt is counted under its reason, the machine
// is told or left in the dark as the case may be, and nothing at all comes out of the slot.
func TestHostileMachine(t *testing.T) {
	w := newWorldWith(t, netdev.Config{Tap: true})
	slot, neighbour := w.slot(5), w.slot(6)
	h := newHostile(w, slot)
	w.fenceMachine(neighbour, egress.Policy{AllowInternet: true})
	all := netip.MustParsePrefix
	w.fenceMachine(slot, egress.Policy{AllowInternet: true, Allow: []netip.Prefix{all("0.0.0.0/0"), all("::/0")}})
	h.settle()
	tried := 0
	for _, a := range attempts(slot, neighbour) {
		before := w.counters(slot)
		h.write(a.frames...)
		outside, answers := h.settle()
		tried++
		if got := difference(before, w.counters(slot)); got != a.count {
			t.Errorf("%s: counted %+v, want %+v", a.what, got, a.count)
		}
		if told := len(answers) > 0; told != a.refused {
			t.Errorf("%s: the machine was told %v, want %v: %x", a.what, told, a.refused, answers)
		}
		for _, f := range outside {
			t.Errorf("%s: came out as %x", a.what, f)
		}
	}
	if w.lab.Strangers() != 0 || w.lab.Trapped() != 0 {
		t.Errorf("%d packets left with a wrong source, %d to private addresses", w.lab.Strangers(), w.lab.Trapped())
	}
	t.Logf("%d attempts", tried)
}

// TestMutilatedFrames flips bits in frames that may pass and in those that may not: whatever comes out of the slot is a plain packet from
// the slot's own address to one that its policy allows.
func TestMutilatedFrames(t *testing.T) {
	w := newWorldWith(t, netdev.Config{Tap: true})
	slot, neighbour := w.slot(3), w.slot(4)
	h := newHostile(w, slot)
	p := egress.Policy{AllowInternet: true, Deny: []netip.Prefix{netip.MustParsePrefix("8.0.0.0/6"), netip.MustParsePrefix("2001::/16")}}
	w.fenceMachine(slot, p)
	h.settle() // the namespace may have said something before it was fenced
	rules := egress.Compile(p, egress.Local())
	var seeds [][]byte
	for _, a := range attempts(slot, neighbour) {
		seeds = append(seeds, a.frames...)
	}
	for _, f := range []frame{datagram(own4, far4), datagram(own6, far6), segment(own4, far4, flagSYN), segment(own6, far6, flagSYN)} {
		for range 100 { // half of all
			seeds = append(seeds, f.bytes())
		}
	}
	random := rand.New(rand.NewPCG(3, 4))
	came := 0
	check := func(f []byte) {
		t.Helper()
		came++
		var src, dst netip.Addr
		plain := true
		switch kind := binary.BigEndian.Uint16(f[12:]); {
		case kind == unix.ETH_P_IP && len(f) >= 34:
			src, dst = netip.AddrFrom4([4]byte(f[26:30])), netip.AddrFrom4([4]byte(f[30:34]))
			plain = f[14] == 4<<4|5
		case kind == unix.ETH_P_IPV6 && len(f) >= 54:
			src, dst = netip.AddrFrom16([16]byte(f[22:38])), netip.AddrFrom16([16]byte(f[38:54]))
			plain = f[14]>>4 == 6 && f[20] != unix.IPPROTO_HOPOPTS && f[20] != unix.IPPROTO_ROUTING
		}
		if src != slot.GuestAddr && src != slot.GuestAddr6 || rules.Verdict(dst) != egress.Allowed || !plain {
			t.Errorf("from %s to %s, plain %v, came out: %x", src, dst, plain, f)
		}
	}
	for range 80 {
		for range 50 {
			f := slices.Clone(seeds[random.IntN(len(seeds))])
			for range random.IntN(4) {
				f[random.IntN(min(len(f), 80))] ^= 1 << random.IntN(8)
			}
			h.writeUnchecked(f[:max(14, len(f)-random.IntN(8)/7*random.IntN(len(f)))]) // now and then cut short
		}
		outside, _ := h.settle()
		for _, f := range outside {
			check(f)
		}
	}
	if came == 0 {
		t.Error("nothing at all came out: nothing was tried")
	}
	if w.lab.Strangers() != 0 || w.lab.Trapped() != 0 {
		t.Errorf("%d packets left with a wrong source, %d to private addresses", w.lab.Strangers(), w.lab.Trapped())
	}
	t.Logf("%d frames came out", came)
}

// TestNeighbourIsPinned: requests that may pass do not change what the namespace knows of its neighbour, whatever else they say.
func TestNeighbourIsPinned(t *testing.T) {
	w := newWorldWith(t, netdev.Config{Tap: true})
	slot := w.slot(3)
	h := newHostile(w, slot)
	w.fenceMachine(slot, egress.Policy{AllowInternet: true})
	h.settle()
	nobody, everybody := make(net.HardwareAddr, 6), net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	gateway := netdev.GuestGateway6.As16()
	lie := append([]byte{1, 1}, 0x02, 0, 0, 0, 0, 9) // of another hardware address
	h.write(
		frame{machineMAC, everybody, unix.ETH_P_ARP, arp(1, machineMAC, own4, nobody, netdev.GuestGateway)}.bytes(),
		control(own6, netdev.GuestGateway6, 135, slices.Concat(make([]byte, 4), gateway[:], lie)).bytes(),
		control(own6, netip.MustParseAddr("ff02::1:ff00:1"), 135, slices.Concat(make([]byte, 4), gateway[:], lie)).
			sentTo(net.HardwareAddr{0x33, 0x33, 0xff, 0, 0, 1}).bytes(),
	)
	outside, answers := h.settle()
	if len(outside) != 0 || len(answers) != 3 {
		t.Errorf("%x came out, and %d answers, want one for each question: %x", outside, len(answers), answers)
	}
	for _, f := range answers {
		if !bytes.Equal(f[:6], machineMAC) || !bytes.Equal(f[6:12], netdev.TapMAC) {
			t.Errorf("answered with %x, want it from the tap's card to the machine's", f)
		}
	}
	if got := w.counters(slot); got != (egress.Refusals{}) {
		t.Errorf("counted %+v, want nothing", got)
	}
	if err := lab.Enter(slot.NetNS, func() {
		tap, err := net.InterfaceByName(netdev.TapName)
		if err != nil {
			t.Fatal(err)
		}
		neighbours, err := netlink.NeighList(tap.Index, netlink.FAMILY_ALL)
		if err != nil {
			t.Fatal(err)
		}
		pinned := 0
		for _, n := range neighbours {
			if n.IP.IsMulticast() {
				continue
			}
			pinned++
			if n.State != unix.NUD_PERMANENT || !bytes.Equal(n.HardwareAddr, machineMAC) {
				t.Errorf("%s is at %s in state %#x, want %s for good", n.IP, n.HardwareAddr, n.State, machineMAC)
			}
		}
		if pinned != 2 {
			t.Errorf("there are %d neighbours, want two: %v", pinned, neighbours)
		}
	}); err != nil {
		t.Fatal(err)
	}
}
