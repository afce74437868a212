package link

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// ways are the two ways to a node: over the network, and by a function call.
func (f *fixture) ways() map[string]*Pool {
	return map[string]*Pool{"network": NewPool(f.dialer.Dial, PoolOptions{}), "direct": NewPool(f.server.Direct(), PoolOptions{})}
}

// What a node can answer to a wake. Only a dial that is marked reaches the Waker, and none reaches Open.
func TestWakeVerdicts(t *testing.T) {
	tests := []struct {
		name   string
		answer error
		want   Verdict // zero: it runs
	}{
		{"woken", nil, 0},
		{"woken by somebody else", fmt.Errorf("wake: %w", &VerdictError{WrongGeneration}), 0},
		{"not to be woken", &VerdictError{NotHere}, NotHere},
		{"not now", &VerdictError{Busy}, Busy},
		{"an error that says there is none", &VerdictError{Open}, Refused},
		{"a failure", errors.New("disk on fire"), Refused},
	}
	f := start(t, echo, ServerOptions{})
	for _, tt := range tests {
		for way, pool := range f.ways() {
			var got lifecycle
			f.node.onWake(func(_ context.Context, sandbox string, generation uint64) error {
				got = lifecycle{sandbox, generation}
				return tt.answer
			})
			err := pool.Wake(t.Context(), f.target)
			if v, _ := errors.AsType[*VerdictError](err); (tt.want == 0) != (err == nil) || v != nil && v.Verdict != tt.want {
				t.Errorf("%s, %s: %v, want verdict %v", tt.name, way, err, tt.want)
			}
			if got != (lifecycle{"sb", 7}) {
				t.Errorf("%s, %s: the waker was asked for %v", tt.name, way, got)
			}
		}
	}
	if f.node.opens != 0 {
		t.Errorf("%d wakes opened connections", f.node.opens)
	}
	for v, want := range map[Verdict]uint64{WrongGeneration: 4, NotHere: 2, Busy: 2, Refused: 4} {
		if got := f.server.stats.wakes[v].Get(); got != want {
			t.Errorf("%d wakes counted as %s, want %d", got, v, want)
		}
	}
	f.node.onWake(func(context.Context, string, uint64) error {
		t.Error("a dial that was not marked woke")
		return nil
	})
	mustEcho(t, f.dial(t), "hello")
}

// A node whose machine cannot pause has nothing to wake.
func TestBackendThatWakesNothing(t *testing.T) {
	s := NewServer(struct{ Backend }{&fakeNode{}}, ServerOptions{Key: testKey})
	err := NewPool(s.Direct(), PoolOptions{}).Wake(t.Context(), Target{Sandbox: "sb", Generation: 7, Port: 80})
	if v, ok := errors.AsType[*VerdictError](err); !ok || v.Verdict != NotHere {
		t.Errorf("wake = %v, want not here", err)
	}
}

// A wake has its own time on both sides: those of a dial, which must not hang for a minute, are over at once here.
func TestWakeOutlastsDials(t *testing.T) {
	f := start(t, echo, ServerOptions{OpenTimeout: time.Nanosecond})
	f.dialer.Timeout = time.Nanosecond
	f.node.onWake(func(ctx context.Context, _ string, _ uint64) error {
		if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) < 30*time.Second {
			t.Errorf("a wake has until %v", deadline)
		}
		return ctx.Err()
	})
	for way, pool := range f.ways() {
		if err := pool.Wake(t.Context(), f.target); err != nil {
			t.Errorf("%s: %v", way, err)
		}
		if c, err := pool.Get(t.Context(), f.target); err == nil {
			t.Errorf("%s: an ordinary dial got %v", way, c)
		}
	}
}

// A Waker that does not come back in time is busy, and the next wake may find the sandbox awake.
func TestWakeThatTakesTooLongIsBusy(t *testing.T) {
	f := start(t, echo, ServerOptions{WakeTimeout: time.Millisecond})
	f.node.onWake(func(ctx context.Context, _ string, _ uint64) error {
		<-ctx.Done()
		return ctx.Err()
	})
	for way, pool := range f.ways() {
		if v, ok := errors.AsType[*VerdictError](pool.Wake(t.Context(), f.target)); !ok || v.Verdict != Busy {
			t.Errorf("%s: %v, want busy", way, v)
		}
	}
}

// Wakes that are waited for are bounded by themselves: they take no place of a connection's, nor connections theirs. The reset that
// comes with a pause is not about them.
func TestWakesAreBoundedAndOutliveTheReset(t *testing.T) {
	f := start(t, echo, ServerOptions{MaxWakes: 2, MaxConns: 1, MaxConnsPerSandbox: 1})
	up, asked := make(chan struct{}), make(chan struct{})
	f.node.onWake(func(ctx context.Context, _ string, _ uint64) error {
		asked <- struct{}{}
		select {
		case <-up:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	woken := make(chan error)
	ways := f.ways()
	for _, pool := range ways {
		go func() { woken <- pool.Wake(t.Context(), f.target) }()
		<-asked
	}
	for way, pool := range ways {
		if v, ok := errors.AsType[*VerdictError](pool.Wake(t.Context(), f.target)); !ok || v.Verdict != Busy {
			t.Errorf("%s: one wake too many: %v, want busy", way, v)
		}
	}
	c := f.dial(t)
	mustEcho(t, c, "a connection finds its place")
	f.server.Reset("sb", 7)
	_, err := c.Read(make([]byte, 1))
	wantReset(t, "connection of the lifecycle", err)
	close(up)
	for range ways {
		if err := <-woken; err != nil {
			t.Errorf("a wake that was waited for: %v", err)
		}
	}
	if got := f.server.stats.waking.Get(); got != 0 {
		t.Errorf("%v wakes are counted as waited for", got)
	}
}

// The end of the server ends the wakes that are waited for, and the edge hears that it may come back, or nothing: not that the
// sandbox is gone, nor that it runs.
func TestEndOfServerEndsWakes(t *testing.T) {
	node := &fakeNode{}
	s := NewServer(node, ServerOptions{Key: testKey})
	ln := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	node.onWake(func(ctx context.Context, _ string, _ uint64) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	})
	err := NewPool((&Dialer{Key: testKey}).Dial, PoolOptions{}).
		Wake(t.Context(), Target{Addr: ln.Addr().String(), Sandbox: "sb", Generation: 7, Port: 80})
	if v, ok := errors.AsType[*VerdictError](err); ok && v.Verdict != Busy || !ok && errs.CodeOf(err) != errs.Unavailable {
		t.Errorf("wake = %v, want busy or unavailable", err)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve() = %v", err)
	}
}
