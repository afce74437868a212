package sandboxd

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	refreshMin = 15 * time.Second // the contract's bounds of one refresh
	refreshMax = time.Hour

	// deadlineLookAgain bounds the sleep until the next deadline, so that a wall clock which was set is noticed.
	deadlineLookAgain = 10 * time.Second
)

// SetTimeout moves the end of a sandbox to d from now, earlier or later; the longest life from its start is not exceeded. Nothing
// or less ends it at once.
func (m *Manager) SetTimeout(ctx context.Context, id string, d time.Duration) error {
	_, err := m.moveEnd(ctx, id, func(_ Sandbox, now time.Time) time.Time { return now.Add(max(d, 0)) })
	return err
}

// Refresh moves the end of a sandbox to d from now, at least to the contract's minimum, if that is later than it was.
func (m *Manager) Refresh(ctx context.Context, id string, d time.Duration) error {
	if d > refreshMax {
		return errs.New(errs.Invalid, "duration cannot be greater than %d seconds", int(refreshMax/time.Second))
	}
	_, err := m.moveEnd(ctx, id, extendTo(max(d, refreshMin)))
	return err
}

func extendTo(d time.Duration) func(Sandbox, time.Time) time.Time {
	return func(sb Sandbox, now time.Time) time.Time {
		if end := now.Add(d); end.After(sb.EndAt) {
			return end
		}
		return sb.EndAt
	}
}

// moveEnd sets the deadline that choose returns. The record comes first: what the caller was told survives a crash. An earlier end
// holds even when it cannot be recorded, a later one does not. The route follows, and when the catalogue does not answer, the
// routes job brings it up to date.
func (m *Manager) moveEnd(ctx context.Context, id string, choose func(Sandbox, time.Time) time.Time) (Sandbox, error) {
	l, end, err := m.begin(ctx, id)
	if err != nil {
		return Sandbox{}, err
	}
	defer end()
	ctx, cancel := l.within(ctx)
	defer cancel()
	rec := m.record(l)
	endAt := choose(rec.Sandbox, now())
	if latest := rec.Sandbox.StartedAt.Add(m.opts.MaxTimeout); endAt.After(latest) {
		endAt = latest
	}
	if endAt.Equal(rec.Sandbox.EndAt) {
		return rec.Sandbox, nil
	}
	earlier := endAt.Before(rec.Sandbox.EndAt)
	rec.Sandbox.EndAt = endAt
	writeErr := m.journal.update(rec)
	if writeErr != nil && !earlier {
		return Sandbox{}, writeErr
	}
	if !m.setRecord(l, rec) {
		return Sandbox{}, inTransition(id, StateKilling)
	}
	poke(m.endMoved)
	if err := m.publish(ctx, l, rec.Sandbox); err != nil {
		l.log.Warn("route not updated, will be tried again", zap.Error(err))
		poke(m.misrouted)
	}
	if writeErr != nil {
		return Sandbox{}, m.enforced(l, writeErr)
	}
	return rec.Sandbox, nil
}

// checkTimeout judges the length of life that a client asks for.
func (m *Manager) checkTimeout(d time.Duration) error {
	if d <= 0 {
		return errs.New(errs.Invalid, "Timeout must be greater than 0")
	}
	if d > m.opts.MaxTimeout {
		return errs.New(errs.Invalid, "Timeout cannot be greater than %g hours", m.opts.MaxTimeout.Hours())
	}
	return nil
}

// keepDeadlines kills or pauses every sandbox whose time has come.
func (m *Manager) keepDeadlines(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.endMoved:
		case <-timer.C:
		}
		timer.Reset(min(m.expire(time.Now()), deadlineLookAgain))
	}
}

// expire ends the run of the sandboxes past their end and returns how long it is until the next one.
func (m *Manager) expire(now time.Time) (next time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next = deadlineLookAgain
	for _, l := range m.lives {
		if l.rec.Sandbox.State != StateRunning {
			continue
		}
		left := l.rec.Sandbox.EndAt.Sub(now)
		if left <= 0 {
			left = m.endLocked(l, now)
		}
		next = min(next, left)
	}
	return next
}

// poke wakes the one receiver of a channel of capacity 1; it is enough to be woken once.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
