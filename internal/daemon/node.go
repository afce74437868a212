package daemon

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/api"
	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/obs"
	"github.com/sluice-edge/sluice/internal/run"
	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
)

// leaseTTL is how long edges believe in a node that has gone silent. It is renewed every third of it.
const leaseTTL = 10 * time.Second

// NodeOptions is what a node is made of.
type NodeOptions struct {
	ID         string
	Domain     string // as SDKs are told; may carry a port
	Store      routing.Store
	Keys       auth.KeyStore
	ClusterKey []byte
	Machine    sandboxd.Machine
	StateDir   string

	Link     net.Listener // for edges; nil when an edge in this process uses Node.Dial
	LinkAddr string       // as edges reach it
	API      net.Listener // REST
	APIAddr  string       // as edges and other nodes reach it

	MaxSandboxes  int // zero: sandboxd's default
	Team          TeamLimits
	KeepSandboxes bool // leave sandboxes running at the end, for the next start to adopt

	Log     *zap.Logger
	Metrics *metrics.Set
}

// TeamLimits are what one team may have. Zero fields mean the defaults of sandboxd and api.
type TeamLimits struct {
	Sandboxes int // running at once, in the cluster
	Paused    int // on a node
	Snapshots int // on a node
}

// Node runs sandboxes and serves the API.
type Node struct {
	group   run.Group
	manager *sandboxd.Manager
	links   *link.Server
}

// NewNode builds a node. It owns the listeners from then on; nothing runs before Run.
func NewNode(opts NodeOptions) (*Node, error) {
	n := &Node{}
	manager, err := sandboxd.New(sandboxd.Options{
		StateDir: opts.StateDir,
		Machine:  opts.Machine,
		Publisher: &publisher{
			store:    opts.Store,
			node:     routing.Node{ID: opts.ID, LinkAddr: opts.LinkAddr, APIAddr: opts.APIAddr},
			leaseTTL: leaseTTL,
		},
		OnGone:        func(sandbox string, generation uint64) { n.links.Reset(sandbox, generation) },
		MaxSandboxes:  opts.MaxSandboxes,
		TeamSandboxes: opts.Team.Sandboxes,
		TeamSnapshots: opts.Team.Snapshots,
		LeaseTTL:      leaseTTL,
		KeepSandboxes: opts.KeepSandboxes,
		Log:           opts.Log,
		Metrics:       opts.Metrics,
	})
	if err != nil {
		return nil, err
	}
	n.manager = manager
	n.links = link.NewServer(manager, link.ServerOptions{Key: opts.ClusterKey, Log: opts.Log, Metrics: opts.Metrics})
	handler, err := api.New(api.Options{
		Sandboxes:     manager,
		Keys:          auth.NewKeyring(opts.Keys, auth.KeyringOptions{}),
		Tokens:        auth.NewTokenKey(opts.ClusterKey),
		Domain:        opts.Domain,
		NodeID:        opts.ID,
		Nodes:         opts.Store,
		TeamSandboxes: opts.Team.Sandboxes,
		TeamPaused:    opts.Team.Paused,
		Log:           opts.Log,
		Metrics:       opts.Metrics,
	})
	if err != nil {
		return nil, err
	}

	n.group.Add("sandboxes", manager.Run)
	n.group.Add("api listener", func(ctx context.Context) error { return n.serveAPI(ctx, opts.API, handler) })
	// The link is served at once, not when all is taken up: each sandbox is reached again the moment it is, and until then an edge
	// hears in a millisecond that the node is busy, which it tells its client with a time to come back. Connections left in the
	// backlog would hang instead, until somebody's patience ends.
	if opts.Link != nil {
		n.group.Add("link listener", func(ctx context.Context) error { return n.links.Serve(ctx, opts.Link) })
	}
	return n, nil
}

// Run serves until ctx ends or a part fails.
func (n *Node) Run(ctx context.Context) error { return n.group.Run(ctx) }

// Ready is closed when what an earlier run left behind has been taken up or removed; the API answers from then on.
func (n *Node) Ready() <-chan struct{} { return n.manager.Ready() }

// Healthy says why the node cannot take sandboxes yet.
func (n *Node) Healthy() error {
	select {
	case <-n.manager.Ready():
		return nil
	default:
		return errors.New("reconcile of an earlier run's sandboxes is under way")
	}
}

// Dial is the link without a network, for an edge in the same process.
func (n *Node) Dial(ctx context.Context, t link.Target) (net.Conn, error) {
	return n.links.Direct()(ctx, t)
}

// serveAPI waits for the reconcile first: a create before it could take what a surviving sandbox still holds.
func (n *Node) serveAPI(ctx context.Context, ln net.Listener, handler http.Handler) error {
	select {
	case <-n.manager.Ready():
		return obs.ServeHTTP(ctx, ln, api.Server(handler))
	case <-ctx.Done():
		return ln.Close()
	}
}
