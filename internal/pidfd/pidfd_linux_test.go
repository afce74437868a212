package pidfd

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// start starts a shell and returns its number. Reap collects it.
func start(t *testing.T, script string) int {
	t.Helper()
	cmd := exec.Command("sh", "-c", script)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

// end waits until the process is over, and collects it.
func end(t *testing.T, f *os.File) (how string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := Wait(ctx, f); err != nil {
		t.Fatal(err)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	over := false
	if err := raw.Control(func(fd uintptr) { over, how = Reap(int(fd)) }); err != nil || !over {
		t.Fatalf("a process that was waited for is over: %v, %v", over, err)
	}
	return how
}

func TestLife(t *testing.T) {
	for _, tt := range []struct {
		script, how string
		act         func(pid int, f *os.File) error
	}{
		{"exit 3", "exited with status 3", nil},
		{"sleep 1000", "was killed by signal 15 (SIGTERM)", func(_ int, f *os.File) error { return Signal(f, unix.SIGTERM) }},
		{"sleep 1000", "was killed by signal 9 (SIGKILL)", func(pid int, _ *os.File) error {
			KillIf(pid, func() bool { return false })
			KillIf(os.Getpid(), func() bool { return true })
			f, err := Open(pid, 0)
			if err != nil {
				return err // it has been killed by whom it was not meant for
			}
			defer f.Close()
			KillIf(pid, func() bool { return true })
			return nil
		}},
	} {
		pid := start(t, tt.script)
		began, err := StartTime(pid)
		if err != nil {
			t.Fatal(err)
		}
		if pids, err := All(); err != nil || !slices.Contains(pids, pid) {
			t.Errorf("%d is not among all: %v", pid, err)
		}
		if _, err := Open(pid, began+1); !errors.Is(err, unix.ESRCH) {
			t.Errorf("another process of that number opens: %v", err)
		}
		f, err := Open(pid, began)
		if err != nil {
			t.Fatal(err)
		}
		if tt.act != nil {
			if over, how := Reap(int(f.Fd())); over {
				t.Errorf("%s ended: %s", tt.script, how)
			}
			if err := unix.SetNonblock(int(f.Fd()), true); err != nil { // Fd makes it blocking
				t.Fatal(err)
			}
			if err := tt.act(pid, f); err != nil {
				t.Fatal(err)
			}
		}
		if how := end(t, f); how != tt.how {
			t.Errorf("%s %s, want: %s", tt.script, how, tt.how)
		}
		if _, err := StartTime(pid); err == nil {
			t.Errorf("%d was collected and is still there", pid)
		}
		f.Close()
	}
}

// TestOpenOfTheDying: a process that was collected between two looks at it was an error that said neither that it is gone nor that it is there.
func TestOpenOfTheDying(t *testing.T) {
	for range 300 {
		cmd := exec.Command("true")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		began, err := StartTime(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		collected := make(chan error, 1)
		go func() { collected <- cmd.Wait() }()
		for err = nil; err == nil; {
			var f *os.File
			if f, err = Open(cmd.Process.Pid, began); err == nil {
				f.Close()
			}
		}
		if !errors.Is(err, unix.ESRCH) {
			t.Fatalf("Open of a process that is being collected = %v", err)
		}
		if err := <-collected; err != nil {
			t.Fatal(err)
		}
	}
}

func TestWaitGivesUp(t *testing.T) {
	pid := start(t, "exec sleep 1000")
	f, err := Open(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := Wait(ctx, f); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait for a process that lives on = %v", err)
	}
	f.Close()
	KillIf(pid, func() bool { return true })
	if f, err = Open(pid, 0); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	end(t, f)
}

func FuzzParseStartTime(f *testing.F) {
	const good = "12 (a) b) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 777 0"
	if n, err := parseStartTime([]byte(good)); n != 777 || err != nil {
		f.Errorf("start time = %d, %v", n, err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, stat string) {
		if n, err := parseStartTime([]byte(stat)); err == nil && n != 0 && !strings.Contains(stat, ")") {
			t.Errorf("a start time %d out of nothing", n)
		}
	})
}
