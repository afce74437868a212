package sandboxd

import (
	"sync"
	"time"
)

// slotQuarantine is how long a slot rests before the next sandbox gets it: late packets and stale lookups must not meet another
// tenant's sandbox at the same address.
const slotQuarantine = 3 * time.Second

// slots hands out the numbers from which a machine derives addresses and user ids.
type slots struct {
	mu    sync.Mutex
	known map[int]bool // taken or resting
	next  int          // every slot below is known
	limit int
	rest  []restSlot // released, the one that has rested longest first
}

type restSlot struct {
	slot  int
	until time.Time
}

func newSlots(limit int) *slots { return &slots{known: make(map[int]bool), limit: limit} }

// acquire returns a slot that nobody uses and that has rested; false when there is none now.
func (s *slots) acquire(now time.Time) (int, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
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
