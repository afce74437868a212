// Package routingtest holds the suite that every routing.Store passes, and a real redis-server for tests that need one.
package routingtest

import (
	"context"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/routing"
)

// patience is how long a message may take that must come. Nothing passes because it ran out.
const patience = 20 * time.Second

// Run holds a store to the contract of routing.Store. newStore returns an empty one; it may be called many times.
func Run(t *testing.T, newStore func(t *testing.T) routing.Store) {
	tests := []struct {
		name string
		test func(t *testing.T, s routing.Store)
	}{
		{"route round trip", testRoundTrip},
		{"generations", testGenerations},
		{"generations beyond float precision", testLargeGenerations},
		{"delete only by the same generation", testDelete},
		{"a deleted route still refuses its predecessors", testTombstone},
		{"routes of a node", testRoutesOf},
		{"a route expires after its end", testExpiry},
		{"bad records are refused", testInvalid},
		{"nodes and leases", testNodes},
		{"a lease runs out", testLease},
		{"watch", testWatch},
		{"watch ends with its context", testWatchEnds},
		{"heartbeats follow what was published before", testHeartbeats},
		{"two writers race", testRace},
		{"an ended context", testEndedContext},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, newStore(t)) })
	}
}

// Sample is a route with every field set.
func Sample(sandbox, node string, generation uint64) routing.Route {
	return routing.Route{
		Version:    routing.RouteVersion,
		Sandbox:    sandbox,
		Node:       node,
		Generation: generation,
		State:      routing.Running,
		EndAt:      time.Now().Add(time.Hour).Truncate(time.Millisecond).UTC(),
		TokenHash:  [32]byte{1, 2, 31: 3},
		Mask:       "${PORT}.localhost:${PORT}",
		Ports:      map[uint16]routing.PortSettings{8443: {HTTPS: true}, 65535: {}},
		AutoResume: true,
		EnvdHash:   [32]byte{4, 31: 5},
	}
}

func wantCode(t *testing.T, what string, err error, want errs.Code) {
	t.Helper()
	if err == nil || errs.CodeOf(err) != want {
		t.Errorf("%s = %v, want code %v", what, err, want)
	}
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func wantRoute(t *testing.T, s routing.Store, want routing.Route) {
	t.Helper()
	got, err := s.Route(t.Context(), want.Sandbox)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("Route(%q) = %+v, %v, want %+v", want.Sandbox, got, err, want)
	}
}

func wantNoRoute(t *testing.T, s routing.Store, sandbox string) {
	t.Helper()
	_, err := s.Route(t.Context(), sandbox)
	wantCode(t, "Route("+sandbox+")", err, errs.NotFound)
}

func testRoundTrip(t *testing.T, s routing.Store) {
	wantNoRoute(t, s, "isb1")
	full := Sample("isb1", "n1", 7)
	plain := routing.Route{Version: routing.RouteVersion, Sandbox: "isb2", Node: "n1", Generation: 1, State: routing.Paused}
	must(t, "put", s.PutRoute(t.Context(), full))
	must(t, "put", s.PutRoute(t.Context(), plain))
	wantRoute(t, s, full)
	wantRoute(t, s, plain)

	got, err := s.Route(t.Context(), "isb1")
	must(t, "read", err)
	got.Ports[8443] = routing.PortSettings{} // what a caller does to its copy is not in the store
	delete(full.Ports, 65535)
	want := Sample("isb1", "n1", 7)
	want.EndAt = full.EndAt
	wantRoute(t, s, want)
}

func testGenerations(t *testing.T, s routing.Store) {
	ten := Sample("isb", "n1", 10)
	must(t, "put 10", s.PutRoute(t.Context(), ten))
	for _, lower := range []uint64{9, 2, 1} {
		wantCode(t, "put a lower generation", s.PutRoute(t.Context(), Sample("isb", "n2", lower)), errs.Conflict)
		wantRoute(t, s, ten)
	}
	again := ten
	again.State, again.Mask = routing.Paused, ""
	must(t, "put 10 again", s.PutRoute(t.Context(), again))
	wantRoute(t, s, again)
	next := Sample("isb", "n2", 100)
	must(t, "put 100", s.PutRoute(t.Context(), next))
	wantRoute(t, s, next)
	wantCode(t, "put 11 after 100", s.PutRoute(t.Context(), Sample("isb", "n1", 11)), errs.Conflict)
}

func testLargeGenerations(t *testing.T, s routing.Store) {
	const big = 1<<63 + 1<<53
	must(t, "put", s.PutRoute(t.Context(), Sample("isb", "n1", big+1)))
	wantCode(t, "put one lower", s.PutRoute(t.Context(), Sample("isb", "n1", big)), errs.Conflict)
	must(t, "delete one lower", s.DeleteRoute(t.Context(), "isb", big))
	if _, err := s.Route(t.Context(), "isb"); err != nil {
		t.Errorf("Route() = %v: the generation below has deleted it", err)
	}
	must(t, "put one higher", s.PutRoute(t.Context(), Sample("isb", "n1", big+2)))
	must(t, "put the highest", s.PutRoute(t.Context(), Sample("isb", "n1", 1<<64-1)))
	wantRoutes(t, s, "n1", "isb:"+strconv.FormatUint(1<<64-1, 10))
}

func testDelete(t *testing.T, s routing.Store) {
	must(t, "delete what is not there", s.DeleteRoute(t.Context(), "isb", 5))
	r := Sample("isb", "n1", 5)
	must(t, "put", s.PutRoute(t.Context(), r))
	must(t, "delete by an earlier one", s.DeleteRoute(t.Context(), "isb", 4))
	must(t, "delete by a later one", s.DeleteRoute(t.Context(), "isb", 50))
	wantRoute(t, s, r)
	must(t, "delete", s.DeleteRoute(t.Context(), "isb", 5))
	wantNoRoute(t, s, "isb")
	wantRoutes(t, s, "n1")
	must(t, "delete twice", s.DeleteRoute(t.Context(), "isb", 5))
}

func testTombstone(t *testing.T, s routing.Store) {
	must(t, "put", s.PutRoute(t.Context(), Sample("isb", "n2", 5)))
	must(t, "delete", s.DeleteRoute(t.Context(), "isb", 5))
	wantCode(t, "put by a slow old owner", s.PutRoute(t.Context(), Sample("isb", "n1", 4)), errs.Conflict)
	wantNoRoute(t, s, "isb")
	must(t, "delete by a slow old owner", s.DeleteRoute(t.Context(), "isb", 4))
	back := Sample("isb", "n2", 5)
	must(t, "put by the owner itself", s.PutRoute(t.Context(), back))
	wantRoute(t, s, back)
	must(t, "delete again", s.DeleteRoute(t.Context(), "isb", 5))
	next := Sample("isb", "n1", 6)
	must(t, "put by the next", s.PutRoute(t.Context(), next))
	wantRoute(t, s, next)
}

func wantRoutes(t *testing.T, s routing.Store, node string, want ...string) {
	t.Helper()
	routes, err := s.RoutesOf(t.Context(), node)
	must(t, "routes of "+node, err)
	var got []string
	for _, r := range routes {
		got = append(got, r.Sandbox+":"+strconv.FormatUint(r.Generation, 10))
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("RoutesOf(%q) = %q, want %q", node, got, want)
	}
}

func testRoutesOf(t *testing.T, s routing.Store) {
	wantRoutes(t, s, "n1")
	for _, r := range []routing.Route{Sample("isa", "n1", 1), Sample("isb", "n1", 2), Sample("isc", "n2", 3)} {
		must(t, "put", s.PutRoute(t.Context(), r))
	}
	wantRoutes(t, s, "n1", "isa:1", "isb:2")
	must(t, "move isb to n2", s.PutRoute(t.Context(), Sample("isb", "n2", 4)))
	wantCode(t, "put by the old owner", s.PutRoute(t.Context(), Sample("isb", "n1", 2)), errs.Conflict)
	must(t, "delete by the old owner", s.DeleteRoute(t.Context(), "isb", 2))
	wantRoutes(t, s, "n1", "isa:1")
	wantRoutes(t, s, "n2", "isb:4", "isc:3")
	must(t, "and back", s.PutRoute(t.Context(), Sample("isb", "n1", 5)))
	wantRoutes(t, s, "n1", "isa:1", "isb:5")
	wantRoutes(t, s, "n2", "isc:3")
}

func testExpiry(t *testing.T, s routing.Store) {
	ended := Sample("isb", "n1", 1)
	ended.EndAt = time.Now().Add(-time.Second).Truncate(time.Millisecond).UTC()
	must(t, "put one that has just ended", s.PutRoute(t.Context(), ended))
	wantRoute(t, s, ended) // within the margin: the reader judges
	longGone := ended
	longGone.EndAt = ended.EndAt.Add(-routing.RouteExpiryMargin)
	must(t, "put one that ended long ago", s.PutRoute(t.Context(), longGone))
	wantNoRoute(t, s, "isb")
	wantRoutes(t, s, "n1")
	paused := longGone
	paused.State = routing.Paused
	must(t, "put a paused one", s.PutRoute(t.Context(), paused))
	wantRoute(t, s, paused)
}

func testInvalid(t *testing.T, s routing.Store) {
	for what, change := range map[string]func(r *routing.Route){
		"no sandbox":          func(r *routing.Route) { r.Sandbox = "" },
		"an id in upper case": func(r *routing.Route) { r.Sandbox = "iSB" },
		"an id with a dash":   func(r *routing.Route) { r.Sandbox = "i-1" },
		"a long id":           func(r *routing.Route) { r.Sandbox = strings.Repeat("i", 58) },
		"no node":             func(r *routing.Route) { r.Node = "" },
		"a node with a colon": func(r *routing.Route) { r.Node = "n:1" },
		"generation zero":     func(r *routing.Route) { r.Generation = 0 },
		"no state":            func(r *routing.Route) { r.State = "" },
		"another state":       func(r *routing.Route) { r.State = "pausing" },
		"a future version":    func(r *routing.Route) { r.Version = routing.RouteVersion + 1 },
		"port zero":           func(r *routing.Route) { r.Ports = map[uint16]routing.PortSettings{0: {}} },
		"an end in 1960":      func(r *routing.Route) { r.EndAt = time.Date(1960, 1, 1, 0, 0, 0, 0, time.UTC) },
	} {
		r := Sample("isb", "n1", 1)
		change(&r)
		wantCode(t, "PutRoute with "+what, s.PutRoute(t.Context(), r), errs.Invalid)
	}
	wantNoRoute(t, s, "isb")
	wantCode(t, "PutNode without an id", s.PutNode(t.Context(), routing.Node{}, time.Minute), errs.Invalid)
	wantCode(t, "PutNode without a lease", s.PutNode(t.Context(), routing.Node{ID: "n1"}, 0), errs.Invalid)
}

func testNodes(t *testing.T, s routing.Store) {
	_, err := s.Node(t.Context(), "n1")
	wantCode(t, "Node(n1)", err, errs.NotFound)
	n1 := routing.Node{ID: "n1", LinkAddr: "10.0.0.1:1", APIAddr: "10.0.0.1:2", Sandboxes: 3, MaxSandboxes: 9, Machine: "namespace"}
	n2 := routing.Node{ID: "n2.rack-1_b", LinkAddr: "[fd00::1]:1", Draining: true}
	must(t, "put n1", s.PutNode(t.Context(), n1, time.Minute))
	must(t, "put n2", s.PutNode(t.Context(), n2, time.Minute))
	wantNodes(t, s, n1, n2)
	if got, err := s.Node(t.Context(), "n1"); err != nil || got != n1 {
		t.Errorf("Node(n1) = %+v, %v, want %+v", got, err, n1)
	}
	n1.Sandboxes = 4
	must(t, "renew n1", s.PutNode(t.Context(), n1, time.Minute))
	wantNodes(t, s, n1, n2)
	must(t, "delete n2", s.DeleteNode(t.Context(), n2.ID))
	must(t, "delete n2 twice", s.DeleteNode(t.Context(), n2.ID))
	wantNodes(t, s, n1)
}

func wantNodes(t *testing.T, s routing.Store, want ...routing.Node) {
	t.Helper()
	got, err := s.Nodes(t.Context())
	slices.SortFunc(got, func(a, b routing.Node) int { return strings.Compare(a.ID, b.ID) })
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("Nodes() = %+v, %v, want %+v", got, err, want)
	}
}

func testLease(t *testing.T, s routing.Store) {
	n := routing.Node{ID: "n1", LinkAddr: "10.0.0.1:1"}
	must(t, "put", s.PutNode(t.Context(), n, 5*time.Millisecond))
	eventually(t, "the lease runs out", func() bool {
		_, err := s.Node(t.Context(), "n1")
		return errs.CodeOf(err) == errs.NotFound
	})
	wantNodes(t, s)
	must(t, "put again", s.PutNode(t.Context(), n, time.Minute))
	wantNodes(t, s, n)
}

func testWatch(t *testing.T, s routing.Store) {
	w := StartWatch(t, s)
	w.Want(t, routing.Lost, "")
	r := Sample("isb", "n1", 5)
	must(t, "put", s.PutRoute(t.Context(), r))
	w.Want(t, routing.RouteChanged, "isb")
	r.Mask = "elsewhere"
	must(t, "replace", s.PutRoute(t.Context(), r))
	w.Want(t, routing.RouteChanged, "isb")
	if err := s.PutRoute(t.Context(), Sample("isb", "n1", 4)); err == nil {
		t.Error("a lower generation was accepted")
	}
	must(t, "delete somebody else's", s.DeleteRoute(t.Context(), "isb", 6))
	must(t, "delete", s.DeleteRoute(t.Context(), "isb", 5))
	w.Want(t, routing.RouteChanged, "isb")

	n := routing.Node{ID: "n1", LinkAddr: "a:1"}
	must(t, "node", s.PutNode(t.Context(), n, time.Minute))
	w.Want(t, routing.NodeChanged, "n1")
	n.Sandboxes++
	must(t, "node that is fuller", s.PutNode(t.Context(), n, time.Minute))
	n.LinkAddr = "a:2"
	must(t, "node that moved", s.PutNode(t.Context(), n, time.Minute))
	w.Want(t, routing.NodeChanged, "n1")
	n.Draining = true
	must(t, "node that drains", s.PutNode(t.Context(), n, time.Minute))
	w.Want(t, routing.NodeChanged, "n1")
	must(t, "node that left", s.DeleteNode(t.Context(), "n1"))
	w.Want(t, routing.NodeChanged, "n1")
	must(t, "node that left already", s.DeleteNode(t.Context(), "n1"))
	must(t, "one more", s.PutRoute(t.Context(), Sample("isz", "n1", 1)))
	w.Want(t, routing.RouteChanged, "isz") // so nothing came for what changed nothing
}

func testWatchEnds(t *testing.T, s routing.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan struct{}, 1)
	done := make(chan error, 1)
	go func() {
		done <- s.Watch(ctx, func(routing.Event) {
			select {
			case first <- struct{}{}:
			default:
			}
		})
	}()
	<-first
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Watch() = %v after its context ended, want nil", err)
	}
}

func testHeartbeats(t *testing.T, s routing.Store) {
	var mu sync.Mutex
	seen := make(map[string]bool)
	ready, checked := make(chan struct{}), make(chan struct{})
	var wrote time.Time
	go s.Watch(t.Context(), func(e routing.Event) { //nolint:errcheck // it returns nil
		mu.Lock()
		defer mu.Unlock()
		switch e.Kind {
		case routing.Lost:
			close(ready)
		case routing.RouteChanged:
			seen[e.Key] = true
		case routing.Heartbeat:
			if wrote.IsZero() || !e.At.After(wrote) {
				return
			}
			if len(seen) != 50 {
				t.Errorf("a heartbeat that was sent after 50 changes came after %d of them", len(seen))
			}
			select {
			case <-checked:
			default:
				close(checked)
			}
		}
	})
	<-ready
	for i := range 50 {
		must(t, "put", s.PutRoute(t.Context(), Sample("is"+strconv.Itoa(i), "n1", 1)))
	}
	mu.Lock()
	wrote = time.Now()
	mu.Unlock()
	select {
	case <-checked:
	case <-time.After(patience):
		t.Fatal("no heartbeat")
	}
}

// testRace lets owners of different generations write and delete at once: the last generation must be what stays.
func testRace(t *testing.T, s routing.Store) {
	var writers sync.WaitGroup
	for generation := uint64(1); generation <= 20; generation++ {
		writers.Go(func() {
			err := s.PutRoute(t.Context(), Sample("isb", "n"+strconv.FormatUint(generation%3, 10), generation))
			if err != nil && errs.CodeOf(err) != errs.Conflict {
				t.Errorf("PutRoute of generation %d = %v", generation, err)
			}
			if generation < 20 {
				if err := s.DeleteRoute(t.Context(), "isb", generation); err != nil {
					t.Errorf("DeleteRoute of generation %d = %v", generation, err)
				}
			}
		})
	}
	writers.Wait()
	got, err := s.Route(t.Context(), "isb")
	if err != nil || got.Generation != 20 {
		t.Errorf("after all writers: generation %d, %v, want 20", got.Generation, err)
	}
	wantRoutes(t, s, "n2", "isb:20")
	wantRoutes(t, s, "n0")
	wantRoutes(t, s, "n1")
}

func testEndedContext(t *testing.T, s routing.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for what, err := range map[string]error{
		"PutRoute":    s.PutRoute(ctx, Sample("isb", "n1", 1)),
		"DeleteRoute": s.DeleteRoute(ctx, "isb", 1),
		"PutNode":     s.PutNode(ctx, routing.Node{ID: "n1"}, time.Minute),
		"DeleteNode":  s.DeleteNode(ctx, "n1"),
	} {
		wantCode(t, what, err, errs.Unavailable)
	}
	_, err := s.Route(ctx, "isb")
	wantCode(t, "Route", err, errs.Unavailable)
	_, err = s.RoutesOf(ctx, "n1")
	wantCode(t, "RoutesOf", err, errs.Unavailable)
	_, err = s.Node(ctx, "n1")
	wantCode(t, "Node", err, errs.Unavailable)
	_, err = s.Nodes(ctx)
	wantCode(t, "Nodes", err, errs.Unavailable)
}

// Watcher collects the events of one Watch.
type Watcher struct {
	events chan routing.Event
}

// StartWatch watches until the test ends, and waits for it.
func StartWatch(t testing.TB, s routing.Store) *Watcher {
	w := &Watcher{events: make(chan routing.Event, 4096)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Watch(ctx, func(e routing.Event) { w.events <- e }); err != nil {
			t.Errorf("Watch() = %v, want nil", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return w
}

// Next returns the next event that is no heartbeat.
func (w *Watcher) Next(t testing.TB) routing.Event {
	t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case e := <-w.events:
			if e.Kind != routing.Heartbeat {
				return e
			}
		case <-timeout:
			t.Fatal("no event came")
		}
	}
}

// WantHeartbeat waits for a heartbeat and fails if anything else comes first.
func (w *Watcher) WantHeartbeat(t testing.TB) {
	t.Helper()
	select {
	case e := <-w.events:
		if e.Kind != routing.Heartbeat {
			t.Fatalf("event = kind %d key %q, want a heartbeat", e.Kind, e.Key)
		}
	case <-time.After(patience):
		t.Fatal("no heartbeat came")
	}
}

// Want fails unless the next event that is no heartbeat is this one.
func (w *Watcher) Want(t testing.TB, kind routing.EventKind, key string) {
	t.Helper()
	if e := w.Next(t); e.Kind != kind || e.Key != key {
		t.Fatalf("event = kind %d key %q, want kind %d key %q", e.Kind, e.Key, kind, key)
	}
}

// eventually waits for a condition that must become true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}
