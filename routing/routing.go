// Package routing turns names into routes: the grammar of public host names, the records that nodes write about their
// sandboxes and themselves, two stores for those records (Redis and memory, one suite for both in routingtest), and the
// Table, the cache from which an edge answers every request. It opens no connection to a sandbox and decides nothing about
// who may pass: proxy calls it for the first, and asks it for the second only what the record says.
//
// # Keys in Redis
//
//	sluice:route:<sandbox>       one JSON value per sandbox, see Route
//	sluice:node:<node>           one JSON value per node, with the time to live of its lease, see Node
//	sluice:node-routes:<node>    hash: sandbox -> generation and time of writing; the index behind RoutesOf
//	sluice:nodes                 set of node ids; the index behind Nodes
//	sluice:changes               channel: what changed
//	sluice:heartbeat:<watcher>   channel: what a watcher sends to itself
//
// Every script touches one key and publishes, so all of it works on Redis standalone, with Sentinel and as a Cluster. The
// indexes are therefore a step of their own: an index entry is written before the route and removed after it, so a crash
// in between leaves an entry without a route, which RoutesOf clears, and never a route that its owner cannot find.
//
// # How old a route may be
//
// See docs/decisions/0002-route-staleness.md. In short: pub/sub delivers changes in milliseconds; a route is served from
// memory only within three seconds of a proof that nothing was missed; when Redis does not answer, known routes are served for
// StaleLimit after their last proof, and unknown names are Unavailable, never absent.
package routing

import (
	"context"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// EventKind says what an Event is about.
type EventKind uint8

// The kinds of events. A watcher that does not know a kind must treat it as Lost.
const (
	Lost         EventKind = iota // something may have been missed: all that was read before is suspect
	RouteChanged                  // the route of sandbox Key was written or deleted
	NodeChanged                   // node Key appeared, went, or changed its addresses or its draining mark
	Heartbeat                     // every event published before At has been delivered
)

// Event is one thing that a watcher learns.
type Event struct {
	Kind EventKind
	Key  string    // sandbox or node id; empty for Lost and Heartbeat
	At   time.Time // Heartbeat only: when it was sent, by this process's monotonic clock
}

// Store is the catalogue. Errors carry codes: NotFound for what is not there, Conflict for a refused write, Invalid for a record
// that must not be stored, Unavailable for everything that prevented an answer. Methods are safe for concurrent use.
type Store interface {
	// PutRoute writes a route and publishes the change in the same step. A lower generation than the stored one is refused with
	// Conflict, also for TombstoneFor after the stored one was deleted; the same generation replaces.
	PutRoute(ctx context.Context, r Route) error
	// DeleteRoute removes the route that this generation wrote. When it is absent, or somebody else's, nothing happens.
	DeleteRoute(ctx context.Context, sandbox string, generation uint64) error
	Route(ctx context.Context, sandbox string) (Route, error)
	// RoutesOf lists the routes that carry the node's name, in no order: what a node reconciles with at its start.
	RoutesOf(ctx context.Context, node string) ([]Route, error)

	// PutNode writes or renews a node's lease.
	PutNode(ctx context.Context, n Node, ttl time.Duration) error
	DeleteNode(ctx context.Context, id string) error
	Node(ctx context.Context, id string) (Node, error)
	Nodes(ctx context.Context) ([]Node, error) // those with a lease, in no order

	// Watch tells emit what changes, one event at a time, until ctx ends; then it returns nil. It starts with Lost once
	// it listens, reconnects by itself, and sends Lost whenever it was or may have been deaf. emit must not block.
	Watch(ctx context.Context, emit func(Event)) error
}

const (
	// RouteExpiryMargin is how long a route outlives its end time in the store. The Table judges the end time by itself, so
	// expiry is only the broom behind a node that died; the margin covers clocks that differ and an extension that arrives
	// late. A paused sandbox has no end time and its route no expiry: it may outlast its node's restart by weeks, and its owner deletes it.
	RouteExpiryMargin = 5 * time.Minute

	// TombstoneFor is how long a deleted route still refuses lower generations. It outlasts every write that an old owner
	// may still have on its way.
	TombstoneFor = 10 * time.Minute

	// HeartbeatInterval is how often a watcher sends itself a message through the store.
	HeartbeatInterval = time.Second

	// SilenceLimit is how long a watcher waits for its own heartbeat before it subscribes anew: two may be lost or late.
	SilenceLimit = 3 * time.Second
)

// ErrNodeLost is what Resolve answers when the route is known but its node holds no lease.
var ErrNodeLost = errs.New(errs.Unavailable, "the node of this sandbox is not available")

func errNoRoute(sandbox string) error {
	return errs.New(errs.NotFound, "no route for sandbox %q", sandbox)
}

func errNoNode(id string) error { return errs.New(errs.NotFound, "no lease for node %q", id) }

func errLowerGeneration(r Route) error {
	return errs.New(errs.Conflict, "the route of sandbox %q belongs to a later generation than %d", r.Sandbox, r.Generation)
}
