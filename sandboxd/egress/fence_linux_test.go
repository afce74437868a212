package egress_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// world is a node in the laboratory with slots, as sandboxd would have them.
type world struct {
	*testing.T
	lab     *lab.Lab
	network *netdev.Network
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldWith(t, netdev.Config{})
}

func newWorldWith(t *testing.T, cfg netdev.Config) *world {
	t.Helper()
	w := &world{T: t, lab: lab.New(t)}
	w.lab.Host.Run(func() {
		var err error
		cfg.NamePrefix = w.lab.Prefix()
		if w.network, err = netdev.New(cfg); err != nil {
			t.Fatal(err)
		}
	})
	if err := w.network.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.network.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *world) slot(index int) *netdev.Slot {
	w.Helper()
	slot, err := w.network.Acquire(w.Context(), index)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		if err := w.network.Release(context.Background(), index); err != nil {
			w.Error(err)
		}
	})
	return slot
}

// fence puts the policy in force; the node's addresses are protected, as sandboxd protects them.
func (w *world) fence(slot *netdev.Slot, internet *bool, allow, deny string) {
	w.Helper()
	p, err := egress.ParsePolicy(internet, strings.Fields(allow), strings.Fields(deny))
	if err != nil {
		w.Fatal(err)
	}
	p.Protected = []netip.Prefix{netip.PrefixFrom(lab.HostAddr, 32), netip.PrefixFrom(lab.HostAddr6, 128)}
	if err := egress.Apply(slot.NetNS, egress.Compile(p, egress.Local(slot.GuestAddr, slot.GuestAddr6))); err != nil {
		w.Fatal(err)
	}
}

func (w *world) counters(slot *netdev.Slot) egress.Refusals {
	w.Helper()
	counters, err := egress.Counters(slot.NetNS)
	if err != nil {
		w.Fatal(err)
	}
	return counters
}

// dial opens a socket inside a namespace: a slot's, or that of the machine in a slot.
func (w *world) dial(netns, network, to string, patience time.Duration) (conn net.Conn, err error) {
	w.Helper()
	enterErr := lab.Enter(netns, func() { conn, err = net.DialTimeout(network, to, patience) })
	if enterErr != nil {
		w.Fatal(enterErr)
	}
	return conn, err
}

// reach says what a program inside sees of an address: "open", "refused" at connect time, or "silent".
func (w *world) reach(netns, network string, to netip.Addr) string {
	w.Helper()
	return w.reachWithin(netns, network, to, 5*time.Second)
}

func (w *world) reachWithin(netns, network string, to netip.Addr, patience time.Duration) string {
	w.Helper()
	conn, err := w.dial(netns, network, netip.AddrPortFrom(to, lab.PortEcho).String(), patience)
	if err == nil {
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		if _, err = io.WriteString(conn, "ping"); err == nil {
			_, err = io.ReadFull(conn, make([]byte, 4))
		}
	}
	switch {
	case err == nil:
		return "open"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "silent"
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES),
		errors.Is(err, syscall.EHOSTUNREACH):
		return "refused"
	}
	return err.Error()
}

const (
	cloudflare6 = "2606:4700:4700::1111"
	google6     = "2001:4860:4860::8888"
)

// TestFence holds the acceptance's policies to what a program inside sees, over TCP and UDP, IPv4 and IPv6.
func TestFence(t *testing.T) {
	w := newWorld(t)
	slot := w.slot(7)
	no := false
	everything := []string{"1.1.1.1", "8.8.8.8", "8.8.4.4", "9.9.9.9", cloudflare6, google6}
	tests := []struct {
		name        string
		internet    *bool
		allow, deny string
		open        string // of everything; the rest is refused
	}{
		{"open by default", nil, "", "", strings.Join(everything, " ")},
		{"no internet", &no, "", "", ""},
		{"no internet but an allow list", &no, "1.1.1.1 2606:4700::/32", "", "1.1.1.1 " + cloudflare6},
		{"all traffic denied", nil, "", "0.0.0.0/0", ""},
		{"all IPv6 denied", nil, "", "::/0", "1.1.1.1 8.8.8.8 8.8.4.4 9.9.9.9"},
		{"allow list", nil, "1.1.1.1 8.8.8.0/24", "0.0.0.0/0", "1.1.1.1 8.8.8.8"},
		{"deny list", nil, "", "8.8.8.8 2001:4860::/32", "1.1.1.1 8.8.4.4 9.9.9.9 " + cloudflare6},
		{"allow wins over deny", nil, "8.8.8.8", "8.8.8.8 8.8.4.4", "1.1.1.1 8.8.8.8 9.9.9.9 " + cloudflare6 + " " + google6},
		{"allow alone changes nothing", nil, "1.1.1.1", "", strings.Join(everything, " ")},
		{"allow everything", nil, "0.0.0.0/0", "0.0.0.0/0 8.8.8.8", strings.Join(everything, " ")},
		{"mapped address", nil, "", "::ffff:8.8.8.8", "1.1.1.1 8.8.4.4 9.9.9.9 " + cloudflare6 + " " + google6},
	}
	for _, tt := range tests {
		w.fence(slot, tt.internet, tt.allow, tt.deny)
		before := w.counters(slot)
		refused := uint64(0)
		for _, addr := range everything {
			want := "refused"
			for _, open := range strings.Fields(tt.open) {
				if open == addr {
					want = "open"
				}
			}
			for _, network := range []string{"tcp", "udp"} {
				if got := w.reach(slot.NetNS, network, netip.MustParseAddr(addr)); got != want {
					t.Errorf("%s: %s over %s is %s, want %s", tt.name, addr, network, got, want)
				}
				if want == "refused" {
					refused++
				}
			}
		}
		after := w.counters(slot)
		if got := after.Denied - before.Denied; got != refused || after.Reserved != before.Reserved || after.Spoofed != before.Spoofed {
			t.Errorf("%s: counted %+v before and %+v after, want %d more denied", tt.name, before, after, refused)
		}
	}
	if w.lab.Strangers() != 0 || w.lab.Trapped() != 0 {
		t.Errorf("%d packets left with a wrong source, %d to private addresses", w.lab.Strangers(), w.lab.Trapped())
	}
}

// TestReservedNever: private ranges, metadata, the node and the neighbours are out of reach under the most generous policy,
// and refused at once; with no rules inside at all the host's own table still holds.
func TestReservedNever(t *testing.T) {
	w := newWorld(t)
	slot, neighbour := w.slot(0), w.slot(1)
	for _, addr := range []netip.Addr{lab.HostAddr, lab.HostAddr6} {
		ln, err := w.lab.Host.Listen("tcp", netip.AddrPortFrom(addr, lab.PortEcho).String())
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		go echo(ln)
	}
	var neighbours []net.Listener
	if err := lab.Enter(neighbour.NetNS, func() {
		ln, err := net.Listen("tcp", fmt.Sprintf(":%d", lab.PortEcho))
		if err != nil {
			t.Fatal(err)
		}
		neighbours = append(neighbours, ln)
	}); err != nil {
		t.Fatal(err)
	}
	defer neighbours[0].Close()
	go echo(neighbours[0])

	targets := append([]netip.Addr{
		lab.HostAddr, lab.HostAddr6, slot.HostAddr, neighbour.HostAddr, neighbour.GuestAddr, neighbour.GuestAddr6,
		netip.MustParseAddr("10.12.200.200"), netip.MustParseAddr("169.254.0.22"),
	}, lab.Traps...)
	// First without rules: the host's table alone. It is silent.
	for _, addr := range []netip.Addr{lab.HostAddr, lab.HostAddr6, neighbour.GuestAddr, neighbour.GuestAddr6,
		netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("10.99.0.1"), netip.MustParseAddr("fd00:99::1")} {
		if got := w.reachWithin(slot.NetNS, "tcp", addr, 200*time.Millisecond); got == "open" {
			t.Errorf("without rules inside, %s is open", addr)
		}
	}
	w.fence(neighbour, nil, "", "")
	w.fence(slot, nil, "0.0.0.0/0 10.0.0.0/8 169.254.0.0/16 fc00::/7", "")
	for _, addr := range targets {
		for _, network := range []string{"tcp", "udp"} {
			if got := w.reach(slot.NetNS, network, addr); got != "refused" {
				t.Errorf("%s over %s is %s, want refused", addr, network, got)
			}
		}
	}
	if counters := w.counters(slot); counters.Reserved != uint64(2*len(targets)) || counters.Denied != 0 {
		t.Errorf("counted %+v, want %d reserved", counters, 2*len(targets))
	}
	if got := w.lab.Trapped(); got != 0 {
		t.Errorf("%d packets fell into the traps: %v", got, w.lab.Hits(netip.Addr{}))
	}
	if got := w.reach(slot.NetNS, "tcp", netip.MustParseAddr("1.1.1.1")); got != "open" {
		t.Errorf("1.1.1.1 is %s", got)
	}
}

func echo(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			_, _ = io.Copy(conn, conn)
		}()
	}
}

// TestSpoofedSourceStays: packets with a source address that is not the slot's leave neither the namespace (raw sockets) nor,
// where they go around its rules (packet sockets, which only the node's own privilege opens), the host.
func TestSpoofedSourceStays(t *testing.T) {
	w := newWorld(t)
	slot := w.slot(3)
	w.fence(slot, nil, "", "")
	send := func(domain int, payload []byte, to unix.Sockaddr) {
		t.Helper()
		if err := lab.Enter(slot.NetNS, func() {
			fd, err := unix.Socket(domain, unix.SOCK_RAW, unix.IPPROTO_RAW)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if domain == unix.AF_INET6 {
				if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_HDRINCL, 1); err != nil {
					t.Fatal(err)
				}
			}
			_ = unix.Sendto(fd, payload, 0, to) // EPERM when the rules see it
		}); err != nil {
			t.Fatal(err)
		}
	}
	dst, dst6 := netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr(cloudflare6)
	spoofed := []netip.Addr{netip.MustParseAddr("9.9.9.9"), lab.HostAddr, netip.MustParseAddr("10.12.0.1"), netdev.GuestConstant}
	for _, src := range spoofed {
		send(unix.AF_INET, udp4(src, dst), &unix.SockaddrInet4{Addr: dst.As4()})
	}
	for _, src := range []netip.Addr{netip.MustParseAddr(google6), lab.HostAddr6} {
		send(unix.AF_INET6, udp6(src, dst6), &unix.SockaddrInet6{Addr: dst6.As16()})
	}
	if got := w.counters(slot).Spoofed; got != 6 {
		t.Errorf("counted %d spoofed packets, want 6", got)
	}
	// Around the rules inside, straight onto the wire.
	if err := lab.Enter(slot.NetNS, func() {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		host := [8]byte{0x02, 'S', 'L', 0, 0, 3}
		wire := func(proto uint16, packet []byte) {
			to := &unix.SockaddrLinklayer{Ifindex: eth0.Index, Protocol: proto<<8 | proto>>8, Halen: 6, Addr: host}
			if err := unix.Sendto(fd, packet, 0, to); err != nil {
				t.Errorf("send: %v", err)
			}
		}
		for _, src := range spoofed {
			wire(unix.ETH_P_IP, udp4(src, dst))
		}
		wire(unix.ETH_P_IPV6, udp6(netip.MustParseAddr(google6), dst6))
		wire(unix.ETH_P_IP, udp4(slot.GuestAddr, netip.MustParseAddr("10.99.0.1"))) // a true source, a private destination
		wire(unix.ETH_P_IP, udp4(slot.GuestAddr, dst))                              // and one that may pass, to show that the wire works
	}); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for len(w.lab.Hits(dst)) == 0 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if hits := w.lab.Hits(dst); len(hits) != 1 || hits[0].From.Addr() != lab.HostAddr {
		t.Errorf("1.1.1.1 saw %v, want one datagram from the host", hits)
	}
	if w.lab.Strangers() != 0 || w.lab.Trapped() != 0 || len(w.lab.Hits(dst6)) != 0 {
		t.Errorf("%d packets left with a wrong source, %d to private addresses", w.lab.Strangers(), w.lab.Trapped())
	}
}

// udp4 is a datagram to the echo port; the kernel fills in the checksum of the IPv4 header for raw sockets only, so it is done here.
func udp4(src, dst netip.Addr) []byte {
	payload := []byte("spoof")
	b := make([]byte, 28, 28+len(payload))
	b[0], b[3], b[8], b[9] = 0x45, byte(28+len(payload)), 64, unix.IPPROTO_UDP
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	b[10], b[11] = byte(^sum>>8), byte(^sum)
	b[20], b[21], b[23], b[25] = 0x80, 1, lab.PortEcho, byte(8+len(payload)) // no checksum, which UDP over IPv4 allows
	return append(b, payload...)
}

// udp6 carries a wrong checksum: it need not arrive whole to be seen at the door.
func udp6(src, dst netip.Addr) []byte {
	b := make([]byte, 48)
	b[0], b[5], b[6], b[7] = 0x60, 8, unix.IPPROTO_UDP, 64
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	b[40], b[41], b[43], b[45], b[47] = 0x80, 1, lab.PortEcho, 8, 1
	return b
}

// TestUpdateCuts: a ruleset that denies the peer of flows in progress ends them within a second, whichever way the bytes run, and
// the programs learn of it; flows to others go on, and a ruleset that allows the peer again lets new ones through.
func TestUpdateCuts(t *testing.T) {
	w := newWorld(t)
	slot := w.slot(2)
	for _, peer := range []string{"8.8.8.8", google6} {
		t.Run(peer, func(t *testing.T) {
			w := &world{T: t, lab: w.lab, network: w.network}
			w.mustCut(slot.NetNS, peer, func(deny string) { w.fence(slot, nil, "", deny) })
		})
	}
	if counters := w.counters(slot); counters.Denied == 0 || counters.Reserved != 0 || counters.Spoofed != 0 {
		t.Errorf("counted %+v", counters)
	}
}

// mustCut has flows to a peer from inside a namespace, denies it, and allows it again.
func (w *world) mustCut(netns, peer string, fence func(deny string)) {
	w.Helper()
	fence("")
	at := func(port uint16) string { return netip.AddrPortFrom(netip.MustParseAddr(peer), port).String() }
	read := io.Discard.(io.ReaderFrom).ReadFrom
	download := w.transfer(netns, "tcp", at(lab.PortStream), read)
	upload := w.transfer(netns, "tcp", at(lab.PortSink), nil)
	idle := w.transfer(netns, "tcp", at(lab.PortSink), func(r io.Reader) (int64, error) { return io.Copy(io.Discard, r) })
	stream := w.transfer(netns, "udp", at(lab.PortStream), read)
	pour := w.transfer(netns, "udp", at(lab.PortSink), nil)
	other := w.transfer(netns, "tcp", fmt.Sprintf("1.1.1.1:%d", lab.PortStream), read)
	flows := []*flow{download, upload, stream, pour}
	for _, f := range append(flows, other) {
		f.mustMove(w.T)
	}

	start := time.Now()
	fence(peer)
	for _, f := range append(flows, idle) {
		f.mustEnd(w.T, start)
	}
	still := w.lab.Sunk()
	other.mustMove(w.T)
	if now := w.lab.Sunk(); now != still {
		w.Errorf("the sink swallowed %d bytes after the cut", now-still)
	}
	if got := w.reach(netns, "tcp", netip.MustParseAddr(peer)); got != "refused" {
		w.Errorf("a new connection is %s, want refused", got)
	}
	fence("")
	if got := w.reach(netns, "tcp", netip.MustParseAddr(peer)); got != "open" {
		w.Errorf("after allowing it again it is %s", got)
	}
	other.mustMove(w.T)
}

// flow is a transfer in progress, and how far it is.
type flow struct {
	what  string
	conn  net.Conn
	moved atomic.Int64
	ended chan error
}

// transfer starts one inside: reading when copyFrom is given, else writing.
func (w *world) transfer(netns, network, to string, copyFrom func(io.Reader) (int64, error)) *flow {
	w.Helper()
	conn, err := w.dial(netns, network, to, 5*time.Second)
	if err != nil {
		w.Fatal(err)
	}
	f := &flow{what: network + " " + to, conn: conn, ended: make(chan error, 1)}
	w.Cleanup(func() { conn.Close() })
	go func() {
		if copyFrom == nil {
			block := bytes.Repeat([]byte("x"), 1200)
			for {
				n, err := conn.Write(block)
				f.moved.Add(int64(n))
				if err != nil {
					f.ended <- err
					return
				}
				if network == "udp" {
					time.Sleep(time.Millisecond)
				}
			}
		}
		if network == "udp" {
			_, _ = conn.Write([]byte("start"))
		}
		_, err := copyFrom(readerFunc(func(b []byte) (int, error) {
			n, err := conn.Read(b)
			f.moved.Add(int64(n))
			return n, err
		}))
		f.ended <- err
	}()
	return f
}

type readerFunc func([]byte) (int, error)

func (r readerFunc) Read(b []byte) (int, error) { return r(b) }

// mustMove waits for bytes.
func (f *flow) mustMove(t *testing.T) {
	t.Helper()
	from := f.moved.Load()
	for deadline := time.Now().Add(5 * time.Second); f.moved.Load() == from; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not move", f.what)
		}
	}
}

// mustEnd waits for the error that the program inside sees.
func (f *flow) mustEnd(t *testing.T, since time.Time) {
	t.Helper()
	select {
	case err := <-f.ended:
		t.Logf("%s ended %v after the update began: %v", f.what, time.Since(since).Round(time.Millisecond), err)
		if err == nil {
			t.Errorf("%s ended without an error", f.what)
		}
	case <-time.After(5 * time.Second): // the promise is one second; a loaded machine may be late, never more than this
		t.Errorf("%s still goes on", f.what)
	}
}

// TestNothingUnasked: packets from outside that no flow of the sandbox asked for do not come in, not even from the node.
func TestNothingUnasked(t *testing.T) {
	w := newWorld(t)
	slot := w.slot(4)
	w.fence(slot, nil, "", "")
	if err := lab.Enter(slot.NetNS, func() {
		ln, err := net.Listen("tcp", ":8000")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go echo(ln)
	}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if conn, err := w.lab.Host.Dial(ctx, "tcp", netip.AddrPortFrom(slot.GuestAddr, 8000).String()); err == nil {
		conn.Close()
		t.Error("the node reached the sandbox through the veth pair")
	}
	if got := w.counters(slot).Inbound; got == 0 {
		t.Error("nothing was counted as unasked")
	}
	// While the way that is meant for it works, under the strictest policy too.
	no := false
	w.fence(slot, &no, "", "")
	conn, err := slot.DialTCP(t.Context(), 8000)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "ping"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	// An update leaves the node's own connections to the sandbox alone.
	w.fence(slot, nil, "", "0.0.0.0/0")
	if _, err := io.WriteString(conn, "ping"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
		t.Errorf("an update cut the node's own connection: %v", err)
	}
}

// TestRootInsideIsPowerless: root of another user namespace, which is what root in a sandbox is, can neither see nor change the
// rules of the namespace it lives in, nor its devices and routes.
func TestRootInsideIsPowerless(t *testing.T) {
	w := newWorld(t)
	slot := w.slot(6)
	w.fence(slot, nil, "", "8.8.8.8")
	for _, command := range []string{
		"nft flush ruleset",
		"nft delete table inet sluice",
		"nft add rule inet sluice outbound accept",
		"ip link set eth0 down",
		"ip addr add 10.12.0.1/32 dev eth0",
		"ip route replace default dev lo",
		"ip neigh replace 10.12.0.12 lladdr 02:00:00:00:00:01 dev eth0",
		"conntrack -F",
		"sysctl -w net.ipv4.ip_forward=1",
	} {
		args := strings.Fields(command)
		if _, err := exec.LookPath(args[0]); err != nil {
			t.Logf("%s is missing, so it is not tried", args[0])
			continue
		}
		if err := lab.Enter(slot.NetNS, func() {
			cmd := exec.Command(args[0], args[1:]...)
			cmd.SysProcAttr = &syscall.SysProcAttr{
				Cloneflags:  syscall.CLONE_NEWUSER,
				UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 1}},
				GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 1}},
			}
			out, err := cmd.CombinedOutput()
			if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) {
				t.Errorf("%s: %v, want it to fail\n%s", command, err, out)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	for addr, want := range map[string]string{"8.8.8.8": "refused", "1.1.1.1": "open", cloudflare6: "open"} {
		if got := w.reach(slot.NetNS, "tcp", netip.MustParseAddr(addr)); got != want {
			t.Errorf("afterwards %s is %s, want %s", addr, got, want)
		}
	}
}

// TestThousandDescriptors: a node with more open files than select can name makes slots, fences them and reads their counters.
// The library asked select, and the node panicked at the next look at the counters.
func TestThousandDescriptors(t *testing.T) {
	w := newWorld(t)
	const open = 1200
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Max < 2*open {
		t.Skipf("at most %d files may be open here, and it takes %d: raise the hard limit of RLIMIT_NOFILE (ulimit -Hn)", limit.Max, 2*open)
	}
	raised := limit
	raised.Cur = max(limit.Cur, 2*open)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &raised); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	for range open {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}

	slot := w.slot(8)
	w.fence(slot, nil, "", "8.8.8.8")
	w.fence(slot, nil, "", "9.9.9.9") // over the one before, and ends its flows
	if got := w.reach(slot.NetNS, "tcp", netip.MustParseAddr("9.9.9.9")); got != "refused" {
		t.Errorf("9.9.9.9 is %s, want refused", got)
	}
	if got := w.counters(slot).Denied; got != 1 {
		t.Errorf("counted %d denied, want 1", got)
	}
	if err := w.network.Setup(t.Context()); err != nil {
		t.Error(err)
	}
	if got := w.reach(slot.NetNS, "udp", netip.MustParseAddr("8.8.8.8")); got != "open" {
		t.Errorf("8.8.8.8 is %s, want open", got)
	}
	if err := w.network.Release(t.Context(), 8); err != nil {
		t.Error(err)
	}
}

// TestOneSandboxCannotFillTheTable: a sandbox that begins flow after flow is refused at its limit, over IPv4 and IPv6 together and
// whether or not its own rules hold it, so that the host's table of flows has room for the neighbours. One of them filled it, and
// the node was cut off with everybody else.
func TestOneSandboxCannotFillTheTable(t *testing.T) {
	const inside, outside = 100, 150
	w := newWorldWith(t, netdev.Config{MaxFlows: outside})
	p := egress.Policy{AllowInternet: true, MaxFlows: inside}
	neighbour, slot, unfenced := w.slot(0), w.slot(1), w.slot(2)
	for _, s := range []*netdev.Slot{neighbour, slot} {
		if err := egress.Apply(s.NetNS, egress.Compile(p, egress.Local(s.GuestAddr, s.GuestAddr6))); err != nil {
			t.Fatal(err)
		}
	}
	// flood begins 200 flows, half of them over IPv6, sends each packet twice, and returns how many got out of the namespace.
	flood := func(s *netdev.Slot) (sent int) {
		if err := lab.Enter(s.NetNS, func() {
			conn, err := net.ListenUDP("udp", nil)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for i := range 200 {
				to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr([]string{"1.1.1.1", cloudflare6}[i%2]), uint16(20000+i)))
				_, first := conn.WriteToUDP([]byte("x"), to)
				_, second := conn.WriteToUDP([]byte("x"), to)
				if (first == nil) != (second == nil) {
					t.Errorf("flow %d: the first packet gave %v, the second %v", i, first, second)
				}
				if first == nil {
					sent++
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
		return sent
	}
	onHost := func(s *netdev.Slot) (n int) {
		w.lab.Host.Run(func() {
			for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
				if err != nil {
					t.Fatal(err)
				}
				for _, flow := range flows {
					if src, _ := netip.AddrFromSlice(flow.Forward.SrcIP); src == s.GuestAddr || src == s.GuestAddr6 {
						n++
					}
				}
			}
		})
		return n
	}
	if sent := flood(slot); sent != inside {
		t.Errorf("%d of 200 flows began, want %d", sent, inside)
	}
	if got := w.counters(slot).Flows; got != 2*(200-inside) {
		t.Errorf("counted %d packets of flows too many, want %d", got, 2*(200-inside))
	}
	if got := onHost(slot); got != inside {
		t.Errorf("the host tracks %d flows of the fenced slot, want %d", got, inside)
	}
	if sent := flood(unfenced); sent != 200 {
		t.Errorf("without rules inside %d of 200 flows began", sent)
	}
	if got := onHost(unfenced); got != outside {
		t.Errorf("the host tracks %d flows of the slot without rules, want %d", got, outside)
	}
	for _, network := range []string{"tcp", "udp"} {
		if got := w.reach(slot.NetNS, network, netip.MustParseAddr("8.8.8.8")); got != "refused" {
			t.Errorf("one more flow over %s is %s, want refused", network, got)
		}
		if got := w.reach(neighbour.NetNS, network, netip.MustParseAddr("8.8.8.8")); got != "open" {
			t.Errorf("the neighbour's flow over %s is %s, want open", network, got)
		}
	}
	for index, s := range map[int]*netdev.Slot{1: slot, 2: unfenced} {
		if err := w.network.Release(t.Context(), index); err != nil {
			t.Fatal(err)
		}
		if got := onHost(s); got != 0 {
			t.Errorf("the host tracks %d flows of released slot %d", got, index)
		}
	}
	if again := w.slot(2); flood(again) != 200 || onHost(again) != outside {
		t.Errorf("the next tenant of the slot has %d flows, want %d", onHost(again), outside)
	}
}
