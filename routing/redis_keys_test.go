package routing_test

import (
	"strings"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/routing/routingtest"
)

func TestRedisKeys(t *testing.T) {
	server := routingtest.StartRedis(t)
	client := server.Client(t)
	logs, seen := observer.New(zapcore.InfoLevel)
	set := metrics.NewSet()
	store := routing.NewRedisStore(client, routing.RedisOptions{Log: zap.New(logs), Metrics: set})
	ctx := t.Context()
	put := func(r routing.Route) {
		t.Helper()
		if err := store.PutRoute(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	reset := func(t *testing.T) {
		t.Helper()
		if err := client.FlushAll(ctx).Err(); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("a route outlives its end by the margin", func(t *testing.T) {
		reset(t)
		r := routingtest.Sample("isb", "n1", 1)
		put(r)
		at, err := client.PExpireTime(ctx, "sluice:route:isb").Result()
		if want := r.EndAt.Add(routing.RouteExpiryMargin).UnixMilli(); err != nil || at.Milliseconds() != want {
			t.Errorf("expiry = %d, %v, want %d", at.Milliseconds(), err, want)
		}
		r.State = routing.Paused
		put(r)
		if ttl, err := client.TTL(ctx, "sluice:route:isb").Result(); err != nil || ttl != -1 {
			t.Errorf("life of a paused route = %v, %v, want none", ttl, err)
		}
	})
	t.Run("a deleted route leaves a tombstone and no index", func(t *testing.T) {
		reset(t)
		put(routingtest.Sample("isb", "n1", 1))
		if err := store.DeleteRoute(ctx, "isb", 1); err != nil {
			t.Fatal(err)
		}
		if ttl, err := client.TTL(ctx, "sluice:route:isb").Result(); err != nil || ttl <= 0 || ttl > routing.TombstoneFor {
			t.Errorf("life of a tombstone = %v, %v, want up to %v", ttl, err, routing.TombstoneFor)
		}
		if keys, err := client.Keys(ctx, "*").Result(); err != nil || strings.Join(keys, " ") != "sluice:route:isb" {
			t.Errorf("keys = %q, %v, want the tombstone alone", keys, err)
		}
	})
	t.Run("writing the same again tells nobody", func(t *testing.T) {
		reset(t)
		w := routingtest.StartWatch(t, store)
		w.Want(t, routing.Lost, "")
		r := routingtest.Sample("isb", "n1", 1)
		put(r)
		put(r)
		put(routingtest.Sample("isc", "n1", 1))
		w.Want(t, routing.RouteChanged, "isb")
		w.Want(t, routing.RouteChanged, "isc")
	})
	t.Run("an index entry that leads nowhere is cleared when it is old", func(t *testing.T) {
		reset(t)
		put(routingtest.Sample("isb", "n1", 5))
		put(routingtest.Sample("isold", "n1", 5))
		put(routingtest.Sample("isnew", "n1", 5))
		if err := client.Del(ctx, "sluice:route:isold", "sluice:route:isnew").Err(); err != nil {
			t.Fatal(err)
		}
		for _, id := range []string{"isb", "isold"} {
			if err := client.HSet(ctx, "sluice:node-routes:n1", id, "5 1000000000").Err(); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if routes, err := store.RoutesOf(ctx, "n1"); err != nil || len(routes) != 1 || routes[0].Sandbox != "isb" {
				t.Errorf("RoutesOf = %v, %v, want isb", routes, err)
			}
		}
		left, err := client.HKeys(ctx, "sluice:node-routes:n1").Result()
		if err != nil || len(left) != 2 {
			t.Errorf("index = %q, %v, want isb and isnew", left, err)
		}
	})
	t.Run("an unreadable record is an error and no absence", func(t *testing.T) {
		reset(t)
		put(routingtest.Sample("isb", "n1", 5))
		put(routingtest.Sample("isc", "n1", 5))
		for _, bad := range []string{"null", "{}", "", "x", `{"v":2,"gen":5,"id":"isb"}`, `{"v":1,"gen":5,"id":"isc","node":"n1","state":"running","public":true}`,
			`{"v":1,"gen":5,"id":"isb","node":"n1","state":"running"}`} {
			if err := client.Set(ctx, "sluice:route:isb", bad, time.Hour).Err(); err != nil {
				t.Fatal(err)
			}
			if _, err := store.Route(ctx, "isb"); err == nil || errs.CodeOf(err) != errs.Internal {
				t.Errorf("Route() of %q = %v, want internal", bad, err)
			}
			if routes, err := store.RoutesOf(ctx, "n1"); err != nil || len(routes) != 1 || routes[0].Sandbox != "isc" {
				t.Errorf("RoutesOf beside %q = %v, %v, want isc", bad, routes, err)
			}
		}
		if err := store.PutRoute(ctx, routingtest.Sample("isb", "n1", 4)); errs.CodeOf(err) != errs.Conflict {
			t.Errorf("PutRoute over a later record = %v, want conflict", err)
		}
		if err := client.Set(ctx, "sluice:route:isb", "x", 0).Err(); err != nil {
			t.Fatal(err)
		}
		put(routingtest.Sample("isb", "n1", 1)) // nothing that could be read stood there
	})
	t.Run("a lease that is unreadable hides no other", func(t *testing.T) {
		reset(t)
		for _, id := range []string{"n1", "n2"} {
			if err := store.PutNode(ctx, routing.Node{ID: id}, time.Hour); err != nil {
				t.Fatal(err)
			}
		}
		if err := client.Set(ctx, "sluice:node:n1", "x", 0).Err(); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Node(ctx, "n1"); err == nil || errs.CodeOf(err) != errs.Internal {
			t.Errorf("Node(n1) = %v, want internal", err)
		}
		if nodes, err := store.Nodes(ctx); err != nil || len(nodes) != 1 || nodes[0].ID != "n2" {
			t.Errorf("Nodes() = %v, %v, want n2", nodes, err)
		}
		if err := store.PutNode(ctx, routing.Node{ID: "n1"}, time.Hour); err != nil {
			t.Errorf("PutNode over what cannot be read = %v", err)
		}
	})
	t.Run("a lease of another type hides no other, and is told once", func(t *testing.T) {
		reset(t)
		seen.TakeAll()
		before := set.GetOrCreateCounter("sluice_routing_unreadable_records_total").Get()
		if err := store.PutNode(ctx, routing.Node{ID: "n2"}, time.Hour); err != nil {
			t.Fatal(err)
		}
		for _, err := range []error{client.SAdd(ctx, "sluice:nodes", "n3").Err(), client.LPush(ctx, "sluice:node:n3", "x").Err()} {
			if err != nil {
				t.Fatal(err)
			}
		}
		for range 3 {
			if nodes, err := store.Nodes(ctx); err != nil || len(nodes) != 1 || nodes[0].ID != "n2" {
				t.Errorf("Nodes() = %v, %v, want n2", nodes, err)
			}
		}
		if lines, counted := seen.TakeAll(), set.GetOrCreateCounter("sluice_routing_unreadable_records_total").Get()-before; len(lines) != 1 || counted != 3 {
			t.Errorf("after 3 reads %d lines %v, counted %d, want one and 3", len(lines), lines, counted)
		}
		if err := store.PutNode(ctx, routing.Node{ID: "n3"}, time.Hour); err != nil {
			t.Errorf("PutNode over a list = %v", err)
		}
		if nodes, err := store.Nodes(ctx); err != nil || len(nodes) != 2 || seen.FilterMessage("lease record is readable again").Len() != 1 {
			t.Errorf("Nodes() after the node renewed = %v, %v, %v", nodes, err, seen.All())
		}
	})
	t.Run("a route of another type hides no other", func(t *testing.T) {
		reset(t)
		put(routingtest.Sample("isb", "n1", 5))
		put(routingtest.Sample("isc", "n1", 5))
		for _, err := range []error{client.Del(ctx, "sluice:route:isb").Err(), client.LPush(ctx, "sluice:route:isb", "x").Err()} {
			if err != nil {
				t.Fatal(err)
			}
		}
		if routes, err := store.RoutesOf(ctx, "n1"); err != nil || len(routes) != 1 || routes[0].Sandbox != "isc" {
			t.Errorf("RoutesOf = %v, %v, want isc", routes, err)
		}
	})
}

// TestOutageIsToldOnce: four lines a second filled the log for as long as Redis was away.
func TestOutageIsToldOnce(t *testing.T) {
	server := routingtest.StartRedis(t)
	logs, seen := observer.New(zapcore.DebugLevel)
	w := routingtest.StartWatch(t, routing.NewRedisStore(server.Client(t), routing.RedisOptions{Log: zap.New(logs)}))
	w.Want(t, routing.Lost, "")
	count := func(message string) int { return seen.FilterMessage(message).Len() }
	const lost, back = "route subscription lost, known routes are suspect", "route subscription is back"
	for outage := range 2 {
		w.WantHeartbeat(t)
		server.Stop()
		w.Want(t, routing.Lost, "")
		for attempts := count("route subscription not made"); count("route subscription not made") < attempts+3; {
			time.Sleep(5 * time.Millisecond)
		}
		if count(lost) != outage+1 || count(back) != outage {
			t.Errorf("during outage %d the loss is told %d times, the return %d times", outage, count(lost), count(back))
		}
		server.Start()
		w.Want(t, routing.Lost, "")
		w.WantHeartbeat(t)
		if count(lost) != outage+1 || count(back) != outage+1 {
			t.Errorf("after outage %d the loss is told %d times, the return %d times", outage, count(lost), count(back))
		}
	}
}
