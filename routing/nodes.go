package routing

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	// nodesInterval is how often all leases are read. Leases run out without a message, so they must be asked for; there are few.
	nodesInterval = time.Second

	// nodesFreshFor is how long a list of leases is taken for current: two reads of it may fail or be late.
	nodesFreshFor = 3 * time.Second

	// leaseGrace keeps nodes that were alive for this long after the subscription came back. While Redis was away nobody
	// could renew, so all leases ran out at once although no node died; each needs a renewal interval to say so.
	leaseGrace = 10 * time.Second

	// nodesPause keeps a hundred nodes that start together from causing a hundred reads.
	nodesPause = 50 * time.Millisecond
)

var errNoNodes = errs.New(errs.Unavailable, "no node is available")

// nodeCache holds the leases of all nodes.
type nodeCache struct {
	// Fixed after init.
	table *Table
	kick  chan struct{} // capacity 1: read again soon

	// Replaced whole, read without a lock.
	view atomic.Pointer[nodeView]

	turn atomic.Uint32 // of pick

	mu         sync.Mutex // guards the fields below
	flight     *nodeFlight
	graceUntil time.Duration
	changedIDs map[string]struct{} // since the last read: no grace for these, they said something themselves
}

// nodeView is the list of leases at one time.
type nodeView struct {
	asOf time.Duration // when the read was sent off
	byID map[string]*Node
	apis []*Node // those to pick from
}

type nodeFlight struct {
	startedAt time.Duration
	done      chan struct{}
	err       error // written before done is closed
}

func (c *nodeCache) init(t *Table) {
	c.table = t
	c.kick = make(chan struct{}, 1)
	c.changedIDs = make(map[string]struct{})
}

// keepFresh reads the leases every second, and at once when a node changed.
func (c *nodeCache) keepFresh(ctx context.Context) {
	tick := time.NewTicker(nodesInterval)
	defer tick.Stop()
	for {
		err := c.await(ctx, c.fly(ctx))
		if err != nil && ctx.Err() == nil {
			c.table.log.Debug("leases not read", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			continue
		case <-c.kick:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(nodesPause):
		}
	}
}

// changed notes what a node said about itself.
func (c *nodeCache) changed(id string) {
	c.mu.Lock()
	c.changedIDs[id] = struct{}{}
	c.mu.Unlock()
	c.readSoon()
}

// lost starts the grace of all leases that are known; the first Lost of a watcher, its start, gives none.
func (c *nodeCache) lost(grace bool) {
	c.mu.Lock()
	if grace {
		c.graceUntil = time.Since(c.table.base) + leaseGrace
	}
	c.flight = nil // it may hang in a connection that is gone
	c.mu.Unlock()
	c.readSoon()
}

func (c *nodeCache) readSoon() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// resolve returns the lease of the node of a route that was read at routeAt. A node that was announced before its route is
// never lost just because the list is older than the route: then the list is read again.
func (c *nodeCache) resolve(ctx context.Context, id string, routeAt, now time.Duration) (*Node, error) {
	view := c.view.Load()
	if view != nil && now-view.asOf <= nodesFreshFor {
		if node := view.byID[id]; node != nil {
			return node, nil
		}
		if view.asOf >= routeAt {
			return nil, ErrNodeLost
		}
	}
	if view != nil && c.table.storeDown() {
		return c.stale(view, id, now)
	}
	view, err := c.readSince(ctx, routeAt)
	if err != nil {
		if view == nil || ctx.Err() != nil {
			return nil, err
		}
		return c.stale(view, id, now)
	}
	if node := view.byID[id]; node != nil {
		return node, nil
	}
	return nil, ErrNodeLost
}

// stale answers from a list that could not be renewed. A node that is not on it is unknown rather than lost.
func (c *nodeCache) stale(view *nodeView, id string, now time.Duration) (*Node, error) {
	node := view.byID[id]
	if node == nil || now-view.asOf > c.table.opts.StaleLimit {
		return nil, errTimeout
	}
	return node, nil
}

// readSince returns a list that was read after the given time and is fresh. With an error it returns the last list there was.
func (c *nodeCache) readSince(ctx context.Context, since time.Duration) (*nodeView, error) {
	for range 2 { // a read that was in flight already may be older than since; the next one is not
		if err := c.await(ctx, c.fly(ctx)); err != nil {
			return c.view.Load(), err
		}
		if view := c.view.Load(); view.asOf >= since {
			return view, nil
		}
	}
	return c.view.Load(), nil
}

// fly returns the read in flight, or starts one.
func (c *nodeCache) fly(ctx context.Context) *nodeFlight {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flight != nil {
		return c.flight
	}
	c.flight = &nodeFlight{startedAt: time.Since(c.table.base), done: make(chan struct{})}
	go c.load(context.WithoutCancel(ctx), c.flight)
	return c.flight
}

func (c *nodeCache) await(ctx context.Context, f *nodeFlight) error {
	timeout := time.NewTimer(c.table.opts.LoadTimeout)
	defer timeout.Stop()
	select {
	case <-f.done:
		return f.err
	case <-timeout.C:
		c.table.markDown()
		return errTimeout
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *nodeCache) load(ctx context.Context, f *nodeFlight) {
	ctx, cancel := context.WithTimeout(ctx, c.table.opts.LoadTimeout)
	defer cancel()
	defer close(f.done)
	c.mu.Lock()
	changed := c.changedIDs
	c.changedIDs = make(map[string]struct{})
	c.mu.Unlock()

	nodes, err := c.table.store.Nodes(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flight == f {
		c.flight = nil
	}
	if err != nil {
		f.err = err
		c.table.stats.loadErrors.Inc()
		c.table.markDown()
		maps.Copy(c.changedIDs, changed)
		return
	}
	c.table.downUntil.Store(0)
	if was := c.view.Load(); was != nil && was.asOf > f.startedAt {
		maps.Copy(c.changedIDs, changed)
		return // a read that was sent off later was quicker
	}
	c.view.Store(c.nextViewLocked(f.startedAt, nodes, changed))
}

// nextViewLocked makes the list from what was read and from what the grace keeps. A lease that did not change keeps its place in
// memory, so that the Targets which point to it stay as they are.
func (c *nodeCache) nextViewLocked(asOf time.Duration, nodes []Node, changed map[string]struct{}) *nodeView {
	view := &nodeView{asOf: asOf, byID: make(map[string]*Node, len(nodes))}
	was := c.view.Load()
	for i := range nodes {
		node := &nodes[i]
		if was != nil && was.byID[node.ID] != nil && *was.byID[node.ID] == *node {
			node = was.byID[node.ID]
		}
		view.byID[node.ID] = node
	}
	if was != nil && asOf < c.graceUntil {
		for id, node := range was.byID {
			if _, spoke := changed[id]; !spoke && view.byID[id] == nil {
				view.byID[id] = node
			}
		}
	}
	for _, node := range view.byID {
		if node.APIAddr != "" {
			view.apis = append(view.apis, node)
		}
	}
	if ready := slices.DeleteFunc(slices.Clone(view.apis), func(n *Node) bool { return n.Draining }); len(ready) > 0 {
		view.apis = ready
	}
	slices.SortFunc(view.apis, func(a, b *Node) int { return strings.Compare(a.ID, b.ID) })
	return view
}

func (c *nodeCache) pick(ctx context.Context, now time.Duration) (*Node, error) {
	view := c.view.Load()
	if view == nil || now-view.asOf > nodesFreshFor && !c.table.storeDown() || len(view.apis) == 0 {
		read, err := c.readSince(ctx, now)
		if err != nil && (read == nil || ctx.Err() != nil) {
			return nil, err
		}
		view = read
	}
	if len(view.apis) == 0 || now-view.asOf > c.table.opts.StaleLimit {
		return nil, errNoNodes
	}
	return view.apis[int(c.turn.Add(1))%len(view.apis)], nil
}
