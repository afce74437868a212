package sandboxd

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

var _ link.Backend = (*Manager)(nil)

// watchFence calls before when rules are applied.
type watchFence struct {
	Instance
	before func()
}

func (w watchFence) SetFence(ctx context.Context, p egress.Policy) error {
	w.before()
	return w.Instance.SetFence(ctx, p)
}

func wantVerdict(t *testing.T, what string, err error, want link.Verdict) {
	t.Helper()
	v, ok := errors.AsType[*link.VerdictError](err)
	if !ok || v.Verdict != want {
		t.Errorf("%s: Open() = %v, want %v", what, err, want)
	}
}

func TestOpen(t *testing.T) {
	n := newNode(t).start()
	sb := n.create(time.Hour)
	ln, err := n.host.proc(sb.ID).listen(3000)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		c, err := ln.Accept()
		if err == nil {
			io.WriteString(c, "hello")
			c.Close()
		}
	}()
	c, err := n.m.Open(t.Context(), sb.ID, sb.Generation, 3000)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
		t.Errorf("read %q, %v", got, err)
	}
	open := func(id string, generation uint64, port uint16) error {
		_, err := n.m.Open(t.Context(), id, generation, port)
		return err
	}
	wantVerdict(t, "closed port", open(sb.ID, sb.Generation, 3001), link.PortClosed)
	wantVerdict(t, "port zero", open(sb.ID, sb.Generation, 0), link.Refused)
	wantVerdict(t, "older lifecycle", open(sb.ID, sb.Generation-1, 3000), link.WrongGeneration)
	wantVerdict(t, "unknown sandbox", open("inone", sb.Generation, 3000), link.NotHere)
	n.host.setFail("dial", errors.New("too many open files"))
	wantVerdict(t, "no descriptors", open(sb.ID, sb.Generation, 3000), link.Busy)
	if err := n.m.Kill(t.Context(), sb.ID); err != nil {
		t.Fatal(err)
	}
	wantVerdict(t, "killed sandbox", open(sb.ID, sb.Generation, 3000), link.NotHere)
}

// TestOpenHangs: a server in the sandbox that does not accept costs an edge a bounded time, and a kill ends the wait.
func TestOpenHangs(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		sb := n.create(time.Hour)
		n.host.holdUp("dial")
		began := time.Now()
		_, err := n.m.Open(t.Context(), sb.ID, sb.Generation, 80)
		wantVerdict(t, "backlog full", err, link.Busy)
		if took := time.Since(began); took != openTime {
			t.Errorf("took %v, want %v", took, openTime)
		}
		opened := make(chan error, 1)
		go func() {
			_, err := n.m.Open(context.Background(), sb.ID, sb.Generation, 80)
			opened <- err
		}()
		synctest.Wait()
		if err := n.m.Kill(t.Context(), sb.ID); err != nil {
			t.Fatal(err)
		}
		wantVerdict(t, "killed meanwhile", <-opened, link.NotHere)
	})
}
