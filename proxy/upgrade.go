package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"time"
)

// upgrade joins the two connections after a 101. From here on they are two byte streams: what one side ends, the other
// side sees end, and the tunnel is over when both have ended or one has failed. The edge reads nothing of what passes.
//
// It runs in fasthttp's goroutine for this connection, where a hijack would only start another: so a tunnel counts against
// the limits of connections, and a drain knows of it.
func (x *exchange) upgrade() error {
	c := x.c
	x.status = x.answer.status
	aw := x.answerRewrite()
	aw.close, aw.keep, aw.protocol = false, false, true
	x.out = x.answer.appendAnswer(x.out[:0], &aw)
	x.out = append(x.out, x.in[x.r:x.w]...)
	x.r = x.w
	if !c.startTunnel() {
		return &fault{reason: ReasonClientGone}
	}
	x.started = true
	if err := c.send(x.out); err != nil {
		return &fault{reason: ReasonClientGone, err: err}
	}
	c.srv.h.stats.answered(x.status)
	c.srv.h.stats.tunnels.Inc()
	defer c.srv.h.stats.tunnels.Dec()
	if err := c.Conn.SetReadDeadline(time.Time{}); err != nil { // that of the head
		return &fault{reason: ReasonTunnelCut, err: err}
	}
	if c.r < c.w { // what the client sent right behind its request
		if _, err := x.up.Write(c.buf[c.r:c.w]); err != nil {
			return &fault{reason: ReasonTunnelCut, err: err}
		}
		c.r = c.w
	}
	x.sending = true
	x.lastPart.Store(true) // it ends by itself
	go x.tunnelIn()
	err := x.tunnelHalf(c.Conn, x.up.NetConn())
	if _, inErr := x.finishBody(-1); err == nil {
		err = inErr
	}
	if err != nil {
		return &fault{reason: ReasonTunnelCut, err: err}
	}
	return nil
}

// tunnelIn is the goroutine that carries what the client sends.
func (x *exchange) tunnelIn() {
	var err error
	defer func() {
		if p := recover(); p != nil {
			err = errors.New("BUG: panic in a tunnel")
			x.cutTunnel()
		}
		x.sent <- err
	}()
	err = x.tunnelHalf(x.up, x.c.Conn)
}

// tunnelHalf carries one direction to its end and passes the end on. A failure ends the other direction too. After an end the
// other side may go on, as long as it is not silent for longer than Limits.HalfClosed: nobody would notice that its peer,
// who has nothing to say any more, is gone.
func (x *exchange) tunnelHalf(dst, src net.Conn) error {
	for {
		moved, err := io.Copy(x.innermost(dst), src) // in the kernel when both are bare TCP
		if errors.Is(err, os.ErrDeadlineExceeded) && moved > 0 {
			err = src.SetReadDeadline(time.Now().Add(x.c.srv.h.limits.HalfClosed))
			if err == nil && !x.stop.Load() && !x.c.isGone() {
				continue
			}
		}
		if half, ok := dst.(interface{ CloseWrite() error }); err == nil && ok {
			err = half.CloseWrite()
		}
		if err == nil {
			// The deadline is that of the other direction's reads.
			err = x.innermost(dst).SetReadDeadline(time.Now().Add(x.c.srv.h.limits.HalfClosed))
		}
		if err != nil {
			x.cutTunnel()
		}
		return err
	}
}

// innermost is the connection under the link's: the kernel moves bytes only between what it knows.
func (x *exchange) innermost(c net.Conn) net.Conn {
	if c == net.Conn(x.up) {
		return x.up.NetConn()
	}
	return c
}

// cutTunnel ends both directions at once.
func (x *exchange) cutTunnel() {
	x.stop.Store(true) // before the deadlines: see tunnelHalf
	_ = x.c.Conn.SetDeadline(longAgo)
	x.c.interrupt()
}
