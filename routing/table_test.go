package routing

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// flakyStore is a memory store whose reads can be counted, failed and held, and whose subscription can go deaf.
type flakyStore struct {
	*MemoryStore
	reads, lists atomic.Int64

	mu   sync.Mutex
	down bool          // answers Unavailable
	hang bool          // does not answer
	gate chan struct{} // answers what it knew when it was asked, once this is closed
	deaf bool          // Watch passes nothing on
	mute bool          // Watch passes heartbeats on and no changes
	emit func(Event)   // of the Watch that runs
}

func newFlakyStore() *flakyStore { return &flakyStore{MemoryStore: NewMemoryStore()} }

func (s *flakyStore) set(change func(s *flakyStore)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *flakyStore) lose() {
	s.mu.Lock()
	emit := s.emit
	s.mu.Unlock()
	emit(Event{Kind: Lost})
}

func (s *flakyStore) trouble(ctx context.Context) error {
	s.mu.Lock()
	down, hang, gate := s.down, s.hang, s.gate
	s.mu.Unlock()
	switch {
	case hang:
		<-ctx.Done()
		return unavailable("read", ctx.Err())
	case gate != nil:
		<-gate
	case down:
		return unavailable("read", errors.New("connection refused"))
	}
	return nil
}

func (s *flakyStore) Route(ctx context.Context, sandbox string) (Route, error) {
	s.reads.Add(1)
	r, readErr := s.MemoryStore.Route(ctx, sandbox)
	if err := s.trouble(ctx); err != nil {
		return Route{}, err
	}
	return r, readErr
}

func (s *flakyStore) Nodes(ctx context.Context) ([]Node, error) {
	s.lists.Add(1)
	s.mu.Lock()
	down, hang := s.down, s.hang
	s.mu.Unlock()
	if hang {
		<-ctx.Done()
	}
	if down || hang {
		return nil, unavailable("list", errors.New("connection refused"))
	}
	return s.MemoryStore.Nodes(ctx)
}

func (s *flakyStore) Watch(ctx context.Context, emit func(Event)) error {
	return s.MemoryStore.Watch(ctx, func(e Event) {
		s.mu.Lock()
		s.emit = emit
		drop := s.deaf || s.mute && e.Kind != Heartbeat
		s.mu.Unlock()
		if !drop {
			emit(e)
		}
	})
}

// tableTest is a Table over a flaky store in a synctest bubble, with node n1 alive for as long as the test renews it.
type tableTest struct {
	*testing.T
	store *flakyStore
	table *Table
}

var someone = netip.MustParseAddr("192.0.2.7")

func bubble(t *testing.T, opts TableOptions, test func(t *tableTest)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		store := newFlakyStore()
		tt := &tableTest{T: t, store: store, table: NewTable(store, opts)}
		tt.lease("n1", 24*time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- tt.table.Run(ctx) }()
		synctest.Wait()
		test(tt)
		store.set(func(s *flakyStore) { s.hang, s.gate = false, nil })
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run() = %v, want nil", err)
		}
		time.Sleep(10 * time.Second) // reads that hung end with their time-out
	})
}

func (t *tableTest) lease(node string, ttl time.Duration) {
	t.Helper()
	if err := t.store.PutNode(t.Context(), Node{ID: node, LinkAddr: node + ":1", APIAddr: node + ":2"}, ttl); err != nil {
		t.Fatal(err)
	}
}

func (t *tableTest) put(r Route) {
	t.Helper()
	if err := t.store.PutRoute(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

func (t *tableTest) remove(sandbox string, generation uint64) {
	t.Helper()
	if err := t.store.DeleteRoute(t.Context(), sandbox, generation); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

// resolve says "<node> <generation>", or the code of the error.
func (t *tableTest) resolve(sandbox string) string {
	target, err := t.table.Resolve(t.Context(), []byte(sandbox), someone)
	return outcome(target, err)
}

func outcome(target *Target, err error) string {
	switch {
	case errors.Is(err, ErrNodeLost):
		return "node lost"
	case err != nil:
		return errs.CodeOf(err).String()
	}
	return fmt.Sprintf("%s %d", target.Node.ID, target.Route.Generation)
}

func (t *tableTest) want(sandbox, want string) {
	t.Helper()
	if got := t.resolve(sandbox); got != want {
		t.Errorf("Resolve(%q) = %s, want %s", sandbox, got, want)
	}
}

func (t *tableTest) wantReads(what string, want int64) {
	t.Helper()
	if got := t.store.reads.Swap(0); got != want {
		t.Errorf("%s: the store was read %d times, want %d", what, got, want)
	}
}

func TestTableAnswersFromMemoryUntilTheRouteChanges(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		for range 20 {
			t.want("isb", "n1 1")
			time.Sleep(time.Second)
		}
		t.wantReads("20 s of a route that does not change", 1)
		t.put(sample("isb", "n1", 2))
		t.want("isb", "n1 2")
		t.remove("isb", 2)
		t.want("isb", "not_found")
		t.put(sample("isb", "n1", 3))
		t.want("isb", "n1 3")
		t.wantReads("three changes", 3)
	})
}

func TestTableRemembersAbsenceBriefly(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		for range 10 {
			t.want("isb", "not_found")
		}
		t.wantReads("ten times the same absent name", 1)
		t.put(sample("isb", "n1", 1))
		t.want("isb", "n1 1") // at once: the change was published

		t.want("isc", "not_found")
		t.store.set(func(s *flakyStore) { s.mute = true })
		t.put(sample("isc", "n1", 1))
		time.Sleep(time.Second)
		t.want("isc", "n1 1") // and within a second without
	})
}

func TestTableAsksNobodyAboutWhatIsNoName(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		for _, bad := range []string{"", "ISB", "i-1", "../x", string(make([]byte, 100))} {
			t.want(bad, "not_found")
		}
		t.wantReads("bad names", 0)
	})
}

func TestTableSharesOneRead(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		gate := make(chan struct{})
		t.store.set(func(s *flakyStore) { s.gate = gate })
		var callers sync.WaitGroup
		for range 100 {
			callers.Go(func() { t.want("isb", "n1 1") })
		}
		ctx, cancel := context.WithCancel(t.Context())
		callers.Go(func() {
			if _, err := t.table.Resolve(ctx, []byte("isb"), someone); !errors.Is(err, context.Canceled) {
				t.Errorf("Resolve() = %v for a caller that left, want its context's error", err)
			}
		})
		synctest.Wait()
		cancel()
		synctest.Wait() // it has left; the others still wait
		close(gate)
		callers.Wait()
		t.wantReads("101 callers", 1)
	})
}

// The leader of a shared read may hang up; those who wait with it must not suffer.
func TestTableReadOutlivesItsFirstCaller(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		gate := make(chan struct{})
		t.store.set(func(s *flakyStore) { s.gate = gate })
		ctx, cancel := context.WithCancel(t.Context())
		var callers sync.WaitGroup
		callers.Go(func() { t.table.Resolve(ctx, []byte("isb"), someone) }) // it hangs up
		synctest.Wait()
		callers.Go(func() { t.want("isb", "n1 1") })
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(gate)
		callers.Wait()
		t.wantReads("two callers", 1)
	})
}

func TestTableDoesNotLoseAChangeThatOvertakesALoad(t *testing.T) {
	for what, change := range map[string]func(t *tableTest){
		"replaced": func(t *tableTest) { t.put(sample("isb", "n1", 2)) },
		"deleted":  func(t *tableTest) { t.remove("isb", 1) },
		"forgotten, then replaced unheard": func(t *tableTest) {
			t.store.set(func(s *flakyStore) { s.mute = true })
			t.put(sample("isb", "n1", 2))
			t.table.Forget("isb", 1)
		},
	} {
		t.Run(what, func(t *testing.T) {
			bubble(t, TableOptions{}, func(t *tableTest) {
				t.put(sample("isb", "n1", 1))
				gate := make(chan struct{})
				t.store.set(func(s *flakyStore) { s.gate = gate })
				var early sync.WaitGroup
				early.Go(func() { t.resolve("isb") }) // the read has the old route in hand
				synctest.Wait()
				t.store.set(func(s *flakyStore) { s.gate = nil })
				change(t)
				want := "n1 2"
				if what == "deleted" {
					want = "not_found"
				}
				t.want("isb", want) // asked after the change, while the old read is still on its way
				close(gate)
				early.Wait()
				t.want("isb", want) // and the old answer has not come back
			})
		})
	}
}

func TestTableDoesNotLoseACreationThatOvertakesALoad(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		gate := make(chan struct{})
		t.store.set(func(s *flakyStore) { s.gate = gate })
		var early sync.WaitGroup
		early.Go(func() { t.want("isb", "not_found") })
		synctest.Wait()
		t.put(sample("isb", "n1", 1))
		close(gate)
		early.Wait()
		t.store.set(func(s *flakyStore) { s.gate = nil })
		t.want("isb", "n1 1")
	})
}

// A read that was sent off before the subscription was lost proves nothing afterwards.
func TestTableDoesNotTrustALoadThatSpansALoss(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		gate := make(chan struct{})
		t.store.set(func(s *flakyStore) { s.gate = gate })
		var early sync.WaitGroup
		early.Go(func() { t.want("isb", "n1 1") })
		synctest.Wait()
		t.store.set(func(s *flakyStore) { s.mute, s.gate = true, nil })
		t.put(sample("isb", "n1", 2)) // unheard
		t.store.lose()
		close(gate)
		early.Wait()
		t.want("isb", "n1 2")
	})
}

func TestTableReadsSuspectsAgain(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		t.put(sample("isc", "n1", 1))
		t.want("isb", "n1 1")
		t.want("isc", "n1 1")
		t.store.set(func(s *flakyStore) { s.mute = true })
		t.put(sample("isb", "n1", 2))
		t.remove("isc", 1)
		t.want("isb", "n1 1") // unheard
		t.store.lose()
		t.want("isb", "n1 2")
		t.want("isc", "not_found")
		t.wantReads("before and after", 4)
		t.want("isb", "n1 2")
		t.wantReads("once is enough", 0)
	})
}

// The bound of docs/decisions/0002: while the store answers, nobody is sent where the sandbox was three seconds ago.
func TestStalenessBoundWithADeafSubscription(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		time.Sleep(10*time.Second + 300*time.Millisecond)
		t.want("isb", "n1 1")
		t.store.set(func(s *flakyStore) { s.deaf = true })
		changed := time.Now()
		t.put(sample("isb", "n1", 2))
		for t.resolve("isb") != "n1 2" {
			if time.Since(changed) > freshFor {
				t.Fatalf("the old route is served %v after it changed, the bound is %v", time.Since(changed), freshFor)
			}
			time.Sleep(10 * time.Millisecond)
		}
		// And it stays so for as long as the subscription is deaf, without a read per request.
		t.store.reads.Store(0)
		for generation := uint64(3); generation < 20; generation++ {
			t.put(sample("isb", "n1", generation))
			for range 300 {
				t.resolve("isb")
				time.Sleep(10 * time.Millisecond)
			}
			time.Sleep(time.Millisecond)
			t.want("isb", fmt.Sprint("n1 ", generation))
		}
		if got := t.store.reads.Load(); got > 20 {
			t.Errorf("%d reads in 51 s of a deaf subscription, want one in 3 s", got)
		}
	})
}

// Heartbeats that arrive while changes do not, as in a Cluster that fell apart, are believed for a minute.
func TestStalenessBoundWithAMuteSubscription(t *testing.T) {
	for what, pause := range map[string]time.Duration{"busy": 10 * time.Millisecond, "idle": maxAge + time.Millisecond} {
		t.Run(what, func(t *testing.T) {
			bubble(t, TableOptions{}, func(t *tableTest) {
				t.put(sample("isb", "n1", 1))
				t.want("isb", "n1 1")
				t.store.set(func(s *flakyStore) { s.mute = true })
				changed := time.Now()
				t.put(sample("isb", "n1", 2))
				time.Sleep(pause)
				for t.resolve("isb") != "n1 2" {
					if time.Since(changed) > maxAge {
						t.Fatalf("the old route is served %v after it changed, the bound is %v", time.Since(changed), maxAge)
					}
					time.Sleep(pause)
				}
				if took := time.Since(changed); what == "busy" && took > maxAge/2+time.Second {
					t.Errorf("a busy route was read again after %v, want %v", took, maxAge/2)
				}
			})
		})
	}
}

func TestTableServesWhatItKnowsWhileTheStoreIsDown(t *testing.T) {
	for what, fail := range map[string]func(s *flakyStore){
		"refuses": func(s *flakyStore) { s.down, s.deaf = true, true },
		"hangs":   func(s *flakyStore) { s.hang, s.deaf = true, true },
	} {
		t.Run(what, func(t *testing.T) {
			const limit = 5 * time.Minute
			bubble(t, TableOptions{}, func(t *tableTest) {
				t.put(sample("isb", "n1", 1))
				t.want("isb", "n1 1")
				t.want("isgone", "not_found")
				time.Sleep(20 * time.Minute) // the route is old; heartbeats have proved it current
				t.store.set(fail)
				stopped := time.Now()
				var slowest time.Duration
				slow := 0
				for time.Since(stopped) < limit-2*time.Second {
					asked := time.Now()
					t.want("isb", "n1 1")
					took := time.Since(asked)
					slowest = max(slowest, took)
					if took > 0 {
						slow++
					}
					time.Sleep(100 * time.Millisecond)
				}
				if slowest > revalidateWait || slow > 2 {
					t.Errorf("%d requests for a known route waited, one for %v; want at most 2 and %v", slow, slowest, revalidateWait)
				}
				t.want("isb2", "unavailable")
				t.want("isgone", "unavailable") // absence is not remembered beyond its second
				time.Sleep(time.Until(stopped.Add(limit + time.Second)))
				t.want("isb", "unavailable")

				t.store.set(func(s *flakyStore) { s.down, s.hang, s.deaf = false, false, false })
				t.store.lose() // it is back
				t.want("isb", "n1 1")
				t.want("isb2", "not_found")
			})
		})
	}
}

// Heartbeats of a later time do not prove what was read before a loss.
func TestStaleLimitCountsFromTheProofBeforeTheLoss(t *testing.T) {
	bubble(t, TableOptions{StaleLimit: time.Minute}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		t.put(sample("isother", "n1", 1))
		t.want("isb", "n1 1")
		time.Sleep(2 * time.Second)
		t.store.set(func(s *flakyStore) { s.mute = true })
		t.put(sample("isb", "n1", 2)) // unheard
		lostAt := time.Now()
		t.store.lose()
		t.store.set(func(s *flakyStore) { s.mute = false })
		for range 50 {
			time.Sleep(time.Second)
			t.want("isother", "n1 1")
		}
		t.store.set(func(s *flakyStore) { s.down, s.deaf = true, true })
		t.want("isb", "n1 1") // 50 s old, and within the limit
		time.Sleep(time.Until(lostAt.Add(time.Minute + time.Second)))
		t.want("isb", "unavailable")
		t.want("isother", "n1 1") // this one was proved until the store failed
	})
}

func TestTableForgetsOldEpochs(t *testing.T) {
	bubble(t, TableOptions{StaleLimit: time.Minute}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		t.want("isb", "n1 1")
		for range 50 {
			t.store.lose()
			time.Sleep(time.Second)
		}
		t.store.set(func(s *flakyStore) { s.down, s.deaf = true, true })
		t.want("isb", "n1 1") // by the time of its own read alone
		time.Sleep(11 * time.Second)
		t.want("isb", "unavailable")
	})
}

func TestTableNeverServesAChangedRouteWhileTheStoreIsDown(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		t.want("isb", "n1 1")
		t.store.set(func(s *flakyStore) { s.down = true })
		t.put(sample("isb", "n1", 2)) // heard
		t.want("isb", "unavailable")
		t.store.set(func(s *flakyStore) { s.down = false })
		t.want("isb", "n1 2")
	})
}

func TestTableJudgesTheEnd(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		r := sample("isb", "n1", 1)
		r.EndAt = time.Now().Add(10 * time.Second)
		t.put(r)
		t.want("isb", "n1 1")
		time.Sleep(10*time.Second - time.Nanosecond)
		t.want("isb", "n1 1")
		time.Sleep(time.Nanosecond)
		t.want("isb", "not_found")

		r.EndAt = time.Now().Add(time.Minute) // extended a little late
		t.put(r)
		t.want("isb", "n1 1")

		t.store.set(func(s *flakyStore) { s.down, s.deaf = true, true })
		time.Sleep(2 * time.Minute)
		t.want("isb", "n1 1") // whether it was extended cannot be read, and its node knows
		t.store.set(func(s *flakyStore) { s.down, s.deaf = false, false })
		t.store.lose()
		t.want("isb", "not_found")

		r.State, r.Generation = Paused, 2
		t.put(r)
		t.want("isb", "n1 2")
	})
}

func TestTableForget(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.put(sample("isb", "n1", 5))
		t.want("isb", "n1 5")
		t.table.Forget("isb", 4) // an old request's verdict
		t.table.Forget("isnever", 4)
		t.want("isb", "n1 5")
		t.wantReads("forgetting an earlier generation", 1)
		t.table.Forget("isb", 5)
		t.want("isb", "n1 5")
		t.wantReads("forgetting this one", 1)
	})
}

func TestTableNodeLost(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.put(sample("isb", "n2", 1))
		t.want("isb", "node lost") // never had a lease
		t.lease("n2", 5*time.Second)
		synctest.Wait()
		time.Sleep(2 * nodesPause)
		t.want("isb", "n2 1")
		for range 10 { // renewed
			time.Sleep(3 * time.Second)
			t.lease("n2", 5*time.Second)
			t.want("isb", "n2 1")
		}
		died := time.Now()
		for t.resolve("isb") != "node lost" {
			if time.Since(died) > 5*time.Second+nodesFreshFor {
				t.Fatal("a node without a lease is not lost")
			}
			time.Sleep(10 * time.Millisecond)
		}
		if took := time.Since(died); took < 5*time.Second {
			t.Errorf("the node was lost after %v, within its lease", took)
		}
		reads, lists := t.store.reads.Load(), t.store.lists.Load()
		for range 100 {
			t.want("isb", "node lost")
		}
		if t.store.reads.Load() != reads || t.store.lists.Load() != lists {
			t.Error("a lost node is asked for once per request")
		}
	})
}

// A node writes its lease and then its first route: a request that follows must not find the node lost, though the list of
// leases is from before.
func TestTableKnowsANewNodeAtOnce(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		time.Sleep(200 * time.Millisecond)
		t.store.set(func(s *flakyStore) { s.mute = true })
		t.lease("n2", time.Minute)
		t.put(sample("isb", "n2", 1))
		t.want("isb", "n2 1")
	})
}

func TestTableKeepsNodesThatCouldNotRenew(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.lease("n2", 5*time.Second)
		t.lease("n3", 5*time.Second)
		t.put(sample("isb", "n2", 1))
		t.put(sample("isc", "n3", 1))
		time.Sleep(time.Second)
		t.want("isb", "n2 1")
		t.want("isc", "n3 1")
		t.store.set(func(s *flakyStore) { s.down, s.deaf = true, true })
		time.Sleep(time.Minute)
		t.want("isb", "n2 1")
		t.store.set(func(s *flakyStore) { s.down, s.deaf = false, false })
		t.store.lose()
		time.Sleep(2 * time.Second)
		t.want("isb", "n2 1") // its lease ran out with the store, not with the node
		t.lease("n2", time.Minute)
		time.Sleep(leaseGrace)
		t.want("isb", "n2 1")
		t.want("isc", "node lost") // this one did not come back
	})
}

func TestTableLetsANodeLeaveDuringTheGrace(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.lease("n2", time.Minute)
		t.put(sample("isb", "n2", 1))
		time.Sleep(time.Second)
		t.want("isb", "n2 1")
		t.store.lose()
		if err := t.store.DeleteNode(t.Context(), "n2"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		time.Sleep(2 * time.Second)
		t.want("isb", "node lost")
	})
}

func TestTableNodeMoves(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		first, err := t.table.Resolve(t.Context(), []byte("isb"), someone)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		same, err := t.table.Resolve(t.Context(), []byte("isb"), someone)
		if err != nil || same != first {
			t.Errorf("the target was replaced (%p, %p, %v) though nothing changed", first, same, err)
		}
		if err := t.store.PutNode(t.Context(), Node{ID: "n1", LinkAddr: "elsewhere:1"}, time.Hour); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		time.Sleep(2 * nodesPause)
		moved, err := t.table.Resolve(t.Context(), []byte("isb"), someone)
		if err != nil || moved.Node.LinkAddr != "elsewhere:1" {
			t.Errorf("after the node moved: %+v, %v", moved, err)
		}
		if first.Node.LinkAddr != "n1:1" {
			t.Errorf("the old target was edited: %+v", first.Node)
		}
	})
}

func TestTableLimitsScanners(t *testing.T) {
	bubble(t, TableOptions{AbsentBurst: 10, AbsentPerSecond: 1}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		for i := range 1000 { // names that exist cost nothing
			t.put(sample(fmt.Sprint("iok", i), "n1", 1))
			t.want(fmt.Sprint("iok", i), "n1 1")
		}
		t.store.reads.Store(0)
		refused := 0
		for i := range 1000 {
			if t.resolve(fmt.Sprint("iscan", i)) == "exhausted" {
				refused++
			}
		}
		if refused != 990 {
			t.Errorf("%d of 1000 absent names were refused, want 990", refused)
		}
		t.wantReads("a scan of 1000 names", 10)
		t.want("isb", "exhausted")
		if got := outcome(t.table.Resolve(t.Context(), []byte("isb"), netip.MustParseAddr("192.0.2.8"))); got != "n1 1" {
			t.Errorf("another client gets %s, want n1 1", got)
		}
		t.want("isb", "n1 1") // known now: no question of limits
		time.Sleep(3 * time.Second)
		for i, want := range []string{"not_found", "not_found", "not_found", "exhausted"} {
			t.want(fmt.Sprint("ilater", i), want)
		}
	})
}

func TestTableLimitsAScannerWhoHangsUp(t *testing.T) {
	bubble(t, TableOptions{AbsentBurst: 10}, func(t *tableTest) {
		gate := make(chan struct{})
		t.store.set(func(s *flakyStore) { s.gate = gate })
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for i := range 50 {
			t.table.Resolve(ctx, fmt.Append(nil, "iscan", i), someone) // it hangs up
		}
		synctest.Wait()
		t.wantReads("50 questions of one who does not wait for answers", 10)
		close(gate)
	})
}

func TestScannerCannotEvictRoutes(t *testing.T) {
	bubble(t, TableOptions{MaxRoutes: 64, MaxAbsent: 64, AbsentBurst: 1 << 30}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		t.want("isb", "n1 1")
		for i := range 2000 {
			t.resolve(fmt.Sprint("iscan", i))
		}
		t.store.reads.Store(0)
		t.want("isb", "n1 1")
		t.wantReads("a known route after a scan", 0)
		absent := 0
		for i := range t.table.shards {
			absent += t.table.shards[i].absent.Len()
		}
		if absent > 64 {
			t.Errorf("%d absent names are remembered, want at most 64", absent)
		}
	})
}

func TestTableBoundsReadsInFlight(t *testing.T) {
	bubble(t, TableOptions{AbsentBurst: 1 << 30}, func(t *tableTest) {
		t.put(sample("isb", "n1", 1))
		gate := make(chan struct{})
		t.store.set(func(s *flakyStore) { s.gate = gate })
		var callers sync.WaitGroup
		for i := range maxLoads {
			callers.Go(func() { t.want(fmt.Sprint("iheld", i), "unavailable") })
		}
		synctest.Wait()
		asked := time.Now()
		t.want("isb", "unavailable")
		if time.Since(asked) > 0 {
			t.Error("a request waited for a read that was not sent")
		}
		callers.Wait() // each after LoadTimeout
		t.wantReads("in flight", maxLoads)
		close(gate)
		synctest.Wait()
		t.want("isb", "n1 1")
	})
}

func TestTableWithoutRunAsksTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFlakyStore()
		tt := &tableTest{T: t, store: store, table: NewTable(store, TableOptions{})}
		tt.lease("n1", time.Hour)
		tt.put(sample("isb", "n1", 1))
		tt.want("isb", "n1 1")
		tt.put(sample("isb", "n1", 2))
		time.Sleep(freshFor + 1)
		tt.want("isb", "n1 2")
	})
}

func TestTableDoesNotHideAnUnreadableRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &unreadableStore{NewMemoryStore()}
		table := NewTable(store, TableOptions{})
		for range 2 {
			_, err := table.Resolve(t.Context(), []byte("isb"), someone)
			if err == nil || errs.CodeOf(err) != errs.Internal {
				t.Errorf("Resolve() = %v, want internal", err)
			}
		}
		if table.storeDown() {
			t.Error("one bad record counts as a store that is down")
		}
	})
}

type unreadableStore struct{ *MemoryStore }

func (*unreadableStore) Route(context.Context, string) (Route, error) {
	return Route{}, errors.New("decode route: schema version 2")
}

func TestPickNode(t *testing.T) {
	bubble(t, TableOptions{}, func(t *tableTest) {
		picked := func() string {
			node, err := t.table.PickNode(t.Context())
			if err != nil {
				return errs.CodeOf(err).String()
			}
			return node.ID
		}
		count := func(n int) map[string]int {
			counts := make(map[string]int)
			for range n {
				counts[picked()]++
			}
			return counts
		}
		wantCounts := func(what string, want map[string]int) {
			t.Helper()
			if got := count(30); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%s: picked %v, want %v", what, got, want)
			}
		}
		put := func(n Node) {
			if err := t.store.PutNode(t.Context(), n, time.Hour); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			time.Sleep(2 * nodesPause)
		}
		wantCounts("one node", map[string]int{"n1": 30})
		put(Node{ID: "n2", APIAddr: "n2:2"})
		put(Node{ID: "n3", LinkAddr: "n3:1"})
		wantCounts("two with an API", map[string]int{"n1": 15, "n2": 15})
		put(Node{ID: "n1", APIAddr: "n1:2", Draining: true})
		wantCounts("one drains", map[string]int{"n2": 30})
		put(Node{ID: "n2", APIAddr: "n2:2", Draining: true})
		wantCounts("all drain", map[string]int{"n1": 15, "n2": 15})
		for _, id := range []string{"n1", "n2"} {
			if err := t.store.DeleteNode(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		time.Sleep(2 * nodesPause)
		wantCounts("none is left", map[string]int{"unavailable": 30})
	})
}

func TestLimiterUnits(t *testing.T) {
	l := newLimiter(1, 1, 2)
	for _, tt := range []struct {
		client string
		want   bool
	}{
		{"192.0.2.1", true},
		{"192.0.2.1", false},
		{"::ffff:192.0.2.1", false}, // the same one
		{"2001:db8::1", true},
		{"2001:db8::ffff:0:0:1", false}, // the same /64
		{"2001:db8:0:1::1", true},       // the third client: the first is forgotten
		{"192.0.2.1", true},
	} {
		if got := l.take(netip.MustParseAddr(tt.client), 0); got != tt.want {
			t.Errorf("take(%s) = %v, want %v", tt.client, got, tt.want)
		}
	}
	l.giveBack(netip.MustParseAddr("198.51.100.1")) // never seen
	if !l.take(netip.Addr{}, 0) || l.take(netip.Addr{}, 0) {
		t.Error("clients without an address do not share one bucket")
	}
}
