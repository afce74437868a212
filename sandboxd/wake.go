package sandboxd

import (
	"context"
	"time"

	"github.com/sluice-edge/sluice/link"
)

const (
	// wakeTimeout is the least that a sandbox lives which was resumed by traffic; otherwise it is what it was created with.
	wakeTimeout = 5 * time.Minute
	// wakePause is how long a sandbox is left alone after a wake that failed: the next request is not far, and may be one of a thousand.
	wakePause = 2 * time.Second
)

// Wake resumes a paused sandbox because somebody wants to reach it, if it allows that, and returns when it runs. An error is always a
// *link.VerdictError. Afterwards it has another generation: who asked has to look for its route again. Who asks was judged by the edge,
// before it dialled.
//
// All who ask while a resume is under way wait for the same one. What was saved without memory is not woken: it boots anew, and only
// with credentials that the node does not keep.
func (m *Manager) Wake(ctx context.Context, sandbox string, generation uint64) error {
	verdict := m.wake(ctx, sandbox, generation)
	m.stats.wakes[verdict].Inc()
	if verdict == link.Open {
		return nil
	}
	return &link.VerdictError{Verdict: verdict}
}

func (m *Manager) wake(ctx context.Context, sandbox string, generation uint64) link.Verdict {
	if !m.isReady() {
		return link.Busy
	}
	leave, err := m.enter(ctx)
	if err != nil {
		return link.Busy
	}
	defer leave()
	l, r, verdict := m.reviveForTraffic(sandbox, generation)
	if r == nil {
		return verdict
	}
	if err := await(ctx, r, sandbox); err == nil {
		return link.Open
	}
	if l.ctx.Err() != nil {
		return link.NotHere
	}
	return link.Busy
}

// reviveForTraffic returns the resume to wait for, or the verdict where there is none.
func (m *Manager) reviveForTraffic(sandbox string, generation uint64) (*life, *revival, link.Verdict) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l, ok := m.lives[sandbox]
	switch {
	case !ok:
		return nil, nil, link.NotHere
	case l.generation != generation:
		return nil, nil, link.WrongGeneration
	}
	sb := l.rec.Sandbox
	switch sb.State {
	case StateRunning: // a pause that failed
		return nil, nil, link.Open
	case StatePausing, StatePaused, StateResuming:
	case StateAdopting:
		return nil, nil, link.Busy
	default:
		return nil, nil, link.NotHere
	}
	if !sb.AutoResume || !sb.MemorySaved && l.revival == nil {
		return nil, nil, link.NotHere
	}
	if l.revival == nil && time.Now().Before(l.wakeAfter) {
		return nil, nil, link.Busy
	}
	r, mine := m.reviveLocked(l, ConnectOptions{Timeout: min(max(sb.Timeout, wakeTimeout), m.opts.MaxTimeout)})
	if mine {
		m.stats.woken.Inc()
	}
	return l, r, link.Open
}
