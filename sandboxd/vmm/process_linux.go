package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/internal/pidfd"
	"github.com/sluice-edge/sluice/internal/tree"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Launcher starts VMs. Its methods may be called concurrently for different Specs, never for the same.
type Launcher struct {
	o       Options
	machine machine
}

// New checks what does not change while the node runs; Findings tells what is wrong with the host in words for its operator.
func New(o Options) (*Launcher, error) {
	if !filepath.IsAbs(o.Binary) {
		return nil, errs.New(errs.Invalid, "hypervisor %q is not an absolute path", o.Binary)
	}
	libs, err := libraries(o.Binary)
	if err != nil {
		return nil, err
	}
	return &Launcher{o: o.withDefaults(), machine: machine{
		binary: o.Binary, libraries: libs, userfault: userfaultMinor(),
	}}, nil
}

// Landlock tells whether the kernel has as much of it as the hypervisor demands: then Shape.Landlock may be set. It fences the threads of
// the VM from its creation on; the one that serves the API has the tree alone.
func (l *Launcher) Landlock() bool { return landlockABI() >= landlockWanted }

// OnDemand tells whether a restore can fault memory in.
func (l *Launcher) OnDemand() bool { return l.machine.userfault != 0 }

// Plan is what Start will do, for golden files and for people.
func (l *Launcher) Plan(s Spec) (Plan, error) {
	if err := s.validate(); err != nil {
		return Plan{}, err
	}
	return compile(l.machine, s), nil
}

// VM is a running hypervisor. All of its methods may be called from any goroutine.
type VM struct {
	// API is the hypervisor's own, for what needs no more than a call.
	API *Client

	// Fixed after it was made.
	spec   Spec
	handle Handle
	pidfd  *os.File
	log    *zap.Logger
	keep   int64
	done   chan struct{} // closed by watch

	mu       sync.Mutex // guards the fields below
	released bool
	err      error
}

// Start starts the hypervisor without a VM in it. After an error the caller calls Destroy.
func (l *Launcher) Start(ctx context.Context, s Spec) (*VM, error) {
	p, err := l.Plan(s)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	for _, o := range p.Own[:1] { // the socket and the log go there
		if err := o.apply(); err != nil {
			return nil, fmt.Errorf("make the VM's directory: %w", err)
		}
	}
	if err := clearRun(s); err != nil {
		return nil, err
	}
	api, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.apiSocket(), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on the API socket: %w", err)
	}
	// The hypervisor keeps listening on it, and after a restart of this process it is where we find it.
	api.SetUnlinkOnClose(false)
	defer api.Close()
	log, err := os.OpenFile(filepath.Join(s.Dir, vmmLogName), os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the hypervisor's log: %w", err)
	}
	defer log.Close()
	pid, process, err := p.apply(api, log)
	if err != nil {
		return nil, err
	}
	// It is our child and nobody has collected it, so the number still is its own.
	start, err := pidfd.StartTime(pid)
	if err != nil {
		_ = pidfd.Signal(process, unix.SIGKILL)
		process.Close()
		return nil, fmt.Errorf("read the hypervisor's start time: %w", err)
	}
	return l.newVM(s, Handle{PID: pid, StartTime: start}, process), nil
}

// Adopt takes up a hypervisor that an earlier process started. An error means that it is gone; nothing is removed.
func (l *Launcher) Adopt(s Spec, h Handle) (*VM, error) {
	if err := s.validateIdentity(); err != nil {
		return nil, err
	}
	process, err := pidfd.Open(h.PID, h.StartTime)
	if err == nil && !isHypervisor(s, h.PID) {
		process.Close()
		err = unix.ESRCH
	}
	if err != nil {
		return nil, &errs.Error{Code: errs.NotFound, Msg: "the VM is gone", Err: fmt.Errorf("adopt process %d: %w", h.PID, err)}
	}
	return l.newVM(s, h, process), nil
}

// Destroy kills what is left of a VM, whoever started it, and removes what Start made in its directory. It is idempotent. Disk and
// other files of the caller stay. A VM that this process has is killed by its own Kill before, which needs no search.
func (l *Launcher) Destroy(ctx context.Context, s Spec) error {
	if err := s.validateIdentity(); err != nil {
		return err
	}
	if err := killEach(ctx, func(pid int) bool { return isHypervisor(s, pid) }); err != nil {
		return err
	}
	return s.Clean()
}

// KillUser kills every process of a user: for a VM of which nothing else is known.
func (l *Launcher) KillUser(ctx context.Context, uid uint32) error {
	if uid < minUID {
		return errs.New(errs.Invalid, "user id %d is no VM's", uid)
	}
	return killEach(ctx, func(pid int) bool {
		now, ok := uidOf(pid)
		return ok && now == uid
	})
}

// killEach kills the processes that are meant, and returns when they are gone.
func killEach(ctx context.Context, meant func(pid int) bool) error {
	pids, err := pidfd.All()
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	for _, pid := range pids {
		if !meant(pid) {
			continue
		}
		if err := killAndWait(ctx, meant, pid); err != nil {
			return fmt.Errorf("kill the hypervisor: %w", err)
		}
	}
	return nil
}

// Clean removes what Start made in the directory of a VM whose process is gone.
func (s Spec) Clean() error {
	var errAll error
	for _, n := range []string{apiName, vmmLogName, treeName, runName, outName} {
		errAll = errors.Join(errAll, tree.Remove(filepath.Join(s.Dir, n)))
	}
	return errAll
}

func (l *Launcher) newVM(s Spec, h Handle, process *os.File) *VM {
	vm := &VM{
		API: NewClient(s.apiSocket(), l.o), spec: s, handle: h, pidfd: process, keep: l.o.LogBytes,
		log: l.o.Log.Named("vmm").With(zap.String("sandbox", s.ID)), done: make(chan struct{}),
	}
	go vm.watch()
	go vm.boundLogs()
	return vm
}

// Handle is what to write down.
func (vm *VM) Handle() Handle { return vm.handle }

// Spec is where it lives.
func (vm *VM) Spec() Spec { return vm.spec }

// Done is closed when the hypervisor is gone.
func (vm *VM) Done() <-chan struct{} { return vm.done }

// Err says how it ended: nil while it runs, else an *Ended.
func (vm *VM) Err() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.err
}

// Kill ends the hypervisor and waits until it is gone. One that has ended already is no error.
func (vm *VM) Kill(ctx context.Context) error {
	select {
	case <-vm.done:
		return nil
	default:
	}
	if err := pidfd.Signal(vm.pidfd, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("kill the hypervisor: %w", err)
	}
	select {
	case <-vm.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of a killed hypervisor: %w", context.Cause(ctx))
	}
}

// Release stops watching without ending it: for a daemon that stops and leaves its VMs running.
func (vm *VM) Release() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.released {
		return nil
	}
	vm.released = true
	return vm.pidfd.Close()
}

// watch waits for the end in the network poller, not in a thread.
func (vm *VM) watch() {
	raw, err := vm.pidfd.SyscallConn()
	if err != nil {
		return // released before it began
	}
	var how string
	err = raw.Read(func(fd uintptr) bool {
		over, status := pidfd.Reap(int(fd))
		how = status
		return over
	})
	if err != nil {
		return // released
	}
	ended := &Ended{How: how, Log: vm.tail(vmmLogName, reasonLines), Serial: vm.tail(serialFile, reasonLines)}
	vm.mu.Lock()
	vm.err = ended
	vm.released = true
	vm.mu.Unlock()
	vm.pidfd.Close()
	close(vm.done)
}

// endsSoon waits a moment for the end of the process.
func (vm *VM) endsSoon() bool {
	t := time.NewTimer(200 * time.Millisecond)
	defer t.Stop()
	select {
	case <-vm.done:
		return true
	case <-t.C:
		return false
	}
}

// clearRun makes the directory of sockets empty but for the serial log of the last life, which is kept beside the new one. The
// hypervisor would find its vsock's old socket in the way.
func clearRun(s Spec) error {
	if err := unix.Unlink(s.apiSocket()); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove old API socket: %w", err)
	}
	if err := unix.Mkdir(s.runDir(), 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make the VM's directory: %w", err)
	}
	r, err := os.OpenRoot(s.runDir())
	if err != nil {
		return fmt.Errorf("clear the VM's directory: %w", err)
	}
	defer r.Close()
	names, err := readNames(r)
	if err != nil {
		return fmt.Errorf("clear the VM's directory: %w", err)
	}
	for _, n := range names {
		switch {
		case n == serialName:
			err = r.Rename(n, n+".old")
		case n == serialName+".old", strings.HasPrefix(n, vsockName+"_"): // the latter are ours: see ListenGuest
		default:
			err = tree.Remove(filepath.Join(s.runDir(), n))
		}
		if err != nil {
			return fmt.Errorf("clear the VM's directory: %w", err)
		}
	}
	return nil
}

func readNames(r *os.Root) ([]string, error) {
	d, err := r.Open(".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// isHypervisor tells whether the process is this VM's: it has its name and its user, and no stranger can have both.
func isHypervisor(s Spec, pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	name, _, _ := bytes.Cut(b, []byte{0})
	if string(name) != s.processName() {
		return false
	}
	// Between clone and exec it has our name and our user: nobody runs Destroy for a Spec that is being started.
	uid, ok := uidOf(pid)
	return ok && (uid == s.UID || s.UID == AnyUID)
}

// uidOf is the real user of a process; false when there is no such process.
func uidOf(pid int) (uint32, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, false
	}
	return parseUID(b)
}

// parseUID is the real user of /proc/<pid>/status.
func parseUID(status []byte) (uint32, bool) {
	_, after, ok := bytes.Cut(status, []byte("\nUid:"))
	if !ok {
		return 0, false
	}
	line, _, _ := bytes.Cut(after, []byte("\n"))
	f := bytes.Fields(line)
	if len(f) == 0 {
		return 0, false
	}
	uid, err := strconv.ParseUint(string(f[0]), 10, 32)
	return uint32(uid), err == nil
}

// killAndWait kills the process if it still is the one that is meant once its number is pinned, and waits until it is gone.
func killAndWait(ctx context.Context, meant func(pid int) bool, pid int) error {
	f, err := pidfd.Open(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if !meant(pid) {
		return nil
	}
	if err := pidfd.Signal(f, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return pidfd.Wait(ctx, f)
}
