package sandboxd

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/sandboxd/egress"
	"github.com/sluice-edge/sluice/sandboxd/image"
)

// BenchmarkVMStart is a create from a baked template with the fake hypervisor, phase by phase: what is ours and not the hypervisor's or the
// guest's is network to process, with a slot and a layer that were made ahead.
func BenchmarkVMStart(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("needs root, to make network namespaces")
	}
	h := newVMHost(b)
	root := filepath.Join(h.state, "baked")
	h.writeTemplate(b, root)
	manifest := image.Manifest{Version: 1, Name: "baked", Tag: "default", Build: "b", CPUs: 1, MemoryMiB: 128, DiskMiB: 64}
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	must(h.machine(b).Bake(b.Context(), root, &manifest, func(string) {}))
	text, err := json.Marshal(manifest)
	must(err)
	must(os.WriteFile(filepath.Join(root, "manifest.json"), text, 0o644))
	m := h.machine(b)
	must(m.Setup(b.Context()))
	defer func() { must(m.Close(context.WithoutCancel(b.Context()))) }()

	took := map[Step][]time.Duration{}
	for i := range b.N {
		id := fmt.Sprintf("i%06d", i)
		p := Place{ID: id, Dir: filepath.Join(h.dir(b, id), id), Slot: i % 64, Root: root, CPUs: 1, MemoryMiB: 128, DiskMiB: 64}
		must(m.Prepare(b.Context(), p.Slot))
		last := time.Now()
		note := func(s Step) {
			now := time.Now()
			took[s] = append(took[s], now.Sub(last))
			last = now
		}
		instance, err := m.Start(b.Context(), p, egress.Policy{AllowInternet: true}, note)
		must(err)
		must(instance.Init(b.Context(), guest.InitRequest{MergeEnv: true}))
		note(StepInit)
		must(m.Destroy(b.Context(), p, func(Step) {}))
	}
	for step, all := range took {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Microseconds()), "µs-"+string(step))
	}
}
