package proxy

import (
	"fmt"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// stats are the package's counters.
type stats struct {
	conns    *metrics.Counter // open client connections
	requests *metrics.Counter
	inFlight *metrics.Counter
	tunnels  *metrics.Counter // open upgraded connections
	answers  [6]*metrics.Counter
	reasons  [reasonCount]*metrics.Counter
	retries  *metrics.Counter
	rerouted *metrics.Counter
	panics   *metrics.Counter
	waiting  *metrics.Counter            // requests that wait for a sandbox to be woken
	wakes    map[Reason]*metrics.Counter // never written after newStats; reasonNone: the sandbox runs
	wakeTime *metrics.Histogram          // of those
}

func newStats(set *metrics.Set) *stats {
	if set == nil {
		set = metrics.NewSet()
	}
	s := &stats{
		conns:    set.GetOrCreateCounter("sluice_proxy_connections"),
		requests: set.GetOrCreateCounter("sluice_proxy_requests_total"),
		inFlight: set.GetOrCreateCounter("sluice_proxy_requests_in_flight"),
		tunnels:  set.GetOrCreateCounter("sluice_proxy_tunnels"),
		retries:  set.GetOrCreateCounter("sluice_proxy_retries_total"),
		rerouted: set.GetOrCreateCounter("sluice_proxy_rerouted_total"),
		panics:   set.GetOrCreateCounter("sluice_proxy_panics_total"),
		waiting:  set.GetOrCreateCounter("sluice_proxy_wake_waiting"),
		wakeTime: set.GetOrCreateHistogram("sluice_proxy_wake_seconds"),
		wakes:    make(map[Reason]*metrics.Counter),
	}
	for _, r := range [...]Reason{reasonNone, ReasonNotFound, ReasonTransitioning, ReasonNodeRefused, ReasonDialFailed, ReasonPanic} {
		result := r.String()
		if r == reasonNone {
			result = "woken"
		}
		s.wakes[r] = set.GetOrCreateCounter(fmt.Sprintf(`sluice_proxy_wakes_total{result=%q}`, result))
	}
	for i := 1; i < len(s.answers); i++ {
		s.answers[i] = set.GetOrCreateCounter(fmt.Sprintf(`sluice_proxy_answers_total{class="%dxx"}`, i))
	}
	for r := reasonNone + 1; r < reasonCount; r++ {
		s.reasons[r] = set.GetOrCreateCounter(fmt.Sprintf(`sluice_proxy_refusals_total{reason=%q}`, r))
	}
	return s
}

// refused counts a request that the edge ended.
func (s *stats) refused(r Reason) { s.reasons[r].Inc() }

// woke counts a wake, which any number of requests may have waited for.
func (s *stats) woke(r Reason, took time.Duration) {
	s.wakes[r].Inc()
	if r == reasonNone {
		s.wakeTime.Update(took.Seconds())
	}
}

// answered counts an answer that a sandbox gave.
func (s *stats) answered(status int) {
	if class := status / 100; class < len(s.answers) {
		s.answers[class].Inc()
	}
}

// load counts requests per sandbox lifecycle.
type load struct {
	limit  int // negative: none
	shards [64]loadShard
}

type loadShard struct {
	mu     sync.Mutex // guards counts
	counts map[life]int
	_      [40]byte // shards do not share a cache line
}

type life struct {
	sandbox    string
	generation uint64
}

func (l *load) init(limit int) {
	l.limit = limit
	for i := range l.shards {
		l.shards[i].counts = make(map[life]int)
	}
}

func (l *load) shard(of life) *loadShard {
	return &l.shards[of.generation%uint64(len(l.shards))]
}

// acquire counts a request in, and reports false when the sandbox has its fill.
func (l *load) acquire(of life) bool {
	if l.limit < 0 {
		return true
	}
	s := l.shard(of)
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.counts[of]
	if n >= l.limit {
		return false
	}
	s.counts[of] = n + 1
	return true
}

func (l *load) release(of life) {
	if l.limit < 0 {
		return
	}
	s := l.shard(of)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.counts[of]; n > 1 {
		s.counts[of] = n - 1
	} else {
		delete(s.counts, of)
	}
}
