package sandboxd

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func ready(n int) func(*Manager) { return func(m *Manager) { m.opts.ReadySlots = n } }

func TestReadySlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(ready(3))
		synctest.Wait()
		want := func(what string, use slotUse, want int) {
			t.Helper()
			synctest.Wait()
			if got := n.m.slots.count(use); got != want {
				t.Errorf("%s: %d slots %s, want %d", what, got, use, want)
			}
		}
		want("at the start", slotReady, 3)
		want("at the start", slotUsed, 0)
		sb := n.create(time.Hour)
		if got := n.host.look(sb.ID).slot; got != 0 {
			t.Errorf("the sandbox has slot %d, want the first that was ready", got)
		}
		want("one taken", slotReady, 3)
		n.pause(sb.ID, true)
		want("one resting", slotResting, 1)
		n.connect(sb.ID)
		if got := n.host.look(sb.ID).slot; got != 1 {
			t.Errorf("resumed in slot %d, want the one that was ready longest", got)
		}
		time.Sleep(slotQuarantine)
		want("rested", slotUsed, 1)
		image := n.crash()
		var text bytes.Buffer
		n.m.opts.Metrics.WritePrometheus(&text)
		for _, line := range []string{`sluice_sandboxd_slots{state="ready"} 3`, `sluice_sandboxd_slots{state="used"} 1`, `sluice_sandboxd_sandboxes{state="running"} 1`} {
			if !strings.Contains(text.String(), line) {
				t.Errorf("no %q in the metrics", line)
			}
		}
		if err := n.m.Kill(t.Context(), sb.ID); err != nil {
			t.Error(err)
		}
		if err := n.stop(); err != nil {
			t.Error(err)
		}
		n.wantNothingLeft()

		image.start() // after a crash they are slots without a record
		if left := image.host.leftovers(); len(left) != 2 {
			t.Errorf("left on the host: %q, want one sandbox and its network", left)
		}
	})
}

// TestPrepareFails: creates do it themselves, what is half made is removed, and it is tried again.
func TestPrepareFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.setFail("prepare", errors.New("broken"))
		n.host.setFail("destroy", errors.New("busy"))
		n.start(ready(2), func(m *Manager) { m.slots = newSlots(3) })
		time.Sleep(time.Second)
		if left := n.host.leftovers(); !slices.Equal(left, []string{"network 0"}) {
			t.Errorf("left on the host: %q, want what cannot be removed", left)
		}
		n.host.setFail("destroy", nil)
		time.Sleep(2 * time.Second)
		sb := n.create(time.Hour)
		if left := n.host.leftovers(); len(left) != 2 {
			t.Errorf("left on the host: %q, want the sandbox", left)
		}
		n.host.setFail("prepare", nil)
		time.Sleep(time.Minute)
		if got := n.m.slots.count(slotReady); got != 2 {
			t.Errorf("%d slots are ready, want 2", got)
		}
		if err := errors.Join(n.m.Kill(t.Context(), sb.ID), n.stop()); err != nil {
			t.Error(err)
		}
		n.wantNothingLeft()
	})
}

// TestStopWhilePreparing: what is half made goes.
func TestStopWhilePreparing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.holdUp("prepare")
		n.start(ready(2), keep)
		sb := n.create(time.Hour)
		if err := n.stop(); err != nil {
			t.Error(err)
		}
		if left := n.host.leftovers(); len(left) != 2 || n.host.look(sb.ID) == nil {
			t.Errorf("left on the host: %q, want the sandbox that is kept", left)
		}
	})
}

// TestSlotsThatCannotBeRemoved are said, and left to the next start.
func TestSlotsThatCannotBeRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(ready(1))
		synctest.Wait()
		n.host.setFail("destroy", errors.New("busy"))
		if err := n.stop(); err == nil || !strings.Contains(err.Error(), "remove slot 0, which was ready") {
			t.Errorf("Run() = %v", err)
		}
		n.host.setFail("destroy", nil)
		n.start(ready(-1))
		n.wantNothingLeft()
	})
}
