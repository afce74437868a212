package link

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// ServerOptions are a server's settings. Key or TLS must be given.
type ServerOptions struct {
	// Key is the cluster key. It may be empty only with a TLS that demands client certificates.
	Key []byte

	// TLS, when not nil, is spoken on every connection. Splicing is then impossible and bytes go through user space.
	TLS *tls.Config

	// MaxConns bounds open connections; zero means 32768. Each costs two descriptors and two goroutines.
	MaxConns int

	// MaxConnsPerSandbox keeps one sandbox from taking all of them; zero means 2048.
	MaxConnsPerSandbox int

	// MaxPending bounds connections that have not shown a valid header yet; zero means 1024. One more closes the one that
	// has been silent for the longest: an edge sends its header with the first packet.
	MaxPending int

	// MaxNonces bounds the memory of seen headers; zero means 1<<20, which is 50 MiB at worst and 26000 new connections
	// a second for ever.
	MaxNonces int

	// HeaderTimeout is how long a peer may take for its whole header, TLS handshake included; zero means 5s.
	HeaderTimeout time.Duration

	// OpenTimeout is how long the Backend may take; zero means 5s. Keep it below the dialer's Timeout, or the edge gives
	// up before it hears why.
	OpenTimeout time.Duration

	// WakeTimeout is how long a Waker may take; zero means 65s. A sandbox that is being paused has to be waited for before it can be
	// woken, and that of the largest takes a minute. Keep it below the dialer's WakeTimeout, and above the Waker's own bound.
	WakeTimeout time.Duration

	// MaxWakes bounds the wakes that are waited for; zero means 1024. Each costs a descriptor and a goroutine, and every edge has
	// one for a sandbox; how many sandboxes wake at once is for the Waker to say.
	MaxWakes int

	// HalfOpenTimeout ends a connection that one end has finished when the other has been silent for this long; zero
	// means 5m. A guest that never closes would else hold what edges have long let go.
	HalfOpenTimeout time.Duration

	Log     *zap.Logger  // nil: none
	Metrics *metrics.Set // nil: a private one
}

// Server is the node's half.
type Server struct {
	// Fixed after NewServer.
	backend  Backend
	opts     ServerOptions
	tls      *tls.Config
	key      macKey
	log      *zap.Logger
	warn     *zap.Logger // sampled
	stats    *serverMetrics
	registry *registry
	window   *window
	pending  *pendingPeers
	waker    Waker         // nil: the backend is none
	waking   chan struct{} // a slot per wake that is waited for
}

// NewServer returns a server that opens connections through b.
func NewServer(b Backend, opts ServerOptions) *Server {
	setDefault(&opts.MaxConns, 32768)
	setDefault(&opts.MaxConnsPerSandbox, 2048)
	setDefault(&opts.MaxPending, 1024)
	setDefault(&opts.MaxNonces, 1<<20)
	setDefault(&opts.HeaderTimeout, 5*time.Second)
	setDefault(&opts.OpenTimeout, 5*time.Second)
	setDefault(&opts.WakeTimeout, 65*time.Second)
	setDefault(&opts.MaxWakes, 1024)
	setDefault(&opts.HalfOpenTimeout, 5*time.Minute)
	if opts.Log == nil {
		opts.Log = zap.NewNop()
	}
	log := opts.Log.Named("link")
	s := &Server{
		backend:  b,
		opts:     opts,
		key:      newMACKey(opts.Key),
		log:      log,
		warn:     log.WithOptions(zap.WrapCore(sampled)),
		stats:    newServerMetrics(opts.Metrics),
		registry: newRegistry(opts.MaxConns, opts.MaxConnsPerSandbox),
		window:   newWindow(opts.MaxNonces, time.Now()),
		pending:  &pendingPeers{limit: opts.MaxPending},
		waking:   make(chan struct{}, opts.MaxWakes),
	}
	s.waker, _ = b.(Waker)
	if opts.TLS != nil {
		s.tls = opts.TLS.Clone()
		// A ticket after the handshake would lie unread in the edge's socket, where a pool takes it for an unasked answer.
		s.tls.SessionTicketsDisabled = true
	}
	return s
}

// sampled lets one line of a kind through per 10 s, because peers decide how often something goes wrong here. The counters
// have them all.
func sampled(core zapcore.Core) zapcore.Core {
	return zapcore.NewSamplerWithOptions(core, 10*time.Second, 1, 0)
}

func setDefault[T int | time.Duration](v *T, def T) {
	if *v == 0 {
		*v = def
	}
}

// Serve accepts edges on ln until ctx ends, then closes ln, resets what it accepted and returns nil when all is done.
// No single failure to accept ends it.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	if len(s.opts.Key) == 0 && (s.tls == nil || s.tls.ClientAuth != tls.RequireAndVerifyClientCert) {
		_ = ln.Close()
		return errors.New("link server has neither a cluster key nor TLS with client certificates")
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() }) // Accept says that it is closed
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel() // whatever ends the loop ends its connections
	delay := time.Duration(0)
	for {
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				resetConn(conn)
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accept: %w", err)
		}
		if err != nil {
			// Out of descriptors, a peer that left the queue: it passes, and until then there is no hurry.
			s.stats.acceptErrors.Inc()
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			s.warn.Warn("accept again after a pause", zap.Error(err))
			sleep(ctx, delay)
			continue
		}
		delay = 0
		wg.Go(func() { s.serveConn(ctx, conn) })
	}
}

func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// Reset resets every connection of a lifecycle that has ended, and those that are just being opened. The Backend must
// refuse the lifecycle already.
func (s *Server) Reset(sandbox string, generation uint64) {
	n := s.registry.reset(lifecycle{sandbox, generation})
	s.stats.resets[resetLifecycle].Add(n)
}

// serveConn is the life of one connection.
func (s *Server) serveConn(ctx context.Context, conn net.Conn) {
	stop := context.AfterFunc(ctx, func() { resetConn(conn) })
	defer stop()
	edge, p, err := s.handshake(conn)
	if err == nil {
		err = tune(conn) // not before: a stranger is not worth the system calls
	}
	if err != nil {
		reason := rejectReasonOf(err)
		s.stats.rejects[reason].Inc()
		if ce := s.log.Check(zap.DebugLevel, "peer rejected"); ce != nil {
			ce.Write(zap.Stringer("client", conn.RemoteAddr()), zap.Error(err))
		}
		// No verdict. A peer with the wrong key sees an end of stream, which its dialer does not retry; all others a reset,
		// which leaves no state with us.
		if reason == rejectMAC {
			_ = conn.Close()
			return
		}
		resetConn(conn)
		return
	}
	verdict := s.admit(&p)
	if verdict == 0 {
		s.stats.rejects[rejectReplay].Inc()
		s.warn.Warn("replayed link header", zap.Stringer("client", conn.RemoteAddr()), zap.String("sandbox", p.sandbox))
		resetConn(conn)
		return
	}
	if verdict != Open {
		_ = s.answer(edge, verdict) // an edge that does not hear it has gone
		_ = edge.Close()            // the verdict is said; there is nothing else to lose
		return
	}
	if p.wake {
		_ = s.say(edge, s.wake(ctx, lifecycle{p.sandbox, p.generation})) // as above
		_ = edge.Close()
		return
	}
	guest, entry, verdict := s.open(ctx, lifecycle{p.sandbox, p.generation}, p.port, edge)
	if verdict != Open {
		_ = s.answer(edge, verdict) // as above
		_ = edge.Close()
		return
	}
	defer s.registry.release(entry)
	if err := s.answer(edge, Open); err != nil {
		resetConn(edge)
		resetConn(guest)
		return
	}
	if ce := s.log.Check(zap.DebugLevel, "link open"); ce != nil {
		ce.Write(zap.String("sandbox", p.sandbox), zap.Stringer("client", p.client), zap.Stringer("upstream", guest.RemoteAddr()))
	}
	s.stats.open.Inc()
	defer s.stats.open.Dec()
	newRelay(edge, guest, s.opts.HalfOpenTimeout, s.stats).run()
}

// handshake turns a stranger into an edge with a request. The connection that it returns has no deadline.
func (s *Server) handshake(conn net.Conn) (net.Conn, preface, error) {
	place := s.pending.add(conn)
	defer s.pending.remove(place)
	if err := conn.SetDeadline(time.Now().Add(s.opts.HeaderTimeout)); err != nil {
		return nil, preface{}, err
	}
	edge := conn
	if s.tls != nil {
		secure := tls.Server(conn, s.tls)
		if err := secure.Handshake(); err != nil {
			return nil, preface{}, &tlsError{err}
		}
		edge = secure
	}
	var buf [maxPreface]byte
	raw, err := readPreface(edge, &buf)
	if err != nil {
		if s.pending.evicted(place) {
			return nil, preface{}, errEvicted
		}
		return nil, preface{}, err
	}
	p, err := parsePreface(raw, &s.key)
	if err != nil {
		return nil, preface{}, err
	}
	return edge, p, conn.SetDeadline(time.Time{})
}

// admit judges an authentic header's time and nonce. Zero means that it deserves no answer.
func (s *Server) admit(p *preface) Verdict {
	switch s.window.admit(p, time.Now()) {
	case fresh:
		return Open
	case replayed:
		return 0
	case windowFull:
		return Busy
	default:
		// Answered, because the operator of an edge whose clock is off must get to know, and somebody who has an old header
		// learns nothing from it.
		s.warn.Warn("link header's time stamp is off", zap.Duration("took", time.Since(p.stamp)), zap.String("sandbox", p.sandbox))
		return Refused
	}
}

// answer counts and sends the verdict.
func (s *Server) answer(edge net.Conn, v Verdict) error {
	s.stats.verdicts[v].Inc()
	return s.say(edge, v)
}

// say sends the verdict.
func (s *Server) say(edge net.Conn, v Verdict) error {
	if err := edge.SetWriteDeadline(time.Now().Add(s.opts.HeaderTimeout)); err != nil {
		return err
	}
	if _, err := edge.Write([]byte{byte(v)}); err != nil {
		return err
	}
	return edge.SetWriteDeadline(time.Time{})
}

// open asks the Backend, with a place in the registry taken first. With Open it returns the guest's connection and
// the entry, which the caller releases.
func (s *Server) open(ctx context.Context, life lifecycle, port uint16, edge net.Conn) (net.Conn, *entry, Verdict) {
	ctx, cancel := context.WithTimeout(ctx, s.opts.OpenTimeout)
	defer cancel()
	entry := s.registry.reserve(life, cancel)
	if entry == nil {
		return nil, nil, Busy
	}
	guest, err := s.backend.Open(ctx, life.sandbox, life.generation, port)
	if err != nil {
		s.registry.release(entry)
		verdict := verdictOf(err)
		if verdict == Refused {
			s.warn.Warn("backend did not open", zap.String("sandbox", life.sandbox), zap.Error(err))
		}
		return nil, nil, verdict
	}
	conns := []net.Conn{guest, edge}
	if edge == nil {
		conns = conns[:1]
	}
	if err := tune(guest); err != nil || !s.registry.attach(entry, conns...) {
		s.registry.release(entry)
		resetConn(guest)
		return nil, nil, NotHere // the lifecycle ended, or the guest's end is closed already
	}
	return guest, entry, Open
}

// wake asks the Waker and counts what the edge is told.
func (s *Server) wake(ctx context.Context, life lifecycle) Verdict {
	verdict := s.askWaker(ctx, life)
	s.stats.wakes[verdict].Inc()
	return verdict
}

// askWaker never answers Open. It takes no place in the registry: the reset that comes with a pause is about connections of the
// lifecycle, and must not hit those who want it back.
func (s *Server) askWaker(ctx context.Context, life lifecycle) Verdict {
	if s.waker == nil {
		return NotHere // what runs it would have found; nothing here is paused
	}
	select {
	case s.waking <- struct{}{}:
	default:
		return Busy
	}
	s.stats.waking.Inc()
	defer func() { s.stats.waking.Dec(); <-s.waking }()
	ctx, cancel := context.WithTimeout(ctx, s.opts.WakeTimeout)
	defer cancel()
	err := s.waker.Wake(ctx, life.sandbox, life.generation)
	if err == nil {
		return WrongGeneration
	}
	if ctx.Err() != nil {
		return Busy // it may still come up: the next request finds out
	}
	verdict := verdictOf(err)
	if verdict == Refused {
		s.warn.Warn("backend did not wake", zap.String("sandbox", life.sandbox), zap.Error(err))
	}
	return verdict
}

// verdictOf says what an edge is told about a Backend's error.
func verdictOf(err error) Verdict {
	if v, ok := errors.AsType[*VerdictError](err); ok && v.Verdict.valid() && v.Verdict != Open {
		return v.Verdict
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return PortClosed
	}
	return Refused
}

// Direct returns a DialFunc that calls the Backend in place of the network, with the same limits, the same verdicts and
// the same Reset. Target.Addr is not looked at.
func (s *Server) Direct() DialFunc {
	return func(ctx context.Context, t Target) (net.Conn, error) {
		if t.Wake {
			return nil, &VerdictError{s.wake(ctx, lifecycle{t.Sandbox, t.Generation})}
		}
		guest, entry, verdict := s.open(ctx, lifecycle{t.Sandbox, t.Generation}, t.Port, nil)
		s.stats.verdicts[verdict].Inc()
		if verdict != Open {
			return nil, &VerdictError{verdict}
		}
		s.stats.open.Inc()
		return &trackedConn{Conn: guest, closed: func() {
			s.registry.release(entry)
			s.stats.open.Dec()
		}}, nil
	}
}

// trackedConn is a direct connection: the guest's own, and a place in the registry.
type trackedConn struct {
	net.Conn
	once   sync.Once
	closed func()
}

// NetConn returns the guest's own connection, for whoever splices. It is closed through the trackedConn.
func (c *trackedConn) NetConn() net.Conn { return c.Conn }

func (c *trackedConn) Close() error {
	c.once.Do(c.closed)
	return c.Conn.Close()
}

func (c *trackedConn) CloseWrite() error {
	half, ok := c.Conn.(closeWriter)
	if !ok {
		return errors.ErrUnsupported
	}
	return half.CloseWrite()
}

// errEvicted is what a peer's read error means when pendingPeers closed it.
var errEvicted = errors.New("evicted for a newer peer")

type tlsError struct{ err error }

func (e *tlsError) Error() string { return "tls handshake: " + e.err.Error() }
func (e *tlsError) Unwrap() error { return e.err }

func rejectReasonOf(err error) rejectReason {
	if _, ok := errors.AsType[*tlsError](err); ok {
		return rejectTLS
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return rejectTimeout
	case errors.Is(err, errNotPreface):
		return rejectMalformed
	case errors.Is(err, errMAC):
		return rejectMAC
	case errors.Is(err, errEvicted):
		return rejectEvicted
	default:
		return rejectClosed // io.EOF, a reset, our own end
	}
}

// pendingPeers holds the connections that have not authenticated, oldest first.
type pendingPeers struct {
	limit int

	mu    sync.Mutex
	peers list.List // of *pendingPeer
}

type pendingPeer struct {
	conn net.Conn
	at   *list.Element // nil: out of the list
	out  bool          // closed by add
}

// add takes conn in and, when there are too many, closes the one that has waited longest.
func (p *pendingPeers) add(conn net.Conn) *pendingPeer {
	peer := &pendingPeer{conn: conn}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.peers.Len() >= p.limit {
		oldest := p.peers.Remove(p.peers.Front()).(*pendingPeer)
		oldest.at, oldest.out = nil, true
		resetConn(oldest.conn)
	}
	peer.at = p.peers.PushBack(peer)
	return peer
}

func (p *pendingPeers) remove(peer *pendingPeer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if peer.at != nil {
		p.peers.Remove(peer.at)
		peer.at = nil
	}
}

func (p *pendingPeers) evicted(peer *pendingPeer) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return peer.out
}
