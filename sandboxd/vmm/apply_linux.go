package vmm

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// apply does what the plan says and returns the hypervisor's process. api is the listening socket; log takes what it prints.
func (p Plan) apply(api *net.UnixListener, log *os.File) (pid int, pidfd *os.File, err error) {
	for _, o := range p.Own {
		if err := o.apply(); err != nil {
			return 0, nil, fmt.Errorf("prepare %s: %w", o.Path, err)
		}
	}
	socket, err := api.File()
	if err != nil {
		return 0, nil, fmt.Errorf("pass the API socket: %w", err)
	}
	defer socket.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return 0, nil, err
	}
	defer null.Close()
	fd := -1
	err = onThread(func() error {
		if err := p.enter(); err != nil {
			return err
		}
		attr := &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: p.UID, Gid: p.UID}, // and no supplementary groups
			Setsid:     true,
			Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
			PidFD:      &fd,
		}
		closeCgroup, err := p.joinCgroups(attr)
		if err != nil {
			return err
		}
		defer closeCgroup()
		for _, o := range p.Ops {
			if err := o.apply(); err != nil {
				return fmt.Errorf("make the VM's tree: %s: %w", o, err)
			}
		}
		// The thread's, inherited: nothing in the tree could raise privileges, and now nothing can.
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("forbid new privileges: %w", err)
		}
		pid, err = syscall.ForkExec(insideBinary, p.Argv, &syscall.ProcAttr{
			Dir: "/", Env: []string{"RUST_BACKTRACE=0"}, Sys: attr,
			Files: []uintptr{null.Fd(), log.Fd(), log.Fd(), socket.Fd()},
		})
		if err != nil {
			return fmt.Errorf("execute the hypervisor: %w", err)
		}
		return nil
	})
	if err != nil {
		return 0, nil, err
	}
	if fd < 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		_, _ = syscall.Wait4(pid, nil, 0, nil)
		return 0, nil, errors.New("the kernel gives no descriptors of processes: Linux 5.7 or newer is needed")
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return 0, nil, err
	}
	// A dump of the hypervisor would hold its guest's memory. Where root lacks CAP_SYS_RESOURCE it may not limit another user's process;
	// then the limits are this process's own, as inherited.
	_ = unix.Prlimit(pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil)
	_ = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: 1024}, nil)
	return pid, os.NewFile(uintptr(fd), "pidfd"), nil
}

// enter puts the thread into the sandbox's network namespace, and into a mount namespace of its own on the tree's tmpfs.
func (p Plan) enter() error {
	netns, err := unix.Open(p.NetNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", p.NetNS, err)
	}
	defer unix.Close(netns)
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts to ourselves: %w", err)
	}
	if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", p.NetNS, err)
	}
	unix.Umask(0)
	if err := unix.Mount("tree", p.Tree.Dst, "tmpfs", mountFlags(p.Tree.Flags), p.Tree.Data); err != nil {
		return fmt.Errorf("mount the VM's tree: %w", err)
	}
	if err := unix.Chdir(p.Tree.Dst); err != nil {
		return fmt.Errorf("enter the VM's tree: %w", err)
	}
	return nil
}

// joinCgroups has the hypervisor born in its cgroups: with version 2 by the clone itself, with version 1 by this thread, which goes
// there first.
func (p Plan) joinCgroups(attr *syscall.SysProcAttr) (closeCgroup func(), err error) {
	closeCgroup = func() {}
	for _, dir := range p.Cgroups {
		tasks := filepath.Join(dir, "tasks")
		if _, err := os.Stat(tasks); err == nil {
			if err := os.WriteFile(tasks, []byte("0"), 0); err != nil {
				return closeCgroup, fmt.Errorf("join cgroup %s: %w", dir, err)
			}
			continue
		}
		if attr.UseCgroupFD {
			return closeCgroup, fmt.Errorf("join cgroup %s: a process is in one cgroup of version 2 only", dir)
		}
		fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return closeCgroup, fmt.Errorf("open cgroup %s: %w", dir, err)
		}
		closeCgroup = func() { unix.Close(fd) }
		attr.UseCgroupFD, attr.CgroupFD = true, fd
	}
	return closeCgroup, nil
}

func (o Own) apply() error {
	if o.Dir {
		return ensureDir(o.Path, o.UID, os.FileMode(o.Mode))
	}
	// The last element must be the file itself: its directory is ours, and a link in its place is a mistake.
	fd, err := unix.Open(o.Path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fchown(fd, int(o.UID), int(o.UID)); err != nil {
		return err
	}
	return unix.Fchmod(fd, o.Mode)
}

func (o Op) apply() error {
	switch o.Do {
	case DoMkdir:
		return unix.Mkdir(o.Dst, o.Mode)
	case DoTouch:
		return unix.Mknod(o.Dst, unix.S_IFREG|0o444, 0)
	case DoBind:
		if err := unix.Mount(o.Src, o.Dst, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		return unix.Mount("", o.Dst, "", unix.MS_REMOUNT|unix.MS_BIND|mountFlags(o.Flags), "")
	case DoNode:
		if err := unix.Mknod(o.Dst, unix.S_IFCHR|o.Mode, int(unix.Mkdev(o.Major, o.Minor))); err != nil {
			return err
		}
		return unix.Chown(o.Dst, int(o.UID), int(o.UID))
	case DoReadall:
		return unix.Mount("", ".", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, "")
	case DoPivot:
		if err := unix.PivotRoot(".", "."); err != nil {
			return err
		}
		// The old root is now mounted over the new one; what is beneath comes up when it is gone.
		if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
			return err
		}
		return unix.Chdir("/")
	}
	panic("BUG: unknown step " + string(o.Do))
}

func mountFlags(names []string) (flags uintptr) {
	for _, n := range names {
		switch n {
		case "ro":
			flags |= unix.MS_RDONLY
		case "nosuid":
			flags |= unix.MS_NOSUID
		case "nodev":
			flags |= unix.MS_NODEV
		case "noexec":
			flags |= unix.MS_NOEXEC
		default:
			panic("BUG: unknown mount flag " + n)
		}
	}
	return flags
}

// onThread runs fn on an operating system thread of its own, which ends with fn: fn may leave it in any namespace. The thread is never
// the process's first, which cannot end: everything that goes by /proc/self would see its namespaces for good.
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
