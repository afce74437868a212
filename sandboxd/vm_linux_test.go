package sandboxd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
	"github.com/sluice-edge/sluice/sandboxd/vmm/vmmtest"
)

// TestVMMachine is the machine of production with the fake hypervisor: real networks, rules, processes, disks and snapshots, and a guest
// that is a function.
func TestVMMachine(t *testing.T) {
	if !inside(t) {
		return
	}
	h := newVMHost(t)
	t.Run("Machine", func(t *testing.T) {
		m := h.machine(t)
		dir := h.dir(t, "isuite")
		testMachine(t, withoutCards{m}, dir, h.template)
		h.wantClean(t, m)
	})
	t.Run("Suspender", func(t *testing.T) { h.testSuspender(t, fakeWords) })
	t.Run("Warm", h.testWarm)
	t.Run("Torn", h.testTorn)
}

// TestVMMachineReal is the same with the real hypervisor and the real agent.
func TestVMMachineReal(t *testing.T) {
	agent, tool := vmPrograms(t)
	if !lab.InKVM(t) {
		return
	}
	h := newRealVMHost(t, agent, tool)
	t.Run("Machine", func(t *testing.T) {
		m := h.machine(t)
		testMachine(t, m, h.dir(t, "isuite"), h.template)
		h.wantClean(t, m)
	})
	t.Run("Suspender", func(t *testing.T) { h.testSuspender(t, realWords) })
	t.Run("Spoof", h.testSpoof)
	t.Run("Hogs", h.testHogs)
	t.Run("Siblings", h.testSiblings)
}

// testSiblings restores one snapshot ten times: what a sandbox must have for itself is in none of the others.
func (h *vmHost) testSiblings(t *testing.T) {
	const siblings = 10
	ctx := t.Context()
	must := mustOf(t)
	h.bake(t, h.template, h.manifest)
	m := h.machine(t)
	must("setup", m.Setup(ctx))
	seen := map[string]string{}
	for i := range siblings {
		p := Place{ID: fmt.Sprintf("isibling%d", i), Slot: i % 4, Root: h.template, CPUs: 1, MemoryMiB: 192, DiskMiB: 64}
		p.Dir = filepath.Join(h.dir(t, p.ID), p.ID)
		began := time.Now()
		instance, err := m.Start(ctx, p, egress.Policy{}, func(s Step) { t.Logf("%s after %v", s, time.Since(began).Round(time.Millisecond)) })
		must("start", err)
		must("init", instance.Init(ctx, guest.InitRequest{MergeEnv: true, Hostname: p.ID, Timestamp: time.Now()}))
		for what, command := range map[string]string{
			"random bytes": "random", "uuid": "cat /proc/sys/kernel/random/uuid", "machine-id": "cat /etc/machine-id", "TLS key": "tlskey",
			"hardware address": "cat /sys/class/net/eth0/address", "host name": "cat /proc/sys/kernel/hostname",
		} {
			got := ask(t, instance, command)
			if other := seen[got]; other != "" || len(got) < 8 {
				t.Errorf("%s %q of %s is the %s", what, got, p.ID, other)
			}
			seen[got] = what + " of " + p.ID
		}
		must("destroy", m.Destroy(ctx, p, func(Step) {}))
	}
	if got := m.stats.restores.Get(); got != siblings {
		t.Errorf("%d restores, want %d", got, siblings)
	}
	must("close", m.Close(ctx))
}

// withoutCards is a machine of VMs that have nobody behind their network cards.
type withoutCards struct{ *VMMachine }

func (r withoutCards) Start(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (Instance, error) {
	instance, err := r.VMMachine.Start(ctx, p, fence, reached)
	if err != nil {
		return nil, err
	}
	return cardless{instance.(*vmSandbox)}, nil
}

// cardless is one of them: its ports are reached through the agent.
type cardless struct{ *vmSandbox }

func (c cardless) DialPort(ctx context.Context, port uint16) (net.Conn, error) {
	return c.guest.DialPort(ctx, port)
}

// words are what a guest's shell understands: next counts in memory and prints the count; write takes a word to the disk, and read prints
// it. greeting is on its console after a boot.
type words struct{ next, write, read, greeting string }

var (
	fakeWords = words{"next", "write", "read", "READY"}
	realWords = words{"count /run/count", "write /root/word", "cat /root/word", "msg=initialized"}
)

// vmHost is where VM machines are tested: a template, not baked, and a store.
type vmHost struct {
	prefix     string // of the network's names, for tests beside others and after others that failed
	hypervisor string
	state      string
	template   string
	manifest   image.Manifest // of the template, where there is one
	store      *image.Store
}

func newVMHost(t testing.TB) *vmHost {
	t.Helper()
	state, err := os.MkdirTemp("", "slvm-") // short, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(state) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	h := &vmHost{prefix: vmPrefix(), hypervisor: self, state: state, template: filepath.Join(state, "template")}
	if h.store, err = image.OpenStore(filepath.Join(state, "templates")); err != nil {
		t.Fatal(err)
	}
	writeTemplate(t, h.template)
	return h
}

func vmPrefix() string { return fmt.Sprintf("sv%05d", rand.N(100000)) }

// writeTemplate makes what the fake boots from.
func writeTemplate(t testing.TB, dir string) {
	t.Helper()
	err := errors.Join(
		os.Mkdir(dir, 0o755),
		vmmtest.WriteKernel(filepath.Join(dir, vmKernelName), vmmtest.Faults{}),
		os.WriteFile(filepath.Join(dir, vmInitramfsName), nil, 0o644),
		os.WriteFile(filepath.Join(dir, vmRootName), make([]byte, 4096), 0o644),
	)
	if err != nil {
		t.Fatal(err)
	}
}

// newRealVMHost has a template with the real agent in it.
func newRealVMHost(t *testing.T, agent, tool string) *vmHost {
	t.Helper()
	binary, err := lab.FindVMM()
	if err != nil {
		t.Fatal(err)
	}
	base := ""
	if os.Getenv(lab.InsideVariable) != "" {
		base = lab.NestedDisk
	}
	state, err := os.MkdirTemp(base, "slvm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(state) })
	h := &vmHost{prefix: vmPrefix(), hypervisor: binary, state: state}
	if h.store, err = image.OpenStore(filepath.Join(state, "templates")); err != nil {
		t.Fatal(err)
	}
	built, err := image.Build(t.Context(), image.Options{
		Store: h.store, Name: "guest", From: "dir:" + writeGuestRoot(t, filepath.Join(state, "root"), tool), Agent: agent,
		Kernel: os.Getenv(lab.KernelRootVariable), DiskMiB: 64, MemoryMiB: 192, CPUs: 1,
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	h.template, h.manifest = built.Dir, built.Manifest
	return h
}

func (h *vmHost) machine(t testing.TB) *VMMachine {
	t.Helper()
	m, err := NewVMMachine(t.Context(), VMOptions{
		Hypervisor: h.hypervisor, Templates: h.store, StateDir: h.state, Network: netdev.Config{NamePrefix: h.prefix}, Log: zaptest.NewLogger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// dir is a directory of places with one in it.
func (h *vmHost) dir(t testing.TB, id string) string {
	t.Helper()
	dir, err := os.MkdirTemp(h.state, "s")
	if err == nil {
		err = os.Mkdir(filepath.Join(dir, id), 0o711)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// finish removes the last sandbox of a machine and closes it. Nothing of either may be left.
func (h *vmHost) finish(t *testing.T, m *VMMachine, p Place) {
	t.Helper()
	must := mustOf(t)
	must("destroy", m.Destroy(t.Context(), p, func(Step) {}))
	must("close", m.Close(t.Context()))
	h.wantClean(t, m)
}

// wantClean looks for what a machine that was closed may have left.
func (h *vmHost) wantClean(t *testing.T, m *VMMachine) {
	t.Helper()
	for _, base := range m.cgroups.Base {
		left, err := filepath.Glob(filepath.Join(base, cgroupPrefix+m.opts.Network.NamePrefix+"-*"))
		if err != nil || len(left) > 0 {
			t.Errorf("cgroups are left: %v, %v", left, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(h.state, "layers", m.opts.Network.NamePrefix)); len(left) > 0 {
		t.Errorf("writable layers are left: %v, %v", left, err)
	}
	if left, err := filepath.Glob("/run/netns/" + m.opts.Network.NamePrefix + "-*"); err != nil || len(left) > 0 {
		t.Errorf("network namespaces are left: %v, %v", left, err)
	}
}

func ask(t *testing.T, i Instance, command string) string {
	t.Helper()
	said, err := i.(*vmSandbox).tell(t.Context(), command)
	if err != nil {
		t.Fatal(err)
	}
	return said
}

// tell runs a command in the guest and returns what it prints.
func (s *vmSandbox) tell(ctx context.Context, command string) (string, error) {
	result, err := s.guest.Exec(ctx, guest.ExecRequest{Cmd: command, User: "root"})
	if err != nil || result.ExitCode != 0 {
		return "", fmt.Errorf("exec %q = %+v, %w", command, result, err)
	}
	return strings.TrimSpace(result.Output), nil
}

func agentState(t *testing.T, i Instance) (state fakeAgentState) {
	t.Helper()
	if err := json.Unmarshal([]byte(ask(t, i, "state")), &state); err != nil {
		t.Fatal(err)
	}
	return state
}

// testSuspender is what the manager relies on of a machine that can save its sandboxes.
func (h *vmHost) testSuspender(t *testing.T, w words) {
	next, write, read := w.next, w.write, w.read
	ctx := t.Context()
	m := h.machine(t)
	must := mustOf(t)
	must("setup", m.Setup(ctx))
	steps := []Step{}
	reached := func(s Step) { steps = append(steps, s) }
	place := Place{ID: "isaved", Dir: filepath.Join(h.dir(t, "isaved"), "isaved"), Slot: 3, Root: h.template, CPUs: 1, MemoryMiB: 192, DiskMiB: 64}
	again := place
	again.Slot = 5
	if _, err := m.Saved(place); errs.CodeOf(err) != errs.NotFound {
		t.Errorf("Saved of nothing = %v, want NotFound", err)
	}
	must("prepare", m.Prepare(ctx, 3))
	instance, err := m.Start(ctx, place, egress.Policy{}, reached)
	must("start", err)
	must("init", instance.Init(ctx, guest.InitRequest{EnvVars: map[string]string{"A": "1"}, MergeEnv: true}))
	ask(t, instance, next)
	ask(t, instance, write+" before")

	// With memory, in another slot: it goes on where it was.
	must("suspend", m.Suspend(ctx, place, instance, true, reached))
	<-instance.Done()
	must("destroy", m.Destroy(ctx, place, reached))
	saved, err := m.Saved(place)
	if err != nil || !saved.Memory || saved.Bytes <= 0 || saved.Bytes > 160<<20 {
		t.Errorf("Saved() = %+v, %v, want memory, sparse", saved, err)
	}
	resumed, err := m.Resume(ctx, again, egress.Policy{}, reached)
	must("resume", err)
	if !resumed.Memory() {
		t.Error("resumed without memory")
	}
	// It has not run: whoever dies here leaves it paused.
	must("destroy before it runs", m.Destroy(ctx, again, reached))
	if saved, err := m.Saved(place); err != nil || !saved.Memory {
		t.Fatalf("Saved() after a resume that came to nothing = %+v, %v, want memory", saved, err)
	}
	resumed, err = m.Resume(ctx, again, egress.Policy{}, reached)
	must("resume again", err)
	handle := resumed.Handle()
	must("release", resumed.Release())
	adopted, err := m.Adopt(ctx, again, handle)
	must("adopt what stands still", err)
	resumed = adopted.(Suspended)
	must("continue", resumed.Continue(ctx, guest.ResumeRequest{Timestamp: time.Now()}))
	must("continue again", resumed.Continue(ctx, guest.ResumeRequest{Timestamp: time.Now()}))
	if got := ask(t, resumed, next); got != "2" {
		t.Errorf("count after resume = %s, want 2", got)
	}
	if got := ask(t, resumed, read); got != "before" {
		t.Errorf("disk after resume = %q, want before", got)
	}
	if saved, err := m.Saved(again); err != nil || saved.Memory {
		t.Errorf("Saved of a sandbox that went on = %+v, %v, want its memory used up", saved, err)
	}
	ask(t, resumed, write+" after")

	// Without memory: it boots from its disk.
	must("suspend without memory", m.Suspend(ctx, again, resumed, false, reached))
	must("destroy", m.Destroy(ctx, again, reached))
	if saved, err := m.Saved(place); err != nil || saved.Memory {
		t.Errorf("Saved() = %+v, %v, want a disk alone", saved, err)
	}
	if log, err := m.Log(place, 4096); err != nil || !strings.Contains(string(log), w.greeting) {
		t.Errorf("Log of a paused sandbox = %q, %v, want what it said while it ran", log, err)
	}
	resumed, err = m.Resume(ctx, place, egress.Policy{}, reached)
	must("resume without memory", err)
	if resumed.Memory() {
		t.Error("resumed with memory that was not saved")
	}
	if got := ask(t, resumed, read); got != "after" {
		t.Errorf("disk after boot = %q, want after", got)
	}
	if got := ask(t, resumed, next); got != "1" {
		t.Errorf("count after boot = %s, want 1", got)
	}

	// A snapshot, and two that are made from it.
	dir := h.dir(t, "root")
	root := filepath.Join(dir, "root")
	must("snapshot", m.Snapshot(ctx, place, resumed, root))
	if got := ask(t, resumed, next); got != "2" {
		t.Errorf("count of the original after its snapshot = %s, want 2", got)
	}
	made := map[*Place]Instance{}
	for slot, id := range map[int]string{7: "ione", 8: "itwo"} {
		p := &Place{ID: id, Dir: filepath.Join(h.dir(t, id), id), Slot: slot, Root: root, CPUs: 1, MemoryMiB: 192, DiskMiB: 64}
		instance, err := m.Start(ctx, *p, egress.Policy{}, reached)
		must("start from snapshot", err)
		must("init", instance.Init(ctx, guest.InitRequest{MergeEnv: true}))
		if got := ask(t, instance, next); got != "2" {
			t.Errorf("count of %s = %s, want 2", id, got)
		}
		if got := ask(t, instance, read); got != "after" {
			t.Errorf("disk of %s = %q, want after", id, got)
		}
		ask(t, instance, write+" "+id)
		made[p] = instance
	}
	for p, instance := range made {
		if got := ask(t, instance, read); got != p.ID {
			t.Errorf("disk of %s = %q in the end, want its own", p.ID, got)
		}
		must("destroy", m.Destroy(ctx, *p, reached))
	}
	h.finish(t, m, place)
}

func mustOf(t *testing.T) func(what string, err error) {
	return func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// bake makes what is in root a template with a snapshot. It returns what was said meanwhile.
func (h *vmHost) bake(t *testing.T, root string, manifest image.Manifest) (said []string) {
	t.Helper()
	m := h.machine(t)
	if err := m.Bake(t.Context(), root, &manifest, func(s string) { said = append(said, s) }); err != nil {
		t.Fatalf("bake: %v", err)
	}
	if len(manifest.More) != 1 {
		t.Errorf("Bake added %+v", manifest.More)
	}
	h.wantClean(t, m)
	text, err := json.Marshal(manifest)
	if err == nil {
		err = os.WriteFile(filepath.Join(root, "manifest.json"), text, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return said
}

// testWarm bakes a template and makes sandboxes of it.
func (h *vmHost) testWarm(t *testing.T) {
	ctx := t.Context()
	must := mustOf(t)
	root := filepath.Join(h.state, "baked")
	writeTemplate(t, root)
	manifest := image.Manifest{
		Version: 1, Name: "baked", Tag: "default", Build: "b", CPUs: 1, MemoryMiB: 192, DiskMiB: 64, StartCmd: "next", ReadyCmd: "write baked",
		Config: image.Config{Env: []string{"IMAGE=yes", "A=image"}},
	}
	said := h.bake(t, root, manifest)
	if len(said) < 3 {
		t.Errorf("Bake said %q", said)
	}
	m := h.machine(t)
	must("setup", m.Setup(ctx))
	defer func() {
		must("close", m.Close(context.WithoutCancel(ctx)))
		h.wantClean(t, m)
	}()
	start := func(id string, slot int) (Place, Instance) {
		p := Place{ID: id, Dir: filepath.Join(h.dir(t, id), id), Slot: slot, Root: root, CPUs: 1, MemoryMiB: 192, DiskMiB: 64}
		must("prepare", m.Prepare(ctx, slot))
		instance, err := m.Start(ctx, p, egress.Policy{}, func(Step) {})
		must("start", err)
		must("init", instance.Init(ctx, guest.InitRequest{EnvVars: map[string]string{"A": id}, MergeEnv: true}))
		return p, instance
	}
	macs := map[string]bool{}
	for slot, id := range []string{"ia", "ib", "ic"} {
		p, instance := start(id, slot)
		state := agentState(t, instance)
		if state.Count != 1 || state.Inits != 1 || state.Env["IMAGE"] != "yes" || state.Env["A"] != id {
			t.Errorf("guest of %s after init: %+v, want the start command's count, the image's environment and the caller's over it", id, state)
		}
		if macs[state.MAC] || state.MAC == "" {
			t.Errorf("hardware address %q of %s is not its own", state.MAC, id)
		}
		macs[state.MAC] = true
		if got := ask(t, instance, "read"); got != "baked" {
			t.Errorf("disk of %s = %q, want baked", id, got)
		}
		ask(t, instance, "write "+id)
		must("destroy", m.Destroy(ctx, p, func(Step) {}))
	}
	if got := m.stats.restores.Get(); got != 3 {
		t.Errorf("%d restores, want 3", got)
	}
	if got := m.layers.made.Get(); got != 1 {
		t.Errorf("%d writable layers were made while a create waited, want 1: the first", got)
	}

	// Made elsewhere: it boots, and its start command runs anew.
	m.cpu = "another"
	p, instance := start("id", 4)
	if state := agentState(t, instance); state.Count != 1 || m.stats.coldBoots.Get() != 1 {
		t.Errorf("guest after a cold boot: %+v, %d cold boots, want the start command's count", state, m.stats.coldBoots.Get())
	}
	must("destroy", m.Destroy(ctx, p, func(Step) {}))
}

// testTorn damages what was saved: it is refused in words, and the disk is kept.
func (h *vmHost) testTorn(t *testing.T) {
	ctx := t.Context()
	must := mustOf(t)
	m := h.machine(t)
	must("setup", m.Setup(ctx))
	ignore := func(Step) {}
	place := Place{ID: "itorn", Dir: filepath.Join(h.dir(t, "itorn"), "itorn"), Slot: 1, Root: h.template, CPUs: 1, MemoryMiB: 192, DiskMiB: 64}
	instance, err := m.Start(ctx, place, egress.Policy{}, ignore)
	must("start", err)
	must("init", instance.Init(ctx, guest.InitRequest{MergeEnv: true}))
	ask(t, instance, "write kept")
	must("suspend", m.Suspend(ctx, place, instance, true, ignore))
	must("destroy", m.Destroy(ctx, place, ignore))
	memory := filepath.Join(place.Dir, vmSavedName, "memory-ranges")
	whole, err := os.ReadFile(memory)
	must("read memory", err)
	for what, damage := range map[string]func() error{
		"truncated": func() error { return os.Truncate(memory, 4096) },
		"rotten":    func() error { return os.WriteFile(memory, append([]byte("rot"), whole[3:]...), 0o600) },
		"missing":   func() error { return os.Remove(memory) },
	} {
		must("chmod", os.Chmod(memory, 0o644))
		must("damage", damage())
		m.mu.Lock()
		clear(m.verified) // as after a restart
		m.mu.Unlock()
		_, err := m.Resume(ctx, place, egress.Policy{}, ignore)
		if errs.CodeOf(err) != errs.Unavailable || !strings.Contains(err.Error(), "disk is kept") {
			t.Errorf("Resume of %s memory = %v, want one that says that the disk is kept", what, err)
		}
		must("destroy", m.Destroy(ctx, place, ignore))
		must("repair", os.WriteFile(memory, whole, 0o644))
	}
	must("drop memory", m.DropMemory(place))
	resumed, err := m.Resume(ctx, place, egress.Policy{}, ignore)
	must("resume without memory", err)
	if got := ask(t, resumed, "read"); got != "kept" || resumed.Memory() {
		t.Errorf("disk = %q, memory %v, want kept and none", got, resumed.Memory())
	}
	h.finish(t, m, place)
}
