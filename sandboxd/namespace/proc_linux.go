package namespace

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const cldExited = 1 // CLD_EXITED

// siginfoChild is the part of siginfo_t that waitid fills.
type siginfoChild struct {
	code   int32
	pid    int32
	status int32
}

// wait collects the child without blocking; pid stays zero while it runs.
func (c *siginfoChild) wait(pidfd int) error {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PIDFD, pidfd, &info, unix.WEXITED|unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		break
	}
	// struct { int signo, errno, code; [int pad]; int pid; uid_t uid; int status; ... } on all 64-bit machines.
	raw := (*[7]int32)(unsafe.Pointer(&info))
	c.code, c.pid, c.status = raw[2], raw[4], raw[6]
	return nil
}

func startTimeOf(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStartTime(b)
}

// parseStartTime is field 22 of /proc/<pid>/stat. Field 2 is a name that the process chose, with spaces and parentheses if
// it likes.
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

// killIf kills a process that still is what the caller took it for once its number is pinned by a descriptor.
func killIf(pid int, still func() bool) {
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
		// Whoever started it collects it. The caller looks again, so the end of this wait proves nothing.
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000)
	}
}

// allPids lists /proc.
func allPids() ([]int, error) {
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

// survivors recognises the processes of one sandbox by what no stranger has.
type survivors struct {
	spec     Spec
	rootless bool
	netns    uint64          // inode; zero when the namespace is gone or not ours
	sockets  map[string]bool // "socket:[inode]" of the control socket and its connections
	pid      int             // of the first process, with its start, if it is on record
	start    uint64
}

func newSurvivors(spec Spec, rootless bool) survivors {
	s := survivors{spec: spec, rootless: rootless, sockets: map[string]bool{}}
	var st unix.Stat_t
	if spec.NetNS != "" && unix.Stat(spec.NetNS, &st) == nil {
		s.netns = st.Ino
	}
	if b, err := os.ReadFile(filepath.Join(spec.Dir, pidName)); err == nil {
		if n, _ := fmt.Sscan(string(b), &s.pid, &s.start); n != 2 {
			s.pid = 0
		}
	}
	if f, err := os.Open("/proc/self/net/unix"); err == nil {
		for _, inode := range parseUnixSockets(f, spec.controlSocket()) {
			s.sockets["socket:["+inode+"]"] = true
		}
		f.Close()
	}
	return s
}

// parseUnixSockets returns the inodes of the sockets bound to path, from /proc/net/unix.
func parseUnixSockets(r io.Reader, path string) (inodes []string) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		// Num RefCount Protocol Flags Type St Inode Path
		f := strings.SplitN(strings.Join(strings.Fields(sc.Text()), " "), " ", 8)
		if len(f) == 8 && f[7] == path {
			inodes = append(inodes, f[6])
		}
	}
	return inodes
}

// owns tells whether the process belongs to the sandbox: it has an id of the sandbox's range, in its network namespace; or
// it is a stage or an agent that holds the control socket. A shell that an operator opened in the namespace is neither.
func (s survivors) owns(pid int) bool {
	if pid == os.Getpid() {
		return false
	}
	var st unix.Stat_t
	dir := fmt.Sprintf("/proc/%d", pid)
	if unix.Stat(dir, &st) != nil {
		return false
	}
	uid, err := realUID(dir)
	if err != nil {
		return false
	}
	if !s.rootless && uid >= s.spec.UIDBase && uid-s.spec.UIDBase < idCount {
		return s.inNetNS(dir) || s.holdsControl(dir)
	}
	if s.rootless && uid == uint32(os.Geteuid()) {
		return s.isOnRecord(pid) || s.holdsControl(dir)
	}
	return isStage(dir) && s.holdsControl(dir)
}

// isOnRecord knows an agent that has made itself untraceable: to a daemon that is not root its descriptors are closed.
func (s survivors) isOnRecord(pid int) bool {
	if pid != s.pid {
		return false
	}
	start, err := startTimeOf(pid)
	return err == nil && start == s.start
}

func (s survivors) inNetNS(dir string) bool {
	var st unix.Stat_t
	return s.netns != 0 && unix.Stat(dir+"/ns/net", &st) == nil && st.Ino == s.netns
}

func (s survivors) holdsControl(dir string) bool {
	if len(s.sockets) == 0 {
		return false
	}
	fds, err := os.ReadDir(dir + "/fd")
	if err != nil {
		return false
	}
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join(dir, "fd", fd.Name())); err == nil && s.sockets[target] {
			return true
		}
	}
	return false
}

func isStage(dir string) bool {
	b, err := os.ReadFile(dir + "/cmdline")
	return err == nil && bytes.HasPrefix(b, []byte("sluice-namespace-"))
}

// realUID is read from status: the owner of the directory itself is root when the process is not dumpable.
func realUID(dir string) (uint32, error) {
	b, err := os.ReadFile(dir + "/status")
	if err != nil {
		return 0, err
	}
	_, after, ok := bytes.Cut(b, []byte("\nUid:"))
	if !ok {
		return 0, errors.New("process status has no Uid")
	}
	f := bytes.Fields(after[:min(len(after), 64)])
	if len(f) == 0 {
		return 0, errors.New("process status has no Uid")
	}
	uid, err := strconv.ParseUint(string(f[0]), 10, 32)
	return uint32(uid), err
}
