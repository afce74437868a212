// Package daemon puts the two daemons together from their parts: Edge and Node, each built bottom-up and run as one group.
// cmd/edge and cmd/orchestrator add flags and listeners; `sluice dev` and the end-to-end tests run both in one process.
// Reading NewEdge and NewNode top to bottom is reading the architecture.
package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"net"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/run"
	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/proxy"
	"github.com/sluice-edge/sluice/routing"
)

// EdgeOptions is what an edge is made of.
type EdgeOptions struct {
	Domains []string      // base domains, without ports
	Store   routing.Store // the catalogue
	Dial    link.DialFunc // to a sandbox's port: over the network, or the function call of a node in this process
	BareAPI bool          // serve the API on bare addresses too, see proxy.Options
	HTTP    net.Listener  // plaintext; nil serves none
	HTTPS   net.Listener  // raw; NewEdge puts TLS on it; nil serves none
	TLS     *tls.Config   // wanted with HTTPS
	Log     *zap.Logger
	Metrics *metrics.Set
}

// Edge is a running front: it finds the node, decides, and moves bytes.
type Edge struct {
	group run.Group
}

// NewEdge builds an edge. It owns the listeners from then on; nothing runs before Run.
func NewEdge(opts EdgeOptions) (*Edge, error) {
	hosts, err := routing.NewHosts(opts.Domains...)
	if err != nil {
		return nil, err
	}
	if opts.HTTPS != nil && opts.TLS == nil {
		return nil, errors.New("https listener without certificates")
	}
	table := routing.NewTable(opts.Store, routing.TableOptions{Log: opts.Log.Named("routing"), Metrics: opts.Metrics})
	pool := link.NewPool(opts.Dial, link.PoolOptions{Metrics: opts.Metrics})
	handler, err := proxy.New(proxy.Options{
		Hosts:   hosts,
		Routes:  table,
		Link:    pool,
		BareAPI: opts.BareAPI,
		Log:     opts.Log,
		Metrics: opts.Metrics,
	})
	if err != nil {
		return nil, err
	}

	e := &Edge{}
	e.group.Add("route cache", table.Run)
	e.group.Add("link pool", pool.Run)
	if opts.HTTP != nil {
		e.group.Add("http listener", func(ctx context.Context) error { return handler.Serve(ctx, opts.HTTP) })
	}
	if opts.HTTPS != nil {
		ln := tls.NewListener(opts.HTTPS, opts.TLS)
		e.group.Add("https listener", func(ctx context.Context) error { return handler.Serve(ctx, ln) })
	}
	return e, nil
}

// Run serves until ctx ends or a part fails.
func (e *Edge) Run(ctx context.Context) error { return e.group.Run(ctx) }
