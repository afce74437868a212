package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// NestedDaemon is a program that runs in a nested host until the test ends.
type NestedDaemon struct {
	name   string
	cancel context.CancelFunc
	lines  chan string   // of its output; closed when that ends
	done   chan struct{} // closed when it has ended
	end    error         // how, once done is closed
}

// Daemon starts a program inside that is expected to run. What it prints goes to the test's log and to Await. It is killed, with all
// that it started in its session, when the test ends.
func (n *Nested) Daemon(t testing.TB, name string, c Command) *NestedDaemon {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background()) // the test's own ends before its cleanup
	d := &NestedDaemon{name: name, cancel: cancel, lines: make(chan string, 4096), done: make(chan struct{})}
	out, in := io.Pipe()
	c.Output = in
	go d.run(ctx, n, c, in)
	drained := make(chan struct{})
	go d.follow(t, out, drained)
	t.Cleanup(func() {
		cancel()
		<-d.done
		<-drained
	})
	return d
}

func (d *NestedDaemon) run(ctx context.Context, n *Nested, c Command, in *io.PipeWriter) {
	defer close(d.done)
	defer in.Close()
	_, code, err := n.Run(ctx, c)
	if err == nil && code != 0 {
		err = fmt.Errorf("exit status %d", code)
	}
	d.end = err
}

func (d *NestedDaemon) follow(t testing.TB, out io.Reader, drained chan struct{}) {
	defer close(drained)
	defer close(d.lines)
	r := bufio.NewReaderSize(out, 64<<10)
	for {
		line, err := r.ReadString('\n')
		if line = trimNewline(line); line != "" {
			t.Logf("%s: %s", d.name, line)
			select {
			case d.lines <- line:
			default: // nobody waits for a line that far behind
			}
		}
		if err != nil {
			return
		}
	}
}

func trimNewline(s string) string {
	for len(s) > 0 && (s[len(s)-1] == '\n' || s[len(s)-1] == '\r') {
		s = s[:len(s)-1]
	}
	return s
}

// Await reads the daemon's output until a line satisfies done.
func (d *NestedDaemon) Await(t testing.TB, what string, within time.Duration, done func(line string) bool) {
	t.Helper()
	timeout := time.After(within)
	for {
		select {
		case line, ok := <-d.lines:
			if !ok {
				<-d.done
				t.Fatalf("waiting for %s: %s ended in the nested host: %v", what, d.name, d.end)
			}
			if done(line) {
				return
			}
		case <-timeout:
			t.Fatalf("waiting for %s from %s in the nested host: not within %v", what, d.name, within)
		}
	}
}

// Wait waits for the end of the daemon and returns how it ended.
func (d *NestedDaemon) Wait(ctx context.Context) error {
	select {
	case <-d.done:
		return d.end
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Forward takes every connection to ln inside, to a TCP address as seen there, until the test ends. It closes ln.
func (n *Nested) Forward(t testing.TB, ln net.Listener, addr string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	f := &forwarder{nested: n, addr: addr, ctx: ctx}
	f.running.Go(func() { f.accept(t, ln) })
	t.Cleanup(func() {
		cancel()
		_ = ln.Close()
		f.conns.close()
		f.running.Wait()
	})
}

type forwarder struct {
	nested  *Nested
	addr    string
	ctx     context.Context // ends dials
	conns   connSet
	running sync.WaitGroup
}

func (f *forwarder) accept(t testing.TB, ln net.Listener) {
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			t.Errorf("forward to %s: %v", f.addr, err)
			return
		}
		f.running.Go(func() { f.serve(c.(*net.TCPConn)) })
	}
}

func (f *forwarder) serve(c *net.TCPConn) {
	f.conns.add(c)
	defer f.conns.remove(c)
	up, err := f.nested.Dial(f.ctx, f.addr)
	if err != nil {
		_ = c.SetLinger(0) // refused in there is refused out here
		return
	}
	f.conns.add(up)
	defer f.conns.remove(up)
	other := up.(*net.TCPConn)
	var up2down sync.WaitGroup
	up2down.Go(func() { passOn(c, other) })
	passOn(other, c)
	up2down.Wait()
}

// passOn copies one direction. Its end is passed on; an error ends both.
func passOn(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		for _, c := range []*net.TCPConn{to, from} {
			_ = c.SetLinger(0)
			_ = c.Close()
		}
		return
	}
	_ = to.CloseWrite()
}
