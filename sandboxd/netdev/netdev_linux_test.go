package netdev

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
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/lab"
)

// newNetwork is the slots of a node in the laboratory, set up.
func newNetwork(t testing.TB, l *lab.Lab) *Network {
	t.Helper()
	return newNetworkWith(t, l, Config{})
}

func newNetworkWith(t testing.TB, l *lab.Lab, cfg Config) *Network {
	t.Helper()
	n := openNetwork(t, l, cfg)
	if err := n.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

// openNetwork is a node that has just started.
func openNetwork(t testing.TB, l *lab.Lab, cfg Config) (n *Network) {
	t.Helper()
	cfg.NamePrefix = l.Prefix()
	l.Host.Run(func() {
		var err error
		if n, err = New(cfg); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() {
		if err := n.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return n
}

func acquire(t testing.TB, n *Network, index int) *Slot {
	t.Helper()
	slot, err := n.Acquire(t.Context(), index)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Release(context.Background(), index); err != nil {
			t.Error(err)
		}
	})
	return slot
}

// listen listens inside a slot and greets with name.
func listen(t testing.TB, slot *Slot, network, address, name string) {
	t.Helper()
	if err := lab.Enter(slot.NetNS, func() {
		ln, err := net.Listen(network, address)
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
				_, _ = io.WriteString(conn, name)
				_ = conn.Close()
			}
		}()
	}); err != nil {
		t.Fatal(err)
	}
}

func TestDialTCP(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l)
	slot, other := acquire(t, n, 11), acquire(t, n, 12)
	listen(t, slot, "tcp4", "127.0.0.1:3000", "loopback")
	listen(t, slot, "tcp6", "[::1]:3001", "loopback six")
	listen(t, slot, "tcp", ":3002", "everywhere")
	listen(t, slot, "tcp4", netAddr(slot.GuestAddr.String(), 3003), "own")
	listen(t, slot, "tcp6", netAddr(slot.GuestAddr6.String(), 3004), "own six")
	listen(t, slot, "tcp4", netAddr(GuestConstant.String(), 3005), "constant")
	listen(t, other, "tcp4", "127.0.0.1:3000", "the other")
	for port, want := range map[uint16]string{
		3000: "loopback", 3001: "loopback six", 3002: "everywhere", 3003: "own", 3004: "own six", 3005: "constant",
	} {
		conn, err := slot.DialTCP(t.Context(), port)
		if err != nil {
			t.Errorf("port %d: %v", port, err)
			continue
		}
		if _, ok := conn.(*net.TCPConn); !ok {
			t.Errorf("port %d: a %T cannot be spliced", port, conn)
		}
		if got, err := io.ReadAll(conn); string(got) != want {
			t.Errorf("port %d: %q, %v, want %q", port, got, err, want)
		}
		conn.Close()
	}
	conn, err := other.DialTCP(t.Context(), 3000)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := io.ReadAll(conn); string(got) != "the other" {
		t.Errorf("port 3000 of the other slot says %q", got)
	}
	conn.Close()
	if conn, err := slot.DialTCP(t.Context(), 3999); !errors.Is(err, syscall.ECONNREFUSED) || conn != nil {
		t.Errorf("a closed port gives %v, %v, want ECONNREFUSED and a nil connection", conn, err)
	}
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := slot.DialTCP(done, 3000); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled dial gives %v", err)
	}
	if err := n.Release(t.Context(), 12); err != nil {
		t.Fatal(err)
	}
	if _, err := other.DialTCP(t.Context(), 3000); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a dial into a released slot gives %v, want net.ErrClosed", err)
	}
}

// TestDialStaysInside: nothing that a dial does reaches a listener of the node, also when the kernel lets the socket connect to
// itself, after which package net would try again with a socket of the node's own.
func TestDialStaysInside(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l)
	slot := acquire(t, n, 0)
	ln, err := net.Listen("tcp4", "127.0.0.1:0") // in the test's own namespace, where a lost dial would arrive
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	port := ln.Addr().(*net.TCPAddr).Port
	// One ephemeral port only: the socket picks it for itself and finds itself at the other end.
	if err := lab.Enter(slot.NetNS, func() {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", fmt.Appendf(nil, "%d %d", port, port), 0); err != nil {
			t.Fatal(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := slot.dialAddr(t.Context(), netip.AddrPortFrom(loopback4, uint16(port))); !errors.Is(err, errSecondSocket) {
		t.Errorf("dial of a socket to itself = %v, want %v", err, errSecondSocket)
	}
	if conn, err := slot.DialTCP(t.Context(), uint16(port)); err == nil {
		t.Errorf("dial of a port nobody listens on reached %v", conn.RemoteAddr())
	}
	ln.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Millisecond))
	if conn, err := ln.Accept(); err == nil {
		t.Errorf("the node's own listener was reached from %v", conn.RemoteAddr())
	}
	// The dials left their threads where they were.
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if ns, err := os.Readlink(task); err == nil && ns != home {
			t.Errorf("thread %s is in %s, the process in %s", task, ns, home)
		}
	}
}

// TestManyAtOnce: slots come and go side by side without disturbing one another.
func TestManyAtOnce(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l)
	before := snapshot(t, l, n)
	var wg sync.WaitGroup
	for index := range 12 {
		wg.Go(func() {
			slot, err := n.Acquire(t.Context(), index)
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := slot.DialTCP(t.Context(), 3000); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("dial in slot %d: %v, want ECONNREFUSED", index, err)
			}
			if err := n.Release(t.Context(), index); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if after := snapshot(t, l, n); after != before {
		t.Errorf("there was\n%s\nand now is\n%s", before, after)
	}
}

// TestOwnAddressAtOnce: a fresh slot knows its own addresses. The kernel needs a moment to route an IPv6 address to itself, and a
// dial in that moment lasted three seconds.
func TestOwnAddressAtOnce(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l)
	for index := range 8 {
		slot := acquire(t, n, index)
		for _, addr := range []netip.Addr{slot.GuestAddr, slot.GuestAddr6, GuestConstant} {
			if _, err := slot.dialAddr(t.Context(), netip.AddrPortFrom(addr, 3000)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("dial %s = %v, want ECONNREFUSED", addr, err)
			}
		}
	}
}

func netAddr(host string, port int) string { return net.JoinHostPort(host, fmt.Sprint(port)) }

// TestInside: what a program finds in a fresh slot.
func TestInside(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l)
	slot := acquire(t, n, 5)
	for path, want := range map[string]string{
		"ipv4/ip_unprivileged_port_start": "0",
		"ipv4/ping_group_range":           "0\t2147483647",
		"ipv6/conf/eth0/accept_ra":        "0",
		"ipv6/conf/eth0/autoconf":         "0",
		"ipv6/conf/eth0/disable_ipv6":     "0",
		"ipv4/ip_forward":                 "0",
	} {
		var got string
		if err := lab.Enter(slot.NetNS, func() { got, _ = readSysctl(path) }); err != nil {
			t.Fatal(err)
		}
		if got != want {
			t.Errorf("%s = %q inside, want %q", path, got, want)
		}
	}
	// The namespace belongs to the user namespace of the host, so no root in any other has power over it.
	ns, err := openNetNS(slot.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ns)
	owner, err := unix.IoctlRetInt(ns, unix.NS_GET_USERNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(owner)
	var ours, theirs unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/self/ns/user", &ours), unix.Fstat(owner, &theirs)); err != nil {
		t.Fatal(err)
	}
	if ours.Ino != theirs.Ino {
		t.Error("the namespace belongs to another user namespace")
	}
	out := programIn(t, slot.NetNS, "ip", "-o", "addr")
	for _, want := range []string{"127.0.0.1/8", "169.254.0.21/32", "10.12.0.11/31", "fd73:6c75:6963:6500::b/127"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %s among the addresses inside:\n%s", want, out)
		}
	}
	if strings.Contains(out, "fe80") {
		t.Errorf("a link-local address inside:\n%s", out)
	}
}

// programIn runs a program in a network namespace.
func programIn(t testing.TB, netns, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is missing: apt-get install iproute2 nftables, or make test", name)
	}
	var out []byte
	var err error
	if enterErr := lab.Enter(netns, func() { out, err = exec.Command(name, args...).CombinedOutput() }); enterErr != nil || err != nil {
		t.Fatalf("%s %v: %v %v\n%s", name, args, enterErr, err, out)
	}
	return string(out)
}

// TestKilledAnywhere stops Acquire after each of its steps as a kill would, without any undoing, and starts the node anew: it finds
// what is there, refuses to adopt what is not whole, removes it, and the index is as good as new.
func TestKilledAnywhere(t *testing.T) {
	killAnywhere(t, Config{}, "mount point", "namespace", "veth", "guest", "host")
}

func killAnywhere(t *testing.T, cfg Config, steps ...string) {
	t.Helper()
	l := lab.New(t)
	bystander := newNetworkWith(t, l, cfg)
	acquire(t, bystander, 1)
	before := snapshot(t, l, bystander)
	t.Cleanup(func() { step = func(string) {} })
	for _, at := range steps {
		n := openNetwork(t, l, cfg)
		p, err := n.cfg.plan(2)
		if err != nil {
			t.Fatal(err)
		}
		killed := errors.New("killed")
		step = func(name string) {
			if name == at {
				panic(killed)
			}
		}
		err = inNetNS(n.home, func() (err error) {
			defer func() {
				if r := recover(); r != nil && r != any(killed) {
					panic(r)
				} else if r != nil {
					err = killed
				}
			}()
			_, err = n.build(p)
			return err
		})
		step = func(string) {}
		if err != killed {
			t.Fatalf("build until %q: %v", at, err)
		}

		n = openNetwork(t, l, cfg)
		if indexes, err := n.List(t.Context()); err != nil || !slices.Equal(indexes, []int{1, 2}) {
			t.Errorf("killed at %q: List = %v, %v, want 1 and 2", at, indexes, err)
		}
		if _, err := n.Acquire(t.Context(), 2); !errors.Is(err, errExists) {
			t.Errorf("killed at %q: Acquire over the remains = %v, want that they exist", at, err)
		}
		if _, err := n.Adopt(2); err == nil && at != "host" {
			t.Errorf("killed at %q: Adopt took half a slot", at)
		}
		for range 2 { // the second time there is nothing to do
			if err := n.Release(t.Context(), 2); err != nil {
				t.Errorf("killed at %q: Release: %v", at, err)
			}
		}
		if after := snapshot(t, l, n); after != before {
			t.Errorf("killed at %q: there was\n%s\nand now is\n%s", at, before, after)
		}
		acquire(t, n, 2)
		if err := n.Release(t.Context(), 2); err != nil {
			t.Errorf("killed at %q: Release: %v", at, err)
		}
	}
}

// snapshot is all that slots leave traces in: namespaces, devices, the host's table.
func snapshot(t *testing.T, l *lab.Lab, n *Network) string {
	t.Helper()
	var b bytes.Buffer
	names, err := filepath.Glob(filepath.Join(netnsDir, l.Prefix()+"-*"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(&b, names)
	l.Host.Run(func() {
		devices, err := net.Interfaces()
		if err != nil {
			t.Fatal(err)
		}
		for _, dev := range devices {
			fmt.Fprintln(&b, dev.Name, dev.HardwareAddr)
		}
	})
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("no nft to look with: apt-get install nftables, or make test")
	}
	out, err := l.Host.Command(t.Context(), "nft", "list", "table", "inet", n.cfg.tableName()).CombinedOutput()
	if err != nil {
		t.Fatalf("list the host's table: %v\n%s", err, out)
	}
	b.Write(out)
	return b.String()
}

// TestAdopt: a node that starts anew finds its slots whole, takes them over, and what runs in them has not noticed.
func TestAdopt(t *testing.T) {
	l := lab.New(t)
	first := newNetwork(t, l)
	slot, err := first.Acquire(t.Context(), 9)
	if err != nil {
		t.Fatal(err)
	}
	listen(t, slot, "tcp4", "127.0.0.1:3000", "still here")
	var conn net.Conn
	if err := lab.Enter(slot.NetNS, func() { conn, err = net.Dial("tcp", "1.1.1.1:7") }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ping := func() {
		t.Helper()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.WriteString(conn, "ping"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
	}
	ping()

	second := newNetwork(t, l)
	ping()
	adopted, err := second.Adopt(9)
	if err != nil {
		t.Fatal(err)
	}
	ping()
	if adopted.GuestAddr != slot.GuestAddr || adopted.NetNS != slot.NetNS {
		t.Errorf("adopted %+v, want %+v", adopted, slot)
	}
	inside, err := adopted.DialTCP(t.Context(), 3000)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := io.ReadAll(inside); string(got) != "still here" {
		t.Errorf("port 3000 says %q", got)
	}
	inside.Close()
	if _, err := second.Adopt(10); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Adopt of nothing = %v", err)
	}
	programIn(t, adopted.NetNS, "ip", "addr", "del", adopted.GuestAddr.String()+"/31", "dev", "eth0")
	if _, err := second.Adopt(9); err == nil {
		t.Error("Adopt took a slot without its address")
	}
	if err := second.Release(t.Context(), 9); err != nil {
		t.Fatal(err)
	}
}

// TestReleaseForgetsFlows: the next tenant of a slot gets no answers to the questions of the one before.
func TestReleaseForgetsFlows(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l)
	tracked := func() (count int) {
		l.Host.Run(func() {
			for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
				if err != nil {
					t.Fatal(err)
				}
				for _, flow := range flows {
					// The answers go on arriving: they begin flows of their own, to the host.
					if src := netip.MustParseAddr(flow.Forward.SrcIP.String()); DefaultPrefix.Contains(src) || DefaultPrefix6.Contains(src) {
						count++
					}
				}
			}
		})
		return count
	}
	const slots = 6
	for i := 1; i <= slots; i++ {
		slot := acquire(t, n, i)
		for _, at := range []string{"1.1.1.1:9000", "[2606:4700:4700::1111]:9000"} {
			if err := lab.Enter(slot.NetNS, func() {
				conn, err := net.Dial("udp", at)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := io.WriteString(conn, "start"); err != nil { // and the stream goes on
					t.Fatal(err)
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := tracked(); got != 2*slots {
		t.Fatalf("%d flows are tracked, want 2 of each slot", got)
	}
	release := func(i int) {
		if err := n.Release(t.Context(), i); err != nil {
			t.Error(err)
		}
	}
	release(1)
	if got := tracked(); got != 2*(slots-1) {
		t.Errorf("%d flows are tracked after a release, want those of the other slots", got)
	}
	var together sync.WaitGroup // who comes during a look at the table shares the next one
	for i := 2; i < slots; i++ {
		together.Go(func() { release(i) })
	}
	together.Wait()
	if got := tracked(); got != 2 {
		t.Errorf("%d flows are tracked in the end, want those of the slot that is left", got)
	}
}

// TestForwardingRestored: the last node to go puts the switches back, and one that was killed is no reason to forget them.
func TestForwardingRestored(t *testing.T) {
	l := lab.New(t)
	switches := func() (values [2]string) {
		l.Host.Run(func() {
			values[0], _ = readSysctl("ipv4/ip_forward")
			values[1], _ = readSysctl("ipv6/conf/all/forwarding")
		})
		return values
	}
	want := func(when, v string) {
		t.Helper()
		if got := switches(); got != [2]string{v, v} {
			t.Errorf("%s forwarding is %v, want %s", when, got, v)
		}
	}
	want("at first", "0")
	open := func(prefix string) (n *Network) {
		t.Helper()
		l.Host.Run(func() {
			var err error
			if n, err = New(Config{NamePrefix: prefix}); err != nil {
				t.Fatal(err)
			}
		})
		if err := n.Setup(t.Context()); err != nil {
			t.Fatal(err)
		}
		return n
	}
	closeIt := func(n *Network) {
		t.Helper()
		if err := n.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	a := open(l.Prefix())
	want("with a node", "1")
	b := open(l.Prefix()[1:])
	closeIt(a)
	want("with another node left", "1")
	c := open(l.Prefix()[1:]) // after a kill of b
	_ = b
	closeIt(c)
	want("after the last", "0")

	l.Host.Run(func() {
		if err := writeSysctls([]sysctl{{path: "ipv4/ip_forward", value: "1"}, {path: "ipv6/conf/all/forwarding", value: "1"}}); err != nil {
			t.Fatal(err)
		}
	})
	closeIt(open(l.Prefix()))
	want("where it was on already", "1")
}

// TestFlushedRuleset: somebody flushes the host's rules, or part of them. Creating slots failed from then on, and those that were
// there had neither their way out nor the second fence.
func TestFlushedRuleset(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l)
	slot := acquire(t, n, 3)
	reach := func() (err error) {
		if enterErr := lab.Enter(slot.NetNS, func() {
			var conn net.Conn
			if conn, err = net.DialTimeout("tcp", "1.1.1.1:7", patience); err == nil {
				conn.Close()
			}
		}); enterErr != nil {
			t.Fatal(enterErr)
		}
		return err
	}
	if err := n.Setup(t.Context()); err != nil { // the second one writes the notes where later ones will
		t.Fatal(err)
	}
	whole := snapshot(t, l, n)
	table := "inet " + n.cfg.tableName()
	for _, command := range []string{
		"flush ruleset", "delete table " + table, "flush table " + table, "flush chain " + table + " from_slot",
		"flush set " + table + " slots6", "flush set " + table + " private4", "add rule " + table + " input accept",
	} {
		out, err := l.Host.Command(t.Context(), "nft", strings.Fields(command)...).CombinedOutput()
		if err != nil {
			t.Fatalf("nft %s: %v\n%s", command, err, out)
		}
		if err := n.Maintain(t.Context()); err != nil {
			t.Fatalf("Maintain after %s: %v", command, err)
		}
		if got := snapshot(t, l, n); got != whole {
			t.Errorf("Maintain after %s left\n%s\nwant\n%s", command, got, whole)
		}
		if err := reach(); err != nil {
			t.Errorf("after %s and Maintain the slot's way out: %v", command, err)
		}
	}

	made := n.made
	if err := n.Maintain(t.Context()); err != nil || n.made != made {
		t.Errorf("Maintain of a whole table: %v, and replaced it: %v", err, n.made != made)
	}
	if out, err := l.Host.Command(t.Context(), "nft", "flush", "ruleset").CombinedOutput(); err != nil {
		t.Fatalf("nft flush ruleset: %v\n%s", err, out)
	}
	acquire(t, n, 4) // without Maintain
	if err := reach(); err != nil {
		t.Errorf("after a flush and another Acquire the first slot's way out: %v", err)
	}
	before := n.made
	if err := n.Maintain(t.Context()); err != nil || n.made != before {
		t.Errorf("Maintain after Acquire put the table back: %v, and replaced it: %v", err, n.made != before)
	}
}

// TestSetupBesideAcquire: a Setup that began before an Acquire does not take the slot out of the table again.
func TestSetupBesideAcquire(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l)
	var wg sync.WaitGroup
	for index := range 6 {
		wg.Go(func() {
			if _, err := n.Acquire(t.Context(), index); err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(func() {
			if err := n.Release(context.Background(), index); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if err := n.Setup(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := inNetNS(n.home, func() error {
		n.tableMu.Lock()
		defer n.tableMu.Unlock()
		whole, err := n.wholeLocked()
		if !whole {
			t.Error("a slot is not in the table")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// TestTooManySlotsForTheTable: the node says once that its slots may have more flows than the host tracks.
func TestTooManySlotsForTheTable(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l)
	core, logs := observer.New(zap.WarnLevel)
	n.cfg.Log, n.cfg.MaxFlows = zap.New(core), 1<<30
	acquire(t, n, 0)
	acquire(t, n, 1)
	if logs.Len() != 1 {
		t.Errorf("logged %d warnings, want one: %v", logs.Len(), logs.All())
	}
}

// TestNothingLeavesUntranslated: what nobody translates, here because another firewall of the host has it untracked, stays inside.
func TestNothingLeavesUntranslated(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l)
	slot := acquire(t, n, 1)
	l.Host.Run(func() {
		nft := exec.Command("nft", "-f", "-")
		nft.Stdin = strings.NewReader("table inet other { chain raw { type filter hook prerouting priority raw; meta l4proto udp notrack; }; }")
		if out, err := nft.CombinedOutput(); err != nil {
			t.Fatalf("nft: %v: %s", err, out)
		}
	})
	for _, at := range []string{"1.1.1.1:53", "[2606:4700:4700::1111]:53"} {
		if err := lab.Enter(slot.NetNS, func() {
			conn, err := net.Dial("udp", at)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for range 3 {
				if _, err := io.WriteString(conn, "bare"); err != nil {
					t.Fatal(err)
				}
			}
			// What is tracked goes the same way after it: when that has arrived, the others would have too.
			tcp, err := net.DialTimeout("tcp", at, 10*time.Second)
			if err == nil {
				tcp.Close()
			}
			if err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("a connection to %s: %v", at, err)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	if got := l.Strangers(); got != 0 {
		t.Errorf("%d packets left with an address of their slot", got)
	}
}
