// Package dev tests `sluice dev` as a person uses it: what it prints, what it leaves behind, and what it can do without root.
package dev

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/internal/testkit"
)

const url = "http://127.0.0.1:8080"

// system is a `sluice dev` in a laboratory, seen through its public address.
type system struct {
	t     *testing.T
	lab   *lab.Lab
	state string
	dev   *lab.Daemon
	key   string
	http  *http.Client
}

func newSystem(t *testing.T) *system {
	t.Helper()
	l := lab.New(t)
	s := &system{t: t, lab: l, state: t.TempDir()}
	s.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return l.Host.Dial(ctx, network, addr)
		},
	}, Timeout: 30 * time.Second}
	return s
}

func (s *system) start(prepare func(*lab.Cmd), program string, extra ...string) {
	s.t.Helper()
	args := append([]string{"dev", "-machine", "namespace", "-state-dir", s.state, "-network-name", s.lab.Prefix(), "-log-level", "info"}, extra...)
	s.dev = s.lab.Host.Daemon(s.t, prepare, program, args...)
	s.dev.Await(s.t, "the API key", lab.Value(&s.key, "export E2B_API_KEY="))
	s.http.CloseIdleConnections() // of an earlier life
}

// call sends a request to the edge and returns status and body.
func (s *system) call(method, path string, header map[string]string, body string) (int, string) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, url+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	for name, value := range header {
		req.Header.Set(name, value)
	}
	if host := header["Host"]; host != "" {
		req.Host = host
	}
	resp, err := s.http.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

type sandbox struct{ SandboxID, EnvdAccessToken string }

func (s *system) create() (sb sandbox) {
	s.t.Helper()
	status, body := s.call("POST", "/v2/sandboxes", map[string]string{"X-API-Key": s.key, "Content-Type": "application/json"}, `{"templateID":"base"}`)
	if err := json.Unmarshal([]byte(body), &sb); status != http.StatusCreated || err != nil {
		s.t.Fatalf("create = %d %s, %v", status, body, err)
	}
	return sb
}

// run runs a shell command in the sandbox and returns the raw events.
func (s *system) run(sb sandbox, script string) string {
	s.t.Helper()
	message, err := json.Marshal(map[string]any{"process": map[string]any{"cmd": "/bin/bash", "args": []string{"-c", script}}, "stdin": false})
	if err != nil {
		s.t.Fatal(err)
	}
	var envelope bytes.Buffer
	envelope.Write([]byte{0, byte(len(message) >> 24), byte(len(message) >> 16), byte(len(message) >> 8), byte(len(message))})
	envelope.Write(message)
	status, body := s.call("POST", "/process.Process/Start", map[string]string{
		"E2b-Sandbox-Id": sb.SandboxID, "E2b-Sandbox-Port": "49983", "X-Access-Token": sb.EnvdAccessToken,
		"Content-Type": "application/connect+json", "Connect-Protocol-Version": "1",
	}, envelope.String())
	if status != http.StatusOK {
		s.t.Fatalf("run %q = %d %s", script, status, body)
	}
	return body
}

// serves starts a web server in the sandbox and waits until it answers under its public name.
func (s *system) serves(sb sandbox) {
	s.t.Helper()
	s.run(sb, "cd /tmp && setsid python3 -m http.server 3000 --bind 127.0.0.1 >/dev/null 2>&1 &")
	s.awaitStatus(sb, http.StatusOK)
}

func (s *system) awaitStatus(sb sandbox, want int) {
	s.t.Helper()
	host := fmt.Sprintf("3000-%s.sluice.localhost", sb.SandboxID)
	deadline := time.Now().Add(20 * time.Second)
	for {
		status, body := s.call("GET", "/", map[string]string{"Host": host}, "")
		if status == want {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("GET %s = %d %s, want %d", host, status, body, want)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// left lists what the system has on its host: processes in sandboxes, devices, rules, records.
func (s *system) left() string {
	s.t.Helper()
	out, err := s.lab.Host.Command(s.t.Context(), "sh", "-c", `
		ls /run/netns 2>/dev/null
		ip -o link | grep -v ': lo:' | grep `+s.lab.Prefix()+`
		cat /proc/sys/net/ipv4/ip_forward | grep -v 0
		ls `+s.state+`/sandboxes 2>/dev/null
		grep `+s.state+` /proc/self/mounts
		for p in /proc/[0-9]*; do
			case "$(cat $p/comm 2>/dev/null)" in sh|grep|cat) continue ;; esac
			grep -saF `+s.state+` $p/cmdline
		done
		nft list tables 2>/dev/null
		true`).Output()
	if err != nil {
		s.t.Fatalf("list what is left: %v", err)
	}
	return strings.TrimSpace(string(out))
}

func TestInterruptLeavesNothing(t *testing.T) {
	s := newSystem(t)
	before := s.left()
	testkit.Program(t, "guestd")
	s.start(nil, testkit.Program(t, "sluice"))
	for range 2 {
		s.serves(s.create())
	}
	if s.left() == before {
		t.Fatal("two sandboxes leave no trace while they run: the check sees nothing")
	}
	if err := s.dev.Interrupt(t); err != nil {
		t.Errorf("after an interrupt: %v", err)
	}
	if after := s.left(); after != before {
		t.Errorf("left after Ctrl-C:\n%s\nbefore:\n%s", after, before)
	}
}

// A sandbox that was running when the system was killed is running again when it is back, under the same name.
func TestKilledSystemFindsItsSandboxes(t *testing.T) {
	s := newSystem(t)
	testkit.Program(t, "guestd")
	program := testkit.Program(t, "sluice")
	s.start(nil, program)
	sb := s.create()
	s.serves(sb)
	s.dev.Kill(t)
	before := s.key
	s.start(nil, program)
	if s.key != before {
		t.Error("the API key is another one after a restart: what was exported in other terminals is not true any more")
	}
	s.awaitStatus(sb, http.StatusOK)
	if status, body := s.call("GET", "/sandboxes/"+sb.SandboxID, map[string]string{"X-API-Key": s.key}, ""); status != http.StatusOK {
		t.Errorf("GET the sandbox = %d %s, want 200", status, body)
	}
	if status, body := s.call("DELETE", "/sandboxes/"+sb.SandboxID, map[string]string{"X-API-Key": s.key}, ""); status != http.StatusNoContent {
		t.Errorf("DELETE the sandbox = %d %s, want 204", status, body)
	}
	s.awaitStatus(sb, http.StatusBadGateway)
}

// TestOperatorCommands is a person with two terminals: the system in one, and in the other what it says to paste, and then commands.
func TestOperatorCommands(t *testing.T) {
	s := newSystem(t)
	testkit.Program(t, "guestd")
	program := testkit.Program(t, "sluice")
	s.start(nil, program)
	sb := s.create()
	for _, step := range []struct {
		input string
		line  []string
		code  int
		out   string // in what it prints
	}{
		{"", []string{"ls"}, 0, sb.SandboxID + "  base "},
		{"", []string{"ls", "-q", "-state", "paused"}, 0, ""},
		{"", []string{"ls", "-json"}, 0, `"sandboxID": "` + sb.SandboxID + `"`},
		{"", []string{"inspect", sb.SandboxID}, 0, "<port>-" + sb.SandboxID + ".sluice.localhost"},
		{"", []string{"exec", sb.SandboxID, "--", "sh", "-c", "id -un; exit 7"}, 7, "user\n"},
		{"typed", []string{"exec", "-i", "-user", "root", sb.SandboxID, "sh", "-c", "id -un; cat"}, 0, "root\ntyped"},
		{"", []string{"exec", "-it", sb.SandboxID, "bash"}, 1, "-t wants its input to be a terminal"},
		{"", []string{"logs", sb.SandboxID}, 0, ""},
		{"", []string{"pause", sb.SandboxID}, 1, "the namespace machine of this node has no snapshots"},
		{"", []string{"resume", sb.SandboxID, "-timeout", "1h"}, 0, sb.SandboxID + " running (it was not paused)"},
		{"", []string{"kill", sb.SandboxID}, 0, sb.SandboxID + " killed"},
		{"", []string{"exec", sb.SandboxID, "true"}, 1, "doesn't exist or you don't have access to it"},
	} {
		cmd := s.lab.Host.Command(t.Context(), program, step.line...)
		cmd.Env = append(os.Environ(), "E2B_API_KEY="+s.key, "E2B_API_URL="+url, "E2B_SANDBOX_URL="+url)
		cmd.Stdin = strings.NewReader(step.input)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // its exit code says it
		if code := cmd.ProcessState.ExitCode(); code != step.code || !strings.Contains(out.String(), step.out) {
			t.Errorf("sluice %v = %d with %q, want %d with %q", step.line, code, out.String(), step.code, step.out)
		}
	}
}

func TestTakenPortIsSaidInOneLine(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	testkit.Program(t, "guestd")
	cmd := exec.Command(testkit.Program(t, "sluice"), "dev", "-http", ln.Addr().String(), "-state-dir", t.TempDir())
	out, err := cmd.CombinedOutput()
	if err == nil || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), ln.Addr().String()+" is taken") {
		t.Errorf("sluice dev on a taken port: %v\n%s\nwant one line that says so", err, out)
	}
}

// TestWithoutRoot runs everything as an ordinary user: sandboxes can be reached, cannot get out, and the greeting says so.
func TestWithoutRoot(t *testing.T) {
	s := newSystem(t)
	const uid = 54321
	dir := t.TempDir()
	for d := dir; d != "/tmp" && d != "/"; d = filepath.Dir(d) { // the user must come through
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"sluice", "guestd"} {
		data, err := os.ReadFile(testkit.Program(t, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s.state = filepath.Join(dir, "state")
	if err := os.Mkdir(s.state, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(s.state, uid, uid); err != nil {
		t.Fatal(err)
	}
	var note string
	asUser := func(cmd *lab.Cmd) {
		cmd.Dir = "/"
		cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + s.state}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	args := []string{"dev", "-state-dir", s.state, "-log-level", "info"}
	s.dev = s.lab.Host.Daemon(t, asUser, filepath.Join(dir, "sluice"), args...)
	s.dev.Await(t, "a note that egress is off", func(line string) bool {
		if strings.HasPrefix(line, "# note:") && strings.Contains(line, "root") {
			note = line
		}
		return lab.Value(&s.key, "export E2B_API_KEY=")(line)
	})
	if !strings.Contains(note, "egress") {
		t.Errorf("the greeting's note about root = %q, want it to say that egress is off", note)
	}
	sb := s.create()
	s.serves(sb)
	if out := s.run(sb, "curl -s -m 3 http://1.1.1.1/ && echo reached || true"); strings.Contains(out, "stdout") {
		t.Errorf("curl from a sandbox without root printed %s, want nothing: there is no way out", out)
	}
	if hits := s.lab.Hits(lab.Internet[0]); len(hits) != 0 {
		t.Errorf("a sandbox without root reached the internet: %v", hits)
	}
	if err := s.dev.Interrupt(t); err != nil {
		t.Errorf("after an interrupt: %v", err)
	}
	if entries, err := os.ReadDir(filepath.Join(s.state, "sandboxes")); err != nil || len(entries) != 0 {
		t.Errorf("left in the state directory: %v, %v", entries, err)
	}
}
