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

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/pidfd"
)

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
	start, err := pidfd.StartTime(pid)
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
