package sandboxd

import (
	"context"
	"slices"
	"time"
)

// Published is what the rest of the world learns about a sandbox of this node: the content of its route, in this package's words.
type Published struct {
	Sandbox    string
	Generation uint64
	State      State // running or paused
	EndAt      time.Time
	TokenHash  TokenHash // zero means public
	Mask       string
	HTTPSPorts []uint16
	AutoResume bool
	EnvdHash   TokenHash // of the agent's token; zero means that the agent asks for none
}

// equal tells whether two routes say the same. Times may have passed through an encoding of milliseconds.
func (p Published) equal(q Published) bool {
	return p.Sandbox == q.Sandbox && p.Generation == q.Generation && p.State == q.State && p.TokenHash == q.TokenHash &&
		p.Mask == q.Mask && p.AutoResume == q.AutoResume && p.EnvdHash == q.EnvdHash && p.EndAt.UnixMilli() == q.EndAt.UnixMilli() &&
		slices.Equal(sorted(p.HTTPSPorts), sorted(q.HTTPSPorts))
}

func sorted(ports []uint16) []uint16 { return slices.Compact(slices.Sorted(slices.Values(ports))) }

// Capacity is what the node says about itself in its lease.
type Capacity struct {
	Sandboxes    int
	MaxSandboxes int
	Machine      string
	Draining     bool // takes no new sandboxes: it is starting or stopping, or its host is broken
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
