//go:build !race

package link

import (
	"context"
	"testing"
	"time"
)

func TestPooledGetDoesNotAllocate(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	pool := NewPool(f.dialer.Dial, PoolOptions{})
	t.Cleanup(pool.stop)
	c := mustGet(t, pool, f.target)
	c.Release()
	got := testing.AllocsPerRun(1000, func() {
		c, err := pool.Get(context.Background(), f.target)
		if err != nil || !c.Reused() {
			t.Fatalf("Get() = %v, %v, want a reused connection", c, err)
		}
		if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		c.Release()
	})
	if got != 0 {
		t.Errorf("Get and Release of a pooled connection allocate %v times, want 0", got)
	}
}

// A message through the relay costs the node no allocation, whatever its length. The bytes come from this goroutine, so
// that only the server's are counted.
func TestRelayDoesNotAllocatePerMessage(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	c := f.dial(t)
	for _, size := range []int{1, 1 << 10, 256 << 10} {
		msg, got := make([]byte, size), make([]byte, size)
		run := func() {
			done := make(chan error, 1)
			go func() { _, err := c.Write(msg); done <- err }()
			for n := 0; n < size; {
				m, err := c.Read(got[n:])
				if err != nil {
					t.Fatal(err)
				}
				n += m
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		run()
		const ours = 4 // the goroutine and its channel
		if n := testing.AllocsPerRun(100, run); n > ours {
			t.Errorf("an echo of %d bytes allocates %v times, want none of the relay", size, n-ours)
		}
	}
}
