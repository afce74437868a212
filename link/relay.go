package link

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// relay moves bytes both ways between an edge and a guest until both directions have ended. An end of stream on one side
// becomes one on the other and leaves the opposite direction alone; a reset becomes a reset.
type relay struct {
	edge, guest net.Conn
	edgeRaw     syscall.RawConn // nil when the bytes in the socket are not those of the stream: TLS, or no socket
	guestRaw    syscall.RawConn
	halfOpen    time.Duration
	stats       *serverMetrics

	finished atomic.Int32 // directions that ended well
	end      sync.Once    // both ends are closed once, either way
}

func newRelay(edge, guest net.Conn, halfOpen time.Duration, stats *serverMetrics) *relay {
	return &relay{
		edge: edge, guest: guest,
		edgeRaw: rawConn(edge), guestRaw: rawConn(guest),
		halfOpen: halfOpen, stats: stats,
	}
}

// rawConn returns access to c's own socket, or nil.
func rawConn(c net.Conn) syscall.RawConn {
	sc, ok := c.(syscall.Conn) // *tls.Conn is none, on purpose
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// run returns when both connections are closed.
func (r *relay) run() {
	var wg sync.WaitGroup
	wg.Go(r.fromGuest)
	r.fromEdge()
	wg.Wait()
}

func (r *relay) fromEdge() {
	r.direction(r.guest, r.edge, r.guestRaw, r.edgeRaw, r.stats.toGuest)
}

func (r *relay) fromGuest() {
	r.direction(r.edge, r.guest, r.edgeRaw, r.guestRaw, r.stats.toEdge)
}

// direction copies from src to dst until src ends, passes the end on, and then only watches src for a reset.
func (r *relay) direction(dst, src net.Conn, dstRaw, srcRaw syscall.RawConn, moved *metrics.Counter) {
	progress := progress{relay: r, src: src, moved: moved}
	err := errCannotSplice
	if dstRaw != nil && srcRaw != nil {
		err = splice(dstRaw, srcRaw, &progress)
	}
	if errors.Is(err, errCannotSplice) {
		err = copyBuffered(dst, src, &progress)
	}
	if err != nil {
		r.reset(err)
		return
	}
	half, ok := dst.(closeWriter)
	if !ok {
		r.close() // a transport without half-close: its end is the end
		return
	}
	if err := half.CloseWrite(); err != nil {
		r.reset(err)
		return
	}
	if r.finished.Add(1) == 2 {
		r.close()
		return
	}
	// The other direction goes on. It gets a deadline from here on, renewed by each byte: a guest that never closes must
	// not hold connections that an edge has long finished.
	_ = dst.SetReadDeadline(time.Now().Add(r.halfOpen)) // fails only on a closed connection
	if srcRaw != nil {
		if err := awaitReset(srcRaw); err != nil {
			r.reset(err) // or the other direction has just closed both, and this does nothing
		}
	}
}

// close ends both connections in good order.
func (r *relay) close() {
	r.end.Do(func() {
		_ = r.edge.Close() // both directions are done: there is nobody left to tell
		_ = r.guest.Close()
	})
}

// reset ends both connections such that both peers see a reset.
func (r *relay) reset(cause error) {
	r.end.Do(func() {
		switch {
		case errors.Is(cause, os.ErrDeadlineExceeded):
			r.stats.resets[resetHalfOpen].Inc()
		case errors.Is(cause, net.ErrClosed): // from Server.Reset or the server's end, counted there
		default:
			r.stats.resets[resetPeer].Inc()
		}
		resetConn(r.edge)
		resetConn(r.guest)
	})
}

// progress accounts for what one direction moved.
type progress struct {
	relay   *relay
	src     net.Conn
	moved   *metrics.Counter
	renewed time.Time
}

func (p *progress) add(n int) {
	p.moved.Add(n)
	if p.relay.finished.Load() == 0 {
		return
	}
	// The opposite direction has ended, so src has a deadline. An eighth is exact enough, and spares the timer.
	if now := time.Now(); now.Sub(p.renewed) > p.relay.halfOpen/8 {
		p.renewed = now
		_ = p.src.SetReadDeadline(now.Add(p.relay.halfOpen))
	}
}

// errCannotSplice says that no byte is in flight and that the rest has to go through user space.
var errCannotSplice = errors.New("cannot splice")

// copyBufferSize is one TLS record.
const copyBufferSize = 16 << 10

var copyBuffers = sync.Pool{New: func() any { return new([copyBufferSize]byte) }}

// copyBuffered copies through user space with a pooled buffer. It is not io.Copy: that would find ReadFrom on the TCP
// side, which ignores the buffer and makes a larger one.
func copyBuffered(dst io.Writer, src io.Reader, p *progress) error {
	buf := copyBuffers.Get().(*[copyBufferSize]byte)
	defer copyBuffers.Put(buf)
	for {
		n, err := src.Read(buf[:])
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
			p.add(n)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
