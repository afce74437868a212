package sandboxd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/namespace"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// NamespaceOptions configures the machine that needs no KVM.
type NamespaceOptions struct {
	GuestdPath  string        // the agent's static binary
	StateDir    string        // for what its sandboxes share; absolute, may be the manager's
	TemplateDir string        // root of templates that name none; "" is a view of the host
	Rootless    bool          // sandboxes in user namespaces of the caller, without any network but ingress; implied without root
	Network     netdev.Config // not used in rootless mode
	Resolvers   []string      // name servers in the sandbox; zero means 8.8.8.8 and 1.1.1.1, which the egress rules judge like any address
	Pids        int           // processes in one sandbox; zero means the namespace package's own limit

	// Protected are addresses of the node that its interfaces do not show, such as a public one behind address translation. Those
	// that they show are always protected.
	Protected []netip.Prefix

	Log *zap.Logger
}

// NamespaceMachine makes sandboxes of Linux namespaces: the process from package namespace, its network from netdev, the rules in
// it from egress.
type NamespaceMachine struct {
	opts       NamespaceOptions
	network    *netdev.Network // nil in rootless mode
	namespaces *namespace.Machine
	host       hostClaims // not used in rootless mode
}

// NewNamespaceMachine looks at the host and changes nothing but StateDir.
func NewNamespaceMachine(opts NamespaceOptions) (*NamespaceMachine, error) {
	if len(opts.Resolvers) == 0 {
		opts.Resolvers = []string{"8.8.8.8", "1.1.1.1"}
	}
	opts.Rootless = opts.Rootless || os.Geteuid() != 0
	opts.Network.NamePrefix = cmp.Or(opts.Network.NamePrefix, "sl")
	dir, err := filepath.Abs(opts.StateDir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	opts.StateDir = dir
	namespaces, err := namespace.New(namespace.Config{
		GuestdPath: opts.GuestdPath, StateDir: dir, TemplateDir: opts.TemplateDir, Rootless: opts.Rootless, Log: opts.Log,
		Ready: func(context.Context, string) error { return nil }, // Start asks the guest; Adopt, which would ask too, must not
	})
	if err != nil {
		return nil, err
	}
	m := &NamespaceMachine{opts: opts, namespaces: namespaces}
	if opts.Rootless {
		return m, nil
	}
	if m.network, err = netdev.New(opts.Network); err != nil {
		return nil, err
	}
	m.host = newHostClaims(opts.Network)
	return m, nil
}

// Limitations says in words for an operator what this machine cannot enforce on this host.
func (m *NamespaceMachine) Limitations() []string { return m.namespaces.Limitations() }

// Name is "namespace".
func (m *NamespaceMachine) Name() string { return "namespace" }

// Slots is what both the addresses and the user ids are enough for.
func (m *NamespaceMachine) Slots() int {
	if m.network == nil {
		return uidSlots * uidNodes // it uses no ids but the caller's: any number will do
	}
	return min(m.network.Capacity(), uidSlots)
}

// Setup makes sure that nobody else on this host uses the same names and user ids, and puts the host's table in place. Without the
// first, a node that starts would take another's sandboxes for leftovers and remove them.
func (m *NamespaceMachine) Setup(ctx context.Context) error {
	if m.network == nil {
		return nil
	}
	if err := m.host.take(); err != nil {
		return err
	}
	return m.network.Setup(ctx)
}

// Maintain puts the host's table and forwarding back if somebody has taken them away.
func (m *NamespaceMachine) Maintain(ctx context.Context) error {
	if m.network == nil {
		return nil
	}
	return m.network.Maintain(ctx)
}

// Close removes the host's table.
func (m *NamespaceMachine) Close(ctx context.Context) error {
	if m.network == nil {
		return nil
	}
	return errors.Join(m.network.Close(ctx), m.host.remove())
}

// Release lets go of the names; the table and the user ids stay, for the sandboxes that do.
func (m *NamespaceMachine) Release() error { return m.host.leave() }

// Start makes the network, fences it, and only then starts the first process in it.
func (m *NamespaceMachine) Start(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (Instance, error) {
	s := &namespaceSandbox{machine: m}
	if m.network != nil {
		slot, err := m.network.Acquire(ctx, p.Slot)
		if err != nil {
			return nil, err
		}
		s.slot = slot
		reached(StepNetwork)
		if err := s.SetFence(ctx, fence); err != nil {
			return nil, fmt.Errorf("apply egress rules: %w", err)
		}
		reached(StepFence)
	}
	process, err := m.namespaces.Start(ctx, m.spec(p))
	if err != nil {
		return nil, err
	}
	s.attach(process)
	if err := s.Health(ctx); err != nil { // the socket listens since before the guest: the question waits in its queue
		return nil, fmt.Errorf("wait for guest: %w", errors.Join(err, process.Err()))
	}
	reached(StepStarted)
	return s, nil
}

// Adopt takes up a committed sandbox if both its network and its process are whole.
func (m *NamespaceMachine) Adopt(ctx context.Context, p Place, handle json.RawMessage) (Instance, error) {
	var h namespace.Handle
	if err := json.Unmarshal(handle, &h); err != nil {
		return nil, fmt.Errorf("decode handle: %w", err)
	}
	s := &namespaceSandbox{machine: m}
	if m.network != nil {
		slot, err := m.network.Adopt(p.Slot)
		if err != nil {
			return nil, err
		}
		s.slot = slot
	}
	process, err := m.namespaces.Adopt(ctx, m.spec(p), h)
	if err != nil {
		return nil, err
	}
	s.attach(process)
	return s, nil
}

// Destroy ends the processes first: a process keeps the namespace that it is in, and its rules, until it is gone.
func (m *NamespaceMachine) Destroy(ctx context.Context, p Place, reached func(Step)) error {
	if err := m.namespaces.Destroy(ctx, m.spec(p)); err != nil {
		return err
	}
	reached(StepStopped)
	if m.network == nil || p.Slot == NoSlot {
		return nil
	}
	if err := m.network.Release(ctx, p.Slot); err != nil {
		return err
	}
	reached(StepUnwired)
	return nil
}

// Occupied lists the slots of which the host has a namespace or a device.
func (m *NamespaceMachine) Occupied(ctx context.Context) ([]int, error) {
	if m.network == nil {
		return nil, nil
	}
	return m.network.List(ctx)
}

// Log is empty: nothing that a sandbox says is kept.
func (m *NamespaceMachine) Log(Place, int64) ([]byte, error) { return nil, nil }

// spec derives from a place all that the process needs, and all by which it is found again.
func (m *NamespaceMachine) spec(p Place) namespace.Spec {
	spec := namespace.Spec{
		ID:       p.ID,
		Dir:      p.Dir,
		Hostname: p.ID,
		UIDBase:  m.host.uid(p.Slot),
		Limits:   namespace.Limits{MemoryMiB: p.MemoryMiB, CPUs: p.CPUs, Pids: m.opts.Pids},
		Resolv:   m.opts.Resolvers,
		Template: p.Root,
	}
	if m.network != nil {
		spec.NetNS = m.network.Path(p.Slot) // of no slot: a path that does not exist
	}
	if p.ID == "" { // only the slot is known: its processes are found by network namespace and user ids
		spec.ID = "slot-" + strconv.Itoa(p.Slot)
		spec.Dir = filepath.Join(m.opts.StateDir, spec.ID)
	}
	return spec
}

// namespaceSandbox is one sandbox of a NamespaceMachine.
type namespaceSandbox struct {
	machine *NamespaceMachine
	slot    *netdev.Slot // nil in rootless mode
	process *namespace.Process
	guest   *guest.Client
}

func (s *namespaceSandbox) attach(p *namespace.Process) {
	s.process = p
	s.guest = guest.NewClient(p.Handle().ControlSocket)
}

func (s *namespaceSandbox) Handle() json.RawMessage {
	text, err := json.Marshal(s.process.Handle())
	if err != nil {
		panic("BUG: encode handle: " + err.Error()) // numbers and strings
	}
	return text
}

func (s *namespaceSandbox) Commit() error         { return s.process.Commit() }
func (s *namespaceSandbox) Release() error        { return s.process.Release() }
func (s *namespaceSandbox) Done() <-chan struct{} { return s.process.Done() }
func (s *namespaceSandbox) Err() error            { return s.process.Err() }

func (s *namespaceSandbox) Init(ctx context.Context, r guest.InitRequest) error {
	return s.guest.Init(ctx, r)
}
func (s *namespaceSandbox) Health(ctx context.Context) error { return s.guest.Health(ctx) }
func (s *namespaceSandbox) Metrics(ctx context.Context) (guest.Metrics, error) {
	return s.guest.Metrics(ctx)
}

// SetFence has nothing to do in rootless mode: that network has a loopback and no way out, which is tighter than any policy.
func (s *namespaceSandbox) SetFence(ctx context.Context, fence egress.Policy) error {
	if s.slot == nil {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	fence, err := protect(fence, s.machine.opts.Protected)
	if err != nil {
		return err
	}
	return egress.Apply(s.slot.NetNS, egress.Compile(fence, egress.Local(s.slot.GuestAddr, s.slot.GuestAddr6)))
}

// Refusals reads the counters of the rules; in rootless mode there are none, because nothing leaves.
func (s *namespaceSandbox) Refusals() (egress.Refusals, error) {
	if s.slot == nil {
		return egress.Refusals{}, nil
	}
	return egress.Counters(s.slot.NetNS)
}

// DialPort opens the socket in the network namespace of the sandbox; in rootless mode, where that is closed to us, the guest does.
func (s *namespaceSandbox) DialPort(ctx context.Context, port uint16) (net.Conn, error) {
	if s.slot == nil {
		return s.guest.DialPort(ctx, port)
	}
	return s.slot.DialTCP(ctx, port)
}
