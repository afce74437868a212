package link

import (
	"context"
	"errors"
	"io"
	"iter"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var testKey = []byte("a cluster key for tests only....")

// fakeNode is a Backend whose sandboxes are servers on loopback.
type fakeNode struct {
	mu    sync.Mutex
	addrs map[lifecycle]string // what every open port of a lifecycle leads to
	fails map[uint16]error     // ports with an error of their own
	gate  func()               // called inside Open, after it has connected
	opens int
	wake  func(ctx context.Context, sandbox string, generation uint64) error // nil: nothing here is paused
}

func (n *fakeNode) Open(ctx context.Context, sandbox string, generation uint64, port uint16) (net.Conn, error) {
	n.mu.Lock()
	addr, here := n.addrs[lifecycle{sandbox, generation}]
	err, gate := n.fails[port], n.gate
	n.opens++
	n.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if !here {
		return nil, &VerdictError{NotHere}
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if gate != nil {
		gate()
	}
	return c, err
}

// Wake makes it a Waker.
func (n *fakeNode) Wake(ctx context.Context, sandbox string, generation uint64) error {
	n.mu.Lock()
	wake := n.wake
	n.mu.Unlock()
	if wake == nil {
		return &VerdictError{NotHere}
	}
	return wake(ctx, sandbox, generation)
}

func (n *fakeNode) onWake(wake func(ctx context.Context, sandbox string, generation uint64) error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wake = wake
}

func (n *fakeNode) end(sandbox string, generation uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.addrs, lifecycle{sandbox, generation})
}

// fixture is a server with one sandbox, "sb" in generation 7, and what it takes to reach it.
type fixture struct {
	node   *fakeNode
	server *Server
	addr   string
	dialer *Dialer
	target Target
}

// serveGuest starts what listens in the sandbox: handle owns each accepted connection until it returns.
func serveGuest(t testing.TB, handle func(*net.TCPConn)) string {
	t.Helper()
	ln := listen(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				stop := context.AfterFunc(t.Context(), func() { _ = c.Close() })
				defer stop()
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func echo(c *net.TCPConn) {
	_, _ = io.Copy(struct{ io.Writer }{c}, c)
	_ = c.CloseWrite()
}

// start serves one sandbox whose guest is handle, until the test ends, and then checks that nothing is left.
func start(t testing.TB, handle func(*net.TCPConn), opts ServerOptions) *fixture {
	t.Helper()
	checkGoroutines(t)
	guest := serveGuest(t, handle)
	node := &fakeNode{addrs: map[lifecycle]string{{"sb", 7}: guest}, fails: map[uint16]error{}}
	if opts.TLS == nil && opts.Key == nil {
		opts.Key = testKey
	}
	f := &fixture{node: node, server: NewServer(node, opts), dialer: &Dialer{Key: opts.Key}}
	f.addr = serve(t, f.server, listen(t))
	f.target = Target{Addr: f.addr, Sandbox: "sb", Generation: 7, Port: 3000}
	return f
}

func serve(t testing.TB, s *Server, ln net.Listener) string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve() = %v, want nil", err)
		}
		if s.registry.size != 0 || len(s.registry.lives) != 0 {
			t.Errorf("registry holds %d connections of %d lifecycles after Serve", s.registry.size, len(s.registry.lives))
		}
	})
	return ln.Addr().String()
}

func (f *fixture) dial(t testing.TB) *net.TCPConn {
	t.Helper()
	c, err := f.dialer.Dial(context.Background(), f.target)
	if err != nil {
		t.Fatalf("Dial() = %v", err)
	}
	t.Cleanup(func() { _ = c.Close() })
	mustSetDeadline(t, c)
	return c.(*net.TCPConn)
}

// mustSetDeadline makes a test that would hang fail instead.
func mustSetDeadline(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
}

// checkGoroutines fails the test when code of this package still runs after everything was cleaned up.
func checkGoroutines(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		for wait := time.Millisecond; ; wait *= 2 {
			var left []string
			for stack := range stacks() {
				if strings.Contains(stack, "sluice/link.") && !strings.Contains(stack, "testing.tRunner") &&
					!strings.Contains(stack, "testing.(*B)") {
					left = append(left, stack)
				}
			}
			if len(left) == 0 {
				return
			}
			if wait > 4*time.Second {
				t.Errorf("%d goroutines left:\n%s", len(left), strings.Join(left, "\n\n"))
				return
			}
			time.Sleep(wait)
		}
	})
}

// stacks yields the stack of every goroutine.
func stacks() iter.Seq[string] {
	buf := make([]byte, 1<<20)
	return strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n")
}

// eventually waits for something that another goroutine is about to do.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

func wantReset(t testing.TB, what string, err error) {
	t.Helper()
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("%s: %v, want a reset", what, err)
	}
}

func mustEcho(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Fatalf("echo = %q, %v, want %q", got, err, text)
	}
}

func TestDialEchoes(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	c := f.dial(t)
	mustEcho(t, c, "hello")
	mustEcho(t, c, strings.Repeat("long ", 1<<20))
	if got := f.server.stats.toGuest.Get(); got != 5+5<<20 {
		t.Errorf("bytes to guest = %d, want %d", got, 5+5<<20)
	}
}
