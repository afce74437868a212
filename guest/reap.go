package guest

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// reapOrphans waits for the processes that nobody waits for: as pid 1 the agent inherits every orphan of the sandbox.
func (ps *processes) reapOrphans(ctx context.Context) {
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	defer signal.Stop(children)
	for {
		// One of ours at the head of the kernel's list hides the orphans behind it until its owner has reaped it, which is now.
		again := ps.reap()
		var retry <-chan time.Time
		if again {
			retry = time.After(5 * time.Millisecond)
		}
		select {
		case <-ctx.Done():
			return
		case <-children:
		case <-retry:
		}
	}
}

// reap reaps orphans until there is none or until one of our own is in the way.
func (ps *processes) reap() (again bool) {
	ps.forking.Lock()
	defer ps.forking.Unlock()
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		pid := childOf(&info)
		if err != nil || pid == 0 {
			return false
		}
		if _, ours := ps.owned[pid]; ours {
			return true
		}
		var status unix.WaitStatus
		if _, err := unix.Wait4(pid, &status, unix.WNOHANG, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return false
		}
	}
}

// childOf is si_pid of a SIGCHLD siginfo, which x/sys leaves untyped: the first field of the union, which is aligned like a pointer.
func childOf(info *unix.Siginfo) int {
	const head = 3 * unsafe.Sizeof(int32(0))
	const union = (head + unsafe.Sizeof(uintptr(0)) - 1) &^ (unsafe.Sizeof(uintptr(0)) - 1)
	return int(*(*int32)(unsafe.Add(unsafe.Pointer(info), union)))
}
