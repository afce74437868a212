package egress_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// TestForwarded is the other placement: the guest is a machine behind a tap.
func TestForwarded(t *testing.T) {
	w := newWorldWith(t, netdev.Config{Tap: true})
	slot := w.slot(8)
	m := w.newMachine(slot)
	fence := func(allow, deny string) {
		t.Helper()
		p, err := egress.ParsePolicy(nil, strings.Fields(allow), strings.Fields(deny))
		if err != nil {
			t.Fatal(err)
		}
		w.fenceMachine(slot, p)
	}
	want := func(addr, want string) {
		t.Helper()
		for _, network := range []string{"tcp", "udp"} {
			if got := w.reach(m.netns, network, netip.MustParseAddr(addr)); got != want {
				t.Errorf("%s over %s is %s from the machine, want %s", addr, network, got, want)
			}
		}
	}
	fence("10.0.0.0/8", "8.8.8.8 2001:4860::/32")
	want("1.1.1.1", "open")
	want(cloudflare6, "open")
	want("8.8.8.8", "refused")
	want(google6, "refused")
	want("169.254.169.254", "refused")
	want("10.99.0.1", "refused")
	want("fd00:99::1", "refused")
	if got := w.counters(slot); got.Denied != 4 || got.Reserved != 6 || got.Spoofed != 0 || got.Frames != 0 || got.Stale != 0 {
		t.Errorf("counted %+v, want 4 denied and 6 reserved", got)
	}

	// The node reaches the machine, and the machine not the namespace in front of it.
	for at, address := range map[string]string{m.netns: ":3000", slot.NetNS: ":7"} {
		if err := lab.Enter(at, func() {
			ln, err := net.Listen("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { ln.Close() })
			go echo(ln)
		}); err != nil {
			t.Fatal(err)
		}
	}
	inside, err := slot.DialTCP(t.Context(), 3000)
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	ping := func() {
		t.Helper()
		inside.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.WriteString(inside, "ping"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(inside, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
	}
	ping()
	for _, addr := range []netip.Addr{netdev.GuestGateway, netdev.GuestGateway6, slot.GuestAddr, slot.GuestAddr6, slot.HostAddr} {
		want(addr.String(), "refused")
	}

	// What else is in the namespace, as the machine's own process, reaches nobody.
	for _, addr := range []string{"1.1.1.1", cloudflare6, lab.HostAddr.String()} {
		if got := w.reach(slot.NetNS, "udp", netip.MustParseAddr(addr)); got != "refused" {
			t.Errorf("%s is %s from the namespace, want refused", addr, got)
		}
	}

	// An update cuts what runs, tells the machine, and leaves the node's own connection alone.
	for _, peer := range []string{"8.8.8.8", google6} {
		w.mustCut(m.netns, peer, func(deny string) { fence("", deny) })
		ping()
	}
	if w.lab.Strangers() != 0 || w.lab.Trapped() != 0 {
		t.Errorf("%d packets left with a wrong source, %d to private addresses", w.lab.Strangers(), w.lab.Trapped())
	}
}

// TestForwardedLargeFrames: frames of many segments and packets in many pieces pass the fence, both ways, and a wire that is narrower
// further on makes itself known to the machine.
func TestForwardedLargeFrames(t *testing.T) {
	w := newWorldWith(t, netdev.Config{Tap: true})
	slot := w.slot(1)
	m := w.newMachine(slot)
	w.fenceMachine(slot, egress.Policy{AllowInternet: true})
	const enough = 1 << 20
	move := func(what string, n func() int64) {
		t.Helper()
		from := n()
		for deadline := time.Now().Add(10 * time.Second); n() < from+enough; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d bytes moved, want %d", what, n()-from, enough)
			}
		}
	}
	transfers := func() {
		t.Helper()
		for _, peer := range []string{"1.1.1.1", cloudflare6} {
			at := func(port uint16) string { return netip.AddrPortFrom(netip.MustParseAddr(peer), port).String() }
			upload := w.transfer(m.netns, "tcp", at(lab.PortSink), nil)
			move("up to "+peer, w.lab.Sunk)
			upload.conn.Close()
			download := w.transfer(m.netns, "tcp", at(lab.PortStream), io.Discard.(io.ReaderFrom).ReadFrom)
			move("down from "+peer, download.moved.Load)
			download.conn.Close()
		}
	}
	transfers()
	for i, way := range []string{"out of the machine", "into the machine"} {
		if m.large[i].Load() == 0 {
			t.Errorf("no large frame went %s: nothing was tried", way)
		}
	}
	for _, peer := range []string{"1.1.1.1", cloudflare6} {
		for _, size := range []int{1472, 4000, 30000} {
			conn, err := w.dial(m.netns, "udp", netip.AddrPortFrom(netip.MustParseAddr(peer), lab.PortEcho).String(), time.Second)
			if err != nil {
				t.Fatal(err)
			}
			sent, got := bytes.Repeat([]byte("x"), size), make([]byte, size+1)
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := conn.Write(sent); err != nil {
				t.Fatal(err)
			}
			if n, err := conn.Read(got); err != nil || n != size {
				t.Errorf("a datagram of %d bytes to %s: %d came back, %v", size, peer, n, err)
			}
			conn.Close()
		}
	}
	w.lab.Host.Run(func() {
		wan, err := netlink.LinkByName("wan0")
		if err == nil {
			err = netlink.LinkSetMTU(wan, 1280)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	transfers()
	if got := w.counters(slot); got != (egress.Refusals{}) {
		t.Errorf("counted %+v, want nothing", got)
	}
	if w.lab.Strangers() != 0 || w.lab.Trapped() != 0 {
		t.Errorf("%d packets left with a wrong source, %d to private addresses", w.lab.Strangers(), w.lab.Trapped())
	}
}

// TestResumeElsewhere: a machine that goes on in another slot has connections that are unknown there, to the internet and from the node.
// They end at the next word, and new ones are made as ever.
func TestResumeElsewhere(t *testing.T) {
	w := newWorldWith(t, netdev.Config{Tap: true})
	before, after := w.slot(1), w.slot(2)
	m := w.newMachine(before)
	for _, slot := range []*netdev.Slot{before, after} {
		w.fenceMachine(slot, egress.Policy{AllowInternet: true})
	}
	accepted := make(chan net.Conn, 1)
	if err := lab.Enter(m.netns, func() {
		ln, err := net.Listen("tcp", ":3000")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				accepted <- conn
			}
		}()
	}); err != nil {
		t.Fatal(err)
	}
	talk := func(conn net.Conn) error {
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		_, err := io.WriteString(conn, "ping")
		if err == nil {
			_, err = io.ReadFull(conn, make([]byte, 4))
		}
		return err
	}
	fromNode := func(slot *netdev.Slot) (outer, inner net.Conn) {
		t.Helper()
		outer, err := slot.DialTCP(t.Context(), 3000)
		if err != nil {
			t.Fatal(err)
		}
		inner = <-accepted
		t.Cleanup(func() { outer.Close(); inner.Close() })
		go io.Copy(outer, outer)
		if err := talk(inner); err != nil {
			t.Fatal(err)
		}
		return outer, inner
	}
	dial := func(peer string) net.Conn {
		t.Helper()
		conn, err := w.dial(m.netns, "tcp", netip.AddrPortFrom(netip.MustParseAddr(peer), lab.PortEcho).String(), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if err := talk(conn); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	_, inner := fromNode(before)
	conns := map[string]net.Conn{"1.1.1.1": dial("1.1.1.1"), cloudflare6: dial(cloudflare6), "the node": inner}

	m.plug(w, after)
	if err := w.network.Release(t.Context(), before.Index); err != nil {
		t.Fatal(err)
	}
	for peer, conn := range conns {
		if err := talk(conn); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the connection with %s: %v, want that it is reset", peer, err)
		}
	}
	if got := w.counters(after); got.Stale != uint64(len(conns)) || difference(egress.Refusals{Stale: got.Stale}, got) != (egress.Refusals{}) {
		t.Errorf("counted %+v, want %d stale", got, len(conns))
	}
	dial("1.1.1.1")
	dial(cloudflare6)
	fromNode(after)
	if w.lab.Strangers() != 0 || w.lab.Trapped() != 0 {
		t.Errorf("%d packets left with a wrong source, %d to private addresses", w.lab.Strangers(), w.lab.Trapped())
	}
}

// TestMachineCannotFillTheTable is TestOneSandboxCannotFillTheTable for what is forwarded.
func TestMachineCannotFillTheTable(t *testing.T) {
	const most, tried = 100, 200
	w := newWorldWith(t, netdev.Config{Tap: true})
	slot := w.slot(1)
	h := newHostile(w, slot)
	w.fenceMachine(slot, egress.Policy{AllowInternet: true, MaxFlows: most})
	for i := range tried {
		dst := []netip.Addr{far4, far6}[i%2]
		src := []netip.Addr{own4, own6}[i%2]
		for range 2 {
			f := datagram(src, dst)
			from, to := netip.AddrPortFrom(src, 30000), netip.AddrPortFrom(dst, uint16(20000+i))
			if payload := udp(from, to, []byte("x")); src.Is4() {
				f.payload = ip4{src: src, dst: dst, proto: unix.IPPROTO_UDP, payload: payload}.bytes()
			} else {
				f.payload = ip6{src: src, dst: dst, next: unix.IPPROTO_UDP, payload: payload}.bytes()
			}
			h.write(f.bytes())
		}
	}
	if got := w.counters(slot); got != (egress.Refusals{Flows: 2 * (tried - most)}) {
		t.Errorf("counted %+v, want %d packets of flows too many", got, 2*(tried-most))
	}
	var tracked int
	if err := lab.Enter(slot.NetNS, func() {
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
			if err != nil {
				t.Fatal(err)
			}
			tracked += len(flows)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if tracked != most {
		t.Errorf("%d flows are tracked, want %d", tracked, most)
	}
}
