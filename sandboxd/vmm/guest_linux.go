package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DialGuest connects to a vsock port of the guest. ECONNREFUSED when nobody listens there, or the guest is not up.
func (vm *VM) DialGuest(ctx context.Context, port uint32) (net.Conn, error) {
	conn, err := dialBeneath(ctx, vm.spec.runDir(), vsockName)
	if err != nil {
		return nil, fmt.Errorf("dial guest port %d: %w", port, err)
	}
	if err := connectGuest(ctx, conn, port); err != nil {
		conn.Close()
		return nil, fmt.Errorf("dial guest port %d: %w", port, err)
	}
	return conn, nil
}

// connectGuest is the preface of the hypervisor's vsock: we name a port, it answers with its own or closes.
func connectGuest(ctx context.Context, conn net.Conn, port uint32) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	_, err := fmt.Fprintf(conn, "CONNECT %d\n", port)
	if err == nil {
		err = readConnected(conn)
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return unix.ECONNREFUSED
	}
	return err
}

const maxConnected = 32 // "OK 4294967295\n" and some

// readConnected reads "OK <port>\n" and not a byte more: what follows is the guest's.
func readConnected(r io.Reader) error {
	var line []byte
	var b [1]byte
	for len(line) < maxConnected {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return err
		}
		if b[0] == '\n' {
			number, ok := strings.CutPrefix(string(line), "OK ")
			if _, err := strconv.ParseUint(number, 10, 32); !ok || err != nil {
				return fmt.Errorf("the hypervisor's vsock answered %q", clip(string(line)))
			}
			return nil
		}
		line = append(line, b[0])
	}
	return fmt.Errorf("the hypervisor's vsock answered %q without an end", clip(string(line)))
}

// ListenGuest accepts connections of the guest to a vsock port of its host (CID 2). It is called before Start, so that the guest's first
// word finds a listener: that is how a guest says that it is up without being asked over and over.
func ListenGuest(s Spec, port uint32) (*net.UnixListener, error) {
	if err := errors.Join(ensureDir(s.Dir, 0, 0o700), ensureDir(s.runDir(), s.UID, 0o700)); err != nil {
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	dir, err := os.OpenRoot(s.runDir())
	if err != nil {
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	defer dir.Close()
	name := fmt.Sprintf("%s_%d", vsockName, port)
	if err := dir.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	path := filepath.Join(s.runDir(), name)
	if len(path) > maxSockPath {
		return nil, fmt.Errorf("listen for the guest: %s is too long for a socket", path)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	if err := dir.Lchown(name, int(s.UID), int(s.UID)); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	return l, nil
}

// dialBeneath connects to a socket in a directory where a hypervisor may write: a link in its place would lead us to any other.
func dialBeneath(ctx context.Context, dir, name string) (net.Conn, error) {
	fd, err := unix.Open(filepath.Join(dir, name), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			err = unix.ECONNREFUSED // not up yet
		}
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, fmt.Errorf("%s is not a socket", name)
	}
	return (&net.Dialer{}).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d", fd))
}
