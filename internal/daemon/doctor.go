package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

// Diagnosis is what `sluice doctor` finds.
type Diagnosis struct {
	Findings    []vmm.Finding
	Kind        string // of the machine that a node would get; empty when it would get none
	Why         string
	Limitations []string // what that machine cannot enforce here
	Err         error    // why it cannot run; nil when it can
}

// Diagnose looks for everything that a node needs on this host. It leaves nothing on it: the network is tried out by making a slot and
// removing it.
func Diagnose(ctx context.Context, opts MachineOptions, stateDir string) (d Diagnosis) {
	if d.Err = opts.check(); d.Err != nil {
		return d
	}
	vm := vmm.Findings(ctx, opts.Hypervisor)
	kind, why, err := opts.choose(func() []vmm.Finding { return vm })
	d.Why, d.Err = why, err
	if err == nil {
		d.Kind = kind
	}
	// What only virtual machines need is a reason to stop only where they are what it is to be.
	wanted := kind == MachineVM || opts.Kind == MachineVM
	d.add(wanted, vm...)
	d.add(wanted, findMke2fs())
	d.add(true, opts.findAgent())
	if wanted {
		d.add(true, opts.findTemplates(stateDir)...)
	}
	if os.Geteuid() == 0 {
		d.add(true, opts.tryNetwork(ctx, wanted))
	}
	d.add(true, findSpace(stateDir))
	if d.Err == nil {
		d.Err = missing(d.Findings)
	}
	if d.Err == nil {
		d.Limitations, d.Err = opts.limitations(ctx, d.Kind)
	}
	return d
}

// add takes findings; they can stop the node only if it depends on them.
func (d *Diagnosis) add(needed bool, list ...vmm.Finding) {
	for _, f := range list {
		f.Fatal = f.Fatal && needed
		d.Findings = append(d.Findings, f)
	}
}

// finding is a fatal one, unless err is nil.
func finding(what string, err error, detail, remedy string) vmm.Finding {
	f := vmm.Finding{What: what, OK: err == nil, Fatal: true, Detail: detail}
	if err != nil {
		f.Detail, f.Remedy = err.Error(), remedy
	}
	return f
}

func findMke2fs() vmm.Finding {
	var path string
	var err error
	for _, name := range []string{"mke2fs", "/usr/sbin/mke2fs", "/sbin/mke2fs"} { // sbin is not on the PATH of people
		if path, err = exec.LookPath(name); err == nil {
			break
		}
	}
	return finding("mke2fs", err, path, "apt-get install e2fsprogs: it makes the writable disks of virtual machines")
}

func (o *MachineOptions) findAgent() vmm.Finding {
	path, err := findGuestd(o.Guestd)
	return finding("guestd", err, path, "`make build` puts it beside this program, or name it with -guestd")
}

// findTemplates looks for templates and for what they are made with. A node with templates can do without the latter.
func (o *MachineOptions) findTemplates(stateDir string) (list []vmm.Finding) {
	all, broken, err := listTemplates(stateDir)
	if err != nil {
		return []vmm.Finding{finding("templates", err, "", "make -state-dir readable, or name another")}
	}
	for _, err := range broken {
		f := finding("template", err, "", "sluice template build makes it anew, sluice template rm removes it")
		f.Fatal = false
		list = append(list, f)
	}
	usable := len(all) > 0
	kernel, err := image.FindKernel(o.Kernel, "")
	f := finding("kernel", err, kernel.Image, "install linux-image-cloud-amd64 or unpack it somewhere, and name it with -kernel: templates are built with it")
	f.Fatal = !usable
	list = append(list, f)
	if !usable && (o.DefaultTemplate == "" || o.DefaultTemplate == defaultFrom) {
		path, err := exec.LookPath("mmdebstrap")
		f := finding("mmdebstrap", err, path, "apt-get install mmdebstrap: the default template is made with it, unless -default-template names an image")
		f.Fatal = false
		list = append(list, f)
	}
	detail := fmt.Sprintf("%d in %s", len(all), filepath.Join(stateDir, "templates"))
	f = vmm.Finding{What: "templates", OK: usable, Detail: detail}
	if !usable {
		f.Remedy = "sluice dev makes one by itself, for a node do it with sluice template build base -from …"
	}
	return append(list, f)
}

// listTemplates does not make the store where there is none.
func listTemplates(stateDir string) (all []image.Template, broken []error, err error) {
	if _, err := os.Stat(filepath.Join(stateDir, "templates")); errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	store, err := OpenTemplates(stateDir)
	if err != nil {
		return nil, nil, err
	}
	list, err := store.List()
	for _, t := range list {
		if t.Build != "" { // of a broken one only the name is known
			all = append(all, t)
		}
	}
	if err != nil && len(list) == 0 {
		return nil, nil, err
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return all, joined.Unwrap(), nil
	}
	return all, nil, err
}

// Where the doctor tries out the network: a slot of no node.
var (
	doctorPrefix  = netip.MustParsePrefix("10.11.255.252/31")
	doctorPrefix6 = netip.MustParsePrefix("fd73:6c75:6963:65fa::/127")
)

// tryNetwork makes a slot with the rules of a sandbox around it, as a node does, and removes it.
func (o *MachineOptions) tryNetwork(ctx context.Context, tap bool) vmm.Finding {
	err := func() (err error) {
		network, err := netdev.New(netdev.Config{NamePrefix: "sldoctor", Prefix: doctorPrefix, Prefix6: doctorPrefix6, Tap: tap, Log: zap.NewNop()})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, network.Close(context.WithoutCancel(ctx))) }() // with the host's table that a slot brings along
		slot, err := network.Acquire(ctx, 0)
		if err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		defer func() { err = errors.Join(err, network.Release(context.WithoutCancel(ctx), 0)) }()
		where := egress.Local()
		if tap {
			where = egress.Forwarded(netdev.TapName, net.HardwareAddr{0x06, 0, 0, 0, 0, 1}, netdev.GuestConstant, netdev.GuestConstant6)
		}
		return egress.Apply(slot.NetNS, egress.Compile(egress.Policy{AllowInternet: true}, where))
	}()
	return finding("network", err, "a network namespace with the egress rules can be made",
		"a node needs CAP_NET_ADMIN and CAP_SYS_ADMIN, and a kernel with nf_tables, veth and, for virtual machines, tun")
}

// minSpace is what a node should have at least: a template, its snapshot, and a few layers and paused sandboxes.
const minSpace = 4 << 30

// findSpace looks at the file system of the state directory, or of where it would be made.
func findSpace(stateDir string) vmm.Finding {
	dir := stateDir
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	for errors.Is(err, unix.ENOENT) && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		err = unix.Statfs(dir, &st)
	}
	const remedy = "free some, or move the state to a larger file system with -state-dir"
	if err != nil {
		return finding("disk space", fmt.Errorf("look at %s: %w", dir, err), "", remedy)
	}
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return finding("disk space", fmt.Errorf("%s is not a directory", dir), "", "name a directory with -state-dir")
	}
	free := st.Bavail * uint64(st.Bsize)
	detail := fmt.Sprintf("%d MiB free at %s", free>>20, dir)
	if free < minSpace {
		err = errors.New(detail)
	}
	f := finding("disk space", err, detail, remedy)
	f.Fatal = false
	return f
}

// limitations asks the machine itself, in a directory that goes again.
func (o *MachineOptions) limitations(ctx context.Context, kind string) (_ []string, err error) {
	dir, err := os.MkdirTemp("", "sluice-doctor-")
	if err != nil {
		return nil, fmt.Errorf("make a directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	as := *o
	as.Kind = kind
	m, err := OpenMachine(ctx, as, dir, zap.NewNop(), metrics.NewSet())
	return m.Limitations, err
}
