package daemon

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/sandboxd"
	"github.com/sluice-edge/sluice/sandboxd/namespace"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// MaybeSandboxInit turns this process into the first one of a sandbox when it was executed as that. It must be the first
// statement of main in every program that runs a node.
func MaybeSandboxInit() { namespace.MaybeInit() }

// MachineOptions say how a node makes sandboxes.
type MachineOptions struct {
	Guestd      string // the agent's static binary; empty looks beside this program and on PATH
	TemplateDir string // root filesystem of the templates; empty is a view of the host
	NetworkName string // begins the names of namespaces, devices and tables; two nodes on one host need two
	SlotPrefix  string // IPv4 addresses of the slots
	SlotPrefix6 string // the same for IPv6
	Resolvers   config.List
	Protected   config.List // addresses of the node that its interfaces do not show
	Pids        int
}

// Flags declares the options as flags of fs.
func (o *MachineOptions) Flags(fs *flag.FlagSet) {
	fs.StringVar(&o.Guestd, "guestd", "", "`file` of the guest agent; empty looks beside this program and on PATH")
	fs.StringVar(&o.TemplateDir, "template-dir", "", "`directory` that is the root of sandboxes; empty is a read-only view of this host")
	fs.StringVar(&o.NetworkName, "network-name", "sl", "what the `names` of namespaces, devices and tables begin with; two nodes on one host need two")
	fs.StringVar(&o.SlotPrefix, "slot-prefix", netdev.DefaultPrefix.String(), "IPv4 `network` of the sandboxes, two addresses each; not routed outside")
	fs.StringVar(&o.SlotPrefix6, "slot-prefix6", netdev.DefaultPrefix6.String(), "IPv6 `network` of the sandboxes")
	fs.Var(&o.Resolvers, "nameserver", "`addresses` of name servers in the sandbox (default 8.8.8.8,1.1.1.1); egress rules hold for them too")
	fs.Var(&o.Protected, "protect", "`networks` that no sandbox may reach, besides private ranges and this node's own addresses")
	fs.IntVar(&o.Pids, "pids", 0, "most processes in one sandbox; 0 is the default of the machine")
}

// OpenMachine makes the namespace machine, and says in words for people what it cannot enforce on this host.
func OpenMachine(opts MachineOptions, stateDir string, log *zap.Logger) (sandboxd.Machine, []string, error) {
	guestd, err := findGuestd(opts.Guestd)
	if err != nil {
		return nil, nil, err
	}
	network, err := opts.network(log)
	if err != nil {
		return nil, nil, err
	}
	protected, err := parsePrefixes(opts.Protected)
	if err != nil {
		return nil, nil, fmt.Errorf("-protect: %w", err)
	}
	if err := opts.check(); err != nil {
		return nil, nil, err
	}
	machine, err := sandboxd.NewNamespaceMachine(sandboxd.NamespaceOptions{
		GuestdPath:  guestd,
		StateDir:    stateDir,
		TemplateDir: opts.TemplateDir,
		Rootless:    os.Geteuid() != 0,
		Network:     network,
		Resolvers:   opts.Resolvers,
		Pids:        opts.Pids,
		Protected:   protected,
		Log:         log,
	})
	if err != nil {
		return nil, nil, err
	}
	return machine, machine.Limitations(), nil
}

// check finds what would only fail at the first create.
func (o *MachineOptions) check() error {
	var errs []error
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
	cfg.Prefix, errs[0] = netip.ParsePrefix(o.SlotPrefix)
	cfg.Prefix6, errs[1] = netip.ParsePrefix(o.SlotPrefix6)
	for i, name := range []string{"-slot-prefix", "-slot-prefix6"} {
		if errs[i] != nil {
			errs[i] = fmt.Errorf("%s: %w", name, errs[i])
		}
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
