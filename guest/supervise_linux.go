package guest

import (
	"errors"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// StateFDVariable names the descriptor of the directory where the agent of a VM keeps what it was told. Having one says that this is a VM.
	StateFDVariable = "SLUICE_STATE_FD"
	// restartedVariable is set for an agent that follows one of the same boot.
	restartedVariable = "SLUICE_RESTARTED"

	// settledTime is how long an agent must have lived for the next to be started at once.
	settledTime = 10 * time.Second
	// maxRestartPause is the longest pause between agents that end as soon as they are started.
	maxRestartPause = 5 * time.Second
)

// supervise runs the agent and reaps everybody whose parent is gone. It does not return. The control listener stays open here, so that calls
// which come between two agents wait for the next.
func supervise(log *slog.Logger, control int, state *os.File) {
	var pause time.Duration
	for restarted := false; ; restarted = true {
		begin := time.Now()
		pid, err := launchAgent(control, int(state.Fd()), restarted)
		if err != nil {
			log.Error("agent not started", "error", err)
		} else {
			log.Error("agent ended", "status", reapUntil(pid))
		}
		if time.Since(begin) > settledTime {
			pause = 0
			continue
		}
		pause = min(max(2*pause, 50*time.Millisecond), maxRestartPause)
		time.Sleep(pause)
	}
}

// launchAgent starts this very program again, in the way that a node starts it in a namespace.
func launchAgent(control, state int, restarted bool) (pid int, err error) {
	env := append(os.Environ(), ControlFDVariable+"=3", StateFDVariable+"=4")
	if restarted {
		env = append(env, restartedVariable+"=1")
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	// The initramfs, where the program was, has no name any more; what runs has one.
	return syscall.ForkExec("/proc/self/exe", []string{"guestd"}, &syscall.ProcAttr{
		Dir: "/", Env: env, Files: []uintptr{null.Fd(), 1, 2, uintptr(control), uintptr(state)}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
}

// reapUntil reaps orphans until the agent itself has ended, and says how that was.
func reapUntil(agent int) string {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err.Error()
		case pid == agent && status.Signaled():
			return "killed by " + strings.ToUpper(unix.SignalName(status.Signal()))
		case pid == agent:
			return "exit status " + strconv.Itoa(status.ExitStatus())
		}
	}
}

// stateRoot takes the state directory out of the environment; nil when there is none, as in a namespace.
func stateRoot() (*os.Root, error) {
	value, ok := os.LookupEnv(StateFDVariable)
	if !ok {
		return nil, nil
	}
	if err := os.Unsetenv(StateFDVariable); err != nil {
		return nil, err
	}
	fd, err := strconv.Atoi(value)
	if err != nil || fd < 3 {
		return nil, errors.New(StateFDVariable + " is not a descriptor above 2")
	}
	defer unix.Close(fd)
	return os.OpenRoot("/proc/self/fd/" + strconv.Itoa(fd))
}
