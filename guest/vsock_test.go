package guest

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pairedVsock is our connection over another kind of stream, for machines that have no vsock.
func pairedVsock(t *testing.T) (a, b *vsockConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*vsockConn
	for i, fd := range fds {
		if ends[i], err = newVsockConn(fd, vsockAddr{CID: 3, Port: ControlPort}, vsockAddr{CID: unix.VMADDR_CID_HOST, Port: 7}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ends[i].Close() })
	}
	return ends[0], ends[1]
}

func TestVsockConn(t *testing.T) {
	a, b := pairedVsock(t)
	if a.LocalAddr().String() != "3:1024" || a.RemoteAddr().String() != "2:7" || a.RemoteAddr().Network() != "vsock" {
		t.Errorf("addresses %v, %v", a.LocalAddr(), a.RemoteAddr())
	}
	if _, err := io.WriteString(a, "question"); err != nil {
		t.Error(err)
	}
	if err := a.CloseWrite(); err != nil {
		t.Error(err)
	}
	if got, err := io.ReadAll(b); string(got) != "question" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := io.WriteString(b, "answer after the end"); err != nil {
		t.Errorf("write to one that has ended its own direction: %v", err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if got, err := io.ReadAll(a); string(got) != "answer after the end" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
}

// net/http tells a deadline by net.Error: anything else would end the request that is being answered.
func TestVsockConnErrors(t *testing.T) {
	a, _ := pairedVsock(t)
	if err := a.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	_, err := a.Read(make([]byte, 1))
	if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read after the deadline = %v", err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read after Close = %v", err)
	}
	if _, err := a.Write(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write after Close = %v", err)
	}
	if err := a.CloseWrite(); err == nil {
		t.Error("CloseWrite after Close succeeds")
	}
}

// Whoever connects from inside is turned away, and closing ends Accept. A Unix socket's peer is no host either.
func TestVsockListener(t *testing.T) {
	inner, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	f, err := inner.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, ok, _ := newVsockListener(int(f.Fd())); ok {
		t.Error("a Unix socket is taken for a vsock")
	}
	fd, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "listener")
	raw, err := file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	l := &vsockListener{file: file, raw: raw}
	accepted := make(chan error)
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	stranger, err := net.Dial("unix", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	if n, err := stranger.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("a stranger reads %d, %v, want to be turned away", n, err)
	}
	if err := errors.Join(l.Close(), l.Close()); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close = %v", err)
	}
}
