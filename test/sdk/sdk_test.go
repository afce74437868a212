// Package sdk runs the unmodified E2B SDKs against Sluice: every program in js and python must run as written, over https with
// the development CA, inside the network laboratory.
package sdk

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/internal/testkit"
)

const (
	domain = "sbx.localhost"

	// programTime bounds one program, startTime a server's start; both are many times what they take.
	programTime = 4 * time.Minute
	startTime   = time.Minute
)

// language is one SDK: how its programs are run, and what is missing when they cannot be.
type language struct {
	name, dir, ext, interpreter string
	programs                    []string
	time                        time.Duration // for one of them; zero is programTime
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
	testkit.Program(t, "guestd") // beside it
	dev := l.Host.Daemon(t, nil, testkit.Program(t, "sluice"), "dev", "-machine", "namespace", "-domain", domain, "-http", "127.0.0.1:80", "-https", "127.0.0.1:443",
		"-state-dir", state, "-network-name", l.Prefix(), "-log-level", "info")
	var key string
	dev.Await(t, "the API key", lab.Value(&key, "export E2B_API_KEY="))
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
	ctx, cancel := context.WithTimeout(t.Context(), cmp.Or(lang.time, programTime))
	defer cancel()
	cmd := l.Host.Command(ctx, lang.interpreter, program+lang.ext)
	dir, err := filepath.Abs(lang.dir)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Dir, cmd.Env = dir, append(slices.Clone(env), "PYTHONDONTWRITEBYTECODE=1")
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
