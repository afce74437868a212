// Package sandboxd is the life of sandboxes on one node: it creates and kills them, keeps their deadlines, publishes their
// routes, opens connections to their ports, and after a crash takes up what still runs and removes what does not. It knows
// nothing of HTTP. The REST API calls it for its clients, the link's node half for the edges' connections.
package sandboxd

import (
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"
)

// Options configures a Manager. Machine, Publisher and StateDir are required.
type Options struct {
	StateDir  string // holds one directory per sandbox, and the lock that keeps a second orchestrator out
	Machine   Machine
	Publisher Publisher

	// OnGone is called when a lifecycle has ended and its route is withdrawn, before its process is killed: wiring resets the link
	// connections. It must not block for long.
	OnGone func(sandbox string, generation uint64)

	Templates         []Template    // besides base and code-interpreter-v1; the same ID replaces
	MaxSandboxes      int           // zero means 100
	ConcurrentCreates int           // zero means 8; further ones wait
	MaxTimeout        time.Duration // longest life from start; zero means 24h
	LeaseTTL          time.Duration // of the node's lease; renewed every third of it; zero means 10s

	// KeepSandboxes leaves sandboxes running when Run ends, for a restarted orchestrator to take up. Otherwise they are killed, and
	// nothing of them stays on the host.
	KeepSandboxes bool

	Log     *zap.Logger
	Metrics *metrics.Set
}
