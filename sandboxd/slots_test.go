package sandboxd

import (
	"testing"
	"time"
)

func TestSlots(t *testing.T) {
	s := newSlots(3)
	now := time.Now()
	acquire := func(want int) {
		t.Helper()
		slot, ok := s.acquire(now)
		if !ok {
			slot = NoSlot
		}
		if slot != want {
			t.Errorf("acquire() = %d, want %d", slot, want)
		}
	}
	if !s.claim(1) || s.claim(1) || s.claim(3) || s.claim(-1) {
		t.Error("claim takes what is taken or outside, or does not take what is free")
	}
	acquire(0)
	acquire(2)
	acquire(NoSlot)
	s.release(1, now)
	s.release(0, now.Add(time.Second))
	acquire(NoSlot)
	now = now.Add(slotQuarantine)
	acquire(1)
	acquire(NoSlot)
	now = now.Add(time.Second)
	acquire(0)
	acquire(NoSlot)
}
