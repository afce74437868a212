package api

import (
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/sandboxd"
)

func TestTeamLimit(t *testing.T) {
	s := newSite(t, func(o *Options) { o.TeamSandboxes = 2 })
	create := func(key string) reply {
		return s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`, "X-API-Key", key)
	}
	first := mustDecode[gen.Sandbox](t, create(keyA))
	create(keyA)
	got := create(keyA)
	if !strings.HasPrefix(got.message(), "429 you have reached the maximum number of concurrent E2B sandboxes (2)") || got.Header.Get("Retry-After") != "5" {
		t.Errorf("beyond the limit = %s, Retry-After %q", got.message(), got.Header.Get("Retry-After"))
	}
	if got := create(keyB); got.StatusCode != 201 {
		t.Errorf("another team = %s", got.message())
	}
	s.boxes.set(first.SandboxID, func(sb *sandboxd.Sandbox) { sb.State = sandboxd.StatePaused })
	if got := create(keyA); got.StatusCode != 201 {
		t.Errorf("after a pause = %s", got.message())
	}
}

// TestTeamLimitHoldsForCreatesAtOnce: however many come together, exactly as many as fit are made, and none is refused while a
// place is free.
func TestTeamLimitHoldsForCreatesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, func(o *Options) { o.TeamSandboxes = 5 })
		gate := make(chan struct{})
		s.boxes.onCreate = func(sandboxd.CreateSpec) error { <-gate; return nil }
		var made, refused atomic.Int32
		for range 20 {
			go func() {
				switch got := s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`); got.StatusCode {
				case 201:
					made.Add(1)
				case 429:
					refused.Add(1)
				default:
					t.Errorf("create = %s", got.message())
				}
			}()
		}
		synctest.Wait()
		if made.Load() != 0 || refused.Load() != 0 {
			t.Errorf("while the first five are made, %d were answered", made.Load()+refused.Load())
		}
		close(gate)
		synctest.Wait()
		if made.Load() != 5 || refused.Load() != 15 {
			t.Errorf("%d made and %d refused, want 5 and 15", made.Load(), refused.Load())
		}
	})
}

// TestPausedSandboxesOfATeamAreBounded: a pause gives a place back but no disk, so that create and pause in turn would fill the node's.
func TestPausedSandboxesOfATeamAreBounded(t *testing.T) {
	s := newSite(t, func(o *Options) { o.TeamSandboxes, o.TeamPaused = 2, 3 })
	var ids []string
	for range 3 {
		sb := mustDecode[gen.Sandbox](t, s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`))
		s.call("POST", "/sandboxes/"+sb.SandboxID+"/pause", "")
		ids = append(ids, sb.SandboxID)
	}
	if got := s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`); got.StatusCode != 429 || !strings.Contains(got.message(), "paused") {
		t.Errorf("create with three paused ones = %s, want 429", got.message())
	}
	s.call("POST", "/v2/sandboxes/"+ids[0]+"/connect", "")
	if got := s.call("POST", "/sandboxes/"+ids[0]+"/fork", ""); got.StatusCode != 201 {
		t.Errorf("fork with two paused ones = %s", got.message())
	}
	s.call("POST", "/sandboxes/"+ids[0]+"/pause", "")
	s.call("DELETE", "/sandboxes/"+ids[1], "")
	if got := s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`); got.StatusCode != 201 {
		t.Errorf("create when one is gone = %s", got.message())
	}
}
