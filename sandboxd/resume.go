package sandboxd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

// transitionTime is how long a resume waits for the end of a pause, and a caller for the end of a resume.
const transitionTime = 60 * time.Second

// revival is one resume, for which any number of callers wait.
type revival struct {
	opts ConnectOptions
	done chan struct{} // closed when it is decided

	// Written before done is closed.
	sb      Sandbox
	resumed bool // false with a nil err: a pause failed, and the sandbox had been running all the time
	err     error
}

// Connect returns a sandbox that will live for at least the given time from now; resumed tells that it had to be resumed. While it is
// being paused Connect waits, and resumes it then. A resume goes on when ctx ends first.
func (m *Manager) Connect(ctx context.Context, id string, opts ConnectOptions) (sb Sandbox, resumed bool, err error) {
	if err := m.checkTimeout(opts.Timeout); err != nil {
		return Sandbox{}, false, err
	}
	leave, err := m.enter(ctx)
	if err != nil {
		return Sandbox{}, false, err
	}
	defer leave()
	for {
		r, mine, err := m.revive(id, opts)
		if err != nil {
			return Sandbox{}, false, err
		}
		if r != nil {
			if err := await(ctx, r, id); err != nil {
				return Sandbox{}, false, err
			}
			resumed = resumed || r.resumed
			if mine && r.resumed {
				return r.sb, true, nil
			}
		}
		sb, err = m.moveEnd(ctx, id, extendTo(opts.Timeout))
		if err != nil && m.isAsleep(id) {
			continue // it was paused, again, before its end was moved
		}
		return sb, resumed, err
	}
}

// revive returns the resume that is under way for a sandbox, or begins one; nil when the sandbox runs. mine tells that opts are what it is
// done with.
func (m *Manager) revive(id string, opts ConnectOptions) (r *revival, mine bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l, err := m.shown(id)
	if err != nil {
		if l, ok := m.lives[id]; ok && l.condemned() {
			err = inTransition(id, StateKilling)
		}
		return nil, false, err
	}
	if l.revival == nil && l.rec.Sandbox.State == StateRunning {
		return nil, false, nil
	}
	r, mine = m.reviveLocked(l, opts)
	return r, mine, nil
}

func (m *Manager) reviveLocked(l *life, opts ConnectOptions) (r *revival, mine bool) {
	if l.revival != nil {
		return l.revival, false
	}
	r = &revival{opts: opts, done: make(chan struct{})}
	l.revival = r
	m.jobs.Go(func() { m.carryOut(l, r) }) // the caller is counted
	return r, true
}

// await waits for a resume that is under way.
func await(ctx context.Context, r *revival, id string) error {
	wait := time.NewTimer(transitionTime)
	defer wait.Stop()
	select {
	case <-r.done:
		return r.err
	case <-wait.C:
		return inTransition(id, StateResuming)
	case <-ctx.Done():
		return &errs.Error{Code: errs.Unavailable, Msg: "the sandbox is still being resumed", Err: ctx.Err()}
	}
}

// isAsleep tells whether a sandbox is paused, or on its way there.
func (m *Manager) isAsleep(id string) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	l, ok := m.lives[id]
	return ok && (l.rec.Sandbox.State == StatePausing || l.rec.Sandbox.State == StatePaused || l.rec.Sandbox.State == StateResuming)
}

// carryOut is the job of a revival.
func (m *Manager) carryOut(l *life, r *revival) {
	r.sb, r.resumed, r.err = m.resumeOnce(l, r.opts)
	m.mu.Lock()
	l.revival = nil
	if r.err != nil {
		l.wakeAfter = time.Now().Add(wakePause)
	}
	m.mu.Unlock()
	close(r.done)
}

// resumeOnce waits for the turn of a sandbox, which a pause may have, and resumes it if it is paused then.
func (m *Manager) resumeOnce(l *life, opts ConnectOptions) (sb Sandbox, resumed bool, err error) {
	wait := time.NewTimer(transitionTime)
	defer wait.Stop()
	select {
	case l.turn <- struct{}{}:
	case <-l.ctx.Done():
		return Sandbox{}, false, inTransition(l.id, StateKilling)
	case <-wait.C:
		return Sandbox{}, false, inTransition(l.id, m.record(l).Sandbox.State)
	case <-m.closing:
		return Sandbox{}, false, errStopping
	}
	defer l.endTurn()
	switch sb := m.record(l).Sandbox; sb.State {
	case StateRunning:
		return sb, false, nil
	case StatePaused:
	default:
		return Sandbox{}, false, inTransition(l.id, sb.State)
	}
	done, err := m.queue(l.ctx, m.creating, m.record(l).Sandbox.Team, "started")
	if err != nil {
		return Sandbox{}, false, err
	}
	defer done()
	sb, err = m.resume(l, opts)
	if err != nil {
		m.stats.resumeFailed.Inc()
		return Sandbox{}, false, err
	}
	return sb, true, nil
}

// resume takes a paused sandbox to a running one, in a new lifecycle, or leaves it paused. The caller holds its turn, and one to create.
func (m *Manager) resume(l *life, opts ConnectOptions) (Sandbox, error) {
	s, ok := m.machine.(Suspender)
	if !ok {
		return Sandbox{}, errs.New(errs.Invalid, "Sandbox %q cannot be resumed: it was paused by a node with another machine than %s", l.id, m.machine.Name())
	}
	paused := m.record(l)
	fence, err := fenceOf(paused.Sandbox.Network)
	if err != nil {
		return Sandbox{}, fmt.Errorf("egress rules in the record: %w", err)
	}
	rec, err := m.reserveAgain(l, opts.Timeout)
	if err != nil {
		return Sandbox{}, err
	}
	began := time.Now()
	reached := m.reporter(m.stats.resumePhase)
	rec, instance, err := m.restore(s, l, rec, fence, opts, reached)
	if err != nil && m.hasRun(s, l, instance) {
		m.stats.resumedMute.Inc()
		l.log.Warn("guest of a resumed sandbox does not answer, kept", zap.Error(err))
		err = nil
	}
	if err != nil {
		if opts.DropMemory {
			paused.Sandbox.MemorySaved = false // and if it is not there any more, nobody misses it
		}
		return Sandbox{}, m.asBefore(s, l, paused, err)
	}

	rec.Sandbox.State = StateRunning
	rec.Sandbox.StartedAt = now()
	rec.Sandbox.EndAt = rec.Sandbox.StartedAt.Add(opts.Timeout)
	if err := m.journal.update(rec); err != nil { // it runs, and the record that is there names it
		l.log.Warn("record of resumed sandbox not written, will be tried again", zap.Error(err))
		m.owe(l)
	}
	reached(StepRunning)
	l.reset = nil
	if !m.adopt(l, rec, instance) {
		return Sandbox{}, inTransition(l.id, StateKilling)
	}
	m.tryPublish(l) // there is no way back: what it was saved as is used up
	reached(StepPublished)
	if l.ctx.Err() != nil {
		return Sandbox{}, inTransition(l.id, StateKilling)
	}
	m.stats.resumed.Inc()
	l.log.Info("sandbox resumed", zap.Bool("memory", instance.Memory()), zap.Duration("took", time.Since(began)))
	return rec.Sandbox, nil
}

// reserveAgain enters the resume, with a slot and a generation as for a new sandbox. They are in the record that it returns; in memory the
// old ones stay until the sandbox runs, because the route of the paused sandbox names them.
func (m *Manager) reserveAgain(l *life, timeout time.Duration) (record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l.condemned() {
		return record{}, inTransition(l.id, StateKilling)
	}
	// A wake is asked for by strangers, who could bring back all that a team has ever paused.
	if most := m.opts.TeamSandboxes; most > 0 && m.activeOfLocked(l.rec.Sandbox.Team) >= most {
		return record{}, errs.New(errs.Exhausted, "you have reached the maximum number of concurrent E2B sandboxes (%d). Kill or pause some, "+
			"or ask the operator for more.", most)
	}
	slot, started, err := m.admitLocked()
	if err != nil {
		return record{}, err
	}
	l.rec.Sandbox.State = StateResuming
	l.place.Slot = slot
	rec := l.rec
	rec.Slot = slot
	rec.Sandbox.Generation = m.nextGenerationLocked(started)
	rec.Sandbox.StartedAt, rec.Sandbox.EndAt = started, started.Add(timeout)
	rec.Sandbox.MemorySaved = false
	return rec, nil
}

// restore takes the steps until the guest goes on. After an error whatever it has made is still there; the instance is returned if the guest
// may have run.
func (m *Manager) restore(s Suspender, l *life, rec record, fence egress.Policy, opts ConnectOptions, reached func(Step)) (record, Suspended, error) {
	if err := m.journal.update(rec); err != nil {
		return rec, nil, err
	}
	reached(StepResuming)
	if opts.DropMemory { // not before there is a place: who is refused one keeps it
		if err := s.DropMemory(l.place); err != nil {
			return rec, nil, fmt.Errorf("drop saved memory: %w", err)
		}
	}
	startCtx, cancel := context.WithTimeout(l.ctx, startTime)
	defer cancel()
	instance, err := s.Resume(startCtx, l.place, fence, reached)
	if err != nil {
		return rec, nil, fmt.Errorf("resume: %w", err)
	}
	if !instance.Memory() {
		if err := m.introduce(l, rec, instance, opts.EnvdToken); err != nil {
			return rec, nil, err
		}
		reached(StepInit)
	}
	rec.Handle = instance.Handle()
	if err := m.journal.update(rec); err != nil {
		return rec, nil, err
	}
	reached(StepHandle)
	if err := instance.Commit(); err != nil {
		return rec, nil, fmt.Errorf("commit: %w", err)
	}
	reached(StepCommitted)
	if !instance.Memory() {
		return rec, instance, nil
	}
	ctx, cancelContinue := context.WithTimeout(l.ctx, guestTime)
	defer cancelContinue()
	if err := instance.Continue(ctx, resumeRequest(rec.Sandbox)); err != nil {
		return rec, instance, fmt.Errorf("continue: %w", err)
	}
	reached(StepContinued)
	return rec, instance, nil
}

// introduce tells a guest that has booted from its disk who it is. The token is the caller's to know: without it the agent would be
// open to everybody.
func (m *Manager) introduce(l *life, rec record, instance Instance, envdToken string) error {
	if hashOf(envdToken) != rec.Sandbox.EnvdHash {
		return errs.New(errs.Conflict, "Sandbox %q has no saved memory and boots from its disk, which only a connect with its credentials can ask for", l.id)
	}
	ctx, cancel := context.WithTimeout(l.ctx, guestTime)
	defer cancel()
	init := initRequest(rec, CreateSpec{EnvdToken: envdToken}) // the caller's variables are on the disk
	if err := instance.Init(ctx, init); err != nil {
		return fmt.Errorf("init guest: %w", err)
	}
	if err := instance.Health(ctx); err != nil {
		return fmt.Errorf("guest after init: %w", err)
	}
	return nil
}

func resumeRequest(sb Sandbox) guest.ResumeRequest {
	return guest.ResumeRequest{Timestamp: time.Now(), LifecycleID: lifecycleID(sb)}
}

// hasRun tells whether a guest that was to go on, and did not say that it does, has a process and has used up its saved memory. Then there is
// no way back, and what its tenant started may do its work.
func (m *Manager) hasRun(s Suspender, l *life, instance Suspended) bool {
	if instance == nil || l.ctx.Err() != nil {
		return false
	}
	select {
	case <-instance.Done():
		return false
	default:
	}
	saved, err := s.Saved(l.place)
	return errs.CodeOf(err) == errs.NotFound || err == nil && !saved.Memory
}

// asBefore takes back a resume that failed: the sandbox is paused again, with what is still saved. It returns what its callers are told.
func (m *Manager) asBefore(s Suspender, l *life, paused record, cause error) error {
	if l.ctx.Err() != nil {
		return inTransition(l.id, StateKilling)
	}
	saved, savedErr := s.Saved(l.place)
	had := paused.Sandbox.MemorySaved
	paused.Sandbox.MemorySaved = savedErr == nil && saved.Memory
	if err := m.rest(l, paused, m.reached); err != nil {
		return err
	}
	l.log.Warn("sandbox not resumed, it is paused", zap.Bool("memory", paused.Sandbox.MemorySaved), zap.Error(errors.Join(cause, savedErr)))
	if had && savedErr == nil && !saved.Memory {
		return &errs.Error{Code: errs.Unavailable, Err: cause, Msg: fmt.Sprintf("Sandbox %q was not resumed: it ended as it went on, and its "+
			"memory is lost. Its disk is kept; connect again to boot from it", l.id)}
	}
	return saveError(cause, "Sandbox %q was not resumed and is paused as before", l.id)
}
