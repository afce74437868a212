// Package loadtest sends requests at a fixed rate, whatever the answers do, and measures each from the moment at which it was
// due. A server that stalls for a second therefore costs every request of that second, as it would cost real clients; a
// generator that waits for an answer before it sends the next one would have reported one slow request.
//
// It sees only what a client sees: it imports nothing of this module, sends to the one address that it is given, and
// follows nothing. `make bench` runs its scenarios against a server directly and through the edge.
package loadtest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Bounds of a run. The longest run is a bound on the harm of a wrong address, not on what is useful to measure.
const (
	maxDuration    = 10 * time.Minute
	maxRate        = 200_000
	maxConnections = 10_000
	maxTimeout     = time.Minute
)

// Header is one header field of a request.
type Header struct{ Name, Value string }

// Scenario is what one request is.
type Scenario struct {
	Name   string
	Path   string // with its query; empty means "/"
	Header []Header

	// WebSocket upgrades each connection once and then echoes one message per request.
	WebSocket bool

	// Want, if not empty, must be in the answer's body.
	Want string
}

// SmallGet is a GET on a kept-alive connection.
func SmallGet(path string) Scenario { return Scenario{Name: "get", Path: path} }

// TokenGet is a GET of a private sandbox with its traffic token.
func TokenGet(path, token string) Scenario {
	return Scenario{Name: "token", Path: path, Header: []Header{{"E2b-Traffic-Access-Token", token}}}
}

// MaskGet is a GET of a sandbox with a mask, at a path whose answer shows the Host that the server saw: want.
func MaskGet(path, want string) Scenario { return Scenario{Name: "mask", Path: path, Want: want} }

// WebSocketEcho is a message to an echoing WebSocket server and back.
func WebSocketEcho(path string) Scenario {
	return Scenario{Name: "websocket", Path: path, WebSocket: true}
}

// Options say what to send where, how fast and for how long.
type Options struct {
	Label    string // the column in the table: "direct", "edge"
	Scenario Scenario
	Addr     string      // host:port to connect to; nothing else is ever contacted
	TLS      *tls.Config // nil: plain HTTP
	Host     string      // the Host header; empty means Addr
	Header   []Header    // beside the scenario's

	Rate     float64       // requests per second
	Duration time.Duration // of what is measured
	Warmup   time.Duration // before that, at the same rate, not measured

	// Connections bounds how many requests are under way at a time; zero means 64.
	Connections int

	// Timeout is how long a sent request may take, and how late it may be sent at all; zero means 5s.
	Timeout time.Duration
}

func (o *Options) validate() error {
	var problems []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	if _, _, err := net.SplitHostPort(o.Addr); err != nil {
		problems = append(problems, fmt.Errorf("option Addr %q: %w", o.Addr, err))
	}
	check(o.Rate > 0 && o.Rate <= maxRate, "Rate %v: want more than 0, at most %d", o.Rate, maxRate)
	check(o.Duration > 0, "Duration %v: want more than 0", o.Duration)
	check(o.Warmup >= 0, "Warmup %v: want none or some", o.Warmup)
	check(o.Duration <= maxDuration && o.Warmup <= maxDuration && o.Duration+o.Warmup <= maxDuration,
		"Duration and Warmup %v: want at most %v", o.Duration+o.Warmup, maxDuration)
	check(o.Connections > 0 && o.Connections <= maxConnections, "Connections %d: want 1 to %d", o.Connections, maxConnections)
	check(o.Timeout > 0 && o.Timeout <= maxTimeout, "Timeout %v: want more than 0, at most %v", o.Timeout, maxTimeout)
	fields := []string{o.Host, o.Scenario.Path}
	for _, h := range o.headers() {
		fields = append(fields, h.Name, h.Value)
	}
	for _, f := range fields {
		check(!strings.ContainsAny(f, "\r\n\x00"), "%q does not fit into a request", f)
	}
	check(o.Scenario.Path[0] == '/' && !strings.Contains(o.Scenario.Path, " "), "Path %q: want it to begin with / and to have no space", o.Scenario.Path)
	return errors.Join(problems...)
}

func (o *Options) headers() []Header {
	return append(append([]Header(nil), o.Scenario.Header...), o.Header...)
}

// ErrorKind says why a request has no good answer.
type ErrorKind uint8

// The kinds of errors.
const (
	ErrDial     ErrorKind = iota // no connection, or no upgrade on it
	ErrTimeout                   // given up
	ErrClosed                    // the connection ended before the answer did
	ErrStatus                    // an answer with another status than 200
	ErrBody                      // an answer without what the scenario wants
	ErrProtocol                  // no answer in the sense of HTTP or WebSocket
	errorKinds
)

var errorNames = [errorKinds]string{"dial", "timeout", "closed", "status", "body", "protocol"}

// String is the name in the table.
func (k ErrorKind) String() string { return errorNames[k] }

// Percentiles are of a distribution of times.
type Percentiles struct{ P50, P90, P99, P999, Max time.Duration }

// Result is what a run measured. Due = Sent + Unstarted, and Sent = OK + all Errors.
type Result struct {
	Label    string
	Scenario string
	Rate     float64 // asked for

	Due       int             // requests that the rate and the duration call for
	Sent      int             // begun
	OK        int             // answered as wanted
	Unstarted int             // never begun: all connections were busy for longer than Timeout
	Errors    [errorKinds]int // by ErrorKind
	Reopened  int             // kept-alive connections that the server had closed while they were idle

	// Latency counts from when a request was due. Requests that timed out or were not started are in it with the time after
	// which they were given up; leaving them out would make an overloaded server look good. Other errors are not in it.
	Latency Percentiles

	// Service counts from when a request was really sent. The difference to Latency is what waited for a connection.
	Service Percentiles

	Throughput float64 // good answers per second
}

// Failed returns the number of errors of all kinds.
func (r *Result) Failed() int {
	n := 0
	for _, e := range r.Errors {
		n += e
	}
	return n
}

// Run sends Rate times Duration requests, one every 1/Rate, and returns what came of them. It ends at the latest two
// Timeouts after the last one was due. The error is about the options or from ctx: what servers do is in the Result.
func Run(ctx context.Context, opts Options) (Result, error) {
	if opts.Connections == 0 {
		opts.Connections = 64
	}
	if opts.Timeout == 0 {
		opts.Timeout = 5 * time.Second
	}
	if opts.Scenario.Path == "" {
		opts.Scenario.Path = "/"
	}
	if opts.Host == "" {
		opts.Host = opts.Addr
	}
	if err := opts.validate(); err != nil {
		return Result{}, fmt.Errorf("load test: %w", err)
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g := newGenerator(opts)
	g.start = time.Now()
	var workers sync.WaitGroup
	for range min(opts.Connections, int(g.total)) {
		workers.Go(func() { g.work(ctx) })
	}
	workers.Wait()
	if err := ctx.Err(); err != nil {
		return Result{}, err
	}
	return g.result(), nil
}

// generator is one run.
type generator struct {
	// Fixed once the workers run.
	opts    Options
	request []byte
	start   time.Time
	warm    int64 // requests of the warm-up
	total   int64 // with the warm-up

	next atomic.Int64 // the next request's number

	mu      sync.Mutex // guards the fields below
	counts  Result
	latency *hdrhistogram.Histogram // microseconds
	service *hdrhistogram.Histogram
}

func newGenerator(opts Options) *generator {
	longest := 2 * int64(opts.Timeout/time.Microsecond) // once waiting, once sent
	return &generator{
		opts:    opts,
		request: appendRequest(nil, &opts),
		warm:    int64(opts.Rate * opts.Warmup.Seconds()),
		total:   max(1, int64(opts.Rate*opts.Warmup.Seconds())+int64(opts.Rate*opts.Duration.Seconds())),
		latency: hdrhistogram.New(1, longest, 3),
		service: hdrhistogram.New(1, longest, 3),
	}
}

// due returns when request number i has to be sent. It comes from the number alone: no answer can shift it.
func (g *generator) due(i int64) time.Time {
	return g.start.Add(time.Duration(float64(i) / g.opts.Rate * float64(time.Second)))
}

// work takes request after request, waits until it is due and sends it. Idle workers hold the next requests; when none
// is idle, requests become late, and their latency says so.
func (g *generator) work(ctx context.Context) {
	c := client{opts: &g.opts, request: g.request}
	defer c.close()
	for {
		i := g.next.Add(1) - 1
		if i >= g.total {
			return
		}
		due := g.due(i)
		if !sleepUntil(ctx, due) {
			return
		}
		sent := time.Now()
		if sent.Sub(due) >= g.opts.Timeout {
			g.record(i, func() {
				g.counts.Unstarted++
				g.observe(g.latency, sent.Sub(due))
			})
			continue
		}
		reopened, err := c.exchange(ctx, sent.Add(g.opts.Timeout))
		if ctx.Err() != nil {
			return
		}
		done := time.Now()
		g.record(i, func() {
			g.counts.Sent++
			if reopened {
				g.counts.Reopened++
			}
			if err == nil {
				g.counts.OK++
				g.observe(g.latency, done.Sub(due))
				g.observe(g.service, done.Sub(sent))
				return
			}
			g.counts.Errors[err.kind]++
			if err.kind == ErrTimeout {
				g.observe(g.latency, done.Sub(due))
			}
		})
	}
}

// record calls add under the lock, unless request i belongs to the warm-up.
func (g *generator) record(i int64, add func()) {
	if i < g.warm {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.counts.Due++
	add()
}

func (g *generator) observe(h *hdrhistogram.Histogram, d time.Duration) {
	v := min(max(1, d.Microseconds()), h.HighestTrackableValue())
	if err := h.RecordValue(v); err != nil {
		panic("BUG: a value within the histogram's bounds is outside: " + err.Error())
	}
}

func (g *generator) result() Result {
	r := g.counts
	r.Label, r.Scenario, r.Rate = g.opts.Label, g.opts.Scenario.Name, g.opts.Rate
	r.Latency, r.Service = percentiles(g.latency), percentiles(g.service)
	// Over the time in which requests were due, or longer when the last answers came later.
	measured := max(g.opts.Duration, time.Since(g.due(g.warm)))
	r.Throughput = float64(r.OK) / measured.Seconds()
	return r
}

func percentiles(h *hdrhistogram.Histogram) Percentiles {
	at := func(q float64) time.Duration { return time.Duration(h.ValueAtQuantile(q)) * time.Microsecond }
	return Percentiles{P50: at(50), P90: at(90), P99: at(99), P999: at(99.9), Max: time.Duration(h.Max()) * time.Microsecond}
}

// sleepUntil returns false when ctx ended first.
func sleepUntil(ctx context.Context, t time.Time) bool {
	d := time.Until(t)
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
