package link

import (
	"sync"
	"time"
)

// window remembers the nonces of accepted prefaces for as long as their time stamps would still be accepted, so that a
// header copied off the wire opens nothing.
//
// What bounds it: only authentic prefaces with a fresh time stamp get in, so a stranger cannot fill it; a nonce leaves when
// its stamp is too old, at most 60 s after it came (an edge's clock may be 30 s ahead) and usually 30 to 40; and limit
// nonces at most are kept. When it is full new connections are turned away as busy: forgetting a nonce early would open
// the door that this type shuts, and the limit is far above any rate at which edges that pool their connections dial.
// A new window knows nothing of what an earlier process accepted, so stamps from before its start are stale: after a
// restart an edge whose clock lags by some time is refused for just that time.
type window struct {
	limit int
	start time.Time // whole milliseconds

	mu      sync.Mutex
	buckets map[int64]map[[nonceSize]byte]struct{} // by stamp / bucketWidth
	size    int
}

// bucketWidth is how precisely nonces are forgotten: whole buckets go, which needs no list of what to remove when.
const bucketWidth = 10 * time.Second

// freshness is what a window says of a preface.
type freshness uint8

const (
	fresh freshness = iota
	stale           // the stamp is too old or too new
	replayed
	windowFull
)

func newWindow(limit int, now time.Time) *window {
	return &window{
		limit:   limit,
		start:   now.Truncate(time.Millisecond),
		buckets: make(map[int64]map[[nonceSize]byte]struct{}),
	}
}

// admit decides on a preface whose MAC holds and remembers it if it is fresh. The check and the act are one step.
func (w *window) admit(p *preface, now time.Time) freshness {
	age := now.Sub(p.stamp)
	if age > stampWindow || age < -stampWindow || p.stamp.Before(w.start) {
		return stale
	}
	key := p.stamp.UnixMilli() / bucketWidth.Milliseconds()

	w.mu.Lock()
	defer w.mu.Unlock()
	w.forgetLocked(now)
	bucket := w.buckets[key]
	if _, seen := bucket[p.nonce]; seen {
		return replayed
	}
	if w.size >= w.limit {
		return windowFull
	}
	if bucket == nil {
		bucket = make(map[[nonceSize]byte]struct{})
		w.buckets[key] = bucket
	}
	bucket[p.nonce] = struct{}{}
	w.size++
	return fresh
}

// forgetLocked drops the buckets whose every stamp is too old. There are at most eight: 60 s in steps of 10.
func (w *window) forgetLocked(now time.Time) {
	oldest := now.Add(-stampWindow).UnixMilli() / bucketWidth.Milliseconds()
	for key, bucket := range w.buckets {
		if key < oldest {
			w.size -= len(bucket)
			delete(w.buckets, key)
		}
	}
}
