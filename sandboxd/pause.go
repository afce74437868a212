package sandboxd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	// suspendTime bounds the saving of one sandbox: all its memory may have to be written, to a disk that others write to as well.
	suspendTime = 5 * time.Minute

	// A pause at the deadline that fails is tried again with growing pauses.
	atEndPause    = 5 * time.Second
	atEndPauseMax = 5 * time.Minute
	// atEndTries are made at least, before a sandbox that is older than MaxTimeout is killed instead.
	atEndTries = 3
	// atEndLook is how soon a sandbox at its deadline that is busy with a request is looked at again.
	atEndLook = time.Second
)

// Pause saves a running sandbox, with memory all that runs in it, without it the disk alone, and returns when nothing of it is on the
// host but its directory. It goes on when ctx ends first.
func (m *Manager) Pause(ctx context.Context, id string, keepMemory bool) error {
	l, end, err := m.begin(ctx, id)
	if err != nil {
		return err
	}
	s, ok := m.machine.(Suspender)
	if !ok {
		end()
		return m.cannotSave(id, "paused", "keep it alive with a longer timeout instead, or ")
	}
	paused := make(chan error, 1)
	go m.pauseAsked(s, l, keepMemory, end, paused)
	select {
	case err := <-paused:
		return err
	case <-ctx.Done():
		return &errs.Error{Code: errs.Unavailable, Msg: "the sandbox is still being paused", Err: ctx.Err()}
	}
}

// pauseAsked has the turn, which end gives back.
func (m *Manager) pauseAsked(s Suspender, l *life, keepMemory bool, end func(), paused chan<- error) {
	err := m.pauseInTurn(s, l, keepMemory)
	end()
	paused <- err
}

func (m *Manager) pauseInTurn(s Suspender, l *life, keepMemory bool) error {
	done, err := m.queue(l.ctx, m.saving, m.record(l).Sandbox.Team, "saved")
	if err != nil {
		return err
	}
	defer done()
	return m.pause(s, l, keepMemory)
}

// pause takes a running sandbox to its saved state, or leaves it running. The caller holds its turn, and a turn to save.
func (m *Manager) pause(s Suspender, l *life, keepMemory bool) error {
	began, running := time.Now(), m.record(l)
	reached := m.reporter(m.stats.pausePhase)
	if !m.enterState(l, StatePausing) {
		return inTransition(l.id, StateKilling)
	}
	if err := m.save(s, l, keepMemory, reached); err != nil {
		m.stats.pauseFailed.Inc()
		return m.runOn(l, running, err)
	}
	paused := running
	paused.Sandbox.MemorySaved = keepMemory
	if err := m.rest(l, paused, reached); err != nil {
		return err
	}
	m.stats.paused.Inc()
	l.log.Info("sandbox paused", zap.Bool("memory", keepMemory), zap.Duration("took", time.Since(began)))
	return nil
}

// save takes the steps until the sandbox is on disk. Edges stop sending before the guest stands still, and connections end with a reset:
// a guest that goes on hours later must not find a peer that believes in them.
func (m *Manager) save(s Suspender, l *life, keepMemory bool, reached func(Step)) error {
	m.mu.Lock()
	l.rec.Sandbox.MemorySaved = keepMemory // will be: so much the route says already
	rec := l.rec
	m.mu.Unlock()
	if err := m.journal.update(rec); err != nil {
		return err
	}
	reached(StepPausing)
	m.tryPublish(l)
	l.down()
	m.resetLinks(l)
	m.countRefusals(l)
	reached(StepHidden)
	ctx, cancel := context.WithTimeout(l.ctx, suspendTime)
	defer cancel()
	if err := s.Suspend(ctx, l.place, l.instance, keepMemory, reached); err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	return nil
}

// runOn takes back a pause that failed. It returns what its caller is told.
func (m *Manager) runOn(l *life, running record, cause error) error {
	select {
	case <-l.instance.Done():
		m.condemn(l, GoneDied)
		l.log.Warn("sandbox died while being paused", zap.Error(errors.Join(cause, l.instance.Err())))
		return inTransition(l.id, StateKilling)
	default:
	}
	l.reset = nil // what connects from here on is of a lifecycle that has not ended
	if err := m.journal.update(running); err != nil {
		m.owe(l)
	}
	if !m.adopt(l, running, l.instance) {
		return inTransition(l.id, StateKilling)
	}
	m.tryPublish(l)
	l.log.Warn("sandbox not paused, it runs on", zap.Error(cause))
	return saveError(cause, "Sandbox %q was not paused and runs on", l.id)
}

// saveError gives the failure of a machine that was saving a sandbox the meaning that its caller can use. what says how things are now.
func saveError(cause error, what string, id string) error {
	what = fmt.Sprintf(what, id)
	if isFull(cause) {
		return &errs.Error{Code: errs.Unavailable, Msg: "the disk of this node is full: " + what, Err: cause}
	}
	switch errs.CodeOf(cause) {
	case errs.Unavailable, errs.Exhausted:
		return cause
	}
	return &errs.Error{Code: errs.Internal, Msg: what, Err: cause}
}

// rest ends the stay on the host of a sandbox that is saved: it removes what its place has there, records it as paused, and gives back
// the slot. As in bury, what fails is repeated: a slot that stays occupied is better than one that is forgotten. A sandbox that is
// condemned meanwhile is left to its removal, and when the node stops the record as it is says enough to the next start.
func (m *Manager) rest(l *life, rec record, reached func(Step)) error {
	rec.Sandbox.State = StatePaused
	rec.Slot, rec.Handle, rec.Standing = NoSlot, nil, false
	pause := buryPause
	for try := 1; ; try++ {
		err := m.vacate(l, rec, reached)
		if l.ctx.Err() != nil {
			return inTransition(l.id, StateKilling)
		}
		if err == nil {
			break
		}
		m.stats.removeFailed.Inc()
		l.log.Error("paused sandbox not off the host yet", zap.Int("attempt", try), zap.Error(err))
		if m.isClosing() && try >= buryLastTries {
			return err
		}
		m.wait(l.ctx, pause, try < buryLastTries)
		pause = min(2*pause, buryPauseMax)
	}
	m.mu.Lock()
	if l.condemned() {
		m.mu.Unlock()
		return inTransition(l.id, StateKilling)
	}
	slot := l.place.Slot
	l.place.Slot = NoSlot
	l.rec = rec
	l.unrecorded = false
	l.instance, l.up, l.down = nil, nil, nil
	l.samples = samples{}
	m.mu.Unlock()
	m.slots.release(slot, time.Now())
	return nil
}

// vacate is one attempt. The record comes last: until then it names the slot, so that whatever exists is named by one.
func (m *Manager) vacate(l *life, rec record, reached func(Step)) error {
	ctx, cancel := context.WithTimeout(l.ctx, destroyTime)
	defer cancel()
	if err := m.machine.Destroy(ctx, l.place, reached); err != nil {
		return fmt.Errorf("destroy: %w", err)
	}
	if err := m.journal.update(rec); err != nil {
		return err
	}
	reached(StepPaused)
	return nil
}

// cannotSave refuses what the machine has no snapshots for. instead is what else the caller might do.
func (m *Manager) cannotSave(id, done, instead string) error {
	return errs.New(errs.Invalid, "Sandbox %q cannot be %s: the %s machine of this node has no snapshots; %srun the node with a machine that has them",
		id, done, m.machine.Name(), instead)
}

// atEnd is where a sandbox stands that is paused at its deadline instead of killed.
type atEnd struct {
	pausing bool      // somebody is at it
	failed  int       // attempts in a row
	next    time.Time // not before
}

// endLocked ends the run of a sandbox whose deadline has come, and returns when to look again. Manager.mu is held.
func (m *Manager) endLocked(l *life, now time.Time) time.Duration {
	s, ok := m.machine.(Suspender)
	sb := l.rec.Sandbox
	tooOld := !now.Before(sb.StartedAt.Add(m.opts.MaxTimeout)) && l.atEnd.failed >= atEndTries
	if !sb.AutoPause || !ok || tooOld {
		m.condemnLocked(l, GoneTimeout)
		return deadlineLookAgain
	}
	if wait := l.atEnd.next.Sub(now); l.atEnd.pausing || wait > 0 {
		return max(wait, atEndLook)
	}
	l.atEnd.pausing = true
	m.jobs.Go(func() { m.pauseAtEnd(s, l) })
	return deadlineLookAgain
}

// pauseAtEnd pauses a sandbox at its deadline. It waits for a turn to save before it takes the sandbox's: many may end at once, and
// whoever wants to extend the life of one that waits must not have to.
func (m *Manager) pauseAtEnd(s Suspender, l *life) {
	next, failed := time.Time{}, false
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		l.atEnd.pausing, l.atEnd.next = false, next
		if failed {
			l.atEnd.failed++
		}
		poke(m.endMoved)
	}()
	done, ok := m.saving.acquire(l.ctx, m.closing, m.record(l).Sandbox.Team)
	if !ok {
		return
	}
	defer done()
	if !l.tryTurn() {
		next = time.Now().Add(atEndLook)
		return
	}
	defer l.endTurn()
	m.mu.RLock()
	sb, tries := l.rec.Sandbox, l.atEnd.failed
	m.mu.RUnlock()
	if sb.State != StateRunning || time.Now().Before(sb.EndAt) {
		return
	}
	// Without memory the guest has to write out what it has, and one that does not would live on. With memory nobody asks it, and nothing is
	// lost either: so every other attempt is one with memory.
	memory := sb.AutoPauseMemory || tries%2 == 1
	if err := m.pause(s, l, memory); err != nil && l.ctx.Err() == nil {
		failed = true
		next = time.Now().Add(min(atEndPause<<min(tries, 10), atEndPauseMax))
	}
}
