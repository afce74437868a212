// Package link is one connection from an edge to a port of a sandbox, both halves of it.
//
// The edge's half (Dialer, Pool) opens a TCP connection to the node and sends one PROXY protocol v2 header that says for whom
// and to which port of which sandbox lifecycle. The node's half (Server) checks it, asks its Backend for a connection to
// that port, answers one byte, and from then on moves bytes in the kernel. Nothing here knows HTTP.
//
// The header is authenticated, the stream after it is not: where the network between edge and node is not private, both
// sides are given a TLS configuration with client certificates. Callers are proxy (Pool) and sandboxd's wiring (Server).
package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// Target says which port of which sandbox lifecycle a connection is for.
type Target struct {
	Addr       string // the node's link listener, host:port
	Sandbox    string
	Generation uint64
	Port       uint16

	// Client is who the connection is for, for the node's eyes only; the zero value says that the edge itself asks. A pooled
	// connection keeps the client that it was opened for.
	Client netip.AddrPort

	// Wake asks the node to wake the sandbox, which is paused, and not for a connection: see Waker. Only whoever has found that the
	// client may reach the sandbox sets it.
	Wake bool
}

// Verdict is the node's one-byte answer to a header.
type Verdict uint8

// The verdicts. They are wire values; zero is none of them, so a forgotten field is never mistaken for Open.
const (
	Open            Verdict = iota + 1
	NotHere                 // this node does not have the sandbox (any more)
	WrongGeneration         // it has the sandbox, in another lifecycle
	PortClosed              // the sandbox runs and nothing listens on the port
	Refused                 // the header was authentic and the node still will not, or its Backend failed
	Busy                    // a limit of the node was reached; the same call may work later
)

var verdictNames = [...]string{
	Open: "open", NotHere: "not_here", WrongGeneration: "wrong_generation",
	PortClosed: "port_closed", Refused: "refused", Busy: "busy",
}

// String is the label used in logs and metrics.
func (v Verdict) String() string {
	if !v.valid() {
		return "invalid"
	}
	return verdictNames[v]
}

func (v Verdict) valid() bool { return v >= Open && v <= Busy }

// VerdictError is the node's answer when it is not Open. A Backend returns it to choose the answer.
type VerdictError struct{ Verdict Verdict }

func (e *VerdictError) Error() string { return "node answered " + e.Verdict.String() }

// DialFunc opens a connection to a target. A *VerdictError in the chain is the node's own answer; anything else means
// that there was none.
type DialFunc func(ctx context.Context, t Target) (net.Conn, error)

// Backend opens connections into sandboxes for a Server. It returns a *VerdictError to choose what the edge is told.
//
// Once a lifecycle has ended Open must refuse it, and only then may Server.Reset be called for it: together they are
// the reason why no connection outlives its lifecycle.
type Backend interface {
	Open(ctx context.Context, sandbox string, generation uint64, port uint16) (net.Conn, error)
}

// Waker is what a Backend is as well when it can wake a paused sandbox because somebody wants to reach it. Open never does.
//
// Wake returns nil when the sandbox runs, in a lifecycle later than the one that was paused or, when it was not paused, in that
// one: the edge is then told WrongGeneration, reads the route anew and dials. Else it returns a *VerdictError: NotHere for a
// sandbox that is not here or that traffic must not wake, Busy for one that could not be woken now. It waits for a
// transition that is under way, ends with ctx, and may be called any number of times at once for the same sandbox.
type Waker interface {
	Wake(ctx context.Context, sandbox string, generation uint64) error
}

// lifecycle is what connections are grouped by: never the sandbox alone, whose next life must not get the connections
// of the last one.
type lifecycle struct {
	sandbox    string
	generation uint64
}

// keepAlive finds a peer that vanished without a word in about a minute.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}

// bufferSize bounds each of a socket's two buffers; the kernel doubles it for its own accounting and gives no more than
// net.core.rmem_max and wmem_max say. Left to itself it would let each grow to tens of MiB for as long as bytes move, and keep
// them when the other end stops reading: a few hundred uploads to a server that does not read held the memory for TCP of
// a whole host. The ways of the link are short: 256 KiB under way are 2 Gbit/s at 1 ms.
const bufferSize = 256 << 10

// tune sets what every TCP connection of the link has: small writes leave at once, dead peers are found, and what waits in
// the kernel has a bound.
func tune(c net.Conn) error {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	if err := tcp.SetNoDelay(true); err != nil {
		return fmt.Errorf("set no delay: %w", err)
	}
	if err := tcp.SetKeepAliveConfig(keepAlive); err != nil {
		return fmt.Errorf("set keep-alive: %w", err)
	}
	if err := errors.Join(tcp.SetReadBuffer(bufferSize), tcp.SetWriteBuffer(bufferSize)); err != nil {
		return fmt.Errorf("set buffers: %w", err)
	}
	return nil
}

// netConner is a connection around another one: *tls.Conn, a tracked one.
type netConner interface{ NetConn() net.Conn }

// socketOf returns the innermost connection: the one that owns the socket.
func socketOf(c net.Conn) net.Conn {
	for {
		outer, ok := c.(netConner)
		if !ok {
			return c
		}
		c = outer.NetConn()
	}
}

// resetConn closes c such that the peer sees a reset, not an end of stream: what was said so far is not all there was.
func resetConn(c net.Conn) {
	socket := socketOf(c)
	if tcp, ok := socket.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails only on a connection that is closed already
	}
	_ = socket.Close() // before c: a TLS connection would first write its good-bye
	if c != socket {
		_ = c.Close()
	}
}

// closeWriter is a connection whose directions end one by one.
type closeWriter interface{ CloseWrite() error }
