package sandboxd

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

var (
	_ link.Backend = (*Manager)(nil)
	_ link.Waker   = (*Manager)(nil)
)

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

// TestTrafficDuringARestart: the link serves while sandboxes are being taken up. It used to find them running, without the instance
// that it was about to call, and the node died.
func TestTrafficDuringARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t).start(keep)
		sb := n.create(time.Hour)
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		open := func(id string, generation uint64) error {
			_, err := n.m.Open(t.Context(), id, generation, 80)
			return err
		}
		for _, stalled := range []string{"setup", "adopt", "set fence"} {
			n.host.holdNothing()
			release := n.host.holdUp(stalled)
			n.make(keep)
			n.run()
			synctest.Wait()
			wantVerdict(t, stalled, open(sb.ID, sb.Generation), link.Busy)
			wantVerdict(t, stalled+": what may still be found", open("inone", 1), link.Busy)
			if len(n.m.List()) != 0 {
				t.Errorf("%s: List shows a sandbox that has not been taken up", stalled)
			}
			_, err := n.m.Metrics(t.Context(), sb.ID)
			_, err2 := n.m.Refusals(sb.ID)
			if err == nil || err2 == nil {
				t.Errorf("%s: Metrics() = %v, Refusals() = %v, want errors", stalled, err, err2)
			}
			if stalled != "setup" { // the records have been read
				wantVerdict(t, "older lifecycle", open(sb.ID, sb.Generation-1), link.WrongGeneration)
				_, err := n.m.Get(sb.ID)
				wantError(t, "Get", err, errs.Unavailable, "not taken up")
			}
			release()
			<-n.m.Ready()
			wantVerdict(t, "after "+stalled, open(sb.ID, sb.Generation), link.PortClosed)
			wantVerdict(t, "unknown after "+stalled, open("inone", 1), link.NotHere)
			if err := n.stop(); err != nil {
				t.Fatal(err)
			}
		}
	})
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
