package namespace

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// argv[0] of the re-executed binary. Nothing else is passed by argument: a command line is for everybody to read.
const (
	stageOneName = "sluice-namespace-1"
	stageTwoName = "sluice-namespace-2"
	probeName    = "sluice-namespace-probe"
)

// Descriptors of the stages. Control keeps its number for guestd.
const (
	fdPlan    = 0 // stage one: the plan as JSON. Stage two: the same, when stage one has made the mounts
	fdControl = 3
	fdStatus  = 4 // lines of status to the daemon
	fdCommit  = 5 // stage one only: a byte when the sandbox is on record, end of file when the daemon is dead
)

// status is one line from a stage to the daemon.
type status struct {
	Step  string `json:"step,omitempty"`
	PID   int    `json:"pid,omitempty"`
	Error string `json:"error,omitempty"`
}

func report(s status) {
	b, _ := json.Marshal(s) // a struct of strings and an int
	_, _ = unix.Write(fdStatus, append(b, '\n'))
}

// MaybeInit turns this process into a stage of a sandbox's start if it was executed as one, and then never returns. It
// must be the first statement of main, and of TestMain, in every binary that calls Start.
func MaybeInit() {
	var err error
	switch os.Args[0] {
	case stageOneName:
		err = stageOne()
	case stageTwoName:
		err = stageTwo()
	case probeName:
		_, err = io.Copy(io.Discard, os.Stdin) // only its user namespace is wanted, for as long as the daemon holds the pipe
	default:
		return
	}
	if err != nil {
		report(status{Error: err.Error()})
		os.Exit(1)
	}
	os.Exit(0)
}

func readPlan() (Plan, error) {
	var p Plan
	if err := json.NewDecoder(bufio.NewReader(planReader{})).Decode(&p); err != nil {
		return Plan{}, fmt.Errorf("read plan: %w", err)
	}
	return p, nil
}

// planReader reads the plan's descriptor and keeps it open: number 0 must not be given to something else meanwhile.
type planReader struct{}

func (planReader) Read(b []byte) (int, error) {
	n, err := unix.Read(fdPlan, b)
	if n == 0 && err == nil {
		return 0, io.EOF
	}
	return max(n, 0), err
}

// watchdog kills the sandbox if the daemon dies before it has committed. It lives in stage one.
type watchdog struct {
	mu    sync.Mutex
	pidfd int // of stage two; -1 before there is one
	dead  bool
}

// run waits for the daemon's word and ends the process.
func (w *watchdog) run() {
	var b [1]byte
	for {
		n, err := unix.Read(fdCommit, b[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n == 1 {
			os.Exit(0)
		}
		break
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dead = true
	if w.pidfd >= 0 {
		_ = unix.PidfdSendSignal(w.pidfd, unix.SIGKILL, nil, 0)
	}
	os.Exit(1)
}

// stageOne is root on the host (or nobody in particular, when rootless). It makes the mounts, starts stage two, and stays
// as its watchdog.
func stageOne() error {
	runtime.LockOSThread()
	dog := &watchdog{pidfd: -1}
	go dog.run()
	unix.CloseOnExec(fdStatus)
	unix.CloseOnExec(fdControl)
	unix.CloseOnExec(fdCommit)
	p, err := readPlan()
	if err != nil {
		return err
	}
	if !p.Rootless {
		if err := enterNetNS(p.NetNS); err != nil {
			return err
		}
		if err := privateMounts(p.Workspace); err != nil {
			return err
		}
	}

	if err := dropOOMProtection(); err != nil {
		return err
	}
	gateRead, gateWrite, err := os.Pipe()
	if err != nil {
		return err
	}
	// The gate stays closed until the mounts are there. If this process dies meanwhile, stage two reads the end of the pipe.
	child, err := cloneStageTwo(p, gateRead)
	if err != nil {
		return fmt.Errorf("clone into namespaces: %w", err)
	}
	pidfd, err := unix.PidfdOpen(child, 0)
	if err != nil {
		return fmt.Errorf("open pidfd: %w", err)
	}
	dog.mu.Lock()
	dog.pidfd = pidfd
	dog.mu.Unlock()
	report(status{Step: "cloned", PID: child})
	joined := make(chan error, 1)
	go joinCgroups(p.Cgroups, child, joined)

	if !p.Rootless {
		userns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/user", child), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open user namespace: %w", err)
		}
		if err := apply(p.Setup, userns); err != nil {
			return fmt.Errorf("set up root: %w", err)
		}
		unix.Close(userns)
		report(status{Step: "mounted"})
	}
	if err := <-joined; err != nil {
		return err
	}
	report(status{Step: "contained"})
	if err := json.NewEncoder(gateWrite).Encode(p); err != nil {
		return fmt.Errorf("open gate: %w", err)
	}
	gateRead.Close()
	gateWrite.Close()
	unix.Close(fdStatus) // the daemon reads to the end of it: when guestd's execution has closed the other copy
	unix.Close(fdControl)
	select {} // the watchdog ends the process
}

// joinCgroups moves both stages while the mounts are made: in version 1 the kernel waits some fifteen milliseconds for all
// its processors before a process has moved. Stage two waits at its gate meanwhile, so the sandbox itself begins inside.
func joinCgroups(dirs []string, child int, joined chan<- error) {
	for _, dir := range dirs {
		for _, pid := range []int{child, os.Getpid()} {
			if err := writeFile(dir+"/cgroup.procs", strconv.Itoa(pid)); err != nil {
				joined <- fmt.Errorf("join cgroup: %w", err)
				return
			}
		}
	}
	joined <- nil
}

// dropOOMProtection: a daemon may be spared by the host's killer, its sandboxes never. Inside nobody can lower it again.
func dropOOMProtection() error {
	const file = "/proc/self/oom_score_adj"
	b, err := os.ReadFile(file)
	if err != nil || !strings.HasPrefix(string(b), "-") {
		return err
	}
	return writeFile(file, "0")
}

func enterNetNS(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return nil
}

// privateMounts leaves the host's mount namespace and goes to the workspace, which stage two inherits as its directory.
func privateMounts(workspace Op) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := applyOne(workspace, -1); err != nil {
		return fmt.Errorf("%s: %w", workspace, err)
	}
	return unix.Chdir(workspace.Dst)
}

// cloneStageTwo returns its pid. CLONE_PARENT makes it the daemon's child instead of ours, so that the daemon learns its
// end. It shares our mount namespace until the mounts are ready, and then makes its own.
func cloneStageTwo(p Plan, gate *os.File) (int, error) {
	attr := &syscall.ProcAttr{
		Env:   []string{},
		Files: []uintptr{gate.Fd(), 1, 2, fdControl, fdStatus},
		Sys: &syscall.SysProcAttr{
			Setsid: true,
			Cloneflags: unix.CLONE_PARENT | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWUTS |
				unix.CLONE_NEWIPC,
		},
	}
	if p.Rootless {
		attr.Sys.Cloneflags |= unix.CLONE_NEWNET
		attr.Sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: userID, HostID: os.Geteuid(), Size: 1}}
		attr.Sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: userID, HostID: os.Getegid(), Size: 1}}
		for c := range uintptr(unix.CAP_LAST_CAP + 1) { // lost at execution otherwise, not being uid 0 inside
			attr.Sys.AmbientCaps = append(attr.Sys.AmbientCaps, c)
		}
	} else {
		attr.Sys.UidMappings = []syscall.SysProcIDMap{{HostID: int(p.UIDBase), Size: idCount}}
		attr.Sys.GidMappings = attr.Sys.UidMappings
		attr.Sys.GidMappingsEnableSetgroups = true
		attr.Sys.Credential = &syscall.Credential{Uid: 0, Gid: 0}
	}
	if p.Rootless {
		return syscall.ForkExec("/proc/self/exe", []string{stageTwoName}, attr)
	}
	var child int
	err := asOwner(p.UIDBase, func() (err error) {
		child, err = syscall.ForkExec("/proc/self/exe", []string{stageTwoName}, attr)
		return err
	})
	return child, err
}

// asOwner runs f with the effective user id uid on this thread, and all capabilities all the same. Whatever a user
// namespace makes counts against the quotas of the id that made the namespace (inotify instances, message queues, pending
// signals, locked memory), so that id must be the sandbox's and not the host's root, which all sandboxes would share.
func asOwner(uid uint32, f func() error) error {
	const keep = ^uintptr(0)
	// By the raw calls: those of the libraries change every thread.
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
		return fmt.Errorf("become the owner of the sandbox's ids: %w", errno)
	}
	err := raiseCapabilities()
	if err == nil {
		err = f()
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, 0, keep); errno != 0 {
		return errors.Join(err, fmt.Errorf("become root again: %w", errno))
	}
	return err
}

// raiseCapabilities makes effective what is permitted: the kernel takes the effective ones from whoever leaves uid 0.
func raiseCapabilities() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for i := range data {
		data[i].Effective = data[i].Permitted
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("raise capabilities: %w", err)
	}
	return nil
}

// stageTwo is the first process of the sandbox. It ends as guestd.
func stageTwo() error {
	runtime.LockOSThread() // capabilities, no_new_privs and the filter belong to the thread that will execute guestd
	unix.CloseOnExec(fdStatus)
	unix.CloseOnExec(fdControl)
	p, err := readPlan()
	if err != nil {
		return err
	}
	if p.Rootless {
		err = privateMounts(p.Workspace)
	} else {
		err = unix.Unshare(unix.CLONE_NEWNS)
	}
	if err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare cgroup namespace: %w", err)
	}
	if err := setQuotas(p); err != nil {
		return err
	}
	if p.Rootless {
		if err := loopbackUp(); err != nil {
			return err
		}
		if err := apply(p.Setup, -1); err != nil {
			return fmt.Errorf("set up root: %w", err)
		}
		report(status{Step: "mounted"})
	}
	guestd, err := unix.Open("guestd", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open guestd: %w", err)
	}
	if err := apply(p.Inside, -1); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	if err := unix.Sethostname([]byte(p.Hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	unix.Umask(0o022)
	if err := setRlimits(p); err != nil {
		return err
	}
	report(status{Step: "inside"})
	return becomeGuestd(p, guestd)
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	return nil
}

// setQuotas bounds what the sandbox takes of the kernel's own tables. The files are those of the writer's user namespace,
// whatever proc they are opened in.
func setQuotas(p Plan) error {
	for _, q := range p.Quotas {
		err := writeFile("/proc/sys/user/"+q.Name, strconv.Itoa(q.Max))
		if err != nil && !errors.Is(err, unix.ENOENT) { // a kernel that does not have such things
			return fmt.Errorf("set quota: %w", err)
		}
	}
	return nil
}

func setRlimits(p Plan) error {
	set := func(name string, which int, soft, hard uint64) error {
		var now unix.Rlimit
		if err := unix.Getrlimit(which, &now); err != nil {
			return fmt.Errorf("read rlimit %s: %w", name, err)
		}
		hard = min(hard, now.Max) // raising it is the host's root's alone
		if err := unix.Setrlimit(which, &unix.Rlimit{Cur: min(soft, hard), Max: hard}); err != nil {
			return fmt.Errorf("set rlimit %s: %w", name, err)
		}
		return nil
	}
	// Enough for any server; above it, programs that try every number at a fork become slow.
	if err := set("nofile", unix.RLIMIT_NOFILE, 1<<16, p.Nofile); err != nil {
		return err
	}
	if err := set("core", unix.RLIMIT_CORE, 0, 0); err != nil {
		return err
	}
	if p.Nproc > 0 {
		if err := set("nproc", unix.RLIMIT_NPROC, uint64(p.Nproc), uint64(p.Nproc)); err != nil {
			return err
		}
	}
	if p.DataMiB > 0 {
		bytes := uint64(p.DataMiB) << 20
		return set("data", unix.RLIMIT_DATA, bytes, bytes)
	}
	return nil
}

// keptCapabilities is what root inside may still do, all of it within its own ids and mounts:
//
//	CHOWN FOWNER FSETID DAC_OVERRIDE  install software, own files for others; guestd writes files of every user
//	SETUID SETGID                     guestd and su become other users
//	KILL                              guestd signals other users' processes
//	SYS_CHROOT                        build tools and package managers; leads nowhere but to our own root
//
// Not kept, though Docker does: NET_BIND_SERVICE and NET_RAW, void in a network namespace of somebody else's; MKNOD, void
// in a user namespace; SETPCAP and SETFCAP, useless under no_new_privs; AUDIT_WRITE.
var keptCapabilities = []uint{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_KILL, unix.CAP_SETGID, unix.CAP_SETUID,
	unix.CAP_SYS_CHROOT,
}

func capabilityMask(caps []uint) (mask uint64) {
	for _, c := range caps {
		mask |= 1 << c
	}
	return mask
}

// becomeGuestd gives up all power and executes the agent. Nothing may fail open: each step's failure ends the start.
func becomeGuestd(p Plan, guestd int) error {
	keep := capabilityMask(keptCapabilities)
	if p.Rootless {
		keep = 0 // a single id has no use for any
	}
	for c := uint(0); c < 64; c++ {
		if keep&(1<<c) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // the first number that this kernel does not know
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	half := func(shift uint) unix.CapUserData {
		bits := uint32(keep >> shift)
		return unix.CapUserData{Effective: bits, Permitted: bits} // nothing inheritable: execution by uid 0 gives it back
	}
	data := [2]unix.CapUserData{half(0), half(32)}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY, 0)
	if err != nil {
		return fmt.Errorf("open /dev/null: %w", err)
	}
	if null != 0 {
		if err := unix.Dup3(null, 0, 0); err != nil {
			return fmt.Errorf("set standard input: %w", err)
		}
		unix.Close(null)
	}
	if err := unix.CloseRange(fdControl, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("mark descriptors: %w", err)
	}
	if _, err := unix.FcntlInt(fdControl, unix.F_SETFD, 0); err != nil {
		return fmt.Errorf("keep control socket: %w", err)
	}
	if err := confine(assemble(policy())); err != nil {
		return err
	}
	err = syscall.Exec(fmt.Sprintf("/proc/self/fd/%d", guestd), []string{"guestd"}, p.Env)
	return fmt.Errorf("execute guestd: %w", err)
}
