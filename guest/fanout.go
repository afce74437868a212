package guest

import (
	"errors"
	"sync"
	"time"

	"github.com/sluice-edge/sluice/guest/gen/process"
)

const (
	// subscriberQueue is how many chunks a reader may be behind; at 32 KiB each, 2 MiB.
	subscriberQueue = 64
	// stallBudget is how long a reader that is behind may hold up the others, summed up until it has caught up.
	stallBudget = 10 * time.Second
)

var errTooSlow = errors.New("output was not read fast enough")

// fanout gives one process's output to everybody who reads it. Memory is bounded by a queue per reader. When a queue is full the process waits,
// as it would for a pipe, for as long as nobody else reads: a lone slow client loses nothing. With other readers, one that stays behind
// is cut off when its stallBudget is used up.
type fanout struct {
	mu      sync.Mutex
	readers map[*reader]struct{}
	joined  chan struct{} // closed and replaced when a reader joins
	closed  bool
	done    chan struct{} // closed by close: nothing comes after what is queued
}

// reader is one subscription. Its owner reads queue, and after fanout.done drains it.
type reader struct {
	queue chan *process.ProcessEvent_DataEvent
	gone  chan struct{} // closed when it is unsubscribed
	cut   chan struct{} // closed when it was cut off

	mu     sync.Mutex // two pumps may wait for one reader
	waited time.Duration
	isCut  bool
}

func newFanout() *fanout {
	return &fanout{readers: map[*reader]struct{}{}, joined: make(chan struct{}), done: make(chan struct{})}
}

// subscribe joins from now on. The caller unsubscribes.
func (f *fanout) subscribe() *reader {
	r := &reader{queue: make(chan *process.ProcessEvent_DataEvent, subscriberQueue), gone: make(chan struct{}), cut: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.readers[r] = struct{}{}
	close(f.joined)
	f.joined = make(chan struct{})
	return r
}

func (f *fanout) unsubscribe(r *reader) {
	f.mu.Lock()
	delete(f.readers, r)
	f.mu.Unlock()
	close(r.gone)
}

// close ends the output. Later publishes are dropped.
func (f *fanout) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	close(f.done)
}

// publish gives event to every reader, those first that have room.
func (f *fanout) publish(event *process.ProcessEvent_DataEvent) {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return
	}
	behind := make([]*reader, 0, len(f.readers))
	for r := range f.readers {
		if !r.tryPut(event) {
			behind = append(behind, r)
		}
	}
	f.mu.Unlock()
	for _, r := range behind {
		f.put(r, event)
	}
}

func (r *reader) tryPut(event *process.ProcessEvent_DataEvent) bool {
	caughtUp := len(r.queue) == 0
	select {
	case r.queue <- event:
	default:
		return false
	}
	if caughtUp {
		r.mu.Lock()
		r.waited = 0
		r.mu.Unlock()
	}
	return true
}

// put waits for a reader that is behind.
func (f *fanout) put(r *reader, event *process.ProcessEvent_DataEvent) {
	for {
		f.mu.Lock()
		joined, alone := f.joined, len(f.readers) == 1
		f.mu.Unlock()
		wait := time.Duration(1<<63 - 1)
		if !alone {
			wait = r.budget()
		}
		begin := time.Now()
		spent := time.NewTimer(wait)
		select {
		case r.queue <- event:
			spent.Stop()
			if !alone {
				r.spend(time.Since(begin))
			}
			return
		case <-r.gone:
			spent.Stop()
			return
		case <-r.cut:
			spent.Stop()
			return
		case <-joined:
			spent.Stop()
		case <-spent.C:
			f.cutOff(r)
			return
		}
	}
}

func (r *reader) budget() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return stallBudget - r.waited
}

func (r *reader) spend(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waited += d
}

func (f *fanout) cutOff(r *reader) {
	f.mu.Lock()
	delete(f.readers, r)
	f.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.isCut {
		r.isCut = true
		close(r.cut)
	}
}
