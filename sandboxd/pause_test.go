package sandboxd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/link"
)

func (n *node) pause(id string, memory bool) {
	n.t.Helper()
	if err := n.m.Pause(n.t.Context(), id, memory); err != nil {
		n.t.Fatalf("Pause() = %v", err)
	}
}

func (n *node) connect(id string) Sandbox {
	n.t.Helper()
	sb, resumed, err := n.m.Connect(n.t.Context(), id, ConnectOptions{Timeout: time.Minute, EnvdToken: "secret-envd-token"})
	if err != nil || !resumed {
		n.t.Fatalf("Connect() = resumed %v, %v", resumed, err)
	}
	return sb
}

// wantPaused checks that a sandbox is paused, and that nothing of it is on the host but its directory.
func (n *node) wantPaused(id string, memory bool) {
	n.t.Helper()
	sb, err := n.m.Get(id)
	if err != nil || sb.State != StatePaused || sb.MemorySaved != memory {
		n.t.Errorf("Get() = %v, memory %v, %v, want paused with memory %v", sb.State, sb.MemorySaved, err, memory)
	}
	if left := n.host.leftovers(); len(left) > 0 {
		n.t.Errorf("left on the host of a paused sandbox: %q", left)
	}
	if p, ok := n.cat.route(id); !ok || !p.equal(routeOf(sb)) || p.State != StatePaused || !p.EndAt.IsZero() {
		n.t.Errorf("route of a paused sandbox = %+v, %v", p, ok)
	}
	rec, err := n.m.journal.read(id)
	if err != nil || rec.Sandbox.State != StatePaused || rec.Slot != NoSlot || rec.Handle != nil {
		n.t.Errorf("record of a paused sandbox = %+v, %v", rec, err)
	}
}

// wantResets checks how often the connections of a sandbox have been reset.
func (n *node) wantResets(id string, want int) {
	n.t.Helper()
	got := 0
	for _, event := range n.host.events() {
		if event == "gone "+id {
			got++
		}
	}
	if got != want {
		n.t.Errorf("connections were reset %d times, want %d", got, want)
	}
}

func TestPauseAndResume(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Minute)
		n.host.remember(sb.ID, "counter 7")
		time.Sleep(11 * time.Second)
		before := len(n.host.events())
		n.pause(sb.ID, true)
		want := []string{"publish ", "gone ", "suspend ", "stop ", "unwire "}
		for i := range want {
			want[i] += sb.ID
		}
		if got := n.host.events()[before:]; !slices.Equal(got, want) {
			t.Errorf("events = %q, want %q", got, want)
		}
		n.wantPaused(sb.ID, true)
		wantError(t, "Pause", n.m.Pause(t.Context(), sb.ID, true), errs.Conflict, `Sandbox "`+sb.ID+`" is paused`)
		wantError(t, "SetTimeout", n.m.SetTimeout(t.Context(), sb.ID, 1), errs.Conflict, "is paused")
		_, err := n.m.Open(t.Context(), sb.ID, sb.Generation, 80)
		wantVerdict(t, "paused", err, link.NotHere)
		if got, err := n.m.Metrics(t.Context(), sb.ID); err != nil || len(got) != 0 {
			t.Errorf("Metrics() of a paused sandbox = %v, %v, want none", got, err)
		}
		if text, err := n.m.Log(t.Context(), sb.ID, 10); err != nil || string(text) != "console of" {
			t.Errorf("Log() of a paused sandbox = %q, %v", text, err)
		}

		time.Sleep(time.Hour) // no deadline ends what is paused
		got := n.connect(sb.ID)
		if got.State != StateRunning || got.Generation <= sb.Generation || got.EndAt.Sub(got.StartedAt) != time.Minute || time.Until(got.EndAt) != time.Minute {
			t.Errorf("Connect() = %+v", got)
		}
		proc := n.host.look(sb.ID)
		if proc.memory != "counter 7" || proc.frozen || len(proc.went) != 1 || !proc.went[0].Timestamp.Equal(time.Now()) {
			t.Errorf("resumed with memory %q, frozen %v, told %+v", proc.memory, proc.frozen, proc.went)
		}
		if n.host.fence(proc.slot).AllowInternet != true {
			t.Error("the rules are not in force")
		}
		if p, ok := n.cat.route(sb.ID); !ok || !p.equal(routeOf(got)) || p.State != StateRunning {
			t.Errorf("route = %+v, %v", p, ok)
		}
		_, err = n.m.Open(t.Context(), sb.ID, sb.Generation, 80)
		wantVerdict(t, "the lifecycle before the pause", err, link.WrongGeneration)
		_, err = n.m.Open(t.Context(), sb.ID, got.Generation, 80)
		wantVerdict(t, "resumed", err, link.PortClosed)
		time.Sleep(6 * time.Second)
		if got, err := n.m.Metrics(t.Context(), sb.ID); err != nil || len(got) != 1 {
			t.Errorf("Metrics() = %v, %v, want one sample of this lifecycle", got, err)
		}

		n.pause(sb.ID, true) // and again
		n.wantPaused(sb.ID, true)
		n.wantResets(sb.ID, 2)
		n.connect(sb.ID)
		time.Sleep(time.Minute + 10*time.Millisecond)
		synctest.Wait()
		n.wantState(sb.ID, "")
		n.wantNothingLeft()
	})
}

// TestPauseWithoutMemory: the guest boots anew, keeps its disk and its token, and is not woken by traffic.
func TestPauseWithoutMemory(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		s := spec(time.Minute)
		s.AutoResume = true
		sb, err := n.m.Create(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		n.host.remember(sb.ID, "counter 7")
		n.pause(sb.ID, false)
		n.wantPaused(sb.ID, false)
		if p, _ := n.cat.route(sb.ID); p.AutoResume {
			t.Error("the route says that traffic wakes it")
		}
		wantVerdict(t, "Wake", n.m.Wake(t.Context(), sb.ID, sb.Generation), link.NotHere)
		_, _, err = n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Minute})
		wantError(t, "Connect without the token", err, errs.Internal, "was not resumed and is paused as before")
		n.wantPaused(sb.ID, false)
		n.connect(sb.ID)
		proc := n.host.look(sb.ID)
		if !proc.booted || proc.memory != "" || proc.init.AccessToken != "secret-envd-token" || proc.init.EnvVars["E2B_SANDBOX_ID"] != sb.ID ||
			proc.init.EnvVars["SECRET"] != "" || proc.init.DefaultUser != "user" {
			t.Errorf("resumed as %+v", proc)
		}

		n.host.remember(sb.ID, "counter 8") // memory that was saved can be dropped
		n.pause(sb.ID, true)
		_, resumed, err := n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Minute, EnvdToken: "secret-envd-token", DropMemory: true})
		if err != nil || !resumed || !n.host.look(sb.ID).booted {
			t.Errorf("Connect with DropMemory = %v, %v, want one that boots", resumed, err)
		}
	})
}

// TestPauseFails: whatever goes wrong, the sandbox runs on, is reached again and can be paused later.
func TestPauseFails(t *testing.T) {
	for _, what := range []string{"freeze", "save"} {
		t.Run(what, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				sb := n.create(time.Hour)
				n.host.remember(sb.ID, "counter 7")
				n.host.setFail(what, syscall.ENOSPC)
				wantError(t, "Pause", n.m.Pause(t.Context(), sb.ID, true), errs.Unavailable, "disk of this node is full")
				n.wantState(sb.ID, StateRunning)
				if p, ok := n.cat.route(sb.ID); !ok || !p.equal(routeOf(sb)) {
					t.Errorf("route = %+v, %v, want it as before", p, ok)
				}
				_, err := n.m.Open(t.Context(), sb.ID, sb.Generation, 80)
				wantVerdict(t, "after a pause that failed", err, link.PortClosed)
				if proc := n.host.look(sb.ID); proc.frozen || proc.memory != "counter 7" {
					t.Errorf("the sandbox is %+v", proc)
				}
				time.Sleep(6 * time.Second)
				if got, err := n.m.Metrics(t.Context(), sb.ID); err != nil || len(got) != 1 {
					t.Errorf("Metrics() = %v, %v, want it watched again", got, err)
				}
				n.host.setFail(what, nil)
				n.pause(sb.ID, true)
				n.wantPaused(sb.ID, true)
				n.wantResets(sb.ID, 2) // also what connected after the pause that failed
				if err := n.m.Kill(t.Context(), sb.ID); err != nil {
					t.Error(err)
				}
				n.wantNothingLeft()
			})
		})
	}
	t.Run("it dies", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			sb := n.create(time.Hour)
			n.host.setFail("save", errors.New("broken"))
			n.m.reached = func(s Step) {
				if s == StepFrozen {
					n.host.die(sb.ID, errors.New("out of memory"))
				}
			}
			wantError(t, "Pause", n.m.Pause(t.Context(), sb.ID, true), errs.Conflict, "is being killed")
			synctest.Wait()
			n.wantNothingLeft()
		})
	})
	t.Run("the catalogue is down", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			sb := n.create(time.Hour)
			n.cat.setDown(errors.New("connection refused"))
			n.pause(sb.ID, true)
			n.cat.setDown(nil)
			time.Sleep(routesRetry + time.Second)
			synctest.Wait()
			n.wantPaused(sb.ID, true)
		})
	})
	t.Run("the network does not go", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			sb := n.create(time.Hour)
			n.host.setFail("unwire", errors.New("device or resource busy"))
			impatient, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			wantError(t, "Pause", n.m.Pause(impatient, sb.ID, true), errs.Unavailable, "still being paused")
			if got, _ := n.m.Get(sb.ID); got.State != StatePausing {
				t.Errorf("state = %v, want pausing while its network is there", got.State)
			}
			n.host.setFail("unwire", nil)
			time.Sleep(time.Minute)
			n.wantPaused(sb.ID, true)
		})
	})
}

// TestResumeFails: until the guest goes on a resume can be taken back.
func TestResumeFails(t *testing.T) {
	for _, what := range []string{"network", "fence", "start", "commit", "continue"} {
		t.Run(what, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				sb := n.create(time.Hour)
				n.host.remember(sb.ID, "counter 7")
				n.pause(sb.ID, true)
				n.host.setFail(what, errors.New("broken"))
				_, _, err := n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Minute})
				wantError(t, "Connect", err, errs.Internal, "was not resumed and is paused as before")
				n.wantPaused(sb.ID, true)
				n.host.setFail(what, nil)
				n.connect(sb.ID)
				if got := n.host.look(sb.ID).memory; got != "counter 7" {
					t.Errorf("memory = %q", got)
				}
			})
		})
	}
	t.Run("the guest does not say that it goes on", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			sb := n.create(time.Hour)
			n.host.remember(sb.ID, "counter 7")
			n.pause(sb.ID, true)
			n.host.setFail("after continue", errors.New("no answer"))
			n.connect(sb.ID)
			n.wantState(sb.ID, StateRunning)
			if got := n.host.look(sb.ID).memory; got != "counter 7" || n.m.stats.resumedMute.Get() != 1 {
				t.Errorf("memory = %q, %d counted as mute", got, n.m.stats.resumedMute.Get())
			}
		})
	})
	t.Run("it dies as it goes on", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			sb := n.create(time.Hour)
			n.pause(sb.ID, true)
			n.host.setFail("after continue", errors.New("reset"))
			release := n.host.holdUp("after continue")
			connected := make(chan error, 1)
			go func() {
				_, _, err := n.m.Connect(context.Background(), sb.ID, ConnectOptions{Timeout: time.Minute})
				connected <- err
			}()
			synctest.Wait()
			n.host.die(sb.ID, errors.New("bug"))
			release()
			wantError(t, "Connect", <-connected, errs.Unavailable, "its memory is lost. Its disk is kept")
			n.wantPaused(sb.ID, false)
			n.connect(sb.ID)
		})
	})
	t.Run("damaged memory", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			sb := n.create(time.Hour)
			n.pause(sb.ID, true)
			if err := os.WriteFile(n.file(sb.ID, "saved"), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
			_, _, err := n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Minute})
			wantError(t, "Connect", err, errs.Unavailable, "damaged; the disk is kept")
			n.wantPaused(sb.ID, false)
			opts := ConnectOptions{Timeout: time.Minute, EnvdToken: "secret-envd-token", DropMemory: true}
			if _, resumed, err := n.m.Connect(t.Context(), sb.ID, opts); err != nil || !resumed {
				t.Errorf("Connect with DropMemory = %v, %v", resumed, err)
			}
		})
	})
	t.Run("the node is full", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t).start(func(m *Manager) { m.opts.MaxSandboxes = 1 })
			sb := n.create(time.Hour)
			n.pause(sb.ID, true)
			n.create(time.Hour) // a paused sandbox takes no place
			_, _, err := n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Minute})
			wantError(t, "Connect", err, errs.Exhausted, "this node is full")
			if got, _ := n.m.Get(sb.ID); got.State != StatePaused {
				t.Errorf("state = %v", got.State)
			}
		})
	})
}

// TestKillDuringPauseAndResume: a kill does not wait for either, and leaves nothing.
func TestKillDuringPauseAndResume(t *testing.T) {
	for _, what := range []string{"freeze", "save", "network", "start", "continue"} {
		t.Run(what, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				sb := n.create(time.Hour)
				resuming := what != "freeze" && what != "save"
				if resuming {
					n.pause(sb.ID, true)
				}
				n.host.holdUp(what)
				ended := make(chan error, 1)
				go func() {
					if resuming {
						_, _, err := n.m.Connect(context.Background(), sb.ID, ConnectOptions{Timeout: time.Minute})
						ended <- err
						return
					}
					ended <- n.m.Pause(context.Background(), sb.ID, true)
				}()
				synctest.Wait()
				want := "is being paused"
				if resuming {
					want = "is being resumed"
				}
				wantError(t, "Pause", n.m.Pause(t.Context(), sb.ID, true), errs.Conflict, want)
				if err := n.m.Kill(t.Context(), sb.ID); err != nil {
					t.Error(err)
				}
				wantError(t, what, <-ended, errs.Conflict, "is being killed")
				n.wantState(sb.ID, "")
				n.wantNothingLeft()
			})
		})
	}
}

// TestConnectDuringAPause waits for its end.
func TestConnectDuringAPause(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		for _, fails := range []bool{false, true} {
			release := n.host.holdUp("save")
			if fails {
				n.host.setFail("save", errors.New("broken"))
			}
			paused, connected := make(chan error, 1), make(chan bool, 1)
			go func() { paused <- n.m.Pause(context.Background(), sb.ID, true) }()
			synctest.Wait()
			go func() {
				_, resumed, err := n.m.Connect(context.Background(), sb.ID, ConnectOptions{Timeout: time.Minute})
				if err != nil {
					t.Errorf("Connect() = %v", err)
				}
				connected <- resumed
			}()
			time.Sleep(30 * time.Second)
			if len(connected) != 0 {
				t.Error("Connect did not wait")
			}
			release()
			if err := <-paused; (err != nil) != fails {
				t.Errorf("Pause() = %v", err)
			}
			if resumed := <-connected; resumed == fails {
				t.Errorf("resumed = %v after a pause that failed: %v", resumed, fails)
			}
			n.wantState(sb.ID, StateRunning)
		}
		n.host.setFail("save", nil)
		n.host.holdUp("save")
		go n.m.Pause(context.Background(), sb.ID, true)
		synctest.Wait()
		began := time.Now()
		_, _, err := n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Minute})
		wantError(t, "Connect to one that is being paused for long", err, errs.Conflict, "is being")
		if took := time.Since(began); took != transitionTime {
			t.Errorf("took %v, want %v", took, transitionTime)
		}
		n.host.holdNothing()
		if err := n.m.Kill(t.Context(), sb.ID); err != nil {
			t.Error(err)
		}
		n.wantNothingLeft()
	})
}

func TestAutoPause(t *testing.T) {
	autoPause := func(n *node, timeout time.Duration, memory bool) Sandbox {
		n.t.Helper()
		s := spec(timeout)
		s.AutoPause, s.AutoPauseMemory = true, memory
		sb, err := n.m.Create(n.t.Context(), s)
		if err != nil {
			n.t.Fatal(err)
		}
		return sb
	}
	t.Run("at the deadline", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			sb, disk := autoPause(n, time.Minute, true), autoPause(n, 2*time.Minute, false)
			time.Sleep(30 * time.Second)
			if err := n.m.SetTimeout(t.Context(), sb.ID, time.Minute); err != nil {
				t.Fatal(err)
			}
			time.Sleep(59 * time.Second)
			n.wantState(sb.ID, StateRunning)
			time.Sleep(2 * time.Second)
			n.wantState(sb.ID, StatePaused)
			n.wantState(disk.ID, StateRunning)
			time.Sleep(time.Minute)
			n.wantPaused(sb.ID, true)
			n.wantPaused(disk.ID, false)
			n.connect(sb.ID)
			time.Sleep(time.Minute + time.Second)
			n.wantPaused(sb.ID, true)
		})
	})
	t.Run("again and again, while the disk is full", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			sb := autoPause(n, time.Minute, true)
			n.host.setFail("save", syscall.ENOSPC)
			time.Sleep(10 * time.Minute)
			n.wantState(sb.ID, StateRunning)
			failed := n.m.stats.pauseFailed.Get()
			if failed < 5 || failed > 10 {
				t.Errorf("%d attempts in nine minutes", failed)
			}
			n.host.setFail("save", nil)
			time.Sleep(atEndPauseMax + time.Second)
			n.wantPaused(sb.ID, true)
		})
	})
	t.Run("by a guest that writes nothing out", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *node) {
			sb := autoPause(n, time.Minute, false)
			n.host.setFail("sync", errors.New("the guest does not answer"))
			time.Sleep(time.Minute + atEndPause + 2*time.Second)
			n.wantPaused(sb.ID, true) // whoever mutes the agent gains no time
		})
	})
	t.Run("killed when it is too old", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t).start(func(m *Manager) { m.opts.MaxTimeout = time.Hour })
			sb, oldest := autoPause(n, time.Minute, true), autoPause(n, time.Hour, true)
			n.host.setFail("save", syscall.ENOSPC)
			time.Sleep(time.Hour - time.Second)
			n.wantState(sb.ID, StateRunning)
			time.Sleep(3 * time.Second)
			n.wantState(sb.ID, "")
			n.wantState(oldest.ID, StateRunning) // one failure does not lose its work
			time.Sleep(time.Minute)
			n.wantState(oldest.ID, "")
			n.wantNothingLeft()
		})
	})
	t.Run("extended while it waits", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t).start(func(m *Manager) { m.saving = newTurns(1) })
			first, second := autoPause(n, time.Minute, true), autoPause(n, time.Minute, true)
			release := n.host.holdUp("save")
			time.Sleep(time.Minute + time.Second)
			pausing, waiting := first.ID, second.ID
			if got, _ := n.m.Get(first.ID); got.State == StateRunning {
				pausing, waiting = waiting, pausing
			}
			if err := n.m.SetTimeout(t.Context(), waiting, time.Hour); err != nil {
				t.Errorf("SetTimeout() of one that waits to be paused = %v", err)
			}
			release()
			time.Sleep(time.Minute)
			n.wantState(pausing, StatePaused)
			n.wantState(waiting, StateRunning)
		})
	})
}

// TestPausedAcrossARestart: also when it was down for longer than any deadline.
func TestPausedAcrossARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(keep)
		sb := n.create(time.Minute)
		n.host.remember(sb.ID, "counter 7")
		n.pause(sb.ID, true)
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		if events := n.host.events(); events[len(events)-1] != "close" {
			t.Errorf("events = %q, want the machine closed: nothing of a paused sandbox is on the host", events)
		}
		time.Sleep(48 * time.Hour)
		n.cat.loseData()
		n.start(keep)
		n.wantPaused(sb.ID, true)
		got := n.connect(sb.ID)
		if got.Generation <= sb.Generation || n.host.look(sb.ID).memory != "counter 7" {
			t.Errorf("resumed as %+v", n.host.look(sb.ID))
		}
		if err := n.stop(); err != nil { // and running again
			t.Fatal(err)
		}
		n.start()
		n.wantState(sb.ID, StateRunning)
		n.pause(sb.ID, true)
		if err := n.stop(); err != nil { // a node that keeps nothing
			t.Fatal(err)
		}
		n.wantNothingLeft()
	})
}

// TestStopDuringAPause: a node that keeps its sandboxes ends what it has begun with them, another one kills them.
func TestStopDuringAPause(t *testing.T) {
	for _, kept := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t).start(func(m *Manager) { m.opts.KeepSandboxes = kept })
			pausing, paused := n.create(time.Hour), n.create(time.Hour)
			n.host.remember(pausing.ID, "counter 7")
			n.pause(paused.ID, true)
			release := n.host.holdUp("save")
			go n.m.Pause(context.Background(), pausing.ID, true)
			synctest.Wait()
			stopped := make(chan error, 1)
			go func() { stopped <- n.stop() }()
			synctest.Wait()
			if kept != (len(stopped) == 0) {
				t.Errorf("kept %v: stopped %v while it is being paused", kept, len(stopped) > 0)
			}
			release()
			if err := <-stopped; err != nil {
				t.Errorf("Run() = %v", err)
			}
			if !kept {
				n.wantNothingLeft()
				return
			}
			n.start()
			n.wantPaused(pausing.ID, true)
			n.connect(pausing.ID)
			if got := n.host.look(pausing.ID).memory; got != "counter 7" {
				t.Errorf("memory = %q", got)
			}
		})
	}
}

// TestDeadlineDuringADowntime: a sandbox that pauses at its deadline is paused by the next start, and not killed.
func TestDeadlineDuringADowntime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(keep)
		s := spec(time.Minute)
		s.AutoPause, s.AutoPauseMemory = true, true
		sb, err := n.m.Create(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		n.start()
		time.Sleep(2 * time.Second)
		n.wantPaused(sb.ID, true)
	})
}

func TestRecordKeepsNoSecretOfAPause(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		n.pause(sb.ID, false)
		n.connect(sb.ID)
		text, err := os.ReadFile(filepath.Join(n.dir, "sandboxes", sb.ID, recordFile))
		if err != nil || strings.Contains(string(text), "secret-") {
			t.Errorf("record = %s, %v", text, err)
		}
	})
}

// TestRefusedConnectKeepsTheMemory: who asks for a boot from the disk, and is told that there is no room, has lost nothing.
func TestRefusedConnectKeepsTheMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(func(m *Manager) { m.opts.MaxSandboxes = 1 })
		sb := n.createResuming(time.Hour)
		n.host.remember(sb.ID, "counter 7")
		n.pause(sb.ID, true)
		other := n.create(time.Hour)
		_, _, err := n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Hour, EnvdToken: "secret-envd-token", DropMemory: true})
		wantError(t, "Connect() to a full node", err, errs.Exhausted, "full")
		if got, err := n.m.Get(sb.ID); err != nil || got.State != StatePaused || !got.MemorySaved {
			t.Errorf("Get() = %+v, %v, want it paused with its memory", got, err)
		}
		if err := n.m.Kill(t.Context(), other.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(wakePause)
		if err := n.m.Wake(t.Context(), sb.ID, sb.Generation); err != nil || n.host.look(sb.ID).memory != "counter 7" {
			t.Errorf("Wake() = %v, memory %q", err, n.host.look(sb.ID).memory)
		}
		// With room, a boot that fails leaves the disk alone, as was asked for.
		n.pause(sb.ID, true)
		n.host.setFail("start", errors.New("broken"))
		_, _, err = n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Hour, EnvdToken: "secret-envd-token", DropMemory: true})
		wantError(t, "Connect() that fails", err, errs.Internal, "paused as before")
		if got, err := n.m.Get(sb.ID); err != nil || got.State != StatePaused || got.MemorySaved {
			t.Errorf("Get() = %+v, %v, want it paused without memory", got, err)
		}
		n.host.setFail("start", nil)
		if _, resumed, err := n.m.Connect(t.Context(), sb.ID, ConnectOptions{Timeout: time.Hour, EnvdToken: "secret-envd-token"}); err != nil || !resumed {
			t.Errorf("Connect() = %v, %v", resumed, err)
		}
	})
}
