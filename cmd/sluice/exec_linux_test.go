package main

import (
	"context"
	"errors"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/sandboxd"
)

// startAgent runs a guest agent in this process, as the one of a sandbox whose tokens come from testNonce.
func startAgent(t *testing.T) (url string) {
	t.Helper()
	self, err := user.Current()
	if err != nil {
		t.Skipf("who runs this is not in /etc/passwd, run the tests as a user who is: %v", err)
	}
	public, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "control")
	control, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- guest.Run(ctx, guest.Options{Listen: public, Control: control}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("guest.Run() = %v", err)
		}
	})
	init := guest.InitRequest{AccessToken: testTokens.Envd(testNonce), DefaultUser: self.Username, DefaultWorkdir: "/"}
	if err := guest.NewClient(socket).Init(t.Context(), init); err != nil {
		t.Fatal(err)
	}
	return "http://" + public.Addr().String()
}

func TestExec(t *testing.T) {
	n, url := newServer(t)
	n.put(testSandbox("i1", sandboxd.StateRunning))
	n.put(testSandbox("ipaused", sandboxd.StatePaused))
	env := map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey, "E2B_SANDBOX_URL": startAgent(t)}
	for _, test := range []struct {
		line     []string
		out, err string
		code     int
	}{
		{[]string{"i1", "echo", "-n", "hi"}, "hi", "", 0},
		{[]string{"i1", "--", "sh", "-c", "echo out; echo err >&2; exit 3"}, "out\n", "err\n", 3},
		{[]string{"-env", "A=b=c", "-workdir", "/usr", "i1", "--", "sh", "-c", "echo $A; pwd"}, "b=c\n/usr\n", "", 0},
		{[]string{"i1", "-i", "--", "cat"}, "", "", 0},
		{[]string{"i1", "sh", "-c", "kill -KILL $$"}, "", "", 137},
	} {
		got := operateWith(t, env, append([]string{"exec"}, test.line...)...)
		code, _ := errors.AsType[exitCode](got.failure)
		if got.out != test.out || got.err != test.err || int(code) != test.code || (got.failure == nil) != (test.code == 0) {
			t.Errorf("exec %v = %+v, want %q, %q and %d", test.line, got, test.out, test.err, test.code)
		}
	}
	for _, test := range []struct {
		line []string
		want string
	}{
		{[]string{"ipaused", "true"}, "`sluice resume ipaused`"},
		{[]string{"-it", "i1", "bash"}, "-t wants its input to be a terminal"},
		{[]string{"-env", "A", "i1", "true"}, "want NAME=VALUE"},
		{[]string{"i1", "no-such-program"}, "no-such-program"},
		{[]string{"-user", "nobody-here", "i1", "true"}, "invalid username"},
		{[]string{"-sandbox-url", "http://127.0.0.1:1", "i1", "true"}, "is http://127.0.0.1:1 the way to it? see E2B_SANDBOX_URL"},
	} {
		got := operateWith(t, env, append([]string{"exec"}, test.line...)...)
		if got.failure == nil || !strings.Contains(got.failure.Error(), test.want) {
			t.Errorf("exec %v = %v, want %q in it", test.line, got.failure, test.want)
		}
	}
}

// TestExecOnTerminal is a user at a terminal: keys, Ctrl-C, a window that changes, and a terminal that is afterwards as it was before.
func TestExecOnTerminal(t *testing.T) {
	n, url := newServer(t)
	n.put(testSandbox("i1", sandboxd.StateRunning))
	env := map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey, "E2B_SANDBOX_URL": startAgent(t), "TERM": "vt220"}
	keyboard, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer keyboard.Close()
	defer tty.Close()
	if err := pty.Setsize(keyboard, &pty.Winsize{Cols: 100, Rows: 40}); err != nil {
		t.Fatal(err)
	}
	before, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	out := newPipe()
	ended := make(chan error, 1)
	go func() {
		script := `trap 'echo interrupted' INT; trap 'stty size' WINCH; echo $TERM; stty size; until read -t 0; do sleep 0.05; done; read -r line; echo "<$line>"; exit 9`
		ended <- runExec(t.Context(), []string{"-it", "i1", "--", "bash", "-c", script},
			console{in: tty, out: out, err: out, getenv: func(name string) string { return env[name] }})
	}()
	out.await(t, "vt220\r\n40 100\r\n")
	if err := pty.Setsize(keyboard, &pty.Winsize{Cols: 120, Rows: 50}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGWINCH); err != nil { // as the kernel would, were it this process's own terminal
		t.Fatal(err)
	}
	out.await(t, "50 120")
	if _, err := keyboard.WriteString("\x03"); err != nil {
		t.Fatal(err)
	}
	out.await(t, "interrupted")
	if _, err := keyboard.WriteString("typed\r"); err != nil {
		t.Fatal(err)
	}
	code, ok := errors.AsType[exitCode](<-ended)
	if !ok || code != 9 || !strings.Contains(out.String(), "<typed>") {
		t.Errorf("exec -it = %v with %q, want 9", code, out.String())
	}
	after, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil || *after != *before {
		t.Errorf("the terminal is left as %+v, %v, want %+v", after, err, before)
	}
}

// TestExecPassesSignalsOn: without a terminal, Ctrl-C is a signal to this command.
func TestExecPassesSignalsOn(t *testing.T) {
	n, url := newServer(t)
	n.put(testSandbox("i1", sandboxd.StateRunning))
	env := map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey, "E2B_SANDBOX_URL": startAgent(t)}
	out := newPipe()
	ended := make(chan error, 1)
	ctx, interrupt := context.WithCancel(t.Context()) // as main's ends with the same signal
	defer interrupt()
	go func() {
		ended <- runExec(ctx, []string{"i1", "bash", "-c", "trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done"},
			console{out: out, err: out, getenv: func(name string) string { return env[name] }})
	}()
	out.await(t, "ready")
	for _, want := range []string{"asked", ""} {
		if err := syscall.Kill(os.Getpid(), syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		interrupt()
		out.await(t, want)
	}
	if code, ok := errors.AsType[exitCode](<-ended); !ok || code != 137 {
		t.Errorf("exec = %v with %q, want 137", code, out.String())
	}
}
