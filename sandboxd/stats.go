package sandboxd

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

// stats are the counters of one manager.
type stats struct {
	created, createFailed, adopted, strangers, removeFailed      *metrics.Counter
	publishFailed, withdrawFailed, announceFailed, samplesFailed *metrics.Counter
	adoptedMute, resetSlow, recordFailed, samplesPanicked        *metrics.Counter
	hostBroken, prepareFailed                                    *metrics.Counter

	paused, pauseFailed, resumed, resumedMute, resumeFailed, woken *metrics.Counter
	snapshots, snapshotFailed                                      *metrics.Counter

	set     *metrics.Set
	removed *metrics.Histogram
	gone    map[GoneReason]*metrics.Counter
	opens   map[link.Verdict]*metrics.Counter
	wakes   map[link.Verdict]*metrics.Counter

	createPhase, pausePhase, resumePhase, snapshotPhase map[Step]*metrics.Histogram
}

// newStats registers the counters, and gauges that ask m.
func newStats(set *metrics.Set, m *Manager) *stats {
	s := &stats{
		set:             set,
		removed:         set.GetOrCreateHistogram("sluice_sandboxd_remove_seconds"),
		created:         set.GetOrCreateCounter("sluice_sandboxd_created_total"),
		createFailed:    set.GetOrCreateCounter("sluice_sandboxd_create_failures_total"),
		adopted:         set.GetOrCreateCounter("sluice_sandboxd_adopted_total"),
		recordFailed:    set.GetOrCreateCounter("sluice_sandboxd_record_failures_total"),
		hostBroken:      set.GetOrCreateCounter("sluice_sandboxd_host_broken_total"), // looks, not losses
		resetSlow:       set.GetOrCreateCounter("sluice_sandboxd_slow_resets_total"),
		adoptedMute:     set.GetOrCreateCounter("sluice_sandboxd_adopted_mute_total"),
		strangers:       set.GetOrCreateCounter("sluice_sandboxd_strangers_removed_total"),
		removeFailed:    set.GetOrCreateCounter("sluice_sandboxd_remove_failures_total"),
		publishFailed:   set.GetOrCreateCounter("sluice_sandboxd_publish_failures_total"),
		withdrawFailed:  set.GetOrCreateCounter("sluice_sandboxd_withdraw_failures_total"),
		announceFailed:  set.GetOrCreateCounter("sluice_sandboxd_announce_failures_total"),
		samplesPanicked: set.GetOrCreateCounter("sluice_sandboxd_sample_panics_total"),
		samplesFailed:   set.GetOrCreateCounter("sluice_sandboxd_sample_failures_total"),
		gone:            make(map[GoneReason]*metrics.Counter),
		opens:           make(map[link.Verdict]*metrics.Counter),
		wakes:           make(map[link.Verdict]*metrics.Counter),
		prepareFailed:   set.GetOrCreateCounter("sluice_sandboxd_prepare_failures_total"),
		paused:          set.GetOrCreateCounter("sluice_sandboxd_paused_total"),
		pauseFailed:     set.GetOrCreateCounter("sluice_sandboxd_pause_failures_total"),
		resumed:         set.GetOrCreateCounter("sluice_sandboxd_resumed_total"),
		resumedMute:     set.GetOrCreateCounter("sluice_sandboxd_resumed_mute_total"),
		resumeFailed:    set.GetOrCreateCounter("sluice_sandboxd_resume_failures_total"),
		woken:           set.GetOrCreateCounter("sluice_sandboxd_woken_total"), // resumes that traffic began
		snapshots:       set.GetOrCreateCounter("sluice_sandboxd_snapshots_made_total"),
		snapshotFailed:  set.GetOrCreateCounter("sluice_sandboxd_snapshot_failures_total"),
		createPhase:     phases(set, "create", createSteps),
		pausePhase:      phases(set, "pause", pauseSteps),
		resumePhase:     phases(set, "resume", resumeSteps),
		snapshotPhase:   phases(set, "snapshot", snapshotSteps),
	}
	for _, reason := range goneReasons {
		s.gone[reason] = set.GetOrCreateCounter(fmt.Sprintf("sluice_sandboxd_gone_total{reason=%q}", reason))
	}
	for v := link.Open; v <= link.Busy; v++ {
		s.opens[v] = set.GetOrCreateCounter(fmt.Sprintf("sluice_sandboxd_opens_total{verdict=%q}", v))
		s.wakes[v] = set.GetOrCreateCounter(fmt.Sprintf("sluice_sandboxd_wakes_total{verdict=%q}", v))
	}
	for _, state := range states {
		set.GetOrCreateGauge(fmt.Sprintf("sluice_sandboxd_sandboxes{state=%q}", state), func() float64 { return float64(m.countIn(state)) })
	}
	for _, use := range []slotUse{slotReady, slotUsed, slotResting} {
		set.GetOrCreateGauge(fmt.Sprintf("sluice_sandboxd_slots{state=%q}", use), func() float64 { return float64(m.slots.count(use)) })
	}
	set.GetOrCreateGauge("sluice_sandboxd_snapshots", func() float64 { n, _ := m.snapshots.total(); return float64(n) })
	set.GetOrCreateGauge("sluice_sandboxd_snapshot_bytes", func() float64 { _, bytes := m.snapshots.total(); return float64(bytes) })
	return s
}

// phases are the histograms of what consists of steps.
func phases(set *metrics.Set, of string, steps []Step) map[Step]*metrics.Histogram {
	all := make(map[Step]*metrics.Histogram)
	for _, step := range steps {
		all[step] = set.GetOrCreateHistogram(fmt.Sprintf("sluice_sandboxd_%s_seconds{phase=%q}", of, step))
	}
	return all
}

func (m *Manager) countIn(state State) (n int) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, l := range m.lives {
		if l.rec.Sandbox.State == state {
			n++
		}
	}
	return n
}

func (s *stats) opened(v link.Verdict) { s.opens[v].Inc() }

// reporter returns a function that is told after each step of one create, pause, resume or snapshot, and records how long it took.
func (m *Manager) reporter(phases map[Step]*metrics.Histogram) func(Step) {
	last := time.Now()
	return func(step Step) {
		now := time.Now()
		if h := phases[step]; h != nil {
			h.Update(now.Sub(last).Seconds())
		}
		last = now
		m.reached(step)
	}
}

const (
	sampleInterval = 5 * time.Second
	sampleTime     = time.Second
	samplesKept    = 720 // one hour
	muteAfter      = time.Minute
)

// samples is a ring of the last hour. It grows as it fills: most sandboxes live for minutes.
type samples struct {
	ring []Metrics
	next int // where the oldest is, once the ring is full
}

func (s *samples) add(m Metrics) {
	if len(s.ring) < samplesKept {
		s.ring = append(s.ring, m)
		return
	}
	s.ring[s.next] = m
	s.next = (s.next + 1) % samplesKept
}

// all returns a copy, the oldest first.
func (s *samples) all() []Metrics {
	return append(append(make([]Metrics, 0, len(s.ring)), s.ring[s.next:]...), s.ring[:s.next]...)
}

// refused counts what was turned away since the last time, over all sandboxes.
func (s *stats) refused(before, after egress.Refusals) {
	last := before.Reasons()
	for reason, n := range after.Reasons() {
		if n > last[reason] {
			s.set.GetOrCreateCounter(fmt.Sprintf("sluice_sandboxd_egress_refused_total{reason=%q}", reason)).Add(int(n - last[reason]))
		}
	}
}

// countRefusals brings the sandbox's count of refused packets up to date.
func (m *Manager) countRefusals(l *life) {
	m.mu.RLock()
	instance, generation := l.instance, l.generation
	m.mu.RUnlock()
	if instance == nil {
		return
	}
	now, err := instance.Refusals()
	if err != nil {
		if ce := l.log.Check(zap.DebugLevel, "egress counters not read"); ce != nil {
			ce.Write(zap.Error(err))
		}
		return
	}
	m.mu.Lock()
	if l.generation != generation { // paused meanwhile, and resumed with counters that begin anew
		m.mu.Unlock()
		return
	}
	before := l.refused
	if total(now) < total(before) { // somebody who read later was faster
		now = before
	}
	l.refused = now
	m.mu.Unlock()
	m.stats.refused(before, now)
}

func total(r egress.Refusals) (n uint64) {
	for _, count := range r.Reasons() {
		n += count
	}
	return n
}

// Refusals returns how many packets of a sandbox its egress rules have turned away, by reason. It reads the kernel's counters.
func (m *Manager) Refusals(id string) (egress.Refusals, error) {
	l, err := m.running(id)
	if err != nil {
		return egress.Refusals{}, err
	}
	m.countRefusals(l)
	m.mu.RLock()
	defer m.mu.RUnlock()
	return l.refused, nil
}

// sample asks the guest once. What it answers is the word of hostile code: it is shown to its own tenant and used for nothing.
func (m *Manager) sample(up context.Context, l *life, instance Instance) error {
	m.countRefusals(l)
	got, err := m.askMetrics(up, l, instance)
	if err != nil {
		m.stats.samplesFailed.Inc()
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if up.Err() == nil { // a paused sandbox keeps none
		l.samples.add(metricsOf(got, now()))
	}
	return nil
}

// askMetrics survives a panic, which nothing else here does. Elsewhere a panic means that an invariant of ours is broken, and the
// node is better off starting anew. Here it would mean that a library did not stand what a guest sent: nothing of ours is touched
// before the answer is whole, so there is nothing to distrust, and one guest could end the node of all others every five seconds.
func (m *Manager) askMetrics(up context.Context, l *life, instance Instance) (got guest.Metrics, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v", cause)
			m.stats.samplesPanicked.Inc()
			l.log.Error("panic while asking a guest for what it uses", zap.Error(err), zap.Stack("stack"))
		}
	}()
	ctx, cancel := context.WithTimeout(up, sampleTime)
	defer cancel()
	return instance.Metrics(ctx)
}

// silence is how long a guest has not answered. Once in each it is said, because a sandbox without metrics surprises its owner.
type silence struct {
	last   time.Time // of the answer before; the begin when there was none
	missed int
	said   bool
}

// note takes the outcome of one sample; it returns what to say, if anything.
func (s *silence) note(at time.Time, err error) error {
	if err == nil {
		*s = silence{last: at}
		return nil
	}
	s.missed++
	if s.said || at.Sub(s.last) < muteAfter {
		return nil
	}
	s.said = true
	return fmt.Errorf("%d samples missed since %s: %w", s.missed, s.last.UTC().Format(time.RFC3339), err)
}

// metricsOf takes over a guest's figures with our own time, and without those that no encoder accepts.
func metricsOf(g guest.Metrics, at time.Time) Metrics {
	cpu := g.CPUUsedPct
	if math.IsNaN(cpu) || math.IsInf(cpu, 0) {
		cpu = 0
	}
	amount := func(n int64) uint64 { return uint64(max(n, 0)) }
	return Metrics{
		Time:       at,
		CPUCount:   max(g.CPUCount, 0),
		CPUUsedPct: max(cpu, 0),
		MemUsed:    amount(g.MemUsed),
		MemTotal:   amount(g.MemTotal),
		MemCache:   amount(g.MemCache),
		DiskUsed:   amount(g.DiskUsed),
		DiskTotal:  amount(g.DiskTotal),
	}
}

// Metrics returns the samples of the last hour, the oldest first. Right after create there are none.
func (m *Manager) Metrics(_ context.Context, id string) ([]Metrics, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	l, err := m.shown(id)
	if err != nil {
		return nil, err
	}
	return l.samples.all(), nil
}
