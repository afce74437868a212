package sandboxd

import (
	"sync"
	"time"
)

// slotQuarantine is how long a slot rests before the next sandbox gets it: late packets and stale lookups must not meet another
// tenant's sandbox at the same address.
const slotQuarantine = 3 * time.Second

// slotUse is what a slot that exists, or may, is there for; it is the label of a gauge.
type slotUse string

// The uses of a slot.
const (
	slotReady   slotUse = "ready"
	slotUsed    slotUse = "used"
	slotResting slotUse = "resting"
)

// slots hands out the numbers from which a machine derives addresses and user ids.
type slots struct {
	mu    sync.Mutex
	known map[int]bool // taken, ready or resting
	next  int          // every slot below is known
	limit int
	rest  []restSlot // released, the one that has rested longest first
	ready []int      // prepared by the machine, the oldest first
}

type restSlot struct {
	slot  int
	until time.Time
}

func newSlots(limit int) *slots { return &slots{known: make(map[int]bool), limit: limit} }

// acquire returns a slot that nobody uses and that has rested, one that is ready if there is any; false when there is none now.
func (s *slots) acquire(now time.Time) (int, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ready) > 0 {
		slot := s.ready[0]
		s.ready = s.ready[1:]
		return slot, true
	}
	return s.freeLocked(now)
}

// acquireToPrepare returns a slot that is to become ready, while there are fewer than want.
func (s *slots) acquireToPrepare(now time.Time, want int) (int, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ready) >= want {
		return 0, false
	}
	return s.freeLocked(now)
}

func (s *slots) freeLocked(now time.Time) (int, bool) {
	if len(s.rest) > 0 && !now.Before(s.rest[0].until) {
		slot := s.rest[0].slot
		s.rest = s.rest[1:]
		return slot, true
	}
	for ; s.next < s.limit; s.next++ {
		if !s.known[s.next] {
			s.known[s.next] = true
			return s.next, true
		}
	}
	return 0, false
}

// prepared makes an acquired slot ready for whoever acquires the next.
func (s *slots) prepared(slot int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = append(s.ready, slot)
}

// takeReady takes all that are ready.
func (s *slots) takeReady() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.ready
	s.ready = nil
	return all
}

// claim takes a slot that a record names, after a restart; false when another record has it already or there is no such slot.
func (s *slots) claim(slot int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slot < 0 || slot >= s.limit || s.known[slot] {
		return false
	}
	s.known[slot] = true
	return true
}

// release puts a slot to rest.
func (s *slots) release(slot int, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rest = append(s.rest, restSlot{slot, now.Add(slotQuarantine)})
}

// count returns how many slots have a use. Those that have rested long enough count as resting until somebody wants them.
func (s *slots) count(use slotUse) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch use {
	case slotReady:
		return len(s.ready)
	case slotResting:
		return len(s.rest)
	default:
		return len(s.known) - len(s.ready) - len(s.rest)
	}
}
