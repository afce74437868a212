package sandboxd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// node is a manager on a fake host with a fake catalogue. The host, the catalogue and the directory outlive the manager.
type node struct {
	t    *testing.T
	host *fakeHost
	cat  *fakeCatalogue
	dir  string

	m    *Manager
	stop func() error // ends Run and returns its error; any number of times
}

func newNode(t *testing.T) *node {
	dir, err := os.MkdirTemp("", "sluice-node-") // t.TempDir is too long for a state directory
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := &node{t: t, host: newFakeHost(), cat: newFakeCatalogue(), dir: dir}
	n.cat.note = n.host.note
	return n
}

// start makes a manager and runs it until the test or n.stop ends it.
func (n *node) start(change ...func(*Manager)) *node {
	n.t.Helper()
	n.make(change...)
	n.run()
	select {
	case <-n.m.Ready():
	case <-n.m.closing:
		n.t.Fatalf("Run() = %v before it was ready", n.stop())
	}
	settle(n.m)
	return n
}

// settle waits for the removals that a start has begun.
func settle(m *Manager) {
	m.mu.RLock()
	var condemned []*life
	for _, l := range m.lives {
		if l.condemned() {
			condemned = append(condemned, l)
		}
	}
	m.mu.RUnlock()
	for _, l := range condemned {
		<-l.buried
	}
}

func (n *node) make(change ...func(*Manager)) {
	n.t.Helper()
	m, err := New(Options{
		StateDir: n.dir, Machine: fakeMachine{n.host, 50}, Publisher: n.cat, ReadySlots: -1, // for tests that count what is on the host
		OnGone: func(id string, _ uint64) { n.host.note("gone %s", id) },
	})
	if err != nil {
		n.t.Fatal(err)
	}
	for _, c := range change {
		c(m)
	}
	n.m = m
}

func (n *node) run() {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.m.Run(ctx) }()
	var result error
	stopped := false
	n.stop = func() error {
		cancel()
		if !stopped {
			result, stopped = <-ended, true
		}
		return result
	}
	n.t.Cleanup(func() { n.stop() })
}

func keep(m *Manager) { m.opts.KeepSandboxes = true }

func (n *node) create(timeout time.Duration) Sandbox {
	n.t.Helper()
	sb, err := n.m.Create(n.t.Context(), spec(timeout))
	if err != nil {
		n.t.Fatalf("Create() = %v", err)
	}
	return sb
}

func spec(timeout time.Duration) CreateSpec {
	return CreateSpec{
		Template: "base", Timeout: timeout, Team: "t1", EnvdToken: "secret-envd-token",
		Metadata: map[string]string{"k": "v"}, EnvVars: map[string]string{"SECRET": "secret-variable"},
		Network: Network{AllowPublicTraffic: true, MaskRequestHost: "localhost:${PORT}", HTTPSPorts: []uint16{8443}},
	}
}

// wantNothingLeft checks that no trace of any sandbox exists: host, directories, routes.
func (n *node) wantNothingLeft() {
	n.t.Helper()
	if left := n.host.leftovers(); len(left) > 0 {
		n.t.Errorf("left on the host: %q", left)
	}
	if dirs, err := os.ReadDir(filepath.Join(n.dir, "sandboxes")); err != nil || len(dirs) > 0 {
		n.t.Errorf("left directories: %v, %v", dirs, err)
	}
	if routes := n.cat.all(); len(routes) > 0 {
		n.t.Errorf("left routes: %v", routes)
	}
}

func (n *node) wantState(id string, want State) {
	n.t.Helper()
	sb, err := n.m.Get(id)
	if want == "" {
		if errs.CodeOf(err) != errs.NotFound {
			n.t.Errorf("Get(%s) = %v, %v, want not found", id, sb.State, err)
		}
		return
	}
	if err != nil || sb.State != want {
		n.t.Errorf("Get(%s) = %v, %v, want %v", id, sb.State, err, want)
	}
}

// wantError checks code and text of an error that a client sees.
func wantError(t *testing.T, what string, err error, code errs.Code, text string) {
	t.Helper()
	if err == nil || errs.CodeOf(err) != code || !strings.Contains(errs.Message(err), text) {
		t.Errorf("%s = %v (%v, %q), want %v with %q", what, err, errs.CodeOf(err), errs.Message(err), code, text)
	}
}

// bubble runs a test of a started node in a bubble of time.
func bubble(t *testing.T, test func(t *testing.T, n *node)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newNode(t).start()) })
}

func TestCreateToKill(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Minute)
		if !strings.HasPrefix(sb.ID, "i") || len(sb.ID) != 21 {
			t.Errorf("ID = %q, want i and 20 characters", sb.ID)
		}
		if sb.State != StateRunning || sb.EndAt.Sub(sb.StartedAt) != time.Minute || sb.Alias != "base" || sb.CPUs != 2 {
			t.Errorf("Create() = %+v", sb)
		}
		if got, err := n.m.Get(sb.ID); err != nil || got.ID != sb.ID {
			t.Errorf("Get() = %v, %v", got, err)
		}
		if list := n.m.List(); len(list) != 1 || list[0].ID != sb.ID {
			t.Errorf("List() = %v", list)
		}
		if p, ok := n.cat.route(sb.ID); !ok || !p.equal(routeOf(sb)) {
			t.Errorf("route = %+v, %v, want %+v", p, ok, routeOf(sb))
		}
		init := n.host.proc(sb.ID).init
		if init.AccessToken != "secret-envd-token" || init.EnvVars["SECRET"] != "secret-variable" || init.EnvVars["E2B_SANDBOX_ID"] != sb.ID {
			t.Errorf("guest was told %+v", init)
		}
		record, err := os.ReadFile(filepath.Join(n.dir, "sandboxes", sb.ID, recordFile))
		if err != nil || strings.Contains(string(record), "secret-") {
			t.Errorf("record = %s, %v, want one without secrets", record, err)
		}

		if err := n.m.Kill(t.Context(), sb.ID); err != nil {
			t.Fatalf("Kill() = %v", err)
		}
		want := []string{"publish ", "withdraw ", "gone ", "stop ", "unwire "}
		for i := range want {
			want[i] += sb.ID
		}
		if got := n.host.events(); !slices.Equal(got, want) {
			t.Errorf("events = %q, want %q", got, want)
		}
		n.wantNothingLeft()
		notFound := `Sandbox "` + sb.ID + `" doesn't exist or you don't have access to it`
		wantError(t, "Kill", n.m.Kill(t.Context(), sb.ID), errs.NotFound, notFound)
		wantError(t, "SetTimeout", n.m.SetTimeout(t.Context(), sb.ID, 1), errs.NotFound, notFound)
		_, err = n.m.Get(sb.ID)
		wantError(t, "Get", err, errs.NotFound, notFound)
		_, err = n.m.Metrics(t.Context(), sb.ID)
		wantError(t, "Metrics", err, errs.NotFound, notFound)
	})
}

func TestDeadlines(t *testing.T) {
	const minute = time.Minute
	ctx := context.Background()
	tests := map[string]struct {
		act  func(n *node, id string) error
		code errs.Code
		end  time.Duration // after create, when the act was 30 s after it
	}{
		"left alone":           {func(*node, string) error { return nil }, 0, minute},
		"extended":             {func(n *node, id string) error { return n.m.SetTimeout(ctx, id, 5*minute) }, 0, 30*time.Second + 5*minute},
		"shortened":            {func(n *node, id string) error { return n.m.SetTimeout(ctx, id, time.Second) }, 0, 31 * time.Second},
		"ended":                {func(n *node, id string) error { return n.m.SetTimeout(ctx, id, 0) }, 0, 30 * time.Second},
		"negative":             {func(n *node, id string) error { return n.m.SetTimeout(ctx, id, -minute) }, 0, 30 * time.Second},
		"capped":               {func(n *node, id string) error { return n.m.SetTimeout(ctx, id, 100*time.Hour) }, 0, 24 * time.Hour},
		"refreshed":            {func(n *node, id string) error { return n.m.Refresh(ctx, id, minute) }, 0, 90 * time.Second},
		"refreshed by less":    {func(n *node, id string) error { return n.m.Refresh(ctx, id, 20*time.Second) }, 0, minute},
		"refreshed by nothing": {func(n *node, id string) error { return n.m.Refresh(ctx, id, 0) }, 0, minute},
		"refreshed too far":    {func(n *node, id string) error { return n.m.Refresh(ctx, id, 3601*time.Second) }, errs.Invalid, minute},
		"connected": {func(n *node, id string) error {
			_, _, err := n.m.Connect(ctx, id, ConnectOptions{Timeout: 2 * minute})
			return err
		}, 0, 150 * time.Second},
		"connected for less": {func(n *node, id string) error {
			_, _, err := n.m.Connect(ctx, id, ConnectOptions{Timeout: time.Second})
			return err
		}, 0, minute},
		"connected for nothing": {func(n *node, id string) error {
			_, _, err := n.m.Connect(ctx, id, ConnectOptions{Timeout: 0})
			return err
		}, errs.Invalid, minute},
		"connected for too long": {func(n *node, id string) error {
			_, _, err := n.m.Connect(ctx, id, ConnectOptions{Timeout: 25 * time.Hour})
			return err
		}, errs.Invalid, minute},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				sb := n.create(minute)
				started := time.Now()
				time.Sleep(30 * time.Second)
				if err := tt.act(n, sb.ID); errs.CodeOf(err) != tt.code || (err == nil) != (tt.code == 0) {
					t.Fatalf("act = %v, want code %v", err, tt.code)
				}
				synctest.Wait()
				if left := tt.end - time.Since(started); left > 0 {
					if got, _ := n.m.Get(sb.ID); got.EndAt.Sub(sb.StartedAt) != tt.end {
						t.Errorf("EndAt is %v after the start, want %v", got.EndAt.Sub(sb.StartedAt), tt.end)
					}
					if p, _ := n.cat.route(sb.ID); p.EndAt.Sub(sb.StartedAt) != tt.end {
						t.Errorf("the route's end is %v after the start, want %v", p.EndAt.Sub(sb.StartedAt), tt.end)
					}
					time.Sleep(left - time.Millisecond)
					n.wantState(sb.ID, StateRunning)
					time.Sleep(2 * time.Millisecond)
				}
				time.Sleep(50 * time.Millisecond)
				synctest.Wait()
				n.wantState(sb.ID, "")
				n.wantNothingLeft()
			})
		})
	}
}

func TestRefreshGivesAtLeastTheMinimum(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(5 * time.Second)
		if err := n.m.Refresh(t.Context(), sb.ID, time.Second); err != nil {
			t.Fatal(err)
		}
		got, _ := n.m.Get(sb.ID)
		if d := time.Until(got.EndAt); d != 15*time.Second {
			t.Errorf("ends in %v, want 15s", d)
		}
	})
}

// TestKillWithoutAReset: a connection that will not close made its sandbox unkillable.
func TestKillWithoutAReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stuck := make(chan struct{})
		var calls atomic.Int32
		n := newNode(t).start(func(m *Manager) {
			m.opts.OnGone = func(string, uint64) { calls.Add(1); <-stuck }
		})
		sb := n.create(time.Minute)
		n.host.setFail("unwire", errors.New("busy")) // a removal that is repeated
		n.m.Kill(t.Context(), sb.ID)
		if n.host.proc(sb.ID) != nil {
			t.Error("the process runs while the reset hangs")
		}
		n.host.setFail("unwire", nil)
		time.Sleep(time.Minute)
		n.wantNothingLeft()
		if err := n.stop(); err != nil {
			t.Errorf("Run() = %v", err)
		}
		close(stuck)
		if got := calls.Load(); got != 1 {
			t.Errorf("OnGone was called %d times, want once", got)
		}
	})
}

func TestRequestsDuringAKill(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Minute)
		release := n.host.holdUp("destroy")
		killed := make(chan error, 2)
		for range 2 {
			go func() { killed <- n.m.Kill(context.Background(), sb.ID) }()
		}
		synctest.Wait()
		if _, ok := n.cat.route(sb.ID); ok {
			t.Error("the route is there while the sandbox is being killed")
		}
		n.wantState(sb.ID, "")
		if len(n.m.List()) != 0 {
			t.Error("List shows a sandbox that is being killed")
		}
		text := `Sandbox "` + sb.ID + `" is being killed`
		ctx := t.Context()
		wantError(t, "SetTimeout", n.m.SetTimeout(ctx, sb.ID, time.Hour), errs.Conflict, text)
		wantError(t, "Refresh", n.m.Refresh(ctx, sb.ID, time.Hour), errs.Conflict, text)
		wantError(t, "Pause", n.m.Pause(ctx, sb.ID, true), errs.Conflict, text)
		wantError(t, "UpdateNetwork", n.m.UpdateNetwork(ctx, sb.ID, Network{}), errs.Conflict, text)
		_, _, err := n.m.Connect(ctx, sb.ID, ConnectOptions{Timeout: time.Hour})
		wantError(t, "Connect", err, errs.Conflict, text)
		if len(killed) != 0 {
			t.Error("Kill returned before the sandbox was gone")
		}
		impatient, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		wantError(t, "Kill with little time", n.m.Kill(impatient, sb.ID), errs.Unavailable, "still being killed")
		release()
		for range 2 {
			if err := <-killed; err != nil {
				t.Errorf("Kill() = %v", err)
			}
		}
		n.wantNothingLeft()
	})
}

func TestRequestsWaitForEachOther(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Minute)
		release := n.host.holdUp("set fence")
		updated, moved := make(chan error, 1), make(chan error, 1)
		go func() { updated <- n.m.UpdateNetwork(context.Background(), sb.ID, Network{}) }()
		synctest.Wait()
		go func() { moved <- n.m.SetTimeout(context.Background(), sb.ID, time.Hour) }()
		synctest.Wait()
		if len(moved) != 0 {
			t.Error("SetTimeout did not wait for UpdateNetwork")
		}
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wantError(t, "SetTimeout", n.m.SetTimeout(impatient, sb.ID, 1), errs.Unavailable, "busy")
		release()
		if err := errors.Join(<-updated, <-moved); err != nil {
			t.Error(err)
		}
		// A kill does not wait for what a request is waiting for.
		n.host.holdUp("set fence")
		go func() { updated <- n.m.UpdateNetwork(context.Background(), sb.ID, Network{}) }()
		synctest.Wait()
		if err := n.m.Kill(t.Context(), sb.ID); err != nil {
			t.Error(err)
		}
		if err := <-updated; err == nil {
			t.Error("UpdateNetwork of a killed sandbox succeeded")
		}
	})
}

func TestPauseNamesTheMachine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(func(m *Manager) { m.machine = plainMachine{m.machine} })
		sb := n.create(time.Minute)
		autoPause := spec(time.Minute)
		autoPause.AutoPause = true
		_, err := n.m.Create(t.Context(), autoPause)
		wantError(t, "Create", err, errs.Invalid, "autoPause")
		_, err = n.m.Snapshot(t.Context(), sb.ID, "")
		wantError(t, "Snapshot", err, errs.Invalid, "cannot be snapshotted: the fake machine of this node has no snapshots")
		_, err = n.m.Fork(t.Context(), sb.ID, []ForkSpec{{Timeout: time.Minute}})
		wantError(t, "Fork", err, errs.Invalid, "cannot be forked: the fake machine of this node has no snapshots")
		wantError(t, "Pause", n.m.Pause(t.Context(), sb.ID, true), errs.Invalid, "cannot be paused: the fake machine of this node has no snapshots; keep it alive")
		wantError(t, "Pause", n.m.Pause(t.Context(), "inone", true), errs.NotFound, "doesn't exist")
		n.wantState(sb.ID, StateRunning)
	})
}

func TestCreateFailsAndLeavesNothing(t *testing.T) {
	broken := errors.New("broken")
	for _, what := range []string{"network", "fence", "start", "init", "health", "commit", "publish"} {
		t.Run(what, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				n.host.setFail(what, broken)
				want := errs.Internal
				if what == "publish" {
					n.cat.setDown(broken)
					want = errs.Unavailable
				}
				_, err := n.m.Create(t.Context(), spec(time.Minute))
				if errs.CodeOf(err) != want || !errors.Is(err, broken) {
					t.Errorf("Create() = %v, want %v", err, want)
				}
				n.cat.setDown(nil)
				n.wantNothingLeft()
				if c := n.m.Capacity(); c.Sandboxes != 0 {
					t.Errorf("Capacity() = %+v, want no sandboxes", c)
				}
			})
		})
		if what == "publish" || what == "commit" {
			continue // these do not wait for a context of ours
		}
		t.Run(what+" hangs and the client goes away", func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				n.host.holdUp(what)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				_, err := n.m.Create(ctx, spec(time.Minute))
				wantError(t, "Create", err, errs.Unavailable, "cancelled")
				n.wantNothingLeft()
			})
		})
		t.Run(what+" hangs for ever", func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				n.host.holdUp(what)
				_, err := n.m.Create(t.Context(), spec(time.Minute))
				if errs.CodeOf(err) != errs.Internal || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Create() = %v, want an internal error for the time", err)
				}
				n.wantNothingLeft()
			})
		})
	}
}

// TestCreateHidesWhatPartsSay: a part's "invalid" or "not found" is about what we gave it, not about the client's request.
func TestCreateHidesWhatPartsSay(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.host.setFail("start", errs.New(errs.Invalid, "directory /var/lib/secret is not one"))
		_, err := n.m.Create(t.Context(), spec(time.Minute))
		wantError(t, "Create", err, errs.Internal, "Failed to place sandbox")
		if strings.Contains(errs.Message(err), "secret") {
			t.Errorf("the client is told %q", errs.Message(err))
		}
	})
}

func TestCreateRefusesBadInput(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		tests := map[string]struct {
			change func(*CreateSpec)
			code   errs.Code
			text   string
		}{
			"no time":           {func(s *CreateSpec) { s.Timeout = 0 }, errs.Invalid, "Timeout must be greater than 0"},
			"negative time":     {func(s *CreateSpec) { s.Timeout = -1 }, errs.Invalid, "Timeout must be greater than 0"},
			"too much time":     {func(s *CreateSpec) { s.Timeout = 25 * time.Hour }, errs.Invalid, "Timeout cannot be greater than 24 hours"},
			"unknown template":  {func(s *CreateSpec) { s.Template = "Nope" }, errs.NotFound, "template 'nope' not found"},
			"unknown tag":       {func(s *CreateSpec) { s.Template = "base:v7" }, errs.NotFound, "template 'base:v7' not found"},
			"unknown namespace": {func(s *CreateSpec) { s.Template = "acme/base" }, errs.NotFound, "not found"},
			"bad template":      {func(s *CreateSpec) { s.Template = "../etc" }, errs.Invalid, "invalid template reference"},
			"bad deny list":     {func(s *CreateSpec) { s.Network.DenyOut = []string{"nonsense"} }, errs.Invalid, "invalid"},
		}
		for name, tt := range tests {
			s := spec(time.Minute)
			tt.change(&s)
			_, err := n.m.Create(t.Context(), s)
			wantError(t, name, err, tt.code, tt.text)
		}
		if got := n.host.events(); len(got) > 0 {
			t.Errorf("bad input reached the host: %q", got)
		}
		n.wantNothingLeft()
	})
}

func TestKillDuringCreate(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.host.holdUp("init")
		created := make(chan error, 1)
		go func() {
			_, err := n.m.Create(context.Background(), spec(time.Minute))
			created <- err
		}()
		synctest.Wait()
		var id string
		for id = range n.m.lives {
		}
		wantError(t, "SetTimeout", n.m.SetTimeout(t.Context(), id, 1), errs.NotFound, "doesn't exist")
		n.wantState(id, "")
		if err := n.m.Kill(t.Context(), id); err != nil {
			t.Errorf("Kill() = %v", err)
		}
		wantError(t, "Create", <-created, errs.Conflict, "is being killed")
		n.wantNothingLeft()
	})
}

func TestGuestDies(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Minute)
		n.host.die(sb.ID, errors.New("out of memory"))
		synctest.Wait()
		n.wantState(sb.ID, "")
		n.wantNothingLeft()
		if got := n.m.stats.gone[GoneDied].Get(); got != 1 {
			t.Errorf("died counter = %d, want 1", got)
		}
	})
}

func TestRemovalIsRepeatedUntilDone(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Minute)
		n.host.setFail("unwire", errors.New("device or resource busy"))
		if err := n.m.Kill(t.Context(), sb.ID); err == nil {
			t.Error("Kill() = nil though the network is still there")
		}
		n.wantState(sb.ID, "")
		if c := n.m.Capacity(); c.Sandboxes != 1 {
			t.Errorf("Capacity() = %+v, want the sandbox counted while its network exists", c)
		}
		n.host.setFail("unwire", nil)
		time.Sleep(time.Minute)
		n.wantNothingLeft()
		if c := n.m.Capacity(); c.Sandboxes != 0 {
			t.Errorf("Capacity() = %+v", c)
		}
	})
}

func TestLimits(t *testing.T) {
	t.Run("sandboxes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t).start(func(m *Manager) { m.opts.MaxSandboxes = 2 })
			n.create(time.Minute)
			sb := n.create(time.Minute)
			_, err := n.m.Create(t.Context(), spec(time.Minute))
			wantError(t, "Create", err, errs.Exhausted, "this node is full (2 sandboxes)")
			if err := n.m.Kill(t.Context(), sb.ID); err != nil {
				t.Fatal(err)
			}
			n.create(time.Minute)
		})
	})
	t.Run("slots rest", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t).start(func(m *Manager) { m.slots = newSlots(1) })
			sb := n.create(time.Minute)
			if err := n.m.Kill(t.Context(), sb.ID); err != nil {
				t.Fatal(err)
			}
			_, err := n.m.Create(t.Context(), spec(time.Minute))
			wantError(t, "Create", err, errs.Exhausted, "slot")
			time.Sleep(slotQuarantine)
			n.create(time.Minute)
		})
	})
	t.Run("creates at once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t).start(func(m *Manager) { m.creating = newTurns(1) })
			release := n.host.holdUp("start")
			first := make(chan error, 1)
			go func() { _, err := n.m.Create(context.Background(), spec(time.Minute)); first <- err }()
			synctest.Wait()
			_, err := n.m.Create(t.Context(), spec(time.Minute))
			wantError(t, "Create", err, errs.Exhausted, "at once")
			release()
			if err := <-first; err != nil {
				t.Error(err)
			}
			n.create(time.Minute)
		})
	})
}

func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount a small file system")
	}
	n := newNode(t)
	unmount := mountSmall(t, n.dir, "128k") // too small for a reserve
	defer unmount()
	n.start()
	ballast := filepath.Join(n.dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); err == nil {
		t.Fatal("the file system is not small")
	}
	_, err := n.m.Create(t.Context(), spec(time.Minute))
	wantError(t, "Create", err, errs.Unavailable, "disk of this node is full")
	n.wantNothingLeft()

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	sb := n.create(time.Minute)
	os.WriteFile(ballast, make([]byte, 1<<20), 0o600)
	wantError(t, "SetTimeout", n.m.SetTimeout(t.Context(), sb.ID, time.Hour), errs.Unavailable, "disk of this node is full")
	if got, _ := n.m.Get(sb.ID); !got.EndAt.Equal(sb.EndAt) {
		t.Error("the deadline moved though it could not be recorded")
	}

	// What takes away holds at once, and is recorded when there is room.
	wantError(t, "SetTimeout", n.m.SetTimeout(t.Context(), sb.ID, 30*time.Second), errs.Unavailable, "the change is in force")
	got, err := n.m.Get(sb.ID)
	if err != nil || !got.EndAt.Before(sb.EndAt) {
		t.Errorf("Get() after a shorter deadline = %v, %v", got.EndAt, err)
	}
	no := false
	tighter := Network{AllowInternetAccess: &no}
	wantError(t, "UpdateNetwork", n.m.UpdateNetwork(t.Context(), sb.ID, tighter), errs.Unavailable, "the change is in force")
	if n.host.fence(n.host.proc(sb.ID).slot).AllowInternet {
		t.Error("a tighter fence waits for the disk")
	}
	wantError(t, "UpdateNetwork", n.m.UpdateNetwork(t.Context(), sb.ID, Network{}), errs.Unavailable, "disk of this node is full")
	if n.host.fence(n.host.proc(sb.ID).slot).AllowInternet {
		t.Error("a looser fence is in force though it could not be recorded")
	}
	n.m.writeOwed()
	if rec, err := n.m.journal.read(sb.ID); err != nil || !rec.Sandbox.EndAt.Equal(sb.EndAt) {
		t.Errorf("record on a full disk = %v, %v, want the old one", rec.Sandbox.EndAt, err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	n.m.writeOwed()
	rec, err := n.m.journal.read(sb.ID)
	if err != nil || !rec.Sandbox.EndAt.Equal(got.EndAt) || rec.Sandbox.Network.AllowInternetAccess == nil {
		t.Errorf("record when there is room = %+v, %v", rec.Sandbox, err)
	}
	os.WriteFile(ballast, make([]byte, 1<<20), 0o600)
	if err := n.m.Kill(t.Context(), sb.ID); err != nil {
		t.Errorf("Kill() on a full disk = %v", err)
	}
	n.wantNothingLeft()
	if err := n.stop(); err != nil {
		t.Error(err)
	}
}

// TestReserve: a tenant that fills the disk stops creates, and nothing that concerns what runs.
func TestReserve(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount a small file system")
	}
	n := newNode(t)
	unmount := mountSmall(t, n.dir, "8m")
	defer unmount()
	n.make()
	if err := errors.Join(os.MkdirAll(n.m.journal.dir, 0o711), n.m.journal.reserve.hold()); err != nil {
		t.Fatal(err)
	}
	n.run()
	<-n.m.Ready()
	sb := n.create(time.Minute)
	ballast := filepath.Join(n.dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 8<<20), 0o600); err == nil {
		t.Fatal("the file system is not small")
	}
	_, err := n.m.Create(t.Context(), spec(time.Minute))
	wantError(t, "Create", err, errs.Unavailable, "disk of this node is full")
	if err := n.m.SetTimeout(t.Context(), sb.ID, time.Hour); err != nil {
		t.Errorf("SetTimeout() with the reserve = %v", err)
	}
	if rec, err := n.m.journal.read(sb.ID); err != nil || rec.Sandbox.EndAt.Equal(sb.EndAt) {
		t.Errorf("record = %v, %v, want the new end", rec.Sandbox.EndAt, err)
	}
	if err := n.m.journal.reserve.hold(); err == nil {
		t.Error("a reserve was made on a full disk")
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := n.m.journal.reserve.hold(); err != nil {
		t.Errorf("the reserve is not made again: %v", err)
	}
	if err := n.stop(); err != nil {
		t.Error(err)
	}
}

func TestStop(t *testing.T) {
	t.Run("kills all", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			n.create(time.Minute)
			n.create(time.Minute)
			n.host.holdUp("init")
			created := make(chan error, 1)
			go func() { _, err := n.m.Create(context.Background(), spec(time.Minute)); created <- err }()
			synctest.Wait()
			if err := n.stop(); err != nil {
				t.Errorf("Run() = %v", err)
			}
			if err := <-created; err == nil {
				t.Error("a create that was interrupted by the stop succeeded")
			}
			n.wantNothingLeft()
			if !n.cat.node.Draining {
				t.Error("the last lease does not say that the node is draining")
			}
			_, err := n.m.Create(t.Context(), spec(time.Minute))
			wantError(t, "Create", err, errs.Unavailable, "stopping")
		})
	})
	t.Run("keeps the running", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t).start(keep)
			sb := n.create(time.Minute)
			n.host.holdUp("init")
			go n.m.Create(context.Background(), spec(time.Minute))
			synctest.Wait()
			if err := n.stop(); err != nil {
				t.Errorf("Run() = %v", err)
			}
			if left := n.host.leftovers(); len(left) != 2 || n.host.proc(sb.ID) == nil {
				t.Errorf("left on the host: %q, want only the running sandbox and its network", left)
			}
			if _, ok := n.cat.route(sb.ID); !ok {
				t.Error("the route of a kept sandbox is gone")
			}
			if !slices.Contains(n.host.events(), "release "+sb.ID) {
				t.Error("the kept sandbox is still being watched")
			}
			n.host.holdNothing()
			n.start()
			if got, err := n.m.Get(sb.ID); err != nil || got.Generation != sb.Generation {
				t.Errorf("Get() after a restart = %+v, %v", got, err)
			}
		})
	})
	t.Run("keeps nothing when there is nothing", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t).start(keep)
			sb := n.create(time.Minute)
			if err := errors.Join(n.m.Kill(t.Context(), sb.ID), n.stop()); err != nil {
				t.Error(err)
			}
			if !slices.Contains(n.host.events(), "close") {
				t.Error("what the machine made on the host stays, though no sandbox does")
			}
		})
	})
	t.Run("says what it could not remove", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			n.create(time.Minute)
			n.host.setFail("unwire", errors.New("busy"))
			if err := n.stop(); err == nil || !strings.Contains(err.Error(), "1 sandboxes could not be removed") {
				t.Errorf("Run() = %v", err)
			}
			n.host.setFail("unwire", nil)
			n.start()
			n.wantNothingLeft()
		})
	})
}

func TestMetricsAreSampled(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(2 * time.Hour)
		if got, err := n.m.Metrics(t.Context(), sb.ID); err != nil || len(got) != 0 {
			t.Errorf("Metrics() right after create = %v, %v, want none", got, err)
		}
		time.Sleep(11 * time.Second)
		got, err := n.m.Metrics(t.Context(), sb.ID)
		if err != nil || len(got) != 2 || got[0].CPUUsedPct != 12.5 || got[1].Time.Sub(got[0].Time) != sampleInterval {
			t.Errorf("Metrics() = %+v, %v, want two samples", got, err)
		}
		if got, err := n.m.Refusals(sb.ID); err != nil || got.Denied != 3 {
			t.Errorf("Refusals() = %+v, %v", got, err)
		}
		n.host.holdUp("metrics") // a guest that does not answer costs its own watcher a second, and nobody else anything
		other := n.create(2 * time.Hour)
		time.Sleep(20 * time.Second)
		if err := n.m.Kill(t.Context(), other.ID); err != nil {
			t.Error(err)
		}
		n.host.holdNothing()
		time.Sleep(90 * time.Minute)
		inOrder := func(a, b Metrics) int { return a.Time.Compare(b.Time) }
		if got, _ := n.m.Metrics(t.Context(), sb.ID); len(got) != samplesKept || !slices.IsSortedFunc(got, inOrder) {
			t.Errorf("%d samples, want the last %d in order", len(got), samplesKept)
		}
	})
}

// TestPanicInASample: what one guest answers must not end the node of all others.
func TestPanicInASample(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		n.host.setFail("metrics", errPanic)
		time.Sleep(2*sampleInterval + time.Second)
		synctest.Wait()
		n.wantState(sb.ID, StateRunning)
		if got := n.m.stats.samplesPanicked.Get(); got != 2 {
			t.Errorf("%d panics counted, want 2", got)
		}
		n.host.setFail("metrics", nil)
		time.Sleep(sampleInterval)
		if got, err := n.m.Metrics(t.Context(), sb.ID); err != nil || len(got) != 1 {
			t.Errorf("Metrics() = %v, %v, want one sample", got, err)
		}
	})
}

func TestSilence(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	s := silence{last: at}
	mute := errors.New("no answer")
	said := 0
	for i := range 30 {
		err := s.note(at.Add(time.Duration(i+1)*sampleInterval), mute)
		if err == nil {
			continue
		}
		said++
		if want := "12 samples missed since 2026-01-02T03:04:05Z: no answer"; err.Error() != want {
			t.Errorf("note() = %q, want %q", err, want)
		}
	}
	if said != 1 {
		t.Errorf("said %d times, want once", said)
	}
	at = at.Add(time.Hour)
	if err := s.note(at, nil); err != nil || s != (silence{last: at}) {
		t.Errorf("after an answer: %v, %+v", err, s)
	}
}

// TestBrokenHost: somebody flushed the host's table, and it cannot be put back.
func TestBrokenHost(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		n.host.setFail("maintain", errors.New("no such table"))
		time.Sleep(2 * n.m.opts.LeaseTTL)
		_, err := n.m.Create(t.Context(), spec(time.Minute))
		wantError(t, "Create", err, errs.Unavailable, "network is not in order")
		n.wantState(sb.ID, StateRunning)
		if _, node := n.cat.lease(); !node.Draining {
			t.Error("the lease does not say that the node takes no sandboxes")
		}
		n.host.setFail("maintain", nil)
		time.Sleep(n.m.opts.LeaseTTL)
		n.create(time.Hour)
	})
}
