// Package api is the REST API that E2B's SDKs speak. It decodes and checks requests, calls the sandboxes of this node, encodes
// the answers in the contract's form, and hands a call about another node's sandbox to that node. It keeps no state of its own
// but rate limits, and knows nothing of how sandboxes are made or reached. The orchestrator serves it.
package api

//go:generate go run github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2 --config gen/config.yaml openapi.yaml

import (
	"context"
	"errors"
	"net/http"
	"reflect"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
)

const (
	// clientID is what every sandbox answers as its clientID; old SDKs append it to ids.
	clientID = "6532622b"
	// envdVersion unlocks every feature of the SDKs that guestd implements.
	envdVersion = "0.6.13"

	defaultTimeout       = 300 * time.Second // of the v2 calls
	defaultLegacyTimeout = 15 * time.Second  // of the calls before them
)

// Sandboxes are the sandboxes of this node: a *sandboxd.Manager.
type Sandboxes interface {
	Create(ctx context.Context, spec sandboxd.CreateSpec) (sandboxd.Sandbox, error)
	Get(id string) (sandboxd.Sandbox, error)
	List() []sandboxd.Sandbox
	Kill(ctx context.Context, id string) error
	SetTimeout(ctx context.Context, id string, d time.Duration) error
	Refresh(ctx context.Context, id string, d time.Duration) error
	Connect(ctx context.Context, id string, opts sandboxd.ConnectOptions) (sb sandboxd.Sandbox, resumed bool, err error)
	UpdateNetwork(ctx context.Context, id string, network sandboxd.Network) error
	Pause(ctx context.Context, id string, keepMemory bool) error
	Snapshot(ctx context.Context, id, name string) (sandboxd.Snapshot, error)
	Snapshots() []sandboxd.Snapshot
	RemoveSnapshot(ctx context.Context, id string) error
	Fork(ctx context.Context, id string, specs []sandboxd.ForkSpec) ([]sandboxd.ForkResult, error)
	Log(ctx context.Context, id string, max int64) ([]byte, error)
	Metrics(ctx context.Context, id string) ([]sandboxd.Metrics, error)
	Templates() []sandboxd.Template
	Capacity() sandboxd.Capacity
}

// Nodes is the catalogue of the cluster: a routing.Store.
type Nodes interface {
	Nodes(ctx context.Context) ([]routing.Node, error)
	Route(ctx context.Context, sandbox string) (routing.Route, error)
}

// Options configures New. Sandboxes, Keys and Tokens are required.
type Options struct {
	Sandboxes Sandboxes
	Keys      *auth.Keyring
	Tokens    auth.TokenKey

	// Domain is told to clients: `<port>-<sandboxID>.<Domain>` is a port's public name. It may carry a port. When empty, clients use
	// the domain that they were configured with.
	Domain string

	// NodeID is this node's name in Nodes. A nil Nodes means that there is no other node.
	NodeID string
	Nodes  Nodes
	// Transport reaches other nodes' APIAddr; nil means plain HTTP for a private network. With its own it can be mutual TLS.
	Transport http.RoundTripper

	MaxTimeout    time.Duration // longest timeout a client may ask for; zero means 24h
	TeamSandboxes int           // how many sandboxes a team may have running at once in the cluster; zero means no limit
	TeamPaused    int           // how many paused ones a team may have on this node before it is refused new ones; zero means 1000

	// Rate and Burst limit the calls of one key to one operation; zero means 100 a second with bursts of 200. A negative Rate
	// switches the limit off.
	Rate  float64
	Burst int

	Log     *zap.Logger
	Metrics *metrics.Set
}

// New returns the API as a handler. Serve it with Server, whose limits it relies on.
func New(opts Options) (http.Handler, error) {
	if opts.Sandboxes == nil || opts.Keys == nil {
		return nil, errors.New("api: Options.Sandboxes and Options.Keys are required")
	}
	if reflect.ValueOf(opts.Tokens).IsZero() {
		return nil, errors.New("api: Options.Tokens is required: there are no tokens without a key")
	}
	if opts.Nodes != nil && opts.NodeID == "" {
		return nil, errors.New("api: Options.Nodes needs Options.NodeID")
	}
	if opts.MaxTimeout == 0 {
		opts.MaxTimeout = 24 * time.Hour
	}
	if opts.TeamPaused == 0 {
		opts.TeamPaused = 1000
	}
	if opts.Log == nil {
		opts.Log = zap.NewNop()
	}
	if opts.Metrics == nil {
		opts.Metrics = metrics.NewSet()
	}
	if opts.Transport == nil {
		opts.Transport = newTransport()
	}
	operations, err := loadOperations()
	if err != nil {
		return nil, err
	}
	limits, err := newLimits(opts.Rate, opts.Burst)
	if err != nil {
		return nil, err
	}
	h := &handler{
		sandboxes:  opts.Sandboxes,
		keys:       opts.Keys,
		tokens:     opts.Tokens,
		domain:     opts.Domain,
		maxTimeout: opts.MaxTimeout,
		teamPaused: opts.TeamPaused,
		cluster:    cluster{self: opts.NodeID, nodes: opts.Nodes, client: newClient(opts.Transport)},
		teams:      newTeams(opts.TeamSandboxes),
		lists:      newTurns(),
		limits:     limits,
		operations: operations,
		mux:        http.NewServeMux(),
		log:        opts.Log.Named("api"),
		metrics:    opts.Metrics,
	}
	strict := gen.NewStrictHandlerWithOptions(h, nil, gen.StrictHTTPServerOptions{
		RequestErrorHandlerFunc:  h.badRequest,
		ResponseErrorHandlerFunc: h.writeError,
	})
	gen.HandlerWithOptions(strict, gen.StdHTTPServerOptions{
		BaseRouter:       h.mux,
		Middlewares:      []gen.MiddlewareFunc{h.enter},
		ErrorHandlerFunc: h.badParameter,
	})
	return h, nil
}

// Server returns the server that the API is meant to be served by. The times are the contract's: each is a little longer than
// the one before it, so that a slow call ends with an answer and not with a cut connection.
func Server(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      requestTimeout + 5*time.Second,
		IdleTimeout:       620 * time.Second, // longer than any edge keeps a connection, so that the edge closes first
		MaxHeaderBytes:    64 << 10,
	}
}
