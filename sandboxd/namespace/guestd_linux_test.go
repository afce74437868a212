package namespace

import (
	"context"
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

// The real agent runs as the first process: it answers on its control socket and on its port, runs programs as the users
// of the image, and collects orphans.
func TestGuestd(t *testing.T) {
	needRoot(t)
	m, err := New(Config{GuestdPath: buildGuestd(t), StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	b := startBox(t, m)
	inside := func(argv ...string) string {
		t.Helper()
		out, err := exec.Command("nsenter", append([]string{"--net=" + b.spec.NetNS}, argv...)...).CombinedOutput()
		if err != nil {
			t.Errorf("%q: %v: %s", argv, err, out)
		}
		return string(out)
	}
	health := func(want string) {
		t.Helper()
		if out := inside("curl", "-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:49983/health"); out != want {
			t.Errorf("health on the port = %q, want %s", out, want)
		}
	}
	health("503")
	b.init()
	health("204")
	start := `{"process":{"cmd":"/bin/bash","args":["-c","id -un; pwd; (sleep 0.01 &) ; python -c 'print(6*7)'"]},"stdin":false}`
	for user, home := range map[string]string{"user": "/home/user", "root": "/root"} {
		// The Connect envelope: a flag byte and four of length.
		body := filepath.Join(t.TempDir(), "body")
		if err := os.WriteFile(body, append([]byte{0, 0, 0, 0, byte(len(start))}, start...), 0o600); err != nil {
			t.Fatal(err)
		}
		out := inside("curl", "-s", "-m", "10", "-u", user+":", "-H", "Content-Type: application/connect+json", "--data-binary", "@"+body,
			"http://127.0.0.1:49983/process.Process/Start")
		if !strings.Contains(out, "end") || !strings.Contains(out, "data") {
			t.Errorf("process as %s in %s: %q", user, home, out)
		}
	}
	b2, err := os.ReadFile(filepath.Join(b.spec.Dir, logName))
	if err != nil || strings.Contains(string(b2), "panic") {
		t.Errorf("guestd's log: %s, %v", b2, err)
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
