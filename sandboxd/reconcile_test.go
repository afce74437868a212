package sandboxd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// crash is the node as a crash of its orchestrator at this moment leaves it: a copy of the directory, the host without what dies
// with its parent, the catalogue.
func (n *node) crash() *node {
	after := newNode(n.t)
	after.host = n.host.crash()
	after.cat.routes = n.cat.all()
	after.cat.note = after.host.note
	if err := os.CopyFS(after.dir, os.DirFS(n.dir)); err != nil {
		n.t.Error(err)
	}
	return after
}

// TestCrashAtEveryStep takes the image of the node after every step of create and of removal, and starts a manager on it. Either
// the sandbox is there again, whole and with the same generation, or nothing of it is.
func TestCrashAtEveryStep(t *testing.T) {
	for _, step := range slices.Concat(createSteps, removeSteps) {
		t.Run(string(step), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t)
				var image *node
				n.start(func(m *Manager) {
					m.reached = func(s Step) {
						if s == step {
							image = n.crash()
						}
					}
				})
				sb := n.create(time.Minute)
				if err := n.m.Kill(t.Context(), sb.ID); err != nil {
					t.Fatal(err)
				}
				if image == nil {
					t.Fatalf("step %s was never reached", step)
				}
				image.start()
				survives := step == StepCommitted || step == StepPublished || step == StepWithdrawn
				if !survives {
					image.wantState(sb.ID, "")
					image.wantNothingLeft()
					return
				}
				got, err := image.m.Get(sb.ID)
				if err != nil || got.Generation != sb.Generation || !got.EndAt.Equal(sb.EndAt) || got.Nonce != sb.Nonce ||
					got.Network.MaskRequestHost != sb.Network.MaskRequestHost {
					t.Errorf("Get() after the crash = %+v, %v, want %+v", got, err, sb)
				}
				if p, ok := image.cat.route(sb.ID); !ok || !p.equal(routeOf(sb)) {
					t.Errorf("route after the crash = %+v, %v", p, ok)
				}
				other := image.create(time.Minute)
				if other.Generation <= sb.Generation || image.host.proc(other.ID).slot == image.host.proc(sb.ID).slot {
					t.Errorf("a new sandbox shares generation or slot with the old one")
				}
				time.Sleep(time.Minute + time.Second)
				synctest.Wait()
				image.wantState(sb.ID, "")
				image.wantNothingLeft()
			})
		})
	}
}

// TestCrashDuringReconcile crashes once more after every step of the removal that a reconcile does.
func TestCrashDuringReconcile(t *testing.T) {
	for _, first := range []Step{StepFence, StepStarted, StepHandle, StepCondemned} {
		for _, second := range removeSteps {
			t.Run(fmt.Sprintf("%s then %s", first, second), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					image := newNode(t)
					take := func(n *node, at Step) func(*Manager) {
						return func(m *Manager) {
							m.reached = func(s Step) {
								if s == at {
									image = n.crash()
								}
							}
						}
					}
					n := image
					n.start(take(n, first))
					sb := n.create(time.Minute)
					if err := n.m.Kill(t.Context(), sb.ID); err != nil {
						t.Fatal(err)
					}
					n = image
					n.start(take(n, second))
					if n == image {
						t.Fatalf("reconcile did not reach %s", second)
					}
					image.start()
					image.wantState(sb.ID, "")
					image.wantNothingLeft()
				})
			})
		}
	}
}

// crashAt takes an image of the node after a step of what act does, the first time.
func (n *node) crashAt(step Step, act func()) *node {
	n.t.Helper()
	var image *node
	n.m.reached = func(s Step) {
		if s == step && image == nil {
			image = n.crash()
		}
	}
	act()
	if image == nil {
		n.t.Fatalf("step %s was never reached", step)
	}
	n.m.reached = func(Step) {}
	return image
}

// TestCrashAtEveryStepOfAPause: it runs, as if nobody had asked for the pause, or it is paused, and never anything between.
func TestCrashAtEveryStepOfAPause(t *testing.T) {
	for _, memory := range []bool{true, false} {
		for _, step := range append(slices.Clone(pauseSteps), stepWritten) {
			t.Run(fmt.Sprintf("%s, memory %v", step, memory), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					n := newNode(t).start()
					sb := n.create(time.Hour)
					n.host.remember(sb.ID, "counter 7")
					image := n.crashAt(step, func() { n.pause(sb.ID, memory) })
					image.start()
					synctest.Wait()
					switch {
					case step == StepPausing, step == StepHidden, step == StepFrozen, step == stepWritten && !memory:
						image.wantGoesOn(sb.ID, sb.Generation, "counter 7")
						image.pause(sb.ID, memory)
					default:
						time.Sleep(routesRetry + routesInterval)
						image.wantPaused(sb.ID, memory)
					}
					image.connect(sb.ID)
					if got := image.host.look(sb.ID); memory && got.memory != "counter 7" || !memory && !got.booted {
						t.Errorf("resumed as %+v", got)
					}
					if err := image.m.Kill(t.Context(), sb.ID); err != nil {
						t.Error(err)
					}
					image.wantNothingLeft()
				})
			})
		}
	}
}

// TestCrashAtEveryStepOfAResume: until the guest goes on it is paused as before, afterwards it runs.
func TestCrashAtEveryStepOfAResume(t *testing.T) {
	for _, memory := range []bool{true, false} {
		for _, step := range resumeSteps {
			if memory && step == StepInit || !memory && step == StepContinued {
				continue // it has no need of it
			}
			t.Run(fmt.Sprintf("%s, memory %v", step, memory), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					n := newNode(t).start()
					sb := n.create(time.Hour)
					n.host.remember(sb.ID, "counter 7")
					n.pause(sb.ID, memory)
					var got Sandbox
					image := n.crashAt(step, func() { got = n.connect(sb.ID) })
					image.start()
					synctest.Wait()
					switch {
					case step == StepContinued, step == StepRunning, step == StepPublished, step == StepCommitted && !memory:
						image.wantGoesOn(sb.ID, got.Generation, n.host.look(sb.ID).memory)
						image.pause(sb.ID, memory)
					default:
						time.Sleep(routesRetry + routesInterval)
						image.wantPaused(sb.ID, memory)
					}
					image.connect(sb.ID)
					if got := image.host.look(sb.ID); memory && got.memory != "counter 7" || !memory && !got.booted {
						t.Errorf("resumed as %+v", got)
					}
					if err := image.m.Kill(t.Context(), sb.ID); err != nil {
						t.Error(err)
					}
					image.wantNothingLeft()
				})
			})
		}
	}
}

// wantGoesOn checks that a sandbox runs with what it had in memory, and that its record will say so.
func (n *node) wantGoesOn(id string, generation uint64, memory string) {
	n.t.Helper()
	sb, err := n.m.Get(id)
	if err != nil || sb.State != StateRunning || sb.Generation != generation {
		n.t.Fatalf("Get() = %v, generation %d, %v, want running with generation %d", sb.State, sb.Generation, err, generation)
	}
	if got := n.host.look(id); got.frozen || got.memory != memory {
		n.t.Errorf("it is frozen: %v, with memory %q, want one that goes on with %q", got.frozen, got.memory, memory)
	}
	if p, ok := n.cat.route(id); !ok || !p.equal(routeOf(sb)) {
		n.t.Errorf("route = %+v, %v", p, ok)
	}
	if !n.host.fence(n.host.look(id).slot).AllowInternet {
		n.t.Error("the rules of the record are not in force")
	}
	time.Sleep(2 * journalRetry)
	rec, err := n.m.journal.read(id)
	if err != nil || rec.Sandbox.State != StateRunning || rec.Standing || rec.Sandbox.MemorySaved {
		n.t.Errorf("record = %+v, %v", rec, err)
	}
}

// TestCrashAfterACrashInAPause crashes once more while a start brings a half paused, or half resumed, sandbox to rest.
func TestCrashAfterACrashInAPause(t *testing.T) {
	for _, first := range []Step{stepWritten, StepSaved, StepUnwired, StepNetwork, StepCommitted} {
		for _, second := range []Step{StepStopped, StepUnwired, StepPaused} {
			t.Run(fmt.Sprintf("%s then %s", first, second), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					n := newNode(t).start()
					sb := n.create(time.Hour)
					n.host.remember(sb.ID, "counter 7")
					n.crashTwice(sb, first, second)
				})
			})
		}
	}
}

func (n *node) crashTwice(sb Sandbox, first, second Step) {
	n.t.Helper()
	once := n.crashAt(first, func() {
		n.pause(sb.ID, true)
		n.connect(sb.ID)
	})
	var twice *node
	once.start(func(m *Manager) {
		m.reached = func(s Step) {
			if s == second && twice == nil {
				twice = once.crash()
			}
		}
	})
	synctest.Wait()
	if twice == nil {
		n.t.Fatalf("the start did not reach %s", second)
	}
	twice.start()
	time.Sleep(routesRetry + routesInterval)
	twice.wantPaused(sb.ID, true)
	twice.connect(sb.ID)
	if got := twice.host.look(sb.ID).memory; got != "counter 7" {
		n.t.Errorf("memory = %q", got)
	}
}

// TestCrashAsTheGuestGoesOn: its memory is used up. It runs if its process lives; otherwise the disk is left.
func TestCrashAsTheGuestGoesOn(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		n.pause(sb.ID, true)
		image := n.crashAt(StepContinued, func() { n.connect(sb.ID) })
		image.host.die(sb.ID, errors.New("the power failed"))
		image.start()
		time.Sleep(routesRetry + routesInterval)
		image.wantPaused(sb.ID, false)
		image.connect(sb.ID)
		if !image.host.look(sb.ID).booted {
			t.Error("it has memory")
		}
	})
}

// TestCrashDuringASnapshot: the source goes on, and the snapshot is whole or not there.
func TestCrashDuringASnapshot(t *testing.T) {
	for _, step := range append(slices.Clone(snapshotSteps), "while it stands still") {
		t.Run(string(step), func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				sb := n.create(time.Hour)
				n.host.remember(sb.ID, "counter 7")
				var image *node
				if slices.Contains(snapshotSteps, step) {
					image = n.crashAt(step, func() {
						if _, err := n.m.Snapshot(t.Context(), sb.ID, ""); err != nil {
							t.Error(err)
						}
					})
				} else {
					release := n.host.holdUp("snapshot")
					go n.m.Snapshot(context.Background(), sb.ID, "")
					synctest.Wait()
					image = n.crash()
					release()
				}
				image.start()
				synctest.Wait()
				image.wantGoesOn(sb.ID, sb.Generation, "counter 7")
				want := 0
				if step == StepNamed {
					want = 1
				}
				snapshots := image.m.Snapshots()
				dirs, err := os.ReadDir(filepath.Join(image.dir, "snapshots"))
				if err != nil || len(snapshots) != want || len(dirs) != want {
					t.Fatalf("snapshots %v in directories %v, %v, want %d", snapshots, dirs, err, want)
				}
				for _, snap := range snapshots {
					s := spec(time.Minute)
					s.Template = snap.ID
					copied, err := image.m.Create(t.Context(), s)
					if err != nil || image.host.look(copied.ID).memory != "counter 7" {
						t.Errorf("Create() from it = %v", err)
					}
				}
			})
		})
	}
}

// TestReconcile stops a node that keeps its sandboxes, changes the world, and starts another.
func TestReconcile(t *testing.T) {
	tests := map[string]struct {
		meanwhile func(n *node, sb Sandbox)
		survives  bool
	}{
		"nothing happened":       {func(*node, Sandbox) {}, true},
		"catalogue lost data":    {func(n *node, _ Sandbox) { n.cat.loseData() }, true},
		"process died":           {func(n *node, sb Sandbox) { n.host.die(sb.ID, errors.New("killed")) }, false},
		"network is gone":        {func(n *node, _ Sandbox) { clear(n.host.networks) }, false},
		"guest does not answer":  {func(n *node, _ Sandbox) { n.host.holdUp("health") }, true},
		"rules cannot be set":    {func(n *node, _ Sandbox) { n.host.setFail("set fence", errors.New("broken")) }, false},
		"deadline passed":        {func(*node, Sandbox) { time.Sleep(2 * time.Minute) }, false},
		"record is damaged":      {func(n *node, sb Sandbox) { n.overwrite(sb.ID, "{") }, false},
		"record of another":      {func(n *node, sb Sandbox) { n.overwrite(sb.ID, `{"version":1,"sandbox":{"id":"iother"}}`) }, false},
		"half a record was left": {func(n *node, sb Sandbox) { os.WriteFile(n.file(sb.ID, recordTemp), []byte("{"), 0o600) }, true},
		"rules were changed":     {func(n *node, _ Sandbox) { n.host.networks[0].fence.AllowInternet = false }, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t).start(keep)
				sb := n.create(time.Minute)
				if err := n.stop(); err != nil {
					t.Fatal(err)
				}
				tt.meanwhile(n, sb)
				n.start()
				if tt.survives {
					n.wantState(sb.ID, StateRunning)
					if _, ok := n.cat.route(sb.ID); !ok {
						t.Error("no route")
					}
					if !n.host.fence(0).AllowInternet {
						t.Error("the rules of the record are not in force")
					}
					return
				}
				n.wantState(sb.ID, "")
				n.wantNothingLeft()
			})
		})
	}
}

func (n *node) file(id, name string) string { return filepath.Join(n.dir, "sandboxes", id, name) }

func (n *node) overwrite(id, text string) {
	if err := os.WriteFile(n.file(id, recordFile), []byte(text), 0o600); err != nil {
		n.t.Error(err)
	}
}

// TestMuteGuestsDoNotDelayTheStart: each guest that did not answer used to cost the node five seconds, and beyond ten its edges
// took it for lost, with the sandboxes of everybody else. It is kept, and counted.
func TestMuteGuestsDoNotDelayTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(keep)
		for range 24 {
			n.create(time.Hour)
		}
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		n.host.holdUp("health")
		began := time.Now()
		n.start()
		if took := time.Since(began); took != 0 {
			t.Errorf("ready after %v, want at once", took)
		}
		time.Sleep(greetTime + time.Second)
		synctest.Wait()
		if got := len(n.m.List()); got != 24 {
			t.Errorf("%d sandboxes run, want all 24", got)
		}
		if got := n.m.stats.adoptedMute.Get(); got != 24 {
			t.Errorf("%d mute guests counted, want 24", got)
		}
	})
}

// TestRemovalsDoNotDelayTheStart: how long the removal of a sandbox takes is decided by what it wrote.
func TestRemovalsDoNotDelayTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(keep)
		kept, died := n.create(time.Hour), n.create(time.Hour)
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		n.host.die(died.ID, errors.New("killed"))
		release := n.host.holdUp("destroy")
		n.make()
		n.run()
		<-n.m.Ready()
		n.wantState(kept.ID, StateRunning)
		n.wantState(died.ID, "")
		release()
		settle(n.m)
		if n.host.leftovers()[0] != "network 0" || len(n.host.leftovers()) != 2 {
			t.Errorf("left on the host: %q, want the sandbox that runs", n.host.leftovers())
		}
	})
}

// busyAtItsStart returns a node that stopped and left a sandbox running. When it is started again it is not ready before release.
func busyAtItsStart(t *testing.T) (n *node, release func()) {
	t.Helper()
	n = newNode(t).start(keep)
	n.create(time.Hour)
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	return n, n.host.holdUp("adopt")
}

// TestLeaseBeforeReady: edges must not take a node for lost because it has much to look at.
func TestLeaseBeforeReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, release := busyAtItsStart(t)
		before, _ := n.cat.lease()
		n.make()
		n.run()
		synctest.Wait()
		if times, said := n.cat.lease(); times == before || !said.Draining {
			t.Errorf("lease while starting: %d new, %+v, want one that is draining", times-before, said)
		}
		release()
		<-n.m.Ready()
		time.Sleep(n.m.opts.LeaseTTL)
		synctest.Wait()
		if _, said := n.cat.lease(); said.Draining || said.Sandboxes != 1 {
			t.Errorf("lease when ready: %+v", said)
		}
	})
}

// TestGoesOnLateAfterACrash: a hypervisor that still wrote what a crash had interrupted was asked once to let its guest go on. It stood still for
// ever, and the node and its record said that it runs.
func TestGoesOnLateAfterACrash(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		release := n.host.holdUp("snapshot")
		defer release()
		go n.m.Snapshot(context.Background(), sb.ID, "")
		synctest.Wait()
		after := n.crash()
		goOn := after.host.holdUp("continue")
		after.start()
		record := func() record {
			rec, err := after.m.journal.read(sb.ID)
			if err != nil {
				t.Fatal(err)
			}
			return rec
		}
		time.Sleep(thawTime / 2)
		if !record().Standing || !after.host.look(sb.ID).frozen {
			t.Errorf("before it has gone on the record says %+v", record())
		}
		goOn()
		time.Sleep(time.Minute)
		if after.host.look(sb.ID).frozen || record().Standing || record().Sandbox.State != StateRunning {
			t.Errorf("a minute after its hypervisor is free it is frozen: %v, and its record says %+v", after.host.look(sb.ID).frozen, record())
		}
	})
}

// TestLateAnnouncementDoesNotOvertake: what was said of the node while it started arrived after what it said when it was ready, and for
// seconds no other node placed a sandbox on it.
func TestLateAnnouncementDoesNotOvertake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, release := busyAtItsStart(t)
		n.cat.late = publishTime / 2
		n.make()
		n.run()
		synctest.Wait()
		release()
		<-n.m.Ready()
		time.Sleep(publishTime)
		synctest.Wait()
		if _, said := n.cat.lease(); said.Draining {
			t.Errorf("lease of a node that is ready: %+v", said)
		}
	})
}

func TestReconcileRemovesStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.networks[7] = &fakeNetwork{}
		n.host.procs["iold"] = &fakeProc{host: n.host, id: "iold", slot: 7, done: make(chan struct{})}
		if err := os.MkdirAll(n.file("iempty", "rw"), 0o700); err != nil {
			t.Fatal(err)
		}
		n.cat.routes["igone"] = Published{Sandbox: "igone", Generation: 5, State: StateRunning}
		n.start()
		n.wantNothingLeft()
	})
}

// TestRestartWhileTheCatalogueIsDown: sandboxes do not depend on it, and what it missed is made good when it is back.
func TestRestartWhileTheCatalogueIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(keep)
		kept, died := n.create(time.Hour), n.create(time.Hour)
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		n.host.die(died.ID, errors.New("killed"))
		n.cat.setDown(errors.New("connection refused"))
		n.start()
		n.wantState(kept.ID, StateRunning)
		n.wantState(died.ID, "")
		_, err := n.m.Create(t.Context(), spec(time.Minute))
		if err == nil {
			t.Error("Create succeeded though nobody could learn of the sandbox")
		}
		n.cat.setDown(nil)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if _, ok := n.cat.route(died.ID); ok {
			t.Error("the route of the dead sandbox is still there")
		}
		if _, ok := n.cat.route(kept.ID); !ok {
			t.Error("the route of the living sandbox is not there")
		}
	})
}

func TestCatalogueComesToAgree(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		n.cat.loseData()
		time.Sleep(routesInterval + time.Second)
		synctest.Wait()
		if p, ok := n.cat.route(sb.ID); !ok || !p.equal(routeOf(sb)) {
			t.Errorf("route after the catalogue lost its data = %+v, %v", p, ok)
		}
		before := n.cat.writes
		time.Sleep(time.Minute)
		if n.cat.writes != before {
			t.Error("a catalogue that agrees was written to")
		}

		n.cat.setDown(errors.New("down"))
		if err := n.m.SetTimeout(t.Context(), sb.ID, 2*time.Hour); err != nil {
			t.Errorf("SetTimeout() while the catalogue is down = %v", err)
		}
		n.cat.setDown(nil)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if p, _ := n.cat.route(sb.ID); p.EndAt.Sub(sb.EndAt) != time.Hour+time.Minute+routesInterval+time.Second {
			t.Errorf("the route's end moved by %v", p.EndAt.Sub(sb.EndAt))
		}

		n.cat.setDown(errors.New("down"))
		if err := n.m.Kill(t.Context(), sb.ID); err != nil {
			t.Errorf("Kill() while the catalogue is down = %v", err)
		}
		n.cat.setDown(nil)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		n.wantNothingLeft()
	})
}

func TestLeaseIsRenewed(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.create(time.Hour)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n.cat.leases < 60/(10/3.0) || n.cat.node.Sandboxes != 1 || n.cat.node.Machine != "fake" {
			t.Errorf("%d leases, the last %+v", n.cat.leases, n.cat.node)
		}
	})
}

func TestStartIsRefused(t *testing.T) {
	check := func(what string, n *node, want string) {
		t.Helper()
		n.make()
		if err := n.m.Run(t.Context()); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: Run() = %v, want one line with %q", what, err, want)
		}
		if _, err := n.m.Create(t.Context(), spec(time.Minute)); err == nil {
			t.Errorf("%s: Create succeeded", what)
		}
	}
	long := newNode(t)
	if _, err := New(Options{StateDir: strings.Repeat("/long", 20), Machine: fakeMachine{long.host, 1}, Publisher: long.cat}); err == nil {
		t.Error("New() with a state directory that is too long succeeded")
	}

	n := newNode(t).start()
	second := newNode(t)
	second.dir = n.dir
	check("second orchestrator", second, "another orchestrator uses the state directory")

	broken := newNode(t)
	broken.host.setFail("setup", errors.New("no nftables"))
	check("host not fit", broken, "prepare the host for the fake machine: setup: no nftables")

	other := newNode(t)
	if err := os.MkdirAll(other.file("iother", ""), 0o700); err != nil {
		t.Fatal(err)
	}
	other.overwrite("iother", `{"version":2,"machine":"vm","sandbox":{"id":"iother","state":"running"}}`)
	check("sandbox of another machine", other, "belongs to the vm machine, and this is the fake machine")
	if _, err := os.Stat(other.file("iother", recordFile)); err != nil {
		t.Error("the record of another machine's sandbox was removed")
	}

	newer := newNode(t)
	if err := os.MkdirAll(newer.file("inew", ""), 0o700); err != nil {
		t.Fatal(err)
	}
	newer.overwrite("inew", `{"version":3,"sandbox":{"id":"inew"}}`)
	check("newer record", newer, "newer version")
	if _, err := os.Stat(newer.file("inew", recordFile)); err != nil {
		t.Error("the record of a newer version was removed")
	}
}

// TestStorm lets everything happen at once. The race detector, the final count, and the bubble, which wants every goroutine to end,
// are the judges.
func TestStorm(t *testing.T) { synctest.Test(t, storm) }

func storm(t *testing.T) {
	n := newNode(t).start(ready(2), func(m *Manager) {
		m.opts.MaxSandboxes = 1000
		m.slots = newSlots(1000)
	})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 15 {
				s := spec(time.Hour)
				s.AutoPause, s.AutoPauseMemory, s.AutoResume = j%2 == 0, true, true
				sb, err := n.m.Create(t.Context(), s)
				if err != nil {
					t.Errorf("Create() = %v", err)
					return
				}
				if j%3 > 0 { // half of the time it will still be there
					var first sync.WaitGroup
					for range 2 {
						first.Go(func() { n.m.Pause(t.Context(), sb.ID, true) })
						first.Go(func() { n.m.Wake(t.Context(), sb.ID, sb.Generation) })
						first.Go(func() { n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Minute}) })
					}
					first.Go(func() { n.m.Snapshot(t.Context(), sb.ID, "") })
					first.Go(func() { n.m.Log(t.Context(), sb.ID, 100) })
					first.Wait()
				}
				var inner sync.WaitGroup
				inner.Go(func() { n.m.SetTimeout(t.Context(), sb.ID, time.Duration(j%3)*time.Millisecond) })
				inner.Go(func() { n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Minute}) })
				inner.Go(func() { n.m.Kill(t.Context(), sb.ID) })
				inner.Go(func() { n.m.UpdateNetwork(t.Context(), sb.ID, Network{DenyOut: []string{"1.1.1.1"}}) })
				inner.Go(func() { n.m.Pause(t.Context(), sb.ID, j%2 == 0) })
				inner.Go(func() { n.m.Fork(t.Context(), sb.ID, []ForkSpec{{Timeout: time.Millisecond}}) })
				inner.Go(func() { n.m.Open(t.Context(), sb.ID, sb.Generation, 80) })
				inner.Go(func() { n.m.Metrics(t.Context(), sb.ID); n.m.List(); n.m.agreeRoutes(t.Context()) })
				if i%2 == 0 {
					inner.Go(func() { n.m.Kill(t.Context(), sb.ID) })
				}
				inner.Wait()
			}
		})
	}
	wg.Wait()
	if err := n.stop(); err != nil {
		t.Error(err)
	}
	n.wantNothingLeft()
	if got := n.m.count(); got != 0 {
		t.Errorf("%d sandboxes are known, want none", got)
	}
}
