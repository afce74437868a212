// Package proxy is the edge's request path: it finds out which sandbox a request is for, decides whether it may pass, and
// moves its bytes there and the answer's bytes back. cmd/edge and sluice dev call it.
//
// It is not a general reverse proxy: there is one upstream per name, reached over the link, and no caching, compression
// or buffering. It keeps no state that it could not rebuild.
//
// The files, in the order in which a request meets them: server.go accepts, client.go reads heads and feeds fasthttp,
// handler.go is the life of one request, decide.go says who may pass, wake.go waits for a paused sandbox, request.go and
// answer.go rewrite heads, upstream.go is one exchange with a sandbox, body.go follows chunked bodies, upgrade.go joins two
// streams, errors.go answers in place of a sandbox. Only server.go knows fasthttp.
package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/routing"
)

// Routes says where a sandbox is; *routing.Table.
type Routes interface {
	Resolve(ctx context.Context, sandbox []byte, client netip.Addr) (*routing.Target, error)
	Forget(sandbox string, generation uint64)
	PickNode(ctx context.Context) (*routing.Node, error)
}

// Upstream opens connections to ports of sandboxes; *link.Pool.
type Upstream interface {
	Get(ctx context.Context, t link.Target) (*link.Conn, error)
	GetFresh(ctx context.Context, t link.Target) (*link.Conn, error)
	Wake(ctx context.Context, t link.Target) error
	Forget(sandbox string, generation uint64)
}

// Options are a handler's parts and settings.
type Options struct {
	Hosts  *routing.Hosts
	Routes Routes
	Link   Upstream

	// LinkTLS is Link with TLS to the server in the sandbox, for ports that the route marks as https. Nil: such ports are
	// refused as unreachable.
	LinkTLS Upstream

	// API opens a connection to a node's API listener, for api.<domain>. Nil: plain TCP.
	API func(ctx context.Context, addr string) (net.Conn, error)

	// BareAPI takes a request to an IP address or localhost that names no sandbox for one to the API, so that a machine
	// without DNS has one address for everything. Else it is a bad host.
	BareAPI bool

	Limits  Limits
	Log     *zap.Logger  // nil: none
	Metrics *metrics.Set // nil: a private one
}

// Limits bound what a client, a sandbox and the whole may take, over all of a handler's listeners. A zero field means the default beside it.
type Limits struct {
	// HeadBytes bounds a request's head; 64 KiB. Browsers send up to 8, and cookies of a whole domain may come to more.
	HeadBytes int

	// Head is how long a head may take to arrive, and on a new connection the TLS handshake with it; 10s. It is what a
	// slowloris has.
	Head time.Duration

	// Idle closes a keep-alive connection that waits for its next request; 620s. Load balancers in front idle for 600s, and
	// whoever is further in must wait longer, or it closes a connection on which the next request is on its way.
	Idle time.Duration

	// Body is how long a request's body may pause; 10m. Uploads by hand and streams of events pause for minutes.
	Body time.Duration

	// Unread is how long a client may leave what we sent it unread; 10m, which a paused video takes.
	Unread time.Duration

	// HalfClosed bounds the silence on the open half of an upgraded connection after the other half has ended; 10m.
	HalfClosed time.Duration

	// Linger and LingerBytes bound what is read and dropped after an early answer, so that it is not lost in a reset; 1s,
	// 256 KiB.
	Linger      time.Duration
	LingerBytes int

	// Drain is how long Serve waits at its end for requests under way; 15s.
	Drain time.Duration

	// Dial bounds a new connection to a node's API when Options.API is nil; 10s. The link has its own bound for sandboxes.
	Dial time.Duration

	// Conns bounds connections in all; 65536, at about 10 KiB each when idle.
	Conns int

	// ConnsPerClient bounds those of one address; 1024. SDKs pool 200 for each of their kinds, and offices share addresses.
	ConnsPerClient int

	// ConnsPerSandbox bounds requests under way to one sandbox lifecycle; 4096. Negative: no bound.
	ConnsPerSandbox int

	// BodiesPerSandbox bounds the requests to one sandbox lifecycle whose bodies are still arriving; 256. Each may hold some
	// 3 MiB of the kernel's on its way when the sandbox does not read, which an answer's wait does not. Negative: no bound.
	BodiesPerSandbox int

	// Wake bounds the wait for a paused sandbox to run; 70s. The node ends it after 65 and then says why.
	Wake time.Duration

	// Wakes bounds the sandboxes that are being woken at once for this edge; 1024, at a connection and a goroutine each.
	Wakes int

	// WakesPerClient bounds those that requests from one address began; 64. Each may cost a node gigabytes to be read, for a
	// request of a line; and whoever keeps many sandboxes may want many at once.
	WakesPerClient int
}

func (l *Limits) setDefaults() {
	setDefault(&l.HeadBytes, 64<<10)
	setDefault(&l.Head, 10*time.Second)
	setDefault(&l.Idle, 620*time.Second)
	setDefault(&l.Body, 10*time.Minute)
	setDefault(&l.Unread, 10*time.Minute)
	setDefault(&l.HalfClosed, 10*time.Minute)
	setDefault(&l.Linger, time.Second)
	setDefault(&l.LingerBytes, 256<<10)
	setDefault(&l.Drain, 15*time.Second)
	setDefault(&l.Dial, 10*time.Second)
	setDefault(&l.Conns, 65536)
	setDefault(&l.ConnsPerClient, 1024)
	setDefault(&l.ConnsPerSandbox, 4096)
	setDefault(&l.BodiesPerSandbox, 256)
	setDefault(&l.Wake, 70*time.Second)
	setDefault(&l.Wakes, 1024)
	setDefault(&l.WakesPerClient, 64)
	l.HeadBytes = max(l.HeadBytes, len(bufPage{})) // a smaller one would be no bound: a page is read at once
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Handler serves requests; one for any number of listeners.
type Handler struct {
	// Fixed after New.
	hosts   *routing.Hosts
	routes  Routes
	link    Upstream
	linkTLS Upstream
	api     func(ctx context.Context, addr string) (net.Conn, error)
	bareAPI bool
	limits  Limits
	log     *zap.Logger
	stats   *stats

	warnOnce sync.Once

	conns  connCount
	load   load // requests under way
	bodies load // of these, those whose body is still arriving
	wakes  wakes
}

// New returns a handler. It starts nothing: see Serve.
func New(opts Options) (*Handler, error) {
	if opts.Hosts == nil || opts.Routes == nil || opts.Link == nil {
		return nil, errors.New("proxy: Hosts, Routes and Link must be set")
	}
	opts.Limits.setDefaults()
	h := &Handler{
		hosts:   opts.Hosts,
		routes:  opts.Routes,
		link:    opts.Link,
		linkTLS: opts.LinkTLS,
		api:     opts.API,
		bareAPI: opts.BareAPI,
		limits:  opts.Limits,
		log:     opts.Log,
		stats:   newStats(opts.Metrics),
		conns:   connCount{byClient: make(map[netip.Addr]int)},
	}
	if h.api == nil {
		dialer := &net.Dialer{Timeout: opts.Limits.Dial}
		h.api = func(ctx context.Context, addr string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", addr) }
	}
	if h.log == nil {
		h.log = zap.NewNop()
	}
	h.log = h.log.Named("proxy")
	h.load.init(opts.Limits.ConnsPerSandbox)
	h.bodies.init(opts.Limits.BodiesPerSandbox)
	h.wakes.init(&opts.Limits)
	return h, nil
}
