package egress_test

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

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

	// An update cuts what runs, tells the machine, and leaves the node's own connection alone.
	for _, peer := range []string{"8.8.8.8", google6} {
		w.mustCut(m.netns, peer, func(deny string) { fence("", deny) })
		ping()
	}
	if w.lab.Strangers() != 0 || w.lab.Trapped() != 0 {
		t.Errorf("%d packets left with a wrong source, %d to private addresses", w.lab.Strangers(), w.lab.Trapped())
	}
}
