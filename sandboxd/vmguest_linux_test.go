package sandboxd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
	"github.com/sluice-edge/sluice/sandboxd/vmm/vmmtest"
)

// programsDir is where the agent and the tool of these tests are, inside a nested host.
const programsDir = "/sluice/programs"

// vmPrograms builds the agent and the tool, and takes them into the nested host where that is needed.
func vmPrograms(t *testing.T) (agent, tool string) {
	t.Helper()
	if os.Getenv(lab.InsideVariable) != "" {
		return filepath.Join(programsDir, "guestd"), filepath.Join(programsDir, "tool")
	}
	if _, err := lab.FindVMM(); err != nil {
		t.Skip("VM tests need it: " + err.Error())
	}
	agent, tool = buildGuestd(t), filepath.Join(t.TempDir(), "tool")
	build := exec.Command("go", "build", "-o", tool, "./testdata/guesttool")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build tool: %v: %s", err, out)
	}
	if os.Getenv("SLUICE_NATIVE_KVM") == "" {
		n := lab.NewNested(t)
		if err := errors.Join(n.Put(t.Context(), agent, filepath.Join(programsDir, "guestd")), n.Put(t.Context(), tool, filepath.Join(programsDir, "tool"))); err != nil {
			t.Fatal(err)
		}
	}
	return agent, tool
}

// guestHost makes VMs whose first process is the real agent, from a template that it has built.
type guestHost struct {
	vmmtest.Host
	template image.Template
	disk     string // an empty one, to copy
}

// guestNetwork is that of every sandbox.
func guestNetwork() guest.Network {
	return guest.Network{
		Addr: netip.MustParsePrefix("169.254.0.21/30"), Gateway: netip.MustParseAddr("169.254.0.22"),
		Addr6: netip.MustParsePrefix("fd73:6c75:6963:65ff::2/126"), Gateway6: netip.MustParseAddr("fd73:6c75:6963:65ff::1"),
		GatewayMAC: net.HardwareAddr{2, 0x53, 0x4c, 0, 0, 1},
	}
}

// writeGuestRoot makes a root file system with the tool as its only program.
func writeGuestRoot(t *testing.T, root, tool string) string {
	t.Helper()
	for name, content := range map[string]string{
		"etc/group": "root:x:0:\nsudo:x:27:\n", "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/sudoers.d/README": "rules\n",
		"etc/hosts": "127.0.0.1\tlocalhost\n127.0.1.1\told\n", "etc/shadow": "root:*:19000:0:99999:7:::\n", "etc/skel/.profile": "profile\n",
		"usr/lib/package/file": "of the template\n",
	} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	program, err := os.ReadFile(tool)
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Join(root, "bin"), 0o755), os.WriteFile(filepath.Join(root, "bin/sh"), program, 0o755),
			os.Symlink("/run/nowhere/resolv.conf", filepath.Join(root, "etc/resolv.conf")), os.Chmod(root, 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func newGuestHost(t *testing.T, agent, tool string) *guestHost {
	t.Helper()
	binary, err := lab.FindVMM()
	if err != nil {
		t.Fatal(err)
	}
	// An emulated processor, on a busy machine.
	l, err := vmm.New(vmm.Options{Binary: binary, Log: zaptest.NewLogger(t), CallTimeout: time.Minute, SlowTimeout: 3 * time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	base := ""
	if os.Getenv(lab.InsideVariable) != "" {
		base = lab.NestedDisk
	}
	dir, err := os.MkdirTemp(base, "vmguest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	root := writeGuestRoot(t, filepath.Join(dir, "root"), tool)
	store, err := image.OpenStore(filepath.Join(dir, "templates"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	h := &guestHost{}
	h.template, err = image.Build(t.Context(), image.Options{
		Store: store, Name: "guest", From: "dir:" + root, Agent: agent, Kernel: os.Getenv(lab.KernelRootVariable),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if h.disk, err = store.Disk(t.Context(), 64); err != nil {
		t.Fatal(err)
	}
	h.Host = vmmtest.Host{Launcher: l, Kernel: h.template.KernelPath(), Initramfs: h.template.InitramfsPath(), Real: true}
	return h
}

// guestVM is one VM and the node's way to its agent.
type guestVM struct {
	*vmmtest.Box
	*guest.Client
	t *testing.T
}

// newVM makes a place for a VM, with a copy of disk.
func (h *guestHost) newVM(t *testing.T, disk string) *guestVM {
	t.Helper()
	b := h.NewBox(t)
	b.Spec.Root = h.template.RootPath()
	if err := os.Remove(b.Spec.Disk); err != nil {
		t.Fatal(err)
	}
	if err := image.CopyDisk(b.Spec.Disk, disk); err != nil {
		t.Fatal(err)
	}
	setUpTap(t, b.Spec.NetNS)
	v := &guestVM{Box: b, t: t}
	v.Client = guest.NewClientDial(func(ctx context.Context) (net.Conn, error) { return b.VM.DialGuest(ctx, guest.ControlPort) })
	return v
}

// inNetNS runs do on a thread in a network namespace, which nobody else ever gets.
func inNetNS(t *testing.T, path string, do func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock it: the thread ends with this goroutine
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err == nil {
			err = do()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("in the network namespace: %v", err)
	}
}

// setUpTap is the node's end of the wire.
func setUpTap(t *testing.T, path string) {
	t.Helper()
	inNetNS(t, path, func() error {
		tap, err := netlink.LinkByName("tap0")
		if err != nil {
			return err
		}
		n := guestNetwork()
		err = errors.Join(netlink.LinkSetHardwareAddr(tap, n.GatewayMAC), netlink.LinkSetUp(tap))
		for _, addr := range []netip.Prefix{netip.PrefixFrom(n.Gateway, n.Addr.Bits()), netip.PrefixFrom(n.Gateway6, n.Addr6.Bits())} {
			a, perr := netlink.ParseAddr(addr.String())
			if perr != nil {
				return perr
			}
			a.Flags = unix.IFA_F_NODAD
			err = errors.Join(err, netlink.AddrReplace(tap, a))
		}
		return err
	})
}

// listenIn listens in a network namespace, and holds what connects until the test ends.
func listenIn(t *testing.T, path, address string) {
	t.Helper()
	var l net.Listener
	inNetNS(t, path, func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		var held []net.Conn
		for {
			conn, err := l.Accept()
			if err != nil {
				break
			}
			held = append(held, conn)
		}
		for _, conn := range held {
			conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
}

func (v *guestVM) shape() vmm.Shape {
	s := v.Host.Shape()
	s.MemoryMiB = 256
	s.Cmdline = "console=ttyS0 panic=-1 quiet loglevel=4 mitigations=off " + guestNetwork().Cmdline()
	return s
}

// boot starts the VM and waits until its agent says that it serves.
func (v *guestVM) boot(ctx context.Context) {
	v.t.Helper()
	up, err := vmm.ListenGuest(v.Spec, guest.UpPort)
	if err != nil {
		v.t.Fatal(err)
	}
	defer up.Close()
	v.Start(ctx)
	if err := v.VM.Boot(ctx, v.shape(), v.Tap); err != nil {
		v.t.Fatalf("Boot: %v", err)
	}
	ended := v.VM.Done()
	accepted := make(chan struct{})
	defer close(accepted)
	go func() {
		select {
		case <-ended:
			up.Close()
		case <-ctx.Done():
			up.Close()
		case <-accepted:
		}
	}()
	conn, err := up.Accept()
	if err != nil {
		v.t.Fatalf("the guest is not up: %v (%v)\n%s", err, v.VM.Err(), v.serial())
	}
	defer conn.Close()
	if word, err := io.ReadAll(conn); err != nil || string(word) != "up\n" {
		v.t.Errorf("the guest's first word is %q, %v", word, err)
	}
}

func (v *guestVM) serial() []byte {
	serial, err := v.VM.Serial(64 << 10)
	return fmt.Append(serial, "(", err, ")")
}

func (v *guestVM) exec(ctx context.Context, r guest.ExecRequest) guest.ExecResult {
	v.t.Helper()
	res, err := v.Exec(ctx, r)
	if err != nil {
		v.t.Fatalf("exec %q: %v\n%s", r.Cmd, err, v.serial())
	}
	return res
}

// say runs a command as root and returns what it says, without the line's end.
func (v *guestVM) say(ctx context.Context, cmd string) string {
	v.t.Helper()
	res := v.exec(ctx, guest.ExecRequest{Cmd: cmd, User: "root"})
	if res.ExitCode != 0 {
		v.t.Errorf("%q: status %d: %s", cmd, res.ExitCode, res.Output)
	}
	return strings.TrimSuffix(res.Output, "\n")
}

func (v *guestVM) want(ctx context.Context, cmd, want string) {
	v.t.Helper()
	if got := v.say(ctx, cmd); got != want {
		v.t.Errorf("%q says %q, want %q", cmd, got, want)
	}
}

func (v *guestVM) mustInit(ctx context.Context, r guest.InitRequest) {
	v.t.Helper()
	r.Timestamp = time.Now()
	if err := v.Init(ctx, r); err != nil {
		v.t.Fatalf("Init: %v\n%s", err, v.serial())
	}
}

// public is the status of a request to the port of the SDKs.
func (v *guestVM) public(ctx context.Context, path, token string) int {
	v.t.Helper()
	c := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return v.DialPort(ctx, guest.Port) },
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://sandbox"+path, nil)
	if err != nil {
		v.t.Fatal(err)
	}
	req.Header.Set("X-Access-Token", token)
	res, err := c.Do(req)
	if err != nil {
		v.t.Fatalf("GET %s: %v", path, err)
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return res.StatusCode
}

// identity is what no two sandboxes may share.
type identity struct{ machine, boot, mac, hostname, random string }

func (v *guestVM) identity(ctx context.Context) identity {
	v.t.Helper()
	return identity{
		machine: v.say(ctx, "cat /etc/machine-id"), boot: v.say(ctx, "cat /proc/sys/kernel/random/boot_id"),
		mac: v.say(ctx, "cat /sys/class/net/eth0/address"), hostname: v.say(ctx, "cat /proc/sys/kernel/hostname"), random: v.say(ctx, "random"),
	}
}

// wantClock wants the clock of the guest to be ours, but for what may be the time of a call.
func (v *guestVM) wantClock(ctx context.Context) {
	v.t.Helper()
	before := time.Now().Unix()
	at, err := strconv.ParseInt(v.say(ctx, "now"), 10, 64)
	if after := time.Now().Unix(); err != nil || at < before-2 || at > after+2 {
		v.t.Errorf("the guest's clock is at %d, %v, ours was at %d and is at %d", at, err, before, after)
	}
}

// TestVMGuest is the life of a VM whose first process is the real agent.
func TestVMGuest(t *testing.T) {
	agent, tool := vmPrograms(t)
	if !lab.InKVM(t) {
		return
	}
	h := newGuestHost(t, agent, tool)
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
	defer cancel()
	t.Run("BootFails", func(t *testing.T) { h.testBootFails(ctx, t) })
	v := h.newVM(t, h.disk)
	began := time.Now()
	v.boot(ctx)
	t.Logf("up after %v", time.Since(began).Round(time.Millisecond))

	t.Run("Init", func(t *testing.T) { v.t = t; v.testInit(ctx) })
	t.Run("Exec", func(t *testing.T) { v.t = t; v.testExec(ctx) })
	t.Run("Dial", func(t *testing.T) { v.t = t; v.testDial(ctx) })
	t.Run("Killed", func(t *testing.T) { v.t = t; v.testKilled(ctx) })
	v.t = t
	if t.Failed() {
		t.Logf("serial:\n%s", v.serial())
		return
	}
	h.testSaved(ctx, t, v)
}

// testBootFails: a machine that cannot be made ends, and its last words say why.
func (h *guestHost) testBootFails(ctx context.Context, t *testing.T) {
	blank := filepath.Join(t.TempDir(), "blank")
	if err := errors.Join(os.WriteFile(blank, nil, 0o600), os.Truncate(blank, 1<<20)); err != nil {
		t.Fatal(err)
	}
	v := h.newVM(t, blank)
	v.Start(ctx)
	if err := v.VM.Boot(ctx, v.shape(), v.Tap); err != nil {
		t.Fatalf("Boot: %v", err)
	}
	if ended := v.Ended(ctx); !strings.Contains(ended.Error(), "boot failed") || !strings.Contains(ended.Error(), "/dev/vdb") {
		t.Errorf("the end of a VM without a file system is %v", ended)
	}
}

// testInit: the machine is as the node says, and nobody comes in before.
func (v *guestVM) testInit(ctx context.Context) {
	t := v.t
	if err := v.Health(ctx); err != nil {
		t.Errorf("Health: %v", err)
	}
	if status := v.public(ctx, "/health", ""); status != http.StatusServiceUnavailable {
		t.Errorf("before init the port answers %d", status)
	}
	for name, r := range map[string]guest.InitRequest{
		"mac": {MAC: "01:02:03:04:05:06"}, "resolver": {Resolvers: []string{"dns.example"}}, "hostname": {Hostname: "a b"},
	} {
		if err := v.Init(ctx, r); err == nil || !strings.Contains(err.Error(), "status 400") {
			t.Errorf("Init with a bad %s: %v", name, err)
		}
	}
	v.mustInit(ctx, guest.InitRequest{
		EnvVars: map[string]string{"A": "1", "B": "1"}, AccessToken: "secret", Hostname: "vm-one", LifecycleID: "one-1", DefaultUser: "user",
		MAC: "02:53:4c:00:00:11", Resolvers: []string{"169.254.0.22", "fd73:6c75:6963:65ff::1"},
	})
	for path, want := range map[string]int{"/health": 204, "/envs": 401} {
		if status := v.public(ctx, path, ""); status != want {
			t.Errorf("GET %s without a token = %d, want %d", path, status, want)
		}
	}
	if status := v.public(ctx, "/envs", "secret"); status != http.StatusOK {
		t.Errorf("GET /envs with the token = %d", status)
	}
	v.want(ctx, "cat /proc/sys/kernel/hostname", "vm-one")
	v.want(ctx, "cat /etc/hostname", "vm-one")
	v.want(ctx, "cat /etc/hosts", "127.0.0.1\tlocalhost\n127.0.1.1\tvm-one")
	v.want(ctx, "cat /etc/resolv.conf", "nameserver 169.254.0.22\nnameserver fd73:6c75:6963:65ff::1")
	v.want(ctx, "cat /sys/class/net/eth0/address", "02:53:4c:00:00:11")
	v.want(ctx, "limit", "524288")
	v.want(ctx, "cat /etc/sudoers.d/sluice-user", "user ALL=(ALL:ALL) NOPASSWD:ALL")
	v.want(ctx, "mode /home/user/.profile", "-rw-r--r-- 1000 1000")
	v.want(ctx, "mode /etc/shadow", "-rw-r----- 0 0")
	v.want(ctx, "mode /tmp", "dtrwxrwxrwx 0 0")
	v.want(ctx, "mode /dev/ptmx", "Dcrw-rw-rw- 0 0")
	v.want(ctx, "rename /usr/lib/package /usr/lib/renamed", "")
	v.want(ctx, "cat /usr/lib/renamed/file", "of the template")
	if got := v.exec(ctx, guest.ExecRequest{Cmd: "id"}).Output; got != "1000 1000 [27 1000] /home/user\n" && got != "1000 1000 [1000 27] /home/user\n" {
		t.Errorf("the default user is %q", got)
	}
	if id := v.say(ctx, "cat /etc/machine-id"); len(id) != 32 {
		t.Errorf("machine-id = %q", id)
	}
	mounts := v.say(ctx, "cat /proc/self/mounts")
	for _, want := range []string{"root / overlay rw", "proc /proc proc", "sysfs /sys sysfs", "devtmpfs /dev devtmpfs", "devpts /dev/pts devpts",
		"tmpfs /dev/shm tmpfs", "tmpfs /run tmpfs", "cgroup2 /sys/fs/cgroup cgroup2"} {
		if !strings.Contains(mounts, want) {
			t.Errorf("there is no %q among the mounts:\n%s", want, mounts)
		}
	}
	if strings.Contains(mounts, "ext4") || strings.Contains(mounts, "erofs") {
		t.Errorf("the disks can be named:\n%s", mounts)
	}
	v.wantClock(ctx)
	m, err := v.Metrics(ctx)
	if err != nil || m.CPUCount != 1 || m.MemTotal < 150<<20 || m.MemTotal > 256<<20 || m.DiskTotal < 32<<20 || m.DiskTotal > 64<<20 {
		t.Errorf("Metrics = %+v, %v", m, err)
	}
	if serial := v.serial(); !bytes.Contains(serial, []byte("initialized")) {
		t.Errorf("the agent's log is not on the console:\n%s", serial)
	}
}

func (v *guestVM) testExec(ctx context.Context) {
	t := v.t
	v.want(ctx, "env A", "1")
	if got := v.exec(ctx, guest.ExecRequest{Cmd: "env A", Env: map[string]string{"A": "2"}, Cwd: "/tmp"}); got.Output != "2\n" || got.ExitCode != 0 || got.PID == 0 {
		t.Errorf("exec with an environment = %+v", got)
	}
	if got := v.exec(ctx, guest.ExecRequest{Cmd: "exit 3"}); got.ExitCode != 3 || got.Output != "leaving\n" {
		t.Errorf("exec of exit 3 = %+v", got)
	}
	if got := v.exec(ctx, guest.ExecRequest{Cmd: "sleep", Timeout: 100 * time.Millisecond}); !got.TimedOut || got.ExitCode != 128+9 {
		t.Errorf("exec that takes too long = %+v", got)
	}
	if got := v.exec(ctx, guest.ExecRequest{Cmd: "many"}); !strings.HasSuffix(got.Output, "line 4999\n") || len(got.Output) != 16<<10 {
		t.Errorf("exec with much output: %d bytes, %+v", len(got.Output), got.ExitCode)
	}
	for name, r := range map[string]guest.ExecRequest{
		"user": {Cmd: "id", User: "ghost"}, "cwd": {Cmd: "id", Cwd: "/nowhere"}, "command": {}, "environment": {Cmd: "id", Env: map[string]string{"=": ""}},
	} {
		if res, err := v.Exec(ctx, r); err == nil || !strings.Contains(err.Error(), "status 400") {
			t.Errorf("Exec with a bad %s = %+v, %v", name, res, err)
		}
	}
}

// testDial: each direction of a stream over vsock ends by itself.
func (v *guestVM) testDial(ctx context.Context) {
	t := v.t
	if _, err := v.DialPort(ctx, 3000); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("DialPort where nobody listens: %v", err)
	}
	for i, address := range []string{"127.0.0.1:3000", "169.254.0.21:3001", "[fd73:6c75:6963:65ff::2]:3002"} {
		port := uint16(3000 + i)
		if res := v.exec(ctx, guest.ExecRequest{Cmd: "serve " + address, Background: true}); res.PID == 0 {
			t.Fatalf("exec in the background = %+v", res)
		}
		conn := v.dialSoon(ctx, port)
		body := strings.Repeat("0123456789abcdef", 1<<14)
		if _, err := io.WriteString(conn, body); err != nil {
			t.Errorf("%s: %v", address, err)
		}
		if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
			t.Error(err)
		}
		if got, err := io.ReadAll(conn); err != nil || string(got) != body+" <nil>" {
			t.Errorf("%s answers %d bytes, %v, want %d", address, len(got), err, len(body)+6)
		}
		conn.Close()
	}
}

// dialSoon connects to a server that is just starting.
func (v *guestVM) dialSoon(ctx context.Context, port uint16) net.Conn {
	v.t.Helper()
	for {
		conn, err := v.DialPort(ctx, port)
		if err == nil {
			return conn
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			v.t.Fatalf("DialPort(%d): %v", port, err)
		}
	}
}

// testKilled: an agent that is killed comes back as it was. Nobody asks in vain meanwhile, and what runs runs on.
func (v *guestVM) testKilled(ctx context.Context) {
	t := v.t
	v.want(ctx, "term", "")
	first := v.say(ctx, "agent")
	before := v.identity(ctx)
	if res, err := v.Exec(ctx, guest.ExecRequest{Cmd: "kill", User: "root"}); err == nil {
		t.Errorf("the exec that kills the agent answers %+v", res)
	}
	if err := v.Health(ctx); err != nil {
		t.Fatalf("Health of the next agent: %v\n%s", err, v.serial())
	}
	if second := v.say(ctx, "agent"); second == first || second == "0" {
		t.Errorf("the agent is %s as before", second)
	}
	if status := v.public(ctx, "/envs", ""); status != http.StatusUnauthorized {
		t.Errorf("the next agent answers %d without a token", status)
	}
	if status := v.public(ctx, "/envs", "secret"); status != http.StatusOK {
		t.Errorf("the next agent answers %d with the token", status)
	}
	v.want(ctx, "env A", "1")
	after := v.identity(ctx)
	after.random, before.random = "", ""
	if after != before {
		t.Errorf("the machine was %+v and is %+v", before, after)
	}
	conn := v.dialSoon(ctx, 3000)
	conn.Close()
	if serial := v.serial(); !bytes.Contains(serial, []byte("killed by SIGKILL")) {
		t.Errorf("the console does not tell:\n%s", serial)
	}
}

// testSaved: what a sandbox is after its memory was saved, and after its disk alone was.
func (h *guestHost) testSaved(ctx context.Context, t *testing.T, v *guestVM) {
	listenIn(t, v.Spec.NetNS, "169.254.0.22:4000")
	v.say(ctx, "write /home/user/kept text")
	for file, address := range map[string]string{"/run/far": "169.254.0.22:4000", "/run/near": "127.0.0.1:3000", "/run/own": "169.254.0.21:3001"} {
		v.exec(ctx, guest.ExecRequest{Cmd: "hold " + address + " " + file, User: "root", Background: true})
		v.want(ctx, "await "+file+" held", "held")
	}
	before := v.identity(ctx)

	snapshots, err := vmm.OpenSnapshots(filepath.Join(filepath.Dir(v.Spec.Dir), "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	if err := v.VM.API.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	draft, err := snapshots.Begin("one")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(v.VM.Snapshot(ctx, draft), draft.CopyIn(ctx, "disk.img", v.Spec.Disk)); err != nil {
		t.Fatal(err)
	}
	snap, err := draft.Commit(ctx, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.VM.Kill(ctx); err != nil {
		t.Fatal(err)
	}

	restored := func() *guestVM {
		r := h.newVM(t, filepath.Join(snap.Dir, "disk.img"))
		r.Spec.Snapshot = snap.Dir
		r.Start(ctx)
		mode := vmm.RestoreOnDemand
		if !h.Launcher.OnDemand() {
			mode = vmm.RestoreCopy
		}
		if err := r.VM.Restore(ctx, mode, r.Tap); err != nil {
			t.Fatalf("Restore: %v", err)
		}
		return r
	}

	// It goes on as itself.
	same := restored()
	if err := same.Resume(ctx, guest.ResumeRequest{Timestamp: time.Now(), LifecycleID: "one-2"}); err != nil {
		t.Fatalf("Resume: %v\n%s", err, same.serial())
	}
	if got := same.say(ctx, "await /run/far ended"); !strings.Contains(got, "connection abort") && !strings.Contains(got, "connection reset") {
		t.Errorf("the connection to the world ended with %q", got)
	}
	same.want(ctx, "cat /run/near", "held")
	same.want(ctx, "cat /run/own", "held")
	same.want(ctx, "env A", "1")
	same.wantClock(ctx)
	again := same.identity(ctx)
	if again.random == before.random {
		t.Error("a random number comes twice")
	}
	first := again.random
	again.random, before.random = "", ""
	if again != before {
		t.Errorf("the resumed machine was %+v and is %+v", before, again)
	}
	if status := same.public(ctx, "/envs", ""); status != http.StatusUnauthorized {
		t.Errorf("the resumed machine answers %d without a token", status)
	}

	// Another one goes on from the same memory.
	other := restored()
	other.mustInit(ctx, guest.InitRequest{
		EnvVars: map[string]string{"B": "2"}, MergeEnv: true, AccessToken: "other", Hostname: "vm-two", LifecycleID: "two-1", MAC: "02:53:4c:00:00:12",
	})
	got := other.identity(ctx)
	if got.machine == again.machine || got.boot == again.boot || got.mac != "02:53:4c:00:00:12" || got.hostname != "vm-two" || got.random == first || len(got.boot) != 36 {
		t.Errorf("siblings are %+v and %+v", again, got)
	}
	if got := other.say(ctx, "await /run/far ended"); !strings.Contains(got, "connection abort") && !strings.Contains(got, "connection reset") {
		t.Errorf("the connection of the sibling to the world ended with %q", got)
	}
	other.want(ctx, "cat /run/near", "held")
	other.want(ctx, "env A", "1")
	other.want(ctx, "env B", "2")
	other.want(ctx, "cat /home/user/kept", "text")
	if err := other.VM.Kill(ctx); err != nil {
		t.Fatal(err)
	}

	// It is booted from what was on its disk.
	same.say(ctx, "write /home/user/late text")
	if err := same.Sync(ctx); err != nil {
		t.Fatalf("Sync: %v", err)
	}
	if err := same.VM.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	cold := h.newVM(t, same.Spec.Disk)
	cold.boot(ctx)
	if status := cold.public(ctx, "/health", ""); status != http.StatusServiceUnavailable {
		t.Errorf("after a boot, before init, the port answers %d", status)
	}
	cold.want(ctx, "env B", "1")
	cold.want(ctx, "cat /proc/sys/kernel/hostname", "vm-one")
	cold.mustInit(ctx, guest.InitRequest{
		EnvVars: map[string]string{"C": "3"}, MergeEnv: true, AccessToken: "later", Hostname: "vm-one", LifecycleID: "one-3", DefaultUser: "user",
	})
	for _, name := range []string{"kept", "late"} {
		cold.want(ctx, "cat /home/user/"+name, "text")
	}
	cold.want(ctx, "env A", "1")
	cold.want(ctx, "env C", "3")
	cold.want(ctx, "cat /usr/lib/renamed/file", "of the template")
	cold.want(ctx, "cat /etc/machine-id", again.machine)
	if id := cold.say(ctx, "cat /proc/sys/kernel/random/boot_id"); id == again.boot {
		t.Errorf("the boot id is that of an earlier boot: %s", id)
	}
}
