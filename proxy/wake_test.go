package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/routing"
)

const (
	notFoundBody = `{"sandboxId":"isv","message":"The sandbox was not found","code":502}`
	deniedBody   = `{"sandboxId":"isv","message":"This sandbox can't be resumed with the credentials provided. ` +
		`Check your access token and try again.","code":403}`
	transitionBody = `{"sandboxId":"isv","message":"The sandbox is still transitioning. Try again in a moment.","code":409}`
)

// asleep publishes a paused sandbox that traffic wakes.
func (e *edge) asleep(t testing.TB, r routing.Route) routing.Route {
	t.Helper()
	r.State, r.AutoResume = routing.Paused, true
	if r.Sandbox == "" {
		r.Sandbox = "isv"
	}
	e.sandbox(t, r, nil)
	e.notHere(r)
	return r
}

// notHere makes the node refuse connections to a lifecycle, as it does from the first step of a pause or a kill on.
func (e *edge) notHere(r routing.Route) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.ports, life{r.Sandbox, max(r.Generation, 1)})
}

// wakesAs makes the node bring a paused sandbox up in its next lifecycle, when before has returned.
func (e *edge) wakesAs(t testing.TB, r routing.Route, ports map[uint16]string, before func(context.Context, link.Target) error) {
	e.onWake(func(ctx context.Context, target link.Target) error {
		if before != nil {
			if err := before(ctx, target); err != nil {
				return err
			}
		}
		r.State, r.Generation = routing.Running, target.Generation+1
		e.sandbox(t, r, ports)
		return nil
	})
}

func (e *edge) onWake(woken func(context.Context, link.Target) error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.woken = woken
}

// asked returns how often a node was asked for a wake and for a connection.
func (e *edge) asked() (wakes, dials int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.wakes, e.dials
}

func (e *edge) wantAsked(t testing.TB, wakes, dials int) {
	t.Helper()
	if w, d := e.asked(); w != wakes || d != dials {
		t.Errorf("the node was asked for %d wakes and %d connections, want %d and %d", w, d, wakes, dials)
	}
}

// gate is a wake that the test ends: asked says that it has begun, by whom.
type gate struct {
	asked chan link.Target
	open  chan struct{}
}

func newGate() *gate { return &gate{asked: make(chan link.Target, 16), open: make(chan struct{})} }

func (g *gate) pass(ctx context.Context, target link.Target) error {
	g.asked <- target
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (e *edge) waiting() uint64 { return e.counter("sluice_proxy_wake_waiting") }

// Pitfall 38: wakes raced with pauses and with each other. However many ask, the node is asked once and the store is not read for
// each, and all are answered by the sandbox.
func TestPitfall38OneWakeForAllWhoWait(t *testing.T) {
	const clients = 200
	memory := routing.NewMemoryStore()
	loads := &countingStore{Store: memory}
	e := startEdge(t, func(o *Options) {
		o.Routes = routing.NewTable(loads, routing.TableOptions{}) // without a subscription: what it learns it has read
	})
	e.store = memory
	if err := e.store.PutNode(t.Context(), routing.Node{ID: "node1", LinkAddr: "link:1"}, time.Hour); err != nil {
		t.Fatal(err)
	}
	r := e.asleep(t, private("isv"))
	g := newGate()
	e.wakesAs(t, r, map[uint16]string{3000: echoHead(t).addr}, g.pass)
	conns := make([]*rawConn, clients)
	for i := range conns {
		conns[i] = e.connect(t)
		conns[i].write("GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\ne2b-traffic-access-token: " + testToken + "\r\n\r\n")
	}
	await(t, "everybody waiting", func() bool { return e.waiting() == clients })
	close(g.open)
	for _, c := range conns {
		if resp, body := c.response("GET"); resp.StatusCode != 200 {
			t.Fatalf("%d %s", resp.StatusCode, body)
		}
	}
	if w, _ := e.asked(); w != 1 {
		t.Errorf("%d wakes", w)
	}
	if n := loads.count(); n > 10 { // twice; on a slow machine what was read is out of date now and then
		t.Errorf("the store was read %d times, want once before the wake and once after it", n)
	}
	if e.waiting() != 0 || e.counter(`sluice_proxy_wakes_total{result="woken"}`) != 1 {
		t.Errorf("%d are counted as waiting, %d as woken", e.waiting(), e.counter(`sluice_proxy_wakes_total{result="woken"}`))
	}
}

// countingStore counts the reads of routes.
type countingStore struct {
	routing.Store
	mu sync.Mutex // guards n
	n  int
}

func (s *countingStore) Route(ctx context.Context, sandbox string) (routing.Route, error) {
	s.mu.Lock()
	s.n++
	s.mu.Unlock()
	return s.Store.Route(ctx, sandbox)
}

func (s *countingStore) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

// Pitfall 39: a scan of URLs burnt capacity. Who may not pass reaches no node at all, on any port.
func TestPitfall39TokenIsCheckedBeforeWaking(t *testing.T) {
	const agentToken = "an agent's token"
	e := startEdge(t)
	r := private("isv")
	r.EnvdHash = auth.HashToken([]byte(agentToken))
	r = e.asleep(t, r)
	e.wakesAs(t, r, map[uint16]string{3000: echoHead(t).addr, envdPort: echoHead(t).addr}, nil)
	right := "e2b-traffic-access-token: " + testToken + "\r\n"
	tests := []struct {
		name         string
		port         int
		path, fields string
		status       int
		message      string
	}{
		{"no token", 3000, "/", "", 403, "'e2b-traffic-access-token' is missing"},
		{"wrong token", 3000, "/", "e2b-traffic-access-token: " + testToken[1:] + "\r\n", 403, "'e2b-traffic-access-token' is invalid"},
		{"two tokens", 3000, "/", right + right, 403, "'e2b-traffic-access-token' is invalid"},
		{"the agent's token on another port", 3000, "/", "X-Access-Token: " + agentToken + "\r\n", 403, "'e2b-traffic-access-token' is missing"},
		{"agent, no token", envdPort, "/health", "", 403, deniedBody},
		{"agent, wrong token", envdPort, "/health", "X-Access-Token: an agent's\r\n", 403, deniedBody},
		{"agent, empty token", envdPort, "/health", "X-Access-Token:\r\n", 403, deniedBody},
		{"agent, two tokens", envdPort, "/health", "X-Access-Token: " + agentToken + "\r\nX-Access-Token: x\r\n", 403, deniedBody},
		{"agent, another spelling", envdPort, "/health", "X_Access_Token: " + agentToken + "\r\n", 403, deniedBody},
		{"agent, the traffic token", envdPort, "/health", right, 403, deniedBody},
		{"agent, control path", envdPort, "/init", "X-Access-Token: " + agentToken + "\r\n", 404, "reserved for the E2B control plane"},
		{"upgrade without a token", 3000, "/ws", "Connection: upgrade\r\nUpgrade: websocket\r\n", 403, "is missing"},
	}
	c := e.connect(t)
	for _, tt := range tests {
		c.write(fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %d-isv.sluice.test\r\n%s\r\n", tt.path, tt.port, tt.fields))
		if resp, body := c.response("GET"); resp.StatusCode != tt.status || !strings.Contains(body, tt.message) {
			t.Errorf("%s: %d %s, want %d %s", tt.name, resp.StatusCode, body, tt.status, tt.message)
		}
	}
	e.wantAsked(t, 0, 0)
	if got, want := e.counter(`sluice_proxy_refusals_total{reason="resume_denied"}`), uint64(6); got != want {
		t.Errorf("%d were counted as resume_denied, want %d", got, want)
	}
	c.write("GET /health HTTP/1.1\r\nHost: 49983-isv.sluice.test\r\nX-Access-Token: " + agentToken + "\r\n\r\n")
	if resp, body := c.response("GET"); resp.StatusCode != 200 || !strings.Contains(body, "X-Access-Token: "+agentToken) {
		t.Errorf("agent, right token: %d %s", resp.StatusCode, body)
	}
	e.wantAsked(t, 1, 1)
}

// A sandbox that traffic must not wake stays asleep, whoever asks.
func TestPausedForGoodIsNotWoken(t *testing.T) {
	e := startEdge(t)
	r := private("isv")
	r.State = routing.Paused
	e.sandbox(t, r, nil)
	c := e.connect(t)
	for _, port := range []int{3000, envdPort} {
		c.write(fmt.Sprintf("GET / HTTP/1.1\r\nHost: %d-isv.sluice.test\r\ne2b-traffic-access-token: %s\r\n\r\n", port, testToken))
		if resp, body := c.response("GET"); resp.StatusCode != 502 || body != notFoundBody {
			t.Errorf("port %d: %d %s", port, resp.StatusCode, body)
		}
	}
	e.wantAsked(t, 0, 0)
}

// Pitfall 43: upgrades during a cold start got 101 and then a close. They are held, and then get the sandbox's own answer.
func TestPitfall43UpgradeIsHeldUntilTheSandboxRuns(t *testing.T) {
	e := startEdge(t)
	r := e.asleep(t, routing.Route{})
	g := newGate()
	e.wakesAs(t, r, map[uint16]string{3000: serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		ws, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer ws.CloseNow()
		if kind, data, err := ws.Read(r.Context()); err == nil {
			_ = ws.Write(r.Context(), kind, data)
		}
		_ = ws.Close(websocket.StatusNormalClosure, "bye")
	})}, g.pass)
	go func() {
		<-g.asked
		close(g.open)
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, "ws://3000-isv.sluice.test/", &websocket.DialOptions{HTTPClient: e.client(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	if err := ws.Write(ctx, websocket.MessageText, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, data, err := ws.Read(ctx); err != nil || string(data) != "hello" {
		t.Errorf("echo %q, %v", data, err)
	}
	e.wantAsked(t, 1, 1)
}

func TestPitfall43UpgradeThatCannotBeServedIsRefused(t *testing.T) {
	e := startEdge(t)
	e.asleep(t, routing.Route{})
	e.onWake(func(context.Context, link.Target) error { return &link.VerdictError{Verdict: link.Busy} })
	_, resp, err := websocket.Dial(t.Context(), "ws://3000-isv.sluice.test/", &websocket.DialOptions{HTTPClient: e.client(t)})
	if err == nil || resp == nil || resp.StatusCode != 409 || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("%v, %v; want 409 and when to come back", resp, err)
	}
}

// A body stays with its client until the sandbox runs, and then goes out once. Its sender, who asked first, is told to go on only then.
func TestBodiesWaitForTheSandbox(t *testing.T) {
	e := startEdge(t)
	r := e.asleep(t, routing.Route{})
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		head := b.head(c)
		n := 3
		if strings.Contains(head, "Content-Length: 1048576") {
			n = 1 << 20
		}
		body := make([]byte, n)
		if _, err := io.ReadFull(c.br, body); err == nil {
			writeAnswer(c, fmt.Sprintf("%d bytes", len(body)))
		}
	})
	ports := map[uint16]string{3000: b.addr}
	for i, tt := range []struct {
		name, fields, body string
		asks               bool
	}{
		{"a long one, all of it sent at once", "Content-Length: 1048576\r\n", strings.Repeat("x", 1<<20), false},
		{"asked for", "Content-Length: 3\r\nExpect: 100-continue\r\n", "abc", true},
	} {
		g := newGate()
		e.wakesAs(t, r, ports, g.pass)
		c := e.connect(t)
		head := "POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n" + tt.fields + "\r\n"
		if tt.asks {
			c.write(head)
		} else {
			go c.write(head + tt.body)
		}
		<-g.asked
		if n := b.heads.Load(); int(n) != i {
			t.Errorf("%s: the sandbox has seen %d requests before it ran", tt.name, n)
		}
		close(g.open)
		if tt.asks {
			c.expect("HTTP/1.1 100 Continue\r\n\r\n")
			c.write(tt.body)
		}
		if resp, got := c.response("POST"); resp.StatusCode != 200 || got != fmt.Sprintf("%d bytes", len(tt.body)) {
			t.Errorf("%s: %d %s", tt.name, resp.StatusCode, got)
		}
		if n := b.heads.Load(); int(n) != i+1 {
			t.Errorf("%s: the sandbox has seen %d requests, want %d", tt.name, n, i+1)
		}
		r.State, r.Generation = routing.Paused, uint64(2*i+3) //nolint:gosec // small
		e.sandbox(t, r, nil)
	}
	// One that is never woken is not told to go on at all.
	e.onWake(nil)
	c := e.connect(t)
	c.write("POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
	if resp, body := c.response("POST"); resp.StatusCode != 502 || body != notFoundBody {
		t.Errorf("not woken: %d %s", resp.StatusCode, body)
	}
}

// What a node answers, and what its silence means, in the contract's words. A failure is not tried again at once: those who come
// right behind are told the same.
func TestAnswersToAWakeThatFailed(t *testing.T) {
	verdict := func(v link.Verdict) error { return &link.VerdictError{Verdict: v} }
	tests := []struct {
		name   string
		err    error
		status int
		retry  string
		body   string
		result string
		again  int // wakes after a second request
	}{
		{"not here", verdict(link.NotHere), 502, "", notFoundBody, "not_found", 2},
		{"busy", verdict(link.Busy), 409, "1", transitionBody, "transitioning", 1},
		{"refused", verdict(link.Refused), 503, "1",
			`{"sandboxId":"isv","message":"The machine of this sandbox refused the connection","port":3000,"code":503}`, "node_refused", 1},
		{"node down", errs.New(errs.Unavailable, "the sandbox's node does not answer"), 502, "",
			`{"sandboxId":"isv","message":"The machine of this sandbox could not be reached","port":3000,"code":502}`, "dial_failed", 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := startEdge(t)
			e.handler.wakes.pause = time.Hour
			e.asleep(t, routing.Route{})
			e.onWake(func(context.Context, link.Target) error { return tt.err })
			c := e.connect(t)
			for range 2 {
				c.write(getRequest)
				resp, body := c.response("GET")
				if resp.StatusCode != tt.status || body != tt.body || resp.Header.Get("Retry-After") != tt.retry {
					t.Errorf("%d %s, Retry-After %q; want %d %s, %q", resp.StatusCode, body, resp.Header.Get("Retry-After"), tt.status, tt.body, tt.retry)
				}
			}
			e.wantAsked(t, tt.again, 0)
			if got := e.counter(fmt.Sprintf("sluice_proxy_wakes_total{result=%q}", tt.result)); int(got) != tt.again { //nolint:gosec // small
				t.Errorf("%d counted as %s, want %d", got, tt.result, tt.again)
			}
			if got := e.counter(fmt.Sprintf("sluice_proxy_refusals_total{reason=%q}", tt.result)); got != 2 {
				t.Errorf("%d requests counted as %s, want 2", got, tt.result)
			}
		})
	}
}

// After the pause of a failed wake the sandbox is woken like any other.
func TestFailedWakeIsTriedAgain(t *testing.T) {
	e := startEdge(t)
	e.handler.wakes.pause = 0
	r := e.asleep(t, routing.Route{})
	e.onWake(func(context.Context, link.Target) error { return &link.VerdictError{Verdict: link.Busy} })
	c := e.connect(t)
	c.write(getRequest)
	if resp, _ := c.response("GET"); resp.StatusCode != 409 {
		t.Errorf("%d", resp.StatusCode)
	}
	e.wakesAs(t, r, map[uint16]string{3000: echoHead(t).addr}, nil)
	await(t, "another attempt", func() bool {
		c.write(getRequest)
		resp, _ := c.response("GET")
		return resp.StatusCode == 200
	})
	if n := len(e.handler.wakes.flights) + len(e.handler.wakes.byClient); n != 0 {
		t.Errorf("%d wakes are still there", n)
	}
}

// A wake that takes longer than the edge waits may still come to something.
func TestWakeThatTakesTooLong(t *testing.T) {
	e := startEdge(t, func(o *Options) { o.Limits.Wake = time.Millisecond })
	e.asleep(t, routing.Route{})
	e.onWake(newGate().pass)
	c := e.connect(t)
	c.write(getRequest)
	if resp, body := c.response("GET"); resp.StatusCode != 409 || body != transitionBody {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}

// People get pages, as for every other answer of the edge's own.
func TestWakeAnswersForPeople(t *testing.T) {
	e := startEdge(t)
	r := routing.Route{EnvdHash: auth.HashToken([]byte("x"))}
	e.asleep(t, r)
	e.onWake(func(context.Context, link.Target) error { return &link.VerdictError{Verdict: link.Busy} })
	c := e.connect(t)
	for host, title := range map[string]string{"3000-isv": "Sandbox Still Transitioning", "49983-isv": "Unable to Resume Sandbox"} {
		c.write("GET / HTTP/1.1\r\nHost: " + host + ".sluice.test\r\nUser-Agent: Mozilla/5.0\r\n\r\n")
		if _, body := c.response("GET"); !strings.Contains(body, "<title>"+title+"</title>") {
			t.Errorf("%s: %s", host, body)
		}
	}
}

// A client that goes away waits no longer, and the wake goes on without it: whoever comes next joins it.
func TestClientGoneWhileWaiting(t *testing.T) {
	if !canWatch {
		t.Skip("clients that go away are noticed on Linux only, where there is epoll")
	}
	e := startEdge(t)
	r := e.asleep(t, routing.Route{})
	g := newGate()
	e.wakesAs(t, r, map[uint16]string{3000: echoHead(t).addr}, g.pass)
	c := e.connect(t)
	c.write(getRequest)
	<-g.asked
	_ = c.Close()
	await(t, "the end of the wait", func() bool { return e.counter(`sluice_proxy_refusals_total{reason="client_gone"}`) == 1 })
	c = e.connect(t)
	c.write(getRequest)
	await(t, "the next one waiting", func() bool { return e.waiting() == 1 })
	close(g.open)
	if resp, body := c.response("GET"); resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	e.wantAsked(t, 1, 1)
}

// A route that says running, of a sandbox that has been paused: the node says that it is not here, the store that it is paused.
func TestStaleRouteOfAPausedSandbox(t *testing.T) {
	e := startEdge(t, func(o *Options) { o.Routes = &frozenRoutes{Routes: o.Routes} })
	r := routing.Route{Sandbox: "isv", AutoResume: true}
	b := echoHead(t)
	e.sandbox(t, r, map[uint16]string{3000: b.addr})
	c := e.connect(t)
	c.write(getRequest)
	c.response("GET")
	e.asleep(t, r)
	e.handler.link.Forget("isv", 1) // as its connections are reset
	e.wakesAs(t, r, map[uint16]string{3000: b.addr}, nil)
	c.write(getRequest)
	if resp, body := c.response("GET"); resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	e.wantAsked(t, 1, 3)
}

// frozenRoutes is a cache that hears of no change: it gives what it has read until it is told to forget it.
type frozenRoutes struct {
	Routes
	mu    sync.Mutex // guards known
	known *routing.Target
}

func (f *frozenRoutes) Resolve(ctx context.Context, sandbox []byte, client netip.Addr) (*routing.Target, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var err error
	if f.known == nil {
		f.known, err = f.Routes.Resolve(ctx, sandbox, client)
	}
	return f.known, err
}

func (f *frozenRoutes) Forget(sandbox string, generation uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.known = nil
	f.Routes.Forget(sandbox, generation)
}

// Between a node's decision to pause a sandbox and its route's saying so the store says that it runs. Then the node is asked as for
// a paused one, of a client that may wake it and of no other.
func TestSandboxAboutToBePaused(t *testing.T) {
	e := startEdge(t)
	r := private("isv")
	r.AutoResume, r.EnvdHash = true, auth.HashToken([]byte("x"))
	e.sandbox(t, r, nil)
	e.notHere(r)
	e.wakesAs(t, r, map[uint16]string{3000: echoHead(t).addr}, nil)
	c := e.connect(t)
	c.write(getRequest)
	if resp, _ := c.response("GET"); resp.StatusCode != 403 {
		t.Errorf("without a token: %d", resp.StatusCode)
	}
	e.wantAsked(t, 0, 0)
	c.write("GET /health HTTP/1.1\r\nHost: 49983-isv.sluice.test\r\n\r\n")
	if resp, body := c.response("GET"); resp.StatusCode != 403 || body != deniedBody {
		t.Errorf("the agent's port without its token: %d %s", resp.StatusCode, body)
	}
	e.wantAsked(t, 0, 1)
	c.write("GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\ne2b-traffic-access-token: " + testToken + "\r\n\r\n")
	if resp, body := c.response("GET"); resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	e.wantAsked(t, 1, 3)
}

// The same with a sandbox that has been killed: it is gone, and nobody waits for it.
func TestSandboxAboutToBeGone(t *testing.T) {
	e := startEdge(t)
	r := routing.Route{Sandbox: "isv", AutoResume: true}
	e.sandbox(t, r, nil)
	e.notHere(r)
	c := e.connect(t)
	c.write(getRequest)
	if resp, body := c.response("GET"); resp.StatusCode != 502 || body != notFoundBody {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	e.wantAsked(t, 1, 1)
}

// A request that the sandbox may have seen wakes nothing when a pause cuts it off: or a long poll, which is such a request for ever,
// would undo every pause, and what it asked for would be done twice.
func TestRequestCutOffByAPauseDoesNotWake(t *testing.T) {
	e := startEdge(t)
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		b.head(c)
		writeAnswer(c, "first")
		b.head(c)
		e.asleep(t, routing.Route{})
		_ = c.Conn.(*net.TCPConn).SetLinger(0)
	})
	e.sandbox(t, routing.Route{Sandbox: "isv", AutoResume: true}, map[uint16]string{3000: b.addr})
	c := e.connect(t)
	c.write(getRequest)
	if _, body := c.response("GET"); body != "first" {
		t.Fatalf("first answer %q", body)
	}
	c.write(getRequest)
	if resp, body := c.response("GET"); resp.StatusCode != 502 || !strings.Contains(body, "closed the connection before it answered") {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	e.wantAsked(t, 0, 2)
}

// A node that says "it runs" of what the store says is paused does not keep a request for ever.
func TestNodeAndStoreDisagree(t *testing.T) {
	e := startEdge(t)
	e.asleep(t, routing.Route{})
	e.onWake(func(context.Context, link.Target) error { return nil })
	c := e.connect(t)
	c.write(getRequest)
	if resp, body := c.response("GET"); resp.StatusCode != 409 || body != transitionBody {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	e.wantAsked(t, mostWakes, 0)
}

// A scanner with the ids of many public sandboxes has a few woken at a time, and others still have theirs; who joins a wake that is
// there pays nothing.
func TestWakesAreBounded(t *testing.T) {
	for _, tt := range []struct {
		name   string
		limits func(*Limits)
		status int
		reason string
	}{
		{"per client", func(l *Limits) { l.WakesPerClient = 1 }, 429, "wake_client_cap"},
		{"in all", func(l *Limits) { l.Wakes = 1 }, 503, "wake_total_cap"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := startEdge(t, func(o *Options) { tt.limits(&o.Limits) })
			r := e.asleep(t, routing.Route{})
			e.asleep(t, routing.Route{Sandbox: "other"})
			g := newGate()
			e.wakesAs(t, r, map[uint16]string{3000: echoHead(t).addr}, g.pass)
			first, joins, scanner := e.connect(t), e.connect(t), e.connect(t)
			first.write(getRequest)
			<-g.asked
			joins.write(getRequest)
			await(t, "two waiting", func() bool { return e.waiting() == 2 })
			scanner.write("GET / HTTP/1.1\r\nHost: 3000-other.sluice.test\r\n\r\n")
			if resp, body := scanner.response("GET"); resp.StatusCode != tt.status || resp.Header.Get("Retry-After") != "1" {
				t.Errorf("one too many: %d %s", resp.StatusCode, body)
			}
			if n := e.counter(fmt.Sprintf("sluice_proxy_refusals_total{reason=%q}", tt.reason)); n != 1 {
				t.Errorf("%d counted as %s", n, tt.reason)
			}
			close(g.open)
			for _, c := range []*rawConn{first, joins} {
				if resp, body := c.response("GET"); resp.StatusCode != 200 {
					t.Errorf("%d %s", resp.StatusCode, body)
				}
			}
			if n, _ := e.asked(); n != 1 {
				t.Errorf("%d wakes, want 1", n)
			}
			r.Sandbox = "other"
			e.wakesAs(t, r, map[uint16]string{3000: echoHead(t).addr}, nil)
			scanner.write("GET / HTTP/1.1\r\nHost: 3000-other.sluice.test\r\n\r\n")
			if resp, body := scanner.response("GET"); resp.StatusCode != 200 {
				t.Errorf("when there is room: %d %s", resp.StatusCode, body)
			}
		})
	}
}

// TestFailedWakesLeaveRoom: what cannot be woken is left alone for a moment, in which others can be; only its client has fewer.
func TestFailedWakesLeaveRoom(t *testing.T) {
	e := startEdge(t, func(o *Options) { o.Limits.Wakes, o.Limits.WakesPerClient = 2, 5 })
	e.handler.wakes.pause = time.Hour
	e.onWake(func(context.Context, link.Target) error { return &link.VerdictError{Verdict: link.Busy} })
	c := e.connect(t)
	ask := func(sandbox string) int {
		t.Helper()
		e.asleep(t, routing.Route{Sandbox: sandbox})
		c.write("GET / HTTP/1.1\r\nHost: 3000-" + sandbox + ".sluice.test\r\n\r\n")
		resp, _ := c.response("GET")
		return resp.StatusCode
	}
	for i := range 5 {
		if got := ask(fmt.Sprintf("sb%d", i)); got != 409 {
			t.Errorf("sandbox %d: %d, want 409", i, got)
		}
	}
	if got := ask("sb5"); got != 429 {
		t.Errorf("one more than a client may have: %d, want 429", got)
	}
	if w := &e.handler.wakes; w.active != 0 || len(w.flights) != 5 {
		t.Errorf("%d active of %d", w.active, len(w.flights))
	}
}

// Requests that wait count as requests under way.
func TestWaitingRequestsAreBounded(t *testing.T) {
	e := startEdge(t, func(o *Options) { o.Limits.ConnsPerSandbox = 1 })
	r := e.asleep(t, routing.Route{})
	g := newGate()
	e.wakesAs(t, r, map[uint16]string{3000: echoHead(t).addr}, g.pass)
	first, second := e.connect(t), e.connect(t)
	first.write(getRequest)
	<-g.asked
	second.write(getRequest)
	if resp, body := second.response("GET"); resp.StatusCode != 429 || !strings.Contains(body, `"connectionLimit":1`) {
		t.Errorf("one too many: %d %s", resp.StatusCode, body)
	}
	close(g.open)
	if resp, body := first.response("GET"); resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}

// A port that cannot be reached is no reason to wake what is behind it.
func TestUnreachablePortDoesNotWake(t *testing.T) {
	e := startEdge(t)
	e.asleep(t, routing.Route{Ports: map[uint16]routing.PortSettings{3000: {HTTPS: true}}})
	c := e.connect(t)
	c.write(getRequest)
	if resp, body := c.response("GET"); resp.StatusCode != 502 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	e.wantAsked(t, 0, 0)
}

// A panic in a wake is everybody's answer who waits, and not the end of the edge.
func TestPanicInAWake(t *testing.T) {
	e := startEdge(t)
	e.asleep(t, routing.Route{})
	e.onWake(func(context.Context, link.Target) error { panic("a test's") })
	c := e.connect(t)
	c.write(getRequest)
	if resp, body := c.response("GET"); resp.StatusCode != 500 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	if e.counter("sluice_proxy_panics_total") != 1 || e.counter(`sluice_proxy_wakes_total{result="panic"}`) != 1 {
		t.Error("it was not counted")
	}
}

// The end of the edge ends the wait, and the wake with it: Serve leaves nothing behind.
func TestDrainEndsWakes(t *testing.T) {
	e := startEdge(t, func(o *Options) { o.Limits.Drain = time.Millisecond })
	e.asleep(t, routing.Route{})
	g := newGate()
	ended := make(chan struct{})
	e.onWake(func(ctx context.Context, target link.Target) error {
		defer close(ended)
		return g.pass(ctx, target)
	})
	c := e.connect(t)
	c.write(getRequest)
	<-g.asked
	e.stop()
	if err := <-e.served; err != nil {
		t.Errorf("Serve() = %v", err)
	}
	select {
	case <-ended:
	default:
		t.Error("Serve returned before the wake ended")
	}
	if e.waiting() != 0 {
		t.Errorf("%d still wait", e.waiting())
	}
}

// sleeper is a node's half with one sandbox, isv, that is paused in generation 7 until it is woken.
type sleeper struct {
	backendPorts
	store routing.Store
	route routing.Route

	wakeMu sync.Mutex // guards the fields below
	awake  bool
	wakes  int
}

func (s *sleeper) Open(ctx context.Context, sandbox string, generation uint64, port uint16) (net.Conn, error) {
	s.wakeMu.Lock()
	awake := s.awake
	s.wakeMu.Unlock()
	switch {
	case !awake:
		return nil, &link.VerdictError{Verdict: link.NotHere}
	case generation != 8:
		return nil, &link.VerdictError{Verdict: link.WrongGeneration}
	}
	return s.backendPorts.Open(ctx, sandbox, generation, port)
}

func (s *sleeper) Wake(ctx context.Context, _ string, _ uint64) error {
	s.wakeMu.Lock()
	defer s.wakeMu.Unlock()
	if s.awake {
		return &link.VerdictError{Verdict: link.WrongGeneration}
	}
	s.wakes++
	s.awake = true
	r := s.route
	r.State, r.Generation = routing.Running, 8
	return s.store.PutRoute(ctx, r)
}

// The same over the real link, between processes and within one: a hundred clients of all kinds, one wake.
func TestWakeOverTheLink(t *testing.T) {
	const clients = 100
	for _, direct := range []bool{false, true} {
		t.Run(map[bool]string{false: "network", true: "direct"}[direct], func(t *testing.T) {
			b := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				fmt.Fprintf(w, "%s %d", r.Method, len(body))
			})
			backend := &sleeper{backendPorts: backendPorts{ports: map[uint16]string{3000: b}}}
			node := link.NewServer(backend, link.ServerOptions{Key: linkKey, OpenTimeout: 20 * time.Second})
			dial, addr := serveLink(t, node, direct)
			e := startEdge(t, func(o *Options) { o.Link = link.NewPool(dial, link.PoolOptions{}) })
			backend.store = e.store
			backend.route = routing.Route{Sandbox: "isv", Node: "node1", Generation: 7, State: routing.Paused, AutoResume: true}
			if err := e.store.PutNode(t.Context(), routing.Node{ID: "node1", LinkAddr: addr}, time.Hour); err != nil {
				t.Fatal(err)
			}
			if err := e.store.PutRoute(t.Context(), backend.route); err != nil {
				t.Fatal(err)
			}
			client := e.client(t)
			var jobs sync.WaitGroup
			for i := range clients {
				jobs.Go(func() {
					method, size := "GET", 0
					if i%2 == 1 {
						method, size = "POST", 10<<10
					}
					req, err := http.NewRequestWithContext(t.Context(), method, "http://3000-isv.sluice.test/", strings.NewReader(strings.Repeat("x", size)))
					if err != nil {
						t.Error(err)
						return
					}
					resp, err := client.Do(req)
					if err != nil {
						t.Error(err)
						return
					}
					defer resp.Body.Close()
					body, err := io.ReadAll(resp.Body)
					if want := fmt.Sprintf("%s %d", method, size); err != nil || resp.StatusCode != 200 || string(body) != want {
						t.Errorf("%d %q, %v; want %q", resp.StatusCode, body, err, want)
					}
				})
			}
			jobs.Wait()
			if backend.wakes != 1 {
				t.Errorf("%d wakes for %d requests", backend.wakes, clients)
			}
			// An ordinary dial wakes nothing, whatever it finds.
			backend.wakeMu.Lock()
			backend.awake = false
			backend.wakeMu.Unlock()
			_, err := dial(t.Context(), link.Target{Addr: addr, Sandbox: "isv", Generation: 8, Port: 3000})
			if v, ok := errors.AsType[*link.VerdictError](err); !ok || v.Verdict != link.NotHere || backend.wakes != 1 {
				t.Errorf("dial of a paused sandbox: %v, %d wakes", err, backend.wakes)
			}
		})
	}
}
