package link

import (
	"errors"
	"net"
	"syscall"
	"time"
)

// Conn is a link connection that a Pool handed out. Release, Discard or Close ends its use; after Release it belongs to
// somebody else, after the other two calling any of them again does nothing.
type Conn struct {
	conn   net.Conn
	raw    syscall.RawConn  // of the socket, for the check in Get; nil: cannot be checked, so is never pooled
	peek   func(fd uintptr) // c.peekSocket, made once: Get must not allocate
	pool   *Pool            // fixed
	bucket *bucket          // fixed
	target Target           // fixed
	health discardReason    // peek's finding
	alive  bool             // peek's finding

	// Owned by whoever has the connection from Get.
	reused   bool
	deadline bool // one was set and must go before the next user
	halfDone bool // our direction has ended

	// Guarded by pool.mu.
	state        connState
	since        time.Time // idle since
	newer, older *Conn     // among all idle ones
	above, below *Conn     // among the idle ones of the bucket; the top is taken first
}

type connState uint8

const (
	stateUsed connState = iota
	stateIdle
	stateClosed
)

func newConn(p *Pool, b *bucket, t Target, nc net.Conn) *Conn {
	c := &Conn{conn: nc, pool: p, bucket: b, target: t, raw: rawConn(socketOf(nc))}
	c.peek = c.peekSocket
	return c
}

// Target returns what the connection was opened for.
func (c *Conn) Target() Target { return c.target }

// Reused tells whether the connection came from the pool: then its guest may have been about to close it, and a request
// that got no byte of an answer may be repeated on a fresh one.
func (c *Conn) Reused() bool { return c.reused }

// NetConn returns the connection whose bytes are the stream's: a *net.TCPConn where one can splice, a *tls.Conn where
// one cannot. It stays owned by c: deadlines and the end are set through c.
func (c *Conn) NetConn() net.Conn {
	if tracked, ok := c.conn.(*trackedConn); ok {
		return tracked.Conn
	}
	return c.conn
}

func (c *Conn) Read(b []byte) (int, error)  { return c.conn.Read(b) }
func (c *Conn) Write(b []byte) (int, error) { return c.conn.Write(b) }

// LocalAddr and RemoteAddr are the socket's: of the edge and the node.
func (c *Conn) LocalAddr() net.Addr { return c.conn.LocalAddr() }

// RemoteAddr is the node's address.
func (c *Conn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// SetDeadline holds, like the other two, until the connection is released.
func (c *Conn) SetDeadline(t time.Time) error {
	c.deadline = true
	return c.conn.SetDeadline(t)
}

// SetReadDeadline holds until the connection is released.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.deadline = true
	return c.conn.SetReadDeadline(t)
}

// SetWriteDeadline holds until the connection is released.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.deadline = true
	return c.conn.SetWriteDeadline(t)
}

// CloseWrite ends our direction: the guest sees an end of stream. The connection is not pooled after that.
func (c *Conn) CloseWrite() error {
	half, ok := c.conn.(closeWriter)
	if !ok {
		return errors.ErrUnsupported
	}
	c.halfDone = true
	return half.CloseWrite()
}

// Release gives the connection back for the next request. Everything asked for on it has been answered and read.
func (c *Conn) Release() {
	if c.deadline {
		if err := c.conn.SetDeadline(time.Time{}); err != nil {
			c.pool.drop(c, discardClosed)
			return
		}
		c.deadline = false
	}
	c.pool.release(c)
}

// Discard ends a connection that must not be used again: by a reset, so that the guest stops working on a request that
// nobody waits for. After CloseWrite it is a plain close, which loses nothing that is still on its way.
func (c *Conn) Discard() { c.pool.drop(c, discardCaller) }

// Close ends the connection in good order; what was written still arrives. It is for those who treat it as a net.Conn.
func (c *Conn) Close() error {
	c.halfDone = true
	c.pool.drop(c, discardCaller)
	return nil
}

// shut closes the connection for good.
func (c *Conn) shut() {
	if c.halfDone {
		_ = c.conn.Close() // its user is done with it either way
		return
	}
	resetConn(c.conn)
}

// checkAlive asks the socket, without waiting, whether an idle connection may be used again.
func (c *Conn) checkAlive() bool {
	c.alive, c.health = false, discardClosed
	if err := c.raw.Control(c.peek); err != nil {
		return false
	}
	return c.alive
}
