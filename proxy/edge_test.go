package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/routing"
)

const (
	testDomain = "sluice.test"
	testToken  = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
)

// edge is a running edge with a real table, a real pool and, in place of nodes, a table of who listens where.
type edge struct {
	addr    string // plain
	store   *routing.MemoryStore
	handler *Handler
	metrics *metrics.Set
	stop    context.CancelFunc
	served  chan error

	mu    sync.Mutex // guards the fields below
	ports map[life]map[uint16]string
	wrap  func(link.Target, net.Conn) net.Conn // around what dial opens; nil: nothing
	dials int
	wakes int
	woken func(context.Context, link.Target) error // what the node says to a wake; nil: that nothing is paused
}

func startEdge(t testing.TB, change ...func(*Options)) *edge {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return startEdgeOn(t, ln, change...)
}

func startEdgeOn(t testing.TB, ln net.Listener, change ...func(*Options)) *edge {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	e := &edge{
		addr: ln.Addr().String(), store: routing.NewMemoryStore(), metrics: metrics.NewSet(), stop: cancel,
		served: make(chan error, 1), ports: make(map[life]map[uint16]string),
	}
	hosts, err := routing.NewHosts(testDomain)
	if err != nil {
		t.Fatal(err)
	}
	table := routing.NewTable(e.store, routing.TableOptions{})
	pool := link.NewPool(e.dial, link.PoolOptions{})
	opts := Options{
		Hosts: hosts, Routes: table, Link: pool, Metrics: e.metrics, Log: zap.NewNop(),
		Limits: Limits{Drain: time.Second, Linger: 200 * time.Millisecond},
	}
	for _, f := range change {
		f(&opts)
	}
	if e.handler, err = New(opts); err != nil {
		t.Fatal(err)
	}
	var jobs sync.WaitGroup
	jobs.Go(func() { _ = table.Run(ctx) })
	jobs.Go(func() { _ = pool.Run(ctx) })
	jobs.Go(func() { e.served <- e.handler.Serve(ctx, ln) })
	t.Cleanup(func() {
		cancel()
		jobs.Wait()
	})
	if err := e.store.PutNode(ctx, routing.Node{ID: "node1", LinkAddr: "link:1", APIAddr: "api:1"}, time.Hour); err != nil {
		t.Fatal(err)
	}
	return e
}

// dial is the way of the link: to whoever was put behind a port, or the verdict of a node.
func (e *edge) dial(ctx context.Context, target link.Target) (net.Conn, error) {
	if target.Wake {
		return nil, e.wake(ctx, target)
	}
	e.mu.Lock()
	e.dials++
	ports, here := e.ports[life{target.Sandbox, target.Generation}]
	addr, open := ports[target.Port]
	wrap := e.wrap
	e.mu.Unlock()
	switch {
	case !here:
		return nil, &link.VerdictError{Verdict: link.NotHere}
	case !open:
		return nil, &link.VerdictError{Verdict: link.PortClosed}
	}
	nc, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err == nil && wrap != nil {
		nc = wrap(target, nc)
	}
	return nc, err
}

// wake is the same for a dial that asks for a wake. A node has no better answer than that the lifecycle is another one now.
func (e *edge) wake(ctx context.Context, target link.Target) error {
	e.mu.Lock()
	e.wakes++
	woken := e.woken
	e.mu.Unlock()
	if woken == nil {
		return &link.VerdictError{Verdict: link.NotHere}
	}
	if err := woken(ctx, target); err != nil {
		return err
	}
	return &link.VerdictError{Verdict: link.WrongGeneration}
}

// sandbox publishes a route; ports says who listens on which.
func (e *edge) sandbox(t testing.TB, r routing.Route, ports map[uint16]string) {
	t.Helper()
	if r.Generation == 0 {
		r.Generation = 1
	}
	if r.State == "" {
		r.State = routing.Running
	}
	r.Node = "node1"
	if err := e.store.PutRoute(context.Background(), r); err != nil {
		t.Fatal(err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ports[life{r.Sandbox, r.Generation}] = ports
}

// counter reads one of the package's counters.
func (e *edge) counter(name string) uint64 { return e.metrics.GetOrCreateCounter(name).Get() }

// await waits for something that happens in another goroutine.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

func private(id string) routing.Route {
	return routing.Route{Sandbox: id, TokenHash: auth.HashToken([]byte(testToken))}
}

// rawConn is a client that speaks bytes.
type rawConn struct {
	net.Conn
	t  testing.TB
	br *bufio.Reader
}

func (e *edge) connect(t testing.TB) *rawConn {
	t.Helper()
	nc, err := net.Dial("tcp", e.addr)
	if err != nil {
		t.Fatal(err)
	}
	return wrapRaw(t, nc)
}

func wrapRaw(t testing.TB, nc net.Conn) *rawConn {
	t.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
	return &rawConn{Conn: nc, t: t, br: bufio.NewReader(nc)}
}

func (c *rawConn) write(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c.Conn, s); err != nil {
		c.t.Fatalf("write: %v", err)
	}
}

// readN reads exactly as many bytes as want has, and compares.
func (c *rawConn) expect(want string) {
	c.t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(c.br, got)
	if string(got[:n]) != want {
		c.t.Fatalf("read %q (%v), want %q", got[:n], err, want)
	}
}

// expectEOF wants the end of the stream, in good order.
func (c *rawConn) expectEOF() {
	c.t.Helper()
	rest, err := io.ReadAll(c.br)
	if err != nil || len(rest) != 0 {
		c.t.Fatalf("read %q, %v; want the end of the stream", rest, err)
	}
}

// expectReset wants the stream to be cut.
func (c *rawConn) expectReset() {
	c.t.Helper()
	rest, err := io.ReadAll(c.br)
	if !errors.Is(err, syscall.ECONNRESET) {
		c.t.Fatalf("read %q, %v; want a reset", rest, err)
	}
}

func (c *rawConn) response(method string) (*http.Response, string) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.br, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("read response: %v", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatalf("read body %q: %v", body, err)
	}
	return resp, string(body)
}

// backend is a server in a sandbox that speaks bytes. serve gets each connection; its number counts from 1.
type backend struct {
	addr  string
	conns atomic.Int32
	heads atomic.Int32
}

func startBackend(t testing.TB, serve func(c *rawConn, n int)) *backend {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &backend{addr: ln.Addr().String()}
	var jobs sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	jobs.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			n := int(b.conns.Add(1))
			mu.Lock()
			open = append(open, nc)
			mu.Unlock()
			jobs.Go(func() {
				defer nc.Close()
				_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
				serve(&rawConn{Conn: nc, t: t, br: bufio.NewReader(nc)}, n)
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		mu.Lock()
		for _, nc := range open {
			_ = nc.Close()
		}
		mu.Unlock()
		jobs.Wait()
	})
	return b
}

// head reads one request head as it is on the wire; empty at the end of the connection.
func (b *backend) head(c *rawConn) string {
	var head bytes.Buffer
	for {
		line, err := c.br.ReadString('\n')
		head.WriteString(line)
		if err != nil {
			return ""
		}
		if line == "\r\n" {
			b.heads.Add(1)
			return head.String()
		}
	}
}

// echoHead answers every request with its own head.
func echoHead(t testing.TB) *backend {
	return scripted(t, func(b *backend, c *rawConn, _ int) {
		for {
			head := b.head(c)
			if head == "" {
				return
			}
			if !strings.HasPrefix(head, "HEAD ") {
				writeAnswer(c, head)
			} else {
				c.write("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
			}
		}
	})
}

// scripted starts a backend whose script may use it.
func scripted(t testing.TB, serve func(b *backend, c *rawConn, n int)) *backend {
	var b *backend
	ready := make(chan struct{})
	b = startBackend(t, func(c *rawConn, n int) {
		<-ready
		serve(b, c, n)
	})
	close(ready)
	return b
}

func writeAnswer(c *rawConn, body string) {
	var answer bytes.Buffer
	resp := http.Response{StatusCode: 200, ProtoMajor: 1, ProtoMinor: 1, Body: io.NopCloser(strings.NewReader(body)),
		ContentLength: int64(len(body))}
	_ = resp.Write(&answer)
	_, _ = c.Conn.Write(answer.Bytes())
}

// serveHTTP starts a net/http server in a sandbox.
func serveHTTP(t testing.TB, handler http.HandlerFunc) string {
	srv := httptest.NewServer(handler)
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String()
}

// client is an HTTP client whose every name leads to the edge.
func (e *edge) client(t testing.TB) *http.Client {
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", e.addr)
		},
		DisableCompression: true,
		TLSClientConfig:    &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // the test's own certificate
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

const getRequest = "GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n"
