package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/link"
)

// clientConn stands between a client's connection and fasthttp. fasthttp owns the loop: workers, keep-alive, shutdown. It reads
// through Read, which gives it one head at a time, after the head has arrived whole and has been checked strictly, and
// never a byte of a body; so nothing that fasthttp would read leniently gets that far, and pipelined requests cannot
// mix. What fasthttp writes goes nowhere: the answer's bytes are the sandbox's, and they are written by the exchange
// straight to the client. Bodies are therefore never decoded and encoded again, in either direction.
type clientConn struct {
	net.Conn // the socket, or TLS over it

	// Fixed after newClientConn.
	srv     *server
	raw     syscall.RawConn // of the socket; nil: it cannot be watched
	tcp     *net.TCPConn    // the connection itself, when it is bare: its bytes may be spliced
	addr    netip.AddrPort
	tls     bool
	read    func(fd uintptr) bool // c.tryRead, made once
	ctx     context.Context       // ends with the connection, and when the client goes away
	cancel  context.CancelFunc
	watchID uint64
	closed  sync.Once

	// Owned by the connection's goroutine.
	page     *bufPage // what buf lies in; nil while idle
	buf      []byte   // the connection's unread bytes are buf[r:w]
	r, w     int
	requests int    // heads read so far
	feed     []byte // what fasthttp has yet to read of the head
	fed      []byte // the head as fasthttp sees it, when that differs
	readN    int    // results of tryRead
	readErr  error
	head     requestHead

	idle atomic.Bool // waits for a request of which nothing has arrived

	mu     sync.Mutex // guards the fields below
	gone   bool       // the client has ended its direction, and so is taken to have gone
	tunnel bool       // an upgrade: from here on an end of stream is only that
	up     *link.Conn // what serves this client now
}

// bufPage is a read buffer. A request's head nearly always fits; a larger one gets a buffer of its own.
type bufPage [4096]byte

var bufPages = sync.Pool{New: func() any { return new(bufPage) }}

// longAgo is a deadline that ends every read and write at once.
var longAgo = time.Unix(1, 0)

func newClientConn(srv *server, nc net.Conn) *clientConn {
	c := &clientConn{Conn: nc, srv: srv}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	_, c.tls = nc.(interface{ ConnectionState() tls.ConnectionState })
	c.tcp, _ = nc.(*net.TCPConn)
	socket := nc
	for {
		outer, ok := socket.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		socket = outer.NetConn()
	}
	if tcp, ok := socket.(*net.TCPConn); ok && canWatch {
		if raw, err := tcp.SyscallConn(); err == nil {
			c.raw = raw
		}
	}
	if addr, ok := nc.RemoteAddr().(*net.TCPAddr); ok {
		ap := addr.AddrPort()
		c.addr = netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
	}
	c.read = c.tryRead
	return c
}

// Write is fasthttp's, and drops what it is given: see clientConn.
func (c *clientConn) Write(p []byte) (int, error) { return len(p), nil }

// send writes to the client.
func (c *clientConn) send(p []byte) error {
	_, err := c.Conn.Write(p)
	return err
}

// Read is fasthttp's and gives it the next head. It waits for one only when the last request is over, body and answer.
func (c *clientConn) Read(p []byte) (int, error) {
	if len(c.feed) == 0 {
		if err := c.nextHead(); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.feed)
	c.feed = c.feed[n:]
	return n, nil
}

// Close ends the connection; fasthttp calls it when its loop ends.
func (c *clientConn) Close() error {
	err := net.ErrClosed
	c.closed.Do(func() {
		c.cancel()
		c.srv.watch.remove(c)
		c.srv.leave(c)
		err = c.Conn.Close()
	})
	return err
}

// nextHead reads and checks a request head and makes it what fasthttp reads next. What it refuses it answers itself; the
// error is then the end of the connection for fasthttp.
func (c *clientConn) nextHead() error {
	end, err := c.readHead()
	if err != nil {
		c.refuseHead(err)
		return io.EOF
	}
	c.requests++
	head := c.buf[c.r:end]
	c.r = end
	if err := c.head.parse(head); err != nil {
		c.refuseHead(err)
		return io.EOF
	}
	c.feed = head
	if h := &c.head; h.framing != framingNone || h.has(fieldContentLength) || h.has(fieldExpect) {
		c.feed = c.withoutBody()
	}
	return nil
}

// withoutBody is a head without what would make fasthttp wait for a body.
func (c *clientConn) withoutBody() []byte {
	h := &c.head
	c.fed = append(c.fed[:0], h.line...)
	for i := range h.lines {
		switch h.lines[i].field {
		case fieldContentLength, fieldTransferEncoding, fieldExpect:
		default:
			c.fed = append(c.fed, h.lines[i].raw...)
		}
	}
	c.fed = append(c.fed, '\r', '\n')
	return c.fed
}

// awaitHead waits until the first byte of a head is there. RFC 9112, 2.2: one empty line before it, which an old client sent
// after a body, is passed over, and is not the beginning of a request that we would then miss.
func (c *clientConn) awaitHead() error {
	for skipped := false; ; {
		switch {
		case c.r == c.w:
			if err := c.idleRead(); err != nil {
				return errIdle{err}
			}
		case skipped || c.buf[c.r] != '\r':
			return nil
		case c.w-c.r == 1:
			c.makeRoom(len(bufPage{}))
			if err := c.Conn.SetReadDeadline(time.Now().Add(c.srv.h.limits.Head)); err != nil {
				return errIdle{err}
			}
			if err := c.fill(); err != nil {
				return errIdle{err}
			}
		case c.buf[c.r+1] != '\n':
			return nil
		default:
			c.r += 2
			skipped = true
		}
	}
}

// idleRead waits for anything to arrive, without a buffer.
func (c *clientConn) idleRead() error {
	limits := &c.srv.h.limits
	c.releaseBuf()
	wait := limits.Idle
	if c.requests == 0 {
		wait = limits.Head // the handshake of TLS is part of it
	}
	c.idle.Store(true)
	defer c.idle.Store(false)
	if c.srv.draining.Load() {
		return io.EOF
	}
	if err := c.Conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	return c.fill()
}

// readHead returns where the next head ends in buf.
func (c *clientConn) readHead() (end int, err error) {
	limits := &c.srv.h.limits
	if err := c.awaitHead(); err != nil {
		return 0, err
	}
	from, started := c.r, false
	for {
		end, next, err := headEnd(c.buf[:c.w], from)
		if err != nil || end > 0 {
			return end, err
		}
		from = next
		if c.w-c.r >= limits.HeadBytes {
			return 0, errHeadTooLarge
		}
		if !started { // one deadline for the whole head, however it drips
			started = true
			if err := c.Conn.SetReadDeadline(time.Now().Add(limits.Head)); err != nil {
				return 0, err
			}
		}
		moved := c.makeRoom(limits.HeadBytes)
		from -= moved
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
}

// errIdle is an end that needs no answer: nothing of a request had arrived.
type errIdle struct{ error }

var errHeadTooLarge = errors.New("request head is too large")

// makeRoom moves the unread bytes to the front, or to a larger buffer, and returns how far they moved.
func (c *clientConn) makeRoom(most int) (moved int) {
	if c.w < len(c.buf) {
		return 0
	}
	if moved = c.r; moved > 0 {
		c.w = copy(c.buf, c.buf[c.r:c.w])
		c.r = 0
		return moved
	}
	larger := make([]byte, min(4*len(c.buf), most))
	c.w = copy(larger, c.buf[:c.w])
	c.releasePage()
	c.buf = larger
	return 0
}

// fill reads once, behind what is there. While nothing is there a socket's connection waits without a buffer.
func (c *clientConn) fill() error {
	if c.buf == nil && c.raw != nil && c.tcp != nil {
		if err := c.raw.Read(c.read); err != nil {
			return err
		}
		if c.readErr != nil {
			return c.readErr
		}
		if c.readN == 0 {
			return io.EOF
		}
		c.w = c.readN
		return nil
	}
	c.acquireBuf()
	n, err := c.Conn.Read(c.buf[c.w:])
	c.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

func (c *clientConn) acquireBuf() {
	if c.buf == nil {
		c.page = bufPages.Get().(*bufPage)
		c.buf = c.page[:]
	}
}

// releaseBuf gives the buffer back; what was unread in it is gone.
func (c *clientConn) releaseBuf() {
	if c.page == nil {
		c.head = requestHead{} // its lines lie in a buffer that was made for them
	}
	c.releasePage()
	c.buf, c.r, c.w = nil, 0, 0
	c.feed = nil
	if cap(c.fed) > 1<<10 {
		c.fed = nil // an idle connection keeps no large buffer
	}
}

func (c *clientConn) releasePage() {
	if c.page != nil {
		bufPages.Put(c.page)
		c.page = nil
	}
}

// unread puts back what was read past the end of a body.
func (c *clientConn) unread(p []byte) {
	if len(p) > len(c.buf) {
		c.releasePage()
		c.buf = make([]byte, len(p))
	}
	c.r, c.w = 0, copy(c.buf, p)
}

// refuseHead answers a head that cannot be served.
func (c *clientConn) refuseHead(err error) {
	f := &fault{err: err}
	var bad malformed
	switch {
	case errors.As(err, &errIdle{}):
		return // the client closed, or waited for too long, or we are shutting down
	case errors.Is(err, errExpectation):
		f.reason = ReasonExpectation
	case errors.As(err, &bad):
		f.reason, f.text = ReasonMalformed, "Malformed request: "+string(bad)
	case errors.Is(err, errHeadTooLarge):
		f.reason = ReasonHeadTooLarge
	case errors.Is(err, os.ErrDeadlineExceeded):
		f.reason = ReasonHeadTimeout
	default:
		return // it ended in the middle of a head: nobody is there
	}
	c.srv.h.stats.refused(f.reason)
	if ce := c.srv.h.log.Check(zap.DebugLevel, "request refused"); ce != nil {
		ce.Write(zap.Stringer("client", c.addr), zap.Stringer("code", f.reason), zap.Error(err))
	}
	_ = c.send(appendRefusal(nil, f, &subject{close: true}))
	c.linger()
}

// linger ends the connection such that the client can read the answer: closing while its bytes are still arriving would
// reset it, and a reset destroys what it has not read yet.
func (c *clientConn) linger() {
	half, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	limits := &c.srv.h.limits
	if err := c.Conn.SetReadDeadline(time.Now().Add(limits.Linger)); err != nil {
		return
	}
	page := bufPages.Get().(*bufPage)
	defer bufPages.Put(page)
	for left := limits.LingerBytes; left > 0; {
		n, err := c.Conn.Read(page[:])
		if err != nil {
			return
		}
		left -= n
	}
}

// reset ends the connection such that the client knows that what it has is not all: the only honest error after the first
// byte of an answer.
func (c *clientConn) reset() {
	if c.tcp != nil {
		_ = c.tcp.SetLinger(0)
	} else if outer, ok := c.Conn.(interface{ NetConn() net.Conn }); ok {
		// Without the good-bye of TLS, the client knows that the stream was cut.
		if tcp, ok := outer.NetConn().(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = outer.NetConn().Close()
	}
	_ = c.Close()
}

// abort ends the connection and what is being done for it, at the end of a drain.
func (c *clientConn) abort() {
	c.mu.Lock()
	c.gone = true
	if c.up != nil {
		c.interruptLocked()
	}
	c.mu.Unlock()
	c.cancel()
	_ = c.Conn.Close()
}

// clientGone is called by the watcher: the client's end of stream has arrived. As for nginx and net/http, that is a client
// that does not wait for its answer any more.
func (c *clientConn) clientGone() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tunnel || c.gone {
		return
	}
	c.gone = true
	c.cancel()
	if c.up != nil {
		c.interruptLocked()
	}
}

// serveWith says that up serves the client from now on; nil, that nothing does. It reports false when the client has gone.
func (c *clientConn) serveWith(up *link.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.up = up
	return !c.gone
}

// startTunnel says that the client's end of stream is no longer its end. It reports false when it has come already.
func (c *clientConn) startTunnel() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tunnel = true
	return !c.gone
}

func (c *clientConn) isGone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

// interrupt ends what is being read from or written to the sandbox.
func (c *clientConn) interrupt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.up != nil {
		c.interruptLocked()
	}
}

// interruptLocked uses the connection under the link's, whose own deadlines belong to the goroutine that reads it.
func (c *clientConn) interruptLocked() { _ = c.up.NetConn().SetDeadline(longAgo) }
