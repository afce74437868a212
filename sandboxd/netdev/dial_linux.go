package netdev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// DialTCP connects to a port inside the sandbox, through a socket opened in its namespace: to 127.0.0.1, then ::1, then the
// sandbox's own addresses, until somebody listens. The namespace is private, so 127.0.0.1 there is nobody but the sandbox. Of a virtual
// machine it tries the constant addresses, behind the tap: what listens on the machine's loopback alone is out of reach from here.
// The connection is a bare *net.TCPConn, ready to be spliced. When nobody listens the error is syscall.ECONNREFUSED.
func (s *Slot) DialTCP(ctx context.Context, port uint16) (net.Conn, error) {
	var failed error
	addrs := []netip.Addr{loopback4, loopback6, s.GuestAddr, s.GuestAddr6, GuestConstant}
	if s.tap {
		addrs = s.constants()
	}
	for _, addr := range addrs {
		if !addr.IsValid() {
			continue
		}
		conn, err := s.dialAddr(ctx, netip.AddrPortFrom(addr, port))
		switch {
		case err == nil:
			return conn, nil
		case ctx.Err() != nil:
			return nil, fmt.Errorf("dial port %d of slot %d: %w", port, s.Index, errors.Join(ctx.Err(), err))
		case nobodyListens(err):
		case failed == nil:
			failed = err
		}
	}
	if failed == nil {
		failed = syscall.ECONNREFUSED
	}
	return nil, fmt.Errorf("dial port %d of slot %d: %w", port, s.Index, failed)
}

// nobodyListens reports the errors that say that this address is not the one: refused, or no such address inside (IPv6 off).
func nobodyListens(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EADDRNOTAVAIL) ||
		errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, errSecondSocket)
}

// errSecondSocket ends a dial in which package net wants another socket. It does so when the first one connected to itself,
// which a loopback port in the ephemeral range allows when nobody listens on it; and by then the thread has left the
// namespace, so the second socket would reach the node's own loopback.
var errSecondSocket = errors.New("the socket connected to itself")

// dialAddr lets package net dial, on a thread that is in the sandbox's namespace for exactly the call that creates the socket:
// Control runs right after it, on the same goroutine and before the connect.
func (s *Slot) dialAddr(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	runtime.LockOSThread()
	home, err := s.enter()
	if err != nil {
		runtime.UnlockOSThread()
		return nil, err
	}
	left := false
	leave := func() {
		left = true
		// A thread that cannot go back must not run anything else. The caller's goroutine is bound to it, so this is the
		// end of the process, which comes back and adopts its sandboxes.
		if err := unix.Setns(home, unix.CLONE_NEWNET); err != nil {
			panic(fmt.Sprintf("BUG: return from the network namespace of slot %d: %v", s.Index, err))
		}
		_ = unix.Close(home)
		runtime.UnlockOSThread()
	}
	dialer := net.Dialer{
		// Both ends are on this machine: one cannot vanish without the other's kernel knowing, or, of a virtual machine, the node.
		KeepAlive: -1,
		Control: func(string, string, syscall.RawConn) error {
			if left {
				return errSecondSocket
			}
			leave()
			return nil
		},
	}
	conn, err := dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, addr)
	if !left {
		leave()
	}
	if err != nil {
		return nil, err // not conn: a nil *net.TCPConn would be a net.Conn that is not nil
	}
	return conn, nil
}

// enter moves the calling thread, which is locked, into the sandbox's namespace and returns the one it came from.
func (s *Slot) enter() (home int, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.ns < 0 {
		return -1, fmt.Errorf("slot %d is released: %w", s.Index, net.ErrClosed)
	}
	home, err = openThreadNetNS()
	if err != nil {
		return -1, err
	}
	if err := unix.Setns(s.ns, unix.CLONE_NEWNET); err != nil {
		_ = unix.Close(home)
		return -1, fmt.Errorf("enter network namespace of slot %d: %w", s.Index, err)
	}
	return home, nil
}

// close forgets the open namespace: while it is open the kernel keeps it.
func (s *Slot) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ns >= 0 {
		_ = unix.Close(s.ns)
		s.ns = -1
	}
}
