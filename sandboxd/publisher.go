package sandboxd

import (
	"context"
	"time"
)

// Published is what the rest of the world learns about a sandbox of this node: the content of its route, in this package's words.
type Published struct {
	Sandbox    string
	Generation uint64
	State      State // running or paused
	EndAt      time.Time
	TokenHash  [32]byte // zero means public
	Mask       string
	HTTPSPorts []uint16
	AutoResume bool
}

// Capacity is what the node says about itself in its lease.
type Capacity struct {
	Sandboxes    int
	MaxSandboxes int
	Machine      string
	Draining     bool // takes no new sandboxes: it is stopping
}

// Publisher is the catalogue that edges read; wiring satisfies it with a routing.Store and the name of this node. Every method
// must be safe for concurrent use.
type Publisher interface {
	// Publish writes the route; the same generation replaces.
	Publish(ctx context.Context, p Published) error
	// Withdraw removes the route of that generation; an absent one is no error.
	Withdraw(ctx context.Context, sandbox string, generation uint64) error
	// Published lists the routes that carry this node's name.
	Published(ctx context.Context) ([]Published, error)
	// Announce renews the node's lease.
	Announce(ctx context.Context, c Capacity) error
}
