// Command nested is the first process of a nested host: it sets up a Linux system in memory and does what it is told over TCP.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// request is the first line of a connection. Exactly one of its verbs is set.
type request struct {
	Run  []string
	Env  []string
	Dir  string
	Put  string
	Mode uint32
	Size int64
	Get  string
	Dial string
	Beat bool
	Off  bool
}

const (
	frameOutput = 1
	frameEnd    = 2 // JSON: result
)

type result struct {
	Code int
	Err  string
}

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "this is the first process of a nested host and nothing else")
		os.Exit(2)
	}
	if len(os.Args) > 1 && os.Args[1] == "second" {
		fail("serve", serve())
	}
	fail("change root", changeRoot())
}

// fail ends the machine: its console is read by who started it.
func fail(what string, err error) {
	fmt.Printf("NESTED-FAILED %s: %v\n", what, err)
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// changeRoot moves everything to a tmpfs: from the kernel's first file system nothing can pivot.
func changeRoot() error {
	if err := os.Mkdir("/new", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("root", "/new", "tmpfs", 0, "mode=0755"); err != nil {
		return err
	}
	err := filepath.WalkDir("/", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path == "/new" {
			return filepath.SkipDir
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case path == "/":
			return nil
		case st.IsDir():
			return os.MkdirAll("/new"+path, st.Mode().Perm())
		case st.Mode().IsRegular():
			if err := move(path, "/new"+path, st.Mode().Perm()); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := unix.Chdir("/new"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	return unix.Exec("/init", []string{"/init", "second"}, []string{"PATH=/bin:/sbin:/usr/bin:/usr/sbin", "HOME=/root", "TMPDIR=/tmp"})
}

func move(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Remove(from) // the memory is needed
}

func serve() error {
	for _, m := range [][4]string{
		{"proc", "/proc", "proc", ""}, {"sys", "/sys", "sysfs", ""}, {"dev", "/dev", "devtmpfs", ""}, {"pts", "/dev/pts", "devpts", ""},
		{"shm", "/dev/shm", "tmpfs", ""}, {"tmp", "/tmp", "tmpfs", "mode=1777"}, {"run", "/run", "tmpfs", "mode=0755"},
		{"cgroup", "/sys/fs/cgroup", "cgroup2", ""},
	} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m[0], m[1], m[2], 0, m[3]); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	for _, d := range []string{"/root", "/var/tmp", "/etc", "/disk"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for name, content := range map[string]string{"hosts": "127.0.0.1 localhost\n::1 localhost\n", "resolv.conf": ""} {
		if err := os.WriteFile("/etc/"+name, []byte(content), 0o644); err != nil {
			return err
		}
	}
	files, err := os.ReadFile("/lib/modules/order")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(files)) {
		if err := load(filepath.Join("/lib/modules", name)); err != nil {
			fmt.Printf("load %s: %v\n", name, err)
		}
	}
	if err := unix.Mount("/dev/vda", "/disk", "ext4", unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount the disk: %w", err)
	}
	if err := network(); err != nil {
		return fmt.Errorf("set up the network: %w", err)
	}
	l, err := net.Listen("tcp", ":7000")
	if err != nil {
		return err
	}
	go orphans.reap()
	fmt.Println("NESTED-READY")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			handle(c.(*net.TCPConn))
		}()
	}
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func network() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr("10.0.2.15/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(eth, addr); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(eth); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: net.IPv4(10, 0, 2, 2)})
}

func handle(c *net.TCPConn) {
	r := bufio.NewReader(c)
	line, err := r.ReadBytes('\n')
	if err != nil {
		return
	}
	var req request
	if err := json.Unmarshal(line, &req); err != nil {
		end(c, 0, err)
		return
	}
	switch {
	case len(req.Run) > 0:
		run(c, req)
	case req.Put != "":
		end(c, 0, put(r, req))
	case req.Get != "":
		f, err := os.Open(req.Get)
		if err == nil {
			_, err = io.Copy(&frames{w: c}, f)
			f.Close()
		}
		end(c, 0, err)
	case req.Dial != "":
		up, err := net.Dial("tcp", req.Dial)
		end(c, 0, err)
		if err == nil {
			splice(c, r, up.(*net.TCPConn))
		}
	case req.Beat:
		_, _ = io.Copy(io.Discard, r) // that something comes is all there is to it
	case req.Off:
		unix.Sync()
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
}

func put(r io.Reader, req request) error {
	if err := os.MkdirAll(filepath.Dir(req.Put), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(req.Put, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, os.FileMode(req.Mode))
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, r, req.Size)
	return errors.Join(err, f.Chmod(os.FileMode(req.Mode)), f.Close())
}

// run executes a program until it ends or nobody listens any more.
func run(c *net.TCPConn, req request) {
	cmd := exec.Command(req.Run[0], req.Run[1:]...)
	cmd.Env, cmd.Dir = append(os.Environ(), req.Env...), req.Dir
	out := &frames{w: c}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := orphans.start(cmd); err != nil {
		end(c, 0, err)
		return
	}
	defer orphans.forget(cmd)
	over := make(chan struct{})
	go func() {
		_, _ = c.Read(make([]byte, 1)) // ends when the other side goes away, or with the connection
		select {
		case <-over:
		default:
			_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		}
	}()
	err := cmd.Wait()
	close(over)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		code := exit.ExitCode()
		if code < 0 {
			end(c, 0, exit)
			return
		}
		end(c, code, nil)
		return
	}
	end(c, 0, err)
}

// orphans are the processes that lost their parent and so have us for one. Somebody has to ask how they ended, or they stay.
var orphans = &family{own: map[int]bool{}}

type family struct {
	mu  sync.Mutex
	own map[int]bool // our own, for which somebody waits
}

func (f *family) start(cmd *exec.Cmd) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := cmd.Start()
	if err == nil {
		f.own[cmd.Process.Pid] = true
	}
	return err
}

func (f *family) forget(cmd *exec.Cmd) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.own, cmd.Process.Pid)
}

// reap looks whenever a child has ended.
func (f *family) reap() {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	for range ended {
		f.mu.Lock()
		for _, pid := range f.zombies() {
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		f.mu.Unlock()
	}
}

func (f *family) zombies() (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || f.own[pid] {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		// The name before the last parenthesis may hold anything; the state and the parent come after it.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) > 1 && fields[0] == "Z" && fields[1] == "1" {
			pids = append(pids, pid)
		}
	}
	return pids
}

type frames struct {
	mu sync.Mutex
	w  io.Writer
}

func (f *frames) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(b), frame(f.w, frameOutput, b)
}

func frame(w io.Writer, kind byte, b []byte) error {
	head := make([]byte, 5, 5+len(b))
	head[0] = kind
	binary.BigEndian.PutUint32(head[1:], uint32(len(b)))
	_, err := w.Write(append(head, b...))
	return err
}

func end(w io.Writer, code int, err error) {
	res := result{Code: code}
	if err != nil {
		res.Err = err.Error()
	}
	b, _ := json.Marshal(res)
	_ = frame(w, frameEnd, b)
}

// splice copies both ways. An end in one direction is passed on; an error ends both.
func splice(c *net.TCPConn, buffered io.Reader, up *net.TCPConn) {
	defer up.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pass(up, c, buffered)
	}()
	pass(c, up, up)
	<-done
}

func pass(to, from *net.TCPConn, r io.Reader) {
	if _, err := io.Copy(to, r); err != nil {
		for _, c := range []*net.TCPConn{to, from} {
			_ = c.SetLinger(0)
			_ = c.Close()
		}
		return
	}
	_ = to.CloseWrite()
}
