package sandboxd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
	"github.com/sluice-edge/sluice/sandboxd/vmm/vmmtest"
)

// TestVMFaults is what becomes of a sandbox whose hypervisor does not do what it is asked for, and of one on a full disk.
func TestVMFaults(t *testing.T) {
	if !inside(t) {
		return
	}
	h := newVMHost(t)
	t.Run("ThawedLate", h.testThawedLate)
	t.Run("CancelledIsNotThawed", h.testCancelled)
	t.Run("MemoryOfAMuteHypervisor", h.testMuteHypervisor)
	t.Run("MemoryOfAnEarlierPause", h.testStaleMemory)
	t.Run("AnotherName", h.testAnotherName)
	t.Run("FullDisk", testFullDisk)
}

// fails has the hypervisors of all sandboxes of a template go wrong at a call from here on.
func (h *vmHost) fails(t *testing.T, calls map[string]vmmtest.Fault) {
	t.Helper()
	if err := vmmtest.WriteKernel(filepath.Join(h.template, vmKernelName), vmmtest.Faults{Calls: calls}); err != nil {
		t.Fatal(err)
	}
}

// started is a sandbox that runs, which counts and has a word on its disk.
func (h *vmHost) started(t *testing.T, m *VMMachine, id string, slot int) (Place, Instance) {
	t.Helper()
	must := mustOf(t)
	p := Place{ID: id, Dir: filepath.Join(h.dir(t, id), id), Slot: slot, Root: h.template, CPUs: 1, MemoryMiB: 128, DiskMiB: 64}
	t.Cleanup(func() {
		if t.Failed() { // before it was removed, perhaps
			if err := errors.Join(m.Destroy(context.Background(), p, func(Step) {}), m.Close(context.Background())); err != nil {
				t.Errorf("remove what a failed test left: %v", err)
			}
		}
	})
	instance, err := m.Start(t.Context(), p, egress.Policy{}, func(Step) {})
	must("start", err)
	must("init", instance.Init(t.Context(), guest.InitRequest{MergeEnv: true}))
	ask(t, instance, "next")
	ask(t, instance, "write word")
	return p, instance
}

// testThawedLate: a pause failed while the hypervisor still wrote, and it was asked once to let its VM go on. It stood still for ever, and
// the node said that it runs.
func (h *vmHost) testThawedLate(t *testing.T) {
	must := mustOf(t)
	m := h.machine(t)
	must("setup", m.Setup(t.Context()))
	p, instance := h.started(t, m, "ilate", 1)
	defer h.fails(t, nil)
	for what, save := range map[string]func(reached func(Step)) error{
		"Suspend": func(reached func(Step)) error { return m.Suspend(t.Context(), p, instance, true, reached) },
		"Snapshot": func(reached func(Step)) error {
			reached(StepFrozen)
			return m.Snapshot(t.Context(), p, instance, filepath.Join(h.dir(t, "root"), "root"))
		},
	} {
		err := save(func(s Step) {
			if s != StepFrozen {
				return
			}
			h.fails(t, map[string]vmmtest.Fault{"vm.snapshot": vmmtest.Refuse, "vm.info": vmmtest.Refuse})
			time.AfterFunc(time.Second, func() { h.fails(t, map[string]vmmtest.Fault{"vm.snapshot": vmmtest.Refuse}) })
		})
		if err == nil {
			t.Fatalf("%s succeeds although the hypervisor refuses", what)
		}
		if info, err := instance.(*vmSandbox).vm.API.Info(t.Context()); err != nil || info.State != vmm.StateRunning {
			t.Fatalf("after a %s that failed the VM is %q, %v, want it to run", what, info.State, err)
		}
		h.fails(t, nil)
	}
	if got := ask(t, instance, "next"); got != "2" {
		t.Errorf("it counts %s, want 2", got)
	}
	h.finish(t, m, p)
}

// testCancelled: a kill in a pause waited until the VM that it was about to end had been let go on, and its guest had been told the time.
func (h *vmHost) testCancelled(t *testing.T) {
	must := mustOf(t)
	m := h.machine(t)
	must("setup", m.Setup(t.Context()))
	p, instance := h.started(t, m, "icancelled", 1)
	defer h.fails(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	err := m.Suspend(ctx, p, instance, true, func(s Step) {
		if s == StepFrozen {
			cancel()
		}
	})
	if err == nil {
		t.Fatal("Suspend succeeds although it was cancelled")
	}
	if info, err := instance.(*vmSandbox).vm.API.Info(t.Context()); err != nil || info.State != vmm.StatePaused {
		t.Errorf("the VM is %q, %v, want it as it was when its caller gave up", info.State, err)
	}
	h.finish(t, m, p)
}

// testStaleMemory: memory that a pause had saved before it failed was taken for that of a later pause, which saved the disk alone: an old memory
// went on with a newer disk.
func (h *vmHost) testStaleMemory(t *testing.T) {
	must := mustOf(t)
	m := h.machine(t)
	must("setup", m.Setup(t.Context()))
	p, instance := h.started(t, m, "istale", 1)
	s := instance.(*vmSandbox)
	ask(t, instance, "write old")
	snapshots, err := vmm.OpenSnapshots(p.Dir)
	must("open", err)
	draft, err := snapshots.Begin(vmSavedName)
	must("begin", err)
	must("pause", s.vm.API.Pause(t.Context()))
	must("snapshot", s.vm.Snapshot(t.Context(), draft))
	_, err = draft.Commit(t.Context(), m.version, m.labels())
	must("commit", err)
	must("go on", s.goOn(t.Context()))
	ask(t, instance, "write new")
	must("suspend", m.Suspend(t.Context(), p, instance, false, func(Step) {}))
	if saved, err := m.Saved(p); err != nil || saved.Memory {
		t.Errorf("Saved() = %+v, %v, want the disk alone", saved, err)
	}
	must("destroy", m.Destroy(t.Context(), p, func(Step) {}))
	resumed, err := m.Resume(t.Context(), p, egress.Policy{}, func(Step) {})
	must("resume", err)
	if got := ask(t, resumed, "read"); got != "new" || resumed.Memory() {
		t.Errorf("resumed with memory: %v, and its disk says %q, want new", resumed.Memory(), got)
	}
	h.finish(t, m, p)
}

// testMuteHypervisor: the saved memory was removed before the hypervisor had been looked at. One that had died, or did not answer, cost the
// sandbox its memory although it had not run.
func (h *vmHost) testMuteHypervisor(t *testing.T) {
	must := mustOf(t)
	m := h.machine(t)
	must("setup", m.Setup(t.Context()))
	p, instance := h.started(t, m, "imute", 1)
	defer h.fails(t, nil)
	must("suspend", m.Suspend(t.Context(), p, instance, true, func(Step) {}))
	must("destroy", m.Destroy(t.Context(), p, func(Step) {}))
	m.mu.Lock()
	clear(m.verified) // as after a restart
	m.mu.Unlock()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Resume(gone, p, egress.Policy{}, func(Step) {}); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "damaged") {
		t.Errorf("Resume that was cancelled while the memory is read = %v, want that, and no word of damage", err)
	}
	for _, fault := range []vmmtest.Fault{vmmtest.Refuse, vmmtest.Die, vmmtest.Garbage} {
		resumed, err := m.Resume(t.Context(), p, egress.Policy{}, func(Step) {})
		must("resume", err)
		h.fails(t, map[string]vmmtest.Fault{"vm.info": fault})
		if err := resumed.Continue(t.Context(), guest.ResumeRequest{Timestamp: time.Now()}); err == nil {
			t.Errorf("%s: Continue succeeds", fault)
		}
		if saved, err := m.Saved(p); err != nil || !saved.Memory {
			t.Fatalf("%s: Saved() = %+v, %v, want the memory of what has not run", fault, saved, err)
		}
		h.fails(t, nil)
		must("destroy", m.Destroy(t.Context(), p, func(Step) {}))
	}
	resumed, err := m.Resume(t.Context(), p, egress.Policy{}, func(Step) {})
	must("resume", err)
	must("continue", resumed.Continue(t.Context(), guest.ResumeRequest{Timestamp: time.Now()}))
	if got := ask(t, resumed, "next"); got != "2" {
		t.Errorf("it counts %s, want 2", got)
	}
	h.finish(t, m, p)
}

// testAnotherName: a hypervisor that was taken over called itself something else. After a restart of the node nothing but its cgroup told whose
// it is, and where there was none it lived on, with the network of the next sandbox in its slot.
func (h *vmHost) testAnotherName(t *testing.T) {
	must := mustOf(t)
	m := h.machine(t)
	must("setup", m.Setup(t.Context()))
	p := Place{ID: "iother", Dir: filepath.Join(h.dir(t, "iother"), "iother"), Slot: 1, Root: h.template, CPUs: 1, MemoryMiB: 128, DiskMiB: 64}
	uid := m.host.uid(p.Slot)
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	must("start", cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	must("destroy", m.Destroy(t.Context(), p, func(Step) {}))
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("a process of the slot's user lives on")
		must("kill", cmd.Process.Kill())
	}
	must("close", m.Close(t.Context()))
	h.wantClean(t, m)
}

// testFullDisk fills the disk of a node before everything that needs some. Each says so, loses nothing and leaves nothing.
func testFullDisk(t *testing.T) {
	small, err := os.MkdirTemp("", "slfd-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(small)
	if err := unix.Mount("small", small, "tmpfs", 0, "size=48m"); err != nil {
		t.Skipf("cannot mount a small disk: %v", err)
	}
	defer func() {
		if err := unix.Unmount(small, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	t.Setenv("TMPDIR", small)
	h := newVMHost(t)
	must := mustOf(t)
	m := h.machine(t)
	must("setup", m.Setup(t.Context()))
	full := func(what string, do func() error) {
		t.Helper()
		filler := filepath.Join(small, "filler")
		if err := os.WriteFile(filler, bytes.Repeat([]byte("full"), 16<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("the disk is not full: %v", err)
		}
		before := below(t, h.state)
		err := do()
		if !isFull(err) {
			t.Errorf("%s on a full disk = %v, want one that is about the disk", what, err)
		}
		if code := errs.CodeOf(saveError(err, "Sandbox %q", "x")); code == errs.Internal {
			t.Errorf("%s on a full disk = %v, want more than an internal error", what, err)
		}
		if after := below(t, h.state); after != before {
			t.Errorf("%s on a full disk leaves\n%s\nbefore there was\n%s", what, after, before)
		}
		must("make room", os.Remove(filler))
	}
	must("mkdir", os.Mkdir(filepath.Join(h.state, bakingName), 0o700)) // stays, empty
	p, instance := h.started(t, m, "ifull", 1)
	other := Place{ID: "iother", Dir: filepath.Join(h.dir(t, "iother"), "iother"), Slot: 2, Root: h.template, CPUs: 1, MemoryMiB: 128, DiskMiB: 64}
	full("Start", func() error {
		_, err := m.Start(t.Context(), other, egress.Policy{}, func(Step) {})
		must("destroy", m.Destroy(t.Context(), other, func(Step) {}))
		must("empty", os.RemoveAll(other.Dir))
		return errors.Join(err, os.Mkdir(other.Dir, 0o711))
	})
	full("Suspend", func() error { return m.Suspend(t.Context(), p, instance, true, func(Step) {}) })
	root := filepath.Join(h.dir(t, "root"), "root")
	full("Snapshot", func() error {
		err := m.Snapshot(t.Context(), p, instance, root)
		must("empty", os.RemoveAll(root))
		return errors.Join(err, os.Mkdir(root, 0o711))
	})
	if got := ask(t, instance, "next"); got != "2" {
		t.Errorf("it counts %s after all that, want 2", got)
	}
	must("suspend", m.Suspend(t.Context(), p, instance, true, func(Step) {}))
	must("destroy", m.Destroy(t.Context(), p, func(Step) {}))
	full("Resume", func() error {
		_, err := m.Resume(t.Context(), p, egress.Policy{}, func(Step) {})
		must("destroy", m.Destroy(t.Context(), p, func(Step) {}))
		return err
	})
	resumed, err := m.Resume(t.Context(), p, egress.Policy{}, func(Step) {})
	must("resume", err)
	must("continue", resumed.Continue(t.Context(), guest.ResumeRequest{Timestamp: time.Now()}))
	if got := ask(t, resumed, "next"); got != "3" {
		t.Errorf("it counts %s in the end, want 3", got)
	}
	must("destroy", m.Destroy(t.Context(), p, func(Step) {}))
	must("close", m.Close(t.Context()))
	full("Bake", func() error {
		return h.machine(t).Bake(t.Context(), h.template, &image.Manifest{CPUs: 1, MemoryMiB: 128, DiskMiB: 64}, func(string) {})
	})
	h.wantClean(t, m)
}

// below is what there is below a directory, but for what grows by itself.
func below(t *testing.T, dir string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		fmt.Fprintln(&all, strings.TrimPrefix(path, dir))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}
