package sandboxd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
)

// adoptTime is how long a sandbox of an earlier run may take to show that it is whole.
const adoptTime = 5 * time.Second

// reconcile makes the node agree with its records: running sandboxes that are whole are taken up with the same generation, all
// others are removed with everything that belonged to them, and so is whatever bears our names without a record. Afterwards
// nothing exists on the host that the manager does not know.
func (m *Manager) reconcile(ctx context.Context) error {
	records, strangers, err := m.journal.load()
	if err != nil {
		return err
	}
	var found []survivor
	for _, rec := range records {
		if !m.slots.claim(rec.Slot) {
			return fmt.Errorf("record of %q names slot %d, which is not free; remove %q when nothing of it runs",
				rec.Sandbox.ID, rec.Slot, m.journal.path(rec.Sandbox.ID))
		}
		l := newLife(rec, m.place(rec), m.log)
		l.rec.Sandbox.State = StateAdopting
		l.turn <- struct{}{}
		l.routed = true // as far as we know
		found = append(found, survivor{l, rec})
		m.mu.Lock()
		m.lives[l.id] = l
		m.stats.sandboxes.Inc()
		m.lastGeneration = max(m.lastGeneration, l.generation)
		m.mu.Unlock()
	}
	if err := m.removeStraySlots(ctx); err != nil {
		return err
	}
	for _, id := range strangers {
		if err := m.removeStranger(ctx, id); err != nil {
			return err
		}
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

// takeUp decides about one sandbox of an earlier run, and waits for the end of those that cannot go on.
func (m *Manager) takeUp(ctx context.Context, s survivor) {
	l, rec := s.life, s.rec
	reason, err := m.tryAdopt(ctx, l, rec)
	if err == nil {
		l.endTurn()
		m.stats.adopted.Inc()
		l.log.Info("sandbox taken up again", zap.Time("end", rec.Sandbox.EndAt))
		return
	}
	if ctx.Err() != nil { // we were stopped, and know nothing about the sandbox
		l.endTurn()
		return
	}
	l.log.Warn("sandbox of an earlier run not taken up", zap.Error(err))
	m.condemn(l, reason)
	l.endTurn()
	<-l.buried
}

// tryAdopt checks everything that makes a sandbox whole, applies its egress rules anew, and makes it running.
func (m *Manager) tryAdopt(ctx context.Context, l *life, rec record) (GoneReason, error) {
	if rec.Sandbox.State != StateRunning {
		return GoneLost, fmt.Errorf("it was %s", rec.Sandbox.State)
	}
	if !time.Now().Before(rec.Sandbox.EndAt) {
		return GoneTimeout, errors.New("its time is over")
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
	if err := instance.Health(ctx); err != nil {
		return GoneLost, fmt.Errorf("ask guest: %w", err)
	}
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
