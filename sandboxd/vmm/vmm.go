// Package vmm is Cloud Hypervisor as a process and as an API client: one process per sandbox, started with nothing but what that
// sandbox needs, driven over its API socket, and gone without a trace. sandboxd calls it; it knows nothing of routes, egress or the
// agent's protocol, and it neither makes nor removes network namespaces, taps and cgroups: those are given to it.
//
// How a VM comes to be. [Launcher.Start] compiles a [Plan], the whole tree of files that the hypervisor may see, and applies it on a
// thread of its own in a private mount namespace and in the sandbox's network namespace. The thread pivots onto the tree, starts
// the hypervisor there as an unprivileged user in its own pid, ipc and uts namespaces, and ends. Paths inside are the same for every
// sandbox, so a snapshot's own configuration fits wherever it is restored. The API socket is listening before the hypervisor exists
// and is passed to it as a descriptor: the first call waits in the socket's queue, and nobody polls.
//
// What is not here: a stranger who takes over the hypervisor finds a read-only tree with the kernel, the images, two directories of
// his own, four devices and no other process. The directories are his, so everything that we read from them is opened without
// following links.
package vmm

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"

	"go.uber.org/zap"
)

// Options are what all VMs of a node share.
type Options struct {
	// Binary is the hypervisor, an absolute path; see Find.
	Binary string

	// CallTimeout bounds a call that only asks or flips a switch; zero means 10s. SlowTimeout bounds calls that move memory: create,
	// boot, snapshot, restore; zero means 2min.
	CallTimeout, SlowTimeout time.Duration

	// LogBytes is how much of the serial console and of the hypervisor's own log is kept per VM; zero means 256 KiB each.
	LogBytes int64

	Log *zap.Logger
}

// Defaults of Options.
const (
	defaultCallTimeout = 10 * time.Second
	defaultSlowTimeout = 2 * time.Minute
	defaultLogBytes    = 256 << 10
)

// Spec is where one VM lives. Destroy needs nothing else, so whoever starts a VM writes the Spec down first.
type Spec struct {
	ID      string   // [A-Za-z0-9_-], unique on this host
	Dir     string   // this VM's private directory, absolute; what we make in it is removed by Destroy
	NetNS   string   // path of the network namespace the hypervisor runs in
	Cgroups []string // directories; the hypervisor is born in them
	UID     uint32   // and group: unprivileged, of this VM alone

	Kernel    string // bzImage or ELF; shared, read-only
	Initramfs string // shared, read-only; may be empty
	Root      string // raw root image; shared, read-only; may be empty
	Disk      string // raw writable image; private, given to UID; may be empty
	Snapshot  string // directory of a snapshot to restore from; shared, read-only; empty for a cold boot
}

// Handle is what Adopt needs to find a running VM again; it is meant to be written to a journal.
type Handle struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // clock ticks since boot, from /proc/<pid>/stat: the same pid later is another process
}

// What a VM owns inside Spec.Dir.
const (
	apiName    = "api.sock"
	treeName   = "tree"    // mount point of the tree, used only in the starting thread's mount namespace
	runName    = "run"     // sockets and serial log; belongs to the VM's user
	outName    = "out"     // where snapshots are written; belongs to the VM's user
	vmmLogName = "vmm.log" // what the hypervisor says

	vsockName  = "vsock" // short: a port's socket beside it must fit into a socket's name
	serialName = "serial.log"
)

// Paths as the hypervisor sees them, the same in every sandbox.
const (
	insideBinary    = "/cloud-hypervisor"
	insideKernel    = "/kernel"
	insideInitramfs = "/initramfs"
	insideRoot      = "/root.img"
	insideDisk      = "/disk.img"
	insideSnapshot  = "/snapshot"
	insideRun       = "/run"
	insideOut       = "/out"
	insideDevices   = "/dev"
	insideRandom    = "/dev/urandom"
)

// AnyUID in a Spec for Destroy means that nobody knows any more whose the VM's processes were.
const AnyUID = 0

// minUID keeps VMs away from the host's own accounts.
const minUID = 1 << 16

const maxSockPath = 107 // sun_path, less its terminating zero

var idPattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

func (s Spec) validate() error {
	if err := s.validateIdentity(); err != nil {
		return err
	}
	if s.UID == AnyUID {
		return errs.New(errs.Invalid, "the VM has no user id")
	}
	if !filepath.IsAbs(s.NetNS) {
		return errs.New(errs.Invalid, "network namespace %q is not an absolute path", s.NetNS)
	}
	if s.Kernel == "" {
		return errs.New(errs.Invalid, "the VM has no kernel")
	}
	for _, p := range append([]string{s.Kernel, s.Initramfs, s.Root, s.Disk, s.Snapshot}, s.Cgroups...) {
		if p != "" && !filepath.IsAbs(p) {
			return errs.New(errs.Invalid, "path %q of the VM is not absolute", p)
		}
	}
	return nil
}

// validateIdentity checks what Adopt and Destroy rely on.
func (s Spec) validateIdentity() error {
	switch {
	case !idPattern.MatchString(s.ID):
		return errs.New(errs.Invalid, "VM id %q is not 1 to 64 of [A-Za-z0-9_-]", s.ID)
	case !filepath.IsAbs(s.Dir) || filepath.Clean(s.Dir) != s.Dir || s.Dir == "/":
		return errs.New(errs.Invalid, "VM directory %q is not a clean absolute path", s.Dir)
	case len(s.apiSocket()) > maxSockPath:
		return errs.New(errs.Invalid, "VM directory %q is too long for a socket in it", s.Dir)
	case s.UID != AnyUID && (s.UID < minUID || s.UID == 1<<32-1):
		return errs.New(errs.Invalid, "user id %d of the VM is not %d or above", s.UID, minUID)
	}
	return nil
}

func (s Spec) apiSocket() string { return filepath.Join(s.Dir, apiName) }
func (s Spec) runDir() string    { return filepath.Join(s.Dir, runName) }
func (s Spec) outDir() string    { return filepath.Join(s.Dir, outName) }

// processName is the hypervisor's argv[0]. It is the same for the same VM only: two nodes on one host may use one id, but never one
// directory.
func (s Spec) processName() string {
	sum := sha256.Sum256([]byte(s.Dir))
	return fmt.Sprintf("sluice-vm-%s-%s", s.ID, hex.EncodeToString(sum[:4]))
}

// Find returns the absolute path of the hypervisor: name if it is not empty, else what PATH has.
func Find(name string) (string, error) {
	if name == "" {
		name = "cloud-hypervisor"
	}
	path, err := exec.LookPath(name)
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return "", &errs.Error{Code: errs.Unavailable, Err: err,
			Msg: "there is no Cloud Hypervisor"}
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", fmt.Errorf("find cloud-hypervisor: %w", err)
	}
	// What is bound into the tree is the file, and its name may be a link.
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return "", fmt.Errorf("find cloud-hypervisor: %w", err)
	}
	return path, nil
}

func (o Options) withDefaults() Options {
	if o.CallTimeout == 0 {
		o.CallTimeout = defaultCallTimeout
	}
	if o.SlowTimeout == 0 {
		o.SlowTimeout = defaultSlowTimeout
	}
	if o.LogBytes == 0 {
		o.LogBytes = defaultLogBytes
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return o
}

// ensureDir makes a directory for exactly this owner and mode, whatever it was before.
func ensureDir(dir string, uid uint32, mode os.FileMode) error {
	if err := os.Mkdir(dir, mode); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	if err := os.Lchown(dir, int(uid), int(uid)); err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}
