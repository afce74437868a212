// Package pidfd refers to processes by descriptor (pidfd_open(2)), so that a number which another process got meanwhile is never taken for
// the one that was meant.
package pidfd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Open opens the process that started at a time of StartTime, or any of that number if it is zero. ESRCH means that it is gone, or about to
// be: it has been collected. The descriptor pins it, and waits in the poller.
func Open(pid int, startTime uint64) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.EINVAL) { // the number is that of a thread, be it of this very process as it ends
		err = unix.ESRCH
	}
	if err != nil {
		return nil, err
	}
	if startTime != 0 {
		now, err := StartTime(pid)
		if errors.Is(err, fs.ErrNotExist) || err == nil && now != startTime {
			err = unix.ESRCH
		}
		if err != nil {
			unix.Close(fd)
			return nil, err
		}
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// Signal signals a process that Open has opened.
func Signal(f *os.File, sig unix.Signal) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	return errors.Join(err, sent)
}

// KillIf kills a process, unless it is this one, that still is what the caller took it for once its number is pinned, and waits a moment
// for its end. Whoever started it collects it; the caller looks again.
func KillIf(pid int, still func() bool) {
	if pid == os.Getpid() {
		return
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if still() {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000)
	}
}

// Reap tells without waiting whether the process is over and how it ended, as the end of a sentence about it, and collects it if it is our
// child.
func Reap(fd int) (over bool, how string) {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PIDFD, fd, &info, unix.WEXITED|unix.WNOHANG, nil)
	if errors.Is(err, unix.ECHILD) {
		return Over(fd), "ended"
	}
	if err != nil {
		return false, ""
	}
	// struct { int signo, errno, code; [int pad]; int pid; uid_t uid; int status; ... } on all 64-bit machines.
	fields := (*[7]int32)(unsafe.Pointer(&info))
	code, pid, status := fields[2], fields[4], fields[6]
	const exited = 1 // CLD_EXITED
	switch {
	case pid == 0:
		return false, ""
	case code == exited:
		return true, fmt.Sprintf("exited with status %d", status)
	default:
		return true, fmt.Sprintf("was killed by signal %d (%s)", status, unix.SignalName(unix.Signal(status)))
	}
}

// Over tells without waiting whether the process is over. It stays for whoever started it to collect.
func Over(fd int) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err == nil && n > 0
}

// Wait waits until the process is over. It stays for whoever started it to collect. A descriptor whose wait ctx ended is of no more use than
// to be closed.
func Wait(ctx context.Context, f *os.File) error {
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	err = raw.Read(func(fd uintptr) bool { return Over(int(fd)) })
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// StartTime is when a process started, in clock ticks since boot. With its number it names the process.
func StartTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStartTime(b)
}

// parseStartTime is field 22 of /proc/<pid>/stat. Field 2 is a name that the process chose, with spaces and parentheses if it likes.
func parseStartTime(stat []byte) (uint64, error) {
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, errors.New("process status has no name")
	}
	fields := strings.Fields(string(stat[i+1:]))
	if len(fields) < 20 {
		return 0, errors.New("process status is too short")
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// All lists the numbers of all processes.
func All() ([]int, error) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
