package main

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/guest"
)

const beGuestd = "SLUICE_TEST_BE_GUESTD"

func TestMain(m *testing.M) {
	if os.Getenv(beGuestd) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func guestd(t *testing.T, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), beGuestd+"=1")
	return cmd
}

// Started by hand, on a host, it must not be a shell for whoever can reach the host.
func TestByHandItServesNobody(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{nil, 1, guest.ControlFDVariable},
		{[]string{"-h"}, 0, "agent inside a sandbox"},
		{[]string{"--help"}, 0, "agent inside a sandbox"},
		{[]string{"serve"}, 1, "unknown argument"},
		{[]string{"-x"}, 1, "not defined"},
		{[]string{"-insecure-listen", "127.0.0.1:0", "more"}, 1, "unknown argument"},
	} {
		out, err := guestd(t, c.args...).CombinedOutput()
		code := 0
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			code = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		if code != c.code || !strings.Contains(string(out), c.want) {
			t.Errorf("guestd %q: status %d, want %d; %q in: %s", c.args, code, c.code, c.want, out)
		}
	}
}

func TestInsecureListen(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	cmd := guestd(t, "-insecure-listen", address)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if conn, err := net.Dial("tcp", address); err == nil {
			conn.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody listens")
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("guestd after SIGTERM: %v", err)
	}
}
