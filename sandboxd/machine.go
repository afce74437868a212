package sandboxd

import (
	"context"
	"encoding/json"
	"net"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

// Place is where a sandbox lives on the node. Everything that a machine acquires for it is derivable from these values, and they are
// in the record before the first of it exists: so whatever a crash leaves behind can be found and removed.
type Place struct {
	ID        string
	Dir       string // private directory of this sandbox; removed by the manager, after everything else
	Slot      int    // network slot and range of user ids; unique among the sandboxes of this node, NoSlot when unknown
	Root      string // of the template
	CPUs      int
	MemoryMiB int
	DiskMiB   int
}

// NoSlot is the slot of a place of which only the name is known.
const NoSlot = -1

// Machine makes sandboxes of one kind. Its methods may be called concurrently for different places, never for the same.
type Machine interface {
	// Name is how operators know this kind: "namespace".
	Name() string
	// Slots is the number of places there are: slots go from 0 to one below it.
	Slots() int
	// Setup prepares the host; it may find the work of an earlier run.
	Setup(ctx context.Context) error
	// Maintain looks whether what Setup made is still in place, because somebody else's hands are on the host too, and puts back what
	// is missing. An error means that sandboxes lack it. It is called every few seconds.
	Maintain(ctx context.Context) error
	// Close removes what Setup made. All places are destroyed by then.
	Close(ctx context.Context) error
	// Release lets go of the host without changing it, for a node that stops and leaves its sandboxes running.
	Release() error
	// Start makes the sandbox up to the point where its guest answers on the control connection, with the fence up before the first
	// process. reached is told after every step. After an error the caller destroys the place. Until Commit the death of this
	// process kills the sandbox.
	Start(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (Instance, error)
	// Adopt takes up a sandbox that an earlier run committed. An error means that it is not whole; nothing is removed. It looks at
	// the kernel only: a guest that does not answer must not delay the start of the node.
	Adopt(ctx context.Context, p Place, handle json.RawMessage) (Instance, error)
	// Destroy removes everything at the place but its directory, whoever made it and however far that went. It is idempotent. After
	// a crash either the ID or the slot may be unknown: then what the other one names is removed.
	Destroy(ctx context.Context, p Place, reached func(Step)) error
	// Occupied lists the slots of which something exists on the host.
	Occupied(ctx context.Context) ([]int, error)
}

// Instance is a started sandbox.
type Instance interface {
	// Handle is what Adopt needs to find it again.
	Handle() json.RawMessage
	// Commit lets it outlive this process.
	Commit() error
	// Init gives the guest its identity.
	Init(ctx context.Context, r guest.InitRequest) error
	// Health asks the guest whether it serves.
	Health(ctx context.Context) error
	// Metrics asks the guest what it uses.
	Metrics(ctx context.Context) (guest.Metrics, error)
	// SetFence replaces the egress rules in one step and cuts the flows that the new ones forbid. After an error either the old ones
	// or the new ones are in force.
	SetFence(ctx context.Context, fence egress.Policy) error
	// Refusals counts what the egress rules have turned away since the sandbox was made.
	Refusals() (egress.Refusals, error)
	// DialPort connects to a port as seen inside. ECONNREFUSED is reported as such.
	DialPort(ctx context.Context, port uint16) (net.Conn, error)
	// Release stops watching it without ending it, for a node that stops and leaves it running. Nothing else is called afterwards.
	Release() error
	// Done is closed when it has died, by itself or by Destroy; Err says why, afterwards.
	Done() <-chan struct{}
	Err() error
}
