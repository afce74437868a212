package netdev

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// onThread runs fn on an operating system thread of its own, which ends with fn: fn may leave it in any namespace. fn must not
// start goroutines or processes that rely on that namespace. The thread is never the process's first, which cannot end: it would
// keep the namespace for good, and everything that goes by /proc/self would see it.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			done <- onThread(fn) // this goroutine holds the first thread meanwhile, so the next one gets another
			runtime.UnlockOSThread()
			return
		}
		done <- fn() // never unlocked: the runtime discards the thread when its goroutine ends
	}()
	return <-done
}

// inNetNS is onThread inside the namespace that ns refers to.
func inNetNS(ns int, fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// openThreadNetNS opens the network namespace of the calling thread.
func openThreadNetNS() (int, error) {
	const path = "/proc/thread-self/ns/net"
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// openNetNS opens a namespace by its path, and fails when nothing is mounted there.
func openNetNS(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("%s is no network namespace: %w", path, unix.EINVAL)
	}
	return fd, nil
}
