package vmmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/vmm"

	"golang.org/x/sys/unix"
)

// Host is a place where VMs run.
type Host struct {
	Launcher          *vmm.Launcher
	Kernel, Initramfs string
	Real              bool // and not the fake
}

// Run is what both hypervisors must do.
func Run(t *testing.T, newHost func(t *testing.T) Host) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: run the tests as root, or in a privileged container")
	}
	h := newHost(t)
	t.Logf("landlock %v, restore on demand %v", h.Launcher.Landlock(), h.Launcher.OnDemand())
	t.Run("Life", h.testLife)
	t.Run("Confinement", h.testConfinement)
	t.Run("Ends", h.testEnds)
	t.Run("Adopt", h.testAdopt)
	t.Run("BadInput", h.testBadInput)
}

// Shape is that of the suite's VMs, with all the fences that this host has.
func (h Host) Shape() vmm.Shape {
	s := Shape()
	s.Landlock = h.Launcher.Landlock()
	return s
}

// Box is one VM of a test.
type Box struct {
	T    testing.TB
	Host Host
	Spec vmm.Spec
	VM   *vmm.VM
	Tap  *os.File
}

// firstUID is below the ids of every other package's tests, which run at the same time and look for processes that have their ids.
const firstUID = 1 << 20

var nextUID atomic.Uint32

// NewBox makes everything that a VM needs and starts none. All of it is gone with the test, and the test fails if something is left.
func (h Host) NewBox(t testing.TB) *Box {
	t.Helper()
	dir, err := os.MkdirTemp("", "slvm-") // short, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &Box{T: t, Host: h}
	netns := makeNetNS(t)
	b.Tap = makeTap(t, netns)
	b.Spec = vmm.Spec{
		ID: "t" + filepath.Base(dir)[5:], Dir: filepath.Join(dir, "vm"), NetNS: netns, UID: firstUID + nextUID.Add(1),
		Kernel: h.Kernel, Initramfs: h.Initramfs, Root: filepath.Join(dir, "root.img"), Disk: filepath.Join(dir, "disk.img"),
	}
	for _, name := range []string{b.Spec.Root, b.Spec.Disk} {
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Truncate(8<<20), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(b.destroy)
	return b
}

func (b *Box) destroy() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := b.Host.Launcher.Destroy(ctx, b.Spec); err != nil {
		b.T.Errorf("Destroy: %v", err)
	}
	if b.VM != nil && b.T.Failed() {
		b.T.Logf("end of the VM: %v", b.VM.Err())
	}
	entries, err := os.ReadDir(b.Spec.Dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		b.T.Error(err)
	}
	for _, e := range entries {
		b.T.Errorf("Destroy leaves %s", e.Name())
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(mounts, []byte(b.Spec.Dir)) {
		b.T.Errorf("a mount of the VM is left on the host, or cannot be told: %v", err)
	}
}

// Start starts the hypervisor.
func (b *Box) Start(ctx context.Context) {
	b.T.Helper()
	vm, err := b.Host.Launcher.Start(ctx, b.Spec)
	if err != nil {
		b.T.Fatalf("Start: %v", err)
	}
	b.VM = vm
}

// Boot starts a VM and waits until its guest says that it is up.
func (b *Box) Boot(ctx context.Context) {
	b.T.Helper()
	up, err := vmm.ListenGuest(b.Spec, UpPort)
	if err != nil {
		b.T.Fatalf("ListenGuest: %v", err)
	}
	defer up.Close()
	b.Start(ctx)
	if err := b.VM.Boot(ctx, b.Host.Shape(), b.Tap); err != nil {
		b.T.Fatalf("Boot: %v", err)
	}
	b.waitUp(ctx, up)
}

func (b *Box) waitUp(ctx context.Context, up *net.UnixListener) {
	b.T.Helper()
	stop := context.AfterFunc(ctx, func() { up.Close() })
	defer stop()
	accepted := make(chan struct{})
	defer close(accepted)
	go func(vmEnded <-chan struct{}) {
		select {
		case <-vmEnded:
			up.Close()
		case <-accepted:
		}
	}(b.VM.Done())
	c, err := up.Accept()
	if err != nil {
		serial, _ := b.VM.Serial(4096)
		log, _ := b.VM.VMMLog(4096)
		b.T.Fatalf("the guest is not up: %v (%v)\nserial:\n%s\nlog:\n%s", err, b.VM.Err(), serial, log)
	}
	defer c.Close()
	if word, err := io.ReadAll(c); err != nil || string(word) != "up\n" {
		b.T.Errorf("the guest's first word is %q, %v", word, err)
	}
}

// Ask is one question to the guest, on a connection of its own.
func (b *Box) Ask(ctx context.Context, line string) string {
	b.T.Helper()
	c, err := b.VM.DialGuest(ctx, GuestPort)
	if err != nil {
		b.T.Fatalf("DialGuest: %v (%v)", err, b.VM.Err())
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	reply, err := Ask(c, line)
	if err != nil {
		b.T.Fatalf("ask the guest %q: %v (%v)", line, err, b.VM.Err())
	}
	return reply
}

func (b *Box) want(ctx context.Context, line, want string) {
	b.T.Helper()
	if got := b.Ask(ctx, line); got != want {
		b.T.Errorf("the guest answers %q to %q, want %q", got, line, want)
	}
}

func (b *Box) wantState(ctx context.Context, want vmm.State) {
	b.T.Helper()
	info, err := b.VM.API.Info(ctx)
	if err != nil || info.State != want {
		b.T.Errorf("Info = %q, %v, want %q", info.State, err, want)
	}
}

// Ended waits for the end of the hypervisor and returns how it was.
func (b *Box) Ended(ctx context.Context) *vmm.Ended {
	b.T.Helper()
	select {
	case <-b.VM.Done():
	case <-ctx.Done():
		b.T.Fatal("the hypervisor does not end")
	}
	ended, ok := errors.AsType[*vmm.Ended](b.VM.Err())
	if !ok {
		b.T.Fatalf("Err = %v, want an *Ended", b.VM.Err())
	}
	return ended
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// testLife is a VM from its boot over pause and resume to a snapshot, its death, and two VMs that go on from there.
func (h Host) testLife(t *testing.T) {
	ctx := testContext(t)
	b := h.NewBox(t)
	b.Boot(ctx)

	if ping, err := b.VM.API.Ping(ctx); err != nil || ping.PID != 1 {
		t.Errorf("Ping = %+v, %v, want the first process of a pid namespace", ping, err)
	}
	b.wantState(ctx, vmm.StateRunning)
	info, err := b.VM.API.Info(ctx)
	if err != nil || info.Config.Memory.Size != int64(Shape().MemoryMiB)<<20 || len(info.Config.Disks) != 2 || len(info.Config.Net) != 1 {
		t.Errorf("Info = %+v, %v", info, err)
	}
	if n, err := b.VM.API.Counters(ctx); err != nil || len(n) == 0 {
		t.Errorf("Counters = %v, %v", n, err)
	}
	b.want(ctx, "next", "1")
	b.want(ctx, "next", "2")
	b.want(ctx, "mac", Shape().MAC)
	b.want(ctx, "write before the snapshot", "ok")
	b.want(ctx, "read", "before the snapshot")
	b.want(ctx, "say hello from inside", "ok")
	if serial, err := b.VM.Serial(64 << 10); err != nil || !bytes.Contains(serial, []byte("READY")) || !bytes.Contains(serial, []byte("hello from inside")) {
		t.Errorf("Serial = %q, %v", serial, err)
	}
	if _, err := b.VM.DialGuest(ctx, GuestPort+7); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("DialGuest of a port where nobody listens: %v, want ECONNREFUSED", err)
	}

	// A connection that is open while the VM is paused and resumed stays open.
	held, err := b.VM.DialGuest(ctx, GuestPort)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := b.VM.API.Pause(ctx); err != nil {
		t.Fatalf("Pause: %v", err)
	}
	b.wantState(ctx, vmm.StatePaused)
	if err := b.VM.API.Pause(ctx); err == nil {
		t.Error("Pause of a paused VM succeeds")
	}
	if err := b.VM.API.Resume(ctx); err != nil {
		t.Fatalf("Resume: %v", err)
	}
	if got, err := Ask(held, "next"); err != nil || got != "3" {
		t.Errorf("after Resume, on an old connection: %q, %v, want 3", got, err)
	}
	b.wantState(ctx, vmm.StateRunning)

	// Snapshot, and the VM goes on.
	snapshots, err := vmm.OpenSnapshots(filepath.Join(filepath.Dir(b.Spec.Dir), "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.VM.API.Pause(ctx); err != nil {
		t.Fatalf("Pause: %v", err)
	}
	draft, err := snapshots.Begin("one")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.VM.Snapshot(ctx, draft); err != nil {
		t.Fatalf("Snapshot: %v", err)
	}
	if err := draft.CopyIn(ctx, "disk.img", b.Spec.Disk); err != nil {
		t.Fatalf("CopyIn: %v", err)
	}
	snap, err := draft.Commit(ctx, "test", map[string]string{"shape": "small"})
	if err != nil {
		t.Fatalf("Commit: %v", err)
	}
	if err := snapshots.Verify(ctx, "one"); err != nil {
		t.Errorf("Verify: %v", err)
	}
	used, err := snapshots.Usage("one")
	if err != nil || used == 0 || used >= b.memory()*3/4 {
		t.Errorf("Usage = %d, %v: the snapshot is not sparse", used, err)
	}
	t.Logf("the snapshot takes %d KiB", used>>10)
	if err := b.VM.API.Resume(ctx); err != nil {
		t.Fatalf("Resume after the snapshot: %v", err)
	}
	b.want(ctx, "next", "4")
	b.want(ctx, "write after the snapshot", "ok")
	b.want(ctx, "say still talking", "ok")
	if serial, err := b.VM.Serial(64 << 10); err != nil || !bytes.Contains(serial, []byte("still talking")) {
		t.Errorf("Serial after a snapshot = %q, %v", serial, err)
	}
	if err := b.VM.Kill(ctx); err != nil {
		t.Fatalf("Kill: %v", err)
	}

	// Two VMs go on from the snapshot, both at once and each by itself. They share its files and the root image.
	var restored []*Box
	for i := range 2 {
		r := h.NewBox(t)
		restored = append(restored, r)
		r.Spec.Snapshot, r.Spec.Root = snap.Dir, b.Spec.Root
		if err := os.Remove(r.Spec.Disk); err != nil {
			t.Fatal(err)
		}
		if err := vmm.CopySparse(ctx, r.Spec.Disk, filepath.Join(snap.Dir, "disk.img")); err != nil {
			t.Fatal(err)
		}
		r.Start(ctx)
		mode := vmm.RestoreOnDemand
		if !h.Launcher.OnDemand() {
			mode = vmm.RestoreCopy
		}
		start := time.Now()
		if err := r.VM.Restore(ctx, mode, r.Tap); err != nil {
			log, _ := r.VM.VMMLog(4096)
			t.Fatalf("Restore %d: %v\n%s", i, err, log)
		}
		r.wantState(ctx, vmm.StateRunning)
		r.want(ctx, "next", "4")
		t.Logf("restored in %v", time.Since(start).Round(time.Millisecond))
		r.want(ctx, "next", "5")
		r.want(ctx, "read", "before the snapshot")
		r.want(ctx, "mac", Shape().MAC)
		r.want(ctx, fmt.Sprintf("write restored %d", i), "ok")
		r.want(ctx, "read", fmt.Sprintf("restored %d", i))
		if i == 0 {
			r.snapshotAgain(ctx, snapshots)
		}
	}
	for i, r := range restored {
		r.want(ctx, "read", fmt.Sprintf("restored %d", i))
		if err := r.VM.API.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if how := r.Ended(ctx).How; how != "exited with status 0" {
			t.Errorf("after Shutdown the hypervisor %s", how)
		}
	}
	if err := snapshots.Verify(ctx, "one"); err != nil {
		t.Errorf("Verify after two restores: %v", err)
	}
}

// snapshotAgain takes a snapshot of a VM that comes from one, at once: it may not be all there yet.
func (b *Box) snapshotAgain(ctx context.Context, snapshots *vmm.Snapshots) {
	b.T.Helper()
	if err := b.VM.API.Pause(ctx); err != nil {
		b.T.Fatalf("Pause: %v", err)
	}
	draft, err := snapshots.Begin("two")
	if err != nil {
		b.T.Fatal(err)
	}
	if err := b.VM.Snapshot(ctx, draft); err != nil {
		b.T.Fatalf("Snapshot of a restored VM: %v", err)
	}
	if _, err := draft.Commit(ctx, "test", nil); err != nil {
		b.T.Fatalf("Commit: %v", err)
	}
	used, err := snapshots.Usage("two")
	if err != nil || used == 0 || used >= b.memory()*3/4 {
		b.T.Errorf("Usage = %d, %v: the second snapshot is not sparse", used, err)
	}
	b.T.Logf("the second snapshot takes %d KiB", used>>10)
	if err := b.VM.API.Resume(ctx); err != nil {
		b.T.Fatalf("Resume: %v", err)
	}
	b.want(ctx, "next", "6")
}

func (b *Box) memory() int64 { return int64(Shape().MemoryMiB) << 20 }

// testConfinement looks at a running hypervisor from outside.
func (h Host) testConfinement(t *testing.T) {
	ctx := testContext(t)
	cgroups := makeCgroup(t) // before the VM, to go after it
	b := h.NewBox(t)
	b.Spec.Cgroups = cgroups
	b.Boot(ctx)
	pid := b.VM.Handle().PID
	proc := fmt.Sprintf("/proc/%d", pid)

	status := readFile(t, proc+"/status")
	field := func(name string) string {
		for line := range strings.Lines(status) {
			if value, ok := strings.CutPrefix(line, name+":"); ok {
				return strings.Join(strings.Fields(value), " ")
			}
		}
		return ""
	}
	uid := fmt.Sprint(b.Spec.UID)
	all := strings.Join([]string{uid, uid, uid, uid}, " ")
	for name, want := range map[string]string{
		"Uid": all, "Gid": all, "Groups": "", "NoNewPrivs": "1", "NSpid": fmt.Sprintf("%d 1", pid),
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapAmb": "0000000000000000",
	} {
		if got := field(name); got != want {
			t.Errorf("%s of the hypervisor is %q, want %q", name, got, want)
		}
	}
	if h.Real {
		// Every thread with a filter of its own; the first one gets it later than the others, if at all.
		tasks, err := filepath.Glob(proc + "/task/*/status")
		if err != nil {
			t.Fatal(err)
		}
		filtered := 0
		for _, task := range tasks {
			if strings.Contains(readFile(t, task), "\nSeccomp:\t2\n") {
				filtered++
			}
		}
		if filtered < len(tasks)-1 || filtered == 0 {
			t.Errorf("%d of %d threads have a seccomp filter", filtered, len(tasks))
		}
	}
	for _, ns := range []string{"mnt", "pid", "ipc", "uts", "net"} {
		own, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		if its, err := os.Readlink(proc + "/ns/" + ns); err != nil || its == own {
			t.Errorf("the hypervisor is in the host's %s namespace: %v", ns, err)
		}
	}
	var want, got unix.Stat_t
	if err := errors.Join(unix.Stat(b.Spec.NetNS, &want), unix.Stat(proc+"/ns/net", &got)); err != nil || want.Ino != got.Ino {
		t.Errorf("the hypervisor is not in its network namespace: %v", err)
	}
	if len(b.Spec.Cgroups) > 0 {
		if procs := strings.Fields(readFile(t, filepath.Join(b.Spec.Cgroups[0], "cgroup.procs"))); !slices.Contains(procs, fmt.Sprint(pid)) {
			t.Errorf("the cgroup has %v, want %d", procs, pid)
		}
	} else {
		t.Log("no cgroup can be made here")
	}

	// Everything that it can see, and how.
	var names []string
	top, err := os.ReadDir(proc + "/root")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range top {
		names = append(names, e.Name())
	}
	for _, n := range names {
		if !slices.Contains([]string{"cloud-hypervisor", "dev", "disk.img", "initramfs", "kernel", "lib", "lib64", "out", "root.img", "run", "snapshot", "usr"}, n) {
			t.Errorf("the hypervisor sees /%s", n)
		}
	}
	for line := range strings.Lines(readFile(t, proc+"/mountinfo")) {
		f := strings.Fields(line)
		point, options := f[4], strings.Split(f[5], ",")
		writable := slices.Contains([]string{"/disk.img", "/run", "/out"}, point)
		if slices.Contains(options, "rw") != writable {
			t.Errorf("%s is mounted %s", point, f[5])
		}
		if !slices.Contains(options, "nosuid") || point != "/" && !slices.Contains(options, "nodev") {
			t.Errorf("%s is mounted %s", point, f[5])
		}
	}
	var limits string
	for line := range strings.Lines(readFile(t, proc+"/limits")) {
		if strings.HasPrefix(line, "Max core file size") {
			limits = strings.Join(strings.Fields(line), " ")
		}
	}
	if !strings.HasPrefix(limits, "Max core file size 0 ") {
		t.Errorf("limits: %q, want no dumps", limits)
	}
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		target, err := os.Readlink(proc + "/fd/" + fd.Name())
		if err == nil && strings.HasPrefix(target, "/") && strings.Contains(target, "sluice") && !strings.Contains(target, b.Spec.Dir) {
			t.Errorf("the hypervisor has %s open", target)
		}
	}
}

// testEnds: every way to end is noticed, and says why.
func (h Host) testEnds(t *testing.T) {
	t.Run("PowerOff", func(t *testing.T) {
		ctx := testContext(t)
		b := h.NewBox(t)
		b.Boot(ctx)
		c, err := b.VM.DialGuest(ctx, GuestPort)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "say these are my last words\noff\n"); err != nil {
			t.Fatal(err)
		}
		ended := b.Ended(ctx)
		if ended.How != "exited with status 0" || !strings.Contains(ended.Error(), "these are my last words") {
			t.Errorf("Err = %v", ended)
		}
		if err := b.VM.Kill(ctx); err != nil {
			t.Errorf("Kill of what has ended: %v", err)
		}
		if _, err := b.VM.API.Info(ctx); errs.CodeOf(err) != errs.Unavailable {
			t.Errorf("Info of what has ended: %v, want Unavailable", err)
		}
	})
	t.Run("Killed", func(t *testing.T) {
		ctx := testContext(t)
		b := h.NewBox(t)
		b.Start(ctx)
		if err := unix.Kill(b.VM.Handle().PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if ended := b.Ended(ctx); ended.How != "was killed by signal 9 (SIGKILL)" {
			t.Errorf("Err = %v", ended)
		}
	})
}

// testAdopt: a hypervisor outlives who started it, and is found again.
func (h Host) testAdopt(t *testing.T) {
	ctx := testContext(t)
	b := h.NewBox(t)
	b.Boot(ctx)
	b.want(ctx, "next", "1")
	handle := b.VM.Handle()
	if err := b.VM.Release(); err != nil {
		t.Fatalf("Release: %v", err)
	}
	var err error
	if b.VM, err = h.Launcher.Adopt(b.Spec, handle); err != nil {
		t.Fatalf("Adopt: %v", err)
	}
	b.want(ctx, "next", "2")
	b.wantState(ctx, vmm.StateRunning)

	wrong := handle
	wrong.StartTime++
	if _, err := h.Launcher.Adopt(b.Spec, wrong); errs.CodeOf(err) != errs.NotFound {
		t.Errorf("Adopt of a process of another time: %v, want NotFound", err)
	}
	stranger := b.Spec
	stranger.Dir += "x"
	if _, err := h.Launcher.Adopt(stranger, handle); errs.CodeOf(err) != errs.NotFound {
		t.Errorf("Adopt of another VM's process: %v, want NotFound", err)
	}
	if err := h.Launcher.Destroy(ctx, stranger); err != nil {
		t.Errorf("Destroy: %v", err)
	}
	b.want(ctx, "next", "3") // the stranger's Destroy did not touch it

	for range 2 {
		if err := h.Launcher.Destroy(ctx, b.Spec); err != nil {
			t.Errorf("Destroy: %v", err)
		}
	}
	_ = b.Ended(ctx)
	if _, err := h.Launcher.Adopt(b.Spec, handle); errs.CodeOf(err) != errs.NotFound {
		t.Errorf("Adopt of what is gone: %v, want NotFound", err)
	}
}

// testBadInput: each mistake has an error that says so, soon.
func (h Host) testBadInput(t *testing.T) {
	ctx := testContext(t)
	check := func(name string, edit func(b *Box)) {
		t.Run(name, func(t *testing.T) {
			b := h.NewBox(t)
			edit(b)
		})
	}
	check("NoVM", func(b *Box) {
		b.Start(ctx)
		for name, call := range map[string]func(context.Context) error{
			"boot": b.VM.API.Boot, "pause": b.VM.API.Pause, "resume": b.VM.API.Resume,
			"info": func(ctx context.Context) error { _, err := b.VM.API.Info(ctx); return err },
		} {
			err := call(ctx)
			if refusal, ok := errors.AsType[*vmm.APIError](err); !ok || refusal.Status < 400 || len(refusal.Chain) == 0 {
				b.T.Errorf("%s without a VM: %v, want a refusal with its reason", name, err)
			}
		}
		if _, err := b.VM.DialGuest(ctx, GuestPort); !errors.Is(err, unix.ECONNREFUSED) {
			b.T.Errorf("DialGuest without a VM: %v, want ECONNREFUSED", err)
		}
		if _, err := b.VM.API.Ping(ctx); err != nil {
			b.T.Errorf("Ping after refusals: %v", err)
		}
	})
	check("MissingKernel", func(b *Box) {
		b.Spec.Kernel = "/nonexistent/kernel"
		if _, err := h.Launcher.Start(ctx, b.Spec); !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "/nonexistent/kernel") {
			b.T.Errorf("Start: %v, want ENOENT that names the file", err)
		}
	})
	check("MissingNetNS", func(b *Box) {
		b.Spec.NetNS = "/nonexistent/netns"
		if _, err := h.Launcher.Start(ctx, b.Spec); !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "/nonexistent/netns") {
			b.T.Errorf("Start: %v, want ENOENT that names the file", err)
		}
	})
	check("NotASnapshot", func(b *Box) {
		b.Spec.Snapshot = b.T.TempDir()
		for name, text := range map[string]string{"config.json": "{", "state.json": "", "memory-ranges": ""} {
			if err := os.WriteFile(filepath.Join(b.Spec.Snapshot, name), []byte(text), 0o644); err != nil {
				b.T.Fatal(err)
			}
		}
		b.Start(ctx)
		err := b.VM.Restore(ctx, vmm.RestoreCopy, b.Tap)
		if refusal, ok := errors.AsType[*vmm.APIError](err); !ok || len(refusal.Chain) == 0 {
			b.T.Errorf("Restore of rubbish: %v, want a refusal with its reason", err)
		}
		if _, err := b.VM.API.Ping(ctx); err != nil {
			b.T.Errorf("Ping after a refused restore: %v", err)
		}
	})
	check("TwiceCreated", func(b *Box) {
		b.Boot(ctx)
		err := b.VM.Boot(ctx, b.Host.Shape(), b.Tap)
		if _, ok := errors.AsType[*vmm.APIError](err); !ok {
			b.T.Errorf("Boot of a running VM: %v, want a refusal", err)
		}
		b.want(ctx, "next", "1")
	})
}

func readFile(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// makeNetNS is an empty network namespace that belongs to the host.
func makeNetNS(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "slns-")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "netns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
	if err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.RemoveAll(dir)); err != nil {
			t.Errorf("remove network namespace: %v", err)
		}
	})
	return path
}

// makeTap makes a tap in the namespace and returns its descriptor.
func makeTap(t testing.TB, netns string) *os.File {
	t.Helper()
	ns, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ns)
	fd := -1
	err = onThread(func() error {
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			return err
		}
		fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		req, err := unix.NewIfreq("tap0")
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return err
		}
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		req.SetUint16(unix.IFF_UP)
		return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req)
	})
	if err != nil {
		t.Fatalf("make tap: %v", err)
	}
	f := os.NewFile(uintptr(fd), "tap0")
	t.Cleanup(func() { f.Close() })
	return f
}

// makeCgroup makes a cgroup where that is possible.
func makeCgroup(t testing.TB) []string {
	t.Helper()
	for _, base := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(base, "cgroup.procs")); err != nil {
			continue
		}
		dir := filepath.Join(base, fmt.Sprintf("sluice-vmmtest-%d", os.Getpid()))
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() {
			// The last process is torn down a moment after its end is told, and nothing tells when.
			for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); runtime.Gosched() {
				if err := unix.Rmdir(dir); !errors.Is(err, unix.EBUSY) {
					return
				}
			}
			t.Errorf("cgroup %s stays busy", dir)
		})
		return []string{dir}
	}
	return nil
}

func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			done <- onThread(fn)
			runtime.UnlockOSThread()
			return
		}
		done <- fn()
	}()
	return <-done
}
