package link

import (
	"testing"
	"time"
)

func TestWindow(t *testing.T) {
	start := time.UnixMilli(1_790_000_000_000)
	w := newWindow(1000, start)
	at := func(stamp time.Duration, nonce byte) *preface {
		return &preface{stamp: start.Add(stamp), nonce: [nonceSize]byte{nonce}}
	}
	steps := []struct {
		name  string
		now   time.Duration
		p     *preface
		want  freshness
		holds int
	}{
		{"first", 0, at(0, 1), fresh, 1},
		{"again", 0, at(0, 1), replayed, 1},
		{"another nonce", 0, at(0, 2), fresh, 2},
		{"from before the start", 0, at(-time.Millisecond, 3), stale, 2},
		{"as far ahead as may be", 0, at(30*time.Second, 4), fresh, 3},
		{"further ahead", 0, at(30*time.Second+time.Millisecond, 5), stale, 3},
		{"the first at its last moment", 30 * time.Second, at(0, 1), replayed, 3},
		{"the first after that", 30*time.Second + time.Millisecond, at(0, 1), stale, 3},
		{"the first bucket is gone", 41 * time.Second, at(41*time.Second, 6), fresh, 2},
		{"the one from ahead at its last moment", 60 * time.Second, at(30*time.Second, 4), replayed, 2},
		{"all that was is gone", 10 * time.Minute, at(10*time.Minute, 1), fresh, 1},
	}
	for _, s := range steps {
		if got := w.admit(s.p, start.Add(s.now)); got != s.want || w.size != s.holds {
			t.Errorf("%s: %d holding %d, want %d holding %d", s.name, got, w.size, s.want, s.holds)
		}
	}
}

// At any moment and for any stamp: a nonce that was admitted is not admitted again, and the window holds no more than
// its limit nor longer than a minute and a bucket.
func TestWindowHolds(t *testing.T) {
	start := time.UnixMilli(1_790_000_000_000)
	const limit = 500
	w := newWindow(limit, start)
	var admitted []preface
	now := start
	full := 0
	for i := range 20000 {
		now = now.Add(time.Duration(i%97) * time.Millisecond)
		p := preface{stamp: now.Add(time.Duration(i*7919%61000-30500) * time.Millisecond), nonce: [nonceSize]byte{byte(i), byte(i >> 8)}}
		switch w.admit(&p, now) {
		case fresh:
			admitted = append(admitted, p)
		case windowFull:
			full++
		}
		if len(admitted) > 0 {
			old := admitted[i*31%len(admitted)]
			if got := w.admit(&old, now); got == fresh {
				t.Fatalf("step %d: a nonce of %v ago was admitted again", i, now.Sub(old.stamp))
			}
		}
		if w.size > limit || len(w.buckets) > 8 {
			t.Fatalf("step %d: holds %d nonces in %d buckets", i, w.size, len(w.buckets))
		}
	}
	if len(admitted) == 0 || full == 0 {
		t.Errorf("admitted %d, full %d times: the test reached only one of them", len(admitted), full)
	}
}
