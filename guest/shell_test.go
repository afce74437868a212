package guest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	"github.com/sluice-edge/sluice/guest/gen/process"
)

// screen collects what a program writes while it runs.
type screen struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

func (s *screen) await(t *testing.T, text string) {
	t.Helper()
	eventually(t, "the program has written "+text, func() bool { return strings.Contains(s.String(), text) })
}

func TestShellRuns(t *testing.T) {
	s := startFresh(t)
	mustInit(t, s, InitRequest{AccessToken: "secret"})
	shell := NewShell(ShellOptions{URL: s.url + "/", Sandbox: "i1", Token: "secret"})
	for _, test := range []struct {
		name           string
		command        Command
		stdout, stderr string
		code           int
	}{
		{"both outputs and a code", Command{Args: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}}, "out\n", "err\n", 3},
		{"environment and directory", Command{Args: []string{"sh", "-c", "echo $A; pwd"}, Env: map[string]string{"A": "b c"}, Dir: "/usr"}, "b c\n/usr\n", "", 0},
		{"no input", Command{Args: []string{"cat"}}, "", "", 0},
		{"input to its end", Command{Args: []string{"cat"}, Stdin: strings.NewReader(strings.Repeat("line\n", 50000))}, strings.Repeat("line\n", 50000), "", 0},
		{"input that it does not want", Command{Args: []string{"true"}, Stdin: strings.NewReader("x")}, "", "", 0},
		{"killed", Command{Args: []string{"sh", "-c", "kill -9 $$"}}, "", "", 128 + 9},
		{"ended by a signal", Command{Args: []string{"sh", "-c", "kill -15 $$"}}, "", "", 128 + 15},
	} {
		var stdout, stderr screen
		test.command.Stdout, test.command.Stderr = &stdout, &stderr
		code, err := shell.Run(t.Context(), test.command)
		if err != nil || code != test.code || stdout.String() != test.stdout || stderr.String() != test.stderr {
			t.Errorf("%s: Run() = %d, %v with %.60q and %.60q, want %d with %.60q and %.60q",
				test.name, code, err, stdout.String(), stderr.String(), test.code, test.stdout, test.stderr)
		}
	}
}

func TestShellRefusals(t *testing.T) {
	s := startFresh(t)
	mustInit(t, s, InitRequest{AccessToken: "secret"})
	for _, test := range []struct {
		name    string
		opts    ShellOptions
		command Command
		want    string
	}{
		{"no program", ShellOptions{Token: "secret"}, Command{}, "no program given"},
		{"unknown program", ShellOptions{Token: "secret"}, Command{Args: []string{"no-such-program"}}, "no-such-program"},
		{"unknown directory", ShellOptions{Token: "secret"}, Command{Args: []string{"true"}, Dir: "/nope"}, "cwd '/nope' does not exist"},
		{"unknown user", ShellOptions{Token: "secret", User: "nobody-here"}, Command{Args: []string{"true"}}, "invalid username: 'nobody-here'"},
		{"wrong token", ShellOptions{Token: "guess"}, Command{Args: []string{"true"}}, "unauthenticated"},
	} {
		test.opts.URL = s.url
		_, err := NewShell(test.opts).Run(t.Context(), test.command)
		if err == nil || !strings.Contains(err.Error(), test.want) || Unreachable(err) {
			t.Errorf("%s: Run() = %v, want %q in it", test.name, err, test.want)
		}
	}
}

// TestShellTerminal is what `sluice exec -it` is for: a size that changes, and a Ctrl-C that reaches the program.
func TestShellTerminal(t *testing.T) {
	s := startAgent(t)
	shell := NewShell(ShellOptions{URL: s.url})
	input, keyboard := io.Pipe()
	defer keyboard.Close()
	var out screen
	resized := make(chan WindowSize)
	type result struct {
		code int
		err  error
	}
	ended := make(chan result, 1)
	go func() {
		code, err := shell.Run(t.Context(), Command{
			Args:     []string{"sh", "-c", `trap 'echo interrupted; exit 7' INT; trap 'stty size' WINCH; stty size; echo ready; while :; do sleep 0.1; done`},
			Terminal: &WindowSize{Cols: 100, Rows: 40}, Resized: resized, Stdin: input, Stdout: &out,
		})
		ended <- result{code, err}
	}()
	out.await(t, "40 100\r\nready")
	resized <- WindowSize{Cols: 120, Rows: 50}
	out.await(t, "50 120")
	if _, err := keyboard.Write([]byte{0x03}); err != nil {
		t.Fatal(err)
	}
	if r := <-ended; r.err != nil || r.code != 7 || !strings.Contains(out.String(), "interrupted") {
		t.Errorf("Run() = %d, %v with %q, want 7 after an interrupt", r.code, r.err, out.String())
	}
}

// TestShellEndOfInputOnTerminal: who closes the window leaves no program waiting for him.
func TestShellEndOfInputOnTerminal(t *testing.T) {
	s := startAgent(t)
	var out screen
	code, err := NewShell(ShellOptions{URL: s.url}).Run(t.Context(), Command{
		Args: []string{"sh", "-c", "cat; exit 4"}, Terminal: &WindowSize{Cols: 80, Rows: 24}, Stdin: strings.NewReader("last words\n"), Stdout: &out,
	})
	if err != nil || code != 4 || !strings.Contains(out.String(), "last words") {
		t.Errorf("Run() = %d, %v with %q, want 4", code, err, out.String())
	}
}

func TestShellPassesSignalsOn(t *testing.T) {
	s := startAgent(t)
	signals := make(chan syscall.Signal)
	var out screen
	ended := make(chan int, 1)
	go func() {
		code, err := NewShell(ShellOptions{URL: s.url}).Run(t.Context(), Command{
			Args:    []string{"sh", "-c", "trap 'echo got it' TERM; echo ready; while :; do sleep 0.1; done"},
			Signals: signals, Stdout: &out,
		})
		if err != nil {
			t.Errorf("Run() = %v", err)
		}
		ended <- code
	}()
	out.await(t, "ready")
	signals <- syscall.SIGTERM
	out.await(t, "got it")
	signals <- syscall.SIGKILL
	if code := <-ended; code != 128+9 {
		t.Errorf("Run() = %d, want %d", code, 128+9)
	}
}

// brokenPipe is an output that nobody reads.
type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, syscall.EPIPE }

func TestShellEndsWhatNobodyReads(t *testing.T) {
	s := startAgent(t)
	_, err := NewShell(ShellOptions{URL: s.url}).Run(t.Context(), Command{Args: []string{"sh", "-c", "while :; do echo y; done"}, Stdout: brokenPipe{}})
	if !errors.Is(err, syscall.EPIPE) {
		t.Errorf("Run() = %v, want EPIPE", err)
	}
	eventually(t, "the program has ended", func() bool {
		list, err := s.process.List(t.Context(), connect.NewRequest(&process.ListRequest{}))
		return err == nil && len(list.Msg.GetProcesses()) == 0
	})
}

// TestShellLosesTheSandbox: an edge that answers for a sandbox which is gone, and a stream that breaks off.
func TestShellLosesTheSandbox(t *testing.T) {
	edge := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("E2b-Sandbox-Id") != "i1" || r.Header.Get("E2b-Sandbox-Port") != "49983" || r.Header.Get("X-Access-Token") != "secret" {
			t.Errorf("header %v", r.Header)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadGateway)
		_, _ = io.WriteString(w, `{"sandboxId":"i1","message":"The sandbox was not found","code":502}`)
	}))
	defer edge.Close()
	_, err := NewShell(ShellOptions{URL: edge.URL, Sandbox: "i1", Token: "secret"}).Run(t.Context(), Command{Args: []string{"true"}})
	if !Unreachable(err) {
		t.Errorf("Run() = %v, want unreachable", err)
	}
	s := startAgent(t)
	ctx, cancel := context.WithCancel(t.Context())
	var out screen
	ended := make(chan error, 1)
	go func() {
		_, err := NewShell(ShellOptions{URL: s.url}).Run(ctx, Command{Args: []string{"sh", "-c", "echo ready; exec sleep 1000"}, Stdout: &out})
		ended <- err
	}()
	out.await(t, "ready")
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) && connect.CodeOf(err) != connect.CodeCanceled {
		t.Errorf("Run() = %v, want canceled", err)
	}
}

func TestExitCodeOf(t *testing.T) {
	message := func(code int32, status string) *process.ProcessEvent_EndEvent {
		return &process.ProcessEvent_EndEvent{ExitCode: code, Exited: code >= 0, Status: status}
	}
	for want, end := range map[int]*process.ProcessEvent_EndEvent{
		0:        message(0, "exit status 0"),
		42:       message(42, "exit status 42"),
		128 + 11: message(-1, "signal: "+syscall.SIGSEGV.String()),
		128 + 6:  message(-1, "signal: "+syscall.SIGABRT.String()+" (core dumped)"),
		255:      message(-1, "signal: of the future"),
	} {
		if got := exitCodeOf(end); got != want {
			t.Errorf("exitCodeOf(%v) = %d, want %d", end, got, want)
		}
	}
}
