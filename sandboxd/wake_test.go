package sandboxd

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/link"
)

func (n *node) createResuming(timeout time.Duration) Sandbox {
	n.t.Helper()
	s := spec(timeout)
	s.AutoResume = true
	sb, err := n.m.Create(n.t.Context(), s)
	if err != nil {
		n.t.Fatal(err)
	}
	return sb
}

// TestWake: a thousand ask, it is resumed once, and all are answered when it runs.
func TestWake(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.createResuming(time.Minute)
		n.host.remember(sb.ID, "counter 7")
		release := n.host.holdUp("save")
		go n.m.Pause(context.Background(), sb.ID, true)
		synctest.Wait()
		var wg sync.WaitGroup
		ask := func() {
			if err := n.m.Wake(t.Context(), sb.ID, sb.Generation); err != nil {
				t.Errorf("Wake() = %v", err)
			}
		}
		for range 500 {
			wg.Go(ask)
		}
		synctest.Wait() // they wait for the pause, and then for the resume
		hold := n.host.holdUp("start")
		release()
		synctest.Wait()
		if got, _ := n.m.Get(sb.ID); got.State != StateResuming {
			t.Fatalf("state = %v, want resuming", got.State)
		}
		for range 500 {
			wg.Go(ask)
		}
		wg.Go(func() {
			got, resumed, err := n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Hour})
			if err != nil || !resumed || time.Until(got.EndAt) != time.Hour {
				t.Errorf("Connect() = ends in %v, %v, %v", time.Until(got.EndAt), resumed, err)
			}
		})
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wantVerdict(t, "gone away", n.m.Wake(impatient, sb.ID, sb.Generation), link.Busy)
		hold()
		wg.Wait()
		got, err := n.m.Get(sb.ID)
		if err != nil || got.State != StateRunning || got.EndAt.Sub(got.StartedAt) < time.Hour || n.host.look(sb.ID).memory != "counter 7" {
			t.Errorf("Get() = %+v, %v", got, err)
		}
		if woken, resumed := n.m.stats.woken.Get(), n.m.stats.resumed.Get(); woken != 1 || resumed != 1 {
			t.Errorf("woken %d times, resumed %d times, want once", woken, resumed)
		}
		wantVerdict(t, "the route of before", n.m.Wake(t.Context(), sb.ID, sb.Generation), link.WrongGeneration)
		if err := n.m.Wake(t.Context(), sb.ID, got.Generation); err != nil {
			t.Errorf("Wake() of a running sandbox = %v", err)
		}
	})
}

// TestWakesDoNotExceedTheTeamsLimit: who pauses what he has and creates as much again could have all of it at once, by a request to each.
func TestWakesDoNotExceedTheTeamsLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(func(m *Manager) { m.opts.TeamSandboxes = 2 })
		paused := []Sandbox{n.createResuming(time.Hour), n.createResuming(time.Hour), n.createResuming(time.Hour)} // the API counts creates
		for _, sb := range paused {
			n.pause(sb.ID, true)
		}
		running := n.create(time.Hour)
		var wg sync.WaitGroup
		for _, sb := range paused {
			wg.Go(func() { _ = n.m.Wake(t.Context(), sb.ID, sb.Generation) })
		}
		wg.Wait()
		awake := 0
		for _, sb := range n.m.List() {
			if sb.State == StateRunning {
				awake++
			}
		}
		if awake != 2 {
			t.Errorf("%d of a team's sandboxes run, want 2", awake)
		}
		last := paused[0]
		for _, sb := range paused {
			if got, err := n.m.Get(sb.ID); err == nil && got.State == StatePaused {
				last = sb
			}
		}
		time.Sleep(wakePause)
		wantVerdict(t, "no place", n.m.Wake(t.Context(), last.ID, last.Generation), link.Busy)
		n.wantState(last.ID, StatePaused)
		_, _, err := n.m.Connect(t.Context(), last.ID, ConnectOptions{Timeout: time.Hour})
		wantError(t, "Connect() without a place", err, errs.Exhausted, "maximum number")
		other := spec(time.Hour)
		other.Team, other.AutoResume = "t2", true
		theirs, err := n.m.Create(t.Context(), other)
		if err != nil {
			t.Fatal(err)
		}
		n.pause(theirs.ID, true)
		if err := n.m.Wake(t.Context(), theirs.ID, theirs.Generation); err != nil {
			t.Errorf("Wake() for another team = %v", err)
		}
		if err := n.m.Kill(t.Context(), running.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(wakePause)
		if err := n.m.Wake(t.Context(), last.ID, last.Generation); err != nil {
			t.Errorf("Wake() with a free place = %v", err)
		}
	})
}

// TestWakeTimeout: as long as it was created for, whatever it was set to later, but not less than the contract's minimum.
func TestWakeTimeout(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		for created, want := range map[time.Duration]time.Duration{time.Minute: wakeTimeout, time.Hour: time.Hour} {
			sb := n.createResuming(created)
			if err := n.m.SetTimeout(t.Context(), sb.ID, 2*time.Hour); err != nil {
				t.Fatal(err)
			}
			n.pause(sb.ID, true)
			if err := n.m.Wake(t.Context(), sb.ID, sb.Generation); err != nil {
				t.Fatal(err)
			}
			if got, _ := n.m.Get(sb.ID); got.EndAt.Sub(got.StartedAt) != want || got.Timeout != created {
				t.Errorf("created for %v: lives for %v, want %v", created, got.EndAt.Sub(got.StartedAt), want)
			}
		}
	})
}

func TestWakeIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		closed := n.create(time.Hour)
		n.pause(closed.ID, true)
		wantVerdict(t, "not allowed", n.m.Wake(t.Context(), closed.ID, closed.Generation), link.NotHere)
		wantVerdict(t, "unknown", n.m.Wake(t.Context(), "inone", 1), link.NotHere)
		sb := n.createResuming(time.Hour)
		n.pause(sb.ID, true)
		wantVerdict(t, "another lifecycle", n.m.Wake(t.Context(), sb.ID, sb.Generation+1), link.WrongGeneration)
		if got := n.m.stats.resumed.Get(); got != 0 {
			t.Errorf("%d resumed", got)
		}

		// A thousand requests a second are not a thousand attempts.
		n.host.setFail("start", errors.New("broken"))
		for range 10 {
			wantVerdict(t, "it fails", n.m.Wake(t.Context(), sb.ID, sb.Generation), link.Busy)
		}
		if got := n.m.stats.resumeFailed.Get(); got != 1 {
			t.Errorf("%d attempts at once, want 1", got)
		}
		n.host.setFail("start", nil)
		time.Sleep(wakePause)
		if err := n.m.Wake(t.Context(), sb.ID, sb.Generation); err != nil {
			t.Errorf("Wake() = %v", err)
		}

		got, _ := n.m.Get(sb.ID)
		n.pause(sb.ID, true)
		n.host.holdUp("start")
		woken := make(chan error, 1)
		go func() { woken <- n.m.Wake(context.Background(), sb.ID, got.Generation) }()
		synctest.Wait()
		if err := n.m.Kill(t.Context(), sb.ID); err != nil {
			t.Error(err)
		}
		wantVerdict(t, "killed meanwhile", <-woken, link.NotHere)
	})
}

// TestWakeDuringARestart: what is not taken up yet is busy.
func TestWakeDuringARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(keep)
		sb := n.createResuming(time.Hour)
		n.create(time.Hour)
		n.pause(sb.ID, true)
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		release := n.host.holdUp("adopt")
		n.make(keep)
		n.run()
		synctest.Wait()
		wantVerdict(t, "starting", n.m.Wake(t.Context(), sb.ID, sb.Generation), link.Busy)
		release()
		<-n.m.Ready()
		if err := n.m.Wake(t.Context(), sb.ID, sb.Generation); err != nil {
			t.Errorf("Wake() = %v", err)
		}
	})
}
