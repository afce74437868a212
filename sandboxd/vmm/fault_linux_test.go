package vmm_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
	"github.com/sluice-edge/sluice/sandboxd/vmm/vmmtest"
)

// faultHost is the fake with little patience on our side.
func faultHost(t *testing.T, patience time.Duration) vmmtest.Host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: run the tests as root, or in a privileged container")
	}
	h := fakeHost(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if h.Launcher, err = vmm.New(vmm.Options{Binary: self, CallTimeout: patience, SlowTimeout: patience}); err != nil {
		t.Fatal(err)
	}
	return h
}

// steps is a VM's life, call by call.
func steps(t *testing.T, b *vmmtest.Box) []struct {
	call string
	do   func(ctx context.Context) error
} {
	snapshots, err := vmm.OpenSnapshots(filepath.Join(filepath.Dir(b.Spec.Dir), "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	info := func(ctx context.Context) error { _, err := b.VM.API.Info(ctx); return err }
	boot := func(ctx context.Context) error { return b.VM.Boot(ctx, vmmtest.Shape(), b.Tap) }
	return []struct {
		call string
		do   func(ctx context.Context) error
	}{
		{"vmm.ping", func(ctx context.Context) error { _, err := b.VM.API.Ping(ctx); return err }},
		{"vm.create", boot}, {"vm.add-net", nil}, {"vm.boot", nil}, // three calls of one step
		{"vm.info", info},
		{"vm.counters", func(ctx context.Context) error { _, err := b.VM.API.Counters(ctx); return err }},
		{"vm.pause", func(ctx context.Context) error { return b.VM.API.Pause(ctx) }},
		{"vm.snapshot", func(ctx context.Context) error {
			draft, err := snapshots.Begin("one")
			if err != nil {
				return err
			}
			out := filepath.Join(b.Spec.Dir, "out")
			old := filepath.Join(out, "s0123456789abcdef") // of a process that was killed while the hypervisor wrote
			if err := errors.Join(os.MkdirAll(old, 0o700), os.WriteFile(filepath.Join(old, "memory"), []byte("old"), 0o600)); err != nil {
				t.Error(err)
			}
			err = b.VM.Snapshot(ctx, draft)
			if left, lerr := os.ReadDir(out); lerr != nil || len(left) > 0 {
				t.Errorf("a snapshot leaves %v where it was written, %v", left, lerr)
			}
			if err != nil {
				if left, lerr := os.ReadDir(draft.Dir()); lerr != nil || len(left) > 0 {
					t.Errorf("a snapshot that failed leaves %v in its draft, %v", left, lerr)
				}
				return errors.Join(err, draft.Abort())
			}
			_, err = draft.Commit(ctx, "fake", nil)
			return err
		}},
		{"vm.resume", func(ctx context.Context) error { return b.VM.API.Resume(ctx) }},
	}
}

// TestFaults has the fake go wrong in every way at every call. Each is an error that names the call, and the VM can be destroyed.
func TestFaults(t *testing.T) {
	answered := map[string]bool{"vmm.ping": true, "vm.info": true, "vm.counters": true} // calls whose answer we read
	for _, fault := range []vmmtest.Fault{
		vmmtest.Slow, vmmtest.Hang, vmmtest.Refuse, vmmtest.Die, vmmtest.DieAfter, vmmtest.Garbage, vmmtest.Half, vmmtest.Huge,
	} {
		t.Run(string(fault), func(t *testing.T) {
			h := faultHost(t, 20*time.Second)
			for i, step := range steps(t, h.NewBox(t)) {
				t.Run(step.call, func(t *testing.T) {
					h := h
					h.Kernel = filepath.Join(t.TempDir(), "kernel")
					if err := vmmtest.WriteKernel(h.Kernel, vmmtest.Faults{Calls: map[string]vmmtest.Fault{step.call: fault}}); err != nil {
						t.Fatal(err)
					}
					b := h.NewBox(t)
					ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
					defer cancel()
					b.Start(ctx)
					life := steps(t, b)
					first := i
					for life[first].do == nil {
						first--
					}
					if err := until(ctx, life[:first]); err != nil {
						t.Fatalf("before the fault: %v", err)
					}
					if fault == vmmtest.Hang { // our patience ends soon, and only with the call that hangs
						b.VM.API = vmm.NewClient(filepath.Join(b.Spec.Dir, "api.sock"), vmm.Options{CallTimeout: time.Second, SlowTimeout: time.Second})
					}
					err := until(ctx, life[first:i+1])
					// A call whose answer is of no interest may be answered by rubbish.
					harmless := fault == vmmtest.Slow || fault == vmmtest.Garbage && !answered[step.call]
					switch {
					case harmless && err != nil:
						t.Errorf("%v", err)
					case harmless:
					case err == nil:
						t.Error("no error")
					case !strings.Contains(err.Error(), step.call):
						t.Errorf("the error does not name the call: %v", err)
					}
					wantMeaning(t, fault, err, b)
				})
			}
		})
	}
}

func until(ctx context.Context, steps []struct {
	call string
	do   func(ctx context.Context) error
}) error {
	for _, s := range steps {
		if s.do == nil {
			continue
		}
		if err := s.do(ctx); err != nil {
			return err
		}
	}
	return nil
}

func wantMeaning(t *testing.T, fault vmmtest.Fault, err error, b *vmmtest.Box) {
	t.Helper()
	switch fault {
	case vmmtest.Hang:
		if errs.CodeOf(err) != errs.Unavailable || !strings.Contains(err.Error(), "within") {
			t.Errorf("%v, want Unavailable and how long it took", err)
		}
	case vmmtest.Refuse:
		refusal, ok := errors.AsType[*vmm.APIError](err)
		if !ok || !strings.Contains(refusal.Error(), "told to refuse") {
			t.Errorf("%v, want the refusal's own words", err)
		}
	case vmmtest.Die, vmmtest.DieAfter:
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if ended := b.Ended(ctx); !strings.Contains(ended.Error(), "exited with status 1") || !strings.Contains(ended.Error(), "told to die") {
			t.Errorf("Err = %v, want its last words", ended)
		}
	}
}

// TestOldStatus: a hypervisor that answers 500 to everything is understood as well.
func TestOldStatus(t *testing.T) {
	for _, old := range []bool{false, true} {
		h := faultHost(t, 20*time.Second)
		if err := vmmtest.WriteKernel(h.Kernel, vmmtest.Faults{Old: old}); err != nil {
			t.Fatal(err)
		}
		b := h.NewBox(t)
		b.Start(t.Context())
		_, err := b.VM.API.Info(t.Context())
		refusal, ok := errors.AsType[*vmm.APIError](err)
		if !ok || !strings.Contains(refusal.Error(), "not created") {
			t.Errorf("old %v: %v", old, err)
		}
		if want := map[bool]errs.Code{false: errs.NotFound, true: errs.Internal}[old]; errs.CodeOf(err) != want {
			t.Errorf("old %v: %v, want %v", old, errs.CodeOf(err), want)
		}
	}
}

// TestShutdownThatBreaksOff: the hypervisor may be gone before its answer is out.
func TestShutdownThatBreaksOff(t *testing.T) {
	h := faultHost(t, 20*time.Second)
	if err := vmmtest.WriteKernel(h.Kernel, vmmtest.Faults{Calls: map[string]vmmtest.Fault{"vmm.shutdown": vmmtest.DieAfter}}); err != nil {
		t.Fatal(err)
	}
	b := h.NewBox(t)
	b.Start(t.Context())
	if err := b.VM.API.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	_ = b.Ended(t.Context())
	if err := b.VM.API.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown of what is gone: %v", err)
	}
}

// TestRestoreFaults: a restore that goes wrong says so and leaves its snapshot as it was.
func TestRestoreFaults(t *testing.T) {
	h := faultHost(t, 20*time.Second)
	b := h.NewBox(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	b.Start(ctx)
	if err := until(ctx, steps(t, b)); err != nil {
		t.Fatal(err)
	}
	snapshots, err := vmm.OpenSnapshots(filepath.Join(filepath.Dir(b.Spec.Dir), "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	snap, err := snapshots.Open("one")
	if err != nil {
		t.Fatal(err)
	}
	for _, fault := range []vmmtest.Fault{vmmtest.Refuse, vmmtest.Die, vmmtest.DieAfter, vmmtest.Half} {
		h := h
		h.Kernel = filepath.Join(t.TempDir(), "kernel")
		if err := vmmtest.WriteKernel(h.Kernel, vmmtest.Faults{Calls: map[string]vmmtest.Fault{"vm.restore": fault}}); err != nil {
			t.Fatal(err)
		}
		r := h.NewBox(t)
		r.Spec.Snapshot = snap.Dir
		r.Start(ctx)
		if err := r.VM.Restore(ctx, vmm.RestoreCopy, r.Tap); err == nil || !strings.Contains(err.Error(), "vm.restore") {
			t.Errorf("%s: %v, want an error that names the call", fault, err)
		}
	}
	if err := snapshots.Verify(ctx, "one"); err != nil {
		t.Errorf("Verify: %v", err)
	}
	// The tap is part of the VM: without it the restore is refused, not half done.
	r := h.NewBox(t)
	r.Spec.Snapshot = snap.Dir
	r.Start(ctx)
	if err := r.VM.Restore(ctx, vmm.RestoreCopy, nil); err == nil {
		t.Error("Restore without its tap succeeds")
	}
	if err := r.VM.Restore(ctx, vmm.RestoreCopy, r.Tap); err != nil {
		t.Errorf("Restore after a refused one: %v", err)
	}
	plain := h.NewBox(t)
	plain.Start(ctx)
	if err := plain.VM.Restore(ctx, vmm.RestoreCopy, plain.Tap); errs.CodeOf(err) != errs.Invalid {
		t.Errorf("Restore without a snapshot: %v, want Invalid", err)
	}
}

// TestProbe asks the fake, and programs that are none.
func TestProbe(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if v, err := vmm.Probe(t.Context(), self); err != nil || v.String() != vmmtest.FakeVersion {
		t.Errorf("Probe = %v, %v, want %s", v, err, vmmtest.FakeVersion)
	}
	for _, program := range []string{"/nonexistent", "/bin/true", "/bin/false", t.TempDir()} {
		if v, err := vmm.Probe(t.Context(), program); errs.CodeOf(err) != errs.Unavailable {
			t.Errorf("Probe(%s) = %v, %v, want Unavailable", program, v, err)
		}
	}
	if _, err := vmm.Find("/nonexistent"); errs.CodeOf(err) != errs.Unavailable {
		t.Errorf("Find: %v, want Unavailable", err)
	}
	if _, err := vmm.New(vmm.Options{Binary: "cloud-hypervisor"}); errs.CodeOf(err) != errs.Invalid {
		t.Errorf("New with a relative path: %v, want Invalid", err)
	}
}

// TestStartLeavesNothing: a start that fails halfway leaves no process, mount or thread in another namespace.
func TestStartLeavesNothing(t *testing.T) {
	h := faultHost(t, 20*time.Second)
	before := mountNamespaces(t)
	for _, edit := range []func(*vmm.Spec){
		func(s *vmm.Spec) { s.NetNS = "/dev/null" },
		func(s *vmm.Spec) { s.Root = "/nonexistent" },
		func(s *vmm.Spec) { s.Cgroups = []string{"/nonexistent"} },
		func(s *vmm.Spec) { s.Disk = "/nonexistent" },
		func(s *vmm.Spec) { s.Snapshot = "/nonexistent" },
		func(s *vmm.Spec) { s.Kernel = "/" },
	} {
		b := h.NewBox(t)
		edit(&b.Spec)
		if _, err := h.Launcher.Start(t.Context(), b.Spec); err == nil {
			t.Errorf("Start of %+v succeeds", b.Spec)
		} else if errs.CodeOf(err) == errs.Unavailable {
			t.Errorf("Start: %v", err)
		}
	}
	// A thread ends a moment after its goroutine's last word.
	deadline := time.Now().Add(10 * time.Second)
	for mountNamespaces(t) != before && time.Now().Before(deadline) {
		runtime.Gosched()
	}
	if after := mountNamespaces(t); after != before {
		t.Errorf("threads are in mount namespaces %s, before in %s", after, before)
	}
}

func mountNamespaces(t *testing.T) string {
	t.Helper()
	links, err := filepath.Glob("/proc/self/task/*/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, l := range links {
		if ns, err := os.Readlink(l); err == nil {
			seen[ns] = true
		}
	}
	var names []string
	for ns := range seen {
		names = append(names, ns)
	}
	return strings.Join(names, " ")
}
