package sandboxd

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

// testHogs lets one sandbox take all that it can get, one thing after the other, beside another one that must go on answering. How much slower
// that becomes is told and not judged: here both share one emulated processor.
func (h *vmHost) testHogs(t *testing.T) {
	ctx := t.Context()
	must := mustOf(t)
	m := h.machine(t)
	must("setup", m.Setup(ctx))
	start := func(id string, slot int) (Place, *vmSandbox) {
		p := Place{ID: id, Slot: slot, Root: h.template, CPUs: 1, MemoryMiB: 192, DiskMiB: 64}
		p.Dir = filepath.Join(h.dir(t, id), id)
		instance, err := m.Start(ctx, p, egress.Policy{}, func(Step) {})
		must("start", err)
		must("init", instance.Init(ctx, guest.InitRequest{MergeEnv: true, Timestamp: time.Now()}))
		return p, instance.(*vmSandbox)
	}
	hogPlace, hog := start("ihog", 1)
	quietPlace, quiet := start("iquiet", 2)
	// latency is how long the quiet one takes to accept a connection and to answer, the longest of a hundred but one.
	latency := func() time.Duration {
		var all []time.Duration
		for range 100 {
			began := time.Now()
			conn, err := quiet.DialPort(ctx, guest.Port)
			must("connect to the quiet sandbox", err)
			must("close", conn.Close())
			all = append(all, time.Since(began))
		}
		slices.Sort(all)
		return all[98]
	}
	for range 3 {
		latency() // the memory of both is still on its way
	}
	idle := latency()
	for _, what := range []struct{ name, command, want string }{
		{"memory", "eat", "signal: killed"},
		{"disk", "fill /root/big", "no space left on device"},
		{"processes", "bomb", ""},
		{"processor", "spin", ""},
	} {
		ended := make(chan guest.ExecResult, 1)
		go func() {
			result, err := hog.guest.Exec(ctx, guest.ExecRequest{Cmd: what.command, User: "root", Timeout: 15 * time.Second})
			if err != nil {
				result.Output = err.Error()
			}
			ended <- result
		}()
		busy := latency()
		result := <-ended
		if what.want != "" && result.ExitCode != 128+9 && !strings.Contains(result.Output, what.want) {
			t.Errorf("%s: the hog ended with %+v, want %q", what.name, result, what.want)
		}
		t.Logf("%s: p99 of the other one %v, idle %v: %.1f times", what.name, busy.Round(time.Microsecond), idle.Round(time.Microsecond), float64(busy)/float64(idle))
		if err := hog.Health(ctx); err != nil {
			t.Errorf("%s: the hog's own agent: %v", what.name, err)
		}
	}
	if got, err := quiet.tell(ctx, "write /root/word fine"); err != nil {
		t.Errorf("disk of the quiet sandbox: %q, %v", got, err)
	}
	must("destroy", m.Destroy(ctx, hogPlace, func(Step) {}))
	must("destroy", m.Destroy(ctx, quietPlace, func(Step) {}))
	must("close", m.Close(ctx))
}
