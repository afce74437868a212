package namespace

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/sandboxd/cgroup"
)

const dieVariable = "SLUICE_TEST_DIE_AT"

func TestStartGivesAWholeMachine(t *testing.T) {
	b := startBox(t, testMachine(t))
	check := func(line, want string) {
		t.Helper()
		if got := b.sh(line); got != want {
			t.Errorf("%s = %q, want %q", line, got, want)
		}
	}
	check("whoami; id -u; hostname", "root\n0\nbox")
	check("echo $PPID >/dev/null; cat /proc/1/cmdline | tr '\\0' ' '", "guestd")
	check("cat /etc/hostname /etc/resolv.conf", "box\nnameserver 10.12.0.0")
	check("getent passwd user; getent passwd nobody | cut -d: -f3", "user:*:1000:1000:user:/home/user:/bin/bash\n65534")
	check("stat -c '%U:%G %a' / /usr /usr/bin/env /etc/passwd /root /home/user /tmp /var/tmp /dev/null /dev/shm /run/lock",
		strings.Join([]string{"root:root 755", "root:root 755", "root:root 755", "root:root 644", "root:root 700", "user:user 755",
			"root:root 1777", "root:root 1777", "root:root 666", "root:root 1777", "root:root 1777"}, "\n"))
	check("python -c 'print(6*7)'; python3 -c 'import ssl, json, socket; print(len(ssl.create_default_context().get_ca_certs()) > 10)'", "42\nTrue")
	check("curl --version | head -c 4; bash -c 'echo hi'", "curlhi")
	check("ls /home /opt /srv /mnt /media", "/home:\nuser\n\n/media:\n\n/mnt:\n\n/opt:\n\n/srv:")
	check("mkdir /usr/lib/new && echo x >/usr/bin/new && rm /usr/bin/env && echo ok", "ok")
	check("cat /proc/self/cgroup | cut -d: -f3 | sort -u", "/")
	check("touch /tmp/a /dev/shm/b /run/c && echo 1 >/dev/null && head -c 2 /dev/zero | wc -c && [ -c /dev/ptmx ] && echo ptmx", "2\nptmx")
	check("script -qc 'tty' /dev/null | tr -d '\\r'", "/dev/pts/0")
	check("ls /sys; ulimit -c", "0")
	if r := b.run(1000, "/bin/bash", "-c", "id -un; echo x >/home/user/f && cat /home/user/f; touch /usr/x || echo refused"); r.Out != "user\nx\ntouch: cannot touch '/usr/x': Permission denied\nrefused\n" {
		t.Errorf("as user: %q", r.Out)
	}
	if _, err := os.Stat("/usr/bin/env"); err != nil {
		t.Error("the host's file is gone")
	}
	if said := lastSaid(b.p.log); said != "agent listens" {
		t.Errorf("log: %q", said)
	}
}

func TestLimitsAreEnforced(t *testing.T) {
	m := testMachine(t)
	if len(m.cgroups.Base) < len(cgroup.Controllers) {
		t.Skipf("this host gives no cgroups with limits: %v", m.Limitations())
	}
	b := startBox(t, m, func(s *Spec) { s.Limits.MemoryMiB = 96 })
	neighbour := startBox(t, m)

	if r := b.run(0, "self", "hog", "300"); !strings.Contains(r.Err, "killed") {
		t.Errorf("memory hog: %+v, want it killed", r)
	}
	if out := b.sh("echo alive"); out != "alive" {
		t.Errorf("sandbox after its memory hog: %q", out)
	}
	r := b.run(0, "python3", "-c", `
import os, signal, time
pids = []
try:
    for _ in range(300):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        pids.append(pid)
except OSError as e:
    print(e.strerror, 64 < len(pids) < 128)
for p in pids:
    os.kill(p, signal.SIGKILL)`)
	if r.Out != "Resource temporarily unavailable True\n" {
		t.Errorf("300 processes with a limit of 128: %+v", r)
	}
	if out := neighbour.sh("echo alive"); out != "alive" {
		t.Errorf("neighbour: %q", out)
	}
	for _, f := range m.cgroups.Plan(b.spec.cgroupName(), b.spec.Limits).Files {
		got, err := os.ReadFile(f[0])
		if err != nil || strings.TrimSpace(string(got)) != f[1] {
			t.Errorf("%s = %q, %v, want %s", f[0], got, err, f[1])
		}
	}
}

// A program that somebody inside has made set-user-id is not for the users of the host, nor is anything else in there.
func TestHostUsersSeeNothingOfASandbox(t *testing.T) {
	b := startBox(t, testMachine(t), func(s *Spec) {
		// The worst that whoever makes the directories may do.
		if err := errors.Join(os.Chmod(filepath.Dir(s.Dir), 0o755), os.Mkdir(s.Dir, 0o755), os.Chmod(s.Dir, 0o755)); err != nil {
			t.Fatal(err)
		}
	})
	b.sh("cp /bin/true /home/user/tool && chmod 4777 /home/user /home/user/tool")
	tool := filepath.Join(b.spec.Dir, rwName, "root/home/user/tool")
	if _, err := os.Stat(tool); err != nil {
		t.Fatal(err)
	}
	for _, argv := range [][]string{{tool}, {"/bin/cat", tool}, {"/bin/ls", b.spec.Dir}, {"/bin/ls", filepath.Join(b.spec.Dir, rwName)}, {"/bin/ls", filepath.Join(b.spec.Dir, stageName)}} {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54321}}
		if out, err := cmd.CombinedOutput(); err == nil {
			t.Errorf("%q by another user of the host succeeds: %s", argv, out[:min(len(out), 100)])
		}
	}
}

// The log is all of the host that a sandbox may come to hold: it does not grow, and is no file.
func TestLogIsBounded(t *testing.T) {
	write, read, err := openLog()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	n, err := write.Write(bytes.Repeat([]byte("x"), 1<<20))
	if err == nil || n > maxLog {
		t.Errorf("wrote %d bytes, %v", n, err)
	}
	if err := write.Truncate(1 << 30); err == nil {
		t.Error("it can be made larger")
	}
	if _, err := write.WriteAt([]byte("y"), maxLog); err == nil {
		t.Error("it can be written behind its end")
	}
	if said := lastSaid(read); said != strings.Repeat("x", maxSaid) {
		t.Errorf("last said %q", said)
	}
	if name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", write.Fd())); err != nil || !strings.HasPrefix(name, "/memfd:") {
		t.Errorf("it lies at %q, %v", name, err)
	}
}

func TestProcessEnds(t *testing.T) {
	m := testMachine(t)
	b := startBox(t, m)
	if err := b.p.Err(); err != nil {
		t.Errorf("Err of a running sandbox = %v", err)
	}
	if err := b.p.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := b.p.Commit(); err != nil {
		t.Errorf("second Commit: %v", err)
	}
	if err := b.p.Kill(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-b.p.Done()
	if err := b.p.Err(); err == nil || !strings.Contains(err.Error(), "SIGKILL") || !strings.Contains(err.Error(), "agent listens") {
		t.Errorf("Err = %v, want SIGKILL and the agent's last words", err)
	}
	if err := b.p.Kill(context.Background()); err != nil {
		t.Errorf("second Kill: %v", err)
	}
	if _, err := m.Adopt(context.Background(), b.spec, b.p.Handle()); err == nil {
		t.Error("Adopt of a dead sandbox succeeds")
	}
}

func TestAdopt(t *testing.T) {
	m := testMachine(t)
	b := startBox(t, m)
	if err := b.p.Commit(); err != nil {
		t.Fatal(err)
	}
	p, err := m.Adopt(context.Background(), b.spec, b.p.Handle())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Release(); err != nil {
		t.Fatal(err)
	}
	if out := b.sh("echo alive"); out != "alive" {
		t.Errorf("after Release: %q", out)
	}
	h := b.p.Handle()
	h.PID, h.StartTime = os.Getpid(), 0
	if _, err := m.Adopt(context.Background(), b.spec, h); err == nil {
		t.Error("Adopt takes this process for a sandbox")
	}
	h = b.p.Handle()
	h.StartTime++
	if _, err := m.Adopt(context.Background(), b.spec, h); err == nil {
		t.Error("Adopt takes a later process with the same number for the sandbox")
	}
}

func TestDestroyFindsSurvivorsAndSparesOthers(t *testing.T) {
	m := testMachine(t)
	b := startBox(t, m)
	other := startBox(t, m)
	if err := b.p.Commit(); err != nil {
		t.Fatal(err)
	}
	// An operator's shell in the same network namespace is not the sandbox's.
	shell := exec.Command("nsenter", "--net="+b.spec.NetNS, "sleep", "60")
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { shell.Process.Kill(); shell.Wait() }()
	for range 2 {
		if err := m.Destroy(context.Background(), b.spec); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-b.p.Done():
	case <-time.After(10 * time.Second):
		t.Error("Done is not closed after Destroy")
	}
	if err := shell.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("Destroy killed a stranger in the namespace: %v", err)
	}
	if out := other.sh("echo alive"); out != "alive" {
		t.Errorf("another sandbox after Destroy: %q", out)
	}
	shell.Process.Kill()
	shell.Wait()
}

func TestStartFailsCleanly(t *testing.T) {
	m := testMachine(t)
	bad := testSpec(t)
	bad.NetNS = filepath.Join(t.TempDir(), "absent")
	if _, err := m.Start(context.Background(), bad); err == nil {
		t.Error("Start without its network namespace succeeds")
	}
	wantNothingLeft(t, m, bad)

	ctx, cancel := context.WithCancel(context.Background())
	m.SetStep(func(s string) {
		if s == "cloned" {
			cancel()
		}
	})
	spec := testSpec(t)
	spec.NetNS = makeNetNS(t)
	if _, err := m.Start(ctx, spec); err == nil {
		t.Error("Start with a cancelled context succeeds")
	}
	wantNothingLeft(t, m, spec)
}

var steps = []string{
	"dirs", "cgroups", "listening", "stage one", "cloned", "mounted", "contained", "inside", "executed", "answered", "returned", "committed",
}

// dieAtStep is the daemon of TestKilledAtEveryStep: it starts the sandbox in the environment and kills itself on the way.
func dieAtStep() {
	env := os.Getenv
	step, guestd, dir, netns := env(dieVariable), env("SLUICE_TEST_GUESTD"), env("SLUICE_TEST_DIR"), env("SLUICE_TEST_NETNS")
	var base uint32
	fmt.Sscan(env("SLUICE_TEST_BASE"), &base)
	m, err := New(Config{GuestdPath: guestd, StateDir: filepath.Join(filepath.Dir(dir), "state")})
	if err != nil {
		panic(err)
	}
	die := func(s string) {
		if s == step {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	m.SetStep(die)
	p, err := m.Start(context.Background(), Spec{ID: "dying", Dir: dir, NetNS: netns, UIDBase: base, Limits: Limits{MemoryMiB: 128, Pids: 64}})
	if err != nil {
		panic(err)
	}
	die("returned")
	if err := p.Commit(); err != nil {
		panic(err)
	}
	die("committed")
}

func TestKilledAtEveryStep(t *testing.T) {
	m := testMachine(t)
	var seen []string
	m.SetStep(func(s string) { seen = append(seen, s) })
	startBox(t, m)
	m.SetStep(func(string) {})
	if !slices.Equal(seen, steps[:len(steps)-2]) {
		t.Fatalf("steps = %q", seen)
	}
	for _, step := range steps {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			spec := testSpec(t)
			spec.ID, spec.Hostname, spec.Limits = "dying", "", Limits{MemoryMiB: 128, Pids: 64}
			spec.NetNS = makeNetNS(t)
			daemon := exec.Command("/proc/self/exe")
			daemon.Env = append(os.Environ(), dieVariable+"="+step, "SLUICE_TEST_GUESTD="+testAgent(t), "SLUICE_TEST_DIR="+spec.Dir,
				"SLUICE_TEST_NETNS="+spec.NetNS, fmt.Sprintf("SLUICE_TEST_BASE=%d", spec.UIDBase))
			out, err := daemon.CombinedOutput()
			if err == nil || err.Error() != "signal: killed" {
				t.Fatalf("daemon: %v\n%s", err, out)
			}
			if step == "committed" {
				if err := answersHTTP(t.Context(), spec.controlSocket()); err != nil {
					t.Errorf("a committed sandbox does not answer after its daemon died: %v", err)
				}
			}
			if err := m.Destroy(t.Context(), spec); err != nil {
				t.Fatal(err)
			}
			wantNothingLeft(t, m, spec)
		})
	}
}

// The watchdog alone, without Destroy, ends a sandbox that nobody wrote down.
func TestUncommittedDiesWithItsDaemon(t *testing.T) {
	m := testMachine(t)
	b := startBox(t, m)
	if err := b.p.commit.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-b.p.Done():
	case <-time.After(10 * time.Second):
		t.Error("the sandbox lives on")
	}
}
