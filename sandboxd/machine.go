package sandboxd

import (
	"context"
	"encoding/json"
	"errors"
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
	Root      string // of the template or snapshot: a directory; "" is the machine's own
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
	// the kernel only: a guest that does not answer must not delay the start of the node. One that a Suspend or Snapshot of that run has
	// left standing still is a Suspended, and stands still until its Continue.
	Adopt(ctx context.Context, p Place, handle json.RawMessage) (Instance, error)
	// Destroy removes everything at the place but its directory, whoever made it and however far that went. It is idempotent. After
	// a crash either the ID or the slot may be unknown: then what the other one names is removed.
	Destroy(ctx context.Context, p Place, reached func(Step)) error
	// Occupied lists the slots of which something exists on the host.
	Occupied(ctx context.Context) ([]int, error)
	// Log returns the end of what the sandbox's console and its agent have said, at most max bytes, also after its process has ended
	// and as long as its directory exists. Nothing was said: no bytes and no error. The sandbox chose every byte of it. It may be
	// called at any time, whatever else is done to the place.
	Log(p Place, max int64) ([]byte, error)
}

// Suspender is what a Machine is as well when its sandboxes can be saved and go on later. Where it is missing, a node answers a pause
// with Invalid.
//
// What was saved lies in the directory of the place and is the machine's own business. It is kept by Destroy, which removes what the
// place has on the host besides it, and goes when the manager removes the directory.
type Suspender interface {
	Machine
	// Suspend saves a running sandbox and ends its process: with memory everything that runs in it, without it the disk alone. It
	// appears whole or not at all. After an error nothing is saved and the sandbox runs on, unless it is Done or the caller has
	// cancelled. The caller destroys the place next.
	Suspend(ctx context.Context, p Place, i Instance, memory bool, reached func(Step)) error
	// Resume is Start for a place of which a sandbox was saved, in any slot. With saved memory it returns before the sandbox's
	// first instruction: until Continue nothing of what was saved has changed, so that after an error, or a crash, the caller destroys the
	// place and the sandbox is paused as before. Without memory the guest boots anew from the disk, and Start's rules hold.
	Resume(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (Suspended, error)
	// DropMemory removes saved memory, so that Resume boots from the disk. It is idempotent.
	DropMemory(p Place) error
	// Saved describes what Suspend has left at the place and Continue has not yet used up: the memory; the disk may be there ever after.
	// Nothing saved is NotFound; saved memory that is damaged is Unavailable and names what is kept: the disk.
	Saved(p Place) (Saved, error)
	// Snapshot copies a running sandbox, memory and disk, into dir, an empty directory on the file system of the places: from then on it
	// is a root that Start accepts, under whatever name, and that may be removed when Start has returned. The sandbox stands still
	// meanwhile and goes on, also after an error, but not for a caller that has cancelled: that one destroys the place.
	Snapshot(ctx context.Context, p Place, i Instance, dir string) error
}

// Saved is what a paused sandbox consists of.
type Saved struct {
	Memory bool
	Bytes  int64 // of disk space, all of it
}

// Suspended is a sandbox that Resume has brought back.
type Suspended interface {
	Instance
	// Memory tells whether the guest's memory was saved: then it knows who it is and only needs Continue. Otherwise it has booted, and
	// Init follows, as after Start.
	Memory() bool
	// Continue lets the guest run, sets its clock, and ends the connections that it still believes in. It is idempotent. From its
	// first effect on Saved finds no memory any more, because the disk goes on changing. When it fails the guest may have run; with
	// errUntold it does run, and does not answer.
	Continue(ctx context.Context, r guest.ResumeRequest) error
}

var errUntold = errors.New("the guest runs and was not told that time has passed")

// Preparer is what a Machine is as well when a slot can be made ready before a sandbox wants it.
type Preparer interface {
	// Prepare makes of a free slot whatever does not depend on the sandbox. Start and Resume find it; Destroy removes it, by its slot.
	Prepare(ctx context.Context, slot int) error
}

// Templates is what a Machine is as well when templates are made while the node runs. It is asked at every create and every list, so
// that a new one is seen at once; the manager then has no templates of its own but those of its Options.
type Templates interface {
	// Template finds one by a reference as the API's grammar has it, in lower case. An unknown one is NotFound.
	Template(reference string) (Template, error)
	// Templates lists all.
	Templates() ([]Template, error)
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
