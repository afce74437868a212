package link

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Dialer is the edge's half: it opens connections to nodes. It may be used by many goroutines and must not be changed or
// copied after the first Dial.
type Dialer struct {
	// Key is the cluster key. It may be empty only when the node goes by client certificates.
	Key []byte

	// TLS, when not nil, is spoken to the node. It carries this edge's certificate, the CA and the name to expect.
	TLS *tls.Config

	// Timeout is the budget of one Dial with all its attempts; zero means 10s. It is above the node's OpenTimeout, so that
	// the node gets to say why.
	Timeout time.Duration

	// WakeTimeout is the same for a Target with Wake; zero means 75s. It is above the node's WakeTimeout.
	WakeTimeout time.Duration

	// ConnectTimeout is how long one attempt may take to connect to the node; zero means 2s, which is one lost SYN.
	ConnectTimeout time.Duration

	derive sync.Once
	key    macKey
}

// dialAttempts and dialPause span the moment in which a node's listener is replaced: 25, 50 and 100 ms apart. Only the
// way to the node is retried; what the node answers, stands.
const (
	dialAttempts = 4
	dialPause    = 25 * time.Millisecond
)

// Dial opens a connection to t: a *net.TCPConn, or a *tls.Conn with TLS, positioned after the verdict. The error is a
// *VerdictError when the node said no, and errs.Unavailable when it said nothing. A Target with Wake never gets a connection:
// see Pool.Wake.
func (d *Dialer) Dial(ctx context.Context, t Target) (net.Conn, error) {
	d.derive.Do(func() { d.key = newMACKey(d.Key) })
	p := preface{client: t.Client, sandbox: t.Sandbox, generation: t.Generation, port: t.Port, wake: t.Wake}
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("dial link: %w", err)
	}
	timeout := d.Timeout
	setDefault(&timeout, 10*time.Second)
	if t.Wake {
		timeout = d.WakeTimeout
		setDefault(&timeout, 75*time.Second)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	var conn net.Conn
	var err error
	for attempt := range dialAttempts {
		conn, err = d.try(ctx, t.Addr, &p)
		if err == nil || !transient(err) || ctx.Err() != nil {
			break
		}
		pause := dialPause << attempt
		sleep(ctx, pause/2+mathrand.N(pause)) // spread: the edges all lost the node at the same moment
	}
	if err == nil {
		return conn, nil
	}
	if v, ok := errors.AsType[*VerdictError](err); ok {
		return nil, v
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", ctx.Err(), err) // what it broke off may not say that it was that
	}
	return nil, &errs.Error{Code: errs.Unavailable, Msg: "the sandbox's node does not answer", Err: err}
}

// transient tells whether another attempt may find the node back.
func transient(err error) bool {
	for _, errno := range []syscall.Errno{
		syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, syscall.ENETUNREACH, syscall.EHOSTUNREACH, syscall.EADDRNOTAVAIL,
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// try is one attempt, with a time stamp and a nonce of its own.
func (d *Dialer) try(ctx context.Context, addr string, p *preface) (conn net.Conn, err error) {
	timeout := d.ConnectTimeout
	setDefault(&timeout, 2*time.Second)
	dialer := net.Dialer{Timeout: timeout, KeepAliveConfig: keepAlive}
	tcp, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = tcp.SetDeadline(time.Unix(1, 0)) }) // whatever waits below gives up
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(ctx) // the deadline may be set already, and the connection is of no use
		}
		if err != nil {
			resetConn(tcp)
			conn = nil
		}
	}()
	if err := tune(tcp); err != nil {
		return nil, err
	}
	conn = tcp
	if d.TLS != nil {
		secure := tls.Client(tcp, d.TLS)
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, fmt.Errorf("tls handshake with node: %w", err)
		}
		conn = secure
	}
	p.stamp = time.Now()
	_, _ = rand.Read(p.nonce[:]) // never fails: it would rather crash the process
	var buf [maxPreface]byte
	if _, err := conn.Write(appendPreface(buf[:0], p, &d.key)); err != nil {
		return nil, fmt.Errorf("send link header: %w", err)
	}
	var verdict [1]byte
	if _, err := io.ReadFull(conn, verdict[:]); err != nil {
		return nil, fmt.Errorf("read verdict: %w", err)
	}
	switch v := Verdict(verdict[0]); {
	case v == Open:
		return conn, nil
	case v.valid():
		return nil, &VerdictError{v}
	default:
		return nil, fmt.Errorf("node answered %#x, which is no verdict", verdict[0])
	}
}
