package link

import (
	"context"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// The same stream with and without us, spliced and through user space: the ratios are the result.

func BenchmarkStreamDirect(b *testing.B) {
	benchmarkStream(b, func(b *testing.B) net.Conn {
		c, err := net.Dial("tcp", serveGuest(b, sink))
		if err != nil {
			b.Fatal(err)
		}
		return c
	})
}

func BenchmarkStreamSplice(b *testing.B) {
	benchmarkStream(b, func(b *testing.B) net.Conn { return start(b, sink, ServerOptions{}).dial(b) })
}

func BenchmarkStreamIOCopySplice(b *testing.B) {
	benchmarkStream(b, func(b *testing.B) net.Conn { return plainRelay(b, false) })
}

func BenchmarkStreamUserCopy(b *testing.B) {
	benchmarkStream(b, func(b *testing.B) net.Conn { return plainRelay(b, true) })
}

func BenchmarkEchoSplice(b *testing.B) {
	benchmarkEcho(b, start(b, echo, ServerOptions{}).dial(b))
}

func BenchmarkEchoIOCopySplice(b *testing.B) {
	benchmarkEcho(b, plainRelayTo(b, serveGuest(b, echo), false))
}
func BenchmarkEchoUserCopy(b *testing.B) {
	benchmarkEcho(b, plainRelayTo(b, serveGuest(b, echo), true))
}

func sink(c *net.TCPConn) {
	buf := make([]byte, 1<<20)
	for {
		if _, err := c.Read(buf); err != nil {
			return
		}
	}
}

func plainRelay(b *testing.B, user bool) net.Conn { return plainRelayTo(b, serveGuest(b, sink), user) }

// plainRelayTo is a relay of io.Copy; user hides the sockets from it.
func plainRelayTo(b *testing.B, guest string, user bool) net.Conn {
	addr := serveGuest(b, func(c *net.TCPConn) {
		g, err := net.Dial("tcp", guest)
		if err != nil {
			return
		}
		defer g.Close()
		go func() {
			if user {
				_ = copyBuffered(c, g, &progress{relay: &relay{}, moved: newServerMetrics(nil).toEdge})
			} else {
				_, _ = io.Copy(c, g)
			}
			_ = c.Close()
		}()
		if user {
			_ = copyBuffered(g, c, &progress{relay: &relay{}, moved: newServerMetrics(nil).toEdge})
		} else {
			_, _ = io.Copy(g, c)
		}
	})
	c, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	return c
}

// reportCPU adds what the whole process spent per operation, both peers included. Unlike the time, it means the same on
// a busy machine.
func reportCPU(b *testing.B, run func()) {
	spent := func() int64 {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return u.Utime.Nano() + u.Stime.Nano()
	}
	before := spent()
	run()
	b.ReportMetric(float64(spent()-before)/float64(b.N), "cpu-ns/op")
}

func benchmarkStream(b *testing.B, dial func(*testing.B) net.Conn) {
	c := dial(b)
	chunk := make([]byte, 256<<10)
	b.SetBytes(int64(len(chunk)))
	reportCPU(b, func() {
		for b.Loop() {
			if _, err := c.Write(chunk); err != nil {
				b.Fatal(err)
			}
		}
	})
	_ = c.Close()
}

func benchmarkEcho(b *testing.B, c net.Conn) {
	msg := make([]byte, 1024)
	reportCPU(b, func() {
		for b.Loop() {
			if _, err := c.Write(msg); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, msg); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// One short exchange per connection, with a dial each and with the pool.

func BenchmarkExchangeDial(b *testing.B) {
	f := start(b, echo, ServerOptions{MaxNonces: 1 << 24})
	benchmarkExchange(b, f.target, NewPool(f.dialer.Dial, PoolOptions{}), (*Conn).Discard)
}

func BenchmarkExchangePooled(b *testing.B) {
	f := start(b, echo, ServerOptions{})
	pool := NewPool(f.dialer.Dial, PoolOptions{})
	b.Cleanup(pool.stop)
	benchmarkExchange(b, f.target, pool, (*Conn).Release)
}

func benchmarkExchange(b *testing.B, target Target, pool *Pool, done func(*Conn)) {
	msg := make([]byte, 64)
	b.ReportAllocs()
	reportCPU(b, func() {
		for b.Loop() {
			c, err := pool.Get(context.Background(), target)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := c.Write(msg); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, msg); err != nil {
				b.Fatal(err)
			}
			done(c)
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "exchanges/s")
}

func BenchmarkPoolGetRelease(b *testing.B) {
	f := start(b, echo, ServerOptions{})
	pool := NewPool(f.dialer.Dial, PoolOptions{})
	b.Cleanup(pool.stop)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			c, err := pool.Get(context.Background(), f.target)
			if err != nil {
				b.Fatal(err)
			}
			c.Release()
		}
	})
}

func BenchmarkPreface(b *testing.B) {
	key := newMACKey(testKey)
	p := samplePreface()
	buf := make([]byte, 0, maxPreface)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parsePreface(appendPreface(buf, &p, &key), &key); err != nil {
			b.Fatal(err)
		}
	}
}
