package sandboxd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

func (n *node) snapshot(id, name string) Snapshot {
	n.t.Helper()
	snap, err := n.m.Snapshot(n.t.Context(), id, name)
	if err != nil {
		n.t.Fatalf("Snapshot() = %v", err)
	}
	return snap
}

func (n *node) createFrom(template, team string) (Sandbox, error) {
	s := spec(time.Minute)
	s.Template, s.Team = template, team
	return n.m.Create(n.t.Context(), s)
}

// wantSnapshots checks how many there are, known and on disk.
func (n *node) wantSnapshots(want int) {
	n.t.Helper()
	dirs, err := os.ReadDir(filepath.Join(n.dir, "snapshots"))
	if got := n.m.Snapshots(); err != nil || len(dirs) != want || len(got) != want {
		n.t.Errorf("snapshots %v in directories %v, %v, want %d", got, dirs, err, want)
	}
}

func TestSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(keep)
		sb := n.create(time.Hour)
		n.host.remember(sb.ID, "counter 7")
		first := n.snapshot(sb.ID, "Work")
		if first.Name != "work" || first.Team != "t1" || first.SandboxID != sb.ID || first.Template != "base" || first.Bytes == 0 || len(first.ID) != 20 {
			t.Errorf("Snapshot() = %+v", first)
		}
		n.host.remember(sb.ID, "counter 8")
		time.Sleep(time.Second)
		second := n.snapshot(sb.ID, "work")
		n.wantState(sb.ID, StateRunning)
		if n.host.look(sb.ID).frozen {
			t.Error("the source stands still")
		}
		n.wantSnapshots(2)
		check := func(template, team, memory string) {
			t.Helper()
			got, err := n.createFrom(template, team)
			if memory == "" {
				if errs.CodeOf(err) != errs.NotFound {
					t.Errorf("Create(%s) by team %s = %v, want not found", template, team, err)
				}
				return
			}
			if err != nil || n.host.look(got.ID).memory != memory || got.Alias != template || n.host.look(got.ID).init.AccessToken == "" {
				t.Errorf("Create(%s) = %+v, %v, want memory %q", template, got, err, memory)
			}
		}
		check(first.ID, "t1", "counter 7")
		check(second.ID, "t1", "counter 8")
		check("work", "t1", "counter 8")
		check("work", "t2", "")
		check(first.ID, "t2", "")
		check("work:v2", "t1", "")

		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		n.start(keep)
		n.wantSnapshots(2)
		check("work", "t1", "counter 8")
		if err := n.m.RemoveSnapshot(t.Context(), second.ID); err != nil {
			t.Error(err)
		}
		check("work", "t1", "counter 7")
		wantError(t, "RemoveSnapshot", n.m.RemoveSnapshot(t.Context(), second.ID), errs.NotFound, "not found")
		if err := n.m.RemoveSnapshot(t.Context(), first.ID); err != nil {
			t.Error(err)
		}
		check(first.ID, "t1", "")
		n.wantSnapshots(0)
		n.wantState(sb.ID, StateRunning)
	})
}

func TestSnapshotIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		check := func(id, name string, code errs.Code, text string) {
			t.Helper()
			_, err := n.m.Snapshot(t.Context(), id, name)
			wantError(t, "Snapshot", err, code, text)
		}
		check(sb.ID, "../x", errs.Invalid, "invalid template reference")
		check(sb.ID, "x:v1", errs.Invalid, "no tag")
		check(sb.ID, "base", errs.Conflict, "belongs to a template")
		other := n.snapshot(sb.ID, "snapshots-of-mine-20")
		check(sb.ID, strings.ToUpper(other.ID), errs.Invalid, "the form of a snapshot's ID")
		if err := n.m.RemoveSnapshot(t.Context(), other.ID); err != nil {
			t.Error(err)
		}
		check("inone", "", errs.NotFound, "doesn't exist")
		n.host.setFail("snapshot", syscall.ENOSPC)
		check(sb.ID, "", errs.Unavailable, "disk of this node is full")
		n.host.setFail("snapshot", errors.New("broken"))
		check(sb.ID, "", errs.Internal, "no snapshot of Sandbox")
		n.host.setFail("snapshot", nil)
		n.wantState(sb.ID, StateRunning)
		n.pause(sb.ID, true)
		check(sb.ID, "", errs.Conflict, "is paused")
		n.wantSnapshots(0)
	})
}

// TestKillDuringASnapshot: the sandbox goes, and half a snapshot with it.
func TestKillDuringASnapshot(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		n.host.holdUp("snapshot")
		taken := make(chan error, 1)
		go func() { _, err := n.m.Snapshot(context.Background(), sb.ID, ""); taken <- err }()
		synctest.Wait()
		if err := n.m.Kill(t.Context(), sb.ID); err != nil {
			t.Error(err)
		}
		wantError(t, "Snapshot", <-taken, errs.Conflict, "is being killed")
		n.wantNothingLeft()
		n.wantSnapshots(0)
	})
}

// TestRemoveSnapshotInUse: a create that has found it gets it whole.
func TestRemoveSnapshotInUse(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		n.host.remember(sb.ID, "counter 7")
		snap := n.snapshot(sb.ID, "")
		release := n.host.holdUp("network")
		created := make(chan error, 1)
		go func() { _, err := n.createFrom(snap.ID, "t1"); created <- err }()
		synctest.Wait()
		if err := n.m.RemoveSnapshot(t.Context(), snap.ID); err != nil {
			t.Error(err)
		}
		if len(n.m.Snapshots()) != 0 {
			t.Error("it is listed")
		}
		image := n.crash()
		release()
		if err := <-created; err != nil {
			t.Errorf("Create() = %v", err)
		}
		n.wantSnapshots(0)
		image.start()
		synctest.Wait()
		image.wantSnapshots(0)
	})
}

func TestFork(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		s := spec(time.Hour)
		s.AutoPause, s.AutoPauseMemory, s.AutoResume = true, true, true
		sb, err := n.m.Create(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		n.host.remember(sb.ID, "counter 7")
		specs := make([]ForkSpec, 12)
		for i := range specs {
			specs[i] = ForkSpec{Timeout: time.Minute, Nonce: Nonce{byte(i + 1)}, EnvdToken: "token"}
		}
		results, err := n.m.Fork(t.Context(), sb.ID, specs)
		if err != nil || len(results) != len(specs) {
			t.Fatalf("Fork() = %d results, %v", len(results), err)
		}
		for i, r := range results {
			got := r.Sandbox
			if r.Err != nil || got.Nonce != specs[i].Nonce || got.Template != sb.Template || got.Alias != sb.Alias || got.Team != sb.Team ||
				!got.AutoPause || !got.AutoPauseMemory || !got.AutoResume || got.Metadata["k"] != "v" || got.Network.MaskRequestHost != sb.Network.MaskRequestHost ||
				got.EnvdHash != hashOf("token") {
				t.Errorf("copy %d = %+v, %v", i, got, r.Err)
			}
			if proc := n.host.look(got.ID); proc.memory != "counter 7" || proc.init.AccessToken != "token" || proc.init.Hostname != got.ID {
				t.Errorf("copy %d runs as %+v", i, proc)
			}
		}
		n.wantSnapshots(0)
		n.pause(results[0].Sandbox.ID, true) // without what it was made from
		n.connect(results[0].Sandbox.ID)

		n.host.setFail("start", errors.New("broken"))
		results, err = n.m.Fork(t.Context(), sb.ID, specs[:2])
		if err != nil || results[0].Err == nil || results[1].Err == nil {
			t.Errorf("Fork() = %+v, %v, want two failures", results, err)
		}
		n.host.setFail("start", nil)
		_, err = n.m.Fork(t.Context(), sb.ID, nil)
		wantError(t, "Fork into nothing", err, errs.Invalid, "at least 1")
		_, err = n.m.Fork(t.Context(), sb.ID, []ForkSpec{{}})
		wantError(t, "Fork for no time", err, errs.Invalid, "Timeout must be greater than 0")
		_, err = n.m.Fork(t.Context(), "inone", specs)
		wantError(t, "Fork of nothing", err, errs.NotFound, "doesn't exist")
		n.wantSnapshots(0)

		// A crash in the middle of a fork leaves no files either.
		release := n.host.holdUp("network")
		forked := make(chan error, 1)
		go func() { _, err := n.m.Fork(context.Background(), sb.ID, specs[:1]); forked <- err }()
		synctest.Wait()
		image := n.crash()
		release()
		if err := <-forked; err != nil {
			t.Error(err)
		}
		image.start()
		synctest.Wait()
		image.wantSnapshots(0)
	})
}

// TestSnapshotsOfATeamAreBounded: each is as large as the memory and the disk of a sandbox, and one team could fill the node's disk for all.
func TestSnapshotsOfATeamAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(func(m *Manager) { m.opts.TeamSnapshots = 3 })
		boxes := []Sandbox{n.create(time.Hour), n.create(time.Hour)}
		var made, refused atomic.Int32
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				_, err := n.m.Snapshot(t.Context(), boxes[i%2].ID, "work")
				switch {
				case err == nil:
					made.Add(1)
				case errs.CodeOf(err) == errs.Exhausted:
					refused.Add(1)
				default:
					t.Errorf("Snapshot() = %v", err)
				}
			})
		}
		wg.Wait()
		if made.Load() != 3 || refused.Load() != 17 {
			t.Errorf("%d taken and %d refused, want 3 and 17", made.Load(), refused.Load())
		}
		n.wantSnapshots(3)
		if _, err := n.m.Fork(t.Context(), boxes[0].ID, []ForkSpec{{Timeout: time.Hour}}); err != nil {
			t.Errorf("Fork() = %v: its copy does not stay", err)
		}
		other := spec(time.Hour)
		other.Team = "t2"
		theirs, err := n.m.Create(t.Context(), other)
		if err != nil {
			t.Fatal(err)
		}
		n.snapshot(theirs.ID, "work")
		for _, s := range n.m.Snapshots() {
			if s.Team == "t1" {
				if err := n.m.RemoveSnapshot(t.Context(), s.ID); err != nil {
					t.Fatal(err)
				}
			}
		}
		n.snapshot(boxes[0].ID, "work")
	})
}
