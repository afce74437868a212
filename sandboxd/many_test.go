package sandboxd

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// many is a node with room for more than the other tests need.
func many(t *testing.T) *node {
	n := newNode(t).start(func(m *Manager) {
		m.machine = fakeMachine{m.machine.(fakeMachine).host, 1000}
		m.slots = newSlots(1000)
		m.opts.MaxSandboxes = 1000
	})
	synctest.Wait() // all its jobs are at work
	return n
}

func heap() uint64 {
	var stats runtime.MemStats
	runtime.GC()
	runtime.GC() // what the first one has only made ready to go
	runtime.ReadMemStats(&stats)
	return stats.HeapAlloc
}

// working counts the goroutines of managers: the runtime has others that come and go.
func working() int {
	stacks := make([]byte, 8<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	n := 0
	for stack := range bytes.SplitSeq(stacks, []byte("\n\n")) {
		if bytes.Contains(stack, []byte("sandboxd.(*Manager)")) {
			n++
		}
	}
	return n
}

// TestPausedSandboxesAreCheap: each keeps at most 32 KiB of the node's memory, no goroutine, no slot and no place. What is measured includes
// what the fake catalogue knows.
func TestPausedSandboxesAreCheap(t *testing.T) {
	const sandboxes, most = 200, 32 << 10
	synctest.Test(t, func(t *testing.T) {
		n := many(t)
		goroutines, before := working(), heap()
		var all []Sandbox
		for range sandboxes {
			all = append(all, n.create(24*time.Hour))
		}
		time.Sleep(10 * time.Minute) // so that there are samples
		synctest.Wait()
		if running := working() - goroutines; running < sandboxes {
			t.Errorf("%d goroutines watch %d running sandboxes: this test measures nothing", running, sandboxes)
		}
		for _, sb := range all {
			n.pause(sb.ID, true)
		}
		synctest.Wait()
		n.host.mu.Lock()
		n.host.log = nil
		n.host.mu.Unlock()
		after := heap()
		if kept := int64(after) - int64(before); kept > sandboxes*most {
			t.Errorf("%d bytes for each paused sandbox, want at most %d", kept/sandboxes, most)
		} else {
			t.Logf("%d bytes for each paused sandbox", kept/sandboxes)
		}
		if got := working(); got > goroutines {
			t.Errorf("%d goroutines more than without sandboxes", got-goroutines)
		}
		if c := n.m.Capacity(); c.Sandboxes != 0 || n.m.slots.count(slotUsed) != 0 {
			t.Errorf("Capacity() = %+v, %d slots used", c, n.m.slots.count(slotUsed))
		}
		runtime.KeepAlive(all)
	})
}

// TestChurn creates and kills beside many that are paused and many that run: afterwards there is no more than before, in memory, on the host
// and on disk.
func TestChurn(t *testing.T) {
	const paused, running, rounds, each = 200, 100, 3, 100
	synctest.Test(t, func(t *testing.T) {
		n := many(t)
		for range paused {
			n.pause(n.create(24*time.Hour).ID, true)
		}
		for range running {
			n.create(24 * time.Hour)
		}
		round := func() {
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					for range each / 8 {
						if err := n.m.Kill(t.Context(), n.create(time.Hour).ID); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			time.Sleep(2 * slotQuarantine)
			synctest.Wait()
			n.host.mu.Lock()
			n.host.log = nil
			n.host.mu.Unlock()
		}
		round() // what grows once
		goroutines, before, slots := working(), heap(), len(n.m.slots.known)
		for range rounds {
			round()
		}
		if got := working(); got != goroutines {
			t.Errorf("%d goroutines, before %d", got, goroutines)
		}
		if got := len(n.m.slots.known); got > slots+8 {
			t.Errorf("%d slots have been used, before %d", got, slots)
		}
		// The samples of the running ones may grow, by kilobytes.
		if grown := int64(heap()) - int64(before); grown > 2<<20 {
			t.Errorf("%d bytes more than before", grown)
		}
		if left := n.host.leftovers(); len(left) != 2*running {
			t.Errorf("%d things on the host, want %d", len(left), 2*running)
		}
		dirs, err := os.ReadDir(filepath.Join(n.dir, "sandboxes"))
		if err != nil || len(dirs) != paused+running || len(n.cat.all()) != paused+running {
			t.Errorf("%d directories, %v, %d routes, want %d", len(dirs), err, len(n.cat.all()), paused+running)
		}
	})
}
