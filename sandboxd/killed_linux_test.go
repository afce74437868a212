package sandboxd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// The tests here are those of real_linux_test.go for virtual machines: the hypervisor is the fake one, a process of its own that outlives
// the orchestrator; networks, rules, disks, cgroups and what is saved are real.

// envVMs is the template of a crashing orchestrator of VMs. It is killed in an act: "create", "pause", "resume" or "kill".
const (
	envVMs = "SLUICE_TEST_VMS"
	envAct = "SLUICE_TEST_ACT"
)

// vmManager is the node that all processes of one test agree on.
func vmManager(dir, prefix, template string) (*Manager, error) {
	hypervisor, err := os.Executable()
	if err != nil {
		return nil, err
	}
	state := filepath.Join(dir, "state")
	store, err := image.OpenStore(filepath.Join(state, "templates"))
	if err != nil {
		return nil, err
	}
	machine, err := NewVMMachine(context.Background(), VMOptions{
		Hypervisor: hypervisor, Templates: store, StateDir: state, Network: netdev.Config{NamePrefix: prefix}, Log: zap.NewNop(),
	})
	if err != nil {
		return nil, err
	}
	return New(Options{
		StateDir: state, Machine: machine, Publisher: fileCatalogue{filepath.Join(dir, "routes")}, ReadySlots: 1,
		Templates: []Template{{ID: "base", Root: template, CPUs: 1, MemoryMiB: 128, DiskMiB: 64}},
	})
}

// crashingVMOrchestrator creates a sandbox, pauses it, resumes it and kills it, and is killed itself after the step that the environment names.
func crashingVMOrchestrator() error {
	m, err := vmManager(os.Getenv(envDir), os.Getenv(envPrefix), os.Getenv(envVMs))
	if err != nil {
		return err
	}
	var act atomic.Value
	act.Store("")
	m.reached = func(s Step) {
		if act.Load() == os.Getenv(envAct) && s == Step(os.Getenv(envCrash)) {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	select {
	case <-m.Ready():
	case err := <-ended:
		return err
	}
	fmt.Println("ready")
	act.Store("create")
	sb, err := m.Create(ctx, spec(time.Hour))
	if err != nil {
		return err
	}
	act.Store("")
	if _, err := askVM(ctx, m, sb.ID, "next"); err != nil {
		return err
	}
	act.Store("pause")
	if err := m.Pause(ctx, sb.ID, true); err != nil {
		return err
	}
	act.Store("resume")
	if _, _, err := m.Connect(ctx, sb.ID, ConnectOptions{Timeout: time.Hour}); err != nil {
		return err
	}
	act.Store("kill")
	if err := m.Kill(ctx, sb.ID); err != nil {
		return err
	}
	cancel()
	return <-ended
}

// askVM has the guest of a running sandbox execute a command.
func askVM(ctx context.Context, m *Manager, id, command string) (string, error) {
	l, err := m.running(id)
	if err != nil {
		return "", err
	}
	result, err := m.instanceOf(l).(*vmSandbox).guest.Exec(ctx, guest.ExecRequest{Cmd: command, User: "root"})
	if err == nil && result.ExitCode != 0 {
		err = errors.New(result.Output)
	}
	return strings.TrimSpace(result.Output), err
}

// TestVMsKilledAtEveryStep kills an orchestrator of VMs after every step of create, pause, resume and kill. What the tables of decision 3 say
// survives does, with what it had in memory, and nothing else is left anywhere.
func TestVMsKilledAtEveryStep(t *testing.T) {
	if !inside(t) {
		return
	}
	h, n := newVMHost(t), newRealNode(t)
	for _, act := range []struct {
		name  string
		steps []Step
		want  func(Step) State // "": nothing is left
	}{
		{"create", createSteps, func(s Step) State {
			if s == StepHandle || s == StepCommitted || s == StepPublished { // a hypervisor outlives us from its first moment
				return StateRunning
			}
			return ""
		}},
		{"pause", pauseSteps, func(s Step) State {
			if s == StepPausing || s == StepHidden || s == StepFrozen {
				return StateRunning
			}
			return StatePaused
		}},
		{"resume", resumeSteps, func(s Step) State {
			if s == StepContinued || s == StepRunning || s == StepPublished {
				return StateRunning
			}
			return StatePaused
		}},
		{"kill", removeSteps, func(s Step) State {
			if s == StepWithdrawn {
				return StateRunning
			}
			return ""
		}},
	} {
		for _, step := range act.steps {
			if act.name == "resume" && step == StepInit {
				continue // it has its memory
			}
			t.Run(act.name+" "+string(step), func(t *testing.T) {
				n.crashVMs(t, h.template, act.name, step)
				n.recoverVMs(t, h.template, act.want(step), act.name != "create")
			})
		}
	}
}

// crashVMs runs an orchestrator until it is killed.
func (n realNode) crashVMs(t *testing.T, template, act string, step Step) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envVMs+"="+template, envAct+"="+act, envCrash+"="+string(step), envDir+"="+n.dir, envPrefix+"="+n.prefix)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		cmd.Wait()
		t.Fatalf("orchestrator said %q, %v; %s", line, err, &stderr)
	}
	err = cmd.Wait()
	if !cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled() {
		t.Fatalf("orchestrator ended with %v before it was killed; %s", err, &stderr)
	}
}

// recoverVMs starts an orchestrator on what the crash left, checks what survived, kills it, stops, and looks for anything that is left.
func (n realNode) recoverVMs(t *testing.T, template string, want State, counted bool) {
	t.Helper()
	m, err := vmManager(n.dir, n.prefix, template)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	select {
	case <-m.Ready():
	case err := <-ended:
		t.Fatalf("Run() = %v", err)
	}
	settle(m)
	ids := n.ids(t)
	switch all := m.List(); {
	case want == "" && len(all)+len(ids) > 0:
		t.Errorf("sandboxes %v in directories %v, want none", all, ids)
	case want != "" && (len(all) != 1 || len(ids) != 1):
		t.Errorf("sandboxes %v in directories %v, want one", all, ids)
	case want != "":
		n.wantSurvivor(t, m, all[0].ID, want, counted)
	}
	routes, err := m.publisher.Published(ctx)
	if err != nil || len(routes) != len(m.List()) {
		t.Errorf("routes %v, %v, want one for each of %d sandboxes", routes, err, len(m.List()))
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run() = %v", err)
	}
	if left := n.leftovers(t, append(ids, n.prefix, n.dir)); len(left) > 0 {
		t.Errorf("left after recovery:\n%s", strings.Join(left, "\n"))
	}
}

// wantSurvivor checks that it runs, or that it is paused and nothing of it is on the host, and that it goes on from where it was.
func (n realNode) wantSurvivor(t *testing.T, m *Manager, id string, want State, counted bool) {
	t.Helper()
	m.mu.RLock()
	l := m.lives[id]
	m.mu.RUnlock()
	l.turn <- struct{}{} // whatever the start has begun with it is done
	l.endTurn()
	if sb, err := m.Get(id); err != nil || sb.State != want {
		t.Errorf("Get() = %v, %v, want %v", sb.State, err, want)
		return
	}
	if want == StatePaused {
		left := n.leftovers(t, []string{id})
		left = slices.DeleteFunc(left, func(s string) bool { return strings.HasPrefix(s, "directory") || strings.HasPrefix(s, "route") })
		if len(left) > 0 {
			t.Errorf("left of a paused sandbox:\n%s", strings.Join(left, "\n"))
		}
		if _, resumed, err := m.Connect(t.Context(), id, ConnectOptions{Timeout: time.Hour}); err != nil || !resumed {
			t.Errorf("Connect() = %v, %v", resumed, err)
			return
		}
	}
	count := "1"
	if counted {
		count = "2"
	}
	if got, err := askVM(t.Context(), m, id, "next"); err != nil || got != count {
		t.Errorf("count = %q, %v, want %s", got, err, count)
	}
}
