// Package namespace is the sandbox that needs no KVM: a process tree in its own user, mount, pid, uts, ipc, network and
// cgroup namespaces, on an overlay of a root image, with next to no capabilities, no_new_privs, a seccomp filter, and
// limits by cgroup where the host lets us. sandboxd calls it; it knows nothing of routes, egress or the agent's protocol.
//
// It shares the host's kernel and is therefore not a security boundary against hostile code: a bug in the kernel is a way
// out. It is for laptops, continuous integration and trusted code; for the rest there is vmm. Limitations says so.
//
// How a sandbox comes to be. The daemon executes itself twice ([MaybeInit]). Stage one is root on the host in a private
// mount namespace, so nothing that it mounts is ever seen by the host and everything goes when the last process does. It
// joins the network namespace that it was given, which belongs to the host's user namespace: root inside has no power over
// it. Stage two is a clone in the sandbox's user namespace and the first process of its pid namespace. It pivots onto the
// root that stage one made, gives up everything, and becomes guestd. Until [Process.Commit] stage one waits as a
// watchdog that kills the sandbox if the daemon dies, because until then nobody has written down that it exists.
package namespace

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/cgroup"

	"go.uber.org/zap"
)

// Config is what all sandboxes of a machine share.
type Config struct {
	// GuestdPath is the agent, a static binary that everybody may execute. It is never visible inside by a path.
	GuestdPath string

	// StateDir holds what is derived from the host and shared by sandboxes: the /etc of the host's view. Must be absolute.
	StateDir string

	// TemplateDir is the root image of sandboxes whose Spec names none: a directory with a whole root file system. Empty
	// means a view of the host: its /usr, an /etc made afresh, and nothing else.
	TemplateDir string

	// Rootless runs sandboxes without any privilege on the host: one user id inside (1000), a network namespace with a
	// loopback and nothing else. It is implied when the daemon is not root.
	Rootless bool

	// Ready waits until the agent answers on its control socket. Nil means the first answer to an HTTP GET /health.
	Ready func(ctx context.Context, controlSocket string) error

	Log *zap.Logger
}

// Limits bound one sandbox.
type Limits = cgroup.Limits

// Spec is one sandbox. Destroy needs nothing else, so whoever starts a sandbox writes the Spec down first.
type Spec struct {
	ID       string // [A-Za-z0-9_-], unique on this host: names the cgroups
	Dir      string // this sandbox's private directory, absolute; what we make in it is removed by Destroy
	NetNS    string // path of its network namespace; must be empty in rootless mode, which makes its own
	UIDBase  uint32 // first of 65536 host ids that belong to this sandbox alone; not used in rootless mode
	Hostname string // empty means ID
	Limits   Limits
	Resolv   []string // addresses of name servers, for /etc/resolv.conf
	Template string   // root image directory; empty means Config.TemplateDir
}

// Handle is what Adopt needs to find a running sandbox again; it is meant to be written to a journal.
type Handle struct {
	PID           int      `json:"pid"`
	StartTime     uint64   `json:"start_time"` // clock ticks since boot, from /proc/<pid>/stat: the same pid later is another process
	ControlSocket string   `json:"control_socket"`
	CgroupPaths   []string `json:"cgroup_paths,omitempty"`
}

// What a sandbox owns inside Spec.Dir.
const (
	controlName = "control.sock"
	pidName     = "pid"     // of its first process, and when that began
	rwName      = "rw"      // overlay upper and work directories
	cgroupsName = "cgroups" // where its cgroups are, one to a line
	stageName   = "stage"   // mount point of the workspace, used only in stage one's mount namespace
)

const (
	idCount     = 1 << 16
	userID      = 1000 // `user`, the account that SDKs act as
	maxSockPath = 107  // sun_path, less its terminating zero
)

var (
	idPattern   = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)
	hostPattern = regexp.MustCompile(`^[A-Za-z0-9.-]{1,64}$`)
)

func (s Spec) validate(rootless bool) error {
	switch {
	case !idPattern.MatchString(s.ID):
		return errs.New(errs.Invalid, "sandbox id %q is not 1 to 64 of [A-Za-z0-9_-]", s.ID)
	case !filepath.IsAbs(s.Dir) || filepath.Clean(s.Dir) != s.Dir || s.Dir == "/":
		return errs.New(errs.Invalid, "sandbox directory %q is not a clean absolute path", s.Dir)
	case len(s.controlSocket()) > maxSockPath:
		return errs.New(errs.Invalid, "sandbox directory %q is too long for a socket in it", s.Dir)
	case s.Limits.MemoryMiB < 0 || s.Limits.CPUs < 0 || s.Limits.Pids < 0:
		return errs.New(errs.Invalid, "a sandbox limit is negative")
	case s.Hostname != "" && !hostPattern.MatchString(s.Hostname):
		return errs.New(errs.Invalid, "host name %q is not 1 to 64 of [A-Za-z0-9.-]", s.Hostname)
	case slices.ContainsFunc(s.Resolv, func(a string) bool { _, err := netip.ParseAddr(a); return err != nil }):
		return errs.New(errs.Invalid, "a name server in %q is not an address", s.Resolv)
	case rootless && s.NetNS != "":
		return errs.New(errs.Invalid, "a rootless sandbox makes its own network namespace, but one was given")
	case rootless:
		return nil
	case s.NetNS == "":
		return errs.New(errs.Invalid, "the sandbox has no network namespace")
	case s.UIDBase < idCount || s.UIDBase > 1<<32-1-2*idCount:
		// Below 65536 live the host's own accounts; the last range holds (uid_t)-1.
		return errs.New(errs.Invalid, "user id base %d is not between %d and %d", s.UIDBase, idCount, uint32(1<<32-1-2*idCount))
	}
	return nil
}

func (s Spec) controlSocket() string { return filepath.Join(s.Dir, controlName) }

func (s Spec) hostname() string {
	if s.Hostname != "" {
		return s.Hostname
	}
	return s.ID
}

// cgroupName is the same for the same sandbox only: two nodes on one host may use one id, but never one directory.
func (s Spec) cgroupName() string {
	sum := sha256.Sum256([]byte(s.Dir))
	return fmt.Sprintf("sluice-%s-%s", s.ID, hex.EncodeToString(sum[:4]))
}
