package sandboxd

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/internal/pidfd"
	"github.com/sluice-edge/sluice/sandboxd/namespace"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
	"github.com/sluice-edge/sluice/sandboxd/vmm/vmmtest"
)

// The tests here run the real machine. A process of its own, in a network namespace of its own, is the node; each crash is another
// process that is really killed.
const (
	envInside = "SLUICE_TEST_INSIDE" // the test runs in its own network namespace
	envGuestd = "SLUICE_TEST_GUESTD" // the agent's binary
	envCrash  = "SLUICE_TEST_CRASH"  // a crashing orchestrator: at this step, or "never"
	envDir    = "SLUICE_TEST_DIR"
	envPrefix = "SLUICE_TEST_PREFIX"
	envRoot   = "SLUICE_TEST_ROOTLESS"
)

func TestMain(m *testing.M) {
	namespace.MaybeInit()
	vmmtest.Main(new(fakeAgent).guest()) // when it is the hypervisor of a test
	if os.Getenv(envVMCrash) != "" {
		fmt.Fprintln(os.Stderr, crashingVMNode())
		os.Exit(1)
	}
	if os.Getenv(envCrash) != "" {
		if err := crashingOrchestrator(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	lab.CloseNested()
	os.Exit(code)
}

// inside runs the rest of the test in a network namespace of its own: it returns true there, and false, when that is done, outside.
func inside(t *testing.T) bool {
	t.Helper()
	if os.Getenv(envInside) != "" {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Fatalf("ip link set lo up: %v: %s", err, out)
		}
		return true
	}
	if os.Getuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: install iproute2 and nftables", tool)
		}
	}
	t.Parallel()
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=400s")
	cmd.Env = append(os.Environ(), envInside+"=1", envGuestd+"="+buildGuestd(t))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in its own network namespace: %v\n%s", err, out)
	}
	if testing.Verbose() {
		t.Logf("in its own network namespace:\n%s", out)
	}
	return false
}

func buildGuestd(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sluice-guestd-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "guestd")
	cmd := exec.Command("go", "build", "-o", file, "../cmd/guestd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build guestd: %v: %s", err, out)
	}
	return file
}

// fileCatalogue is a catalogue that outlives the processes that write to it.
type fileCatalogue struct{ dir string }

func (c fileCatalogue) Publish(_ context.Context, p Published) error {
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.dir, p.Sandbox), text, 0o600)
}

func (c fileCatalogue) Withdraw(_ context.Context, sandbox string, _ uint64) error {
	return ignoreAbsent(os.Remove(filepath.Join(c.dir, sandbox)))
}

func (c fileCatalogue) Published(context.Context) ([]Published, error) {
	entries, err := os.ReadDir(c.dir)
	var all []Published
	for _, e := range entries {
		var p Published
		text, err := os.ReadFile(filepath.Join(c.dir, e.Name()))
		if err != nil {
			return nil, err
		}
		if json.Unmarshal(text, &p) == nil { // a crash may have left half of one
			all = append(all, p)
		}
	}
	return all, err
}

func (c fileCatalogue) Announce(context.Context, Capacity) error { return nil }

// realNode is what all processes of one test agree on.
type realNode struct {
	dir      string // "state" and "routes" are in it
	prefix   string
	rootless bool
}

func (n realNode) manager() (*Manager, error) {
	machine, err := NewNamespaceMachine(NamespaceOptions{
		GuestdPath: os.Getenv(envGuestd), StateDir: filepath.Join(n.dir, "state"),
		Network: netdev.Config{NamePrefix: n.prefix}, Rootless: n.rootless,
	})
	if err != nil {
		return nil, err
	}
	return New(Options{
		StateDir: filepath.Join(n.dir, "state"), Machine: machine, Publisher: fileCatalogue{filepath.Join(n.dir, "routes")},
	})
}

// runUntilReady has m run, and returns when it is ready. ended then says what comes of it.
func runUntilReady(ctx context.Context, m *Manager) (ended <-chan error, err error) {
	result := make(chan error, 1)
	go func() { result <- m.Run(ctx) }()
	select {
	case <-m.Ready():
		return result, nil
	case err := <-result:
		return nil, err
	}
}

// crashingOrchestrator creates a sandbox and kills it, and is killed itself after the step that the environment names.
func crashingOrchestrator() error {
	m, err := realNode{os.Getenv(envDir), os.Getenv(envPrefix), os.Getenv(envRoot) == "true"}.manager()
	if err != nil {
		return err
	}
	die := Step(os.Getenv(envCrash))
	m.reached = func(s Step) {
		if s == die {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended, err := runUntilReady(ctx, m)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	if die == "never" {
		return keepBusy(ctx, m)
	}
	sb, err := m.Create(ctx, spec(time.Hour))
	if err != nil {
		return err
	}
	if err := m.Kill(ctx, sb.ID); err != nil {
		return err
	}
	cancel()
	return <-ended
}

// keepBusy creates sandboxes and kills every other one, several at a time, until the process is killed.
func keepBusy(ctx context.Context, m *Manager) error {
	failed := make(chan error)
	for range 3 {
		go func() {
			for i := 0; ; i++ {
				sb, err := m.Create(ctx, spec(time.Hour))
				if err == nil && i%2 == 0 {
					err = m.Kill(ctx, sb.ID)
				}
				if err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	return <-failed
}

func newRealNode(t *testing.T) realNode {
	t.Helper()
	dir, err := os.MkdirTemp("", "sluice-node-") // the test's own would be too long for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := realNode{dir: dir, prefix: fmt.Sprintf("sx%05d", rand.N(100000))}
	for _, sub := range []string{"state", "routes"} {
		if err := os.Mkdir(filepath.Join(n.dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// crash runs an orchestrator until it is killed, at a step or, with step "never", after a while.
func (n realNode) crash(t *testing.T, step Step, after time.Duration) {
	t.Helper()
	n.untilKilled(t, func(orchestrator *os.Process) {
		if step == "never" {
			time.Sleep(after)
			_ = orchestrator.Kill()
		}
	}, envCrash+"="+string(step), fmt.Sprintf("%s=%v", envRoot, n.rootless))
}

// untilKilled runs an orchestrator that is told by env how it ends, and waits until it is killed.
func (n realNode) untilKilled(t *testing.T, ready func(orchestrator *os.Process), env ...string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = slices.Concat(os.Environ(), []string{envDir + "=" + n.dir, envPrefix + "=" + n.prefix}, env)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err == nil {
		ready(cmd.Process)
	}
	end := cmd.Wait()
	if err != nil || line != "ready\n" || !cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled() {
		t.Fatalf("orchestrator said %q, %v, and ended with %v before it was killed; %s", line, err, end, &stderr)
	}
}

// recover starts an orchestrator on what the crash left, checks the sandboxes that survived, kills them, stops, and looks for
// anything that is left. It returns how many survived.
func (n realNode) recover(t *testing.T) int {
	t.Helper()
	m, err := n.manager()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended, err := runUntilReady(ctx, m)
	if err != nil {
		t.Fatalf("Run() = %v", err)
	}
	alive := slices.DeleteFunc(m.List(), func(sb Sandbox) bool { return diedWithItsMaker(m, sb) })
	settle(m)
	ids := n.ids(t)
	if len(alive) != len(ids) {
		t.Errorf("%d sandboxes of %d directories run after the restart", len(alive), len(ids))
	}
	routes, err := m.publisher.Published(ctx)
	if err != nil || len(routes) != len(alive) {
		t.Errorf("%d routes, %v, want one for each of %d sandboxes", len(routes), err, len(alive))
	}
	for _, sb := range alive {
		wantHealthy(t, m, sb)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run() = %v", err)
	}
	if left := n.leftovers(t, append(ids, n.prefix, n.dir)); len(left) > 0 {
		t.Errorf("left after recovery:\n%s", strings.Join(left, "\n"))
	}
	return len(alive)
}

// diedWithItsMaker tells whether a sandbox was taken up in the moment before its watchdog killed it, because it was not committed:
// either its guest answers, or its death is noticed.
func diedWithItsMaker(m *Manager, sb Sandbox) bool {
	m.mu.RLock()
	l := m.lives[sb.ID]
	m.mu.RUnlock()
	if l == nil {
		return true
	}
	if m.instanceOf(l).Health(l.ctx) == nil {
		return false
	}
	<-l.ctx.Done()
	<-l.buried
	return true
}

// awaitWatchdog waits for the end of what was not committed when its maker was killed.
func (n realNode) awaitWatchdog(t *testing.T) {
	t.Helper()
	j := journal{dir: filepath.Join(n.dir, "state", "sandboxes")}
	for _, id := range n.ids(t) {
		rec, err := j.read(id)
		var handle namespace.Handle
		if err := errors.Join(err, json.Unmarshal(rec.Handle, &handle)); err != nil {
			t.Fatal(err)
		}
		process, err := pidfd.Open(handle.PID, handle.StartTime)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		err = pidfd.Wait(t.Context(), process)
		process.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
}

// wantHealthy asks envd in the sandbox, the way an edge would.
func wantHealthy(t *testing.T, m *Manager, sb Sandbox) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return m.Open(ctx, sb.ID, sb.Generation, 49983)
		},
	}}
	answer, err := client.Get("http://sandbox/health")
	if err != nil {
		t.Errorf("envd of %s: %v", sb.ID, err)
		return
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusNoContent {
		t.Errorf("envd of %s: %s", sb.ID, answer.Status)
	}
}

func (n realNode) ids(t *testing.T) (ids []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.dir, "state", "sandboxes"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids
}

// leftovers looks everywhere on the host for anything that bears one of the names.
func (n realNode) leftovers(t *testing.T, names []string) (left []string) {
	t.Helper()
	named := func(kind, text string) {
		if slices.ContainsFunc(names, func(name string) bool { return strings.Contains(text, name) }) {
			left = append(left, kind+": "+strings.TrimSpace(text))
		}
	}
	for _, id := range n.ids(t) {
		left = append(left, "directory: "+id)
	}
	routes, err := os.ReadDir(filepath.Join(n.dir, "routes"))
	for _, r := range routes {
		left = append(left, "route: "+r.Name())
	}
	mounts, err2 := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		named("mount", line)
	}
	namespaces, err3 := os.ReadDir("/run/netns")
	for _, ns := range namespaces {
		named("network namespace", ns.Name())
	}
	links, err4 := net.Interfaces()
	for _, l := range links {
		named("device", l.Name)
	}
	chains, err5 := new(nftables.Conn).ListChains()
	for _, c := range chains {
		named("nftables", c.Table.Name+" "+c.Name)
	}
	err6 := filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			named("cgroup", path)
		}
		return nil // others come and go
	})
	if err := cmp.Or(err, err2, err3, err4, err5, err6); err != nil {
		t.Error(err)
	}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, proc := range procs {
		if filepath.Base(proc) == fmt.Sprint(os.Getpid()) || filepath.Base(proc) == fmt.Sprint(os.Getppid()) {
			continue
		}
		for _, file := range []string{"mountinfo", "cgroup", "cmdline", "environ"} {
			text, err := os.ReadFile(filepath.Join(proc, file))
			if err != nil {
				continue
			}
			before := len(left)
			named("process "+proc+" in "+file, string(text))
			if len(left) > before {
				left[before] = fmt.Sprintf("process %s, by its %s", proc, file)
				break
			}
		}
	}
	return left
}

// TestKilledAtEveryStep kills an orchestrator with the real machine after every step of create and of removal.
func TestKilledAtEveryStep(t *testing.T) {
	if inside(t) {
		killAtEveryStep(t, false)
	}
}

// TestRootlessKilledAtEveryStep is the same for the machine without a network.
func TestRootlessKilledAtEveryStep(t *testing.T) {
	if inside(t) {
		killAtEveryStep(t, true)
	}
}

func killAtEveryStep(t *testing.T, rootless bool) {
	n := newRealNode(t)
	n.rootless = rootless
	for _, step := range slices.Concat(createSteps, removeSteps) {
		if rootless && (step == StepNetwork || step == StepFence || step == StepUnwired) {
			continue // it has no network
		}
		if step == StepLayer || step == StepProcess || step == StepRestored {
			continue // of a hypervisor
		}
		t.Run(string(step), func(t *testing.T) {
			n.crash(t, step, 0)
			if step == StepHandle {
				n.awaitWatchdog(t)
			}
			want := 0
			if step == StepCommitted || step == StepPublished || step == StepWithdrawn {
				want = 1
			}
			if got := n.recover(t); got != want {
				t.Errorf("%d sandboxes survived, want %d", got, want)
			}
		})
	}
}

// TestKilledAnywhere kills it at moments that no step names, in the middle of several creates and kills.
func TestKilledAnywhere(t *testing.T) {
	if !inside(t) {
		return
	}
	n := newRealNode(t)
	n.crash(t, StepErased, 0) // the first create also makes what all share, which takes longer than the rest
	n.recover(t)
	survivors := 0
	for range 12 {
		n.crash(t, "never", rand.N(500*time.Millisecond))
		survivors += n.recover(t)
	}
	t.Logf("%d sandboxes survived", survivors)
}

// TestNamespaceMachine is one sandbox of the real machine from create to kill, as the link, the API and the guest see it.
func TestNamespaceMachine(t *testing.T) {
	if !inside(t) {
		return
	}
	n := newRealNode(t)
	m, err := n.manager()
	if err != nil {
		t.Fatal(err)
	}
	liveOnce(t, n, m)
}

// TestRootlessMachine is the same without any privilege on the host but that of the machine's own user namespaces.
func TestRootlessMachine(t *testing.T) {
	if !inside(t) {
		return
	}
	n := newRealNode(t)
	n.rootless = true
	m, err := n.manager()
	if err != nil {
		t.Fatal(err)
	}
	liveOnce(t, n, m)
}

// TestRestartKeepsSandboxes stops an orchestrator in good order and starts another.
func TestRestartKeepsSandboxes(t *testing.T) {
	if !inside(t) {
		return
	}
	for name, rootless := range map[string]bool{"root": false, "rootless": true} {
		t.Run(name, func(t *testing.T) {
			n := newRealNode(t)
			n.rootless = rootless
			m, err := n.manager()
			if err != nil {
				t.Fatal(err)
			}
			m.opts.KeepSandboxes = true
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- m.Run(ctx) }()
			for range 2 {
				if _, err := m.Create(ctx, spec(time.Hour)); err != nil {
					t.Fatal(err)
				}
			}
			died := m.List()[0].ID
			cancel()
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			rec, err := m.journal.read(died)
			var handle namespace.Handle
			if err := errors.Join(err, json.Unmarshal(rec.Handle, &handle), syscall.Kill(handle.PID, syscall.SIGKILL)); err != nil {
				t.Fatal(err)
			}
			if got := n.recover(t); got != 1 {
				t.Errorf("%d sandboxes survived, want the one that lives", got)
			}
		})
	}
}

// TestTwoNodesOfOneNetworkName: the second used to take the sandboxes of the first for leftovers, and removed them. It is refused
// wherever it could see them: by their devices, in the same network namespace, and by their names in /run/netns.
func TestTwoNodesOfOneNetworkName(t *testing.T) {
	if !inside(t) {
		return
	}
	first := newRealNode(t)
	m, err := first.manager()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	sb, err := m.Create(ctx, spec(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for name, attr := range map[string]*syscall.SysProcAttr{
		"on the same host":               {},
		"in another network namespace":   {Cloneflags: syscall.CLONE_NEWNET},
		"in another mount namespace":     {Unshareflags: syscall.CLONE_NEWNS},
		"with a /run of its own as well": {Unshareflags: syscall.CLONE_NEWNS},
	} {
		second := newRealNode(t)
		second.prefix = first.prefix
		cmd := exec.Command("/proc/self/exe")
		if strings.Contains(name, "/run") {
			cmd = exec.Command("sh", "-c", `mount -t tmpfs tmpfs /run && exec "$0"`, self)
		}
		cmd.Env = append(os.Environ(), envCrash+"=never", envDir+"="+second.dir, envPrefix+"="+second.prefix, envRoot+"=false")
		cmd.SysProcAttr = attr
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "another node on this host uses the network name") {
			t.Errorf("second node %s: %v, %s", name, err, out)
		}
		wantHealthy(t, m, sb)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestNodesShareNoUserIDs: ids belong to the kernel, whatever the names are.
func TestNodesShareNoUserIDs(t *testing.T) {
	if !inside(t) {
		return
	}
	dir := t.TempDir()
	kept := map[string]bool{}
	alive := func(node string) (bool, error) { return kept[node], nil }
	claims := map[string]*claim{}
	parts := map[int]string{}
	take := func(node string) int {
		t.Helper()
		part, c, err := claimUIDs(dir, node, alive)
		if err != nil {
			t.Fatalf("claimUIDs(%q) = %v", node, err)
		}
		if other := parts[part]; other != "" && other != node {
			t.Errorf("%q and %q share part %d", node, other, part)
		}
		claims[node], parts[part] = c, node
		return part
	}
	for i := range uidNodes {
		take(fmt.Sprintf("n%d", i))
	}
	if _, _, err := claimUIDs(dir, "late", alive); err == nil {
		t.Error("claimUIDs of one node too many succeeded")
	}

	kept["n3"] = true // it stops and leaves its sandboxes running
	var was int
	for part, node := range parts {
		if node == "n3" {
			was = part
		}
	}
	if err := claims["n3"].leave(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := claimUIDs(dir, "late", alive); err == nil {
		t.Error("the ids of sandboxes that run were given to another node")
	}
	if got := take("n3"); got != was {
		t.Errorf("part of n3 after a restart = %d, was %d", got, was)
	}

	claims["n5"].leave() // it died, and nothing of it runs
	for part, node := range parts {
		if node == "n5" {
			delete(parts, part)
		}
	}
	take("late")
	for _, c := range claims {
		c.remove()
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestMachines runs the suite of machines over the real ones.
func TestMachines(t *testing.T) {
	if !inside(t) {
		return
	}
	for name, rootless := range map[string]bool{"root": false, "rootless": true} {
		t.Run(name, func(t *testing.T) {
			n := newRealNode(t)
			n.rootless = rootless
			m, err := n.manager()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(n.dir, "isuite"), 0o711); err != nil {
				t.Fatal(err)
			}
			testMachine(t, m.machine, n.dir, "")
			if err := os.Mkdir(filepath.Join(n.dir, "state", "sandboxes"), 0o711); err != nil {
				t.Fatal(err)
			}
			if left := n.leftovers(t, []string{n.prefix, n.dir}); len(left) > 0 {
				t.Errorf("left:\n%s", strings.Join(left, "\n"))
			}
		})
	}
}

// wantDeathNoticed kills a sandbox's first process behind the manager's back.
func wantDeathNoticed(t *testing.T, m *Manager) {
	t.Helper()
	sb, err := m.Create(t.Context(), spec(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	l := m.lives[sb.ID]
	if err := syscall.Kill(m.instanceOf(l).(*namespaceSandbox).process.Handle().PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-l.buried:
	case <-time.After(20 * time.Second):
		t.Fatal("the death of a sandbox was not noticed")
	}
	if _, err := m.Get(sb.ID); err == nil {
		t.Error("a dead sandbox is still shown")
	}
}

func liveOnce(t *testing.T, n realNode, m *Manager) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	sb, err := m.Create(ctx, spec(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	wantHealthy(t, m, sb) // at once
	if _, err := m.Open(ctx, sb.ID, sb.Generation, 3000); err == nil {
		t.Error("Open of a closed port succeeded")
	}
	no := false
	if err := m.UpdateNetwork(ctx, sb.ID, Network{AllowInternetAccess: &no, AllowOut: []string{"1.1.1.1"}}); err != nil {
		t.Errorf("UpdateNetwork() = %v", err)
	}
	if !n.rootless {
		rules, err := exec.Command("nsenter", "--net=/run/netns/"+n.prefix+"-0", "nft", "list", "ruleset").CombinedOutput()
		if err != nil || !strings.Contains(string(rules), "1.1.1.1") {
			t.Errorf("rules in the sandbox's namespace: %v\n%s", err, rules)
		}
	}
	if err := m.sample(t.Context(), m.lives[sb.ID], m.instanceOf(m.lives[sb.ID])); err != nil {
		t.Errorf("sample() = %v", err)
	}
	if got, err := m.Metrics(ctx, sb.ID); err != nil || len(got) != 1 || got[0].CPUCount == 0 || got[0].MemTotal == 0 {
		t.Errorf("Metrics() = %+v, %v", got, err)
	}
	if _, err := m.Refusals(sb.ID); err != nil {
		t.Errorf("Refusals() = %v", err)
	}
	conn, err := m.Open(ctx, sb.ID, sb.Generation, 49983)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := m.Kill(ctx, sb.ID); err != nil {
		t.Errorf("Kill() = %v", err)
	}
	wantDeathNoticed(t, m)
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadAll(conn); err != nil && os.IsTimeout(err) {
		t.Error("a connection into the sandbox outlived it")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run() = %v", err)
	}
	if left := n.leftovers(t, []string{sb.ID, n.prefix, n.dir}); len(left) > 0 {
		t.Errorf("left:\n%s", strings.Join(left, "\n"))
	}
}
