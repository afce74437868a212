package link

import (
	"context"
	"net"
	"sync"
)

// registry knows every connection of a server by lifecycle, from before the Backend is asked until both ends are closed,
// and holds the limits.
type registry struct {
	max, maxPerLife int

	mu    sync.Mutex
	lives map[lifecycle]map[*entry]struct{}
	size  int
}

// entry is one connection's place in the registry.
type entry struct {
	life   lifecycle
	cancel context.CancelFunc // ends a Backend.Open that is still under way

	// Guarded by registry.mu.
	conns [2]net.Conn // what a reset must hit
	gone  bool        // released, or its lifecycle was reset
}

func newRegistry(limit, limitPerLife int) *registry {
	return &registry{max: limit, maxPerLife: limitPerLife, lives: make(map[lifecycle]map[*entry]struct{})}
}

// reserve takes a place, before the Backend is asked: a reset that comes while the Backend still connects finds the entry
// and marks it. It returns nil when a limit is reached.
func (r *registry) reserve(life lifecycle, cancel context.CancelFunc) *entry {
	e := &entry{life: life, cancel: cancel}
	r.mu.Lock()
	defer r.mu.Unlock()
	entries := r.lives[life]
	if r.size >= r.max || len(entries) >= r.maxPerLife {
		return nil
	}
	if entries == nil {
		entries = make(map[*entry]struct{})
		r.lives[life] = entries
	}
	entries[e] = struct{}{}
	r.size++
	return e
}

// attach puts the open connections under e's lifecycle. It returns false when that was reset in the meantime; the caller
// then resets them itself.
func (r *registry) attach(e *entry, conns ...net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.gone {
		return false
	}
	copy(e.conns[:], conns)
	return true
}

// release gives the place back. It may come after a reset, and twice.
func (r *registry) release(e *entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.gone {
		return
	}
	e.gone = true
	r.size--
	entries := r.lives[e.life]
	delete(entries, e)
	if len(entries) == 0 {
		delete(r.lives, e.life)
	}
}

// reset resets every connection of a lifecycle, cancels those that are being opened, and returns how many there were.
// It need not remember the lifecycle: the Backend refuses it from now on.
func (r *registry) reset(life lifecycle) int {
	r.mu.Lock()
	entries := r.lives[life]
	delete(r.lives, life)
	r.size -= len(entries)
	for e := range entries {
		e.gone = true
	}
	r.mu.Unlock()

	for e := range entries { // nobody adds to it or to an entry that is gone
		e.cancel()
		for _, c := range e.conns {
			if c != nil {
				resetConn(c)
			}
		}
	}
	return len(entries)
}
