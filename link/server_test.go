package link

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// raw opens a connection to the server and sends what a test made itself.
func (f *fixture) raw(t testing.TB, send []byte) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", f.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	mustSetDeadline(t, c)
	if _, err := c.Write(send); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// header is what a dialer would send now, after edit.
func (f *fixture) header(edit func(*preface)) []byte {
	p := preface{sandbox: "sb", generation: 7, port: 3000, stamp: time.Now()}
	_, _ = rand.Read(p.nonce[:])
	if edit != nil {
		edit(&p)
	}
	return appendPreface(nil, &p, &f.server.key)
}

func readVerdict(c net.Conn) (Verdict, error) {
	var b [1]byte
	_, err := io.ReadFull(c, b[:])
	return Verdict(b[0]), err
}

// Nobody without the key gets a byte out of the server, nor reaches the Backend.
func TestStrangersGetNoVerdict(t *testing.T) {
	tests := []struct {
		name   string
		send   func(f *fixture) []byte
		finish bool // the peer ends its stream
		reason rejectReason
	}{
		{"http", func(*fixture) []byte { return []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n") }, false, rejectMalformed},
		{"tls", func(*fixture) []byte {
			return []byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("r", 500))
		}, false, rejectMalformed},
		{"oversize", func(*fixture) []byte { return []byte(signature + "\x21\x11\xff\xff" + strings.Repeat("x", 1000)) }, false, rejectMalformed},
		{"port scan", func(*fixture) []byte { return nil }, true, rejectClosed},
		{"truncated", func(f *fixture) []byte { return f.header(nil)[:80] }, true, rejectClosed},
		{"silent", func(*fixture) []byte { return nil }, false, rejectTimeout},
		{"silent in the middle", func(f *fixture) []byte { return f.header(nil)[:80] }, false, rejectTimeout},
		{"wrong key", func(*fixture) []byte {
			key := newMACKey([]byte("guess"))
			p := samplePreface()
			return appendPreface(nil, &p, &key)
		}, false, rejectMAC},
		{"changed port", func(f *fixture) []byte { return bytes.Replace(f.header(nil), []byte("3000-sb"), []byte("3001-sb"), 1) }, false, rejectMAC},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			opts := ServerOptions{}
			if tt.reason == rejectTimeout {
				opts.HeaderTimeout = 50 * time.Millisecond
			}
			f := start(t, echo, opts)
			c := f.raw(t, tt.send(f))
			if tt.finish {
				if err := c.CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			if v, err := readVerdict(c); err == nil {
				t.Errorf("got verdict %s", v)
			}
			eventually(t, "the peer is counted", func() bool { return f.server.stats.rejects[tt.reason].Get() == 1 })
			if f.node.opens != 0 {
				t.Error("the backend was asked")
			}
			eventually(t, "others are served", func() bool { // however slow this machine is just now
				c, err := f.dialer.Dial(t.Context(), f.target)
				if err == nil {
					_ = c.Close()
				}
				return err == nil
			})
		})
	}
}

// The deadline is for the whole header: a byte now and then does not buy time.
func TestSlowlorisIsCut(t *testing.T) {
	f := start(t, echo, ServerOptions{HeaderTimeout: 100 * time.Millisecond})
	c := f.raw(t, nil)
	header := f.header(nil)
	var err error
	sent := 0
	for ; sent < len(header) && err == nil; sent++ {
		time.Sleep(5 * time.Millisecond)
		_, err = c.Write(header[sent : sent+1])
	}
	if err == nil {
		_, err = readVerdict(c)
	}
	if err == nil {
		t.Errorf("%d bytes in %d steps of 5 ms were answered, want a cut after 100 ms", sent, sent)
	}
	if got := f.server.stats.rejects[rejectTimeout].Get(); got != 1 {
		t.Errorf("rejects by timeout = %d, want 1", got)
	}
}

func TestHeaderInPiecesIsServed(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	c := f.raw(t, nil)
	for _, b := range f.header(nil) {
		if _, err := c.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	if v, err := readVerdict(c); v != Open || err != nil {
		t.Fatalf("verdict = %s, %v, want open", v, err)
	}
	mustEcho(t, c, "hello")
}

// What follows the header at once belongs to the stream.
func TestStreamRightBehindHeader(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	c := f.raw(t, append(f.header(nil), "early"...))
	if v, err := readVerdict(c); v != Open || err != nil {
		t.Fatalf("verdict = %s, %v, want open", v, err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "early" {
		t.Errorf("read %q, %v, want the bytes behind the header", got, err)
	}
}

func TestOldAndReplayedHeaders(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	for _, off := range []time.Duration{-31 * time.Second, 31 * time.Second, -time.Hour, 1000 * time.Hour} {
		c := f.raw(t, f.header(func(p *preface) { p.stamp = p.stamp.Add(off) }))
		if v, err := readVerdict(c); v != Refused || err != nil {
			t.Errorf("stamp off by %v: %s, %v, want refused", off, v, err)
		}
	}
	header := f.header(nil)
	if v, err := readVerdict(f.raw(t, header)); v != Open || err != nil {
		t.Fatalf("first use: %s, %v, want open", v, err)
	}
	if v, err := readVerdict(f.raw(t, header)); err == nil {
		t.Errorf("replay was answered: %s", v)
	}
	if got := f.server.stats.rejects[rejectReplay].Get(); got != 1 {
		t.Errorf("rejects by replay = %d, want 1", got)
	}
	if f.node.opens != 1 {
		t.Errorf("the backend was asked %d times, want 1", f.node.opens)
	}
}

func TestFullWindowIsBusy(t *testing.T) {
	f := start(t, echo, ServerOptions{MaxNonces: 1})
	mustEcho(t, f.dial(t), "the first")
	_, err := f.dialer.Dial(t.Context(), f.target)
	if v, ok := errors.AsType[*VerdictError](err); !ok || v.Verdict != Busy {
		t.Errorf("second dial = %v, want busy", err)
	}
}

func TestVerdicts(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	closed := listen(t)
	_ = closed.Close()
	f.node.addrs[lifecycle{"noport", 1}] = closed.Addr().String()
	f.node.fails = map[uint16]error{
		1: &VerdictError{NotHere},
		2: fmt.Errorf("open: %w", &VerdictError{WrongGeneration}),
		3: &VerdictError{PortClosed},
		4: &VerdictError{Refused},
		5: &VerdictError{Busy},
		6: &VerdictError{Open}, // an error that says there is none
		7: &VerdictError{99},
		8: errors.New("disk on fire"),
		9: context.DeadlineExceeded,
	}
	tests := []struct {
		sandbox    string
		generation uint64
		port       uint16
		want       Verdict
	}{
		{"sb", 7, 1, NotHere},
		{"sb", 7, 2, WrongGeneration},
		{"sb", 7, 3, PortClosed},
		{"sb", 7, 4, Refused},
		{"sb", 7, 5, Busy},
		{"sb", 7, 6, Refused},
		{"sb", 7, 7, Refused},
		{"sb", 7, 8, Refused},
		{"sb", 7, 9, Refused},
		{"noport", 1, 80, PortClosed},
		{"sb", 8, 80, NotHere},
		{"other", 7, 80, NotHere},
		{"sb", 7, 80, Open},
	}
	for _, dial := range []struct {
		name string
		dial DialFunc
	}{{"network", f.dialer.Dial}, {"direct", f.server.Direct()}} {
		for _, tt := range tests {
			c, err := dial.dial(t.Context(), Target{Addr: f.addr, Sandbox: tt.sandbox, Generation: tt.generation, Port: tt.port})
			got := Open
			if err != nil {
				v, ok := errors.AsType[*VerdictError](err)
				if !ok {
					t.Errorf("%s: %+v: %v, want a verdict", dial.name, tt, err)
					continue
				}
				got = v.Verdict
			} else {
				_ = c.Close()
			}
			if got != tt.want {
				t.Errorf("%s: port %d of %s/%d: %s, want %s", dial.name, tt.port, tt.sandbox, tt.generation, got, tt.want)
			}
		}
	}
	for v := Open; v <= Busy; v++ {
		if f.server.stats.verdicts[v].Get() == 0 {
			t.Errorf("verdict %s was not counted", v)
		}
	}
	if v := Verdict(0); v.String() != "invalid" || Verdict(7).String() != "invalid" {
		t.Error("a value that is no verdict has a name of one")
	}
}

func TestHalfClose(t *testing.T) {
	const size = 3 << 20
	// Each guest says in which order the two ends finish.
	t.Run("edge first", func(t *testing.T) {
		f := start(t, func(c *net.TCPConn) {
			n, _ := io.Copy(io.Discard, struct{ io.Reader }{c})
			fmt.Fprintf(c, "got %d, ", n)
			_, _ = c.Write(make([]byte, size)) // goes on long after the edge has finished
		}, ServerOptions{})
		c := f.dial(t)
		if _, err := c.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		want := fmt.Sprintf("got %d, ", size)
		if err != nil || len(got) != len(want)+size || !strings.HasPrefix(string(got), want) {
			t.Errorf("read %d bytes, %v, want %d", len(got), err, len(want)+size)
		}
		eventually(t, "the connection is gone", func() bool { return f.server.stats.open.Get() == 0 })
	})
	t.Run("guest first", func(t *testing.T) {
		got := make(chan int64, 1)
		f := start(t, func(c *net.TCPConn) {
			_, _ = c.Write([]byte("bye"))
			_ = c.CloseWrite()
			n, _ := io.Copy(io.Discard, struct{ io.Reader }{c})
			got <- n
		}, ServerOptions{})
		c := f.dial(t)
		if b, err := io.ReadAll(c); string(b) != "bye" || err != nil {
			t.Fatalf("read %q, %v, want bye and an end", b, err)
		}
		if _, err := c.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		if n := <-got; n != size {
			t.Errorf("the guest got %d bytes after its own end, want %d", n, size)
		}
	})
	t.Run("nothing at all", func(t *testing.T) {
		f := start(t, echo, ServerOptions{})
		c := f.dial(t)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
			t.Errorf("read %q, %v, want an end", b, err)
		}
	})
}

// A Backend that hangs is given up, and the edge is told.
func TestOpenIsBounded(t *testing.T) {
	checkGoroutines(t)
	s := NewServer(hangingBackend{}, ServerOptions{Key: testKey, OpenTimeout: 10 * time.Millisecond})
	target := Target{Addr: serve(t, s, listen(t)), Sandbox: "sb", Generation: 7, Port: 3000}
	for _, dial := range []DialFunc{(&Dialer{Key: testKey}).Dial, s.Direct()} {
		_, err := dial(t.Context(), target)
		if v, ok := errors.AsType[*VerdictError](err); !ok || v.Verdict != Refused {
			t.Errorf("dial = %v, want refused", err)
		}
	}
}

type hangingBackend struct{}

func (hangingBackend) Open(ctx context.Context, _ string, _ uint64, _ uint16) (net.Conn, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

func TestHalfOpenIsBounded(t *testing.T) {
	f := start(t, func(c *net.TCPConn) { // a guest that never closes
		_, _ = io.Copy(io.Discard, struct{ io.Reader }{c})
		_, _ = c.Write([]byte("12345"))
		_ = awaitReset(rawConn(c))
	}, ServerOptions{HalfOpenTimeout: 100 * time.Millisecond})
	c := f.dial(t)
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	_, err := io.ReadAll(c)
	wantReset(t, "a half-open connection that is silent", err)
	if got := f.server.stats.resets[resetHalfOpen].Get(); got != 1 {
		t.Errorf("resets by half_open = %d, want 1", got)
	}
}

// deadlineRecorder is a connection that only remembers its deadline.
type deadlineRecorder struct {
	net.Conn
	deadline time.Time
}

func (c *deadlineRecorder) SetReadDeadline(t time.Time) error { c.deadline = t; return nil }

func TestHalfOpenDeadlineIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &deadlineRecorder{}
		r := &relay{halfOpen: time.Minute}
		p := progress{relay: r, src: src, moved: newServerMetrics(nil).toEdge}
		p.add(1)
		if !src.deadline.IsZero() {
			t.Error("a connection whose both directions are open has a deadline")
		}
		r.finished.Store(1)
		for range 10 {
			time.Sleep(10 * time.Second)
			p.add(1)
			if left := time.Until(src.deadline); left < 50*time.Second || left > time.Minute {
				t.Errorf("%v left after a byte, want about a minute", left)
			}
		}
	})
}

func TestResetPropagates(t *testing.T) {
	for _, half := range []bool{false, true} {
		t.Run(fmt.Sprintf("from edge, half-closed %t", half), func(t *testing.T) {
			saw := make(chan error, 1)
			f := start(t, func(c *net.TCPConn) {
				buf := make([]byte, 16)
				for {
					if _, err := c.Read(buf); err == io.EOF {
						saw <- awaitReset(rawConn(c)) // the end was passed on; the reset must be too
						return
					} else if err != nil {
						saw <- err
						return
					}
					_, _ = c.Write(buf)
				}
			}, ServerOptions{})
			c := f.dial(t)
			if _, err := c.Write([]byte("0123456789abcdef")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, make([]byte, 16)); err != nil {
				t.Fatal(err)
			}
			if half {
				if err := c.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				eventually(t, "the relay has passed the end on", func() bool { return runs("link.(*relay).direction", "link.awaitReset") })
			}
			resetConn(c)
			wantReset(t, "the guest sees", <-saw)
			eventually(t, "the reset is counted", func() bool { return f.server.stats.resets[resetPeer].Get() == 1 })
		})
		t.Run(fmt.Sprintf("from guest, half-closed %t", half), func(t *testing.T) {
			ended := make(chan struct{})
			f := start(t, func(c *net.TCPConn) {
				_, _ = c.Write([]byte("x"))
				if half {
					_ = c.CloseWrite()
				}
				<-ended
				resetConn(c)
			}, ServerOptions{})
			c := f.dial(t)
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if half {
				if _, err := c.Read(make([]byte, 1)); err != io.EOF {
					t.Fatalf("Read() = %v, want the guest's end", err)
				}
			}
			close(ended)
			if half {
				wantReset(t, "the edge sees", awaitReset(rawConn(c)))
				return
			}
			_, err := c.Read(make([]byte, 1))
			wantReset(t, "the edge sees", err)
		})
	}
}

// runs tells whether some goroutine is in all these functions.
func runs(functions ...string) bool {
	for stack := range stacks() {
		if !slices.ContainsFunc(functions, func(f string) bool { return !strings.Contains(stack, f) }) {
			return true
		}
	}
	return false
}

func TestResetEndsALifecycle(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	f.node.addrs[lifecycle{"sb", 8}] = f.node.addrs[lifecycle{"sb", 7}]
	f.node.addrs[lifecycle{"other", 7}] = f.node.addrs[lifecycle{"sb", 7}]
	var doomed, kept []net.Conn
	for range 5 {
		doomed = append(doomed, f.dial(t))
	}
	for _, target := range []Target{{Sandbox: "sb", Generation: 8}, {Sandbox: "other", Generation: 7}} {
		f.target = Target{Addr: f.addr, Sandbox: target.Sandbox, Generation: target.Generation, Port: 3000}
		kept = append(kept, f.dial(t))
	}
	direct, err := f.server.Direct()(t.Context(), Target{Sandbox: "sb", Generation: 7, Port: 3000})
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	for _, c := range append(append([]net.Conn{direct}, doomed...), kept...) {
		mustEcho(t, c, "alive")
	}
	f.server.Reset("sb", 7)
	for _, c := range doomed {
		_, err := c.Read(make([]byte, 1))
		wantReset(t, "a connection of the lifecycle", err)
	}
	if _, err := direct.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a direct connection of the lifecycle: %v, want closed", err)
	}
	for _, c := range kept {
		mustEcho(t, c, "still alive")
	}
	if got := f.server.stats.resets[resetLifecycle].Get(); got != 6 {
		t.Errorf("resets by lifecycle = %d, want 6", got)
	}
	if got := f.server.stats.resets[resetPeer].Get(); got != 0 {
		t.Errorf("resets by peer = %d, want 0: they were the server's own", got)
	}
}

// A connection that the Backend is just opening when its lifecycle ends is reset too, whenever the reset comes.
func TestResetDuringOpen(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprintf("direct %t", direct), func(t *testing.T) {
			f := start(t, echo, ServerOptions{})
			f.node.gate = func() {
				f.node.end("sb", 7)
				f.server.Reset("sb", 7)
			}
			dial := f.dialer.Dial
			if direct {
				dial = f.server.Direct()
			}
			_, err := dial(t.Context(), f.target)
			if v, ok := errors.AsType[*VerdictError](err); !ok || v.Verdict != NotHere {
				t.Errorf("dial = %v, want not here", err)
			}
		})
	}
}

func TestResetRace(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	guest := f.node.addrs[lifecycle{"sb", 7}]
	direct := f.server.Direct()
	for generation := uint64(100); generation < 130; generation++ {
		f.node.mu.Lock()
		f.node.addrs[lifecycle{"sb", generation}] = guest
		f.node.mu.Unlock()
		target := Target{Addr: f.addr, Sandbox: "sb", Generation: generation, Port: 3000}
		var mu sync.Mutex
		var opened []net.Conn
		var wg sync.WaitGroup
		for worker := range 4 {
			dial := f.dialer.Dial
			if worker%2 == 0 {
				dial = direct
			}
			wg.Go(func() {
				for {
					c, err := dial(context.Background(), target)
					if _, refused := errors.AsType[*VerdictError](err); refused {
						return
					}
					if err != nil {
						continue // reset between verdict and us
					}
					mu.Lock()
					opened = append(opened, c)
					mu.Unlock()
				}
			})
		}
		eventually(t, "a connection", func() bool { mu.Lock(); defer mu.Unlock(); return len(opened) > 3 })
		f.node.end("sb", generation)
		f.server.Reset("sb", generation)
		wg.Wait()
		for _, c := range opened {
			_ = c.SetDeadline(time.Now().Add(20 * time.Second)) // a direct one is closed already
			if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("generation %d: a connection outlived its lifecycle: %v", generation, err)
			}
			_ = c.Close()
		}
	}
}

func TestLimits(t *testing.T) {
	f := start(t, echo, ServerOptions{MaxConns: 3, MaxConnsPerSandbox: 2})
	f.node.addrs[lifecycle{"b", 1}] = f.node.addrs[lifecycle{"sb", 7}]
	b := Target{Addr: f.addr, Sandbox: "b", Generation: 1, Port: 80}
	wantBusy := func(what string, target Target) {
		t.Helper()
		_, err := f.dialer.Dial(t.Context(), target)
		if v, ok := errors.AsType[*VerdictError](err); !ok || v.Verdict != Busy {
			t.Errorf("%s: %v, want busy", what, err)
		}
	}
	first := f.dial(t)
	f.dial(t)
	wantBusy("the third to one sandbox", f.target)
	c, err := f.server.Direct()(t.Context(), b) // counts like the others
	if err != nil {
		t.Fatal(err)
	}
	wantBusy("the fourth in all", b)
	_ = c.Close()
	_ = c.Close()
	c, err = f.dialer.Dial(t.Context(), b)
	if err != nil {
		t.Fatalf("after one was closed: %v", err)
	}
	defer c.Close()
	_ = first.Close()
	eventually(t, "the place is free", func() bool {
		c, err := f.dialer.Dial(t.Context(), f.target)
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
		return err == nil
	})
}

func TestSilentPeersMakeRoom(t *testing.T) {
	f := start(t, echo, ServerOptions{MaxPending: 3})
	var silent []net.Conn
	for range 6 {
		silent = append(silent, f.raw(t, []byte("\r\n")))
		n := len(silent)
		eventually(t, "the peer is noticed", func() bool {
			f.server.pending.mu.Lock()
			defer f.server.pending.mu.Unlock()
			return f.server.pending.peers.Len() == min(n, 3) && int(f.server.stats.rejects[rejectEvicted].Get()) == max(0, n-3)
		})
	}
	for i, c := range silent[:3] {
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("silent peer %d: %v, want closed", i, err)
		}
	}
	mustEcho(t, f.dial(t), "an edge gets in")
}

// A listener closed by somebody else ends Serve with an error, and not only when the last connection has gone.
func TestServeEndsWithItsListener(t *testing.T) {
	checkGoroutines(t)
	node := &fakeNode{addrs: map[lifecycle]string{{"sb", 7}: serveGuest(t, echo)}}
	s := NewServer(node, ServerOptions{Key: testKey})
	ln := listen(t)
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background(), ln) }()
	f := &fixture{dialer: &Dialer{Key: testKey}, target: Target{Addr: ln.Addr().String(), Sandbox: "sb", Generation: 7, Port: 1}}
	c := f.dial(t)
	_ = ln.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve() = %v, want %v", err, net.ErrClosed)
	}
	_, err := c.Read(make([]byte, 1))
	wantReset(t, "its connection", err)
}

// flakyListener fails now and then, as a listener does when descriptors run out.
type flakyListener struct {
	net.Listener
	fails atomic.Int32
}

func (l *flakyListener) Accept() (net.Conn, error) {
	if l.fails.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

func TestAcceptSurvivesErrors(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	ln := &flakyListener{Listener: listen(t)}
	ln.fails.Store(4)
	f.addr = serve(t, f.server, ln)
	f.target.Addr = f.addr
	mustEcho(t, f.dial(t), "after the errors")
	if got := f.server.stats.acceptErrors.Get(); got != 4 {
		t.Errorf("accept errors = %d, want 4", got)
	}
}

func TestServeEnds(t *testing.T) {
	checkGoroutines(t)
	s := NewServer(&fakeNode{}, ServerOptions{Key: testKey})
	ln := listen(t)
	_ = ln.Close()
	if err := s.Serve(t.Context(), ln); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve on a closed listener = %v, want %v", err, net.ErrClosed)
	}
	for _, opts := range []ServerOptions{{}, {TLS: &tls.Config{}}, {TLS: &tls.Config{ClientAuth: tls.RequestClientCert}}} {
		if err := NewServer(&fakeNode{}, opts).Serve(t.Context(), listen(t)); err == nil {
			t.Error("Serve without a key or client certificates did not refuse")
		}
	}

	// Connections in every phase end with their Serve.
	guest := serveGuest(t, echo)
	node := &fakeNode{addrs: map[lifecycle]string{{"sb", 7}: guest}}
	s = NewServer(node, ServerOptions{Key: testKey})
	ln = listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	f := &fixture{node: node, server: s, addr: ln.Addr().String(), dialer: &Dialer{Key: testKey}}
	f.target = Target{Addr: f.addr, Sandbox: "sb", Generation: 7, Port: 1}
	open, idle, silent := f.dial(t), f.dial(t), f.raw(t, []byte("\r"))
	mustEcho(t, open, "x")
	eventually(t, "the silent one is accepted", func() bool {
		s.pending.mu.Lock()
		defer s.pending.mu.Unlock()
		return s.pending.peers.Len() == 1
	})
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve() = %v, want nil", err)
	}
	for _, c := range []net.Conn{open, idle, silent} {
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a connection after Serve: %v, want an end", err)
		}
	}
}

func TestDialer(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	t.Run("wrong key", func(t *testing.T) {
		_, err := (&Dialer{Key: []byte("wrong")}).Dial(t.Context(), f.target)
		if errs.CodeOf(err) != errs.Unavailable || !errors.Is(err, io.EOF) {
			t.Errorf("Dial() = %v, want unavailable for an end of stream", err)
		}
		if got := f.server.stats.rejects[rejectMAC].Get(); got != 1 {
			t.Errorf("the server saw %d attempts, want 1: it is no transient error", got)
		}
	})
	t.Run("nobody listens", func(t *testing.T) {
		ln := listen(t)
		_ = ln.Close()
		target := f.target
		target.Addr = ln.Addr().String()
		_, err := f.dialer.Dial(t.Context(), target)
		if errs.CodeOf(err) != errs.Unavailable || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("Dial() = %v, want unavailable for a refused connection", err)
		}
		if strings.Contains(errs.Message(err), "127.0.0.1") {
			t.Errorf("message %q tells an address", errs.Message(err))
		}
	})
	t.Run("node resets once", func(t *testing.T) {
		var seen atomic.Int32
		target := f.target
		target.Addr = serveGuest(t, func(c *net.TCPConn) {
			var buf [maxPreface]byte
			_, _ = readPreface(c, &buf)
			if seen.Add(1) == 1 {
				resetConn(c)
				return
			}
			_, _ = c.Write([]byte{byte(Open)})
			_ = awaitReset(rawConn(c))
		})
		c, err := f.dialer.Dial(t.Context(), target)
		if err != nil || seen.Load() != 2 {
			t.Fatalf("Dial() = %v after %d attempts, want the second to work", err, seen.Load())
		}
		_ = c.Close()
	})
	t.Run("silent node", func(t *testing.T) {
		target := f.target
		target.Addr = serveGuest(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, struct{ io.Reader }{c}) })
		dialer := &Dialer{Key: testKey, Timeout: 30 * time.Millisecond}
		if _, err := dialer.Dial(t.Context(), target); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Dial() = %v, want the budget's end", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(10*time.Millisecond, cancel)
		if _, err := f.dialer.Dial(ctx, target); !errors.Is(err, context.Canceled) {
			t.Errorf("Dial() = %v, want canceled", err)
		}
	})
	t.Run("no verdict at all", func(t *testing.T) {
		target := f.target
		target.Addr = serveGuest(t, func(c *net.TCPConn) {
			var buf [maxPreface]byte
			_, _ = readPreface(c, &buf)
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
		})
		if _, err := f.dialer.Dial(t.Context(), target); errs.CodeOf(err) != errs.Unavailable {
			t.Errorf("Dial() = %v, want unavailable", err)
		}
	})
	t.Run("target", func(t *testing.T) {
		for _, bad := range []Target{{Sandbox: "sb"}, {Port: 1}, {Sandbox: "a/b", Port: 1}} {
			bad.Addr = f.addr
			if _, err := f.dialer.Dial(t.Context(), bad); err == nil {
				t.Errorf("Dial(%+v) was sent", bad)
			}
		}
	})
}

// testTLS returns both sides' configurations, with certificates of one CA.
func testTLS(t testing.TB) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"node.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert},
		&tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: "node.test"}
}

func TestTLS(t *testing.T) {
	serverTLS, clientTLS := testTLS(t)
	f := start(t, echo, ServerOptions{TLS: serverTLS, HeaderTimeout: 5 * time.Second})
	f.dialer = &Dialer{TLS: clientTLS}
	pool := NewPool(f.dialer.Dial, PoolOptions{})
	t.Cleanup(pool.stop)

	c := mustGet(t, pool, f.target)
	mustEcho(t, c, "secret")
	mustEcho(t, c, strings.Repeat("long ", 1<<18))
	c.Release()
	c = mustGet(t, pool, f.target)
	if !c.Reused() {
		t.Error("a TLS connection was not pooled: something lies unread in its socket")
	}
	mustEcho(t, c, "again")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
		t.Errorf("after CloseWrite: %q, %v, want the guest's end", b, err)
	}
	c.Discard()

	c = mustGet(t, pool, f.target)
	mustEcho(t, c, "doomed")
	f.server.Reset("sb", 7)
	_, err := c.Read(make([]byte, 1))
	wantReset(t, "after Reset", err)
	c.Discard()

	stranger := clientTLS.Clone()
	stranger.Certificates = nil
	if _, err := (&Dialer{TLS: stranger}).Dial(t.Context(), f.target); errs.CodeOf(err) != errs.Unavailable {
		t.Errorf("without a certificate: %v, want unavailable", err)
	}
	if _, err := (&Dialer{Key: testKey}).Dial(t.Context(), f.target); errs.CodeOf(err) != errs.Unavailable {
		t.Errorf("without TLS: %v, want unavailable", err)
	}
	eventually(t, "the failed handshakes are counted", func() bool { return f.server.stats.rejects[rejectTLS].Get() >= 2 })
}

func TestDirect(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	pool := NewPool(f.server.Direct(), PoolOptions{})
	t.Cleanup(pool.stop)
	c := mustGet(t, pool, f.target)
	if _, ok := c.NetConn().(*net.TCPConn); !ok {
		t.Errorf("NetConn() is a %T, want the guest's *net.TCPConn", c.NetConn())
	}
	mustEcho(t, c, "hello")
	c.Release()
	f.server.Reset("sb", 7)
	c = mustGet(t, pool, f.target)
	if c.Reused() {
		t.Error("a direct connection outlived its lifecycle in the pool")
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
		t.Errorf("after CloseWrite: %q, %v, want the guest's end", b, err)
	}
	_ = c.Close()
	if n := f.server.stats.open.Get(); n != 0 {
		t.Errorf("open = %v after all were closed, want 0", n)
	}
}
