package sandboxd

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/cgroup"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

// VMOptions configures the machine that production uses. Hypervisor, Templates and StateDir are required.
type VMOptions struct {
	Hypervisor string       // absolute path of Cloud Hypervisor; see vmm.Find
	Templates  *image.Store // on the file system of StateDir: sandboxes share its files
	StateDir   string       // the manager's; absolute
	Network    netdev.Config
	Resolvers  []string       // name servers in the sandbox; zero means 8.8.8.8 and 1.1.1.1, which the egress rules judge like any address
	Protected  []netip.Prefix // as in NamespaceOptions
	Rates      vmm.Rates      // of templates that name none

	Log     *zap.Logger
	Metrics *metrics.Set
}

// VMMachine makes sandboxes of Cloud Hypervisor microVMs: the process from package vmm, its network from netdev, the rules around it
// from egress, root images and kernels from image. A sandbox is restored from its template's snapshot where there is one that fits this
// node, and boots where there is none.
type VMMachine struct {
	opts     VMOptions
	network  *netdev.Network
	launcher *vmm.Launcher
	cgroups  cgroup.Host
	limits   []string
	version  string // of the hypervisor
	cpu      string // digest of what a snapshot needs of the processor
	log      *zap.Logger
	host     hostClaims
	layers   *layers
	stats    vmStats

	mu       sync.Mutex
	ready    map[int]*netdev.Slot // made ahead of the sandbox that will want it
	vms      map[string]*vmm.VM   // by ID of the sandbox: started or adopted by this process
	verified map[string]bool      // manifests of snapshots that were read whole, or written, in this run
}

type vmStats struct {
	coldBoots, restores *metrics.Counter
}

// What belongs to a VM in the directory of its place, besides what package vmm keeps there. Root image, kernel and initramfs are links
// to the template's files: a template may be removed or built anew while its sandboxes live.
const (
	vmRootName      = "root.erofs"
	vmKernelName    = "kernel"
	vmInitramfsName = "initramfs"
	vmDiskName      = "disk.img"    // the writable layer
	vmFromName      = "from"        // links to the files of the snapshot that it is restored from
	vmSavedName     = "saved"       // snapshot of a paused sandbox: its memory
	vmDiskOnlyName  = "disk-only"   // says that a paused sandbox consists of its disk alone
	vmConsoleName   = "console.log" // the console's end before the last pause
	vmCgroupsName   = "cgroups"     // where its cgroups are, one to a line
)

// snapshotName is the directory in a root, a template's or that of a sandbox's snapshot, that a sandbox is restored from. In it are the
// hypervisor's files, the disk as it was at the same instant, and a manifest.
const snapshotName = "snapshot"

// Labels of snapshots: what must be the same where one is restored.
const (
	labelCPU    = "cpu"
	labelFormat = "format"
	vmFormat    = "1" // of what the guest and the devices look like to each other
)

const (
	vmOverheadMiB = 160 // what a hypervisor takes besides its guest's memory
	vmThreads     = 512 // a few for each device and processor
	logKept       = 256 << 10
)

// defaultRates keep one sandbox from taking the host's network and disks for itself: 1 Gbit/s each way and 400 MiB/s.
var defaultRates = vmm.Rates{NetBytes: 125_000_000, NetPackets: 200_000, DiskBytes: 400 << 20, DiskOps: 40_000}

// NewVMMachine looks at the host and changes nothing on it. An error says what is missing and what to do.
func NewVMMachine(ctx context.Context, opts VMOptions) (*VMMachine, error) {
	if len(opts.Resolvers) == 0 {
		opts.Resolvers = []string{"8.8.8.8", "1.1.1.1"}
	}
	if opts.Rates == (vmm.Rates{}) {
		opts.Rates = defaultRates
	}
	if opts.Log == nil {
		opts.Log = zap.NewNop()
	}
	if opts.Metrics == nil {
		opts.Metrics = metrics.NewSet()
	}
	opts.Network.NamePrefix = cmp.Or(opts.Network.NamePrefix, "sl")
	opts.Network.Tap = true
	dir, err := filepath.Abs(opts.StateDir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	opts.StateDir = dir
	m := &VMMachine{
		opts: opts, log: opts.Log.Named("vm"), ready: make(map[int]*netdev.Slot), vms: make(map[string]*vmm.VM), verified: make(map[string]bool),
		stats: vmStats{
			coldBoots: opts.Metrics.GetOrCreateCounter("sluice_sandboxd_cold_boots_total"),
			restores:  opts.Metrics.GetOrCreateCounter("sluice_sandboxd_restores_total"),
		},
	}
	version, err := vmm.Probe(ctx, opts.Hypervisor)
	if err != nil {
		return nil, err
	}
	m.version = version.String()
	if m.cpu, err = cpuDigest(); err != nil {
		return nil, err
	}
	if m.launcher, err = vmm.New(vmm.Options{Binary: opts.Hypervisor, LogBytes: logKept, Log: opts.Log}); err != nil {
		return nil, err
	}
	if m.network, err = netdev.New(opts.Network); err != nil {
		return nil, err
	}
	m.layers = newLayers(filepath.Join(dir, "layers", opts.Network.NamePrefix), opts.Templates, opts.Metrics)
	m.host = newHostClaims(opts.Network)
	var why []string
	m.cgroups, why = cgroup.Probe()
	m.limits = m.cgroups.Limitations(why, map[string]string{
		"memory": "what a hypervisor takes besides its guest's memory is not limited",
		"pids":   "the threads of a hypervisor are not limited",
		"cpu":    "a sandbox's processors are as many as it has, and not limited to that",
	})
	if !m.launcher.OnDemand() {
		m.limits = append(m.limits, "no /dev/userfaultfd: a restore copies all of the memory first")
	}
	if !m.launcher.Landlock() {
		m.limits = append(m.limits, "no Landlock in this kernel: a hypervisor's mount namespace is the fence around its files")
	}
	return m, nil
}

// Limitations says in words for an operator what this machine cannot enforce on this host.
func (m *VMMachine) Limitations() []string { return slices.Clone(m.limits) }

// Name is "vm".
func (m *VMMachine) Name() string { return "vm" }

// Slots is what both the addresses and the user ids are enough for.
func (m *VMMachine) Slots() int { return min(m.network.Capacity(), uidSlots) }

// Setup makes sure that nobody else on this host uses the same names and user ids, and puts the host's table in place.
func (m *VMMachine) Setup(ctx context.Context) error {
	if err := m.host.take(); err != nil {
		return err
	}
	if err := m.layers.sweep(); err != nil {
		return err
	}
	return m.network.Setup(ctx)
}

// Maintain puts the host's table and forwarding back if somebody has taken them away.
func (m *VMMachine) Maintain(ctx context.Context) error { return m.network.Maintain(ctx) }

// Close removes the host's table and the writable layers that were kept ready.
func (m *VMMachine) Close(ctx context.Context) error {
	return errors.Join(m.network.Close(ctx), m.layers.sweep(), m.host.remove())
}

// Release lets go of the names; the table and the user ids stay, for the sandboxes that do.
func (m *VMMachine) Release() error { return m.host.leave() }

// Template finds a template in the store.
func (m *VMMachine) Template(reference string) (Template, error) {
	t, err := m.opts.Templates.Get(reference)
	if err != nil {
		return Template{}, err
	}
	return templateOf(t), nil
}

// Templates lists the store.
func (m *VMMachine) Templates() ([]Template, error) {
	all, err := m.opts.Templates.List()
	list := make([]Template, 0, len(all))
	for _, t := range all {
		if t.Build != "" { // of one that is broken only the name is known
			list = append(list, templateOf(t))
		}
	}
	return list, err
}

func templateOf(t image.Template) Template {
	id := t.Name
	if t.Tag != image.DefaultTag {
		id += ":" + t.Tag
	}
	return Template{
		ID: id, Aliases: t.Aliases, Root: t.Dir, CPUs: t.CPUs, MemoryMiB: t.MemoryMiB, DiskMiB: t.DiskMiB,
		User: userName(t.User), Workdir: t.Workdir,
	}
}

// userName is the user of an image's USER, which may name a group as well.
func userName(user string) string {
	name, _, _ := strings.Cut(user, ":")
	return name
}

// Occupied lists the slots of which the host has a namespace or a device.
func (m *VMMachine) Occupied(ctx context.Context) ([]int, error) { return m.network.List(ctx) }

// Prepare makes a slot's network, which takes most of the node's own part of a create, and fills up the writable layers.
func (m *VMMachine) Prepare(ctx context.Context, index int) error {
	slot, err := m.network.Acquire(ctx, index)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.ready[index] = slot
	m.mu.Unlock()
	if err := m.layers.fill(ctx); err != nil {
		m.log.Warn("writable layers not kept ready", zap.Error(err))
	}
	return nil
}

// takeReady returns the network of a slot that was prepared, or nil.
func (m *VMMachine) takeReady(index int) *netdev.Slot {
	m.mu.Lock()
	defer m.mu.Unlock()
	slot := m.ready[index]
	delete(m.ready, index)
	return slot
}

// Adopt takes up a VM if both its network and its process are whole.
func (m *VMMachine) Adopt(_ context.Context, p Place, handle json.RawMessage) (Instance, error) {
	var h vmHandle
	if err := json.Unmarshal(handle, &h); err != nil {
		return nil, fmt.Errorf("decode handle: %w", err)
	}
	slot, err := m.network.Adopt(p.Slot)
	if err != nil {
		return nil, err
	}
	vm, err := m.launcher.Adopt(m.spec(p), h.VM)
	if err != nil {
		return nil, err
	}
	s := &vmSandbox{machine: m, place: p, slot: slot, memory: h.Memory}
	s.attach(vm)
	return s, nil
}

// Destroy ends the process first: it keeps the namespace that it is in, and its rules, until it is gone. What was saved and the disk stay.
func (m *VMMachine) Destroy(ctx context.Context, p Place, reached func(Step)) error {
	if p.ID != "" {
		if err := m.kill(ctx, p); err != nil {
			return err
		}
	}
	if p.Slot == NoSlot {
		reached(StepStopped)
		return nil
	}
	if p.ID == "" { // only the slot is known
		if err := m.launcher.KillUser(ctx, m.host.uid(p.Slot)); err != nil {
			return err
		}
	}
	for _, dir := range m.plan(p).Dirs {
		if err := cgroup.Remove(ctx, dir); err != nil {
			return err
		}
	}
	reached(StepStopped)
	m.takeReady(p.Slot)
	if err := m.network.Release(ctx, p.Slot); err != nil {
		return err
	}
	reached(StepUnwired)
	return nil
}

// kill ends the hypervisor of a place and removes what it had there.
func (m *VMMachine) kill(ctx context.Context, p Place) error {
	m.mu.Lock()
	vm := m.vms[p.ID]
	m.mu.Unlock()
	spec := m.spec(p)
	if p.Slot == NoSlot {
		spec.UID = vmm.AnyUID
	}
	if vm != nil {
		if err := vm.Kill(ctx); err != nil {
			return err
		}
		if err := spec.Clean(); err != nil {
			return fmt.Errorf("remove files of the VM: %w", err)
		}
	} else if err := m.destroyUnknown(ctx, p, spec); err != nil {
		return err
	}
	m.mu.Lock()
	delete(m.vms, p.ID)
	m.mu.Unlock()
	noted, err := os.ReadFile(filepath.Join(p.Dir, vmCgroupsName))
	if ignoreAbsent(err) != nil {
		return fmt.Errorf("read note of cgroups: %w", err)
	}
	for _, dir := range strings.Fields(string(noted)) { // an earlier run of the node may have lived in another cgroup
		if !strings.HasPrefix(filepath.Base(dir), cgroupPrefix) {
			continue
		}
		if err := cgroup.Remove(ctx, dir); err != nil {
			return err
		}
	}
	return errors.Join(ignoreAbsent(os.Remove(filepath.Join(p.Dir, vmCgroupsName))), os.RemoveAll(filepath.Join(p.Dir, vmFromName)))
}

// destroyUnknown ends a hypervisor that this process has not started or adopted. One that was taken over can give itself another name, but not
// another user, and that user is of its slot alone.
func (m *VMMachine) destroyUnknown(ctx context.Context, p Place, spec vmm.Spec) error {
	if p.Slot != NoSlot {
		if err := m.launcher.KillUser(ctx, spec.UID); err != nil {
			return err
		}
	}
	return m.launcher.Destroy(ctx, spec)
}

// Log is the end of the console, before the last pause and since.
func (m *VMMachine) Log(p Place, most int64) ([]byte, error) {
	before, err := readEnd(filepath.Join(p.Dir, vmConsoleName), most)
	if err != nil {
		return nil, err
	}
	since, err := m.spec(p).Serial(most)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return endOf(slices.Concat(before, since), most), nil
}

// endOf is the last bytes of a text, at most so many.
func endOf(text []byte, most int64) []byte { return text[max(0, int64(len(text))-most):] }

// cgroupPrefix begins the names of the cgroups of VMs.
const cgroupPrefix = "sluice-vm-"

// plan is the cgroups of a place. They are named by its slot, which is what is known of a place if anything is.
func (m *VMMachine) plan(p Place) cgroup.Plan {
	return m.cgroups.Plan(cgroupPrefix+m.opts.Network.NamePrefix+"-"+strconv.Itoa(p.Slot), cgroup.Limits{
		MemoryMiB: p.MemoryMiB + vmOverheadMiB, CPUs: p.CPUs, Pids: vmThreads,
	})
}

// spec derives from a place all that the hypervisor needs, and all by which it is found again.
func (m *VMMachine) spec(p Place) vmm.Spec {
	in := func(name string) string { return filepath.Join(p.Dir, name) }
	return vmm.Spec{
		ID: p.ID, Dir: p.Dir, NetNS: m.network.Path(p.Slot), UID: m.host.uid(p.Slot), Cgroups: m.plan(p).Dirs,
		Kernel: in(vmKernelName), Initramfs: in(vmInitramfsName), Root: in(vmRootName), Disk: in(vmDiskName),
	}
}

// guestMAC is the hardware address of a sandbox's network card. It follows from the ID, so it stays over a pause, no two sandboxes share
// it, and the fence can hold the guest to it.
func guestMAC(id string) net.HardwareAddr {
	sum := sha256.Sum256([]byte("sluice mac " + id))
	return net.HardwareAddr{0x06, sum[0], sum[1], sum[2], sum[3], sum[4]} // locally administered, and not the range of slots and taps
}

// cpuDigest is what a snapshot needs of the processor: it holds what the guest's kernel once saw of it.
func cpuDigest() (string, error) {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", fmt.Errorf("look at the processor: %w", err)
	}
	first, _, _ := strings.Cut(string(text), "\n\n")
	sum := sha256.New()
	for line := range strings.Lines(first) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "vendor_id", "cpu family", "model", "stepping", "flags", "CPU implementer", "CPU part", "Features":
			fmt.Fprintf(sum, "%s=%s\n", strings.TrimSpace(key), strings.TrimSpace(value))
		}
	}
	return hex.EncodeToString(sum.Sum(nil)[:8]), nil
}

// readEnd is the end of a file of ours; nothing when there is none.
func readEnd(path string, most int64) ([]byte, error) {
	text, err := os.ReadFile(path)
	if ignoreAbsent(err) != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	return endOf(text, most), nil
}

// damaged is the answer to a snapshot that cannot be used, in words for whoever wants the sandbox.
func damaged(err error) error {
	return &errs.Error{Code: errs.Unavailable, Err: err, Msg: "the saved memory of the sandbox is damaged; its disk is kept: resume it without memory"}
}

// fence puts the rules of a policy around the VM in a slot.
func (m *VMMachine) fence(slot *netdev.Slot, id string, fence egress.Policy) error {
	fence, err := protect(fence, m.opts.Protected)
	if err != nil {
		return err
	}
	return egress.Apply(slot.NetNS, egress.Compile(fence, egress.Forwarded(netdev.TapName, guestMAC(id), netdev.GuestConstant, netdev.GuestConstant6)))
}
