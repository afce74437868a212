package loadtest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// serve starts an in-process server and returns where it is. When the test ends, no goroutine of ours may be left.
func serve(t *testing.T, h http.HandlerFunc) (*httptest.Server, string) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
		checkGoroutines(t)
	})
	return s, strings.TrimPrefix(s.URL, "http://")
}

func checkGoroutines(t *testing.T) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(stack, "loadtest.(*generator)") {
			t.Errorf("goroutine left:\n%s", stack)
		}
	}
}

func mustRun(t *testing.T, opts Options) Result {
	t.Helper()
	if opts.Timeout == 0 {
		opts.Timeout = 30 * time.Second // however slow this machine is just now
	}
	r, err := Run(t.Context(), opts)
	if err != nil {
		t.Fatalf("Run() = %v", err)
	}
	if r.Due != r.Sent+r.Unstarted || r.Sent != r.OK+r.Failed() {
		t.Errorf("due %d, sent %d, not started %d, ok %d, failed %d do not add up", r.Due, r.Sent, r.Unstarted, r.OK, r.Failed())
	}
	return r
}

// The number of requests comes from rate and duration alone.
func TestRateIsKept(t *testing.T) {
	var served atomic.Int64
	_, addr := serve(t, func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		fmt.Fprint(w, "hello")
	})
	begun := time.Now()
	r := mustRun(t, Options{Scenario: SmallGet("/x"), Addr: addr, Rate: 500, Duration: 400 * time.Millisecond, Warmup: 100 * time.Millisecond})
	if r.Due != 200 || r.OK != 200 || served.Load() != 250 {
		t.Errorf("due %d, ok %d, served %d, want 200, 200 and 250 with the warm-up", r.Due, r.OK, served.Load())
	}
	if took := time.Since(begun); took < 498*time.Millisecond {
		t.Errorf("250 requests at 500/s were sent in %v: faster than asked", took)
	}
	if r.Throughput > 500 {
		t.Errorf("throughput %v is more than was asked for", r.Throughput)
	}
	p := r.Latency
	if p.P50 <= 0 || p.P50 > p.P90 || p.P90 > p.P99 || p.P99 > p.P999 || p.P999 > p.Max || r.Service.P50 > p.Max {
		t.Errorf("percentiles are not in order: %+v", p)
	}
}

// The proof that the loop is open. One of 200 requests takes 300 ms, with one connection: a generator that waited for
// it would report one slow request, and a 90th percentile of a fraction of a millisecond. Here the 60 requests that were
// due in that time are late, and the 90th percentile says so. A slow machine makes it only larger.
func TestStallShowsInPercentiles(t *testing.T) {
	const stall = 300 * time.Millisecond
	var served atomic.Int64
	_, addr := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if served.Add(1) == 50 {
			time.Sleep(stall)
		}
	})
	r := mustRun(t, Options{Scenario: SmallGet(""), Addr: addr, Rate: 200, Duration: time.Second, Connections: 1})
	if r.Due != 200 || r.OK != 200 {
		t.Errorf("due %d, ok %d, want 200 of each", r.Due, r.OK)
	}
	if r.Latency.P90 < stall/3 {
		t.Errorf("p90 = %v after a stall of %v, want at least %v", r.Latency.P90, stall, stall/3)
	}
	if r.Latency.Max < stall {
		t.Errorf("max = %v, want at least %v", r.Latency.Max, stall)
	}
	if r.Service.Max < stall {
		t.Errorf("service max = %v, want at least %v", r.Service.Max, stall)
	}
}

func TestOverloadIsCounted(t *testing.T) {
	_, addr := serve(t, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	r := mustRun(t, Options{Scenario: SmallGet("/"), Addr: addr, Rate: 100, Duration: 600 * time.Millisecond, Connections: 2, Timeout: 100 * time.Millisecond})
	if r.Due != 60 || r.OK != 0 || r.Errors[ErrTimeout] != r.Sent || r.Unstarted == 0 {
		t.Errorf("due %d, ok %d, timeouts %d of %d sent, not started %d; want 60, 0, all, some",
			r.Due, r.OK, r.Errors[ErrTimeout], r.Sent, r.Unstarted)
	}
	if r.Latency.P50 < 100*time.Millisecond {
		t.Errorf("p50 = %v: requests that nobody answered must not look fast", r.Latency.P50)
	}
	if r.Throughput != 0 {
		t.Errorf("throughput = %v, want 0", r.Throughput)
	}
}

func TestScenarios(t *testing.T) {
	_, addr := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.RequestURI() {
		case "/private?x=1":
			if r.Header.Get("e2b-traffic-access-token") != "secret" || r.Header.Get("X-More") != "yes" {
				w.WriteHeader(http.StatusForbidden)
			}
		case "/host":
			fmt.Fprintf(w, "you asked for %s", r.Host)
		case "/ws":
			c, err := websocket.Accept(w, r, nil)
			if err != nil {
				return
			}
			defer c.CloseNow()
			for {
				kind, msg, err := c.Read(r.Context())
				if err != nil || c.Write(r.Context(), kind, msg) != nil {
					return
				}
			}
		case "/liar":
			c, err := websocket.Accept(w, r, nil)
			if err != nil {
				return
			}
			defer c.CloseNow()
			if _, _, err := c.Read(r.Context()); err == nil {
				_ = c.Write(r.Context(), websocket.MessageBinary, make([]byte, messageSize))
			}
		case "/chunked":
			fmt.Fprint(w, strings.Repeat("x", 5000))
			w.(http.Flusher).Flush()
			fmt.Fprint(w, "end")
		case "/close":
			w.Header().Set("Connection", "close")
		case "/truncated":
			w.Header().Set("Content-Length", "10")
			fmt.Fprint(w, "short")
		case "/reset":
			panic(http.ErrAbortHandler)
		case "/garbage":
			c, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				_, _ = io.WriteString(c, "220 mail.example.com ESMTP\r\n\r\n")
				_ = c.Close()
			}
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
	const good = errorKinds
	tests := []struct {
		scenario Scenario
		header   []Header
		host     string
		want     ErrorKind // good, or of all requests
	}{
		{TokenGet("/private?x=1", "secret"), []Header{{"X-More", "yes"}}, "", good},
		{TokenGet("/private?x=1", "wrong"), []Header{{"X-More", "yes"}}, "", ErrStatus},
		{MaskGet("/host", "localhost:3000"), nil, "localhost:3000", good},
		{MaskGet("/host", "localhost:3000"), nil, "3000-abc.sluice.localhost", ErrBody},
		{WebSocketEcho("/ws"), nil, "", good},
		{WebSocketEcho("/liar"), nil, "", ErrBody},
		{WebSocketEcho("/host"), nil, "", ErrDial},
		{SmallGet("/chunked"), nil, "", good},
		{SmallGet("/close"), nil, "", good},
		{SmallGet("/missing"), nil, "", ErrStatus},
		{SmallGet("/truncated"), nil, "", ErrClosed},
		{SmallGet("/reset"), nil, "", ErrClosed},
		{SmallGet("/garbage"), nil, "", ErrProtocol},
	}
	for _, tt := range tests {
		r := mustRun(t, Options{Scenario: tt.scenario, Header: tt.header, Host: tt.host, Addr: addr, Rate: 200, Duration: 100 * time.Millisecond, Connections: 4})
		want := Result{Due: 20, Sent: 20}
		if tt.want == good {
			want.OK = 20
		} else {
			want.Errors[tt.want] = 20
		}
		if r.Due != want.Due || r.Sent != want.Sent || r.OK != want.OK || r.Errors != want.Errors {
			t.Errorf("%s %s: sent %d, ok %d, errors %v, want %d, %d, %v",
				tt.scenario.Name, tt.scenario.Path, r.Sent, r.OK, r.Errors, want.Sent, want.OK, want.Errors)
		}
	}
}

func TestConnectionsAreKept(t *testing.T) {
	var opened atomic.Int64
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.Add(1)
		}
	}
	s.Start()
	defer s.Close()
	r := mustRun(t, Options{Scenario: SmallGet("/"), Addr: s.Listener.Addr().String(), Rate: 1000, Duration: 100 * time.Millisecond, Connections: 3})
	if r.OK != 100 || opened.Load() > 3 {
		t.Errorf("%d answers on %d connections, want 100 on 3 at most", r.OK, opened.Load())
	}
}

// A server that closes idle connections is not an error: clients open another one.
func TestStaleConnectionIsReopened(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 4096)
			_, _ = c.Read(buf)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			_ = c.Close() // without a word in the answer
		}
	}()
	r := mustRun(t, Options{Scenario: SmallGet("/"), Addr: ln.Addr().String(), Rate: 100, Duration: 200 * time.Millisecond, Connections: 1})
	if r.OK != 20 || r.Reopened != 19 {
		t.Errorf("ok %d, reopened %d, want 20, 19; errors %v", r.OK, r.Reopened, r.Errors)
	}
}

func TestTLS(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Host) }))
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	opts := Options{Scenario: MaskGet("/", "example.com"), Host: "example.com", Addr: s.Listener.Addr().String(),
		TLS: &tls.Config{RootCAs: roots, ServerName: "example.com"}, Rate: 100, Duration: 100 * time.Millisecond}
	if r := mustRun(t, opts); r.OK != 10 {
		t.Errorf("ok = %d, want 10; errors %v", r.OK, r.Errors)
	}
	opts.TLS = &tls.Config{ServerName: "example.com"}
	if r := mustRun(t, opts); r.Errors[ErrDial] != 10 {
		t.Errorf("errors by dial = %d without the CA, want 10", r.Errors[ErrDial])
	}
}

func TestNobodyThere(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close()
	r := mustRun(t, Options{Scenario: SmallGet("/"), Addr: ln.Addr().String(), Rate: 100, Duration: 100 * time.Millisecond})
	if r.Errors[ErrDial] != 10 || r.Latency.Max != 0 {
		t.Errorf("errors by dial = %d, longest latency %v, want 10 and none", r.Errors[ErrDial], r.Latency.Max)
	}
}

func TestCancelStops(t *testing.T) {
	_, addr := serve(t, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err := Run(ctx, Options{Scenario: SmallGet("/"), Addr: addr, Rate: 10, Duration: maxDuration, Connections: 2})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Run() = %v, want canceled", err)
	}
}

func TestOptionsAreChecked(t *testing.T) {
	good := Options{Scenario: SmallGet("/"), Addr: "127.0.0.1:1", Rate: 1, Duration: time.Second, Connections: 1, Timeout: time.Second}
	if err := good.validate(); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		field string
		spoil func(*Options)
	}{
		{"Addr", func(o *Options) { o.Addr = "127.0.0.1" }},
		{"Rate", func(o *Options) { o.Rate = 0 }},
		{"Rate", func(o *Options) { o.Rate = 1e9 }},
		{"Duration", func(o *Options) { o.Duration = 0 }},
		{"Duration", func(o *Options) { o.Duration = maxDuration + 1 }},
		{"Duration", func(o *Options) { o.Duration, o.Warmup = maxDuration, time.Second }},
		{"Duration", func(o *Options) { o.Duration, o.Warmup = 1<<63-1, 1<<63-1 }},
		{"Warmup", func(o *Options) { o.Warmup = -1 }},
		{"Connections", func(o *Options) { o.Connections = -1 }},
		{"Connections", func(o *Options) { o.Connections = maxConnections + 1 }},
		{"Timeout", func(o *Options) { o.Timeout = -1 }},
		{"Timeout", func(o *Options) { o.Timeout = time.Hour }},
		{"Path", func(o *Options) { o.Scenario.Path = "x" }},
		{"Path", func(o *Options) { o.Scenario.Path = "/a b" }},
		{"fit into a request", func(o *Options) { o.Host = "x\r\nEvil: yes" }},
		{"fit into a request", func(o *Options) { o.Header = []Header{{"A", "b\nc"}} }},
	}
	for i, tt := range tests {
		o := good
		tt.spoil(&o)
		if _, err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), tt.field) {
			t.Errorf("case %d: Run() = %v, want an error about %s", i, err, tt.field)
		}
	}
}

func TestWriteTable(t *testing.T) {
	ms := time.Millisecond
	at := func(p50 time.Duration) Percentiles { return Percentiles{p50, 2 * p50, 3 * p50, 4 * p50, 5 * p50} }
	direct := Result{Label: "direct", Scenario: "get", Rate: 1000, Due: 1000, Sent: 1000, OK: 1000, Latency: at(ms), Service: at(ms), Throughput: 1000}
	edge := Result{Label: "edge", Scenario: "get", Rate: 1000, Due: 1000, Sent: 990, OK: 980, Unstarted: 10, Latency: at(2 * ms), Service: at(ms), Throughput: 500}
	edge.Errors[ErrTimeout] = 10
	alone := Result{Label: "edge", Scenario: "websocket", Rate: 10}
	var b strings.Builder
	if err := WriteTable(&b, []Result{direct, alone, edge}); err != nil {
		t.Fatal(err)
	}
	const want = `            get  direct   edge  edge/direct
          asked  1000/s  1000/s
       answered  1000/s   500/s        0.50x
           sent    1000     990
             ok    1000     980
    not started       0      10
 error: timeout       0      10
            p50     1ms     2ms        2.00x
            p90     2ms     4ms        2.00x
            p99     3ms     6ms        2.00x
          p99.9     4ms     8ms        2.00x
            max     5ms    10ms        2.00x
    service p50     1ms     1ms        1.00x
    service p99     3ms     3ms        1.00x
`
	got, rest, _ := strings.Cut(b.String(), "\n\n")
	if strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(want), " ") {
		t.Errorf("table\n%s\nwant\n%s", got, want)
	}
	if !strings.Contains(rest, "websocket") || strings.Contains(rest, "x\n") {
		t.Errorf("the second table\n%s", rest)
	}
	if err := WriteTable(&b, nil); err != nil {
		t.Errorf("no results: %v", err)
	}
	if err := WriteTable(failingWriter{}, []Result{direct}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("a failing writer: %v, want its error", err)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }
