package proxy

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/routing"
)

var update = flag.Bool("update", false, "rewrite golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
	}
}

func TestErrorPages(t *testing.T) {
	golden(t, "closed_port.html", errorPage("Closed Port Error", &errorBody{
		SandboxID: "isv", Message: refusals[ReasonPortClosed].message, Port: 3000, Code: 502}))
	golden(t, "escaped.html", errorPage("Endpoint Not Available", &errorBody{
		Message: `<b>"it's"</b>`, Path: `/<script>alert(1)</script>&"'`, Code: 404}))
}

// The contract's rule for who gets a page (4.7).
func TestPageSelection(t *testing.T) {
	e := startEdge(t)
	const firefox = "User-Agent: Mozilla/5.0 Firefox/130\r\n"
	tests := []struct {
		name, headers string
		html          bool
	}{
		{"nothing", "", false},
		{"curl", "User-Agent: curl/8\r\n", false},
		{"node", "User-Agent: node\r\n", false},
		{"browser", firefox, true},
		{"in capitals", "User-Agent: SAFARI\r\n", true},
		{"browser that wants JSON", firefox + "Accept: application/json\r\n", false},
		{"browser that wants both", firefox + "Accept: text/html, application/json\r\n", true},
		{"navigation", firefox + "Sec-Fetch-Mode: navigate\r\n", true},
		{"fetch", firefox + "Sec-Fetch-Mode: cors\r\n", false},
		{"no-cors", firefox + "Sec-Fetch-Mode: no-cors\r\n", false},
		{"same-origin", firefox + "Sec-Fetch-Mode: same-origin\r\n", false},
		{"websocket", firefox + "Sec-Fetch-Mode: websocket\r\n", false},
		{"XHR", firefox + "X-Requested-With: XMLHttpRequest\r\n", false},
		{"XHR that navigates", firefox + "X-Requested-With: app\r\nSec-Fetch-Mode: navigate\r\n", true},
	}
	c := e.connect(t)
	for _, tt := range tests {
		c.write("GET / HTTP/1.1\r\nHost: 3000-nobody.sluice.test\r\n" + tt.headers + "\r\n")
		resp, body := c.response("GET")
		html := resp.Header.Get("Content-Type") == "text/html; charset=utf-8"
		if html != tt.html || html != (strings.HasPrefix(body, "<html") && strings.HasSuffix(body, "</html>")) {
			t.Errorf("%s: %s %s", tt.name, resp.Header.Get("Content-Type"), body)
		}
	}
	c.write("HEAD / HTTP/1.1\r\nHost: 3000-nobody.sluice.test\r\n" + firefox + "\r\n")
	if resp, body := c.response("HEAD"); resp.StatusCode != 502 || resp.ContentLength < 100 || body != "" {
		t.Errorf("HEAD: %d, length %d, %q", resp.StatusCode, resp.ContentLength, body)
	}
}

// fixedRoutes answers every name in the same way.
type fixedRoutes struct {
	err    error
	target *routing.Target
	node   *routing.Node
}

func (r fixedRoutes) Resolve(context.Context, []byte, netip.Addr) (*routing.Target, error) {
	return r.target, r.err
}
func (fixedRoutes) Forget(string, uint64)                             {}
func (r fixedRoutes) PickNode(context.Context) (*routing.Node, error) { return r.node, r.err }

func TestRouteErrors(t *testing.T) {
	tests := []struct {
		err        error
		status     int
		retryAfter string
		body       string
	}{
		{errs.New(errs.NotFound, "x"), 502, "", `{"sandboxId":"isv","message":"The sandbox was not found","code":502}`},
		{errs.New(errs.Unavailable, "x"), 503, "1", `{"sandboxId":"isv","message":"The sandbox cannot be looked up right now. Try again in a moment.","code":503}`},
		{routing.ErrNodeLost, 503, "5", `{"sandboxId":"isv","message":"The machine of this sandbox does not answer. Try again in a moment.","code":503}`},
		{errs.New(errs.Exhausted, "x"), 429, "1", `{"sandboxId":"isv","message":"Too many requests for unknown sandboxes","code":429}`},
		{errors.New("redis: secret detail"), 503, "1", `{"sandboxId":"isv","message":"The sandbox cannot be looked up right now. Try again in a moment.","code":503}`},
	}
	for _, tt := range tests {
		e := startEdge(t, func(o *Options) { o.Routes = fixedRoutes{err: tt.err} })
		c := e.connect(t)
		c.write(getRequest)
		resp, body := c.response("GET")
		if resp.StatusCode != tt.status || resp.Header.Get("Retry-After") != tt.retryAfter || body != tt.body {
			t.Errorf("%v: %d, Retry-After %q, %s", tt.err, resp.StatusCode, resp.Header.Get("Retry-After"), body)
		}
	}
}

// A new lifecycle may have another token: when the node says that the old one is gone, the decision is made again.
func TestMovedSandboxIsDecidedAgain(t *testing.T) {
	b := echoHead(t)
	e := startEdge(t)
	e.sandbox(t, routing.Route{Sandbox: "isv", Generation: 5}, map[uint16]string{})
	routes := &movingRoutes{e: e}
	e2 := startEdge(t, func(o *Options) { o.Routes, o.Link = routes, link.NewPool(e.dial, link.PoolOptions{}) })
	secret := private("isv")
	secret.Generation = 6
	e.sandbox(t, secret, map[uint16]string{3000: b.addr})
	c := e2.connect(t)
	c.write(getRequest)
	if resp, body := c.response("GET"); resp.StatusCode != 403 {
		t.Errorf("without the new token: %d %s", resp.StatusCode, body)
	}
	routes.forgotten.Store(false)
	c.write(strings.TrimSuffix(getRequest, "\r\n") + "e2b-traffic-access-token: " + testToken + "\r\n\r\n")
	if resp, body := c.response("GET"); resp.StatusCode != 200 {
		t.Errorf("with it: %d %s", resp.StatusCode, body)
	}
}

// movingRoutes knows an old lifecycle until it is told to forget it.
type movingRoutes struct {
	fixedRoutes
	e         *edge
	forgotten atomic.Bool
}

func (r *movingRoutes) Resolve(ctx context.Context, sandbox []byte, _ netip.Addr) (*routing.Target, error) {
	node := &routing.Node{ID: "node1", LinkAddr: "link:1"}
	if !r.forgotten.Load() {
		return &routing.Target{Route: &routing.Route{Sandbox: "isv", Generation: 4, State: routing.Running}, Node: node}, nil
	}
	route, err := r.e.store.Route(ctx, string(sandbox))
	return &routing.Target{Route: &route, Node: node}, err
}

func (r *movingRoutes) Forget(string, uint64) { r.forgotten.Store(true) }

func TestAPIPassesWhole(t *testing.T) {
	b := echoHead(t)
	var addrs []string
	e := startEdge(t, func(o *Options) {
		o.API = func(ctx context.Context, addr string) (net.Conn, error) {
			addrs = append(addrs, addr)
			return new(net.Dialer).DialContext(ctx, "tcp", b.addr)
		}
	})
	c := e.connect(t)
	for range 2 {
		c.write("GET /v2/sandboxes?x=1 HTTP/1.1\r\nHost: API.sluice.test\r\nX-API-Key: e2b_x\r\nX-Access-Token: a\r\nX-Forwarded-For: 6.6.6.6\r\nlang_version: 1\r\n\r\n")
		_, body := c.response("GET")
		want := "GET /v2/sandboxes?x=1 HTTP/1.1\r\nHost: API.sluice.test\r\nX-API-Key: e2b_x\r\nX-Access-Token: a\r\nlang_version: 1\r\n" +
			"X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Host: API.sluice.test\r\nX-Forwarded-Proto: http\r\n\r\n"
		if body != want {
			t.Errorf("the API got %q, want %q", body, want)
		}
	}
	if len(addrs) != 1 || addrs[0] != "api:1" {
		t.Errorf("dialed %q", addrs)
	}
	down := startEdge(t, func(o *Options) {
		o.API = func(context.Context, string) (net.Conn, error) { return nil, errors.New("refused") }
	})
	c = down.connect(t)
	c.write("GET /health HTTP/1.1\r\nHost: api.sluice.test\r\n\r\n")
	if resp, body := c.response("GET"); resp.StatusCode != 503 || body != `{"message":"The API does not answer. Try again in a moment.","code":503}` {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
}

// On a developer's machine a bare address that names no sandbox is the API; elsewhere it is nothing.
func TestBareAPI(t *testing.T) {
	b := echoHead(t)
	e := startEdge(t, func(o *Options) {
		o.BareAPI = true
		o.API = func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", b.addr)
		}
	})
	for host, status := range map[string]int{"127.0.0.1:1": 200, "localhost": 200, "[::1]:1": 200, "sluice.test": 400} {
		c := e.connect(t)
		c.write("GET /health HTTP/1.1\r\nHost: " + host + "\r\n\r\n")
		if resp, body := c.response("GET"); resp.StatusCode != status {
			t.Errorf("%s: %d %s", host, resp.StatusCode, body)
		}
	}
	c := e.connect(t)
	c.write("GET /health HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: isv\r\n\r\n")
	if resp, body := c.response("GET"); resp.StatusCode != 400 || body != "missing header" {
		t.Errorf("half a name: %d %s", resp.StatusCode, body)
	}
}

func TestHTTPSPort(t *testing.T) {
	tlsOnly := errors.New("asked for TLS")
	e := startEdge(t, func(o *Options) {
		o.LinkTLS = link.NewPool(func(context.Context, link.Target) (net.Conn, error) { return nil, tlsOnly }, link.PoolOptions{})
	})
	e.sandbox(t, routing.Route{Sandbox: "isv", Ports: map[uint16]routing.PortSettings{3000: {HTTPS: true}}}, map[uint16]string{3000: "x"})
	c := e.connect(t)
	c.write(getRequest)
	if resp, _ := c.response("GET"); resp.StatusCode != 502 || e.dials != 0 {
		t.Errorf("got %d, %d plain connections", resp.StatusCode, e.dials)
	}
}

// panicking routes show that one request's panic is its own.
type panicking struct{ fixedRoutes }

func (panicking) Resolve(context.Context, []byte, netip.Addr) (*routing.Target, error) {
	panic("BUG: test")
}

func TestPanicIsOneRequests(t *testing.T) {
	core, logs := observer.New(zapcore.ErrorLevel)
	e := startEdge(t, func(o *Options) { o.Routes, o.Log = panicking{}, zap.New(core) })
	for range 2 {
		c := e.connect(t)
		c.write(getRequest)
		resp, body := c.response("GET")
		if resp.StatusCode != 500 || !resp.Close || body != "Internal error" {
			t.Errorf("got %d, close %v, %s", resp.StatusCode, resp.Close, body)
		}
		c.expectEOF()
	}
	if e.counter("sluice_proxy_panics_total") != 2 || logs.Len() != 2 {
		t.Errorf("%d counted, %d logged", e.counter("sluice_proxy_panics_total"), logs.Len())
	}
	await(t, "the end of both", func() bool { return e.counter("sluice_proxy_requests_in_flight") == 0 })
}

func TestLogsHoldNoSecrets(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	b := echoHead(t)
	e := startEdge(t, func(o *Options) { o.Log = zap.New(core) })
	e.sandbox(t, private("isv"), map[uint16]string{3000: b.addr})
	c := e.connect(t)
	for _, request := range []string{
		"GET /a?SECRET HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\ne2b-traffic-access-token: " + testToken + "\r\nCookie: SECRET\r\n\r\n",
		"GET /a?SECRET HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\ne2b-traffic-access-token: SECRET\r\n\r\n",
		"GET /a?SECRET HTTP/1.1\r\nHost: SECRET.sluice.test\r\n\r\n",
		"GET /a?SECRET HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nAuthorization : SECRET\r\n\r\n",
	} {
		c.write(request)
		c.response("GET")
	}
	c.expectEOF()
	entries := 0
	for _, entry := range logs.All() {
		line, err := zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()).EncodeEntry(entry.Entry, entry.Context)
		if err != nil {
			t.Fatal(err)
		}
		entries++
		if s := line.String(); strings.Contains(s, "SECRET") || strings.Contains(s, testToken) {
			t.Errorf("logged: %s", s)
		}
	}
	if entries < 4 {
		t.Errorf("%d entries", entries)
	}
}

func TestDrain(t *testing.T) {
	release := make(chan struct{})
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		for b.head(c) != "" {
			<-release
			c.write("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	e := edgeWith(t, b, func(o *Options) { o.Limits.Drain = 10 * time.Second })
	idle := e.connect(t)
	await(t, "the connection", func() bool { return e.counter("sluice_proxy_connections") == 1 })
	busy := e.connect(t)
	busy.write(getRequest)
	await(t, "the request", func() bool { return b.heads.Load() == 1 })
	e.stop()
	idle.expectEOF()
	if _, err := net.Dial("tcp", e.addr); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("still accepts: %v", err)
	}
	close(release)
	// The head was on its way when the drain began, so the answer may or may not say close; the connection ends either way.
	resp, body := busy.response("GET")
	if resp.StatusCode != 200 || body != "ok" || !resp.Close {
		t.Errorf("got %d %s, close %v", resp.StatusCode, body, resp.Close)
	}
	busy.expectEOF()
	if err := <-e.served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if n := e.counter("sluice_proxy_connections"); n != 0 {
		t.Errorf("%d connections left", n)
	}
}

func TestDrainEndsWhatDoesNotEnd(t *testing.T) {
	b := scripted(t, func(b *backend, c *rawConn, n int) {
		b.head(c)
		if n == 1 {
			c.write("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n")
		}
		_, _ = io.Copy(c.Conn, c.br)
	})
	e := edgeWith(t, b, func(o *Options) { o.Limits.Drain = 100 * time.Millisecond })
	tunnel := e.connect(t)
	tunnel.write("GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
	tunnel.response("GET")
	tunnel.write("echo")
	tunnel.expect("echo")
	waiting := e.connect(t)
	waiting.write(getRequest)
	await(t, "the second request", func() bool { return b.heads.Load() == 2 })
	e.stop()
	select {
	case err := <-e.served:
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
	case <-time.After(15 * time.Second):
		t.Fatal("Serve does not return")
	}
	for _, c := range []*rawConn{tunnel, waiting} {
		if _, err := io.ReadAll(c.br); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client sees %v", err)
		}
	}
}

// One side of a tunnel has ended: the other may speak on, but not be silent for ever.
func TestHalfClosedTunnelIsBounded(t *testing.T) {
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		b.head(c)
		c.write("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n")
		_, _ = io.Copy(io.Discard, c.br)
		for range 5 { // for longer than the limit, but never silent for so long
			time.Sleep(60 * time.Millisecond)
			c.write("tick")
		}
		_, _ = c.Conn.Read(make([]byte, 1))
		time.Sleep(time.Second)
	})
	e := edgeWith(t, b, func(o *Options) { o.Limits.HalfClosed = 200 * time.Millisecond })
	c := e.connect(t)
	c.write("GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
	c.response("GET")
	_ = c.Conn.(*net.TCPConn).CloseWrite()
	c.expect("ticktickticktick")
	await(t, "the end", func() bool { return e.counter("sluice_proxy_tunnels") == 0 })
}

// An accept error that passes does not end the listener.
func TestAcceptErrorsPass(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := &failingListener{Listener: inner}
	ln.failures.Store(3)
	e := startEdgeOn(t, ln)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: echoHead(t).addr})
	c := e.connect(t)
	c.write(getRequest)
	if resp, _ := c.response("GET"); resp.StatusCode != 200 {
		t.Errorf("got %d", resp.StatusCode)
	}
}

type failingListener struct {
	net.Listener
	failures atomic.Int32
}

func (l *failingListener) Accept() (net.Conn, error) {
	if l.failures.Add(-1) >= 0 {
		return nil, syscall.EMFILE
	}
	return l.Listener.Accept()
}

func TestTooFewDescriptorsAreToldOnce(t *testing.T) {
	if descriptorLimit() > 1<<40 {
		t.Skip("there is no limit of descriptors to compare with")
	}
	for conns, want := range map[int]int{1: 0, 1 << 40: 1} {
		core, logs := observer.New(zapcore.WarnLevel)
		h, err := New(Options{Hosts: &routing.Hosts{}, Routes: fixedRoutes{}, Link: link.NewPool(nil, link.PoolOptions{}),
			Limits: Limits{Conns: conns}, Log: zap.New(core)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		for range 2 {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			if err := h.Serve(ctx, ln); err != nil {
				t.Fatal(err)
			}
		}
		if got := logs.FilterMessageSnippet("descriptors").Len(); got != want {
			t.Errorf("%d connections: warned %d times, want %d", conns, got, want)
		}
	}
}

func TestManyClientsAtOnce(t *testing.T) {
	addr := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		_, _ = io.CopyN(w, pattern{}, n)
	})
	e := startEdge(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: addr})
	done := make(chan error, 40)
	for i := range 40 {
		client := e.client(t)
		go func() {
			for j := range 10 {
				size := int64((i*j)%7) * 9000
				resp, err := client.Post("http://3000-isv.sluice.test/", "x/y", io.LimitReader(pattern{}, size))
				if err != nil {
					done <- err
					return
				}
				n, err := io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				if err == nil && n != size {
					err = errors.New("wrong size")
				}
				if err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range 40 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
