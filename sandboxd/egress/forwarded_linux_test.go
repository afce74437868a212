package egress_test

import (
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// TestForwarded is the other placement: the guest is a machine behind a tap. A second slot plays the machine, and a veth pair the tap.
func TestForwarded(t *testing.T) {
	w := newWorld(t)
	slot, machine := w.slot(8), w.slot(9)
	guest := netdev.GuestConstant
	run := func(at *netdev.Slot, stdin string, command string) {
		t.Helper()
		args := strings.Fields(command)
		if _, err := exec.LookPath(args[0]); err != nil {
			t.Skipf("%s is missing: install iproute2 and nftables", args[0])
		}
		if err := lab.Enter(at.NetNS, func() {
			cmd := exec.Command(args[0], args[1:]...)
			cmd.Stdin = strings.NewReader(stdin)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", command, err, out)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	run(slot, "", "ip link add tap0 type veth peer name vm0 netns "+filepath.Base(machine.NetNS))
	run(slot, "", "ip addr del 169.254.0.21/32 dev lo")
	run(slot, "", "ip addr add 169.254.0.22/29 dev tap0")
	run(slot, "", "ip link set tap0 up")
	run(machine, "", "ip link set eth0 down")
	run(machine, "", "ip addr del 169.254.0.21/32 dev lo")
	run(machine, "", "ip addr add 169.254.0.21/29 dev vm0")
	run(machine, "", "ip link set vm0 up")
	run(machine, "", "ip route add default via 169.254.0.22")
	run(slot, "table ip vm { chain nat { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }; }", "nft -f -")
	if err := lab.Enter(slot.NetNS, func() {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	for _, end := range []struct {
		at  *netdev.Slot
		dev string
	}{{slot, "tap0"}, {machine, "vm0"}} {
		run(end.at, "", "ip link show dev "+end.dev) // asking makes the kernel notice the carrier
	}
	fence := func(allow, deny string) {
		t.Helper()
		p, err := egress.ParsePolicy(nil, strings.Fields(allow), strings.Fields(deny))
		if err != nil {
			t.Fatal(err)
		}
		if err := egress.Apply(slot.NetNS, egress.Compile(p, egress.Forwarded("tap0", guest))); err != nil {
			t.Fatal(err)
		}
	}
	want := func(addr, want string) {
		t.Helper()
		for _, network := range []string{"tcp", "udp"} {
			if got := w.reach(machine, network, netip.MustParseAddr(addr)); got != want {
				t.Errorf("%s over %s is %s from the machine, want %s", addr, network, got, want)
			}
		}
	}
	fence("10.0.0.0/8", "8.8.8.8")
	want("1.1.1.1", "open")
	want("8.8.8.8", "refused")
	want("169.254.169.254", "refused")
	want("10.99.0.1", "refused")
	if got := w.counters(slot); got.Denied != 2 || got.Reserved != 4 || got.Spoofed != 0 {
		t.Errorf("counted %+v, want 2 denied and 4 reserved", got)
	}

	// The node reaches the machine, and the machine not the namespace in front of it.
	var listener net.Listener
	for at, address := range map[*netdev.Slot]string{machine: ":3000", slot: ":7"} {
		if err := lab.Enter(at.NetNS, func() {
			ln, err := net.Listen("tcp4", address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { ln.Close() })
			listener = ln
		}); err != nil {
			t.Fatal(err)
		}
		go echo(listener)
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
	if got := w.reachWithin(machine, "tcp", netip.MustParseAddr("169.254.0.22"), 200*time.Millisecond); got == "open" {
		t.Error("the machine reached the namespace in front of it")
	}

	// A source that is not the guest's does not pass, even where the reverse path filter would let it.
	before := w.counters(slot).Spoofed
	run(machine, "", "ip addr add 169.254.0.19/29 dev vm0")
	if err := lab.Enter(machine.NetNS, func() {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(169, 254, 0, 19)}, Timeout: 200 * time.Millisecond}
		if conn, err := dialer.DialContext(context.Background(), "tcp", "1.1.1.1:7"); err == nil {
			conn.Close()
			t.Error("a connection from a foreign address was made")
		}
	}); err != nil {
		t.Fatal(err)
	}
	if got := w.counters(slot).Spoofed; got == before {
		t.Error("a foreign address was not counted as spoofed")
	}

	// An update cuts what runs and leaves the node's own connection alone.
	flow := w.transfer(machine, "tcp", "1.1.1.1:9001", nil)
	flow.mustMove(t)
	start := time.Now()
	fence("", "1.1.1.1")
	flow.mustEnd(t, start)
	ping()
	if w.lab.Strangers() != 0 || w.lab.Trapped() != 0 {
		t.Errorf("%d packets left with a wrong source, %d to private addresses", w.lab.Strangers(), w.lab.Trapped())
	}
}
