package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Nested is a machine inside this one whose /dev/kvm works, for tests that start VMs where the hardware's own KVM cannot be had: a Debian
// cloud kernel under an emulated processor that has AMD's virtualization. It is slow, some ten times, but all of it is real. Its file
// system is memory, with an ext4 disk at NestedDisk for what is large; its first process is ours, and it has one processor: with two,
// its kernel locks up now and then.
type Nested struct {
	addr    string // of its first process, on our loopback
	dialing sync.Mutex
	console *console
	cmd     *exec.Cmd
	exited  chan struct{}
}

// InsideVariable is set for programs that run inside a nested host.
const InsideVariable = "SLUICE_NESTED"

// Where a nested host has what VMs are made of. The variables of the same meaning are set for everything that runs inside.
const (
	nestedVMM    = "/sluice/cloud-hypervisor"
	nestedKernel = "/sluice/kernel" // as FindKernel wants it
)

// NestedDisk is where a nested host has a disk: templates, snapshots and the directories of sandboxes belong there, not into its memory.
// It is gone with the host.
const NestedDisk = "/disk"

// The modules that every nested host loads: its own devices, KVM, and what sandboxes are made with. More of them cost a few
// milliseconds each.
var nestedModules = []string{
	"virtio_pci", "virtio_net", "virtio_rng", "virtio_blk", "irqbypass", "kvm", "kvm_amd", "tun", "veth", "dummy", "bridge", "overlay", "ext4",
	"erofs", "loop", "nf_tables", "nf_conntrack", "nft_ct", "nft_nat", "nft_masq", "nft_reject", "nft_reject_inet", "nft_limit", "nft_fib_inet",
	"nft_redir", "nft_log", "nft_chain_nat", "nft_counter", "nf_conntrack_netlink", "nft_tproxy", "nft_socket", "inet_diag", "tcp_diag", "udp_diag",
	"nft_quota", "nft_numgen", "nft_hash", "nf_nat", "nft_connlimit", "nft_objref", "nft_fwd_netdev", "nft_dup_netdev", "nft_reject_netdev",
	"sch_ingress", "sch_fq", "act_police", "cls_matchall",
}

// GuestModules are what a VM in a nested host needs as modules of the same kernel.
var GuestModules = []string{
	"virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "vsock", "vmw_vsock_virtio_transport", "overlay", "ext4", "erofs", "virtio_console",
	"inet_diag", "tcp_diag",
}

var nested struct {
	sync.Mutex
	n    *Nested
	skip error // it cannot be had
	fail error // it should have worked
}

// InKVM tells whether a test that needs KVM can go on here. If KVM does not work here, it runs this very test of this very binary in
// the nested host instead and reports its result; then the test has nothing left to do:
//
//	if !lab.InKVM(t) {
//		return
//	}
//
// It skips the test where neither is possible, and says what is missing.
func InKVM(t *testing.T) bool {
	t.Helper()
	if os.Getenv(InsideVariable) != "" {
		return true
	}
	if _, err := FindVMM(); err != nil {
		t.Skip("VM tests need it: " + err.Error())
	}
	if NativeKVM() {
		return true
	}
	n := NewNested(t)
	n.RunTest(t)
	return false
}

// FindVMM looks for Cloud Hypervisor: SLUICE_CLOUD_HYPERVISOR, then PATH.
func FindVMM() (string, error) {
	name := os.Getenv("SLUICE_CLOUD_HYPERVISOR")
	if name == "" {
		name = "cloud-hypervisor"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("no cloud-hypervisor: install v52 or newer on PATH, or name it in SLUICE_CLOUD_HYPERVISOR (%w)", err)
	}
	return filepath.Abs(path)
}

// NativeKVM tells whether this machine's own KVM runs guests, by trying it: a device that exists may still have nothing behind it.
func NativeKVM() bool {
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	const createVM, createVCPU = 0xae01, 0xae41
	vm, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), createVM, 0)
	if errno != 0 {
		return false
	}
	defer unix.Close(int(vm))
	vcpu, _, errno := unix.Syscall(unix.SYS_IOCTL, vm, createVCPU, 0)
	if errno != 0 {
		return false
	}
	unix.Close(int(vcpu))
	// Where the machine is itself a VM without nesting there are devices that get this far and no further. Only running a guest tells,
	// so this is for people who know their machine.
	return os.Getenv("SLUICE_NATIVE_KVM") != ""
}

// NewNested returns the nested host of this test binary and boots it when it is the first to ask. It lives until CloseNested, or
// until this process ends. It skips the test when something is missing.
func NewNested(t testing.TB) *Nested {
	t.Helper()
	nested.Lock()
	defer nested.Unlock()
	if nested.n == nil && nested.skip == nil && nested.fail == nil {
		plan, err := planNested()
		if err != nil {
			nested.skip = err
		} else {
			nested.n, nested.fail = plan.boot()
		}
	}
	if nested.skip != nil {
		t.Skip("no nested host: " + nested.skip.Error())
	}
	if nested.fail != nil {
		t.Fatalf("boot the nested host: %v", nested.fail)
	}
	return nested.n
}

// CloseNested ends the nested host, for TestMain. Without it the host ends with the process.
func CloseNested() {
	nested.Lock()
	defer nested.Unlock()
	if nested.n == nil {
		return
	}
	_ = nested.n.cmd.Process.Kill()
	<-nested.n.exited
	nested.n = nil
	nested.fail = errors.New("it was closed")
}

// nestedPlan is what a nested host is made of.
type nestedPlan struct {
	qemu   string
	mke2fs string
	kernel Kernel
	files  []File
}

func planNested() (p nestedPlan, err error) {
	if p.qemu, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		return p, errors.New("no qemu-system-x86_64: apt-get install --no-install-recommends qemu-system-x86")
	}
	if p.mke2fs, err = findMke2fs(); err != nil {
		return p, err
	}
	if p.kernel, err = FindKernel(); err != nil {
		return p, err
	}
	modules, err := p.kernel.ModuleFiles(nestedModules...)
	if err != nil {
		return p, err
	}
	var order strings.Builder
	for _, m := range modules {
		order.WriteString(filepath.Base(m) + "\n")
		p.files = append(p.files, File{Path: "/lib/modules/" + filepath.Base(m), Mode: 0o644, Src: m})
	}
	p.files = append(p.files, File{Path: "/lib/modules/order", Mode: 0o644, Data: []byte(order.String())})
	// For the VMs inside: the same kernel, and the modules that a guest may want.
	version := strings.TrimPrefix(filepath.Base(p.kernel.Image), "vmlinuz-")
	p.files = append(p.files, File{Path: nestedKernel + "/boot/vmlinuz-" + version, Mode: 0o644, Src: p.kernel.Image})
	// Without this list, what the kernel has built in would be missed.
	p.files = append(p.files, File{
		Path: nestedKernel + "/lib/modules/" + version + "/modules.builtin", Mode: 0o644, Src: filepath.Join(p.kernel.Modules, "..", "modules.builtin"),
	})
	guest, err := p.kernel.ModuleFiles(GuestModules...)
	if err != nil {
		return p, err
	}
	for _, m := range guest {
		rel, err := filepath.Rel(p.kernel.Modules, m)
		if err != nil {
			return p, err
		}
		p.files = append(p.files, File{Path: nestedKernel + "/lib/modules/" + version + "/kernel/" + rel, Mode: 0o644, Src: m})
	}
	vmm, err := FindVMM()
	if err != nil {
		return p, err
	}
	p.files = append(p.files,
		File{Path: nestedVMM, Mode: 0o755, Src: vmm},
		File{Path: "/usr/sbin/mke2fs", Mode: 0o755, Src: p.mke2fs}, // which makes the disks of its guests
	)
	seen := map[string]bool{}
	for _, program := range []string{vmm, p.mke2fs} {
		libs, err := sharedLibraries(program)
		if err != nil {
			return p, err
		}
		for _, l := range libs {
			if !seen[l] {
				seen[l] = true
				p.files = append(p.files, File{Path: l, Mode: 0o755, Src: l})
			}
		}
	}
	return p, nil
}

// findMke2fs looks where Debian has it too: sbin is not on the PATH of people.
func findMke2fs() (string, error) {
	for _, name := range []string{"mke2fs", "/usr/sbin/mke2fs", "/sbin/mke2fs"} {
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path)
		}
	}
	return "", errors.New("no mke2fs: apt-get install e2fsprogs")
}

// sharedLibraries asks the loader, which is the program's own authority on what it needs.
func sharedLibraries(program string) ([]string, error) {
	out, err := exec.Command("ldd", program).CombinedOutput()
	if err != nil {
		if bytes.Contains(out, []byte("not a dynamic executable")) || bytes.Contains(out, []byte("statically linked")) {
			return nil, nil
		}
		return nil, fmt.Errorf("ldd %s: %w: %s", program, err, out)
	}
	var libs []string
	for _, f := range strings.Fields(string(out)) {
		if strings.HasPrefix(f, "/") {
			libs = append(libs, f)
		}
	}
	return libs, nil
}

const (
	bootTimeout   = 2 * time.Minute // six seconds on an idle machine
	nestedMiB     = 4096            // taken as it is touched
	nestedDiskMiB = 24 << 10        // sparse
)

func (p nestedPlan) boot() (n *Nested, err error) {
	dir, err := os.MkdirTemp("", "sluice-nested-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) // the emulator has read it, or has it open, by the time it is up
	init := filepath.Join(dir, "init")
	root, err := moduleRoot()
	if err != nil {
		return nil, err
	}
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", init, "./internal/lab/testdata/nested")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build its first process: %w: %s", err, out)
	}
	image := filepath.Join(dir, "initramfs")
	f, err := os.Create(image)
	if err != nil {
		return nil, err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	err = WriteInitramfs(w, append(p.files, File{Path: "/init", Mode: 0o755, Src: init}))
	if err = errors.Join(err, w.Flush(), f.Close()); err != nil {
		return nil, fmt.Errorf("write its initramfs: %w", err)
	}
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(disk, nestedDiskMiB<<20); err != nil {
		return nil, err
	}
	// Without a journal: nobody looks at this disk after a crash of its host.
	format := exec.Command(p.mke2fs, "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1", disk)
	if out, err := format.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("format its disk: %w: %s", err, out)
	}
	for attempt := 1; ; attempt++ {
		n, err = p.start(image, disk)
		if err == nil || attempt == 3 || !errors.Is(err, errPortTaken) {
			return n, err
		}
	}
}

var errPortTaken = errors.New("the port is taken")

func (p nestedPlan) start(image, disk string) (*Nested, error) {
	// The emulator cannot tell which port it got, so it is told one that was free a moment ago.
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := probe.Addr().String()
	probe.Close()
	n := &Nested{addr: addr, console: newConsole(), exited: make(chan struct{})}
	n.cmd = exec.Command(p.qemu,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", fmt.Sprint(nestedMiB),
		"-kernel", p.kernel.Image, "-initrd", image,
		"-append", "console=ttyS0 panic=-1 quiet loglevel=4 mitigations=off random.trust_cpu=on",
		"-netdev", "user,id=net,hostfwd=tcp:"+addr+"-:7000", "-device", "virtio-net-pci,netdev=net,romfile=",
		"-device", "virtio-rng-pci",
		// The emulator holds the file open; its name goes when the host is up, and so nothing stays however this ends.
		"-drive", "file="+strings.ReplaceAll(disk, ",", ",,")+",if=none,id=disk,format=raw,cache=unsafe,discard=unmap",
		"-device", "virtio-blk-pci,drive=disk",
	)
	n.cmd.Stdout, n.cmd.Stderr = n.console, n.console
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the signal comes when the thread that started it dies, so it lives as long
		err := n.cmd.Start()
		started <- err
		if err == nil {
			_ = n.cmd.Wait()
			close(n.exited)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	t := time.NewTimer(bootTimeout)
	defer t.Stop()
	select {
	case <-n.console.ready:
		go n.keepAwake()
		return n, nil
	case <-n.exited:
		if strings.Contains(n.console.text(), "Could not set up host forwarding") {
			return nil, errPortTaken
		}
		return nil, fmt.Errorf("it ended: %s", n.console.text())
	case <-t.C:
		_ = n.cmd.Process.Kill()
		<-n.exited
		return nil, fmt.Errorf("it is not up after %v: %s", bootTimeout, n.console.text())
	}
}

// beatPause is how long a nested host may oversleep.
const beatPause = 100 * time.Millisecond

// keepAwake sends a byte now and then until the host ends. Its emulated processor sometimes loses the interrupt of its timer when that comes
// while a guest runs, and then it sleeps, for minutes, until some other interrupt makes it look at its clock.
func (n *Nested) keepAwake() {
	c, err := n.connect(context.Background(), nestedRequest{Beat: true}, nil)
	if err != nil {
		return // it has ended, as others will notice
	}
	defer c.Close()
	tick := time.NewTicker(beatPause)
	defer tick.Stop()
	for {
		select {
		case <-n.exited:
			return
		case <-tick.C:
			if _, err := c.Write([]byte{0}); err != nil {
				return
			}
		}
	}
}

// Command is a program to run inside.
type Command struct {
	Args   []string
	Env    []string
	Dir    string
	Output io.Writer // gets both outputs as they come; nil means Run returns them
}

type nestedRequest struct {
	Run  []string `json:",omitempty"`
	Env  []string `json:",omitempty"`
	Dir  string   `json:",omitempty"`
	Put  string   `json:",omitempty"`
	Mode uint32   `json:",omitempty"`
	Size int64    `json:",omitempty"`
	Get  string   `json:",omitempty"`
	Dial string   `json:",omitempty"`
	Beat bool     `json:",omitempty"`
}

// Run runs a program inside and returns its output and its exit code. It is killed when ctx ends.
func (n *Nested) Run(ctx context.Context, c Command) (output string, code int, err error) {
	var out bytes.Buffer
	w := c.Output
	if w == nil {
		w = &out
	}
	code, err = n.call(ctx, nestedRequest{Run: c.Args, Env: append(insideEnv(), c.Env...), Dir: c.Dir}, nil, w)
	return out.String(), code, err
}

func insideEnv() []string {
	return []string{InsideVariable + "=1", "SLUICE_CLOUD_HYPERVISOR=" + nestedVMM, KernelRootVariable + "=" + nestedKernel}
}

// Put copies a file of ours inside.
func (n *Nested) Put(ctx context.Context, src, dst string) error {
	f, err := os.Open(src)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	_, err = n.call(ctx, nestedRequest{Put: dst, Mode: uint32(st.Mode().Perm()), Size: st.Size()}, f, io.Discard)
	return err
}

// PutProgram copies a program of ours inside, with the libraries that it is linked to.
func (n *Nested) PutProgram(ctx context.Context, src, dst string) error {
	libs, err := sharedLibraries(src)
	if err != nil {
		return err
	}
	for _, l := range libs {
		if err := n.Put(ctx, l, l); err != nil {
			return err
		}
	}
	return n.Put(ctx, src, dst)
}

// Get reads a file of its.
func (n *Nested) Get(ctx context.Context, name string) ([]byte, error) {
	var b bytes.Buffer
	_, err := n.call(ctx, nestedRequest{Get: name}, nil, &b)
	return b.Bytes(), err
}

// Dial connects to a TCP address as seen inside: this is how programs out here reach servers in there. One is let in at a time: the
// emulator's own queue holds a single connection, and the kernel resets those that wait for more than a minute.
func (n *Nested) Dial(ctx context.Context, addr string) (net.Conn, error) {
	n.dialing.Lock()
	defer n.dialing.Unlock()
	c, err := n.connect(ctx, nestedRequest{Dial: addr}, nil)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	_, err = readFrames(c, io.Discard)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("dial %s in the nested host: %w", addr, err)
	}
	return c, nil
}

// RunTest runs the calling test of this binary inside and reports its result.
func (n *Nested) RunTest(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	within := 30 * time.Minute
	if d, ok := t.Deadline(); ok {
		ctx, cancel = context.WithDeadline(context.Background(), d.Add(-5*time.Second))
		within = time.Until(d) - 15*time.Second // it says itself where it stood
	}
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	n.putSelf(ctx, t, self)
	var names []string
	for _, part := range strings.Split(t.Name(), "/") {
		names = append(names, "^"+part+"$")
	}
	if asked := strings.Split(flag.Lookup("test.run").Value.String(), "/"); len(asked) > len(names) {
		names = append(names, asked[len(names):]...) // subtests of it, which exist only inside
	}
	args := []string{"/sluice/test", "-test.run", strings.Join(names, "/"), "-test.count=1", "-test.timeout", within.String()}
	if testing.Verbose() {
		args = append(args, "-test.v")
	}
	out, code, err := n.Run(ctx, Command{Args: args, Dir: "/sluice/dir"})
	switch {
	case err != nil:
		t.Fatalf("run %s in the nested host: %v\n%s\nits console:\n%s", t.Name(), err, out, n.console.text())
	case code != 0:
		t.Fatalf("%s fails in the nested host:\n%s", t.Name(), out)
	}
	t.Logf("in the nested host:\n%s", out)
	if strings.Contains(out, "--- SKIP: "+t.Name()+" ") {
		t.Skip("skipped in the nested host")
	}
}

var putOnce struct {
	sync.Once
	err error
}

// putSelf takes this binary inside with its testdata and its shared libraries, once.
func (n *Nested) putSelf(ctx context.Context, t *testing.T, self string) {
	t.Helper()
	putOnce.Do(func() {
		files := map[string]string{"/sluice/test": self}
		libs, err := sharedLibraries(self) // with the race detector it is no static program
		if err != nil {
			putOnce.err = err
			return
		}
		for _, l := range libs {
			files[l] = l
		}
		err = filepath.WalkDir("testdata", func(path string, d os.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				files["/sluice/dir/"+filepath.ToSlash(path)] = path
			}
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			putOnce.err = err
			return
		}
		for dst, src := range files {
			if putOnce.err = n.Put(ctx, src, dst); putOnce.err != nil {
				return
			}
		}
		putOnce.err = n.Put(ctx, os.DevNull, "/sluice/dir/.keep") // where it runs, also without testdata
	})
	if putOnce.err != nil {
		t.Fatalf("take the test into the nested host: %v", putOnce.err)
	}
}

// Console is what the nested host's kernel and first process have printed.
func (n *Nested) Console() string { return n.console.text() }

func (n *Nested) connect(ctx context.Context, r nestedRequest, body io.Reader) (net.Conn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", n.addr)
	if err != nil {
		return nil, err
	}
	line, err := json.Marshal(r)
	if err == nil {
		_, err = c.Write(append(line, '\n'))
	}
	if err == nil && body != nil {
		_, err = io.Copy(c, body)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (n *Nested) call(ctx context.Context, r nestedRequest, body io.Reader, out io.Writer) (code int, err error) {
	c, err := n.connect(ctx, r, body)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	code, err = readFrames(c, out)
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	return code, err
}

// readFrames copies output until the end is told.
func readFrames(r io.Reader, out io.Writer) (code int, err error) {
	var head [5]byte
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return 0, fmt.Errorf("the nested host hung up: %w", err)
		}
		size := int64(binary.BigEndian.Uint32(head[1:]))
		const output, end = 1, 2
		switch head[0] {
		case output:
			if _, err := io.CopyN(out, r, size); err != nil {
				return 0, err
			}
		case end:
			b := make([]byte, min(size, 1<<20))
			if _, err := io.ReadFull(r, b); err != nil {
				return 0, err
			}
			var res struct {
				Code int
				Err  string
			}
			if err := json.Unmarshal(b, &res); err != nil {
				return 0, err
			}
			if res.Err != "" {
				return 0, errors.New(res.Err)
			}
			return res.Code, nil
		default:
			return 0, fmt.Errorf("the nested host sent a frame of kind %d", head[0])
		}
	}
}

// console keeps the end of what a nested host prints, and tells when it is up.
type console struct {
	ready chan struct{} // closed by Write

	mu   sync.Mutex // guards the fields below
	tail []byte
	up   bool
	line []byte
}

const consoleKeep = 64 << 10

func newConsole() *console { return &console{ready: make(chan struct{})} }

func (c *console) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tail = append(c.tail, b...)
	if len(c.tail) > consoleKeep {
		c.tail = slices.Clone(c.tail[len(c.tail)-consoleKeep/2:])
	}
	c.line = append(c.line, b...)
	if i := bytes.LastIndexByte(c.line, '\n'); i >= 0 {
		if !c.up && bytes.Contains(c.line[:i], []byte("NESTED-READY")) {
			c.up = true
			close(c.ready)
		}
		c.line = slices.Clone(c.line[i+1:])
	}
	return len(b), nil
}

func (c *console) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.tail)
}
