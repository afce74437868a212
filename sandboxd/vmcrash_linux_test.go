package sandboxd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// An orchestrator with the VM machine that is killed.
const (
	envVMCrash      = "SLUICE_TEST_VMCRASH" // at a step of something that it does, as in "pause:frozen"
	envVMHypervisor = "SLUICE_TEST_VMHYPERVISOR"
	envVMTemplate   = "SLUICE_TEST_VMTEMPLATE"
)

// vmNode is a node with VMs, on a directory that outlives the processes of a test.
type vmNode struct {
	realNode
	hypervisor, template string
	words                words
	patience             time.Duration // factor of what is waited for
}

// newVMNode has its own fake hypervisor and template, or the real ones of a host that has them.
func newVMNode(n realNode, hypervisor, template string) (vmNode, error) {
	self, err := os.Executable()
	if hypervisor == "" || hypervisor == self {
		return vmNode{n, self, filepath.Join(n.dir, "state", "root"), fakeWords, 1}, err
	}
	return vmNode{n, hypervisor, template, realWords, 10}, err
}

func (n vmNode) manager() (*Manager, error) {
	state := filepath.Join(n.dir, "state")
	store, err := image.OpenStore(filepath.Join(state, "templates"))
	if err != nil {
		return nil, err
	}
	machine, err := NewVMMachine(context.Background(), VMOptions{
		Hypervisor: n.hypervisor, Templates: store, StateDir: state, Network: netdev.Config{NamePrefix: n.prefix},
	})
	if err != nil {
		return nil, err
	}
	return New(Options{
		StateDir: state, Machine: machine, Publisher: fileCatalogue{filepath.Join(n.dir, "routes")},
		Templates: []Template{{ID: "base", Root: n.template, CPUs: 1, MemoryMiB: 192, DiskMiB: 64}},
	})
}

// vmLife is what the crashing orchestrator does, in order. Each names the steps at which it can be killed.
var vmLife = []struct {
	name  string
	steps []Step
	do    func(ctx context.Context, m *Manager, id string) error
}{
	{"create", createSteps, nil},
	{"pause", pauseSteps, func(ctx context.Context, m *Manager, id string) error { return m.Pause(ctx, id, true) }},
	{"resume", resumeSteps, func(ctx context.Context, m *Manager, id string) error {
		_, _, err := m.Connect(ctx, id, ConnectOptions{Timeout: time.Hour})
		return err
	}},
	{"snapshot", snapshotSteps, func(ctx context.Context, m *Manager, id string) error {
		_, err := m.Snapshot(ctx, id, "kept")
		return err
	}},
	{"kill", removeSteps, func(ctx context.Context, m *Manager, id string) error { return m.Kill(ctx, id) }},
}

// crashingVMNode lives through vmLife until it is killed.
func crashingVMNode() error {
	n, err := newVMNode(realNode{dir: os.Getenv(envDir), prefix: os.Getenv(envPrefix)}, os.Getenv(envVMHypervisor), os.Getenv(envVMTemplate))
	if err != nil {
		return err
	}
	m, err := n.manager()
	if err != nil {
		return err
	}
	doing := ""
	m.reached = func(s Step) {
		if doing+":"+string(s) == os.Getenv(envVMCrash) {
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
	doing = "create"
	sb, err := m.Create(ctx, spec(time.Hour))
	if err != nil {
		return err
	}
	instance := m.instanceOf(m.lives[sb.ID]).(*vmSandbox)
	for _, line := range []string{n.words.next, n.words.next, n.words.write + " word"} {
		if _, err := instance.tell(ctx, line); err != nil {
			return err
		}
	}
	if err := instance.guest.Sync(ctx); err != nil { // what a guest has not written out is lost with its hypervisor
		return err
	}
	for _, op := range vmLife[1:] {
		doing = op.name
		if err := op.do(ctx, m, sb.ID); err != nil {
			return fmt.Errorf("%s: %w", op.name, err)
		}
	}
	doing = ""
	cancel()
	return errors.Join(<-ended, errors.New("nobody killed it"))
}

// crash runs an orchestrator until it is killed at a step.
func (n vmNode) crash(t *testing.T, at string) {
	t.Helper()
	n.untilKilled(t, func(*os.Process) {}, envVMCrash+"="+at, envVMHypervisor+"="+n.hypervisor, envVMTemplate+"="+n.template)
}

// killHypervisors ends every hypervisor of the node: the host lost power, and its disk is what is left.
func (n vmNode) killHypervisors(t *testing.T) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, proc := range procs {
		text, err := os.ReadFile(filepath.Join(proc, "cmdline"))
		if err != nil || !strings.HasPrefix(string(text), "sluice-vm-i") {
			continue
		}
		if inside, err := os.ReadFile(filepath.Join(proc, "mountinfo")); err != nil || !strings.Contains(string(inside), filepath.Base(n.dir)) {
			continue
		}
		var pid int
		if _, err := fmt.Sscan(filepath.Base(proc), &pid); err == nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// fate is what a sandbox is after a crash and a restart.
type fate string

const (
	gone     fate = "gone"
	running  fate = "running"          // and counts on
	paused   fate = "paused"           // and counts on when it is resumed
	diskOnly fate = "paused, its disk" // and counts anew
)

// fateAt is what a crash of the orchestrator alone leaves, and one of everything.
func fateAt(op string, step Step) (alone, all fate) {
	at := func(steps []Step, limit Step) bool { return slices.Index(steps, step) < slices.Index(steps, limit) }
	switch op {
	case "create":
		if at(createSteps, StepHandle) {
			return gone, gone
		}
		return running, gone
	case "pause":
		if at(pauseSteps, StepSaved) {
			return running, gone
		}
		return paused, paused
	case "resume":
		switch {
		case at(resumeSteps, StepContinued):
			return paused, paused
		case step == StepContinued:
			return running, diskOnly
		}
		return running, gone
	case "snapshot":
		return running, gone
	}
	if step == StepWithdrawn {
		return running, gone
	}
	return gone, gone
}

// recover starts a node on what a crash in op left, looks what has become of the sandbox, lives on with it, kills it, stops, and looks for
// anything that is left.
func (n vmNode) recover(t *testing.T, op string) fate {
	t.Helper()
	m, err := n.manager()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended, err := runUntilReady(ctx, m)
	if err != nil {
		t.Fatalf("Run() = %v", err)
	}
	settle(m)
	is := n.liveOn(t, m, op)
	for _, s := range m.Snapshots() {
		if err := m.RemoveSnapshot(ctx, s.ID); err != nil {
			t.Errorf("RemoveSnapshot() = %v", err)
		}
	}
	ids := n.ids(t)
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run() = %v", err)
	}
	left := n.leftovers(t, append(ids, n.prefix, n.dir))
	for _, dir := range []string{"snapshots", "layers/" + n.prefix} {
		entries, err := os.ReadDir(filepath.Join(n.dir, "state", dir))
		if ignoreAbsent(err) != nil {
			t.Error(err)
		}
		for _, e := range entries {
			left = append(left, dir+": "+e.Name())
		}
	}
	if len(left) > 0 {
		t.Errorf("left after recovery:\n%s", strings.Join(left, "\n"))
	}
	return is
}

// liveOn resumes what is paused, finds its memory and its disk as they were when op began, and kills it in the end.
func (n vmNode) liveOn(t *testing.T, m *Manager, op string) fate {
	t.Helper()
	ctx := t.Context()
	ids := n.ids(t)
	if len(ids) == 0 {
		return gone
	}
	id := ids[0]
	sb, err := m.Get(id)
	for deadline := time.Now().Add(n.patience * 20 * time.Second); errs.CodeOf(err) == errs.Unavailable || err == nil && sb.State == StatePausing; sb, err = m.Get(id) {
		if time.Now().After(deadline) {
			break
		}
		time.Sleep(5 * time.Millisecond) // the manager says nothing when the place of a paused sandbox is empty
	}
	if err != nil {
		t.Fatalf("Get(%s) = %v", id, err)
	}
	is := running
	if sb.State == StatePaused {
		if is = diskOnly; sb.MemorySaved {
			is = paused
		}
		if _, resumed, err := m.Connect(ctx, id, ConnectOptions{Timeout: time.Hour, EnvdToken: "secret-envd-token"}); err != nil || !resumed {
			t.Fatalf("Connect() = resumed %v, %v", resumed, err)
		}
	}
	m.mu.RLock()
	instance := m.lives[id].instance.(*vmSandbox)
	m.mu.RUnlock()
	count, written := "3", "word"
	if is == diskOnly {
		count = "1"
	}
	if op == "create" { // nobody has told it anything
		count, written = "1", ""
	}
	if got, err := instance.tell(ctx, n.words.next); err != nil || got != count {
		t.Errorf("the guest counts %q, %v, want %s", got, err, count)
	}
	if written != "" {
		if got, err := instance.tell(ctx, n.words.read); err != nil || got != written {
			t.Errorf("the guest's disk says %q, %v, want %q", got, err, written)
		}
	}
	if err := m.Kill(ctx, id); err != nil {
		t.Errorf("Kill() = %v", err)
	}
	return is
}

// TestVMKilledAtEveryStep is the crash table of VMs: the orchestrator is killed after every step of create, pause, resume, snapshot and kill,
// alone and together with its hypervisors.
func TestVMKilledAtEveryStep(t *testing.T) {
	if !inside(t) {
		return
	}
	n, err := newVMNode(newRealNode(t), "", "")
	if err != nil {
		t.Fatal(err)
	}
	writeTemplate(t, n.template)
	n.testKilled(t, func(string, Step) bool { return true })
}

// TestVMKilledAtEveryStepReal is the same table with the real hypervisor and the real agent, where a create is a restore. All of it takes
// half an hour in a nested host, so that there the steps at which a hypervisor is in another state than before are enough, unless steps are
// asked for: -run 'TestVMKilledAtEveryStepReal$/.' has all.
func TestVMKilledAtEveryStepReal(t *testing.T) {
	agent, tool := vmPrograms(t)
	if !lab.InKVM(t) {
		return
	}
	h := newRealVMHost(t, agent, tool)
	h.bake(t, h.template, h.manifest)
	t.Setenv("TMPDIR", h.state) // memory and disks are too large for where temporary files are in a nested host
	n, err := newVMNode(newRealNode(t), h.hypervisor, h.template)
	if err != nil {
		t.Fatal(err)
	}
	all := os.Getenv(lab.InsideVariable) == "" || strings.Contains(flag.Lookup("test.run").Value.String(), "/")
	n.testKilled(t, func(op string, step Step) bool { return all || slices.Contains(hypervisorSteps[op], step) })
}

// hypervisorSteps are those after which a hypervisor is in another state.
var hypervisorSteps = map[string][]Step{
	"create":   {StepProcess, StepRestored, StepCommitted},
	"pause":    {StepFrozen, StepSaved},
	"resume":   {StepProcess, StepRestored, StepContinued},
	"snapshot": {StepStanding, StepCopied},
	"kill":     {StepStopped},
}

func (n vmNode) testKilled(t *testing.T, wanted func(op string, step Step) bool) {
	for _, op := range vmLife {
		for _, step := range op.steps {
			if op.name == "resume" && step == StepInit {
				continue // it knows who it is
			}
			alone, all := fateAt(op.name, step)
			at := op.name + ":" + string(step)
			t.Run(at, func(t *testing.T) {
				if !wanted(op.name, step) {
					t.Skip("takes too long with an emulated processor: ask for it by -run 'TestVMKilledAtEveryStepReal$/.'")
				}
				n.crash(t, at)
				if got := n.recover(t, op.name); got != alone {
					t.Errorf("after a crash of the orchestrator it is %s, want %s", got, alone)
				}
				n.crash(t, at)
				n.killHypervisors(t)
				if got := n.recover(t, op.name); got != all {
					t.Errorf("after a crash of everything it is %s, want %s", got, all)
				}
			})
		}
	}
}
