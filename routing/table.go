package routing

import (
	"context"
	"errors"
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/VictoriaMetrics/metrics"
	"github.com/hashicorp/golang-lru/v2/simplelru"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	// freshFor is how long a route is served from memory after the last proof that it is current: the read that brought
	// it, or a later heartbeat. It equals SilenceLimit, so a quiet subscription is noticed here no later than there.
	freshFor = SilenceLimit

	// maxAge bounds what heartbeats may prove: a Cluster whose servers have lost each other can deliver them and not the
	// change. After half of it a used route is read again in the background, after all of it before it is served.
	maxAge = time.Minute

	// revalidateWait is how long a request for a known but suspect route waits for the store before it takes what is known.
	revalidateWait = 250 * time.Millisecond

	// probeInterval is how often a store that failed is tried again on behalf of known routes.
	probeInterval = time.Second

	// maxLoads bounds the reads in flight: a Redis that hangs must not collect a goroutine per request.
	maxLoads = 256

	shardCount = 64 // a power of two
)

// TableOptions may be left zero.
type TableOptions struct {
	// MaxRoutes bounds the routes kept; zero means 65536, about 30 MB.
	MaxRoutes int
	// MaxAbsent bounds the names kept as absent, apart from routes so that a scanner cannot evict them; zero means 16384.
	MaxAbsent int
	// AbsentFor is how long a name stays absent without being asked for again; zero means 1s. A route that is
	// written meanwhile is seen at once through the subscription; this is the bound without it.
	AbsentFor time.Duration
	// StaleLimit is how long known routes and nodes are served after the last proof that they are current, while the store does
	// not answer; zero means 5m. It may be long because the link checks every connection: a node that no longer
	// has this lifecycle of the sandbox says so.
	StaleLimit time.Duration
	// LoadTimeout is how long a request for an unknown name waits for the store; zero means 1s.
	LoadTimeout time.Duration
	// AbsentPerSecond and AbsentBurst limit how many absent names one client (an IPv4 address or an IPv6 /64) may ask the
	// store about; zero means 20 and 100. Names that exist cost nothing, so that a busy client is never limited.
	AbsentPerSecond float64
	AbsentBurst     int
	// MaxClients bounds the clients remembered for that; zero means 16384.
	MaxClients int

	Log     *zap.Logger
	Metrics *metrics.Set
}

func (o *TableOptions) setDefaults() {
	setDefault(&o.MaxRoutes, 65536)
	setDefault(&o.MaxAbsent, 16384)
	setDefault(&o.AbsentFor, time.Second)
	setDefault(&o.StaleLimit, 5*time.Minute)
	setDefault(&o.LoadTimeout, time.Second)
	setDefault(&o.AbsentPerSecond, 20)
	setDefault(&o.AbsentBurst, 100)
	setDefault(&o.MaxClients, 16384)
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Metrics == nil {
		o.Metrics = metrics.NewSet()
	}
}

func setDefault[T comparable](field *T, value T) {
	if *field == *new(T) {
		*field = value
	}
}

// Target is where a request goes: a route and the lease of its node. It is immutable, replaced and never edited, so it may be
// kept for as long as the request lasts.
type Target struct {
	Route *Route
	Node  *Node
}

// Table is the cache of routes that every request asks. It reads the Store when it must and never writes it.
type Table struct {
	// Fixed after NewTable.
	store   Store
	opts    TableOptions
	log     *zap.Logger
	seed    maphash.Seed
	base    time.Time // durations below count from here, by the monotonic clock
	shards  [shardCount]shard
	nodes   nodeCache
	clients *limiter
	loads   chan struct{} // a slot per read in flight
	stats   tableStats

	// Replaced whole, by the watcher only; read without a lock.
	health atomic.Pointer[health]

	// When a store that failed may be tried again for routes that are known; zero while it answers.
	downUntil atomic.Int64
}

// health is what the subscription has proved so far. Epochs are separated by Lost events.
type health struct {
	epoch uint64
	beat  time.Duration    // the last heartbeat of this epoch was sent then; zero means none yet
	ended [8]time.Duration // the last heartbeats of the epochs before, the latest first
}

// shard is a part of the cache under one lock.
type shard struct {
	mu      sync.Mutex // guards the fields below; never held while the store is asked
	routes  *simplelru.LRU[string, *entry]
	absent  *simplelru.LRU[string, absence]
	flights map[string]*flight
}

// entry is a cached route. Only target changes after it was cached.
type entry struct {
	route    *Route
	epoch    uint64        // when the read was sent off
	loadedAt time.Duration // likewise: the route is at least as new as this
	target   atomic.Pointer[Target]
}

type absence struct {
	epoch uint64
	until time.Duration
}

// flight is one read of the store that any number of requests wait for.
type flight struct {
	epoch     uint64
	startedAt time.Duration
	overtaken bool // guarded by the shard's lock: a change arrived since, so the answer may be from before it

	// Written before done is closed.
	entry *entry
	err   error
	done  chan struct{}
}

var (
	errAbsent  = errs.New(errs.NotFound, "The sandbox was not found")
	errLimited = errs.New(errs.Exhausted, "too many requests for sandboxes that do not exist")
	errBusy    = errs.New(errs.Unavailable, "the route store does not keep up")
	errTimeout = errs.New(errs.Unavailable, "the route store does not answer")
)

// NewTable returns a Table that starts empty. It works at once; without Run it asks the store for everything older than three seconds.
func NewTable(store Store, opts TableOptions) *Table {
	opts.setDefaults()
	t := &Table{
		store:   store,
		opts:    opts,
		log:     opts.Log,
		seed:    maphash.MakeSeed(),
		base:    time.Now(),
		clients: newLimiter(opts.AbsentPerSecond, opts.AbsentBurst, opts.MaxClients),
		loads:   make(chan struct{}, maxLoads),
	}
	for i := range t.shards {
		t.shards[i] = shard{
			routes:  newLRU[string, *entry](opts.MaxRoutes / shardCount),
			absent:  newLRU[string, absence](opts.MaxAbsent / shardCount),
			flights: make(map[string]*flight),
		}
	}
	t.nodes.init(t)
	t.stats.init(opts.Metrics)
	t.health.Store(new(health))
	return t
}

// Run listens to the store and keeps the nodes' leases fresh until ctx ends.
func (t *Table) Run(ctx context.Context) error {
	var jobs sync.WaitGroup
	defer jobs.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	jobs.Go(func() { t.nodes.keepFresh(ctx) })
	return t.store.Watch(ctx, t.handle)
}

// handle applies one event. The watcher calls it one at a time, in the order of publication: a heartbeat is applied after every
// change that was published before it, and only so is it a proof.
func (t *Table) handle(e Event) {
	switch e.Kind {
	case RouteChanged:
		t.stats.changes.Inc()
		t.forget(e.Key, ^uint64(0))
	case NodeChanged:
		t.stats.changes.Inc()
		t.nodes.changed(e.Key)
	case Heartbeat:
		next := *t.health.Load()
		next.beat = max(next.beat, e.At.Sub(t.base))
		t.health.Store(&next)
	default:
		t.stats.losses.Inc()
		was := t.health.Load()
		next := &health{epoch: was.epoch + 1}
		next.ended[0] = was.beat
		copy(next.ended[1:], was.ended[:])
		t.health.Store(next)
		t.downUntil.Store(0) // the news may be that it is back
		t.nodes.lost(was.epoch > 0)
	}
}

// Resolve answers where the sandbox is, for a request of that client. A name that is known and proved current costs a look
// into memory and no allocation; an unknown one costs a read of the store, shared with whoever asks for it at the same time. It
// keeps neither argument. Errors: NotFound when the store says so; Unavailable when the store does not answer and the route is not
// known, or is ErrNodeLost; Exhausted when this client asks for too many names that do not exist; the context's when that ended.
func (t *Table) Resolve(ctx context.Context, sandbox []byte, client netip.Addr) (*Target, error) {
	clock := time.Now()
	now := clock.Sub(t.base)
	s := t.shard(sandbox)
	s.mu.Lock()
	e, known := s.routes.Get(peekString(sandbox))
	s.mu.Unlock()
	if !known {
		return t.resolveUnknown(ctx, s, sandbox, client, now)
	}
	if !t.fresh(e, now) || e.route.ended(clock) {
		return t.resolveSuspect(ctx, s, e, now)
	}
	if now-e.loadedAt > maxAge/2 && t.mayProbe(now) {
		t.fly(ctx, s, e.route.Sandbox, now)
	}
	t.stats.hits.Inc()
	return t.withNode(ctx, e, now)
}

// fresh tells whether the route may be served without asking.
func (t *Table) fresh(e *entry, now time.Duration) bool {
	h := t.health.Load()
	return e.epoch == h.epoch && now-max(e.loadedAt, h.beat) <= freshFor && now-e.loadedAt <= maxAge
}

// provedAt is when the route was last known to be current: when it was read, or when the last heartbeat of the epoch in which
// it was read was sent. A later epoch's heartbeats say nothing about what was missed between the two.
func (t *Table) provedAt(e *entry) time.Duration {
	h := t.health.Load()
	switch age := h.epoch - e.epoch; {
	case age == 0:
		return max(e.loadedAt, h.beat)
	case age <= uint64(len(h.ended)):
		return max(e.loadedAt, h.ended[age-1])
	}
	return e.loadedAt
}

// resolveUnknown asks the store, unless the name is known to be absent or the client asked for too many such names.
func (t *Table) resolveUnknown(ctx context.Context, s *shard, sandbox []byte, client netip.Addr, now time.Duration) (*Target, error) {
	if !validSandboxID(sandbox) {
		return nil, errAbsent
	}
	s.mu.Lock()
	gone, ok := s.absent.Get(peekString(sandbox))
	s.mu.Unlock()
	if ok && gone.epoch == t.health.Load().epoch && now < gone.until {
		t.stats.absent.Inc()
		return nil, errAbsent
	}
	name := string(sandbox)
	f := t.join(s, name)
	pays := f == nil // whoever waits with another costs the store nothing
	if pays {
		if !t.clients.take(client, now) {
			t.stats.limited.Inc()
			return nil, errLimited
		}
		f = t.fly(ctx, s, name, now)
	}
	e, err := t.await(ctx, f, t.opts.LoadTimeout)
	if pays && (err == nil || errs.CodeOf(err) == errs.Unavailable) {
		t.clients.giveBack(client) // but not to one who hung up: the store was asked all the same
	}
	if err != nil {
		t.stats.failed(err)
		return nil, err
	}
	t.stats.misses.Inc()
	return t.withNode(ctx, e, now)
}

// resolveSuspect asks the store again, and takes what is known when the store does not answer in time and the proof is not
// too old. The end time does not count then: whether the sandbox was extended is what we could not read, and its node knows.
func (t *Table) resolveSuspect(ctx context.Context, s *shard, e *entry, now time.Duration) (*Target, error) {
	id := e.route.Sandbox
	if !t.storeDown() {
		current, err := t.await(ctx, t.fly(ctx, s, id, now), revalidateWait)
		if err == nil {
			t.stats.misses.Inc()
			return t.withNode(ctx, current, now)
		}
		if errs.CodeOf(err) != errs.Unavailable || ctx.Err() != nil {
			t.stats.failed(err)
			return nil, err
		}
	} else if t.mayProbe(now) {
		t.fly(ctx, s, id, now)
	}
	s.mu.Lock()
	current, known := s.routes.Peek(id)
	s.mu.Unlock()
	if !known || now-t.provedAt(current) > t.opts.StaleLimit {
		t.stats.failed(errTimeout)
		return nil, errTimeout
	}
	t.stats.stale.Inc()
	return t.withNode(ctx, current, now)
}

// storeDown tells whether the last read failed.
func (t *Table) storeDown() bool { return t.downUntil.Load() != 0 }

// mayProbe tells whether a read for a route that is known is worth it now; while the store is down, one in a second is.
func (t *Table) mayProbe(now time.Duration) bool {
	until := t.downUntil.Load()
	return until == 0 || int64(now) >= until && t.downUntil.CompareAndSwap(until, int64(now+probeInterval))
}

// join returns the read in flight for a sandbox, or nil. One that was sent off before a loss is not worth waiting for.
func (t *Table) join(s *shard, sandbox string) *flight {
	epoch := t.health.Load().epoch
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flights[sandbox]; f != nil && f.epoch == epoch {
		return f
	}
	return nil
}

// fly returns the read in flight for a sandbox, or starts one. Nil means that too many are in flight.
func (t *Table) fly(ctx context.Context, s *shard, sandbox string, now time.Duration) *flight {
	epoch := t.health.Load().epoch
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flights[sandbox]; f != nil && f.epoch == epoch {
		return f
	}
	select {
	case t.loads <- struct{}{}:
	default:
		return nil
	}
	f := &flight{epoch: epoch, startedAt: now, done: make(chan struct{})}
	if old := s.flights[sandbox]; old != nil {
		old.overtaken = true
	}
	s.flights[sandbox] = f
	go t.load(context.WithoutCancel(ctx), s, sandbox, f) // it serves all who wait, so it does not end with the first
	return f
}

// await waits for a read for at most that long.
func (t *Table) await(ctx context.Context, f *flight, limit time.Duration) (*entry, error) {
	if f == nil {
		return nil, errBusy
	}
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	select {
	case <-f.done:
		return f.entry, f.err
	case <-timeout.C:
		t.markDown()
		return nil, errTimeout
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (t *Table) markDown() {
	t.downUntil.Store(int64(time.Since(t.base) + probeInterval))
}

// load reads one route and caches the answer, unless a change arrived while it was on its way: whether the answer is from
// before or after that change cannot be told, so the next request must ask again.
func (t *Table) load(ctx context.Context, s *shard, sandbox string, f *flight) {
	ctx, cancel := context.WithTimeout(ctx, t.opts.LoadTimeout)
	defer cancel()
	defer func() { <-t.loads }()
	defer close(f.done)
	t.stats.loads.Inc()
	route, err := t.store.Route(ctx, sandbox)
	now := time.Now()

	switch {
	case err == nil && !route.ended(now):
		f.entry = &entry{route: &route, epoch: f.epoch, loadedAt: f.startedAt}
	case err == nil, errs.CodeOf(err) == errs.NotFound:
		f.err = errAbsent
	default:
		f.err = err
	}
	if errs.CodeOf(err) == errs.Unavailable {
		t.stats.loadErrors.Inc()
		t.markDown()
	} else {
		t.downUntil.Store(0)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	if f.overtaken {
		return
	}
	delete(s.flights, sandbox)
	switch {
	case f.entry != nil:
		s.routes.Add(sandbox, f.entry)
		s.absent.Remove(sandbox)
	case errors.Is(f.err, errAbsent):
		s.routes.Remove(sandbox)
		s.absent.Add(sandbox, absence{epoch: f.epoch, until: now.Sub(t.base) + t.opts.AbsentFor})
	}
}

// withNode adds the node's lease to a route.
func (t *Table) withNode(ctx context.Context, e *entry, now time.Duration) (*Target, error) {
	node, err := t.nodes.resolve(ctx, e.route.Node, e.loadedAt, now)
	if err != nil {
		t.stats.failed(err)
		return nil, err
	}
	target := e.target.Load()
	if target == nil || target.Node != node {
		target = &Target{Route: e.route, Node: node}
		e.target.Store(target)
	}
	return target, nil
}

// Forget drops a route that the link found to be wrong, if it is still of that generation or an earlier one, so that the next
// Resolve reads the store.
func (t *Table) Forget(sandbox string, generation uint64) {
	t.stats.forgotten.Inc()
	t.forget(sandbox, generation)
}

func (t *Table) forget(sandbox string, generation uint64) {
	s := t.shard([]byte(sandbox))
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.routes.Peek(sandbox); ok && e.route.Generation <= generation {
		s.routes.Remove(sandbox)
	}
	s.absent.Remove(sandbox)
	if f := s.flights[sandbox]; f != nil {
		f.overtaken = true
		delete(s.flights, sandbox)
	}
}

// PickNode returns a live node that serves the API, in turn, and one that drains only when there is no other.
func (t *Table) PickNode(ctx context.Context) (*Node, error) {
	return t.nodes.pick(ctx, time.Since(t.base))
}

func (t *Table) shard(sandbox []byte) *shard {
	return &t.shards[maphash.Bytes(t.seed, sandbox)%shardCount]
}

// peekString reads bytes as a string for one look into a map, which keeps no key that it only compares with. The conversion
// would allocate for names beyond 32 bytes, and a scanner chooses how long its names are.
func peekString(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// tableStats are the Table's counters: one per way a Resolve can end, and what happened behind them.
type tableStats struct {
	hits, stale, misses, absent, limited, lost, unavailable *metrics.Counter

	loads, loadErrors, changes, losses, forgotten *metrics.Counter
}

func (s *tableStats) init(set *metrics.Set) {
	for result, counter := range map[string]**metrics.Counter{
		"hit": &s.hits, "stale": &s.stale, "miss": &s.misses, "absent": &s.absent,
		"limited": &s.limited, "node_lost": &s.lost, "unavailable": &s.unavailable,
	} {
		*counter = set.GetOrCreateCounter(`sluice_routing_resolves_total{result="` + result + `"}`)
	}
	s.loads = set.GetOrCreateCounter("sluice_routing_loads_total")
	s.loadErrors = set.GetOrCreateCounter("sluice_routing_load_errors_total")
	s.changes = set.GetOrCreateCounter("sluice_routing_changes_total")
	s.losses = set.GetOrCreateCounter("sluice_routing_losses_total")
	s.forgotten = set.GetOrCreateCounter("sluice_routing_forgotten_total")
}

func (s *tableStats) failed(err error) {
	switch {
	case errors.Is(err, ErrNodeLost):
		s.lost.Inc()
	case errs.CodeOf(err) == errs.NotFound:
		s.absent.Inc()
	default:
		s.unavailable.Inc()
	}
}
