package routing

import (
	"context"
	"sync"
	"time"
)

// MemoryStore is a Store in this process: for `sluice dev`, and for tests that want the clock of a synctest bubble.
type MemoryStore struct {
	mu       sync.Mutex
	routes   map[string]memoryRoute
	nodes    map[string]memoryNode
	watchers map[*memoryWatcher]struct{}
}

type memoryRoute struct {
	route  Route
	gone   bool      // a tombstone
	expiry time.Time // zero means never
}

type memoryNode struct {
	node   Node
	expiry time.Time
}

// memoryWatcher is one Watch. Writers fill the queue under the store's lock and never wait: one that is full turns into Lost.
type memoryWatcher struct {
	queue chan Event
	lost  chan struct{} // capacity 1
}

// NewMemoryStore returns an empty store.
func NewMemoryStore() *MemoryStore {
	return &MemoryStore{
		routes:   make(map[string]memoryRoute),
		nodes:    make(map[string]memoryNode),
		watchers: make(map[*memoryWatcher]struct{}),
	}
}

// PutRoute implements Store.
func (s *MemoryStore) PutRoute(ctx context.Context, r Route) error {
	if err := r.validate(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return unavailable("put route", err)
	}
	stored := memoryRoute{route: canonical(r), expiry: routeExpiry(r)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.liveLocked(r.Sandbox); ok && old.route.Generation > r.Generation {
		return errLowerGeneration(r)
	}
	s.routes[r.Sandbox] = stored
	s.publishLocked(Event{Kind: RouteChanged, Key: r.Sandbox})
	return nil
}

// DeleteRoute implements Store.
func (s *MemoryStore) DeleteRoute(ctx context.Context, sandbox string, generation uint64) error {
	if err := ctx.Err(); err != nil {
		return unavailable("delete route", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, ok := s.liveLocked(sandbox)
	if !ok || old.gone || old.route.Generation != generation {
		return nil
	}
	tombstone := memoryRoute{route: Route{Sandbox: sandbox, Generation: generation}, gone: true, expiry: time.Now().Add(TombstoneFor)}
	s.routes[sandbox] = tombstone
	s.publishLocked(Event{Kind: RouteChanged, Key: sandbox})
	return nil
}

// Route implements Store.
func (s *MemoryStore) Route(ctx context.Context, sandbox string) (Route, error) {
	if err := ctx.Err(); err != nil {
		return Route{}, unavailable("read route", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	stored, ok := s.liveLocked(sandbox)
	if !ok || stored.gone {
		return Route{}, errNoRoute(sandbox)
	}
	return canonical(stored.route), nil
}

// RoutesOf implements Store. It also drops what has expired, which nothing else would ask for again.
func (s *MemoryStore) RoutesOf(ctx context.Context, node string) ([]Route, error) {
	if err := ctx.Err(); err != nil {
		return nil, unavailable("list routes", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var routes []Route
	for sandbox := range s.routes {
		if stored, ok := s.liveLocked(sandbox); ok && !stored.gone && stored.route.Node == node {
			routes = append(routes, canonical(stored.route))
		}
	}
	return routes, nil
}

// PutNode implements Store.
func (s *MemoryStore) PutNode(ctx context.Context, n Node, ttl time.Duration) error {
	if err := checkLease(n, ttl); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return unavailable("put node", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, had := s.liveNodeLocked(n.ID)
	s.nodes[n.ID] = memoryNode{node: n, expiry: time.Now().Add(ttl)}
	if !had || old.LinkAddr != n.LinkAddr || old.APIAddr != n.APIAddr || old.Draining != n.Draining {
		s.publishLocked(Event{Kind: NodeChanged, Key: n.ID})
	}
	return nil
}

// DeleteNode implements Store.
func (s *MemoryStore) DeleteNode(ctx context.Context, id string) error {
	if err := ctx.Err(); err != nil {
		return unavailable("delete node", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, had := s.liveNodeLocked(id); had {
		delete(s.nodes, id)
		s.publishLocked(Event{Kind: NodeChanged, Key: id})
	}
	return nil
}

// Node implements Store.
func (s *MemoryStore) Node(ctx context.Context, id string) (Node, error) {
	if err := ctx.Err(); err != nil {
		return Node{}, unavailable("read node", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.liveNodeLocked(id)
	if !ok {
		return Node{}, errNoNode(id)
	}
	return n, nil
}

// Nodes implements Store.
func (s *MemoryStore) Nodes(ctx context.Context) ([]Node, error) {
	if err := ctx.Err(); err != nil {
		return nil, unavailable("list nodes", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var nodes []Node
	for id := range s.nodes {
		if n, ok := s.liveNodeLocked(id); ok {
			nodes = append(nodes, n)
		}
	}
	return nodes, nil
}

// Watch implements Store. A store in the same process has no silence, but its heartbeats are the same: the Table counts on them.
func (s *MemoryStore) Watch(ctx context.Context, emit func(Event)) error {
	w := &memoryWatcher{queue: make(chan Event, 1024), lost: make(chan struct{}, 1)}
	w.lost <- struct{}{}
	s.mu.Lock()
	s.watchers[w] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watchers, w)
		s.mu.Unlock()
	}()
	beats := time.NewTicker(HeartbeatInterval)
	defer beats.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.lost:
			emit(Event{Kind: Lost})
			s.beat(w)
		case e := <-w.queue:
			emit(e)
		case <-beats.C:
			s.beat(w)
		}
	}
}

// beat queues a heartbeat behind everything published so far, which is what makes it a proof.
func (s *MemoryStore) beat(w *memoryWatcher) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.tryQueue(Event{Kind: Heartbeat, At: time.Now()})
}

func (s *MemoryStore) publishLocked(e Event) {
	for w := range s.watchers {
		w.tryQueue(e)
	}
}

func (w *memoryWatcher) tryQueue(e Event) {
	select {
	case w.queue <- e:
		return
	default:
	}
	select {
	case w.lost <- struct{}{}:
	default: // it is about to learn that anyway
	}
}

func (s *MemoryStore) liveLocked(sandbox string) (memoryRoute, bool) {
	stored, ok := s.routes[sandbox]
	if ok && !stored.expiry.IsZero() && !time.Now().Before(stored.expiry) {
		delete(s.routes, sandbox)
		return memoryRoute{}, false
	}
	return stored, ok
}

func (s *MemoryStore) liveNodeLocked(id string) (Node, bool) {
	stored, ok := s.nodes[id]
	if ok && !time.Now().Before(stored.expiry) {
		delete(s.nodes, id)
		return Node{}, false
	}
	return stored.node, ok
}
