package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/link"
)

const (
	// mostWakes is how often one request has its sandbox woken: a second time because it may have been paused again before the
	// request got there. More would mean that node and catalogue do not agree.
	mostWakes = 2

	// wakePause is how long a wake that failed is not tried again. Retry-After says the same.
	wakePause = time.Second
)

// errAsleep is what serveSandbox answers when the client may pass and the sandbox has to be woken first.
var errAsleep = errors.New("the sandbox is paused")

// wakes are the lifecycles that this edge is having woken.
type wakes struct {
	most, mostPerClient int           // fixed after init
	pause               time.Duration // likewise

	mu       sync.Mutex         // guards the fields below
	flights  map[life]*wake     // under way, or failed a moment ago
	active   int                // under way
	byClient map[netip.Addr]int // of flights, by who began them
}

// wake is one dial that asks a node to wake a sandbox. Any number of requests wait for it.
type wake struct {
	target link.Target // of the request that began it

	// Written before done is closed.
	reason Reason // reasonNone: it runs, and its route has to be read anew
	err    error
	done   chan struct{}
}

func (w *wakes) init(limits *Limits) {
	w.most, w.mostPerClient, w.pause = limits.Wakes, limits.WakesPerClient, wakePause
	w.flights, w.byClient = make(map[life]*wake), make(map[netip.Addr]int)
}

// join returns the wake that is under way for the target's lifecycle, or a new one that the caller has to see to, or says why
// there can be none. Who joins one pays nothing: it is there anyway.
func (w *wakes) join(t link.Target) (f *wake, begun bool, reason Reason) {
	of, client := life{t.Sandbox, t.Generation}, clientKey(t.Client.Addr())
	w.mu.Lock()
	defer w.mu.Unlock()
	if f := w.flights[of]; f != nil {
		return f, false, reasonNone
	}
	if w.byClient[client] >= w.mostPerClient {
		return nil, false, ReasonWakeClientCap
	}
	if w.active >= w.most {
		return nil, false, ReasonWakeTotalCap
	}
	f = &wake{target: t, done: make(chan struct{})}
	w.flights[of] = f
	w.active++
	w.byClient[client]++
	return f, true, reasonNone
}

// end tells everybody who waits what came of it. What failed stays there for a moment, and whoever comes meanwhile is told the same: a
// sandbox that cannot be woken must not cost its node an attempt for every request. It counts against its client, and no more against
// everybody: a few clients with sandboxes that cannot be woken would be enough to let none of the others' be.
func (w *wakes) end(f *wake, reason Reason, err error) {
	f.reason, f.err = reason, err
	w.mu.Lock()
	w.active--
	w.mu.Unlock()
	if reason == reasonNone || reason == ReasonNotFound {
		w.remove(f) // before anybody is told: the next one has to find out anew
	} else {
		time.AfterFunc(w.pause, func() { w.remove(f) })
	}
	close(f.done)
}

func (w *wakes) remove(f *wake) {
	client := clientKey(f.target.Client.Addr())
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.flights, life{f.target.Sandbox, f.target.Generation})
	if w.byClient[client]--; w.byClient[client] == 0 {
		delete(w.byClient, client)
	}
}

// wake has the sandbox of x woken and waits until it runs; its route has then to be read anew. Nothing of the request has been
// forwarded by then and nothing of its body read. A client that goes away ends the waiting, and the wake goes on: it was allowed to
// ask for it, and others may have joined.
func (h *Handler) wake(c *clientConn, x *exchange) error {
	of := life{x.target.Sandbox, x.target.Generation}
	if !h.load.acquire(of) { // a request that waits holds what one under way holds
		return &fault{reason: ReasonSandboxCap}
	}
	defer h.load.release(of)
	f, begun, reason := h.wakes.join(x.target)
	if reason != reasonNone {
		return &fault{reason: reason}
	}
	if begun {
		c.srv.jobs.Go(func() { c.srv.runWake(f) })
	}
	h.stats.waiting.Inc()
	defer h.stats.waiting.Dec()
	select {
	case <-f.done:
	case <-c.ctx.Done():
		return &fault{reason: ReasonClientGone, err: c.ctx.Err()}
	}
	if f.reason != reasonNone {
		return &fault{reason: f.reason, err: f.err}
	}
	return nil
}

// runWake is the goroutine of one wake. It ends with the server, not with the request that began it.
func (s *server) runWake(f *wake) {
	h := s.h
	began := time.Now()
	reason, err := ReasonPanic, error(nil)
	defer func() {
		if p := recover(); p != nil {
			h.stats.panics.Inc()
			h.log.Error("panic", zap.Any("error", p), zap.ByteString("stack", debug.Stack()))
		}
		h.stats.woke(reason, time.Since(began))
		h.wakes.end(f, reason, err)
	}()
	ctx, cancel := context.WithTimeout(s.ctx, h.limits.Wake)
	defer cancel()
	err = h.link.Wake(ctx, f.target)
	if ctx.Err() != nil && err != nil {
		err = fmt.Errorf("%w: %w", ctx.Err(), err)
	}
	outcome := wakeReason(ctx, err)
	if outcome == reasonNone || outcome == ReasonNotFound {
		// What led here is out of date. The store is read once for all who wait, and they find the answer in memory; that it may
		// have failed is theirs to find out.
		h.routes.Forget(f.target.Sandbox, f.target.Generation)
		_, _ = h.routes.Resolve(ctx, []byte(f.target.Sandbox), f.target.Client.Addr())
	}
	if ce := h.log.Check(zap.DebugLevel, "wake"); ce != nil {
		ce.Write(zap.String("sandbox", f.target.Sandbox), zap.Stringer("client", f.target.Client), zap.Stringer("code", outcome),
			zap.Duration("took", time.Since(began)), zap.Error(err))
	}
	reason = outcome
}

// wakeReason says what those who wait are told of a wake. That it took too long, or was broken off by the end of this server,
// is no sign that it failed: the sandbox may be about to run.
func wakeReason(ctx context.Context, err error) Reason {
	v, answered := errors.AsType[*link.VerdictError](err)
	switch {
	case err == nil:
		return reasonNone
	case answered && v.Verdict == link.NotHere:
		return ReasonNotFound
	case answered && v.Verdict == link.Busy, ctx.Err() != nil:
		return ReasonTransitioning
	case answered:
		return ReasonNodeRefused
	default:
		return ReasonDialFailed
	}
}
