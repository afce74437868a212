package vmm_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/sandboxd/vmm"
	"github.com/sluice-edge/sluice/sandboxd/vmm/vmmtest"
)

// starterVariable makes this binary a daemon that starts one VM, says so, and waits to be killed.
const starterVariable = "SLUICE_TEST_STARTER"

func startAndDie(text string) {
	var spec vmm.Spec
	err := json.Unmarshal([]byte(text), &spec)
	if err == nil {
		var vm *vmm.VM
		if vm, err = startOne(spec); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(vm.Handle())
			_, _ = io.Copy(io.Discard, os.Stdin)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func startOne(spec vmm.Spec) (*vmm.VM, error) {
	ctx, cancel := contextForStart()
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	l, err := vmm.New(vmm.Options{Binary: self})
	if err != nil {
		return nil, err
	}
	vm, err := l.Start(ctx, spec)
	if err != nil {
		return nil, err
	}
	shape := vmmtest.Shape()
	return vm, vm.Boot(ctx, shape, nil)
}

// TestStarterIsKilled: a VM outlives kill -9 of who started it, is adopted by the next one, and its end is still noticed.
func TestStarterIsKilled(t *testing.T) {
	h := faultHost(t, 20*time.Second)
	b := h.NewBox(t)
	text, err := json.Marshal(b.Spec)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), starterVariable+"="+string(text))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		t.Fatalf("the starter says nothing: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()

	var handle vmm.Handle
	if err := json.Unmarshal(line, &handle); err != nil {
		t.Fatal(err)
	}
	if b.VM, err = h.Launcher.Adopt(b.Spec, handle); err != nil {
		t.Fatalf("Adopt: %v", err)
	}
	ctx, cancel := contextForStart()
	defer cancel()
	if got := b.Ask(ctx, "next"); got != "1" {
		t.Errorf("the guest answers %q, want 1", got)
	}
	if err := b.VM.Kill(ctx); err != nil {
		t.Errorf("Kill: %v", err)
	}
	if ended := b.Ended(ctx); ended.How != "ended" {
		t.Errorf("Err = %v", ended)
	}
}

// TestGuestOfATest: ports and memory that a test gives to the fake's guest.
func TestGuestOfATest(t *testing.T) {
	h := faultHost(t, 20*time.Second)
	b := h.NewBox(t)
	ctx, cancel := contextForStart()
	defer cancel()
	b.Boot(ctx)
	c, err := b.VM.DialGuest(ctx, echoPort)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := vmmtest.Ask(c, "hello"); err != nil || got != "hello" {
		t.Errorf("the echo is %q, %v", got, err)
	}
	if err := b.VM.API.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	snapshots, err := vmm.OpenSnapshots(filepath.Join(filepath.Dir(b.Spec.Dir), "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	draft, err := snapshots.Begin("one")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.VM.Snapshot(ctx, draft); err != nil {
		t.Fatal(err)
	}
	snap, err := draft.Commit(ctx, "fake", nil)
	if err != nil {
		t.Fatal(err)
	}
	r := h.NewBox(t)
	r.Spec.Snapshot = snap.Dir
	r.Start(ctx)
	if err := r.VM.Restore(ctx, vmm.RestoreCopy, r.Tap); err != nil {
		t.Fatal(err)
	}
	if log, err := r.VM.VMMLog(1000); err != nil || !strings.HasSuffix(string(log), "loaded saved\n") {
		t.Errorf("VMMLog = %q, %v", log, err)
	}
}

func contextForStart() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), time.Minute)
}
