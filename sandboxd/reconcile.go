package sandboxd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	adoptTime = 5 * time.Second // for the kernel to show that a sandbox of an earlier run is whole
	greetTime = 5 * time.Second // for its guest to answer, which nothing waits for
)

// takeOver is the first job of Run, and ends with it.
func (m *Manager) takeOver(ctx context.Context) error {
	if err := m.reconcile(ctx); err != nil {
		return err
	}
	m.announce(ctx) // before anybody hears that we are ready: an edge must find us
	close(m.ready)
	m.announce(ctx) // and that we take new sandboxes
	m.log.Info("ready", zap.String("machine", m.machine.Name()), zap.Int("sandboxes", m.count()))
	<-ctx.Done()
	return nil
}

// whenReady is a job that begins after the reconcile.
func (m *Manager) whenReady(job func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-m.ready:
			return job(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// reconcile makes the node agree with its records: running sandboxes that are whole are taken up with the same generation, those that
// are saved are paused, the end of all others begins, and whatever bears our names without a record is removed. Afterwards nothing exists on the host that the
// manager does not know. It waits for the kernel and, within bounds, for the catalogue; for no guest, and for nothing whose
// length a guest decides: neither an answer of it nor the removal of what it wrote.
func (m *Manager) reconcile(ctx context.Context) error {
	records, strangers, err := m.journal.load()
	if err != nil {
		return err
	}
	var found []survivor
	for _, rec := range records {
		if rec.Machine != "" && rec.Machine != m.machine.Name() {
			return fmt.Errorf("sandbox %q belongs to the %s machine, and this is the %s machine, which could only lose it: start the node with "+
				"the other one, or remove %q when nothing of it runs", rec.Sandbox.ID, rec.Machine, m.machine.Name(), m.journal.path(rec.Sandbox.ID))
		}
		if rec.Slot != NoSlot && !m.slots.claim(rec.Slot) {
			return fmt.Errorf("record of %q names slot %d, which is not free; remove %q when nothing of it runs",
				rec.Sandbox.ID, rec.Slot, m.journal.path(rec.Sandbox.ID))
		}
		l := newLife(rec, m.place(rec), m.log)
		l.routed = true                       // as far as we know
		if rec.Sandbox.State != StatePaused { // of which there is nothing to find, and which may be many
			l.rec.Sandbox.State = StateAdopting
			l.turn <- struct{}{}
			found = append(found, survivor{l, rec})
		}
		m.mu.Lock()
		m.lives[l.id] = l
		m.lastGeneration = max(m.lastGeneration, l.generation)
		m.mu.Unlock()
	}
	var wg sync.WaitGroup
	workers := make(chan struct{}, m.opts.ConcurrentCreates)
	for _, s := range found {
		workers <- struct{}{}
		wg.Go(func() {
			defer func() { <-workers }()
			m.takeUp(ctx, s)
		})
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := m.removeStraySlots(ctx); err != nil {
		return err
	}
	for _, id := range strangers {
		if err := m.removeStranger(ctx, id); err != nil {
			return err
		}
	}
	if err := m.agreeRoutes(ctx); err != nil {
		m.log.Warn("routes of an earlier run not compared, will be tried again", zap.Error(err))
	}
	return nil
}

// survivor is a sandbox of an earlier run, with the record as it was found. The life's own says adopting until that is decided.
type survivor struct {
	life *life
	rec  record
}

// takeUp decides about one sandbox of an earlier run: it runs again, or is being paused, or its removal has begun.
//
// A crash in a pause or a resume leaves both what is saved and a process, or one of them. Saved memory is the moment at which the guest
// stood still, so it has not run since: it counts, and the process does not. Without saved memory the process counts. Where there is
// none, what is saved of the disk is all that is left.
func (m *Manager) takeUp(ctx context.Context, s survivor) {
	l, rec := s.life, s.rec
	saved, isSaved := m.savedOf(l, rec)
	if isSaved && saved.Memory {
		m.takeUpPaused(l, rec, saved)
		return
	}
	reason, err := m.tryAdopt(ctx, l, rec)
	switch {
	case err == nil:
		m.stats.adopted.Inc()
		l.log.Info("sandbox taken up again", zap.Time("end", rec.Sandbox.EndAt))
		if standing(rec) {
			m.jobs.Go(func() { m.letGoOn(l, rec) })
			return
		}
		l.endTurn()
		m.jobs.Go(func() { m.greet(l) })
	case ctx.Err() != nil: // we were stopped, and know nothing about the sandbox
		l.endTurn()
	case isSaved:
		if rec.Sandbox.State == StateResuming {
			l.log.Warn("sandbox of an earlier run had gone on and was lost, its disk is kept", zap.Error(err))
		}
		m.takeUpPaused(l, rec, saved)
	default:
		l.log.Warn("sandbox of an earlier run not taken up", zap.Error(err))
		m.condemn(l, reason)
		l.endTurn()
	}
}

// savedOf looks for what is saved of a sandbox that was between running and paused. Damaged memory is none.
func (m *Manager) savedOf(l *life, rec record) (saved Saved, ok bool) {
	if rec.Sandbox.State != StatePausing && rec.Sandbox.State != StateResuming {
		return Saved{}, false
	}
	s, ok := m.machine.(Suspender)
	if !ok {
		return Saved{}, false
	}
	saved, err := s.Saved(l.place)
	switch {
	case err == nil:
		return saved, true
	case errs.CodeOf(err) == errs.Unavailable:
		l.log.Warn("memory of a sandbox of an earlier run is damaged", zap.Error(err))
		return Saved{Bytes: saved.Bytes}, true
	case errs.CodeOf(err) != errs.NotFound:
		l.log.Warn("saved sandbox of an earlier run not found", zap.Error(err))
	}
	return Saved{}, false
}

// takeUpPaused ends the stay on the host of a sandbox that is saved. Nothing waits for that.
func (m *Manager) takeUpPaused(l *life, rec record, saved Saved) {
	rec.Sandbox.MemorySaved = saved.Memory
	m.mu.Lock()
	if !l.condemned() {
		l.rec = rec
		l.rec.Sandbox.State = StatePausing
	}
	m.mu.Unlock()
	l.log.Info("sandbox of an earlier run is paused", zap.Bool("memory", saved.Memory))
	m.jobs.Go(func() { m.restTakenUp(l, rec) })
}

// restTakenUp has the turn since the sandbox's record was read.
func (m *Manager) restTakenUp(l *life, rec record) {
	defer l.endTurn()
	if err := m.rest(l, rec, m.reached); err == nil {
		m.tryPublish(l)
	}
}

// standing tells whether a crash may have left the guest standing still.
func standing(rec record) bool { return rec.Standing || rec.Sandbox.State != StateRunning }

// letGoOn has the turn since the record was read: nobody shall pause a guest that stands still already. Nobody else comes back to one either,
// so the record says that it may stand still until it has gone on.
func (m *Manager) letGoOn(l *life, rec record) {
	defer l.endTurn()
	var err error
	if s, ok := l.instance.(Suspended); ok {
		err = m.insist(l, s, rec)
		m.muteUnless(l, err)
	}
	if err == nil || errors.Is(err, errUntold) {
		m.mu.Lock()
		l.rec.Standing = false
		l.unrecorded = true
		m.mu.Unlock()
	}
	m.tryPublish(l)
}

// insist is Continue until the guest runs. A hypervisor that still writes what a crash interrupted answers late, or with a refusal.
func (m *Manager) insist(l *life, s Suspended, rec record) error {
	ctx, cancel := context.WithTimeout(l.ctx, thawTime)
	defer cancel()
	for pause := thawPause; ; pause = min(2*pause, 10*thawPause) {
		try, cancelTry := context.WithTimeout(ctx, greetTime)
		err := s.Continue(try, resumeRequest(rec.Sandbox))
		cancelTry()
		if err == nil || errors.Is(err, errUntold) {
			return err
		}
		m.wait(ctx, pause, false)
		if ctx.Err() != nil || m.isClosing() {
			return err
		}
	}
}

// greet asks the guest of a sandbox that was taken up whether it serves. One that does not answer is kept: its process runs, what
// its tenant started may do its work, and the tenant may have muted the agent on purpose.
func (m *Manager) greet(l *life) {
	ctx, cancel := context.WithTimeout(l.ctx, greetTime)
	defer cancel()
	instance := m.instanceOf(l)
	if instance == nil {
		return // paused already
	}
	m.muteUnless(l, instance.Health(ctx))
}

func (m *Manager) muteUnless(l *life, err error) {
	if err == nil || l.ctx.Err() != nil {
		return
	}
	m.stats.adoptedMute.Inc()
	l.log.Warn("guest of a sandbox taken up again does not answer, kept", zap.Error(err))
}

// tryAdopt checks everything that makes a sandbox whole and that no guest decides, applies its egress rules anew, and makes it
// running.
func (m *Manager) tryAdopt(ctx context.Context, l *life, rec record) (GoneReason, error) {
	switch sb := rec.Sandbox; sb.State {
	case StateRunning:
		if !time.Now().Before(sb.EndAt) && !sb.AutoPause {
			return GoneTimeout, errors.New("its time is over")
		}
	case StatePausing, StateResuming: // a deadline did not stop those
	default:
		return GoneLost, fmt.Errorf("it was %s", sb.State)
	}
	ctx, cancel := context.WithTimeout(ctx, adoptTime)
	defer cancel()
	instance, err := m.machine.Adopt(ctx, l.place, rec.Handle)
	if err != nil {
		return GoneLost, err
	}
	fence, err := fenceOf(rec.Sandbox.Network)
	if err != nil {
		return GoneLost, fmt.Errorf("egress rules in the record: %w", err)
	}
	if err := instance.SetFence(ctx, fence); err != nil {
		return GoneLost, fmt.Errorf("apply egress rules: %w", err)
	}
	rec.Standing = standing(rec)
	rec.Sandbox.State, rec.Sandbox.MemorySaved = StateRunning, false
	if !m.adopt(l, rec, instance) {
		return GoneLost, errors.New("it was condemned meanwhile")
	}
	return "", nil
}

// removeStranger removes a directory without a readable record, and what the machine finds by its name.
func (m *Manager) removeStranger(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, destroyTime)
	defer cancel()
	m.log.Warn("directory without a record removed", zap.String("sandbox", id))
	if err := m.machine.Destroy(ctx, Place{ID: id, Dir: m.journal.path(id), Slot: NoSlot}, m.reached); err != nil {
		return fmt.Errorf("remove %q, which has no record: %w", id, err)
	}
	m.stats.strangers.Inc()
	return m.journal.remove(id)
}

// removeStraySlots frees the slots on the host that no record names.
func (m *Manager) removeStraySlots(ctx context.Context) error {
	occupied, err := m.machine.Occupied(ctx)
	if err != nil {
		return fmt.Errorf("list slots on the host: %w", err)
	}
	for _, slot := range occupied {
		if !m.slots.claim(slot) {
			continue // a record's
		}
		m.log.Warn("slot without a record removed", zap.Int("slot", slot))
		destroyCtx, cancel := context.WithTimeout(ctx, destroyTime)
		err := m.machine.Destroy(destroyCtx, Place{Slot: slot}, m.reached)
		cancel()
		if err != nil {
			return fmt.Errorf("remove slot %d, which has no record: %w", slot, err)
		}
		m.stats.strangers.Inc()
		m.slots.release(slot, time.Now())
	}
	return nil
}
