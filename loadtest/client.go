package loadtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/valyala/fasthttp"
)

// client is one connection and what is sent on it. It opens the connection when there is none.
type client struct {
	opts    *Options
	request []byte // fixed, shared

	conn   net.Conn
	reader *bufio.Reader
	answer fasthttp.Response
	frame  []byte
	echo   []byte
}

// requestError is a failure with its kind.
type requestError struct {
	kind ErrorKind
	err  error
}

func (e *requestError) Error() string { return e.kind.String() + ": " + e.err.Error() }
func (e *requestError) Unwrap() error { return e.err }

// maxBody bounds an answer: the scenarios are about small ones.
const maxBody = 1 << 20

// appendRequest appends the request's bytes: for a WebSocket, of the upgrade.
func appendRequest(dst []byte, opts *Options) []byte {
	dst = fmt.Appendf(dst, "GET %s HTTP/1.1\r\nHost: %s\r\n", opts.Scenario.Path, opts.Host)
	for _, h := range opts.headers() {
		dst = fmt.Appendf(dst, "%s: %s\r\n", h.Name, h.Value)
	}
	if opts.Scenario.WebSocket {
		var key [16]byte
		_, _ = rand.Read(key[:]) // never fails
		dst = fmt.Appendf(dst, "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n",
			base64.StdEncoding.EncodeToString(key[:]))
	}
	return append(dst, "\r\n"...)
}

// exchange sends one request and reads its answer, until giveUp. A kept-alive connection that turns out to be closed is
// opened anew once: real clients do that too.
func (c *client) exchange(ctx context.Context, giveUp time.Time) (reopened bool, failure *requestError) {
	kept := c.conn != nil
	err := c.try(ctx, giveUp)
	if kept && errors.Is(err, errStale) {
		reopened = true
		err = c.try(ctx, giveUp)
	}
	if err == nil {
		return reopened, nil
	}
	return reopened, classify(err)
}

// errStale says that the connection ended before a byte of the answer.
var errStale = errors.New("connection ended before the answer began")

func classify(err error) *requestError {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		return &requestError{ErrTimeout, err}
	}
	if known, ok := errors.AsType[*requestError](err); ok {
		return known
	}
	return &requestError{ErrClosed, err}
}

// try is one attempt; after an error there is no connection.
func (c *client) try(ctx context.Context, giveUp time.Time) (err error) {
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if c.conn == nil {
		if err := c.open(ctx, giveUp); err != nil {
			return &requestError{ErrDial, err}
		}
	}
	if err := c.conn.SetDeadline(giveUp); err != nil {
		return err
	}
	conn := c.conn
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if c.opts.Scenario.WebSocket {
		return c.message()
	}
	return c.get()
}

func (c *client) open(ctx context.Context, giveUp time.Time) error {
	dialer := net.Dialer{Deadline: giveUp}
	conn, err := dialer.DialContext(ctx, "tcp", c.opts.Addr)
	if err != nil {
		return err
	}
	c.conn = conn
	if err := conn.SetDeadline(giveUp); err != nil {
		return err
	}
	if c.opts.TLS != nil {
		secure := tls.Client(conn, c.opts.TLS)
		c.conn = secure
		if err := secure.HandshakeContext(ctx); err != nil {
			return err
		}
	}
	if c.reader == nil {
		c.reader = bufio.NewReader(c.conn)
	}
	c.reader.Reset(c.conn)
	if !c.opts.Scenario.WebSocket {
		return nil
	}
	if err := c.send(c.request); err != nil {
		return err
	}
	if err := c.answer.Read(c.reader); err != nil {
		return err
	}
	if status := c.answer.StatusCode(); status != fasthttp.StatusSwitchingProtocols {
		return fmt.Errorf("upgrade answered %d", status)
	}
	return nil
}

// send writes and waits for the first byte of an answer.
func (c *client) send(b []byte) error {
	if _, err := c.conn.Write(b); err != nil {
		return stale(err)
	}
	if _, err := c.reader.Peek(1); err != nil {
		return stale(err)
	}
	return nil
}

func stale(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: %w", errStale, err)
}

func (c *client) get() error {
	if err := c.send(c.request); err != nil {
		return err
	}
	if err := c.answer.ReadLimitBody(c.reader, maxBody); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		if _, ok := errors.AsType[net.Error](err); ok {
			return err
		}
		return &requestError{ErrProtocol, err}
	}
	if c.answer.ConnectionClose() {
		c.close()
	}
	if status := c.answer.StatusCode(); status != fasthttp.StatusOK {
		return &requestError{ErrStatus, fmt.Errorf("status %d", status)}
	}
	if want := c.opts.Scenario.Want; want != "" && !bytes.Contains(c.answer.Body(), []byte(want)) {
		return &requestError{ErrBody, fmt.Errorf("no %q in the answer", want)}
	}
	return nil
}

// A WebSocket message of the scenario: binary, one frame, short enough for the shortest header.
const (
	messageSize = 64
	frameBinary = 0x82
	frameMasked = 0x80
)

// message sends one frame and reads its echo.
func (c *client) message() error {
	if c.frame == nil {
		c.frame = make([]byte, 2+4+messageSize)
		c.echo = make([]byte, 2+messageSize)
	}
	_, _ = rand.Read(c.frame[2:]) // mask and payload: as they go over the wire, they may be anything
	c.frame[0], c.frame[1] = frameBinary, frameMasked|messageSize
	if err := c.send(c.frame); err != nil {
		return err
	}
	if _, err := io.ReadFull(c.reader, c.echo); err != nil {
		return err
	}
	if c.echo[0] != frameBinary || c.echo[1] != messageSize {
		return &requestError{ErrProtocol, fmt.Errorf("frame %#x %#x is no echo", c.echo[0], c.echo[1])}
	}
	mask := binary.LittleEndian.Uint64(append(bytes.Clone(c.frame[2:6]), c.frame[2:6]...))
	for i := 0; i < messageSize; i += 8 {
		if binary.LittleEndian.Uint64(c.frame[6+i:])^mask != binary.LittleEndian.Uint64(c.echo[2+i:]) {
			return &requestError{ErrBody, errors.New("the echo differs")}
		}
	}
	return nil
}

func (c *client) close() {
	if c.conn != nil {
		_ = c.conn.Close() // nothing of ours is unsent
		c.conn = nil
	}
}
