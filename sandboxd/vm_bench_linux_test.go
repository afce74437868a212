package sandboxd

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/testkit"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/image"
)

// BenchmarkVMCreate is a create from a baked template with the fake hypervisor, alone and with 20 at once, in a slot that was made ahead. What is
// the node's own part is all of it but the time from the hypervisor's start to the guest's first answer, and the guest's init. Its processor
// time, with that of the slots which are made anew meanwhile, is the same however busy the machine is. TMPDIR on a tmpfs keeps the disk out.
func BenchmarkVMCreate(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("needs root, to make network namespaces")
	}
	for name, together := range map[string]int{"alone": 1, "20 at once": 20} {
		b.Run(name, func(b *testing.B) { benchmarkVMCreate(b, together) })
	}
}

func benchmarkVMCreate(b *testing.B, together int) {
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	h := newVMHost(b)
	root := filepath.Join(h.state, "baked")
	writeTemplate(b, root)
	manifest := image.Manifest{Version: 1, Name: "baked", Tag: "default", Build: "b", CPUs: 1, MemoryMiB: 128, DiskMiB: 64}
	must(h.machine(b).Bake(b.Context(), root, &manifest, func(string) {}))
	text, err := json.Marshal(manifest)
	must(err)
	must(os.WriteFile(filepath.Join(root, "manifest.json"), text, 0o644))

	timed := &timedMachine{VMMachine: h.machine(b), phases: map[Step][]time.Duration{}}
	m, err := New(Options{
		StateDir: filepath.Join(h.state, "node"), Machine: timed, Publisher: fileCatalogue{b.TempDir()}, ReadySlots: together,
		ConcurrentCreates: together, Templates: []Template{{ID: "base", Root: root, CPUs: 1, MemoryMiB: 128, DiskMiB: 64}},
	})
	must(err)
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	defer func() { cancel(); must(<-ended) }()
	<-m.Ready()

	var own []time.Duration
	var processor time.Duration
	for range b.N {
		for m.slots.count(slotReady) < together {
			time.Sleep(10 * time.Millisecond) // not part of what is measured
		}
		used := testkit.ProcessorTime(b)
		var wg sync.WaitGroup
		var mu sync.Mutex
		var made []string
		for range together {
			wg.Go(func() {
				began := time.Now()
				sb, err := m.Create(ctx, spec(time.Hour))
				took := time.Since(began)
				must(err)
				mu.Lock()
				defer mu.Unlock()
				own = append(own, took-timed.others(sb.ID))
				made = append(made, sb.ID)
			})
		}
		wg.Wait()
		processor += testkit.ProcessorTime(b) - used
		for _, id := range made {
			wg.Go(func() { must(m.Kill(ctx, id)) })
		}
		wg.Wait()
	}
	median := func(all []time.Duration) float64 {
		slices.Sort(all)
		return float64(all[len(all)/2].Microseconds()) / 1000
	}
	b.ReportMetric(median(own), "ms-own")
	b.ReportMetric(float64(processor.Microseconds())/1000/float64(len(own)), "cpu-ms-own")
	for step, all := range timed.phases {
		b.ReportMetric(median(all), "ms-"+string(step))
	}
}

// timedMachine notes how long a create waits for the hypervisor and the guest, and each phase of a start.
type timedMachine struct {
	*VMMachine
	mu     sync.Mutex
	waited map[string]time.Duration
	phases map[Step][]time.Duration
}

func (m *timedMachine) wait(id string, d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waited == nil {
		m.waited = map[string]time.Duration{}
	}
	m.waited[id] += d
}

func (m *timedMachine) others(id string) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.waited[id]
}

func (m *timedMachine) Start(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (Instance, error) {
	last := time.Now()
	i, err := m.VMMachine.Start(ctx, p, fence, func(s Step) {
		took := time.Since(last)
		last = last.Add(took)
		if s == StepRestored || s == StepStarted {
			m.wait(p.ID, took)
		}
		m.mu.Lock()
		m.phases[s] = append(m.phases[s], took)
		m.mu.Unlock()
		reached(s)
	})
	if err != nil {
		return nil, err
	}
	return timedInstance{i, m, p.ID}, nil
}

type timedInstance struct {
	Instance
	machine *timedMachine
	id      string
}

func (i timedInstance) Init(ctx context.Context, r guest.InitRequest) error {
	began := time.Now()
	defer func() { i.machine.wait(i.id, time.Since(began)) }()
	return i.Instance.Init(ctx, r)
}

func (i timedInstance) Health(ctx context.Context) error {
	began := time.Now()
	defer func() { i.machine.wait(i.id, time.Since(began)) }()
	return i.Instance.Health(ctx)
}
