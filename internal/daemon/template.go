package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

// Templates that SDKs ask for when their user names none. On a node that has neither they are made as one.
const (
	baseTemplate        = "base"
	interpreterTemplate = "code-interpreter-v1"
	defaultFrom         = "mmdebstrap:bookworm"
)

// OpenTemplates opens the store of a node's templates.
func OpenTemplates(stateDir string) (*image.Store, error) {
	return image.OpenStore(filepath.Join(stateDir, "templates"))
}

// BuildTemplate makes a template: image.Build, and a machine that boots the result once and leaves a snapshot, of which sandboxes are
// restored. A node that runs on the same state directory has the template from then on. Store, agent, kernel and Finish of o are set here.
func BuildTemplate(ctx context.Context, machine MachineOptions, stateDir string, o image.Options, log *zap.Logger, progress func(image.Step)) (image.Template, error) {
	if err := errors.Join(machine.check(), o.Check()); err != nil { // what the operator can mend at once, before what the host lacks
		return image.Template{}, err
	}
	if progress == nil {
		progress = func(image.Step) {}
	}
	if missing := missing(vmm.Findings(ctx, machine.Hypervisor)); missing != nil {
		return image.Template{}, fmt.Errorf("a template is booted once, and this host cannot run virtual machines:\n%w\n(sluice doctor says all)", missing)
	}
	stateDir, err := filepath.Abs(stateDir)
	if err != nil {
		return image.Template{}, fmt.Errorf("state directory: %w", err)
	}
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return image.Template{}, fmt.Errorf("make state directory: %w", err)
	}
	if o.Store, err = OpenTemplates(stateDir); err != nil {
		return image.Template{}, err
	}
	if o.Agent, err = findGuestd(machine.Guestd); err != nil {
		return image.Template{}, err
	}
	o.Kernel = machine.Kernel
	network, err := machine.network(log)
	if err != nil {
		return image.Template{}, err
	}
	vm, err := machine.openVM(ctx, o.Store, stateDir, buildNetwork(network), log, metrics.NewSet())
	if err != nil {
		return image.Template{}, err
	}
	o.Finish = func(ctx context.Context, dir string, m *image.Manifest) error {
		say := func(text string) { progress(image.Step{Phase: image.PhaseFinish, Note: text}) }
		unlock, err := lockBuilds(ctx, stateDir, say)
		if err != nil {
			return err
		}
		defer unlock()
		return vm.Bake(ctx, dir, m, say)
	}
	return image.Build(ctx, o, progress)
}

// MakeDefaultTemplate builds what SDKs ask for by themselves, if it is not there.
func MakeDefaultTemplate(ctx context.Context, machine MachineOptions, stateDir string, log *zap.Logger, progress func(image.Step)) error {
	store, err := OpenTemplates(stateDir)
	if err != nil {
		return err
	}
	if _, err := store.Get(baseTemplate); errs.CodeOf(err) != errs.NotFound {
		if err == nil && machine.DefaultTemplate != "" {
			log.Info("default template is there already, not made anew", zap.String("template", baseTemplate))
		}
		return err
	}
	o := image.Options{Name: baseTemplate, From: machine.DefaultTemplate}
	if o.From == "" {
		o.From = defaultFrom
	}
	if _, err := store.Get(interpreterTemplate); errs.CodeOf(err) == errs.NotFound {
		o.Aliases = []string{interpreterTemplate}
	}
	_, err = BuildTemplate(ctx, machine, stateDir, o, log, progress)
	if err != nil {
		return fmt.Errorf("make the default template from %s: %w", o.From, err)
	}
	return nil
}

// Builds boot on a network of their own, so that a node may run meanwhile. They need one slot of it.
var (
	buildPrefix  = netip.MustParsePrefix("10.11.255.254/31")
	buildPrefix2 = netip.MustParsePrefix("10.13.255.254/31") // where a node has the other
	buildPrefix6 = netip.MustParsePrefix("fd73:6c75:6963:65fe::/127")
	buildOther6  = netip.MustParsePrefix("fd73:6c75:6963:65fc::/127")
)

// buildNetwork derives from a node's network the one of builds beside it.
func buildNetwork(node netdev.Config) netdev.Config {
	b := netdev.Config{Log: node.Log, Prefix: buildPrefix, Prefix6: buildPrefix6}
	if node.Prefix.Overlaps(b.Prefix) {
		b.Prefix = buildPrefix2
	}
	if node.Prefix6.Overlaps(b.Prefix6) {
		b.Prefix6 = buildOther6
	}
	const longest = 8
	if b.NamePrefix = node.NamePrefix + "b"; len(b.NamePrefix) > longest {
		b.NamePrefix = "b" + node.NamePrefix[1:]
		if b.NamePrefix == node.NamePrefix {
			b.NamePrefix = "c" + node.NamePrefix[1:]
		}
	}
	return b
}

// lockBuilds lets one build at a time boot: they share that network. It waits for its turn, and says so.
func lockBuilds(ctx context.Context, stateDir string, say func(string)) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(stateDir, "builds.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock of builds: %w", err)
	}
	for first := true; ; first = false {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { f.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			f.Close()
			return nil, fmt.Errorf("take lock of builds: %w", err)
		case first:
			say("waiting for another build")
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for another build: %w", ctx.Err())
		case <-time.After(100 * time.Millisecond): // a lock has no descriptor to wait on
		}
	}
}

// missing joins what is fatal among findings.
func missing(list []vmm.Finding) error {
	var all []error
	for _, f := range list {
		if f.Fatal && !f.OK {
			all = append(all, fmt.Errorf("%s: %s; %s", f.What, f.Detail, f.Remedy))
		}
	}
	return errors.Join(all...)
}
