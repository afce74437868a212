package namespace

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

const rootlessVariable = "SLUICE_TEST_ROOTLESS"

// TestRootless runs itself again as a user who is nobody on this host.
func TestRootless(t *testing.T) {
	if os.Geteuid() != 0 {
		testRootless(t)
		return
	}
	const stranger = 54321
	dir, err := os.MkdirTemp("", "slrl-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, stranger, stranger); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestRootless$", "-test.v")
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "TMPDIR=" + dir, "HOME=" + dir, rootlessVariable + "=" + testAgent(t)}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: stranger, Gid: stranger}}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(out), "--- SKIP") {
		t.Skip("skipped for a user without privilege; the reason is in its output above")
	}
}

func testRootless(t *testing.T) {
	if b, err := os.ReadFile("/proc/sys/user/max_user_namespaces"); err == nil && strings.TrimSpace(string(b)) == "0" {
		t.Skip("this host forbids user namespaces: sysctl user.max_user_namespaces")
	}
	agent := os.Getenv(rootlessVariable)
	if agent == "" {
		agent = testAgent(t)
	}
	m, err := New(Config{GuestdPath: agent, StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(strings.Join(m.Limitations(), "\n"), "without root egress is off") {
		t.Errorf("Limitations = %q, want them to say what is missing without root", m.Limitations())
	}
	b := startBox(t, m, func(s *Spec) { s.UIDBase = 0 })
	check := func(line, want string) {
		t.Helper()
		if got := b.sh(line); got != want {
			t.Errorf("%s = %q, want %q", line, got, want)
		}
	}
	check("id -u; id -un; getent passwd root | cut -d: -f3; hostname", "1000\nuser\n1000\nbox")
	check("echo hi >/home/user/f && cat /home/user/f; touch /tmp/a /run/b /dev/shm/c; echo 1 >/dev/null; head -c 1 /dev/zero | wc -c", "hi\n1")
	check("python -c 'print(6*7)'; curl --version | head -c 4", "42\ncurl")
	check("script -qc tty /dev/null | tr -d '\\r'", "/dev/pts/0")
	check("python3 -c \"import socket; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname()); print('reached')\"", "reached")
	check("grep -e CapEff -e CapBnd /proc/self/status | awk '{print $2}' | uniq", "0000000000000000")
	check("grep -e NoNewPrivs -e '^Seccomp:' /proc/self/status | awk '{print $2}' | tr '\\n' ' '", "1 2")
	check("cat /proc/sys/user/max_user_namespaces /proc/sys/user/max_inotify_instances", "0\n16")
	check("ls /proc/1/fd 2>&1 | grep -c 'Permission denied'; head -c 1 /proc/1/mem 2>&1 | grep -c 'Permission denied'", "1\n1")
	check("ls -A /home; ls /proc | grep -c '^[0-9]' | awk '{print ($1 < 12)}'", "user\n1")
	check("unshare -Ur id 2>&1 | grep -c 'not permitted'; grep -c -e "+b.spec.Dir+" /proc/self/mountinfo || true", "1\n0")

	if len(m.cgroups.Base) == 0 { // what stands in for them
		if r := b.run(0, "self", "hog", "600"); r.Code == 0 {
			t.Errorf("600 MiB with a limit of 256: %+v", r)
		}
		check("ulimit -u", "128")
	}
	if err := b.p.Commit(); err != nil {
		t.Fatal(err)
	}
	p, err := m.Adopt(context.Background(), b.spec, b.p.Handle())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Release(); err != nil {
		t.Error(err)
	}
	if err := m.Destroy(context.Background(), b.spec); err != nil {
		t.Fatal(err)
	}
	<-b.p.Done()

	bad := testSpec(t)
	bad.UIDBase, bad.Template = 0, filepath.Join(t.TempDir(), "absent")
	if _, err := m.Start(context.Background(), bad); err == nil {
		t.Error("Start from a template that does not exist succeeds")
	}
}
