package lab

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Lab is one laboratory. Its methods may be called from any goroutine.
type Lab struct {
	Host   *Host
	CAFile string // certificate of the CA that signed the internet's servers, readable by every user

	dir      string
	prefix   string
	internet int // network namespace
	ca       *authority
	closers  []func()
	servers  sync.WaitGroup
	closed   chan struct{} // ends streams
	sunk     atomic.Int64
	conns    connSet

	mu    sync.Mutex
	names map[string][]netip.Addr
	hits  []Hit
}

// serial numbers the laboratories of this process.
var serial atomic.Int32

// New builds a laboratory that lasts as long as the test. It skips the test where it cannot be built.
func New(t testing.TB) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the network laboratory needs root: run the tests with sudo, or in a container with CAP_SYS_ADMIN and CAP_NET_ADMIN")
	}
	sweep(deadPrefix)
	l := &Lab{names: map[string][]netip.Addr{}, closed: make(chan struct{})}
	l.prefix = prefixOf(os.Getpid(), serial.Add(1))
	t.Cleanup(l.close)
	if err := l.build(); err != nil {
		t.Fatalf("build the network laboratory: %v", err)
	}
	return l
}

// Prefix is a name prefix for the network slots of this test, different from that of every other laboratory on the machine. What
// a test leaves behind under it is removed with the laboratory, or by the next one if this process is killed.
func (l *Lab) Prefix() string { return l.prefix }

func (l *Lab) build() (err error) {
	if l.dir, err = os.MkdirTemp("", "sluice-lab-"); err != nil {
		return err
	}
	if err := os.Chmod(l.dir, 0o755); err != nil {
		return err
	}
	if l.ca, err = newAuthority(); err != nil {
		return fmt.Errorf("make the CA: %w", err)
	}
	l.CAFile = filepath.Join(l.dir, "ca.pem")
	if err := os.WriteFile(l.CAFile, l.ca.pem, 0o644); err != nil {
		return err
	}
	if l.internet, err = newNetNS(); err != nil {
		return err
	}
	if l.Host, err = newHost(l); err != nil {
		return err
	}
	if err := in(l.Host.net, l.cableHost); err != nil {
		return fmt.Errorf("cable the host: %w", err)
	}
	if err := in(l.internet, l.cableInternet); err != nil {
		return fmt.Errorf("cable the internet: %w", err)
	}
	for ns, end := range map[int]string{l.Host.net: "wan0", l.internet: "lan0"} {
		if err := in(ns, func() error { return awaitCarrier(end) }); err != nil {
			return err
		}
	}
	return l.serve()
}

// awaitCarrier waits until the kernel sends on a device: it may take a second to notice that both ends of the cable are up, and
// drops every packet until then. Asking makes it notice.
func awaitCarrier(name string) error {
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s has no carrier", name)
		}
	}
}

// cableHost makes the cable and gives the host's end its addresses and its way out.
func (l *Lab) cableHost() error {
	// A host as it comes: a new namespace inherits the IPv4 settings of the machine, which may be a node.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0); err != nil {
		return err
	}
	cable := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: "wan0"},
		PeerName:      "lan0",
		PeerNamespace: netlink.NsFd(l.internet),
	}
	if err := netlink.LinkAdd(cable); err != nil {
		return err
	}
	if err := bringUp("lo"); err != nil {
		return err
	}
	if err := bringUp("wan0", netip.PrefixFrom(HostAddr, 24), netip.PrefixFrom(HostAddr6, 64)); err != nil {
		return err
	}
	for _, gw := range []netip.Addr{gateway, gateway6} {
		if err := netlink.RouteAdd(&netlink.Route{Gw: gw.AsSlice()}); err != nil {
			return fmt.Errorf("add default route by %s: %w", gw, err)
		}
	}
	return nil
}

// cableInternet makes every address of the internet and of the traps local to its namespace, and counts at the door.
func (l *Lab) cableInternet() error {
	if err := bringUp("lo"); err != nil {
		return err
	}
	if err := bringUp("lan0", netip.PrefixFrom(gateway, 24), netip.PrefixFrom(gateway6, 64)); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	local := slices.Clone(trapRanges)
	for _, addr := range slices.Concat(Internet, Traps) {
		local = append(local, netip.PrefixFrom(addr, addr.BitLen()))
	}
	for _, p := range local {
		route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: ipNet(p),
			Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("make %s local: %w", p, err)
		}
		if addr := p.Addr(); p.IsSingleIP() { // an address of its own as well, so that servers can answer from it
			if err := addAddr(lo, p); err != nil {
				return fmt.Errorf("add address %s: %w", addr, err)
			}
		}
	}
	return installDoor()
}

// bringUp gives a device addresses, without waiting for anybody to object to them, and sets it up.
func bringUp(name string, addrs ...netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, p := range addrs {
		if err := addAddr(link, p); err != nil {
			return fmt.Errorf("add address %s to %s: %w", p, name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func addAddr(link netlink.Link, p netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrReplace(link, addr)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// close takes everything down, whatever of it was built: commands that still run, servers, namespaces, files, and the network slots
// that the test left under the laboratory's prefix.
func (l *Lab) close() {
	if l.Host != nil {
		l.Host.close()
	}
	close(l.closed)
	for _, c := range slices.Backward(l.closers) {
		c()
	}
	l.conns.close()
	l.servers.Wait()
	if l.internet > 0 {
		_ = unix.Close(l.internet)
	}
	sweep(func(prefix string) bool { return prefix == l.prefix })
	_ = os.RemoveAll(l.dir)
}

const netnsDir = "/run/netns"

// prefixOf is the prefix of laboratory n of a process; deadPrefix reads the process from it.
func prefixOf(pid int, n int32) string {
	digits := strconv.FormatInt(int64(pid), 36)
	return "lb" + strings.Repeat("0", 5-len(digits)) + digits + string('a'+n%26)
}

var slotName = regexp.MustCompile(`^(lb([0-9a-z]{5})[a-z])-[0-9]+$`)

// deadPrefix reports prefixes whose process is no more.
func deadPrefix(prefix string) bool {
	pid, err := strconv.ParseInt(prefix[2:7], 36, 32)
	return err == nil && unix.Kill(int(pid), 0) == unix.ESRCH
}

// sweep removes the named network namespaces of chosen prefixes. Their devices go with them.
func sweep(chosen func(prefix string) bool) {
	entries, err := os.ReadDir(netnsDir)
	if err != nil {
		return
	}
	for _, entry := range entries {
		match := slotName.FindStringSubmatch(entry.Name())
		if match == nil || !chosen(match[1]) {
			continue
		}
		path := filepath.Join(netnsDir, entry.Name())
		_ = unix.Unmount(path, unix.MNT_DETACH)
		_ = os.Remove(path)
	}
}

// newNetNS makes a network namespace that exists as long as its descriptor is open.
func newNetNS() (fd int, err error) {
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		// Link-local addresses are usable at once: a router without one cannot ask for its neighbours, and the first second of
		// every test would be lost.
		for _, which := range []string{"all", "default"} {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/accept_dad", []byte("0"), 0); err != nil {
				return err
			}
		}
		fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return os.NewSyscallError("open", err)
	})
	return fd, err
}

// onThread runs fn on a thread of its own that ends with it. It is never the process's first one, which cannot end and by which
// /proc/self goes.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			done <- onThread(fn) // this goroutine holds the first thread meanwhile
			runtime.UnlockOSThread()
			return
		}
		done <- fn() // never unlocked: the thread is discarded with the goroutine
	}()
	return <-done
}

// in is onThread inside a network namespace.
func in(ns int, fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return fn()
	})
}

// Enter runs fn on the calling goroutine inside the network namespace at path, such as that of a network slot. Goroutines that fn
// starts are outside; sockets that fn opens, and programs it starts, stay inside.
func Enter(path string, fn func()) error {
	ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(ns)
	return visit(ns, fn)
}

// visit runs fn inside a namespace and comes back, also when fn ends the goroutine (t.Fatal).
func visit(ns int, fn func()) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	defer unix.Close(home)
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("setns", err)
	}
	defer func() {
		if err := unix.Setns(home, unix.CLONE_NEWNET); err != nil {
			panic(fmt.Sprintf("BUG: return from a network namespace: %v", err))
		}
	}()
	fn()
	return nil
}
