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
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

func TestFakeMachine(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "isuite"), 0o711); err != nil {
		t.Fatal(err)
	}
	testMachine(t, fakeMachine{newFakeHost(), 8}, dir, "")
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
