package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"

	"golang.org/x/sys/unix"
)

// Boot makes the VM and starts it from its kernel. tap may be nil: then the VM has no network. The descriptor is copied.
func (vm *VM) Boot(ctx context.Context, shape Shape, tap *os.File) error {
	c, err := Config(vm.spec, shape)
	if err != nil {
		return err
	}
	if err := vm.API.Create(ctx, c); err != nil {
		return vm.because(err)
	}
	if tap != nil {
		// vm.create takes no descriptors; a card that is added before the boot is there from its beginning.
		if err := vm.API.AddNet(ctx, netConfig(shape), tap); err != nil {
			return vm.because(err)
		}
	}
	return vm.because(vm.API.Boot(ctx))
}

// Restore makes the VM from Spec.Snapshot and lets it run. tap must be given exactly if the VM had one when the snapshot was taken.
func (vm *VM) Restore(ctx context.Context, mode RestoreMode, tap *os.File) error {
	return vm.restore(ctx, mode, true, tap)
}

// RestorePaused is Restore up to the VM's first instruction.
func (vm *VM) RestorePaused(ctx context.Context, mode RestoreMode, tap *os.File) error {
	return vm.restore(ctx, mode, false, tap)
}

func (vm *VM) restore(ctx context.Context, mode RestoreMode, resume bool, tap *os.File) error {
	if vm.spec.Snapshot == "" {
		return errs.New(errs.Invalid, "the VM has no snapshot to be restored from")
	}
	return vm.because(vm.API.restore(ctx, insideSnapshot, mode, resume, tap))
}

// Snapshot writes the VM, which must be paused, into draft. After an error the draft holds nothing that could be mistaken for a snapshot;
// the VM is paused still and can be resumed. A VM that was restored on demand has to be all there first: Snapshot waits for it.
func (vm *VM) Snapshot(ctx context.Context, draft *Draft) error {
	r, err := os.OpenRoot(vm.spec.outDir())
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	defer r.Close()
	for _, left := range leftBehind(r) { // by a process of ours that was killed in a Snapshot
		discard(r, left)
	}
	// Nothing tells when the memory is there but the attempt itself.
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		err := vm.snapshotOnce(ctx, r, draft)
		if !stillRestoring(err) {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("wait for the memory of an earlier snapshot: %w", context.Cause(ctx))
		}
	}
}

// leftBehind names what is in a directory, no more of it than an honest hypervisor could have been told to write.
func leftBehind(out *os.Root) []string {
	dir, err := out.Open(".")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(maxTaken)
	return names
}

// stillRestoring knows the refusal by its words: its status says nothing, and no call tells whether the memory is there.
func stillRestoring(err error) bool {
	refusal, ok := errors.AsType[*APIError](err)
	return ok && slices.ContainsFunc(refusal.Chain, func(s string) bool { return strings.Contains(s, "restore is still in progress") })
}

// noSpace knows a full disk by the words of the system, which are all that a refusal tells of it.
func noSpace(err error) error {
	refusal, ok := errors.AsType[*APIError](err)
	full := func(s string) bool { return strings.Contains(strings.ToLower(s), "no space left on device") }
	if !ok || !slices.ContainsFunc(refusal.Chain, full) {
		return err
	}
	return diskError("snapshot", fmt.Errorf("%w: %w", unix.ENOSPC, refusal))
}

func (vm *VM) snapshotOnce(ctx context.Context, out *os.Root, draft *Draft) error {
	name := "s" + randomName()
	if err := out.Mkdir(name, 0o700); err != nil {
		return diskError("snapshot", err)
	}
	defer discard(out, name)
	if err := out.Lchown(name, int(vm.spec.UID), int(vm.spec.UID)); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if err := vm.API.snapshot(ctx, insideOut+"/"+name); err != nil {
		return vm.because(noSpace(err))
	}
	if err := draft.take(ctx, out, name); err != nil {
		return fmt.Errorf("take the snapshot: %w", err)
	}
	return nil
}

// because adds to the failure of a call that the hypervisor has died of it: that says more than a connection that broke.
func (vm *VM) because(err error) error {
	if err == nil {
		return nil
	}
	if errs.CodeOf(err) != errs.Unavailable {
		return err
	}
	// A broken connection comes a moment before the end of the process.
	if vm.endsSoon() {
		return &errs.Error{Code: errs.Unavailable, Msg: "the hypervisor has ended", Err: fmt.Errorf("%w: %w", err, vm.Err())}
	}
	return err
}
