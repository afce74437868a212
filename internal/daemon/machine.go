package daemon

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/sandboxd"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/namespace"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

// MaybeSandboxInit turns this process into the first one of a sandbox when it was executed as that. It must be the first
// statement of main in every program that runs a node.
func MaybeSandboxInit() { namespace.MaybeInit() }

// Kinds of machines, as -machine names them.
const (
	MachineAuto      = "auto"
	MachineVM        = "vm"
	MachineNamespace = "namespace"
)

// HypervisorVariable names Cloud Hypervisor's program where the flag does not.
const HypervisorVariable = "SLUICE_CLOUD_HYPERVISOR"

// MachineOptions say how a node makes sandboxes.
type MachineOptions struct {
	Kind        string // auto, vm or namespace; empty is auto
	Guestd      string // the agent's static binary; empty looks beside this program and on PATH
	NetworkName string // begins the names of namespaces, devices and tables; two nodes on one host need two
	SlotPrefix  string // IPv4 addresses of the slots
	SlotPrefix6 string // the same for IPv6
	Resolvers   config.List
	Protected   config.List // addresses of the node that its interfaces do not show

	// Of virtual machines.
	Hypervisor      string // Cloud Hypervisor's program; empty looks on PATH
	Kernel          string // what templates are built with, see image.FindKernel; empty means this machine's
	DefaultTemplate string // what the templates that SDKs ask for are made from, see image.Options.From

	// Of namespaces.
	TemplateDir string // root filesystem of the templates; empty is a view of the host
	Pids        int
}

// Flags declares the options as flags of fs.
func (o *MachineOptions) Flags(fs *flag.FlagSet) {
	fs.StringVar(&o.Kind, "machine", MachineAuto, "what sandboxes are: vm, namespace, or auto, which is vm where it can be")
	fs.StringVar(&o.DefaultTemplate, "default-template", "", "`image` that the template base, also called code-interpreter-v1, is made from where there is none, as in\n"+
		"sluice template build -from; empty is "+defaultFrom+" in sluice dev, and none in a node")
	fs.StringVar(&o.TemplateDir, "template-dir", "", "`directory` that is the root of namespace sandboxes; empty is a read-only view of this host")
	fs.Var(&o.Resolvers, "nameserver", "`addresses` of name servers in the sandbox (default 8.8.8.8,1.1.1.1); egress rules hold for them too")
	fs.IntVar(&o.Pids, "pids", 0, "most processes in one namespace sandbox; 0 is the default of the machine")
	o.BuildFlags(fs)
}

// BuildFlags declares those that also matter where a template is built.
func (o *MachineOptions) BuildFlags(fs *flag.FlagSet) {
	fs.StringVar(&o.Guestd, "guestd", "", "`file` of the guest agent; empty looks beside this program and on PATH")
	fs.StringVar(&o.Hypervisor, "hypervisor", os.Getenv(HypervisorVariable), "`file` of Cloud Hypervisor; empty looks on PATH (environment also: "+HypervisorVariable+")")
	fs.StringVar(&o.Kernel, "kernel", "", "`path` of the kernel that templates are built with: a bzImage, an ELF kernel, or the root of an unpacked\n"+
		"kernel package; empty is this machine's")
	fs.StringVar(&o.NetworkName, "network-name", "sl", "what the `names` of namespaces, devices and tables begin with; two nodes on one host need two")
	fs.StringVar(&o.SlotPrefix, "slot-prefix", netdev.DefaultPrefix.String(), "IPv4 `network` of the sandboxes, two addresses each; not routed outside")
	fs.StringVar(&o.SlotPrefix6, "slot-prefix6", netdev.DefaultPrefix6.String(), "IPv6 `network` of the sandboxes")
	fs.Var(&o.Protected, "protect", "`networks` that no sandbox may reach, besides private ranges and this node's own addresses")
}

// Machine is the machine of a node.
type Machine struct {
	Machine     sandboxd.Machine
	Kind        string   // vm or namespace
	Why         string   // in words for people
	Limitations []string // what it cannot enforce on this host
}

// OpenMachine makes the machine that the options ask for, or the best that this host can run.
func OpenMachine(ctx context.Context, opts MachineOptions, stateDir string, log *zap.Logger, counters *metrics.Set) (Machine, error) {
	if err := opts.check(); err != nil {
		return Machine{}, err
	}
	kind, why, err := opts.choose(func() []vmm.Finding { return vmm.Findings(ctx, opts.Hypervisor) })
	if err != nil {
		return Machine{}, err
	}
	if kind == MachineNamespace {
		namespaces, err := opts.openNamespace(stateDir, log)
		if err != nil {
			return Machine{}, err
		}
		return Machine{namespaces, kind, why, namespaces.Limitations()}, nil
	}
	store, err := OpenTemplates(stateDir)
	if err != nil {
		return Machine{}, err
	}
	network, err := opts.network(log)
	if err != nil {
		return Machine{}, err
	}
	vm, err := opts.openVM(ctx, store, stateDir, network, log, counters)
	if err != nil {
		return Machine{}, err
	}
	return Machine{vm, kind, why, vm.Limitations()}, nil
}

// choose says which kind it is to be, and why. findings, which costs a moment, is asked only if it matters.
func (o *MachineOptions) choose(findings func() []vmm.Finding) (kind, why string, err error) {
	if o.Kind == MachineNamespace {
		return MachineNamespace, "sandboxes are namespaces, as -machine says", nil
	}
	if o.Kind != MachineVM && o.TemplateDir != "" {
		return MachineNamespace, "sandboxes are namespaces, because -template-dir names their root", nil
	}
	list := findings()
	if vmm.Usable(list) {
		why = "sandboxes are virtual machines, which this host can run"
		if o.Kind == MachineVM {
			why = "sandboxes are virtual machines, as -machine says"
		}
		return MachineVM, why, nil
	}
	lacking := missing(list)
	if o.Kind == MachineVM {
		return "", "", fmt.Errorf("-machine vm: this host cannot run virtual machines:\n%w\n(sluice doctor says all; -machine namespace needs none of it)", lacking)
	}
	first, _, _ := strings.Cut(lacking.Error(), "\n")
	return MachineNamespace, "sandboxes are namespaces, because virtual machines cannot be had: " + first, nil
}

// openVM makes the machine of virtual machines on a network.
func (o *MachineOptions) openVM(
	ctx context.Context, store *image.Store, stateDir string, network netdev.Config, log *zap.Logger, counters *metrics.Set,
) (*sandboxd.VMMachine, error) {
	hypervisor, err := vmm.Find(o.Hypervisor)
	if err != nil {
		return nil, err
	}
	protected, err := parsePrefixes(o.Protected)
	if err != nil {
		return nil, fmt.Errorf("-protect: %w", err)
	}
	return sandboxd.NewVMMachine(ctx, sandboxd.VMOptions{
		Hypervisor: hypervisor,
		Templates:  store,
		StateDir:   stateDir,
		Network:    network,
		Resolvers:  o.Resolvers,
		Protected:  protected,
		Log:        log,
		Metrics:    counters,
	})
}

func (o *MachineOptions) openNamespace(stateDir string, log *zap.Logger) (*sandboxd.NamespaceMachine, error) {
	guestd, err := findGuestd(o.Guestd)
	if err != nil {
		return nil, err
	}
	network, err := o.network(log)
	if err != nil {
		return nil, err
	}
	protected, err := parsePrefixes(o.Protected)
	if err != nil {
		return nil, fmt.Errorf("-protect: %w", err)
	}
	return sandboxd.NewNamespaceMachine(sandboxd.NamespaceOptions{
		GuestdPath:  guestd,
		StateDir:    stateDir,
		TemplateDir: o.TemplateDir,
		Rootless:    os.Geteuid() != 0,
		Network:     network,
		Resolvers:   o.Resolvers,
		Pids:        o.Pids,
		Protected:   protected,
		Log:         log,
	})
}

// check finds what would only fail at the first create.
func (o *MachineOptions) check() error {
	var errs []error
	switch o.Kind {
	case "", MachineAuto, MachineVM, MachineNamespace:
	default:
		errs = append(errs, fmt.Errorf("-machine %q: want auto, vm or namespace", o.Kind))
	}
	if o.Kind == MachineVM && o.TemplateDir != "" {
		errs = append(errs, errors.New("-template-dir is for namespace sandboxes: build a template from the directory with sluice template build -from dir:…"))
	}
	for _, r := range o.Resolvers {
		if _, err := netip.ParseAddr(r); err != nil {
			errs = append(errs, fmt.Errorf("-nameserver: %q is not an address", r))
		}
	}
	if info, err := os.Stat(cmp.Or(o.TemplateDir, "/")); err != nil || !info.IsDir() {
		errs = append(errs, fmt.Errorf("-template-dir: %q is not a directory", o.TemplateDir))
	}
	if o.Pids != 0 && o.Pids < minPids {
		errs = append(errs, fmt.Errorf("-pids %d: want %d or more, or 0 for the default", o.Pids, minPids))
	}
	return errors.Join(errs...)
}

// minPids is what the guest agent and one program need.
const minPids = 32

func (o *MachineOptions) network(log *zap.Logger) (netdev.Config, error) {
	cfg := netdev.Config{NamePrefix: o.NetworkName, Log: log}
	var errs [2]error
	if cfg.Prefix, errs[0] = netip.ParsePrefix(o.SlotPrefix); errs[0] != nil {
		errs[0] = fmt.Errorf("-slot-prefix: %q is not a network such as %v", o.SlotPrefix, netdev.DefaultPrefix)
	}
	if cfg.Prefix6, errs[1] = netip.ParsePrefix(o.SlotPrefix6); errs[1] != nil {
		errs[1] = fmt.Errorf("-slot-prefix6: %q is not a network such as %v", o.SlotPrefix6, netdev.DefaultPrefix6)
	}
	return cfg, errors.Join(errs[:]...)
}

func parsePrefixes(texts []string) (list []netip.Prefix, err error) {
	for _, text := range texts {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			addr, addrErr := netip.ParseAddr(text)
			if addrErr != nil {
				return nil, fmt.Errorf("%q is neither a network such as 203.0.113.0/24 nor an address", text)
			}
			prefix = netip.PrefixFrom(addr, addr.BitLen())
		}
		list = append(list, prefix)
	}
	return list, nil
}

// findGuestd returns the agent's absolute path.
func findGuestd(given string) (string, error) {
	if given != "" {
		if _, err := os.Stat(given); err != nil {
			return "", fmt.Errorf("-guestd: %w", err)
		}
		return filepath.Abs(given)
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "guestd")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath("guestd")
	if err != nil {
		return "", errors.New("the guest agent is missing: `make build` puts guestd beside this program, or name it with -guestd")
	}
	return filepath.Abs(path)
}
