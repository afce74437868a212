package vmm_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

// TestRealWithLandlock takes a VM through every call with all fences up. Its guest need not get anywhere: so this runs also where /dev/kvm
// makes VMs that do not run, under a kernel newer than the nested host's.
func TestRealWithLandlock(t *testing.T) {
	if _, err := lab.FindVMM(); err != nil {
		t.Skip(err)
	}
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		t.Skip(err)
	} else {
		f.Close()
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h := realHost(t)
	if !h.Launcher.Landlock() {
		t.Skip("the kernel has no landlock of version 3 or newer")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	b := h.NewBox(t)
	b.Start(ctx)
	if err := b.VM.Boot(ctx, h.Shape(), b.Tap); err != nil {
		t.Fatalf("Boot: %v", err)
	}
	if err := b.VM.API.Pause(ctx); err != nil {
		t.Fatalf("Pause: %v", err)
	}
	snapshots, err := vmm.OpenSnapshots(filepath.Join(filepath.Dir(b.Spec.Dir), "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	draft, err := snapshots.Begin("one")
	if err != nil {
		t.Fatal(err)
	}
	err = b.VM.Snapshot(ctx, draft)
	if refusal, ok := errors.AsType[*vmm.APIError](err); ok && strings.Contains(refusal.Error(), "Could not get vCPU state") {
		t.Skipf("shown up to the snapshot: the KVM here cannot save a processor (%v)", refusal)
	}
	if err != nil {
		t.Fatalf("Snapshot: %v", err)
	}
	snap, err := draft.Commit(ctx, "test", nil)
	if err != nil {
		t.Fatalf("Commit: %v", err)
	}
	for _, mode := range []vmm.RestoreMode{vmm.RestoreOnDemand, vmm.RestoreCopy} {
		r := h.NewBox(t)
		r.Spec.Snapshot = snap.Dir
		r.Start(ctx)
		if err := r.VM.Restore(ctx, mode, r.Tap); err != nil {
			t.Fatalf("Restore %s: %v", mode, err)
		}
		if info, err := r.VM.API.Info(ctx); err != nil || info.State != vmm.StateRunning || !info.Config.Landlock {
			t.Errorf("Info = %+v, %v", info, err)
		}
	}
}
