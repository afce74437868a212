package link

import (
	"fmt"

	"github.com/VictoriaMetrics/metrics"
)

// rejectReason says why a peer was closed without a verdict.
type rejectReason uint8

const (
	rejectTimeout   rejectReason = iota // no whole header in time
	rejectClosed                        // the peer went away first
	rejectMalformed                     // not our header
	rejectMAC                           // not authentic
	rejectReplay                        // authentic, and seen before
	rejectTLS                           // the TLS handshake failed
	rejectEvicted                       // too many peers were silent, this one for the longest time
	rejectReasons
)

var rejectNames = [rejectReasons]string{"timeout", "closed", "malformed", "mac", "replay", "tls", "evicted"}

// resetReason says why a spliced connection was reset.
type resetReason uint8

const (
	resetLifecycle resetReason = iota // Server.Reset
	resetPeer                         // one end reset or failed, and the other is told
	resetHalfOpen                     // one end was finished, and the other silent for too long
	resetReasons
)

var resetNames = [resetReasons]string{"lifecycle", "peer", "half_open"}

// discardReason says why a connection did not stay in the pool.
type discardReason uint8

const (
	discardCaller discardReason = iota // Conn.Discard or Close
	discardClosed                      // the guest or the node closed it while it was idle
	discardPoison                      // bytes came that nobody asked for
	discardIdle                        // unused for too long
	discardFull                        // the pool or the key is full; the oldest goes
	discardForgot                      // Pool.Forget, or the pool has stopped
	discardReasons
)

var discardNames = [discardReasons]string{"caller", "closed", "poison", "idle", "full", "forgotten"}

type serverMetrics struct {
	open         *metrics.Gauge
	verdicts     [Busy + 1]*metrics.Counter
	waking       *metrics.Gauge
	wakes        [Busy + 1]*metrics.Counter // by what the edge was told: WrongGeneration when it was woken
	rejects      [rejectReasons]*metrics.Counter
	resets       [resetReasons]*metrics.Counter
	acceptErrors *metrics.Counter
	toGuest      *metrics.Counter
	toEdge       *metrics.Counter
}

func newServerMetrics(set *metrics.Set) *serverMetrics {
	if set == nil {
		set = metrics.NewSet()
	}
	m := &serverMetrics{
		open:         set.GetOrCreateGauge("sluice_link_connections", nil),
		waking:       set.GetOrCreateGauge("sluice_link_waking", nil),
		acceptErrors: set.GetOrCreateCounter("sluice_link_accept_errors_total"),
		toGuest:      set.GetOrCreateCounter(`sluice_link_bytes_total{to="guest"}`),
		toEdge:       set.GetOrCreateCounter(`sluice_link_bytes_total{to="edge"}`),
	}
	for v := Open; v <= Busy; v++ {
		m.verdicts[v] = set.GetOrCreateCounter(fmt.Sprintf("sluice_link_verdicts_total{verdict=%q}", v))
	}
	for v := NotHere; v <= Busy; v++ {
		m.wakes[v] = set.GetOrCreateCounter(fmt.Sprintf("sluice_link_wakes_total{verdict=%q}", v))
	}
	for i, name := range rejectNames {
		m.rejects[i] = set.GetOrCreateCounter(fmt.Sprintf("sluice_link_rejects_total{reason=%q}", name))
	}
	for i, name := range resetNames {
		m.resets[i] = set.GetOrCreateCounter(fmt.Sprintf("sluice_link_resets_total{reason=%q}", name))
	}
	return m
}

type poolMetrics struct {
	idle         *metrics.Gauge
	hits, misses *metrics.Counter
	dialErrors   *metrics.Counter
	verdicts     [Busy + 1]*metrics.Counter // Open is never counted: a miss that was no error
	discards     [discardReasons]*metrics.Counter
}

func newPoolMetrics(set *metrics.Set) *poolMetrics {
	if set == nil {
		set = metrics.NewSet()
	}
	m := &poolMetrics{
		idle:       set.GetOrCreateGauge("sluice_link_pool_idle", nil),
		hits:       set.GetOrCreateCounter("sluice_link_pool_hits_total"),
		misses:     set.GetOrCreateCounter("sluice_link_pool_misses_total"),
		dialErrors: set.GetOrCreateCounter("sluice_link_pool_dial_errors_total"),
	}
	for v := NotHere; v <= Busy; v++ {
		m.verdicts[v] = set.GetOrCreateCounter(fmt.Sprintf("sluice_link_pool_verdicts_total{verdict=%q}", v))
	}
	for i, name := range discardNames {
		m.discards[i] = set.GetOrCreateCounter(fmt.Sprintf("sluice_link_pool_discards_total{reason=%q}", name))
	}
	return m
}
