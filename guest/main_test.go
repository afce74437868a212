package guest

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

func TestControlListener(t *testing.T) {
	dir, err := os.MkdirTemp("", "control")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	inner, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	f, err := inner.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	// The way it is inherited: open on exec.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD, 3)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(ControlFDVariable, strconv.Itoa(fd))
	l, err := ControlListener()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, ok := os.LookupEnv(ControlFDVariable); ok {
		t.Error("the variable is still there for children to see")
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
		t.Error("the inherited descriptor is still open")
	}
	client, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if conn, err := l.Accept(); err != nil {
		t.Errorf("Accept = %v", err)
	} else {
		conn.Close()
	}
	if l, err := ControlListener(); l != nil || err != nil {
		t.Errorf("without the variable: %v, %v", l, err)
	}
	for _, bad := range []string{"", "x", "2", "-1", "9999"} {
		t.Setenv(ControlFDVariable, bad)
		if l, err := ControlListener(); l != nil || err == nil {
			t.Errorf("ControlListener of %q = %v, %v", bad, l, err)
		}
	}
}
