package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluice-edge/sluice/link"
)

const (
	// maxAnswerHead bounds an answer's head, as a request's is.
	maxAnswerHead = 64 << 10

	// maxInterim bounds the 1xx answers before the real one, so that a sandbox cannot keep us reading them for ever.
	maxInterim = 32

	// lastPartPatience is how long the last piece of a request's body may take to be written once the answer is complete. It
	// is nearly always written already; the goroutine that wrote it has yet to say so.
	lastPartPatience = 250 * time.Millisecond

	// spliceFrom is how much of a body must be left for the kernel to move it: a pipe has its price.
	spliceFrom = 64 << 10
)

// exchange is one request and its answer over one connection to a sandbox. It lives for a request; idle connections have none.
type exchange struct {
	c      *clientConn
	began  time.Time
	pool   Upstream
	target link.Target
	port   uint16
	api    bool
	rw     rewrite

	up     *link.Conn // held until release or abandon
	in     []byte     // what the sandbox sent and nobody has taken: in[r:w]
	r, w   int
	out    []byte // heads on their way
	mask   []byte // the masked Host
	answer answerHead

	answerChunks chunkScanner

	// The request's body. Its goroutine owns chunks and extra while it runs.
	chunks    chunkScanner
	buffered  int    // bytes of it that had arrived with the head
	rest      int64  // with framingLength: bytes that had not
	whole     bool   // all of it had
	bodyOver  func() // gives its place among the bodies back; nil: it has none, or its goroutine does
	continued bool   // it has been asked for with a 100
	sending   bool   // the goroutine runs or has not been waited for
	sent      chan error
	lastPart  atomic.Bool // its end has been read; what remains is to write it
	stop      atomic.Bool // nobody wants the rest
	extra     []byte      // what the client sent after it
	page      *copyPage   // that extra lies in

	absent uint64 // the generation that the node says it does not have, while the store says that it runs

	// The outcome.
	wrote   bool // a byte of the request is out
	started bool // a byte of the answer is out
	keep    bool // the client's connection can take another request
	status  int
	reason  Reason
	err     error
}

type copyPage [32 << 10]byte

var (
	exchanges = sync.Pool{New: func() any { return &exchange{in: make([]byte, 16<<10), sent: make(chan error, 1)} }}
	copyPages = sync.Pool{New: func() any { return new(copyPage) }}
)

func acquireExchange(c *clientConn) *exchange {
	x := exchanges.Get().(*exchange)
	x.c, x.began = c, time.Now()
	return x
}

// releaseExchange keeps the buffers, unless a large head or a long mask has made them large.
func releaseExchange(x *exchange) {
	if x.page != nil {
		copyPages.Put(x.page)
	}
	in, out, mask, lines := x.in, x.out[:0], x.mask[:0], x.answer.lines[:0]
	if len(in) > 16<<10 {
		in, lines = make([]byte, 16<<10), nil
	}
	if cap(out) > 64<<10 {
		out = nil
	}
	*x = exchange{in: in, out: out, mask: mask, sent: x.sent}
	x.answer.lines = lines
	exchanges.Put(x)
}

// run sends the request and passes the answer on. A connection that was kept from an earlier request may have been closed
// by the sandbox just now; then the request goes out once more, on a fresh one, if nothing can have come of the first try.
func (x *exchange) run() error {
	if err := x.readBody(); err != nil {
		return err
	}
	if !x.whole && !x.api {
		of := life{x.target.Sandbox, x.target.Generation}
		bodies := &x.c.srv.h.bodies
		if !bodies.acquire(of) {
			return &fault{reason: ReasonBodyCap}
		}
		x.bodyOver = func() { bodies.release(of) }
		defer func() {
			if x.bodyOver != nil {
				x.bodyOver() // it never began
			}
		}()
	}
	x.out = x.c.head.appendRequest(x.out[:0], &x.rw)
	x.out = append(x.out, x.c.buf[x.c.r:x.c.r+x.buffered]...)
	up, err := x.pool.Get(x.c.ctx, x.target)
	if err != nil {
		return &openError{err}
	}
	verdict, err := x.try(up)
	if verdict == tryRepeat {
		x.c.srv.h.stats.retries.Inc()
		x.abandon()
		if up, err = x.pool.GetFresh(x.c.ctx, x.target); err != nil {
			return &openError{err}
		}
		_, err = x.try(up)
	}
	return err
}

// tryVerdict is what one try came to.
type tryVerdict uint8

const (
	tryDone   tryVerdict = iota
	tryRepeat            // the connection was stale and the request may be repeated
)

// try is one try to have the request answered by up, which it owns.
func (x *exchange) try(up *link.Conn) (tryVerdict, error) {
	x.up = up
	if !x.c.serveWith(up) {
		return tryDone, &fault{reason: ReasonClientGone}
	}
	if x.c.head.expectContinue && x.buffered == 0 && !x.continued {
		x.continued = true
		// Only now, when the request has been allowed and somebody is there to take it: a refused client keeps its body.
		if err := x.c.send([]byte("HTTP/1.1 100 Continue\r\n\r\n")); err != nil {
			return tryDone, &fault{reason: ReasonClientGone, err: err}
		}
	}
	n, err := up.Write(x.out)
	x.wrote = x.wrote || n > 0
	if err != nil {
		if up.Reused() && n == 0 {
			return tryRepeat, err
		}
		// A server may answer and close before it has read everything, as with 413: what it said is read below.
		if n == 0 {
			return tryDone, &fault{reason: ReasonUpstreamClosed, err: err}
		}
	}
	x.c.r += x.buffered // from here on a repetition would lack it
	repeatable := x.c.head.framing == framingNone && x.c.head.idempotent()
	if !x.whole {
		x.sending = true
		over := x.bodyOver
		x.bodyOver = nil
		go x.sendBody(over)
	}
	if err := x.readAnswer(); err != nil {
		if up.Reused() && repeatable && x.w == 0 && !isFault(err) && !x.c.isGone() {
			return tryRepeat, err
		}
		return tryDone, x.bodyFault(err)
	}
	return tryDone, x.pass()
}

func isFault(err error) bool {
	_, ok := errors.AsType[*fault](err)
	return ok
}

// readBody finds out how much of the request's body has arrived. The rest of a short one is waited for: it is nearly always
// on its way, and a request that leaves in one piece needs no goroutine and can be repeated.
func (x *exchange) readBody() error {
	c, h := x.c, &x.c.head
	x.buffered, x.rest, x.whole = 0, 0, true
	switch h.framing {
	case framingLength:
		if h.length <= int64(len(c.buf)-c.r) && !h.expectContinue {
			for int64(c.w-c.r) < h.length {
				if err := x.readMore(); err != nil {
					return err
				}
			}
		}
		x.buffered = int(min(h.length, int64(c.w-c.r)))
		x.rest = h.length - int64(x.buffered)
		x.whole = x.rest == 0
	case framingChunked:
		x.chunks.reset()
		n, err := x.chunks.scan(c.buf[c.r:c.w])
		if err != nil {
			return bodyError(err)
		}
		x.buffered = n
		x.whole = x.chunks.done()
	}
	return nil
}

// readMore reads more of the body into the connection's buffer.
func (x *exchange) readMore() error {
	if err := x.c.Conn.SetReadDeadline(time.Now().Add(x.c.srv.h.limits.Body)); err != nil {
		return bodyError(err)
	}
	if err := x.c.fill(); err != nil {
		return bodyError(err)
	}
	return nil
}

// bodyError says what a failure to read the request's body means.
func bodyError(err error) error {
	if bad, ok := errors.AsType[malformed](err); ok {
		return &fault{reason: ReasonMalformed, text: "Malformed request body: " + string(bad), err: err}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &fault{reason: ReasonBodyTimeout, err: err}
	}
	return &fault{reason: ReasonClientGone, err: err}
}

// errUpstreamWrite marks a failure on the sandbox's side of a body.
type errUpstreamWrite struct{ error }

func (e errUpstreamWrite) Unwrap() error { return e.error }

// sendBody is the goroutine that moves the rest of a request's body while the answer is being read: a sandbox may answer
// before it has read everything. What goes wrong on the client's side ends the exchange; on the sandbox's side the
// answer decides.
func (x *exchange) sendBody(over func()) {
	var err error
	defer func() {
		if over != nil {
			over()
		}
		if p := recover(); p != nil {
			err = &fault{reason: ReasonPanic, err: errors.New("BUG: panic while sending a body")}
		}
		if _, ok := errors.AsType[errUpstreamWrite](err); err != nil && !ok {
			x.c.interrupt()
		}
		x.sent <- err
	}()
	x.page = copyPages.Get().(*copyPage)
	if x.c.head.framing == framingChunked {
		err = x.sendChunks()
	} else {
		err = x.sendLength()
	}
}

// errStopped ends a body that nobody wants any more.
var errStopped = errors.New("body is not wanted")

// awaitBody gives the client its time for the next piece.
func (x *exchange) awaitBody() error {
	if err := x.c.Conn.SetReadDeadline(time.Now().Add(x.c.srv.h.limits.Body)); err != nil {
		return bodyError(err)
	}
	if x.stop.Load() {
		return errUpstreamWrite{errStopped}
	}
	return nil
}

func (x *exchange) sendLength() error {
	dst, spliced := x.up.NetConn().(*net.TCPConn)
	spliced = spliced && x.c.tcp != nil
	for x.rest > 0 {
		if err := x.awaitBody(); err != nil {
			return err
		}
		if spliced && x.rest >= spliceFrom {
			n, err := io.CopyN(dst, x.c.tcp, x.rest-1) // the last byte goes by itself: see lastPart
			x.rest -= n
			if err != nil && (n == 0 || !errors.Is(err, os.ErrDeadlineExceeded)) {
				return spliceError(err)
			}
			continue
		}
		n, err := x.c.Conn.Read(x.page[:min(x.rest, int64(len(x.page)))])
		x.rest -= int64(n)
		if x.rest == 0 {
			x.lastPart.Store(true)
		}
		if _, werr := x.up.Write(x.page[:n]); werr != nil {
			return errUpstreamWrite{werr}
		}
		if err != nil && x.rest > 0 {
			return bodyError(err)
		}
	}
	return nil
}

// spliceError tells the sides of a spliced copy apart. The reads are the client's.
func spliceError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		return bodyError(err)
	}
	return errUpstreamWrite{err}
}

func (x *exchange) sendChunks() error {
	for {
		if err := x.awaitBody(); err != nil {
			return err
		}
		n, err := x.c.Conn.Read(x.page[:])
		used, bad := x.chunks.scan(x.page[:n])
		if bad != nil {
			return bodyError(bad)
		}
		if x.chunks.done() {
			x.lastPart.Store(true)
			x.extra = x.page[used:n]
		}
		if _, werr := x.up.Write(x.page[:used]); werr != nil {
			return errUpstreamWrite{werr}
		}
		if x.chunks.done() {
			return nil
		}
		if err != nil {
			return bodyError(err)
		}
	}
}

// finishBody waits for the body's goroutine and reports whether the whole body went out. A body whose end has been read is
// given patience to be written, negative for as long as it takes; any other is given up now.
func (x *exchange) finishBody(patience time.Duration) (complete bool, err error) {
	if !x.sending {
		return x.whole, nil
	}
	x.sending = false
	if x.lastPart.Load() && patience != 0 {
		var late <-chan time.Time
		if patience > 0 {
			timer := time.NewTimer(patience)
			defer timer.Stop()
			late = timer.C
		}
		select {
		case err := <-x.sent:
			return err == nil, err
		case <-late: // the sandbox answered and reads no more
		}
	}
	select {
	case err := <-x.sent:
		return err == nil, err
	default:
	}
	x.stop.Store(true) // before the deadline: the goroutine sets one and then looks here
	_ = x.c.Conn.SetReadDeadline(longAgo)
	x.c.interrupt()
	return false, <-x.sent
}

// bodyFault is the reason for the end of an exchange without an answer: when the client's body was at fault, that.
func (x *exchange) bodyFault(err error) error {
	if _, bodyErr := x.finishBody(0); isFault(bodyErr) && !errors.Is(bodyErr, os.ErrDeadlineExceeded) {
		return bodyErr
	} else if f, ok := errors.AsType[*fault](bodyErr); ok && f.reason == ReasonBodyTimeout && errors.Is(err, os.ErrDeadlineExceeded) {
		return bodyErr // its own deadline ended the exchange, not ours
	}
	return err
}

// readAnswer reads the head of the final answer.
func (x *exchange) readAnswer() error {
	noBody := string(x.c.head.method) == "HEAD"
	for range maxInterim {
		end, err := x.readAnswerHead()
		if err != nil {
			return err
		}
		if err := x.answer.parse(x.in[x.r:end], noBody); err != nil {
			return &fault{reason: ReasonUpstreamMalformed, err: err}
		}
		if x.c.head.http10 && x.answer.framing == framingChunked {
			return &fault{reason: ReasonUpstreamMalformed, err: errors.New("chunked answer to HTTP/1.0")}
		}
		x.r = end
		switch {
		case x.answer.status == 101:
			if x.rw.protocol == nil {
				return &fault{reason: ReasonUpstreamMalformed, err: errors.New("unasked 101")}
			}
			if x.answer.twice[fieldUpgrade] || !sameFold(x.answer.get(fieldUpgrade), x.rw.protocol) {
				return &fault{reason: ReasonUpstreamMalformed, err: errors.New("101 to a protocol that was not offered")}
			}
			return nil
		case x.answer.status >= 200:
			return nil
		}
		// 100 has been said by us where it was asked for. 103 and the like are swallowed, as fasthttp's client does: they
		// are hints, and what is in front of us may not know them.
	}
	return &fault{reason: ReasonUpstreamMalformed, err: errors.New("too many interim answers")}
}

// readAnswerHead returns where the next head ends in x.in.
func (x *exchange) readAnswerHead() (end int, err error) {
	for from := x.r; ; {
		end, next, err := headEnd(x.in[:x.w], from)
		if err != nil {
			return 0, &fault{reason: ReasonUpstreamMalformed, err: err}
		}
		if end > 0 {
			return end, nil
		}
		from = next
		if x.w == len(x.in) {
			if x.w-x.r >= maxAnswerHead {
				return 0, &fault{reason: ReasonUpstreamMalformed, err: errors.New("answer head is too large")}
			}
			larger := x.in
			if x.w-x.r > len(x.in)/2 {
				larger = make([]byte, 2*len(x.in))
			}
			x.w = copy(larger, x.in[x.r:x.w])
			from -= x.r
			x.in, x.r = larger, 0
		}
		n, err := x.up.Read(x.in[x.w:])
		x.w += n
		if n == 0 && err != nil {
			if x.w > x.r && errors.Is(err, io.EOF) {
				return 0, &fault{reason: ReasonUpstreamClosed, err: io.ErrUnexpectedEOF}
			}
			return 0, err
		}
	}
}

// pass sends the answer to the client: its head with what must change, then its body as it is. The part of the body that came
// with the head leaves with it.
func (x *exchange) pass() error {
	if x.answer.status == 101 {
		return x.upgrade()
	}
	c, a := x.c, &x.answer
	first, left, err := x.bodyInHand()
	if err != nil {
		return &fault{reason: ReasonUpstreamMalformed, err: err}
	}
	x.keep = c.head.persistent() && a.framing != framingClose && !c.srv.draining.Load()
	x.status = a.status
	aw := x.answerRewrite()
	var out []byte
	if a.untouched(&aw) {
		out = x.in[x.r-len(a.raw) : x.r+first]
	} else {
		x.out = append(a.appendAnswer(x.out[:0], &aw), x.in[x.r:x.r+first]...)
		out = x.out
	}
	x.r += first
	x.started = true
	if err := c.send(out); err != nil {
		return &fault{reason: ReasonClientGone, err: err}
	}
	c.srv.h.stats.answered(a.status)
	if err := x.passBody(left); err != nil {
		return err
	}
	return x.finish()
}

func (x *exchange) answerRewrite() answerRewrite {
	h := &x.c.head
	aw := answerRewrite{host: h.get(fieldHost), tls: x.c.tls, close: !x.keep, keep: x.keep && h.http10}
	if x.rw.mask != "" {
		x.mask = appendMask(x.mask[:0], x.rw.mask, x.rw.port)
		aw.mask = x.mask
	}
	return aw
}

// bodyInHand tells how many bytes of the body came with the head, and with framingLength how many are left.
func (x *exchange) bodyInHand() (first int, left int64, err error) {
	have := x.w - x.r
	switch x.answer.framing {
	case framingLength:
		first = int(min(x.answer.length, int64(have)))
		return first, x.answer.length - int64(first), nil
	case framingChunked:
		x.answerChunks.reset()
		first, err = x.answerChunks.scan(x.in[x.r:x.w])
		return first, 0, err
	case framingClose:
		return have, 0, nil
	}
	return 0, 0, nil
}

// passBody moves the rest of the answer's body. Each piece leaves as soon as it is here: an event stream must not wait.
func (x *exchange) passBody(left int64) error {
	a := &x.answer
	src, spliced := x.up.NetConn().(*net.TCPConn)
	spliced = spliced && x.c.tcp != nil
	if spliced && a.framing == framingLength && left >= spliceFrom {
		n, err := io.CopyN(x.c.tcp, src, left)
		if err != nil {
			return &fault{reason: ReasonAnswerCut, err: err}
		}
		left -= n
	}
	chunks := &x.answerChunks
	for {
		switch a.framing {
		case framingNone:
			return nil
		case framingLength:
			if left == 0 {
				return nil
			}
		case framingChunked:
			if chunks.done() {
				return nil
			}
		}
		n, err := x.up.Read(x.in)
		x.r, x.w = n, n
		part := x.in[:n]
		switch a.framing {
		case framingLength:
			if int64(n) > left {
				part = part[:left]
				x.r = int(left)
			}
			left -= int64(len(part))
		case framingChunked:
			used, bad := chunks.scan(part)
			if bad != nil {
				return &fault{reason: ReasonAnswerCut, err: bad}
			}
			part, x.r = part[:used], used
		}
		if len(part) > 0 {
			if err := x.c.send(part); err != nil {
				return &fault{reason: ReasonClientGone, err: err}
			}
		}
		if err == nil {
			continue
		}
		complete := a.framing == framingLength && left == 0 || a.framing == framingChunked && chunks.done() ||
			a.framing == framingClose && errors.Is(err, io.EOF)
		if complete {
			return nil
		}
		return &fault{reason: ReasonAnswerCut, err: err}
	}
}

// finish ends an exchange whose answer went out whole: both connections are kept if both sides are where they should be.
func (x *exchange) finish() error {
	complete, _ := x.finishBody(lastPartPatience) // the answer is out; what became of the body decides about the connections only
	clean := x.r == x.w && complete && x.answer.persistent() && !x.c.head.http10
	hadBody := x.c.head.framing == framingChunked || x.c.head.length > 0
	if !complete && !x.lastPart.Load() { // what is left of the body cannot be told from the next request
		x.keep = false
		x.c.linger()
	}
	if !x.c.serveWith(nil) {
		clean = false
		x.keep = false
	}
	up := x.up
	x.up = nil
	switch {
	case !clean:
		up.Discard()
	case hadBody && !x.readsBodies():
		_ = up.Close() // not by a reset: what it has not read of the body it may still want
	default:
		up.Release()
	}
	return nil
}

// readsBodies tells whether the server, once it has answered, is sure to be past the request's body. That all of a body was
// written says nothing of it: many a server leaves one unread, most of them that of a GET, and then takes what is left for
// the next request's head. That request would be another visitor's. So a connection that carried a body to a sandbox's own
// server is used once. The agent and the API are net/http servers, which read a body to its end or close.
func (x *exchange) readsBodies() bool { return x.api || x.rw.envd }

// abandon ends a connection that is still held: after an error, a panic, or before a repetition.
func (x *exchange) abandon() {
	_, _ = x.finishBody(0)
	if x.up == nil {
		return
	}
	x.c.serveWith(nil)
	x.up.Discard()
	x.up, x.r, x.w = nil, 0, 0
}

// skipBody passes over a request's body that nobody read, and reports whether the next request can follow: only if the whole
// of it is here already.
func (x *exchange) skipBody() bool {
	c := x.c
	if x.up != nil && c.head.framing != framingNone {
		return false
	}
	switch c.head.framing {
	case framingLength:
		if int64(c.w-c.r) < c.head.length {
			return false
		}
		c.r += int(c.head.length)
	case framingChunked:
		x.chunks.reset()
		n, err := x.chunks.scan(c.buf[c.r:c.w])
		if err != nil || !x.chunks.done() {
			return false
		}
		c.r += n
	}
	return true
}
