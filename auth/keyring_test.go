package auth

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// flakyKeys is a store whose reads can be counted, failed and held.
type flakyKeys struct {
	*MemoryKeys
	reads atomic.Int64
	fail  atomic.Pointer[error]
	hold  atomic.Pointer[chan struct{}]
}

func (s *flakyKeys) Key(ctx context.Context, hash KeyHash) (KeyRecord, error) {
	s.reads.Add(1)
	r, readErr := s.MemoryKeys.Key(ctx, hash)
	if hold := s.hold.Load(); hold != nil {
		<-*hold // without regard for ctx, as a client without ContextTimeoutEnabled does
	}
	if err := s.fail.Load(); err != nil {
		return KeyRecord{}, *err
	}
	return r, readErr
}

func (s *flakyKeys) setFail(err error) { s.fail.Store(&err) }

func newRing(t *testing.T, opts KeyringOptions) (ring *Keyring, s *flakyKeys, key []byte, r KeyRecord) {
	t.Helper()
	s = &flakyKeys{MemoryKeys: NewMemoryKeys()}
	text, r := NewKeyRecord("test", "team")
	if err := s.PutKey(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	return NewKeyring(s, opts), s, []byte(text), r
}

func wantReads(t *testing.T, s *flakyKeys, want int64) {
	t.Helper()
	if got := s.reads.Load(); got != want {
		t.Errorf("the store was read %d times, want %d", got, want)
	}
}

func wantAuth(t *testing.T, ring *Keyring, key []byte, want errs.Code) {
	t.Helper()
	if _, err := ring.Authorize(t.Context(), key); err == nil || errs.CodeOf(err) != want {
		t.Errorf("Authorize() = %v, want code %v", err, want)
	}
}

func wantPrincipal(t *testing.T, ring *Keyring, key []byte, r KeyRecord) {
	t.Helper()
	got, err := ring.Authorize(t.Context(), key)
	if err != nil || got != (Principal{KeyID: r.ID, Team: r.Team}) {
		t.Errorf("Authorize() = %+v, %v, want the principal of %s", got, err, r.ID)
	}
}

func TestKeyringRemembersForTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ring, s, key, r := newRing(t, KeyringOptions{})
		for range 3 {
			wantPrincipal(t, ring, key, r)
		}
		wantReads(t, s, 1)
		if err := s.DeleteKey(t.Context(), r.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10*time.Second - time.Nanosecond)
		wantPrincipal(t, ring, key, r)
		time.Sleep(time.Nanosecond)
		wantAuth(t, ring, key, errs.Denied) // deletion has taken effect
		wantReads(t, s, 2)
	})
}

func TestKeyringRefusesUnknownKeysBriefly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ring, s, _, _ := newRing(t, KeyringOptions{})
		text, r := NewKeyRecord("late", "team")
		for range 3 {
			wantAuth(t, ring, []byte(text), errs.Denied)
		}
		wantReads(t, s, 1)
		if err := s.PutKey(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		wantPrincipal(t, ring, []byte(text), r)
	})
}

func TestKeyringAsksNobodyAboutMalformedKeys(t *testing.T) {
	ring, s, key, _ := newRing(t, KeyringOptions{})
	good := string(key)
	for _, bad := range []string{
		"", "e2b_", good[:43], good + "0", " " + good, good + "\n", strings.ToUpper(good), "Bearer " + good,
		"e2b_" + strings.Repeat("z", 40), strings.Repeat("a", 1<<16), "e2b_\x00" + good[5:],
	} {
		wantAuth(t, ring, []byte(bad), errs.Denied)
	}
	wantAuth(t, ring, nil, errs.Denied)
	wantReads(t, s, 0)
}

func TestKeyringNeverRemembersFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ring, s, key, r := newRing(t, KeyringOptions{})
		s.setFail(unavailable("read", errors.New("down")))
		wantAuth(t, ring, key, errs.Unavailable)
		s.setFail(errors.New("unreadable"))
		wantAuth(t, ring, key, errs.Internal)
		s.fail.Store(nil)
		wantPrincipal(t, ring, key, r)
		wantReads(t, s, 3)

		s.setFail(unavailable("read", errors.New("down")))
		time.Sleep(9 * time.Second)
		wantPrincipal(t, ring, key, r) // still remembered
		time.Sleep(time.Second)
		wantAuth(t, ring, key, errs.Unavailable) // and not beyond: it may have been deleted
	})
}

func TestKeyringSharesOneRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ring, s, key, r := newRing(t, KeyringOptions{})
		gate := make(chan struct{})
		s.hold.Store(&gate)
		var callers sync.WaitGroup
		for range 100 {
			callers.Go(func() { wantPrincipal(t, ring, key, r) })
		}
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		callers.Go(func() {
			if _, err := ring.Authorize(ctx, key); !errors.Is(err, context.Canceled) {
				t.Errorf("Authorize() = %v for a caller that left, want its context's error", err)
			}
		})
		synctest.Wait()
		cancel() // the others keep waiting
		synctest.Wait()
		close(gate)
		callers.Wait()
		wantReads(t, s, 1)
	})
}

func TestKeyringBoundsReadsInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ring, s, key, r := newRing(t, KeyringOptions{MaxLoads: 2})
		gate := make(chan struct{})
		s.hold.Store(&gate)
		var callers sync.WaitGroup
		for range 2 {
			callers.Go(func() { wantAuth(t, ring, []byte(NewAPIKey()), errs.Unavailable) }) // times out
		}
		synctest.Wait()
		wantAuth(t, ring, key, errs.Unavailable)
		callers.Wait()
		wantAuth(t, ring, key, errs.Unavailable) // the store still holds both slots
		close(gate)
		synctest.Wait()
		wantPrincipal(t, ring, key, r)
	})
}

// TestInventedKeysDoNotCrowdOutValidOnes: sixty-four of them at a slow store once made every key that had to be read again unavailable.
func TestInventedKeysDoNotCrowdOutValidOnes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ring, s, key, r := newRing(t, KeyringOptions{MaxLoads: 2, UnknownTTL: time.Nanosecond})
		wantPrincipal(t, ring, key, r)
		time.Sleep(10 * time.Second) // its time is over
		gate := make(chan struct{})
		s.hold.Store(&gate)
		var callers sync.WaitGroup
		for range 2 {
			callers.Go(func() { wantAuth(t, ring, []byte(NewAPIKey()), errs.Denied) })
		}
		synctest.Wait()
		wantAuth(t, ring, []byte(NewAPIKey()), errs.Unavailable)
		callers.Go(func() { wantPrincipal(t, ring, key, r) })
		synctest.Wait()
		wantReads(t, s, 4)
		close(gate)
		callers.Wait()

		// A key that was deleted is a stranger's.
		if err := s.DeleteKey(t.Context(), r.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		wantAuth(t, ring, key, errs.Denied)
		time.Sleep(time.Second)
		second := make(chan struct{})
		s.hold.Store(&second)
		for range 2 {
			callers.Go(func() { wantAuth(t, ring, []byte(NewAPIKey()), errs.Denied) })
		}
		synctest.Wait()
		wantAuth(t, ring, key, errs.Unavailable)
		close(second)
		callers.Wait()
	})
}

func TestKeyringStaysBounded(t *testing.T) {
	ring, _, key, r := newRing(t, KeyringOptions{MaxKeys: 10})
	wantPrincipal(t, ring, key, r)
	for range 100 {
		wantAuth(t, ring, []byte(NewAPIKey()), errs.Denied)
	}
	if got := ring.unknown.Len(); got != 10 {
		t.Errorf("%d unknown keys are remembered, want 10", got)
	}
	if got := ring.known.Len(); got != 1 {
		t.Errorf("%d known keys are remembered, want the 1 that unknown ones must not evict", got)
	}
}
