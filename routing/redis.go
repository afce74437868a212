package routing

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	routeKeyPrefix      = "sluice:route:"
	nodeKeyPrefix       = "sluice:node:"
	nodeRoutesKeyPrefix = "sluice:node-routes:"
	nodesKey            = "sluice:nodes"
	changesChannel      = "sluice:changes"
	heartbeatPrefix     = "sluice:heartbeat:"
)

// What a message on changesChannel starts with; the id follows.
const (
	routeMessage = "route:"
	nodeMessage  = "node:"
)

// indexGrace is how old an index entry without a route must be before RoutesOf clears it: PutRoute may be between its two steps.
const indexGrace = time.Minute

// The scripts compare generations as decimal text, the shorter one being the smaller: Lua's numbers are exact only to 2^53.

// putRouteScript writes a route unless a later generation did. Writing what is there already is no change and is not published,
// so that owners may write as often as they like. KEYS: route. ARGV: generation, JSON, expiry in Unix milliseconds or 0, channel, message.
var putRouteScript = redis.NewScript(`
local old = redis.call('GET', KEYS[1])
if old == ARGV[2] then return 1 end
local gen = old and string.match(old, '^{"v":%d+,"gen":(%d+)[,}]')
if gen and (#gen > #ARGV[1] or (#gen == #ARGV[1] and gen > ARGV[1])) then return 0 end
if ARGV[3] == '0' then
  redis.call('SET', KEYS[1], ARGV[2])
else
  redis.call('SET', KEYS[1], ARGV[2], 'PXAT', ARGV[3])
end
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 1`)

// deleteRouteScript puts a tombstone where that generation's route is. KEYS: route. ARGV: generation, tombstone, its life in
// milliseconds, channel, message.
var deleteRouteScript = redis.NewScript(`
local old = redis.call('GET', KEYS[1])
if not old or old == ARGV[2] or string.match(old, '^{"v":%d+,"gen":(%d+)[,}]') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 1`)

// indexScript notes a route in its node's index unless a later generation is there. KEYS: index. ARGV: sandbox, generation, Unix seconds.
var indexScript = redis.NewScript(`
local old = redis.call('HGET', KEYS[1], ARGV[1])
local gen = old and string.match(old, '^(%d+) ')
if gen and (#gen > #ARGV[2] or (#gen == #ARGV[2] and gen > ARGV[2])) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. ARGV[3])
return 1`)

// unindexScript removes an entry if it is still of that generation. KEYS: index. ARGV: sandbox, generation.
var unindexScript = redis.NewScript(`
local old = redis.call('HGET', KEYS[1], ARGV[1])
if old and string.match(old, '^(%d+) ') == ARGV[2] then return redis.call('HDEL', KEYS[1], ARGV[1]) end
return 0`)

// putNodeScript renews a lease, over whatever stands there; only what edges act on is published, not every sandbox more or less. KEYS: node. ARGV: JSON,
// time to live in milliseconds, channel, message.
var putNodeScript = redis.NewScript(`
local old = redis.pcall('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if type(old) == 'string' then
  local ok, was = pcall(cjson.decode, old)
  local is = cjson.decode(ARGV[1])
  if ok and was.link == is.link and was.api == is.api and was.drain == is.drain then return 0 end
end
redis.call('PUBLISH', ARGV[3], ARGV[4])
return 1`)

// deleteNodeScript ends a lease. KEYS: node. ARGV: channel, message.
var deleteNodeScript = redis.NewScript(`
if redis.call('DEL', KEYS[1]) == 0 then return 0 end
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1`)

// RedisOptions may be left zero.
type RedisOptions struct {
	Log     *zap.Logger
	Metrics *metrics.Set
}

// RedisStore is a Store in Redis 7 or later: one server, a Sentinel group or a Cluster, whatever the client was made for.
// The client decides about time-outs, and its owner closes it. It should have ContextTimeoutEnabled, or a Redis that accepts
// connections and does not answer holds a call for the client's own time-outs instead of the caller's.
type RedisStore struct {
	client redis.UniversalClient
	log    *zap.Logger

	mu      sync.Mutex      // guards the field below
	damaged map[string]bool // ids of nodes whose lease could not be read

	unreadable *metrics.Counter
	drops      *metrics.Counter
	silences   *metrics.Counter
	roundTrip  *metrics.Histogram
}

// NewRedisStore returns a store on that client. It does not dial.
func NewRedisStore(client redis.UniversalClient, opts RedisOptions) *RedisStore {
	if opts.Log == nil {
		opts.Log = zap.NewNop()
	}
	if opts.Metrics == nil {
		opts.Metrics = metrics.NewSet()
	}
	return &RedisStore{
		client:     client,
		log:        opts.Log,
		damaged:    make(map[string]bool),
		unreadable: opts.Metrics.GetOrCreateCounter("sluice_routing_unreadable_records_total"),
		drops:      opts.Metrics.GetOrCreateCounter(`sluice_routing_watch_lost_total{reason="drop"}`),
		silences:   opts.Metrics.GetOrCreateCounter(`sluice_routing_watch_lost_total{reason="silence"}`),
		roundTrip:  opts.Metrics.GetOrCreateHistogram("sluice_routing_heartbeat_seconds"),
	}
}

// PutRoute implements Store.
func (s *RedisStore) PutRoute(ctx context.Context, r Route) error {
	value, err := json.Marshal(r)
	if err != nil {
		return marshalError(err)
	}
	generation := strconv.FormatUint(r.Generation, 10)
	index := []string{nodeRoutesKeyPrefix + r.Node}
	if err := indexScript.Run(ctx, s.client, index, r.Sandbox, generation, time.Now().Unix()).Err(); err != nil {
		return unavailable("index route", err)
	}
	expiry := int64(0)
	if at := routeExpiry(r); !at.IsZero() {
		expiry = at.UnixMilli()
	}
	keys := []string{routeKeyPrefix + r.Sandbox}
	written, err := putRouteScript.Run(ctx, s.client, keys, generation, value, expiry, changesChannel, routeMessage+r.Sandbox).Int()
	if err != nil {
		return unavailable("put route", err)
	}
	if written == 0 {
		return errLowerGeneration(r)
	}
	return nil
}

// DeleteRoute implements Store. The index entry stays when the route was not this generation's; RoutesOf clears it.
func (s *RedisStore) DeleteRoute(ctx context.Context, sandbox string, generation uint64) error {
	node := ""
	switch r, err := s.Route(ctx, sandbox); {
	case err == nil:
		node = r.Node
	case errs.CodeOf(err) == errs.Unavailable:
		return err
	}
	tombstone, err := json.Marshal(routeJSON{Version: RouteVersion, Generation: generation, Gone: true})
	if err != nil {
		return fmt.Errorf("encode tombstone: %w", err)
	}
	gen := strconv.FormatUint(generation, 10)
	keys := []string{routeKeyPrefix + sandbox}
	deleted, err := deleteRouteScript.Run(ctx, s.client, keys, gen, tombstone, TombstoneFor.Milliseconds(), changesChannel, routeMessage+sandbox).Int()
	if err != nil {
		return unavailable("delete route", err)
	}
	if deleted == 0 || node == "" {
		return nil
	}
	if err := unindexScript.Run(ctx, s.client, []string{nodeRoutesKeyPrefix + node}, sandbox, gen).Err(); err != nil {
		return unavailable("unindex route", err)
	}
	return nil
}

// Route implements Store.
func (s *RedisStore) Route(ctx context.Context, sandbox string) (Route, error) {
	value, err := s.client.Get(ctx, routeKeyPrefix+sandbox).Bytes()
	if errors.Is(err, redis.Nil) {
		return Route{}, errNoRoute(sandbox)
	}
	if err != nil {
		return Route{}, unavailable("read route", err)
	}
	r, err := s.decodeRoute(sandbox, value)
	if errors.Is(err, errGone) {
		return Route{}, errNoRoute(sandbox)
	}
	return r, err
}

func (s *RedisStore) decodeRoute(sandbox string, value []byte) (Route, error) {
	var r Route
	err := json.Unmarshal(value, &r)
	if err == nil && r.Sandbox != sandbox {
		err = fmt.Errorf("the record names sandbox %q", r.Sandbox)
	}
	if err != nil && !errors.Is(err, errGone) {
		s.unreadable.Inc()
	}
	if err != nil {
		return Route{}, fmt.Errorf("decode route of sandbox %q: %w", sandbox, err)
	}
	return r, nil
}

// RoutesOf implements Store. A record that this build cannot read is logged and left out: it must not keep a node from starting.
func (s *RedisStore) RoutesOf(ctx context.Context, node string) ([]Route, error) {
	index := nodeRoutesKeyPrefix + node
	entries, err := s.client.HGetAll(ctx, index).Result()
	if err != nil {
		return nil, unavailable("list routes", err)
	}
	values, err := s.getAll(ctx, routeKeyPrefix, maps.Keys(entries))
	if err != nil {
		return nil, unavailable("list routes", err)
	}
	var routes []Route
	for sandbox, entry := range entries {
		r, err := s.decodeRoute(sandbox, values[sandbox])
		switch {
		case values[sandbox] != nil && err == nil && r.Node == node:
			routes = append(routes, r)
		case values[sandbox] != nil && err != nil && !errors.Is(err, errGone):
			s.log.Error("route record is unreadable", zap.String("sandbox", sandbox), zap.Error(err))
		default:
			if err := s.clearIndex(ctx, index, sandbox, entry); err != nil {
				return nil, unavailable("clear index", err)
			}
		}
	}
	return routes, nil
}

// clearIndex removes an entry that leads nowhere, if it is old and nobody has renewed it meanwhile.
func (s *RedisStore) clearIndex(ctx context.Context, index, sandbox, entry string) error {
	var generation string
	var written int64
	if _, err := fmt.Sscanf(entry, "%s %d", &generation, &written); err == nil && time.Since(time.Unix(written, 0)) < indexGrace {
		return nil
	}
	return unindexScript.Run(ctx, s.client, []string{index}, sandbox, generation).Err()
}

// getAll reads many keys in one round trip per server; absent ones are absent from the result. A key of another type is as good as
// an empty record, which cannot be decoded: one such must not hide all others.
func (s *RedisStore) getAll(ctx context.Context, prefix string, ids func(yield func(string) bool)) (map[string][]byte, error) {
	pipe := s.client.Pipeline()
	reads := make(map[string]*redis.StringCmd)
	for id := range ids {
		reads[id] = pipe.Get(ctx, prefix+id)
	}
	if len(reads) == 0 {
		return nil, nil
	}
	if _, err := pipe.Exec(ctx); err != nil {
		if _, answered := errors.AsType[redis.Error](err); !answered {
			return nil, err
		}
	}
	values := make(map[string][]byte, len(reads))
	for id, read := range reads {
		value, err := read.Bytes()
		switch {
		case errors.Is(err, redis.Nil):
			continue
		case redis.HasErrorPrefix(err, "WRONGTYPE"):
			value = []byte{}
		case err != nil:
			return nil, err
		}
		values[id] = value
	}
	return values, nil
}

// PutNode implements Store.
func (s *RedisStore) PutNode(ctx context.Context, n Node, ttl time.Duration) error {
	if err := checkLease(n, ttl); err != nil {
		return err
	}
	value, err := json.Marshal(n)
	if err != nil {
		return marshalError(err)
	}
	if err := s.client.SAdd(ctx, nodesKey, n.ID).Err(); err != nil {
		return unavailable("index node", err)
	}
	keys := []string{nodeKeyPrefix + n.ID}
	if err := putNodeScript.Run(ctx, s.client, keys, value, ttl.Milliseconds(), changesChannel, nodeMessage+n.ID).Err(); err != nil {
		return unavailable("put node", err)
	}
	return nil
}

// DeleteNode implements Store.
func (s *RedisStore) DeleteNode(ctx context.Context, id string) error {
	if err := deleteNodeScript.Run(ctx, s.client, []string{nodeKeyPrefix + id}, changesChannel, nodeMessage+id).Err(); err != nil {
		return unavailable("delete node", err)
	}
	if err := s.client.SRem(ctx, nodesKey, id).Err(); err != nil {
		return unavailable("unindex node", err)
	}
	return nil
}

// Node implements Store.
func (s *RedisStore) Node(ctx context.Context, id string) (Node, error) {
	value, err := s.client.Get(ctx, nodeKeyPrefix+id).Bytes()
	if errors.Is(err, redis.Nil) {
		return Node{}, errNoNode(id)
	}
	if err != nil {
		return Node{}, unavailable("read node", err)
	}
	var n Node
	if err := json.Unmarshal(value, &n); err != nil {
		s.unreadable.Inc()
		return Node{}, fmt.Errorf("decode lease of node %q: %w", id, err)
	}
	return n, nil
}

// Nodes implements Store. Ids whose lease ran out stay in the set until DeleteNode: a set that is pruned by readers can
// lose a node that is just renewing, and there are never many.
func (s *RedisStore) Nodes(ctx context.Context) ([]Node, error) {
	ids, err := s.client.SMembers(ctx, nodesKey).Result()
	if err != nil {
		return nil, unavailable("list nodes", err)
	}
	values, err := s.getAll(ctx, nodeKeyPrefix, func(yield func(string) bool) {
		for _, id := range ids {
			if !yield(id) {
				return
			}
		}
	})
	if err != nil {
		return nil, unavailable("list nodes", err)
	}
	nodes := make([]Node, 0, len(values))
	for id, value := range values {
		var n Node
		if err := json.Unmarshal(value, &n); err != nil {
			s.unreadable.Inc()
			if s.noteLease(id, false) {
				s.log.Error("lease record is unreadable, the node is left out", zap.String("node", id), zap.Error(err))
			}
			continue
		}
		if s.noteLease(id, true) {
			s.log.Info("lease record is readable again", zap.String("node", id))
		}
		nodes = append(nodes, n)
	}
	return nodes, nil
}

// noteLease tells whether that is news: the leases are read every second, and a damaged one stays until somebody looks.
func (s *RedisStore) noteLease(id string, readable bool) (news bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.damaged[id] != readable {
		return false
	}
	if readable {
		delete(s.damaged, id)
	} else {
		s.damaged[id] = true
	}
	return true
}

// unavailable wraps whatever kept the store from answering, a context that ended included.
func unavailable(doing string, err error) error {
	return &errs.Error{Code: errs.Unavailable, Msg: "the route store does not answer", Err: fmt.Errorf("%s: %w", doing, err)}
}

// marshalError takes the validation error out of encoding/json's wrapping.
func marshalError(err error) error {
	if coded, ok := errors.AsType[*errs.Error](err); ok {
		return coded
	}
	return fmt.Errorf("encode record: %w", err)
}

// routeExpiry is when the store may forget a route by itself; zero means never.
func routeExpiry(r Route) time.Time {
	if r.State == Paused || r.EndAt.IsZero() {
		return time.Time{}
	}
	return r.EndAt.Add(RouteExpiryMargin)
}

// canonical is what a route looks like after it was stored and read; it shares no map with r.
func canonical(r Route) Route {
	r.Version = RouteVersion
	if !r.EndAt.IsZero() {
		r.EndAt = time.UnixMilli(r.EndAt.UnixMilli()).UTC()
	}
	if len(r.Ports) == 0 {
		r.Ports = nil
	}
	r.Ports = maps.Clone(r.Ports)
	return r
}

func checkLease(n Node, ttl time.Duration) error {
	if ttl < time.Millisecond {
		return errs.New(errs.Invalid, "lease of node %q for %v", n.ID, ttl)
	}
	return n.validate()
}
