package namespace

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/pidfd"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestMain(m *testing.M) {
	MaybeInit()
	if os.Getenv(dieVariable) != "" {
		dieAtStep()
	}
	flag.Parse()
	code := m.Run()
	if agentDir != "" {
		os.RemoveAll(agentDir)
	}
	os.Exit(code)
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; run with -update and read the diff. Got:\n%s", file, got)
	}
}

var (
	agentOnce sync.Once
	agentDir  string
	agentErr  error
)

// testAgent builds the stand-in for guestd once.
func testAgent(t testing.TB) string {
	t.Helper()
	agentOnce.Do(func() {
		if agentDir, agentErr = os.MkdirTemp("", "sluice-agent-"); agentErr != nil {
			return
		}
		agentErr = os.Chmod(agentDir, 0o755)
		cmd := exec.Command("go", "build", "-o", filepath.Join(agentDir, "agent"), "./testdata/agent")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			agentErr = fmt.Errorf("build agent: %w: %s", err, out)
		}
	})
	if agentErr != nil {
		t.Fatal(agentErr)
	}
	return filepath.Join(agentDir, "agent")
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: run the tests as root, or in a privileged container")
	}
}

// makeNetNS is a network namespace with a loopback and a dummy interface, owned by the host as netdev's are.
func makeNetNS(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is thrown away
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := loopbackUp(); err != nil {
				return err
			}
			return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
		}()
	}()
	if err := <-done; err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount network namespace: %v", err)
		}
	})
	return path
}

var nextBase = struct {
	sync.Mutex
	n uint32
}{n: 2_000_000 - 2_000_000%idCount}

func testSpec(t testing.TB) Spec {
	t.Helper()
	dir, err := os.MkdirTemp("", "slns-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	nextBase.Lock()
	nextBase.n += idCount
	base := nextBase.n
	nextBase.Unlock()
	return Spec{
		ID: "t" + filepath.Base(dir)[5:], Dir: filepath.Join(dir, "sb"), UIDBase: base, Hostname: "box",
		Limits: Limits{MemoryMiB: 256, CPUs: 1, Pids: 128}, Resolv: []string{"10.12.0.0"},
	}
}

func testMachine(t testing.TB) *Machine {
	t.Helper()
	needRoot(t)
	m, err := New(Config{GuestdPath: testAgent(t), StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// box is a running sandbox of a test.
type box struct {
	t    testing.TB
	m    *Machine
	spec Spec
	p    *Process
}

func startBox(t testing.TB, m *Machine, edit ...func(*Spec)) *box {
	t.Helper()
	spec := testSpec(t)
	if !m.cfg.Rootless {
		spec.NetNS = makeNetNS(t)
	}
	for _, e := range edit {
		e(&spec)
	}
	p, err := m.Start(context.Background(), spec)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	b := &box{t: t, m: m, spec: spec, p: p}
	t.Cleanup(b.destroy)
	return b
}

func (b *box) destroy() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := b.p.Kill(ctx); err != nil {
		b.t.Errorf("Kill: %v", err)
	}
	if err := b.m.Destroy(ctx, b.spec); err != nil {
		b.t.Errorf("Destroy: %v", err)
	}
	wantNothingLeft(b.t, b.m, b.spec)
}

type agentReply struct {
	Out  string
	Code int
	Err  string
}

// run executes a program inside as uid 0 or another one.
func (b *box) run(uid int, argv ...string) agentReply {
	b.t.Helper()
	r, err := b.tryRun(uid, argv...)
	if err != nil {
		b.t.Fatalf("run %q: %v", argv, err)
	}
	return r
}

// control talks to the agent as the node does.
func (b *box) control() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", b.spec.controlSocket())
		},
	}, Timeout: 30 * time.Second}
}

// init opens a real guestd to clients.
func (b *box) init() {
	b.t.Helper()
	resp, err := b.control().Post("http://guest/init", "application/json", strings.NewReader("{}"))
	if err != nil {
		b.t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		b.t.Fatalf("init = %s", resp.Status)
	}
}

func (b *box) tryRun(uid int, argv ...string) (agentReply, error) {
	body, err := json.Marshal(map[string]any{"Argv": argv, "UID": uid})
	if err != nil {
		return agentReply{}, err
	}
	resp, err := b.control().Post("http://guest/run", "application/json", bytes.NewReader(body))
	if err != nil {
		return agentReply{}, err
	}
	defer resp.Body.Close()
	var r agentReply
	return r, json.NewDecoder(resp.Body).Decode(&r)
}

// sh runs a shell line as root inside and wants it to succeed.
func (b *box) sh(line string) string {
	b.t.Helper()
	r := b.run(0, "/bin/bash", "-c", line)
	if r.Code != 0 {
		b.t.Errorf("%s: status %d %s: %s", line, r.Code, r.Err, r.Out)
	}
	return strings.TrimSpace(r.Out)
}

// wantNothingLeft looks at the host for anything that a sandbox could have left behind.
func wantNothingLeft(t testing.TB, m *Machine, spec Spec) {
	t.Helper()
	for _, d := range m.CgroupDirs(spec) {
		if _, err := os.Lstat(d); !os.IsNotExist(err) {
			t.Errorf("cgroup %s is left", d)
		}
	}
	if _, err := os.Lstat(spec.Dir); !os.IsNotExist(err) {
		t.Errorf("directory %s is left", spec.Dir)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), spec.Dir) {
		t.Errorf("mounts of %s are left, or %v", spec.Dir, err)
	}
	// A first stage that had not entered its namespace when its maker gave up is nobody's yet: it ends by itself at the end of its pipe.
	left := processesLeft(t, m, spec)
	for deadline := time.Now().Add(10 * time.Second); len(left) > 0 && time.Now().Before(deadline); left = processesLeft(t, m, spec) {
		time.Sleep(5 * time.Millisecond)
	}
	for _, process := range left {
		t.Errorf("process %s is left", process)
	}
}

func processesLeft(t testing.TB, m *Machine, spec Spec) (left []string) {
	t.Helper()
	pids, err := pidfd.All()
	if err != nil {
		t.Fatal(err)
	}
	s := newSurvivors(spec, m.cfg.Rootless)
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d", pid)
		uid, err := realUID(dir)
		if err != nil || isZombie(dir) {
			continue
		}
		if s.owns(pid) || (!m.cfg.Rootless && uid >= spec.UIDBase && uid < spec.UIDBase+idCount) || (pid != os.Getpid() && s.inNetNS(dir)) {
			b, _ := os.ReadFile(dir + "/cmdline")
			left = append(left, fmt.Sprintf("%d (%q, uid %d)", pid, b, uid))
		}
	}
	return left
}

func isZombie(dir string) bool {
	b, _ := os.ReadFile(dir + "/status")
	return bytes.Contains(b, []byte("State:\tZ"))
}
