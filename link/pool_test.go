package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func mustGet(t testing.TB, p *Pool, target Target) *Conn {
	t.Helper()
	c, err := p.Get(context.Background(), target)
	if err != nil {
		t.Fatalf("Get(%+v) = %v", target, err)
	}
	return c
}

// pairDialer makes connected socket pairs: a pool's view of the world without a network.
type pairDialer struct {
	t     testing.TB
	mu    sync.Mutex
	peers []net.Conn // by order of dialing
	err   error
}

func (d *pairDialer) dial(context.Context, Target) (net.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return nil, d.err
	}
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		ends[i], err = net.FileConn(f)
		_ = f.Close()
		if err != nil {
			return nil, err
		}
	}
	d.peers = append(d.peers, ends[1])
	d.t.Cleanup(func() { _ = ends[0].Close(); _ = ends[1].Close() })
	return ends[0], nil
}

func newPairPool(t testing.TB, opts PoolOptions) (*Pool, *pairDialer) {
	d := &pairDialer{t: t}
	return NewPool(d.dial, opts), d
}

// checkPool verifies that lists, maps and counters tell the same story.
func checkPool(t testing.TB, p *Pool) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	idle := 0
	for c := p.oldest; c != nil; c = c.newer {
		idle++
		if c.state != stateIdle || (c.newer == nil) != (c == p.newest) {
			t.Errorf("idle list is broken at %p", c)
		}
	}
	inBuckets, inLives := 0, 0
	for key, b := range p.buckets {
		n := 0
		for c := b.top; c != nil; c = c.below {
			n++
		}
		if n != b.idle || b.refs < b.idle || b.refs == 0 || b.key != key {
			t.Errorf("bucket %v has %d connections, says %d idle of %d", key, n, b.idle, b.refs)
		}
		inBuckets += n
	}
	for _, b := range p.lives {
		for ; b != nil; b = b.next {
			inLives++
		}
	}
	if idle != p.idle || inBuckets != idle || inLives != len(p.buckets) || p.stats.idle.Get() != float64(idle) {
		t.Errorf("idle: list %d, count %d, buckets %d, gauge %v; buckets: map %d, lives %d",
			idle, p.idle, inBuckets, p.stats.idle.Get(), len(p.buckets), inLives)
	}
}

func TestPoolKeysByLifecycleAndPort(t *testing.T) {
	p, d := newPairPool(t, PoolOptions{})
	base := Target{Sandbox: "a", Generation: 1, Port: 80}
	mustGet(t, p, base).Release()
	for _, other := range []Target{
		{Sandbox: "b", Generation: 1, Port: 80},
		{Sandbox: "a", Generation: 2, Port: 80},
		{Sandbox: "a", Generation: 1, Port: 81},
	} {
		if c := mustGet(t, p, other); c.Reused() {
			t.Errorf("Get(%+v) reused a connection of %+v", other, c.Target())
		}
	}
	if c := mustGet(t, p, base); !c.Reused() {
		t.Error("the same target did not reuse its connection")
	}
	if len(d.peers) != 4 || p.stats.hits.Get() != 1 || p.stats.misses.Get() != 4 {
		t.Errorf("dialed %d, hits %d, misses %d, want 4, 1, 4", len(d.peers), p.stats.hits.Get(), p.stats.misses.Get())
	}
	checkPool(t, p)
}

func TestPoolTakesTheLastReleased(t *testing.T) {
	p, _ := newPairPool(t, PoolOptions{})
	target := Target{Sandbox: "a", Port: 80}
	first, second := mustGet(t, p, target), mustGet(t, p, target)
	first.Release()
	second.Release()
	if got := mustGet(t, p, target); got != second {
		t.Error("Get took the older connection")
	}
	if got := mustGet(t, p, target); got != first {
		t.Error("Get did not take the older connection second")
	}
	if got, err := p.GetFresh(context.Background(), target); err != nil || got.Reused() {
		t.Errorf("GetFresh() = %+v, %v, want a fresh connection", got, err)
	}
	checkPool(t, p)
}

func TestPoolChecksBeforeReuse(t *testing.T) {
	tests := []struct {
		name   string
		spoil  func(peer net.Conn)
		reason discardReason
	}{
		{"peer closed", func(c net.Conn) { _ = c.Close() }, discardClosed},
		{"peer finished", func(c net.Conn) { _ = c.(*net.UnixConn).CloseWrite() }, discardClosed},
		{"an answer nobody asked for", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n") }, discardPoison},
		{"an answer and an end", func(c net.Conn) { _, _ = io.WriteString(c, "x"); _ = c.Close() }, discardPoison},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, d := newPairPool(t, PoolOptions{})
			target := Target{Sandbox: "a", Port: 80}
			mustGet(t, p, target).Release()
			tt.spoil(d.peers[0])
			if c := mustGet(t, p, target); c.Reused() {
				t.Error("Get returned the spoilt connection")
			}
			if got := p.stats.discards[tt.reason].Get(); got != 1 {
				t.Errorf("discards by %s = %d, want 1", discardNames[tt.reason], got)
			}
			checkPool(t, p)

			mustGet(t, p, target).Release()
			tt.spoil(d.peers[2])
			p.reap(time.Now())
			if p.idle != 0 {
				t.Error("reap kept the spoilt connection")
			}
			checkPool(t, p)
		})
	}
}

func TestPoolSeesAReset(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	p := NewPool(f.dialer.Dial, PoolOptions{})
	t.Cleanup(p.stop)
	c := mustGet(t, p, f.target)
	mustEcho(t, c, "hello")
	c.Release()
	f.server.Reset("sb", 7)
	eventually(t, "a Get that notices the reset", func() bool {
		c := mustGet(t, p, f.target)
		defer c.Release()
		return !c.Reused()
	})
	if got := p.stats.discards[discardClosed].Get(); got != 1 {
		t.Errorf("discards by closed = %d, want 1", got)
	}
}

func TestPoolBounds(t *testing.T) {
	p, _ := newPairPool(t, PoolOptions{MaxIdle: 3, MaxIdlePerPort: 2})
	get := func(port uint16) *Conn { return mustGet(t, p, Target{Sandbox: "a", Port: port}) }
	a1, a2, a3 := get(1), get(1), get(1)
	b1, b2 := get(2), get(2)
	for _, c := range []*Conn{a1, a2, a3} {
		c.Release()
	}
	if p.idle != 2 {
		t.Errorf("idle = %d after three releases to one port, want its limit 2", p.idle)
	}
	b1.Release()
	b2.Release() // the third and the fourth in all: a1, the oldest, goes
	checkPool(t, p)
	if p.idle != 3 || a1.state != stateClosed || a2.state != stateIdle {
		t.Errorf("idle = %d, a1 %d, a2 %d, want 3, closed, idle", p.idle, a1.state, a2.state)
	}
	if got := p.stats.discards[discardFull].Get(); got != 2 {
		t.Errorf("discards by full = %d, want 2", got)
	}
}

func TestPoolForgets(t *testing.T) {
	p, d := newPairPool(t, PoolOptions{})
	t1, t2, other := Target{Sandbox: "a", Generation: 1, Port: 1}, Target{Sandbox: "a", Generation: 1, Port: 2},
		Target{Sandbox: "a", Generation: 2, Port: 1}
	idle1, idle2, kept, inUse := mustGet(t, p, t1), mustGet(t, p, t2), mustGet(t, p, other), mustGet(t, p, t2)
	for _, c := range []*Conn{idle1, idle2, kept} {
		c.Release()
	}
	p.Forget("a", 1)
	p.Forget("nobody", 1)
	checkPool(t, p)
	for i, want := range []bool{true, true, false, false} {
		if got := closedByPeer(t, d.peers[i]); got != want {
			t.Errorf("connection %d closed: %t, want %t", i, got, want)
		}
	}
	fresh := mustGet(t, p, t2) // a lifecycle that was forgotten by mistake works on
	inUse.Release()
	if !closedByPeer(t, d.peers[3]) {
		t.Error("a connection of a forgotten lifecycle came back into the pool")
	}
	fresh.Release()
	if c := mustGet(t, p, t2); c != fresh {
		t.Error("a connection made after Forget was not pooled")
	}
	checkPool(t, p)
}

// A dial that was under way when the lifecycle was forgotten must not bring its connection into the pool.
func TestPoolForgetsDuringDial(t *testing.T) {
	d := &pairDialer{t: t}
	var p *Pool
	p = NewPool(func(ctx context.Context, target Target) (net.Conn, error) {
		p.Forget(target.Sandbox, target.Generation)
		return d.dial(ctx, target)
	}, PoolOptions{})
	mustGet(t, p, Target{Sandbox: "a", Generation: 1, Port: 1}).Release()
	if p.idle != 0 {
		t.Error("the connection was pooled")
	}
	checkPool(t, p)
}

// closedByPeer looks without waiting: a socket pair's end is seen at once.
func closedByPeer(t testing.TB, c net.Conn) bool {
	t.Helper()
	looked := &Conn{raw: rawConn(c)}
	looked.peek = looked.peekSocket
	return !looked.checkAlive() && looked.health == discardClosed
}

func TestPoolReleaseRules(t *testing.T) {
	target := Target{Sandbox: "a", Port: 80}
	tests := []struct {
		name   string
		use    func(*Conn)
		pooled bool
	}{
		{"release", (*Conn).Release, true},
		{"discard", (*Conn).Discard, false},
		{"close", func(c *Conn) { _ = c.Close() }, false},
		{"closed in every way", func(c *Conn) { c.Discard(); c.Discard(); _ = c.Close(); c.Release() }, false},
		{"half-closed", func(c *Conn) { _ = c.CloseWrite(); c.Release() }, false},
		{"deadline passed", func(c *Conn) { _ = c.SetReadDeadline(time.Unix(1, 0)); c.Release() }, true},
		{"closed below", func(c *Conn) { _ = c.conn.Close(); _ = c.SetDeadline(time.Time{}); c.Release() }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, d := newPairPool(t, PoolOptions{})
			tt.use(mustGet(t, p, target))
			checkPool(t, p)
			c := mustGet(t, p, target)
			if c.Reused() != tt.pooled {
				t.Fatalf("Reused() = %t, want %t", c.Reused(), tt.pooled)
			}
			peer := d.peers[len(d.peers)-1]
			if _, err := io.WriteString(peer, "x"); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Errorf("Read() = %v: a deadline of the user before is still set", err)
			}
		})
	}
	t.Run("twice", func(t *testing.T) {
		p, _ := newPairPool(t, PoolOptions{})
		c := mustGet(t, p, target)
		c.Release()
		defer func() {
			if recover() == nil {
				t.Error("a second Release did not panic")
			}
			checkPool(t, p)
		}()
		c.Release()
	})
}

func TestPoolReapsIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := newPairPool(t, PoolOptions{IdleTimeout: time.Minute, ReapInterval: time.Second})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- p.Run(ctx) }()
		old, young := mustGet(t, p, Target{Sandbox: "a", Port: 1}), mustGet(t, p, Target{Sandbox: "b", Port: 1})
		old.Release()
		time.Sleep(30 * time.Second)
		young.Release()
		time.Sleep(30*time.Second + time.Millisecond)
		synctest.Wait()
		if p.idle != 1 || old.state != stateClosed || p.stats.discards[discardIdle].Get() != 1 {
			t.Errorf("after a minute: idle %d, the old one %d, want 1, closed", p.idle, old.state)
		}
		checkPool(t, p)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run() = %v", err)
		}
		if p.idle != 0 {
			t.Errorf("idle = %d after Run, want 0", p.idle)
		}
		mustGet(t, p, Target{Sandbox: "a", Port: 1}).Release()
		if p.idle != 0 {
			t.Error("a stopped pool kept a connection")
		}
		checkPool(t, p)
	})
}

func TestPoolCountsDialErrors(t *testing.T) {
	p, d := newPairPool(t, PoolOptions{})
	for _, err := range []error{&VerdictError{PortClosed}, fmt.Errorf("dial: %w", &VerdictError{Busy}), io.ErrUnexpectedEOF} {
		d.err = err
		if _, got := p.Get(t.Context(), Target{Sandbox: "a", Port: 1}); !errors.Is(got, err) {
			t.Errorf("Get() = %v, want %v", got, err)
		}
	}
	if p.stats.verdicts[PortClosed].Get() != 1 || p.stats.verdicts[Busy].Get() != 1 || p.stats.dialErrors.Get() != 1 {
		t.Error("the dial errors were not counted by kind")
	}
	checkPool(t, p)
	if len(p.buckets) != 0 {
		t.Error("failed dials left a bucket")
	}
}

func TestPoolRace(t *testing.T) {
	p, _ := newPairPool(t, PoolOptions{MaxIdle: 8, MaxIdlePerPort: 3})
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := range 300 {
				c := mustGet(t, p, Target{Sandbox: "a", Generation: uint64(i % 2), Port: uint16(i % 3)})
				switch {
				case i%17 == 0:
					c.Discard()
				case i%29 == worker:
					p.Forget("a", uint64(i%2))
					c.Release()
				case i%13 == 0:
					c.Release()
					p.reap(time.Now())
				default:
					c.Release()
				}
			}
		})
	}
	wg.Wait()
	checkPool(t, p)
}
