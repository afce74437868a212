package sandboxd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

const (
	// keepsTime bounds what must be said to a guest after a caller has gone.
	keepsTime = 30 * time.Second
	// thawTime bounds how long a hypervisor is asked to let its VM go on. It may still be writing what nobody waits for any more.
	thawTime = 2 * time.Minute
	// thawPause is what lies between the first two times that it is asked.
	thawPause = 100 * time.Millisecond
)

// Suspend implements Suspender. With memory the snapshot becomes whole in one rename, and the disk is on the disk before it: what is
// restored later finds the disk that it remembers. Without, the guest writes out what it has.
func (m *VMMachine) Suspend(ctx context.Context, p Place, i Instance, memory bool, reached func(Step)) error {
	s := i.(*vmSandbox)
	snapshots, err := vmm.OpenSnapshots(p.Dir)
	if err != nil {
		return err
	}
	// Of whatever kind this pause is: no older memory may be taken for its own.
	if err := errors.Join(snapshots.Remove(vmSavedName), ignoreAbsent(os.Remove(filepath.Join(p.Dir, vmDiskOnlyName)))); err != nil {
		return fmt.Errorf("remove what an earlier pause left: %w", err)
	}
	if memory {
		err = m.suspendMemory(ctx, s, snapshots, reached)
	} else {
		err = m.suspendDisk(ctx, s, reached)
	}
	if err != nil {
		return err
	}
	if err := s.vm.Kill(ctx); err != nil {
		m.log.Warn("hypervisor of a saved sandbox not ended, will be tried again", zap.String("sandbox", p.ID), zap.Error(err))
	}
	m.keepConsole(s)
	reached(StepSaved)
	return nil
}

func (m *VMMachine) suspendMemory(ctx context.Context, s *vmSandbox, snapshots *vmm.Snapshots, reached func(Step)) (err error) {
	draft, err := snapshots.Begin(vmSavedName)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, draft.Abort(), s.goOn(ctx))
		}
	}()
	if err := s.vm.API.Pause(ctx); err != nil {
		return fmt.Errorf("pause: %w", err)
	}
	reached(StepFrozen)
	if err := s.vm.Snapshot(ctx, draft); err != nil {
		return err
	}
	if err := syncPath(filepath.Join(s.place.Dir, vmDiskName)); err != nil {
		return fmt.Errorf("sync disk: %w", err)
	}
	saved, err := draft.Commit(ctx, m.version, m.labels())
	if err != nil {
		return err
	}
	m.trust(saved.Manifest)
	return nil
}

func (m *VMMachine) suspendDisk(ctx context.Context, s *vmSandbox, reached func(Step)) error {
	if err := s.guest.Sync(ctx); err != nil {
		return fmt.Errorf("sync guest: %w", err)
	}
	if err := s.vm.API.Pause(ctx); err != nil {
		return errors.Join(fmt.Errorf("pause: %w", err), s.goOn(ctx))
	}
	reached(StepFrozen)
	err := syncPath(filepath.Join(s.place.Dir, vmDiskName))
	if err == nil {
		err = m.markDiskOnly(s.place)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("sync disk: %w", err), s.goOn(ctx))
	}
	return nil
}

// markDiskOnly says that the disk is all that there is of a paused sandbox.
func (m *VMMachine) markDiskOnly(p Place) error {
	if err := os.WriteFile(filepath.Join(p.Dir, vmDiskOnlyName), nil, 0o600); err != nil {
		return diskFull("mark disk as saved", err)
	}
	return syncDir(p.Dir)
}

// goOn lets a VM run that was stopped for something that failed or is done. Its guest has missed some time and nothing else. Whoever cancels
// wants the VM gone, and not to wait for it.
func (s *vmSandbox) goOn(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil
	}
	thaw, cancel := outlast(ctx, thawTime)
	defer cancel()
	if err := s.insist(thaw); err != nil {
		return fmt.Errorf("let the VM go on: %w", err)
	}
	ctx, cancelTell := context.WithTimeout(thaw, keepsTime)
	defer cancelTell()
	if err := s.guest.Resume(ctx, guest.ResumeRequest{Timestamp: time.Now(), KeepConnections: true}); err != nil {
		return fmt.Errorf("tell the guest that time has passed: %w", err)
	}
	return nil
}

// outlast returns a context that ends when the caller cancels or after limit, and not at the caller's deadline.
func outlast(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	stop := context.AfterFunc(ctx, func() {
		if errors.Is(ctx.Err(), context.Canceled) {
			cancel()
		}
	})
	return longer, func() { stop(); cancel() }
}

// insist is unfreeze until that succeeds: nobody else comes back to a VM that stands still.
func (s *vmSandbox) insist(ctx context.Context) error {
	for pause := thawPause; ; pause = min(2*pause, 10*thawPause) {
		err := s.unfreeze(ctx)
		if err == nil {
			return nil
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
			continue
		case <-s.vm.Done():
			err = errors.Join(err, s.vm.Err())
		case <-ctx.Done():
		}
		timer.Stop()
		return err
	}
}

// unfreeze lets a VM run that stands still; one that runs is none the worse.
func (s *vmSandbox) unfreeze(ctx context.Context) error {
	info, err := s.vm.API.Info(ctx)
	if err != nil {
		return err
	}
	if info.State != vmm.StatePaused {
		return nil
	}
	return s.vm.API.Resume(ctx)
}

// keepConsole keeps the end of the console beyond the end of the hypervisor. Losing it loses nothing of the sandbox.
func (m *VMMachine) keepConsole(s *vmSandbox) {
	text, err := m.Log(s.place, logKept)
	if err == nil {
		_ = os.WriteFile(filepath.Join(s.place.Dir, vmConsoleName), text, 0o600)
	}
}

// Saved implements Suspender.
func (m *VMMachine) Saved(p Place) (Saved, error) {
	saved := Saved{Memory: true}
	_, err := os.Lstat(filepath.Join(p.Dir, vmSavedName))
	if errors.Is(err, fs.ErrNotExist) {
		saved.Memory = false
		_, err = os.Lstat(filepath.Join(p.Dir, vmDiskOnlyName))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return Saved{}, errs.New(errs.NotFound, "nothing was saved of the sandbox")
	}
	if err != nil {
		return Saved{}, fmt.Errorf("look for what was saved: %w", err)
	}
	for _, name := range []string{vmSavedName, vmDiskName} { // and not what it has in common with its template
		n, err := vmm.Usage(filepath.Join(p.Dir, name))
		if err != nil {
			return Saved{}, fmt.Errorf("measure what was saved: %w", err)
		}
		saved.Bytes += n
	}
	if saved.Memory {
		if _, err := openSaved(p); err != nil {
			return Saved{}, err
		}
	}
	return saved, nil
}

func openSaved(p Place) (vmm.Snapshot, error) {
	snapshots, err := vmm.OpenSnapshots(p.Dir)
	if err != nil {
		return vmm.Snapshot{}, err
	}
	saved, err := snapshots.Open(vmSavedName)
	if err != nil {
		return vmm.Snapshot{}, damaged(err)
	}
	return saved, nil
}

// DropMemory implements Suspender.
func (m *VMMachine) DropMemory(p Place) error {
	if err := m.markDiskOnly(p); err != nil {
		return err
	}
	snapshots, err := vmm.OpenSnapshots(p.Dir)
	if err != nil {
		return err
	}
	return snapshots.Remove(vmSavedName)
}

// Resume implements Suspender.
func (m *VMMachine) Resume(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (Suspended, error) {
	saved, err := m.Saved(p)
	if err != nil {
		return nil, err
	}
	if saved.Memory {
		snapshot, err := openSaved(p)
		if err != nil {
			return nil, err
		}
		if err := m.fits(snapshot.Manifest); err != nil {
			return nil, &errs.Error{Code: errs.Unavailable, Err: err,
				Msg: "the saved memory of the sandbox does not fit this node (" + reasonOf(err) + "); its disk does: resume it without memory"}
		}
		if err := m.verifyOnce(ctx, snapshot.Dir, snapshot.Manifest); ctx.Err() != nil {
			return nil, ctx.Err()
		} else if err != nil {
			return nil, damaged(err)
		}
	}
	s, err := m.enter(ctx, p, fence, reached)
	if err != nil {
		return nil, err
	}
	reached(StepLayer)
	if saved.Memory {
		if err := s.restore(ctx, filepath.Join(p.Dir, vmSavedName), (*vmm.VM).RestorePaused, reached); err != nil {
			return nil, err
		}
		reached(StepStarted)
		return s, nil
	}
	if err := s.boot(ctx, reached); err != nil {
		return nil, err
	}
	m.stats.coldBoots.Inc()
	if err := s.Health(ctx); err != nil {
		return nil, fmt.Errorf("wait for guest: %w", errors.Join(err, s.vm.Err()))
	}
	reached(StepStarted)
	return s, nil
}

// Memory implements Suspended.
func (s *vmSandbox) Memory() bool { return s.memory }

// Continue implements Suspended. The saved memory is given up before the guest's first instruction: from there on its disk changes, and the
// memory would not fit it any more. The hypervisor has its files open and reads them to the end. The mark on the disk stays until the next
// pause: should all of this host die before the record says running, there is a sandbox without memory. A hypervisor that does not answer,
// or has died since it restored the VM, costs no memory.
func (s *vmSandbox) Continue(ctx context.Context, r guest.ResumeRequest) error {
	if _, err := s.vm.API.Info(ctx); err != nil {
		return fmt.Errorf("look at the VM that is to run: %w", err)
	}
	if err := s.machine.DropMemory(s.place); err != nil {
		return err
	}
	if err := s.insist(ctx); err != nil {
		return fmt.Errorf("let the VM run: %w", err)
	}
	if err := s.guest.Resume(ctx, r); err != nil {
		return fmt.Errorf("%w: %w", errUntold, err)
	}
	return nil
}

// Snapshot implements Suspender. The VM stands still while its memory is written and its disk copied; the sums are made when it runs again.
func (m *VMMachine) Snapshot(ctx context.Context, p Place, i Instance, dir string) error {
	s := i.(*vmSandbox)
	for _, name := range []string{vmRootName, vmKernelName, vmInitramfsName} {
		if err := os.Link(filepath.Join(p.Dir, name), filepath.Join(dir, name)); err != nil {
			return diskFull("link "+name, err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // VMs have users of their own; what is in it has modes of its own
		return fmt.Errorf("open snapshot to VMs: %w", err)
	}
	return m.copyVM(ctx, s, dir)
}

// copyVM writes a snapshot of a running VM with its disk into dir.
func (m *VMMachine) copyVM(ctx context.Context, s *vmSandbox, dir string) (err error) {
	snapshots, err := vmm.OpenSnapshots(dir)
	if err != nil {
		return err
	}
	draft, err := snapshots.Begin(snapshotName)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, draft.Abort())
		}
	}()
	err = s.vm.API.Pause(ctx)
	if err == nil {
		err = s.vm.Snapshot(ctx, draft)
	}
	if err == nil {
		err = draft.CopyIn(ctx, vmDiskName, filepath.Join(s.place.Dir, vmDiskName))
	}
	if err = errors.Join(err, s.goOn(ctx)); err != nil {
		return err
	}
	made, err := draft.Commit(ctx, m.version, m.labels())
	if err != nil {
		return err
	}
	m.trust(made.Manifest)
	return nil
}

// syncPath makes a file's content safe on the disk. It waits for nothing that the file's owner, a VM's user, may have put there: a pipe, or a
// lease (fcntl(2)).
func syncPath(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
