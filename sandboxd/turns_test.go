package sandboxd

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestSilentGuestsKeepNoOtherTeamWaiting: what is root in its sandbox can make its agent say nothing, and every resume of it and every create
// from a snapshot of it then takes until a timeout. A team that does so eight at a time would be the only one whose sandboxes start, or are saved.
func TestSilentGuestsKeepNoOtherTeamWaiting(t *testing.T) {
	for _, what := range []string{"start", "save"} {
		t.Run(what, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				other := spec(time.Hour)
				other.Team = "t2"
				theirs, err := n.m.Create(t.Context(), other)
				if err != nil {
					t.Fatal(err)
				}
				var ours []Sandbox
				for range 30 {
					ours = append(ours, n.create(time.Hour))
				}
				release := n.host.holdUp(what)
				var wg sync.WaitGroup
				for i := range 30 {
					wg.Go(func() {
						ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
						defer cancel()
						if what == "save" {
							_ = n.m.Pause(ctx, ours[i].ID, true) // most of them wait, and give up
							return
						}
						_, _ = n.m.Create(ctx, spec(time.Hour))
					})
				}
				synctest.Wait()
				n.host.holdNothing() // of those that come now
				began := time.Now()
				if what == "save" {
					err = n.m.Pause(t.Context(), theirs.ID, true)
				} else {
					_, err = n.m.Create(t.Context(), other)
				}
				if err != nil || time.Since(began) > time.Second {
					t.Errorf("another team's: %v after %v", err, time.Since(began))
				}
				release()
				wg.Wait()
				if left := len(n.m.creating.all) + len(n.m.saving.all) + len(n.m.creating.teams) + len(n.m.saving.teams); left != 0 {
					t.Errorf("%d turns are still taken", left)
				}
			})
		})
	}
}
