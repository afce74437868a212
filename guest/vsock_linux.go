package guest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// vsockBacklog is how many connections of the node wait while the agent is busy, or is being started again.
const vsockBacklog = 256

// listenVsock opens the control port. It is a bare descriptor because the process that opens it is not the one that serves it.
func listenVsock(port uint32) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("open vsock: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
	if err == nil {
		err = unix.Listen(fd, vsockBacklog)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	return fd, nil
}

// sayUp tells the node that the agent serves. A node that does not listen knows it already.
func sayUp() error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("say that the guest is up: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: UpPort}); err != nil {
		return fmt.Errorf("say that the guest is up: %w", err)
	}
	if _, err := unix.Write(fd, []byte("up\n")); err != nil {
		return fmt.Errorf("say that the guest is up: %w", err)
	}
	return nil
}

// vsockAddr is an address of the kind that package net does not know.
type vsockAddr unix.SockaddrVM

func (vsockAddr) Network() string  { return "vsock" }
func (a vsockAddr) String() string { return fmt.Sprintf("%d:%d", a.CID, a.Port) }

// vsockListener accepts connections of the host and of nobody else: whoever is inside may connect to a vsock too.
type vsockListener struct {
	file   *os.File
	raw    syscall.RawConn
	addr   vsockAddr
	closed atomic.Bool
}

// newVsockListener serves on a descriptor that listens, which is its own from then on. ok is false when it is no vsock.
func newVsockListener(fd int) (l *vsockListener, ok bool, err error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return nil, false, nil
	}
	addr, ok := sa.(*unix.SockaddrVM)
	if !ok {
		return nil, false, nil
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, true, fmt.Errorf("serve vsock: %w", err)
	}
	f := os.NewFile(uintptr(fd), "vsock")
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, true, fmt.Errorf("serve vsock: %w", err)
	}
	return &vsockListener{file: f, raw: raw, addr: vsockAddr(*addr)}, true, nil
}

// Accept implements net.Listener.
func (l *vsockListener) Accept() (net.Conn, error) {
	for {
		var fd int
		var peer unix.Sockaddr
		var err error
		waited := l.raw.Read(func(s uintptr) bool {
			fd, peer, err = unix.Accept4(int(s), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return !errors.Is(err, unix.EAGAIN)
		})
		switch {
		case waited != nil || l.closed.Load():
			if waited == nil && err == nil {
				unix.Close(fd)
			}
			return nil, l.failed("accept", net.ErrClosed)
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNRESET): // a restored machine forgets those that were waiting
			continue
		case err != nil:
			return nil, l.failed("accept", err)
		}
		if from, ok := peer.(*unix.SockaddrVM); ok && from.CID == unix.VMADDR_CID_HOST {
			return newVsockConn(fd, l.addr, vsockAddr(*from))
		}
		unix.Close(fd)
	}
}

func (l *vsockListener) failed(op string, err error) error {
	return &net.OpError{Op: op, Net: l.addr.Network(), Addr: l.addr, Err: err}
}

// Close implements net.Listener.
func (l *vsockListener) Close() error {
	if l.closed.Swap(true) {
		return nil
	}
	return l.file.Close()
}

// Addr implements net.Listener.
func (l *vsockListener) Addr() net.Addr { return l.addr }

// vsockConn is a stream whose directions end one by one, as the dial protocol wants it.
type vsockConn struct {
	file          *os.File
	raw           syscall.RawConn
	local, remote vsockAddr
}

func newVsockConn(fd int, local, remote vsockAddr) (*vsockConn, error) {
	f := os.NewFile(uintptr(fd), "vsock")
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &vsockConn{f, raw, local, remote}, nil
}

// failed makes a file's error one of the network: net/http asks whether it is a net.Error, and others for net.ErrClosed.
func (c *vsockConn) failed(op string, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	if path, ok := errors.AsType[*os.PathError](err); ok {
		err = path.Err
	}
	if errors.Is(err, os.ErrClosed) {
		err = net.ErrClosed
	}
	return &net.OpError{Op: op, Net: c.local.Network(), Source: c.local, Addr: c.remote, Err: err}
}

// Read implements net.Conn.
func (c *vsockConn) Read(b []byte) (int, error) {
	n, err := c.file.Read(b)
	return n, c.failed("read", err)
}

// Write implements net.Conn.
func (c *vsockConn) Write(b []byte) (int, error) {
	n, err := c.file.Write(b)
	return n, c.failed("write", err)
}

// CloseWrite ends our direction.
func (c *vsockConn) CloseWrite() error {
	var err error
	if cerr := c.raw.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_WR) }); cerr != nil {
		err = cerr
	}
	return c.failed("shutdown", err)
}

// Close implements net.Conn.
func (c *vsockConn) Close() error { return c.failed("close", c.file.Close()) }

// LocalAddr implements net.Conn.
func (c *vsockConn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *vsockConn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn.
func (c *vsockConn) SetDeadline(t time.Time) error { return c.failed("set", c.file.SetDeadline(t)) }

// SetReadDeadline implements net.Conn.
func (c *vsockConn) SetReadDeadline(t time.Time) error {
	return c.failed("set", c.file.SetReadDeadline(t))
}

// SetWriteDeadline implements net.Conn.
func (c *vsockConn) SetWriteDeadline(t time.Time) error {
	return c.failed("set", c.file.SetWriteDeadline(t))
}
