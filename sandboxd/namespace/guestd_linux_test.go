package namespace

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// buildGuestd is the real agent.
func buildGuestd(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sluice-guestd-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "guestd"), "../../cmd/guestd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build guestd: %v: %s", err, out)
	}
	return filepath.Join(dir, "guestd")
}

// inside runs a program of the host in the sandbox's network.
func (b *box) inside(argv ...string) string {
	b.t.Helper()
	out, err := exec.Command("nsenter", append([]string{"--net=" + b.spec.NetNS}, argv...)...).CombinedOutput()
	if err != nil {
		b.t.Errorf("%q: %v: %s", argv, err, out)
	}
	return string(out)
}

// start runs a shell line by a real guestd, and returns the events until it ended.
func (b *box) start(user, line string) string {
	b.t.Helper()
	message, err := json.Marshal(map[string]any{"process": map[string]any{"cmd": "/bin/bash", "args": []string{"-c", line}}, "stdin": false})
	if err != nil {
		b.t.Fatal(err)
	}
	// The Connect envelope: a flag byte and four of length.
	body := filepath.Join(b.t.TempDir(), "body")
	if err := os.WriteFile(body, append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...), 0o600); err != nil {
		b.t.Fatal(err)
	}
	return b.inside("curl", "-s", "-m", "60", "-u", user+":", "-H", "Content-Type: application/connect+json", "--data-binary", "@"+body,
		"http://127.0.0.1:49983/process.Process/Start")
}

// The real agent runs as the first process: it answers on its control socket and on its port, runs programs as the users
// of the image, and collects orphans.
func TestGuestd(t *testing.T) {
	needRoot(t)
	m, err := New(Config{GuestdPath: buildGuestd(t), StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	b := startBox(t, m)
	health := func(want string) {
		t.Helper()
		if out := b.inside("curl", "-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:49983/health"); out != want {
			t.Errorf("health on the port = %q, want %s", out, want)
		}
	}
	health("503")
	b.init()
	health("204")
	for _, user := range []string{"user", "root"} {
		out := b.start(user, "id -un; pwd; (sleep 0.01 &) ; python -c 'print(6*7)'")
		if !strings.Contains(out, "end") || !strings.Contains(out, "data") {
			t.Errorf("process as %s: %q", user, out)
		}
	}
	if said := lastSaid(b.p.log); strings.Contains(said, "panic") || !strings.Contains(said, "initialized") {
		t.Errorf("guestd's log: %s", said)
	}
}

// What takes all memory is killed for it, and not the agent, which is small but larger than each of many.
func TestAgentOutlivesMemoryHogs(t *testing.T) {
	needRoot(t)
	m, err := New(Config{GuestdPath: buildGuestd(t), StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if !m.cgroups.Plan("x", Limits{}).Has("memory") {
		t.Skipf("this host gives no memory cgroup: %v", m.Limitations())
	}
	b := startBox(t, m, func(s *Spec) { s.Limits.MemoryMiB = 128 })
	b.init()
	if out := b.start("user", "head -c 3 /proc/self/oom_score_adj > /tmp/score; (cat /proc/self/oom_score_adj >> /tmp/score); grep -q ^500500 /tmp/score || exit 7"); strings.Contains(out, "exit status 7") {
		t.Errorf("a process of a user is not the first to be killed: %s", out)
	}
	for _, line := range []string{
		"python3 -c 'b = bytearray(1 << 30)'",
		// Many small ones: the first that is killed ends the test.
		`python3 -c '
import os, time
for _ in range(100):
    if os.fork() == 0:
        b = bytearray(4 << 20)
        time.sleep(600)
os.wait()'; pkill python3`,
		"for d in /tmp /dev/shm /run/lock; do head -c 1G /dev/zero > $d/full; done",
		"python3 -c 'b = bytearray(1 << 30)'",
	} {
		if out := b.start("user", line); !strings.Contains(out, "end") {
			t.Errorf("%s: %q", line, out)
		}
		if err := answersHTTP(t.Context(), b.spec.controlSocket()); err != nil {
			t.Fatalf("after %s: %v, sandbox: %v", line, err, b.p.Err())
		}
	}
}

// TestStartTime reports; nothing depends on it.
func TestStartTime(t *testing.T) {
	m := testMachine(t)
	netns := makeNetNS(t)
	const n = 15
	took := make([]time.Duration, 0, n)
	parts := map[string][]time.Duration{}
	var order []string
	for i := range n {
		spec := testSpec(t)
		spec.NetNS = netns
		began := time.Now()
		m.SetStep(func(s string) {
			if i == 0 {
				order = append(order, s)
			}
			parts[s] = append(parts[s], time.Since(began))
		})
		p, err := m.Start(context.Background(), spec)
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(began))
		if err := p.Kill(context.Background()); err != nil {
			t.Fatal(err)
		}
		if err := m.Destroy(context.Background(), spec); err != nil {
			t.Fatal(err)
		}
		wantNothingLeft(t, m, spec)
	}
	t.Logf("Start: median %v, worst %v", median(took), took[n-1])
	for _, s := range order {
		t.Logf("until %-10s %v", s, median(parts[s]))
	}
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}
