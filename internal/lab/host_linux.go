package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/pidfd"
)

// Host is the machine of the laboratory on which Sluice runs.
type Host struct {
	lab *Lab
	net int // network namespace
	mnt int // mount namespace of its programs

	mu   sync.Mutex
	cmds []*Cmd
}

// newHost makes the namespaces. The programs' mount namespace has the laboratory's names in /etc, and a /run/netns of its own: it
// lasts as long as the laboratory, so a program that was killed finds its slots again when it is started anew, and when the
// laboratory goes they go as well.
func newHost(l *Lab) (*Host, error) {
	h := &Host{lab: l, net: -1, mnt: -1}
	var err error
	if h.net, err = newNetNS(); err != nil {
		return nil, err
	}
	etc := map[string]string{
		"hosts":       "127.0.0.1 localhost\n::1 localhost ip6-localhost\n",
		"resolv.conf": "nameserver 8.8.8.8\noptions timeout:2 attempts:2\n",
	}
	for name, content := range etc {
		if err := os.WriteFile(filepath.Join(l.dir, name), []byte(content), 0o644); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return nil, err
	}
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return &os.PathError{Op: "make private", Path: "/", Err: err}
		}
		for name := range etc {
			if err := unix.Mount(filepath.Join(l.dir, name), "/etc/"+name, "", unix.MS_BIND, ""); err != nil {
				return &os.PathError{Op: "bind over", Path: "/etc/" + name, Err: err}
			}
		}
		if err := unix.Mount("lab", netnsDir, "tmpfs", 0, "mode=755"); err != nil {
			return &os.PathError{Op: "mount", Path: netnsDir, Err: err}
		}
		h.mnt, err = unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return os.NewSyscallError("open", err)
	})
	return h, err
}

// Run runs fn on the calling goroutine in the host's network namespace. Sockets that it opens belong there; goroutines that it starts
// do not. It sees the files of the test, not those of Command.
func (h *Host) Run(fn func()) {
	if err := visit(h.net, fn); err != nil {
		panic(fmt.Sprintf("BUG: enter the laboratory's host: %v", err))
	}
}

// Listen listens on an address of the host.
func (h *Host) Listen(network, address string) (ln net.Listener, err error) {
	h.Run(func() { ln, err = net.Listen(network, address) })
	return ln, err
}

// Dial connects from the host. Names are those of the laboratory.
func (h *Host) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	name, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	candidates := []string{name}
	if _, err := netip.ParseAddr(name); err != nil {
		candidates = candidates[:0]
		for _, addr := range h.lab.lookup(name) {
			candidates = append(candidates, addr.String())
		}
	}
	err = &net.DNSError{Err: "no such host in the laboratory", Name: name, IsNotFound: true}
	for _, candidate := range candidates {
		// The whole dial on a thread inside: package net may open several sockets for one connection.
		err = in(h.net, func() (err error) {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, net.JoinHostPort(candidate, port))
			return err
		})
		if err == nil {
			return conn, nil
		}
	}
	return nil, err
}

// Cmd is a program on the host: an exec.Cmd that starts inside.
type Cmd struct {
	*exec.Cmd
	host *Host
}

// Command prepares a program that runs on the host: in its network namespace, with the laboratory's DNS. The laboratory kills it at
// its end if it is still running.
func (h *Host) Command(ctx context.Context, name string, args ...string) *Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, _ = os.Getwd() // the thread that starts it stands in the root directory
	cmd.WaitDelay = 10 * time.Second
	return &Cmd{Cmd: cmd, host: h}
}

// Start starts the program.
func (c *Cmd) Start() error {
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil { // a mount namespace is entered by whoever shares no directory
			return os.NewSyscallError("unshare", err)
		}
		if err := unix.Setns(c.host.mnt, unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("setns", err)
		}
		if err := unix.Setns(c.host.net, unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return c.Cmd.Start()
	})
	if err != nil {
		return err
	}
	c.host.mu.Lock()
	defer c.host.mu.Unlock()
	c.host.cmds = append(c.host.cmds, c)
	return nil
}

// Run starts the program and waits for its end.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the program and returns what it wrote on its standard output.
func (c *Cmd) Output() ([]byte, error) {
	var out lockedBuffer
	c.Stdout = &out
	err := c.Run()
	return out.Bytes(), err
}

// CombinedOutput runs the program and returns everything it wrote.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var out lockedBuffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}

// close ends every program that was started here and every process that lives in the host's network or in a slot that one of its
// programs made, then lets the namespaces go.
func (h *Host) close() {
	h.mu.Lock()
	cmds := h.cmds
	h.mu.Unlock()
	for _, c := range cmds {
		_ = c.Process.Kill() // does nothing to one that was waited for
	}
	inodes := h.namespaces()
	for range 50 {
		if killInside(inodes) == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond) // they are dying; a child may have been forked meanwhile
	}
	for _, fd := range []int{h.net, h.mnt} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// namespaces identifies the host's network namespace and those mounted in the programs' /run/netns.
func (h *Host) namespaces() map[uint64]bool {
	inodes := map[uint64]bool{}
	var st unix.Stat_t
	if h.net >= 0 && unix.Fstat(h.net, &st) == nil {
		inodes[st.Ino] = true
	}
	if h.mnt < 0 {
		return inodes
	}
	_ = onThread(func() error {
		if err := errors.Join(unix.Unshare(unix.CLONE_FS), unix.Setns(h.mnt, unix.CLONE_NEWNS)); err != nil {
			return err
		}
		entries, err := os.ReadDir(netnsDir)
		for _, entry := range entries {
			var st unix.Stat_t
			var fs unix.Statfs_t
			path := filepath.Join(netnsDir, entry.Name())
			if unix.Statfs(path, &fs) == nil && fs.Type == unix.NSFS_MAGIC && unix.Stat(path, &st) == nil {
				inodes[st.Ino] = true
			}
		}
		return err
	})
	return inodes
}

// killInside kills the processes whose network namespace is one of these, and returns how many it found.
func killInside(inodes map[uint64]bool) (found int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0
	}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() || !livesIn(pid, inodes) {
			continue
		}
		pidfd.KillIf(pid, func() bool {
			still := livesIn(pid, inodes)
			if still {
				found++
			}
			return still
		})
	}
	return found
}

func livesIn(pid int, inodes map[uint64]bool) bool {
	var st unix.Stat_t
	return unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st) == nil && inodes[st.Ino]
}
