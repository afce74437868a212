package lab

import (
	"bufio"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// startTime bounds the start and the end of a daemon: many times what they take.
const startTime = time.Minute

// Daemon is a program on the host that runs until the test ends.
type Daemon struct {
	*Cmd
	name    string
	lines   chan string   // of its output; closed when that ends
	drained chan struct{} // closed when the last line is in the test's log
	ended   bool
}

// Daemon starts a program that is expected to run. What it prints goes to the test's log and to Await. When the test ends it gets
// the signal of Ctrl-C, and must then end cleanly. prepare, if not nil, may change the command before it starts.
func (h *Host) Daemon(t testing.TB, prepare func(*Cmd), name string, args ...string) *Daemon {
	t.Helper()
	d := &Daemon{
		Cmd:  h.Command(context.Background(), name, args...), // the test's own context ends before its cleanup
		name: filepath.Base(name), lines: make(chan string, 4096), drained: make(chan struct{}),
	}
	if prepare != nil {
		prepare(d.Cmd)
	}
	out, in := io.Pipe()
	d.Stdout, d.Stderr = in, in
	if err := d.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go d.follow(t, out)
	t.Cleanup(func() {
		if d.ended {
			return
		}
		if err := d.Interrupt(t); err != nil {
			t.Errorf("%s after an interrupt: %v, want a clean end", d.name, err)
		}
	})
	return d
}

func (d *Daemon) follow(t testing.TB, out io.Reader) {
	defer close(d.drained)
	defer close(d.lines)
	for s := bufio.NewScanner(out); s.Scan(); {
		t.Logf("%s: %s", d.name, s.Text())
		select {
		case d.lines <- s.Text():
		default: // nobody waits for a line that far behind
		}
	}
}

// Await reads the daemon's output until a line satisfies done.
func (d *Daemon) Await(t testing.TB, what string, done func(line string) bool) {
	t.Helper()
	timeout := time.After(startTime)
	for {
		select {
		case line, ok := <-d.lines:
			if !ok {
				t.Fatalf("waiting for %s: %s ended", what, d.name)
			}
			if done(line) {
				return
			}
		case <-timeout:
			t.Fatalf("waiting for %s: not within %v", what, startTime)
		}
	}
}

// Interrupt sends the signal of Ctrl-C and returns how the daemon ended.
func (d *Daemon) Interrupt(t testing.TB) error { return d.end(t, os.Interrupt) }

// Kill ends the daemon at once, as a crash would.
func (d *Daemon) Kill(t testing.TB) { _ = d.end(t, os.Kill) } // a killed program has no clean end

func (d *Daemon) end(t testing.TB, signal os.Signal) error {
	t.Helper()
	d.ended = true
	if err := d.Process.Signal(signal); err != nil {
		t.Errorf("signal %s: %v", d.name, err)
	}
	kill := time.AfterFunc(startTime, func() { _ = d.Process.Kill() }) // then Wait says so
	defer kill.Stop()
	err := d.Wait()
	_ = d.Stdout.(io.Closer).Close() // a pipe's end, which has no error
	<-d.drained
	return err
}

// Value is the rest of a line that begins with prefix, for Await.
func Value(into *string, prefix string) func(line string) bool {
	return func(line string) bool {
		value, ok := strings.CutPrefix(line, prefix)
		if ok {
			*into = value
		}
		return ok
	}
}
