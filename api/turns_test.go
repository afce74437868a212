package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
)

// unread is a client that never reads: what is sent to it stays until the gate opens.
type unread struct {
	*httptest.ResponseRecorder
	gate chan struct{}
}

func (u unread) Write(p []byte) (int, error) {
	<-u.gate
	return u.ResponseRecorder.Write(p)
}

func (s *site) request(ctx context.Context, target string) *http.Request {
	r := httptest.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	r.Header.Set("X-API-Key", keyA)
	return r
}

// TestUnreadListsAreBounded: a hundred lists that nobody read took the node out of memory.
func TestUnreadListsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, nil)
		gate := make(chan struct{})
		for i := range maxTeamLists {
			path := []string{"/sandboxes", "/v2/sandboxes"}[i%2]
			go s.handler.ServeHTTP(unread{httptest.NewRecorder(), gate}, s.request(t.Context(), path))
		}
		synctest.Wait()
		for _, path := range []string{"/sandboxes", "/v2/sandboxes?limit=1"} {
			got := s.call("GET", path, "")
			if got.message() != "429 Too many lists at once: read the answers to the others first" || got.Header.Get("Retry-After") != "1" {
				t.Errorf("GET %s beside %d that nobody reads = %s, Retry-After %q", path, maxTeamLists, got.message(), got.Header.Get("Retry-After"))
			}
		}
		if got := s.call("GET", "/sandboxes", "", "X-API-Key", keyB); got.StatusCode != http.StatusOK {
			t.Errorf("list of another team = %s", got.message())
		}
		if got := s.call("GET", "/templates", ""); got.StatusCode != http.StatusOK {
			t.Errorf("another call = %s", got.message())
		}
		waiting := make(chan int)
		go func() { waiting <- s.call("GET", "/sandboxes", "").StatusCode }()
		synctest.Wait()
		close(gate)
		if got := <-waiting; got != http.StatusOK {
			t.Errorf("the list that waited = %d, want 200", got)
		}
		synctest.Wait()
		if len(s.handler.lists.teams) != 0 || len(s.handler.lists.all) != 0 {
			t.Errorf("turns are left when all have been read: %v", s.handler.lists.teams)
		}
	})
}

func TestTurnsInAllAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lists := newTurns()
		var releases []func()
		for i := range maxLists {
			release, err := lists.acquire(t.Context(), fmt.Sprint("team", i/maxTeamLists))
			if err != nil {
				t.Fatal(err)
			}
			releases = append(releases, release)
		}
		if _, err := lists.acquire(t.Context(), "another"); failureOf(err).status != http.StatusServiceUnavailable || failureOf(err).retryAfter == 0 {
			t.Errorf("acquire() beyond all turns = %v, want 503", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for _, team := range []string{"team0", "another"} {
			if _, err := lists.acquire(ctx, team); !errors.Is(err, context.Canceled) {
				t.Errorf("acquire() for a client that is gone = %v", err)
			}
		}
		for _, release := range releases {
			release()
		}
		if len(lists.teams) != 0 || len(lists.all) != 0 {
			t.Errorf("turns are left: %v", lists.teams)
		}
	})
}

// gone is a client whose connection is closed.
type gone struct{ *httptest.ResponseRecorder }

func (gone) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestListStopsWhenTheClientIsGone(t *testing.T) {
	s := newSite(t, nil)
	fill(s.boxes, 3)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.handler.list(ctx, &query{team: "team-a", running: true, limit: 1}); !errors.Is(err, context.Canceled) {
		t.Errorf("list() for a client that is gone = %v", err)
	}
	defer func() {
		if v := recover(); v != http.ErrAbortHandler {
			t.Errorf("list to a closed connection ended with %v, want a reset", v)
		}
		if len(s.handler.lists.all) != 0 {
			t.Error("its turn is not over")
		}
	}()
	s.handler.ServeHTTP(gone{httptest.NewRecorder()}, s.request(t.Context(), "/sandboxes"))
}
