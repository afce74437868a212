package link

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// PoolOptions are a pool's settings; the zero value works.
type PoolOptions struct {
	// MaxIdle bounds idle connections in total; zero means 8192. One more closes the one that has been idle for longest.
	MaxIdle int

	// MaxIdlePerPort bounds idle connections to one port of one sandbox; zero means 128.
	MaxIdlePerPort int

	// IdleTimeout closes a connection unused for this long; zero means 30s. Each idle one costs the node two sockets. It need
	// not be below the guest's keep-alive: the guest's end of stream is here before the next request in all but the
	// round trip's race, and that is what Conn.Reused is for. There is no limit to a connection's age.
	IdleTimeout time.Duration

	// ReapInterval is how often idle connections are looked at; zero means 2s. It bounds how long a connection that the guest
	// has closed holds its descriptors.
	ReapInterval time.Duration

	Metrics *metrics.Set // nil: a private one
}

// Pool keeps idle link connections by (sandbox, generation, port), so that a connection never meets another sandbox, nor
// another life of the same one.
type Pool struct {
	// Fixed after NewPool.
	dial  DialFunc
	opts  PoolOptions
	stats *poolMetrics

	mu      sync.Mutex // guards the fields below and parts of bucket and Conn; never held across a dial or a close
	buckets map[bucketKey]*bucket
	lives   map[lifecycle]*bucket // the first of the lifecycle's buckets
	newest  *Conn
	oldest  *Conn
	idle    int
	stopped bool
}

type bucketKey struct {
	lifecycle
	port uint16
}

// bucket is the connections of one key. It exists while there is any, so that a busy key does not make one per request.
type bucket struct {
	key        bucketKey
	top        *Conn // idle, last released first: the warmest path, and the others get to grow old
	idle       int
	refs       int  // idle ones, those in use, and dials under way
	forgotten  bool // nothing comes back here
	next, prev *bucket
}

// NewPool returns a pool that opens what it lacks with dial.
func NewPool(dial DialFunc, opts PoolOptions) *Pool {
	setDefault(&opts.MaxIdle, 8192)
	setDefault(&opts.MaxIdlePerPort, 128)
	setDefault(&opts.IdleTimeout, 30*time.Second)
	setDefault(&opts.ReapInterval, 2*time.Second)
	return &Pool{
		dial:    dial,
		opts:    opts,
		stats:   newPoolMetrics(opts.Metrics),
		buckets: make(map[bucketKey]*bucket),
		lives:   make(map[lifecycle]*bucket),
	}
}

// Get returns a connection to t: an idle one that is alive, or a fresh one.
func (p *Pool) Get(ctx context.Context, t Target) (*Conn, error) {
	key := bucketKey{lifecycle{t.Sandbox, t.Generation}, t.Port}
	for {
		c := p.take(key)
		if c == nil {
			return p.GetFresh(ctx, t)
		}
		if c.checkAlive() {
			c.reused = true
			p.stats.hits.Inc()
			return c, nil
		}
		p.drop(c, c.health)
	}
}

// GetFresh returns a new connection to t. It is for a request whose reused connection turned out to be closed.
func (p *Pool) GetFresh(ctx context.Context, t Target) (*Conn, error) {
	b := p.acquireBucket(bucketKey{lifecycle{t.Sandbox, t.Generation}, t.Port})
	p.stats.misses.Inc()
	nc, err := p.dial(ctx, t)
	if err != nil {
		p.releaseBucket(b)
		if v, ok := errors.AsType[*VerdictError](err); ok && v.Verdict.valid() {
			p.stats.verdicts[v.Verdict].Inc()
			return nil, err
		}
		p.stats.dialErrors.Inc()
		return nil, err
	}
	return newConn(p, b, t, nc), nil
}

// Wake asks the node of t to wake its sandbox and waits until it runs, which may take a minute. The route that led here is then out
// of date. The error is a *VerdictError when the node said why not, and anything else means that it said nothing.
func (p *Pool) Wake(ctx context.Context, t Target) error {
	t.Wake = true
	nc, err := p.dial(ctx, t)
	if err == nil {
		resetConn(nc) // it runs, if somebody connects to it
		return nil
	}
	if v, ok := errors.AsType[*VerdictError](err); ok && v.Verdict == WrongGeneration {
		return nil
	}
	return err
}

// Forget closes the idle connections of a lifecycle, and those in use are not pooled again.
func (p *Pool) Forget(sandbox string, generation uint64) {
	var gone []*Conn
	p.mu.Lock()
	for b := p.lives[lifecycle{sandbox, generation}]; b != nil; {
		next := b.next
		for b.top != nil {
			gone = append(gone, p.closeIdleLocked(b.top))
		}
		p.unlinkLocked(b)
		b.forgotten = true
		b = next
	}
	p.mu.Unlock()
	p.shutAll(gone, discardForgot)
}

// Run closes idle connections that are too old or no longer alive. When ctx ends it closes them all, and from then on
// none is kept.
func (p *Pool) Run(ctx context.Context) error {
	ticker := time.NewTicker(p.opts.ReapInterval)
	defer ticker.Stop()
	for {
		select {
		case now := <-ticker.C:
			p.reap(now)
		case <-ctx.Done():
			p.stop()
			return nil
		}
	}
}

func (p *Pool) stop() {
	var gone []*Conn
	p.mu.Lock()
	p.stopped = true
	for p.oldest != nil {
		gone = append(gone, p.closeIdleLocked(p.oldest))
	}
	p.mu.Unlock()
	p.shutAll(gone, discardForgot)
}

// reapBatch bounds how many sockets are looked at under the lock at a time: some 20 us.
const reapBatch = 64

func (p *Pool) reap(now time.Time) {
	p.mu.Lock()
	c := p.oldest
	p.mu.Unlock()
	for c != nil {
		c = p.reapFrom(c, now)
	}
}

// reapFrom looks at a batch from c on, towards the newer ones, and returns where to go on.
func (p *Pool) reapFrom(c *Conn, now time.Time) *Conn {
	var gone [discardReasons][]*Conn
	p.mu.Lock()
	for range reapBatch {
		if c == nil || c.state != stateIdle { // taken between two batches: the rest waits for the next reap
			c = nil
			break
		}
		next := c.newer
		switch {
		case now.Sub(c.since) >= p.opts.IdleTimeout:
			gone[discardIdle] = append(gone[discardIdle], p.closeIdleLocked(c))
		case !c.checkAlive():
			gone[c.health] = append(gone[c.health], p.closeIdleLocked(c))
		}
		c = next
	}
	p.mu.Unlock()
	for reason, conns := range gone {
		p.shutAll(conns, discardReason(reason))
	}
	return c
}

// take returns the idle connection of key that was released last, now in use, or nil.
func (p *Pool) take(key bucketKey) *Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.buckets[key]
	if b == nil || b.top == nil {
		return nil
	}
	c := b.top
	p.removeIdleLocked(c)
	c.state = stateUsed
	return c
}

// release puts c on top of its bucket, or closes it when it may not be kept.
func (p *Pool) release(c *Conn) {
	if c.raw == nil || !canPeek || c.halfDone {
		p.drop(c, discardCaller)
		return
	}
	now := time.Now()
	p.mu.Lock()
	if c.state == stateClosed {
		p.mu.Unlock()
		return
	}
	p.wantUsedLocked(c)
	if p.stopped || c.bucket.forgotten {
		p.mu.Unlock()
		p.drop(c, discardForgot)
		return
	}
	if c.bucket.idle >= p.opts.MaxIdlePerPort {
		p.mu.Unlock()
		p.drop(c, discardFull) // the others of its bucket are no worse
		return
	}
	var evicted *Conn
	if p.idle >= p.opts.MaxIdle {
		evicted = p.closeIdleLocked(p.oldest)
	}
	c.since = now
	p.addIdleLocked(c)
	p.mu.Unlock()
	if evicted != nil {
		p.stats.discards[discardFull].Inc()
		evicted.shut()
	}
}

// drop closes a connection in use. A closed one stays closed, as with any net.Conn.
func (p *Pool) drop(c *Conn, reason discardReason) {
	p.mu.Lock()
	if c.state == stateClosed {
		p.mu.Unlock()
		return
	}
	p.wantUsedLocked(c)
	c.state = stateClosed
	p.unrefLocked(c.bucket)
	p.mu.Unlock()
	p.stats.discards[reason].Inc()
	c.shut()
}

// wantUsedLocked stops whoever gives a connection back twice, before two requests share it.
func (p *Pool) wantUsedLocked(c *Conn) {
	if c.state != stateUsed {
		p.mu.Unlock()
		panic("BUG: link connection released twice")
	}
}

func (p *Pool) shutAll(conns []*Conn, reason discardReason) {
	p.stats.discards[reason].Add(len(conns))
	for _, c := range conns {
		c.shut()
	}
}

func (p *Pool) acquireBucket(key bucketKey) *bucket {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.buckets[key]
	if b == nil {
		b = &bucket{key: key, next: p.lives[key.lifecycle]}
		if b.next != nil {
			b.next.prev = b
		}
		p.lives[key.lifecycle] = b
		p.buckets[key] = b
	}
	b.refs++
	return b
}

func (p *Pool) releaseBucket(b *bucket) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unrefLocked(b)
}

func (p *Pool) unrefLocked(b *bucket) {
	b.refs--
	if b.refs == 0 && !b.forgotten {
		p.unlinkLocked(b)
	}
}

// unlinkLocked takes b out of the maps.
func (p *Pool) unlinkLocked(b *bucket) {
	if p.buckets[b.key] != b {
		return // Forget was here, and then a closed connection of its was the last
	}
	delete(p.buckets, b.key)
	switch {
	case b.prev != nil:
		b.prev.next = b.next
	case b.next != nil:
		p.lives[b.key.lifecycle] = b.next
	default:
		delete(p.lives, b.key.lifecycle)
	}
	if b.next != nil {
		b.next.prev = b.prev
	}
	b.next, b.prev = nil, nil
}

// closeIdleLocked takes an idle connection out of the pool for good; the caller shuts it outside the lock.
func (p *Pool) closeIdleLocked(c *Conn) *Conn {
	p.removeIdleLocked(c)
	c.state = stateClosed
	p.unrefLocked(c.bucket)
	return c
}

func (p *Pool) addIdleLocked(c *Conn) {
	c.state = stateIdle
	c.older, c.newer = p.newest, nil
	if p.newest != nil {
		p.newest.newer = c
	} else {
		p.oldest = c
	}
	p.newest = c

	b := c.bucket
	c.below, c.above = b.top, nil
	if b.top != nil {
		b.top.above = c
	}
	b.top = c
	b.idle++
	p.idle++
	p.stats.idle.Inc()
}

func (p *Pool) removeIdleLocked(c *Conn) {
	if c.newer != nil {
		c.newer.older = c.older
	} else {
		p.newest = c.older
	}
	if c.older != nil {
		c.older.newer = c.newer
	} else {
		p.oldest = c.newer
	}

	b := c.bucket
	if c.above != nil {
		c.above.below = c.below
	} else {
		b.top = c.below
	}
	if c.below != nil {
		c.below.above = c.above
	}
	c.newer, c.older, c.above, c.below = nil, nil, nil, nil
	b.idle--
	p.idle--
	p.stats.idle.Dec()
}
