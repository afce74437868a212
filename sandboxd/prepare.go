package sandboxd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
)

const (
	prepareTime = 10 * time.Second // for one slot
	// prepareAgain follows a preparation that failed; creates prepare for themselves meanwhile.
	prepareAgain = 5 * time.Second
)

// keepReady has the machine prepare slots ahead, so that a create finds what takes the kernel long. It does one at a time: creates that
// are under way have the better claim to the kernel's locks.
func (m *Manager) keepReady(ctx context.Context) error {
	p, ok := m.machine.(Preparer)
	if !ok || m.opts.ReadySlots < 0 {
		<-ctx.Done()
		return nil
	}
	failing := false
	for ctx.Err() == nil {
		slot, ok := m.slots.acquireToPrepare(time.Now(), m.opts.ReadySlots)
		if !ok {
			select { // a slot that rests is looked at again
			case <-ctx.Done():
			case <-m.slotTaken:
			case <-time.After(slotQuarantine):
			}
			continue
		}
		err := m.prepare(ctx, p, slot)
		if err == nil {
			failing = false
			m.slots.prepared(slot)
			continue
		}
		if ctx.Err() == nil {
			m.stats.prepareFailed.Inc()
		}
		if ctx.Err() == nil && !failing {
			m.log.Warn("slot not prepared, creates do it themselves", zap.Int("slot", slot), zap.Error(err))
		}
		failing = true
		m.unprepare(ctx, slot)
		m.wait(ctx, prepareAgain, false)
	}
	return nil
}

func (m *Manager) prepare(ctx context.Context, p Preparer, slot int) error {
	ctx, cancel := context.WithTimeout(ctx, prepareTime)
	defer cancel()
	return p.Prepare(ctx, slot)
}

// unprepare removes what was made of a slot, and puts it to rest. Until that succeeds nobody gets the slot.
func (m *Manager) unprepare(ctx context.Context, slot int) {
	pause := buryPause
	for try := 1; ; try++ {
		err := m.destroySlot(slot)
		if err == nil {
			m.slots.release(slot, time.Now())
			return
		}
		m.stats.removeFailed.Inc()
		m.log.Error("slot not removed", zap.Int("slot", slot), zap.Int("attempt", try), zap.Error(err))
		if ctx.Err() != nil && try >= buryLastTries {
			return // to the next start it is a slot without a record
		}
		m.wait(context.WithoutCancel(ctx), pause, true)
		pause = min(2*pause, buryPauseMax)
	}
}

func (m *Manager) destroySlot(slot int) error {
	ctx, cancel := context.WithTimeout(context.Background(), destroyTime)
	defer cancel()
	return m.machine.Destroy(ctx, Place{Slot: slot}, m.reached)
}

// removeReady removes the slots that no sandbox has taken. Nobody is left who could.
func (m *Manager) removeReady() error {
	var failures []error
	for _, slot := range m.slots.takeReady() {
		if err := m.destroySlot(slot); err != nil {
			failures = append(failures, fmt.Errorf("remove slot %d, which was ready: %w", slot, err))
		}
	}
	return errors.Join(failures...)
}
