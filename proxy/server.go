package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/link"
)

// server is one listener being served. Everything in it that runs ends with Serve.
type server struct {
	// Fixed after newServer.
	h     *Handler
	watch *watcher
	api   *link.Pool // connections to nodes' API listeners, by address

	// Fixed by Serve before anything runs.
	ctx context.Context // ends after the drain

	jobs     sync.WaitGroup // what runs beside the connections, until ctx ends
	draining atomic.Bool
	conns    sync.WaitGroup
}

func newServer(h *Handler) (*server, error) {
	watch, err := newWatcher()
	if err != nil {
		return nil, err
	}
	s := &server{h: h, watch: watch}
	if h.api != nil {
		s.api = link.NewPool(func(ctx context.Context, t link.Target) (net.Conn, error) { return h.api(ctx, t.Addr) },
			link.PoolOptions{})
	}
	return s, nil
}

// Serve serves a listener, plain or TLS, until ctx ends; then it stops accepting, tells clients to close, waits for the
// requests under way for as long as Limits.Drain says, and resets what is left. It may be called once per listener.
func (h *Handler) Serve(ctx context.Context, ln net.Listener) error {
	h.warnOnce.Do(h.warnOfDescriptors)
	s, err := newServer(h)
	if err != nil {
		return err
	}
	jobs := &s.jobs
	inner, stop := context.WithCancel(context.WithoutCancel(ctx)) // outlives ctx by the drain
	defer jobs.Wait()
	defer stop()
	s.ctx = inner
	watchErr := make(chan error, 1)
	jobs.Go(func() { watchErr <- s.watch.Run(inner) })
	if s.api != nil {
		jobs.Go(func() { _ = s.api.Run(inner) }) // ends with inner and has no error but that
	}

	// fasthttp has no deadline of its own here: clientConn sets those of the head and of idling, the exchange those of bodies,
	// and the kernel that of a client that does not read. Its own would know nothing of how they differ.
	fast := &fasthttp.Server{
		Handler:      func(rc *fasthttp.RequestCtx) { serveRequest(rc) },
		ErrorHandler: func(rc *fasthttp.RequestCtx, err error) { refuseRequest(rc, err) },
		Logger:       fastLogger{h.log},

		// It parses a whole head at once, so its buffer is as long as the longest.
		ReadBufferSize: h.limits.HeadBytes,
		// What it writes is dropped, and is always the same few bytes.
		WriteBufferSize: 256,
		// The listener counts connections and refuses with a reason; this one is never reached.
		Concurrency: h.limits.Conns + 1,
		// It lets go of its buffers and of the request between requests: an idle connection then costs a goroutine, and many
		// of ours are idle. The price, some pool traffic per request, is small beside the proxying.
		ReduceMemoryUsage: true,
		// clientConn reads the request's time where it is logged.
		LazyRequestTime: true,

		// The head passes as it came, so these only keep fasthttp from work and from adding to answers.
		DisableHeaderNamesNormalizing: true,
		DisablePreParseMultipartForm:  true,
		NoDefaultContentType:          true,
		NoDefaultDate:                 true,
		NoDefaultServerHeader:         true,
		SecureErrorLogMessage:         true, // a head holds credentials
	}
	served := make(chan struct{})
	l := &listener{Listener: ln, srv: s, stop: ctx.Done()}
	jobs.Go(func() {
		defer close(served)
		_ = fast.Serve(l) // only a closed listener ends it, and says no more than that
	})
	select {
	case <-ctx.Done():
		_ = l.Close()
		<-served
		s.drain(ctx, fast)
		return nil
	case <-served:
		s.drain(ctx, fast)
		return fmt.Errorf("serve %s: %w", ln.Addr(), net.ErrClosed)
	case err := <-watchErr:
		_ = l.Close()
		<-served
		s.drain(ctx, fast)
		return err
	}
}

// warnOfDescriptors says when the process will run out of descriptors before Limits.Conns is reached: then accepting fails
// for everybody, where the limit would refuse with a reason. A request under way takes one for the client and one for the
// sandbox.
func (h *Handler) warnOfDescriptors() {
	want, have := 2*uint64(max(h.limits.Conns, 0)), descriptorLimit() // #nosec G115 -- not negative
	if have < want {
		h.log.Warn("descriptors will run out before connections do: raise LimitNOFILE, or take fewer connections",
			zap.Uint64("have", have), zap.Uint64("want", want), zap.Int("connections", h.limits.Conns))
	}
}

// drain ends the connections: idle ones at once, the others after their answer, or when there is no more time.
func (s *server) drain(ctx context.Context, fast *fasthttp.Server) {
	s.draining.Store(true)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.h.limits.Drain)
	defer cancel()
	s.watch.each(func(c *clientConn) {
		if c.idle.Load() {
			_ = c.Conn.Close() // its goroutine wakes, and finds that the client is gone
		}
	})
	if err := fast.ShutdownWithContext(ctx); err != nil {
		s.h.log.Warn("connections did not end in time", zap.Error(err))
	}
	s.watch.each((*clientConn).abort)
	s.conns.Wait()
}

// enter counts a connection in, or says why not.
func (s *server) enter(c *clientConn) Reason {
	if reason := s.h.conns.enter(c.addr.Addr(), &s.h.limits); reason != reasonNone {
		return reason
	}
	s.conns.Add(1)
	s.h.stats.conns.Inc()
	return reasonNone
}

func (s *server) leave(c *clientConn) {
	s.h.conns.leave(c.addr.Addr())
	s.h.stats.conns.Dec()
	s.conns.Done()
}

// connCount counts the connections of all listeners: a client that uses two of them is one client.
type connCount struct {
	mu       sync.Mutex // guards the fields below
	total    int
	byClient map[netip.Addr]int
}

func (n *connCount) enter(addr netip.Addr, limits *Limits) Reason {
	key := clientKey(addr)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.total >= limits.Conns {
		return ReasonTotalCap
	}
	if n.byClient[key] >= limits.ConnsPerClient {
		return ReasonClientCap
	}
	n.total++
	n.byClient[key]++
	return reasonNone
}

func (n *connCount) leave(addr netip.Addr) {
	key := clientKey(addr)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.total--
	if n.byClient[key]--; n.byClient[key] == 0 {
		delete(n.byClient, key)
	}
}

// clientKey is what connections are counted by: an IPv4 address, or an IPv6 network as one household or host has it.
func clientKey(addr netip.Addr) netip.Addr {
	if !addr.Is6() {
		return addr
	}
	prefix, err := addr.Prefix(64)
	if err != nil {
		return addr
	}
	return prefix.Addr()
}

// listener gives fasthttp connections that are counted and wrapped.
type listener struct {
	net.Listener
	srv  *server
	stop <-chan struct{}
	once sync.Once
}

// Close may be called again: fasthttp does, at its shutdown.
func (l *listener) Close() (err error) {
	l.once.Do(func() { err = l.Listener.Close() })
	return err
}

// Accept waits for a connection that may enter. An error that passes, such as a lack of descriptors, does not end the
// listener: it waits a little and tries again.
func (l *listener) Accept() (net.Conn, error) {
	pause := time.Duration(0)
	for {
		nc, err := l.Listener.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil, err
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			l.srv.h.log.Warn("accept failed, trying again", zap.Error(err), zap.Duration("took", pause))
			select {
			case <-l.stop:
				return nil, net.ErrClosed
			case <-time.After(pause):
				continue
			}
		}
		pause = 0
		c := newClientConn(l.srv, nc)
		if reason := l.srv.enter(c); reason != reasonNone {
			l.refuse(c, reason)
			continue
		}
		if c.raw != nil {
			limitSocket(c, int(l.srv.h.limits.Unread.Milliseconds()))
		}
		l.srv.watch.add(c)
		return c, nil
	}
}

// refuse turns a connection away without waiting for it: nobody may hold up the listener. A TLS client, which would have
// to be waited for, is just closed.
func (l *listener) refuse(c *clientConn, reason Reason) {
	l.srv.h.stats.refused(reason)
	if !c.tls {
		_ = c.Conn.SetWriteDeadline(time.Now().Add(time.Millisecond)) // an empty send buffer takes it at once
		_ = c.send(appendRefusal(nil, &fault{reason: reason}, &subject{close: true}))
	}
	c.cancel()
	_ = c.Conn.Close()
}

// serveRequest is fasthttp's handler.
func serveRequest(rc *fasthttp.RequestCtx) {
	c := rc.Conn().(*clientConn)
	if !c.serve() {
		rc.SetConnectionClose()
	}
}

// refuseRequest is called when fasthttp refuses a head that we found good.
func refuseRequest(rc *fasthttp.RequestCtx, err error) {
	if c, ok := rc.Conn().(*clientConn); ok && c.requests > 0 {
		c.refuseHead(malformed(err.Error()))
	}
}

// fastLogger takes what fasthttp would write to standard error.
type fastLogger struct{ log *zap.Logger }

func (l fastLogger) Printf(format string, args ...any) {
	if ce := l.log.Check(zap.DebugLevel, "fasthttp"); ce != nil {
		ce.Write(zap.Error(fmt.Errorf(format, args...)))
	}
}
