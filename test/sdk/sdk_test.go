// Package sdk runs the unmodified E2B SDKs against Sluice: every program in js and python must run as written, over https with
// the development CA, inside the network laboratory.
package sdk

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/lab"
)

const (
	domain = "sbx.localhost"

	// programTime bounds one program, startTime one daemon; both are many times what they take.
	programTime = 4 * time.Minute
	startTime   = time.Minute
)

// binaries builds the programs once for all tests.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "sluice-bin-")
	if err != nil {
		return "", err
	}
	build := exec.Command("go", "build", "-o", dir+"/", "../../cmd/sluice", "../../cmd/edge", "../../cmd/orchestrator", "../../cmd/guestd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // guestd must be static, the others are as released
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := binaries(); err == nil {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// language is one SDK: how its programs are run, and what is missing when they cannot be.
type language struct {
	name, dir, ext, interpreter string
	programs                    []string
	missing                     string
}

func languages(t *testing.T) []language {
	t.Helper()
	js := language{name: "js", dir: "js", ext: ".mjs", programs: []string{"a_listing", "b_token", "c_mask", "d_egress", "e_update", "f_surface"}}
	if node, err := exec.LookPath("node"); err != nil {
		js.missing = "node is not installed"
	} else if js.interpreter = node; !exists("js/node_modules/e2b") {
		js.missing = "the SDKs are not installed: npm ci --prefix test/sdk/js, or make test"
	}
	py := language{name: "python", dir: "python", ext: ".py", programs: []string{"a_listing", "b_token", "f_surface"}}
	venv, err := filepath.Abs("../../.build/venv/bin/python")
	if err != nil {
		t.Fatal(err)
	}
	if py.interpreter = venv; !exists(venv) {
		py.missing = "the SDK is not installed: make test makes .build/venv"
	}
	return []language{js, py}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// TestPrograms runs programs a to f against `sluice dev`.
func TestPrograms(t *testing.T) {
	l := lab.New(t)
	l.Name("*."+domain, netip.MustParseAddr("127.0.0.1"))
	env := startDev(t, l)
	for _, lang := range languages(t) {
		for _, program := range lang.programs {
			t.Run(lang.name+"/"+program, func(t *testing.T) {
				if lang.missing != "" {
					t.Skip(lang.missing)
				}
				runProgram(t, l, lang, program, env, nil)
			})
		}
	}
	for _, trap := range lab.Traps {
		if hits := l.Hits(trap); len(hits) > 0 {
			t.Errorf("a sandbox reached %s: %v", trap, hits)
		}
	}
}

// startDev starts `sluice dev` in the laboratory and returns the environment of its clients.
func startDev(t *testing.T, l *lab.Lab) []string {
	t.Helper()
	state := t.TempDir()
	_, lines := startDaemon(t, l, "sluice", "dev", "-domain", domain, "-http", "127.0.0.1:80", "-https", "127.0.0.1:443",
		"-state-dir", state, "-network-name", l.Prefix(), "-log-level", "info")
	var key string
	wait(t, "sluice dev to be ready", lines, func(line string) bool {
		if value, ok := strings.CutPrefix(line, "export E2B_API_KEY="); ok {
			key = value
		}
		return strings.HasPrefix(line, "# Try it")
	})
	return clientEnv(key, filepath.Join(state, "ca", "ca.pem"))
}

func clientEnv(key, caFile string) []string {
	return append(os.Environ(),
		"E2B_API_KEY="+key,
		"E2B_DOMAIN="+domain,
		"NODE_EXTRA_CA_CERTS="+caFile,
		"SSL_CERT_FILE="+caFile,
		"SLUICE_CA_FILE="+caFile,
		"LAB_HTTP_PORT=80",
		fmt.Sprintf("LAB_UDP_PORT=%d", lab.PortEcho),
		fmt.Sprintf("LAB_STREAM_PORT=%d", lab.PortStream),
	)
}

// runProgram runs one program to its end. It must exit with 0; what it printed is shown in any case. A program that says
// `please: X` on a line waits until ask has done X.
func runProgram(t *testing.T, l *lab.Lab, lang language, program string, env []string, ask func(what string)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), programTime)
	defer cancel()
	cmd := l.Host.Command(ctx, lang.interpreter, program+lang.ext)
	dir, err := filepath.Abs(lang.dir)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Dir, cmd.Env = dir, append(env, "PYTHONDONTWRITEBYTECODE=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	for line := range start(t, program, cmd) {
		if what, ok := strings.CutPrefix(line, "please: "); ok {
			ask(what)
			fmt.Fprintf(in, "done %s\n", what)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s: %v", program+lang.ext, err)
	}
}

// start starts cmd and returns the lines of its output, which also go to the test's log.
func start(t *testing.T, name string, cmd *lab.Cmd) <-chan string {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = &logWriter{t: t, name: name}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	lines := make(chan string, 1024)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			t.Logf("%s: %s", name, s.Text())
			lines <- s.Text()
		}
	}()
	return lines
}

// startDaemon starts a program that runs until the test ends. Then it gets the signal of Ctrl-C, and must end cleanly.
func startDaemon(t *testing.T, l *lab.Lab, name string, args ...string) (*lab.Cmd, <-chan string) {
	t.Helper()
	bin, err := binaries()
	if err != nil {
		t.Fatalf("build: %v", err)
	}
	cmd := l.Host.Command(context.Background(), filepath.Join(bin, name), args...) // the test's context ends before its cleanup
	lines := start(t, name, cmd)
	t.Cleanup(func() {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Errorf("interrupt %s: %v", name, err)
		}
		kill := time.AfterFunc(startTime, func() { _ = cmd.Process.Kill() }) // then Wait says so
		defer kill.Stop()
		for range lines {
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s after an interrupt: %v, want a clean end", name, err)
		}
	})
	return cmd, lines
}

// wait reads lines until one satisfies done.
func wait(t *testing.T, what string, lines <-chan string, done func(string) bool) {
	t.Helper()
	timeout := time.After(startTime)
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				t.Fatalf("waiting for %s: the program ended", what)
			}
			if done(line) {
				return
			}
		case <-timeout:
			t.Fatalf("waiting for %s: not within %v", what, startTime)
		}
	}
}

// logWriter writes a program's complaints into the test's log.
type logWriter struct {
	t    *testing.T
	name string
}

func (w *logWriter) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		w.t.Logf("%s: %s", w.name, strings.TrimRight(line, "\n"))
	}
	return len(b), nil
}
