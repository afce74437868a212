package sandboxd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/image"
)

const (
	bakeTime    = 10 * time.Minute // until the start command is ready
	readyPause  = 500 * time.Millisecond
	startSettle = time.Second // for a start command about which nothing tells when it is ready
	bakingName  = "baking"    // below StateDir, a directory for each build that boots
)

// Bake boots the template whose files are in dir, runs its start command until it is ready, and leaves a snapshot of that in dir, from
// which every sandbox of the template will be restored. say is told what it is doing. m gets the snapshot's manifest among its files.
//
// It is for a machine of its own: it sets that up before, on a network that no node uses, and takes it down after.
func (m *VMMachine) Bake(ctx context.Context, dir string, manifest *image.Manifest, say func(string)) (err error) {
	if err := m.Setup(ctx); err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyTime)
		defer cancel()
		err = errors.Join(err, m.Close(ctx))
	}()
	if err := m.sweepBaking(ctx); err != nil {
		return err
	}
	var random [8]byte
	rand.Read(random[:]) // never fails
	id := "bake" + hex.EncodeToString(random[:])
	p := Place{
		ID: id, Dir: filepath.Join(m.opts.StateDir, bakingName, id), Slot: 0, Root: dir,
		CPUs: manifest.CPUs, MemoryMiB: manifest.MemoryMiB, DiskMiB: manifest.DiskMiB,
	}
	if err := os.MkdirAll(p.Dir, 0o700); err != nil {
		return diskFull("make directory to boot in", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyTime)
		defer cancel()
		err = errors.Join(err, m.Destroy(ctx, p, func(Step) {}), os.RemoveAll(p.Dir))
	}()
	return m.bake(ctx, p, manifest, say)
}

func (m *VMMachine) bake(ctx context.Context, p Place, manifest *image.Manifest, say func(string)) error {
	say("booting")
	ignore := func(Step) {}
	s, err := m.enter(ctx, p, egress.Policy{AllowInternet: true}, ignore)
	if err != nil {
		return err
	}
	s.image = manifest
	root, err := openRoot(p.Root)
	if err != nil {
		return err
	}
	defer root.close()
	if err := root.linkTo(p.Dir); err != nil {
		return err
	}
	empty, err := m.opts.Templates.Disk(ctx, p.DiskMiB)
	if err != nil {
		return err
	}
	if err := image.CopyDisk(filepath.Join(p.Dir, vmDiskName), empty); err != nil {
		return diskFull("copy writable layer", err)
	}
	if err := s.boot(ctx, ignore); err != nil {
		return err
	}
	if err := s.guest.Health(ctx); err != nil {
		return fmt.Errorf("wait for guest: %w", errors.Join(err, s.vm.Err()))
	}
	if err := s.runStartCommand(ctx, say); err != nil {
		return fmt.Errorf("%w%s", err, lastWords(m, p))
	}
	say("taking the snapshot")
	if err := s.guest.Sync(ctx); err != nil {
		return fmt.Errorf("sync guest: %w", err)
	}
	if err := m.copyVM(ctx, s, p.Root); err != nil {
		return fmt.Errorf("take snapshot: %w", err)
	}
	file, err := image.Describe(ctx, p.Root, filepath.Join(snapshotName, "manifest.json")) // which has the sums of the others
	if err != nil {
		return err
	}
	manifest.More = append(manifest.More, file)
	return nil
}

// lastWords is the end of the guest's console, for whoever built the template.
func lastWords(m *VMMachine, p Place) string {
	text, err := m.Log(p, 2<<10)
	if err != nil || len(text) == 0 {
		return ""
	}
	return "; the guest's console ended with:\n" + string(text)
}

// sweepBaking removes what builds left that died: a hypervisor would run on.
func (m *VMMachine) sweepBaking(ctx context.Context) error {
	left, err := os.ReadDir(filepath.Join(m.opts.StateDir, bakingName))
	if ignoreAbsent(err) != nil {
		return fmt.Errorf("look for dead builds: %w", err)
	}
	for _, d := range left {
		p := Place{ID: d.Name(), Dir: filepath.Join(m.opts.StateDir, bakingName, d.Name()), Slot: NoSlot}
		if err := m.Destroy(ctx, p, func(Step) {}); err != nil {
			return fmt.Errorf("remove dead build: %w", err)
		}
		if err := os.RemoveAll(p.Dir); err != nil {
			return fmt.Errorf("remove dead build: %w", err)
		}
	}
	return m.Destroy(ctx, Place{Slot: 0}, func(Step) {})
}

// runStartCommand starts what the template wants to have running, as its user, and waits until it is ready: until its ready command
// succeeds, or somebody listens on the ports that the image exposes. Where neither is said it is given a moment.
func (s *vmSandbox) runStartCommand(ctx context.Context, say func(string)) error {
	t := s.image
	if t.StartCmd == "" && t.ReadyCmd == "" {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, bakeTime, fmt.Errorf("not ready after %v", bakeTime))
	defer cancel()
	command := guest.ExecRequest{Cmd: t.StartCmd, User: userName(t.User), Cwd: t.Workdir, Env: environmentOf(t.Env), Background: true}
	if t.StartCmd != "" {
		say("starting " + clip(t.StartCmd))
		if _, err := s.guest.Exec(ctx, command); err != nil {
			return fmt.Errorf("run the start command %q: %w", clip(t.StartCmd), err)
		}
	}
	last, silent := "", uint16(0)
	ready := func() (bool, error) {
		if t.ReadyCmd == "" {
			silent = s.silent(ctx, t.Ports)
			return silent == 0, nil
		}
		command.Cmd, command.Background, command.Timeout = t.ReadyCmd, false, 30*time.Second
		result, err := s.guest.Exec(ctx, command)
		last = result.Output
		return err == nil && result.ExitCode == 0 && !result.TimedOut, err
	}
	pause := readyPause
	if t.ReadyCmd == "" && len(t.Ports) == 0 {
		pause, ready = startSettle, func() (bool, error) { return true, nil }
	}
	say("waiting until it is ready")
	for {
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-s.vm.Done():
			timer.Stop()
			return fmt.Errorf("wait until the start command is ready: %w", s.vm.Err())
		case <-ctx.Done():
			timer.Stop()
			why := fmt.Sprintf("the ready command %q said %q", clip(t.ReadyCmd), clip(last))
			if t.ReadyCmd == "" {
				why = fmt.Sprintf("nobody listens on port %d, which its image exposes; give a ready command, which says when it is", silent)
			}
			return &errs.Error{Code: errs.Invalid, Err: context.Cause(ctx), Msg: fmt.Sprintf("the start command %q is not ready: %s", clip(t.StartCmd), why)}
		}
		ok, err := ready()
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("run the ready command %q: %w", clip(t.ReadyCmd), err)
		}
		if ok {
			return nil
		}
	}
}

// silent is the first port on which nobody listens; 0 when there is none.
func (s *vmSandbox) silent(ctx context.Context, ports []uint16) uint16 {
	for _, port := range ports {
		conn, err := s.DialPort(ctx, port)
		if err != nil {
			return port
		}
		conn.Close()
	}
	return 0
}
