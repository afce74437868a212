package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const reapHelper = "GUEST_TEST_REAP"

// TestMain becomes the process that the orphans are given to: the test binary itself must not reap children of other tests.
func TestMain(m *testing.M) {
	if os.Getenv(reapHelper) != "" {
		if err := reapAsInit(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestOrphansAreReapedAndChildrenAreNot(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), reapHelper+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// reapAsInit starts many short processes that leave orphans behind. Every exit code must reach its owner, and every orphan must be gone.
func reapAsInit() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	ps := newProcesses(newAgent(Options{}).log)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		ps.reapOrphans(ctx)
	}()
	var orphans []int
	for i := range 100 {
		code := i % 50
		p, r, err := ps.start(startSpec{config: sh(fmt.Sprintf("sleep 0.02 >/dev/null 2>&1 & echo $!; exit %d", code)).Process, dir: "/"})
		if err != nil {
			return err
		}
		<-p.out.done
		text := string((<-r.queue).GetStdout())
		p.out.unsubscribe(r)
		if got := int(p.end.GetExitCode()); got != code || p.end.GetError() != "" && code == 0 {
			return fmt.Errorf("exit code %d became %v", code, p.end)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil {
			return err
		}
		orphans = append(orphans, pid)
	}
	deadline := time.Now().Add(20 * time.Second)
	for _, pid := range orphans {
		for unix.Kill(pid, 0) == nil { // a zombie can still be signalled
			if time.Now().After(deadline) {
				return fmt.Errorf("orphan %d is still there", pid)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	cancel()
	<-done
	return nil
}
