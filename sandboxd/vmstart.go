package sandboxd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

const (
	bootTime   = time.Minute     // bounds a boot, up to the guest's first word
	verifyTime = 5 * time.Minute // and the reading of a snapshot
)

// Start makes the network, fences it, gives the sandbox a writable layer of its own, and only then starts a hypervisor: it restores the
// snapshot that the root has, or boots where there is none or it does not fit this node.
func (m *VMMachine) Start(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (Instance, error) {
	s, err := m.enter(ctx, p, fence, reached)
	if err != nil {
		return nil, err
	}
	root, err := openRoot(p.Root)
	if err != nil {
		return nil, err
	}
	defer root.close()
	if err := root.linkTo(p.Dir); err != nil {
		return nil, err
	}
	s.image = root.image
	warm, err := m.warm(ctx, root, p)
	if err != nil {
		return nil, err
	}
	if err := m.giveLayer(ctx, root, p); err != nil {
		return nil, err
	}
	reached(StepLayer)
	if warm {
		if err := s.restore(ctx, filepath.Join(p.Dir, vmFromName), (*vmm.VM).Restore, reached); err != nil {
			return nil, err
		}
		m.stats.restores.Inc()
	} else {
		if err := s.boot(ctx, reached); err != nil {
			return nil, err
		}
		m.stats.coldBoots.Inc()
	}
	if err := s.Health(ctx); err != nil {
		return nil, fmt.Errorf("wait for guest: %w", errors.Join(err, s.vm.Err()))
	}
	if !warm && root.image != nil {
		if err := s.runStartCommand(ctx, func(string) {}); err != nil {
			return nil, err
		}
	}
	if err := os.RemoveAll(filepath.Join(p.Dir, vmFromName)); err != nil { // the hypervisor has open what it still needs
		return nil, fmt.Errorf("remove links to the snapshot: %w", err)
	}
	reached(StepStarted)
	return s, nil
}

// enter gives a place its network with the rules of a policy in it, and its cgroups.
func (m *VMMachine) enter(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (*vmSandbox, error) {
	slot := m.takeReady(p.Slot)
	if slot == nil {
		var err error
		if slot, err = m.network.Acquire(ctx, p.Slot); err != nil {
			return nil, err
		}
	}
	if err := slot.SetGuest(guestMAC(p.ID)); err != nil {
		return nil, err
	}
	reached(StepNetwork)
	if err := m.fence(slot, p.ID, fence); err != nil {
		return nil, fmt.Errorf("apply egress rules: %w", err)
	}
	reached(StepFence)
	cgroups := m.plan(p)
	if err := os.WriteFile(filepath.Join(p.Dir, vmCgroupsName), []byte(strings.Join(cgroups.Dirs, "\n")), 0o600); err != nil {
		return nil, diskFull("note cgroups", err)
	}
	if err := cgroups.Make(); err != nil {
		return nil, err
	}
	return &vmSandbox{machine: m, place: p, slot: slot}, nil
}

// giveLayer gives a place its writable layer: a copy of the one that belongs to the snapshot, or an empty one.
func (m *VMMachine) giveLayer(ctx context.Context, root *vmRoot, p Place) error {
	own := filepath.Join(p.Dir, vmDiskName)
	if root.snapshot != nil {
		return m.layers.take(filepath.Join(p.Dir, vmFromName, vmDiskName), filepath.Join(p.Root, snapshotName, vmDiskName), own)
	}
	empty, err := m.opts.Templates.Disk(ctx, p.DiskMiB)
	if err != nil {
		return err
	}
	return m.layers.take(empty, empty, own)
}

// warm tells whether the snapshot of a root can be restored here. One of a template is a way to be quick, so where it cannot the sandbox
// boots; one of a sandbox is what its owner wants, so then there is none.
func (m *VMMachine) warm(ctx context.Context, root *vmRoot, p Place) (bool, error) {
	if root.snapshot == nil {
		return false, nil
	}
	err := m.fits(*root.snapshot)
	if err == nil {
		err = m.verifyOnce(ctx, filepath.Join(p.Dir, vmFromName), *root.snapshot)
	}
	switch {
	case ctx.Err() != nil:
		return false, ctx.Err()
	case err == nil:
		return true, nil
	case root.image == nil:
		return false, &errs.Error{Code: errs.Unavailable, Err: err, Msg: "the snapshot cannot be restored on this node: " + reasonOf(err)}
	}
	m.log.Warn("snapshot of template not used, the sandbox boots", zap.String("sandbox", p.ID), zap.String("root", p.Root), zap.Error(err))
	return false, nil
}

// reasonOf is the part of an error that whoever called the API may read.
func reasonOf(err error) string {
	if e, ok := errors.AsType[*errs.Error](err); ok {
		return e.Msg
	}
	return "it is damaged"
}

// labels are what a snapshot made here says about where it can be restored.
func (m *VMMachine) labels() map[string]string {
	return map[string]string{labelCPU: m.cpu, labelFormat: vmFormat}
}

// fits tells whether a snapshot was made where hypervisor and processor are like ours.
func (m *VMMachine) fits(manifest vmm.Manifest) error {
	switch {
	case manifest.Hypervisor != m.version:
		return errs.New(errs.Unavailable, "it was made by cloud-hypervisor %s, and this is %s", manifest.Hypervisor, m.version)
	case manifest.Labels[labelCPU] != m.cpu:
		return errs.New(errs.Unavailable, "it was made on another kind of processor")
	case manifest.Labels[labelFormat] != vmFormat:
		return errs.New(errs.Unavailable, "it was made by another version of this program")
	}
	return nil
}

// verifyOnce reads a snapshot whole the first time that this process meets it: a crash of the host may have torn what was written last,
// though its sizes are right. That may take longer than its caller has: who comes next finds it done.
func (m *VMMachine) verifyOnce(ctx context.Context, dir string, manifest vmm.Manifest) error {
	key := manifestKey(manifest)
	m.mu.Lock()
	known := m.verified[key]
	m.mu.Unlock()
	if known {
		return nil
	}
	snapshots, err := vmm.OpenSnapshots(filepath.Dir(dir))
	if err != nil {
		return err
	}
	ctx, cancel := outlast(ctx, verifyTime)
	defer cancel()
	if err := snapshots.Verify(ctx, filepath.Base(dir)); err != nil {
		return err
	}
	m.trust(manifest)
	return nil
}

// trust notes that a snapshot is whole.
func (m *VMMachine) trust(manifest vmm.Manifest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.verified) > 4096 { // of sandboxes that are long gone; reading again harms nobody
		clear(m.verified)
	}
	m.verified[manifestKey(manifest)] = true
}

func manifestKey(m vmm.Manifest) string {
	key := m.Created.String()
	for _, f := range m.Files {
		key += " " + f.CRC32C
	}
	return key
}

// attach begins to speak to the guest of a hypervisor.
func (s *vmSandbox) attach(vm *vmm.VM) {
	s.vm = vm
	s.guest = guest.NewClientDial(func(ctx context.Context) (net.Conn, error) { return vm.DialGuest(ctx, guest.ControlPort) })
	s.machine.mu.Lock()
	s.machine.vms[s.place.ID] = vm
	s.machine.mu.Unlock()
}

// launch starts a hypervisor without a VM in it.
func (s *vmSandbox) launch(ctx context.Context, spec vmm.Spec, reached func(Step)) (*os.File, error) {
	vm, err := s.machine.launcher.Start(ctx, spec)
	if err != nil {
		return nil, err
	}
	s.attach(vm)
	tap, err := s.slot.OpenTap()
	if err != nil {
		return nil, err
	}
	reached(StepProcess)
	return tap, nil
}

// restore brings back what a snapshot has; how says whether it runs then.
func (s *vmSandbox) restore(ctx context.Context, snapshot string, how func(*vmm.VM, context.Context, vmm.RestoreMode, *os.File) error, reached func(Step)) error {
	spec := s.machine.spec(s.place)
	spec.Snapshot = snapshot
	tap, err := s.launch(ctx, spec, reached)
	if err != nil {
		return err
	}
	defer tap.Close()
	mode := vmm.RestoreCopy
	if s.machine.launcher.OnDemand() {
		mode = vmm.RestoreOnDemand
	}
	if err := how(s.vm, ctx, mode, tap); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	s.memory = true
	reached(StepRestored)
	return nil
}

// boot starts the kernel and waits for the guest's first word.
func (s *vmSandbox) boot(ctx context.Context, reached func(Step)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, bootTime, fmt.Errorf("the guest has not said within %v that it is up", bootTime))
	defer cancel()
	spec := s.machine.spec(s.place)
	up, err := vmm.ListenGuest(spec, guest.UpPort)
	if err != nil {
		return err
	}
	defer up.Close()
	tap, err := s.launch(ctx, spec, reached)
	if err != nil {
		return err
	}
	defer tap.Close()
	shape := vmm.Shape{
		CPUs: s.place.CPUs, MemoryMiB: s.place.MemoryMiB, Cmdline: s.cmdline(), MAC: guestMAC(s.place.ID).String(),
		Rates: s.rates(), Landlock: s.machine.launcher.Landlock(),
	}
	if err := s.vm.Boot(ctx, shape, tap); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	if err := s.awaitUp(ctx, up); err != nil {
		return fmt.Errorf("wait for the guest to boot: %w", err)
	}
	reached(StepRestored)
	return nil
}

// awaitUp accepts the guest's first connection, unless its hypervisor ends before.
func (s *vmSandbox) awaitUp(ctx context.Context, up *net.UnixListener) error {
	stop := context.AfterFunc(ctx, func() { _ = up.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-s.vm.Done():
			_ = up.SetDeadline(time.Unix(1, 0))
		case <-ended:
		}
	}()
	conn, err := up.Accept()
	if err == nil {
		return conn.Close()
	}
	select {
	case <-s.vm.Done():
		return s.vm.Err()
	default:
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// cmdline tells the guest's kernel where its console is, and the agent what its network is: the same in every sandbox.
func (s *vmSandbox) cmdline() string {
	network := guest.Network{
		Addr: netip.PrefixFrom(netdev.GuestConstant, 30), Gateway: netdev.GuestGateway, GatewayMAC: netdev.TapMAC,
	}
	if s.slot.GuestAddr6.IsValid() {
		network.Addr6, network.Gateway6 = netip.PrefixFrom(netdev.GuestConstant6, 126), netdev.GuestGateway6
	}
	// no-kvmapf: told of a page that its host still has to fetch, a kernel lets the process sleep until it is told that the page has come. A
	// restore on demand is all such pages, and what is lost of that talk across a restore leaves a process asleep for ever, be it the agent.
	return "console=ttyS0 panic=-1 quiet loglevel=4 reboot=t random.trust_cpu=on no-kvmapf " + network.Cmdline()
}

// rates are the template's, and the node's where it has none.
func (s *vmSandbox) rates() vmm.Rates {
	node := s.machine.opts.Rates
	if s.image == nil {
		return node
	}
	own := s.image.Rates
	return vmm.Rates{
		NetBytes: cmp.Or(own.NetBytes, node.NetBytes), NetPackets: cmp.Or(own.NetPackets, node.NetPackets),
		DiskBytes: cmp.Or(own.DiskBytes, node.DiskBytes), DiskOps: cmp.Or(own.DiskOps, node.DiskOps),
	}
}

// vmRoot is what a sandbox is made from, opened: whatever becomes of its name, it stays this one.
type vmRoot struct {
	dir      *os.File
	image    *image.Manifest // of a template; nil for a sandbox's snapshot
	snapshot *vmm.Manifest   // nil where there is none
}

const maxRootManifest = 1 << 20

func openRoot(path string) (r *vmRoot, err error) {
	if path == "" {
		return nil, errs.New(errs.NotFound, "the template has no root image: build it with `sluice template build`")
	}
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, &errs.Error{Code: errs.NotFound, Msg: "the template is gone: it was removed meanwhile", Err: err}
	}
	r = &vmRoot{dir: dir}
	defer func() {
		if err != nil {
			dir.Close()
		}
	}()
	if err := r.decode("manifest.json", &r.image); err != nil {
		return nil, fmt.Errorf("read manifest of template %s: %w", path, err)
	}
	if err := r.decode(snapshotName+"/manifest.json", &r.snapshot); err != nil {
		return nil, fmt.Errorf("read manifest of snapshot %s: %w", path, err)
	}
	return r, nil
}

// decode reads a manifest, if it is there.
func (r *vmRoot) decode(name string, into any) error {
	fd, err := unix.Openat(int(r.dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	return json.NewDecoder(io.LimitReader(f, maxRootManifest)).Decode(into)
}

func (r *vmRoot) close() { r.dir.Close() }

// linkTo gives a place the root's files under names of its own.
func (r *vmRoot) linkTo(dir string) error {
	names := map[string]string{vmRootName: vmRootName, vmKernelName: vmKernelName, vmInitramfsName: vmInitramfsName}
	if r.snapshot != nil {
		if err := os.Mkdir(filepath.Join(dir, vmFromName), 0o755); err != nil {
			return diskFull("link snapshot", err)
		}
		names[snapshotName+"/manifest.json"] = vmFromName + "/manifest.json"
		for _, f := range r.snapshot.Files {
			names[snapshotName+"/"+f.Name] = vmFromName + "/" + f.Name
		}
	}
	for from, to := range names {
		err := unix.Linkat(int(r.dir.Fd()), from, unix.AT_FDCWD, filepath.Join(dir, to), 0)
		if errors.Is(err, fs.ErrNotExist) {
			return &errs.Error{Code: errs.Unavailable, Msg: "the template is damaged, build it again: it lacks " + filepath.Base(from), Err: err}
		}
		if err != nil {
			return diskFull("link "+from, err)
		}
	}
	return nil
}
