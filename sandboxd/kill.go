package sandboxd

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Kill ends a sandbox and returns when nothing of it is left. A sandbox that is being created or killed already is waited for. The
// removal goes on when ctx ends first.
func (m *Manager) Kill(ctx context.Context, id string) error {
	leave, err := m.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	m.mu.Lock()
	l, ok := m.lives[id]
	if ok {
		m.condemnLocked(l, GoneKilled)
	}
	m.mu.Unlock()
	if !ok {
		return notFound(id)
	}
	select {
	case <-l.buried:
		return l.buryErr
	case <-ctx.Done():
		return &errs.Error{Code: errs.Unavailable, Msg: "the sandbox is still being killed", Err: ctx.Err()}
	}
}

// condemn starts the end of a sandbox, whatever it is doing. The first reason counts.
func (m *Manager) condemn(l *life, reason GoneReason) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.condemnLocked(l, reason)
}

func (m *Manager) condemnLocked(l *life, reason GoneReason) {
	if l.condemned() {
		return
	}
	l.rec.Sandbox.State = StateKilling
	l.reason = reason
	l.cancel()
	m.jobs.Go(func() { m.bury(l) })
}

func (m *Manager) instanceOf(l *life) Instance {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return l.instance
}

func (m *Manager) reasonOf(l *life) GoneReason {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return l.reason
}

// Removal that fails is repeated with growing pauses: a slot and a directory that stay occupied are better than a sandbox that is
// forgotten. When the node stops, a few attempts must do; the record is there for the next start.
const (
	buryPause     = 200 * time.Millisecond
	buryPauseMax  = 30 * time.Second
	buryLastTries = 3
)

// bury removes a condemned sandbox and forgets it. It runs as the job of that sandbox.
func (m *Manager) bury(l *life) {
	l.turn <- struct{}{} // whoever has the turn sees l.ctx end
	defer l.endTurn()
	began, pause := time.Now(), buryPause
	for try := 1; ; try++ {
		err := m.remove(l)
		if try == 1 {
			l.buryErr = err
		}
		if err == nil {
			break
		}
		m.stats.removeFailed.Inc()
		l.log.Error("removal of sandbox incomplete", zap.Int("attempt", try), zap.Error(err))
		if try == 1 {
			close(l.buried)
		}
		if m.isClosing() && try >= buryLastTries {
			return
		}
		m.wait(context.Background(), pause, try < buryLastTries)
		pause = min(2*pause, buryPauseMax)
	}
	m.stats.removed.UpdateDuration(began)
	m.forget(l)
	if l.buryErr == nil {
		close(l.buried)
	}
}

// remove takes the steps of removal in their order. Each is idempotent.
func (m *Manager) remove(l *life) error {
	if l.routed {
		m.withdraw(l)
		m.resetLinks(l)
		m.reached(StepWithdrawn)
	}
	// A node that dies from here on must not take the sandbox up again. A full disk must not keep it alive either.
	rec := m.record(l)
	rec.Slot = l.place.Slot // a pause that has come as far as its record may not have given it back
	if err := m.journal.update(rec); ignoreAbsent(err) != nil {
		l.log.Warn("record of condemned sandbox not written", zap.Error(err))
	}
	m.reached(StepCondemned)
	m.countRefusals(l)
	ctx, cancel := context.WithTimeout(context.Background(), destroyTime)
	defer cancel()
	if err := m.machine.Destroy(ctx, l.place, m.reached); err != nil {
		return fmt.Errorf("destroy: %w", err)
	}
	if err := m.journal.remove(l.id); err != nil {
		return err
	}
	m.reached(StepErased)
	return nil
}

// resetLinks ends the connections of a sandbox before its process, so that clients see a reset and not an answer cut short. That
// order is a courtesy and the end of the sandbox is not: when a connection will not close, the process is killed all the same, which
// takes away what the connection was waiting for. The call then goes on without us; to wait for it in Run would only hang later.
func (m *Manager) resetLinks(l *life) {
	if l.reset == nil {
		done := make(chan struct{})
		l.reset = done
		go func() {
			defer close(done)
			m.opts.OnGone(l.id, l.generation)
		}()
	}
	wait := time.NewTimer(resetTime)
	defer wait.Stop()
	select {
	case <-l.reset:
	case <-wait.C:
		m.stats.resetSlow.Inc()
		l.log.Warn("connections not reset yet, removed without waiting further")
	}
}

// forget ends the life in memory; its slot rests.
func (m *Manager) forget(l *life) {
	if l.place.Slot != NoSlot {
		m.slots.release(l.place.Slot, time.Now())
	}
	m.mu.Lock()
	delete(m.lives, l.id)
	reason, refused := l.reason, l.refused
	m.mu.Unlock()
	m.stats.gone[reason].Inc()
	l.log.Info("sandbox gone", zap.String("reason", string(reason)), zap.Any("refused", refused))
}

// attend watches a running sandbox: it samples what the guest uses, and when the sandbox dies by itself sees to its end. It is the
// job of that lifecycle until it is paused or condemned, or the node stops.
func (m *Manager) attend(up context.Context, l *life, instance Instance) {
	tick := time.NewTicker(sampleInterval)
	defer tick.Stop()
	quiet := silence{last: time.Now()}
	for {
		select {
		case <-up.Done():
			return
		case <-m.closing:
			return
		case <-instance.Done():
			m.died(up, l, instance)
			return
		case <-tick.C:
			if err := quiet.note(time.Now(), m.sample(up, l, instance)); err != nil {
				l.log.Warn("guest does not answer", zap.Error(err))
			}
		}
	}
}

// died ends a sandbox whose process has ended by itself. One that is being paused is left to whoever pauses it: that ends it, too.
func (m *Manager) died(up context.Context, l *life, instance Instance) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if up.Err() != nil || l.rec.Sandbox.State != StateRunning {
		return
	}
	l.log.Warn("sandbox died by itself", zap.Error(instance.Err()))
	m.condemnLocked(l, GoneDied)
}

func (m *Manager) isClosing() bool {
	select {
	case <-m.closing:
		return true
	default:
		return false
	}
}

// wait returns after d, or when ctx ends; unless insist is set, not later than the node stops.
func (m *Manager) wait(ctx context.Context, d time.Duration, insist bool) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	closing := m.closing
	if insist {
		closing = nil
	}
	select {
	case <-timer.C:
	case <-closing:
	case <-ctx.Done():
	}
}
