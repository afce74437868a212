package sandboxd

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net"
	"strings"
	"syscall"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

// vmSandbox is one sandbox of a VMMachine.
type vmSandbox struct {
	machine *VMMachine
	place   Place
	slot    *netdev.Slot
	vm      *vmm.VM
	guest   *guest.Client
	memory  bool            // it was restored, not booted
	image   *image.Manifest // of the template that it was just made from, else nil
}

// vmHandle is what Adopt needs.
type vmHandle struct {
	VM     vmm.Handle `json:"vm"`
	Memory bool       `json:"memory"`
}

func (s *vmSandbox) Handle() json.RawMessage {
	text, err := json.Marshal(vmHandle{s.vm.Handle(), s.memory})
	if err != nil {
		panic("BUG: encode handle: " + err.Error()) // numbers
	}
	return text
}

// Commit has nothing to do: a hypervisor outlives us from its first moment, and is found by its place.
func (s *vmSandbox) Commit() error { return nil }

// Release implements Instance.
func (s *vmSandbox) Release() error { return s.vm.Release() }

// Done implements Instance.
func (s *vmSandbox) Done() <-chan struct{} { return s.vm.Done() }

// Err implements Instance. What the guest said last is part of it.
func (s *vmSandbox) Err() error { return s.vm.Err() }

// Init gives the guest its identity: what the manager says, the network card's address and name servers, and below the caller's
// variables those of the image.
func (s *vmSandbox) Init(ctx context.Context, r guest.InitRequest) error {
	r.MAC = guestMAC(s.place.ID).String()
	r.Resolvers = s.machine.opts.Resolvers
	if s.image != nil {
		env := environmentOf(s.image.Env)
		maps.Copy(env, r.EnvVars)
		r.EnvVars = env
		if r.DefaultWorkdir == "" {
			r.DefaultWorkdir = s.image.Workdir
		}
	}
	return s.guest.Init(ctx, r)
}

func environmentOf(list []string) map[string]string {
	env := make(map[string]string, len(list))
	for _, kv := range list {
		if key, value, ok := strings.Cut(kv, "="); ok && key != "" {
			env[key] = value
		}
	}
	return env
}

// Health implements Instance.
func (s *vmSandbox) Health(ctx context.Context) error { return s.guest.Health(ctx) }

// Metrics implements Instance.
func (s *vmSandbox) Metrics(ctx context.Context) (guest.Metrics, error) { return s.guest.Metrics(ctx) }

// SetFence implements Instance.
func (s *vmSandbox) SetFence(ctx context.Context, fence egress.Policy) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.machine.fence(s.slot, s.place.ID, fence)
}

// Refusals reads the counters of the rules.
func (s *vmSandbox) Refusals() (egress.Refusals, error) { return egress.Counters(s.slot.NetNS) }

// DialPort connects over the tap, which the kernel can splice. A server that listens on loopback alone is reached through the agent.
func (s *vmSandbox) DialPort(ctx context.Context, port uint16) (net.Conn, error) {
	conn, err := s.slot.DialTCP(ctx, port)
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return conn, err
	}
	return s.guest.DialPort(ctx, port)
}
