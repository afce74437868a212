package sandboxd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

func TestFakeMachine(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "isuite"), 0o711); err != nil {
		t.Fatal(err)
	}
	testMachine(t, fakeMachine{newFakeHost(), 8}, dir, "")
	testSuspender(t, fakeMachine{newFakeHost(), 8}, dir, "")
}

// testSuspender is what the manager relies on besides, of machines that can save their sandboxes. dir holds a directory "isuite"; root
// is the place's.
func testSuspender(t *testing.T, m Suspender, dir, root string) {
	ctx := t.Context()
	place := Place{ID: "isuite", Dir: filepath.Join(dir, "isuite"), Slot: 3, Root: root, CPUs: 1, MemoryMiB: 256, DiskMiB: 256}
	reached := func(Step) {}
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	saved := func(when string, want Saved, code errs.Code) {
		t.Helper()
		got, err := m.Saved(place)
		if got.Memory != want.Memory || (err == nil) != (code == 0) || code != 0 && errs.CodeOf(err) != code {
			t.Errorf("%s: Saved() = %+v, %v, want memory %v and code %v", when, got, err, want.Memory, code)
		}
	}
	suspend := func(instance Instance, memory bool) {
		t.Helper()
		var steps []Step
		must("suspend", m.Suspend(ctx, place, instance, memory, func(s Step) { steps = append(steps, s) }))
		if !slices.Contains(steps, StepFrozen) || steps[len(steps)-1] != StepSaved {
			t.Errorf("suspend reported %q", steps)
		}
		<-instance.Done()
		must("destroy", m.Destroy(ctx, place, reached))
		saved("suspended", Saved{Memory: memory}, 0)
		place.Slot++ // each time in another slot
	}

	must("setup", m.Setup(ctx))
	if p, ok := m.(Preparer); ok {
		must("prepare", p.Prepare(ctx, place.Slot))
		must("destroy by slot", m.Destroy(ctx, Place{Slot: place.Slot}, reached))
		must("prepare", p.Prepare(ctx, place.Slot))
	}
	_, err := m.Resume(ctx, place, egress.Policy{}, reached)
	if err == nil {
		t.Error("Resume of nothing succeeded")
	}
	must("destroy", m.Destroy(ctx, place, reached))
	instance, err := m.Start(ctx, place, egress.Policy{}, reached)
	must("start", err)
	must("init", instance.Init(ctx, guest.InitRequest{AccessToken: "t", MergeEnv: true}))
	saved("before the first pause", Saved{}, errs.NotFound)
	suspend(instance, true)

	// Until it goes on, whatever happens leaves it as it was.
	back, err := m.Resume(ctx, place, egress.Policy{}, reached)
	must("resume", err)
	if !back.Memory() {
		t.Error("resumed without its memory")
	}
	saved("resumed", Saved{Memory: true}, 0)
	must("destroy", m.Destroy(ctx, place, reached))
	saved("taken back", Saved{Memory: true}, 0)

	back, err = m.Resume(ctx, place, egress.Policy{}, reached)
	must("resume", err)
	must("commit", back.Commit())
	must("continue", back.Continue(ctx, guest.ResumeRequest{}))
	must("continue again", back.Continue(ctx, guest.ResumeRequest{}))
	must("health", back.Health(ctx))
	if got, err := m.Saved(place); err == nil && got.Memory {
		t.Error("it goes on, and its memory counts as saved")
	}
	must("release", back.Release())
	adopted, err := m.Adopt(ctx, place, back.Handle())
	must("adopt", err)
	if s, ok := adopted.(Suspended); !ok || s.Continue(ctx, guest.ResumeRequest{}) != nil {
		t.Error("what was taken up cannot be let go on")
	}
	suspend(adopted, false)
	back, err = m.Resume(ctx, place, egress.Policy{}, reached)
	must("resume without memory", err)
	if back.Memory() {
		t.Error("resumed with memory that was not saved")
	}
	must("init", back.Init(ctx, guest.InitRequest{AccessToken: "t", MergeEnv: true}))
	suspend(back, true)
	must("drop memory", m.DropMemory(place))
	must("drop memory again", m.DropMemory(place))
	saved("dropped", Saved{}, 0)
	must("destroy", m.Destroy(ctx, place, reached))
	must("close", m.Close(context.WithoutCancel(ctx)))
}

// testMachine is what the manager relies on; every machine passes it. dir holds a directory "isuite"; root is the place's.
func testMachine(t *testing.T, m Machine, dir, root string) {
	ctx := t.Context()
	place := Place{ID: "isuite", Dir: filepath.Join(dir, "isuite"), Slot: 3, Root: root, CPUs: 1, MemoryMiB: 256, DiskMiB: 256}
	hasSlots := false
	reached := func(s Step) { hasSlots = hasSlots || s == StepNetwork }
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	occupied := func(want ...int) {
		t.Helper()
		got, err := m.Occupied(ctx)
		if !hasSlots {
			want = nil
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("Occupied() = %v, %v, want %v", got, err, want)
		}
	}

	must("setup", m.Setup(ctx))
	must("setup again", m.Setup(ctx))
	must("maintain", m.Maintain(ctx))
	must("destroy nothing", m.Destroy(ctx, place, reached))
	instance, err := m.Start(ctx, place, egress.Policy{AllowInternet: true}, reached)
	must("start", err)
	occupied(3)
	must("init", instance.Init(ctx, guest.InitRequest{AccessToken: "t"}))
	must("health", instance.Health(ctx))
	if _, err := instance.DialPort(ctx, 81); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("DialPort of a closed port = %v, want ECONNREFUSED", err)
	}
	handle := instance.Handle()
	must("commit", instance.Commit())
	must("release", instance.Release())

	instance, err = m.Adopt(ctx, place, handle)
	must("adopt", err)
	must("health after adopt", instance.Health(ctx))
	must("set fence", instance.SetFence(ctx, egress.Policy{}))
	_, err = instance.Refusals()
	must("refusals", err)
	if err := instance.Err(); err != nil {
		t.Errorf("Err() while it runs = %v", err)
	}

	must("destroy", m.Destroy(ctx, place, reached))
	<-instance.Done()
	occupied()
	must("destroy again", m.Destroy(ctx, place, reached))
	if _, err := m.Adopt(ctx, place, handle); err == nil {
		t.Error("Adopt of a destroyed sandbox succeeded")
	}

	// After a crash only half of what names a place may be known.
	place.ID, place.Dir = "ihalf", filepath.Join(dir, "ihalf")
	must("make directory", os.Mkdir(place.Dir, 0o711))
	instance, err = m.Start(ctx, place, egress.Policy{}, reached)
	must("start at the same slot", err)
	must("commit", instance.Commit())
	if hasSlots {
		must("destroy by slot", m.Destroy(ctx, Place{Slot: 3}, reached))
		occupied()
	}
	must("destroy by name", m.Destroy(ctx, Place{ID: place.ID, Dir: place.Dir, Slot: NoSlot}, reached))
	<-instance.Done()
	must("close", m.Close(context.WithoutCancel(ctx)))
}
