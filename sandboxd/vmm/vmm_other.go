//go:build !linux

package vmm

import (
	"context"
	"net"
	"os"

	"github.com/sluice-edge/sluice/internal/errs"
)

var errLinux = errs.New(errs.Unavailable, "virtual machines need Linux")

// Launcher exists on Linux only.
type Launcher struct{}

// VM exists on Linux only.
type VM struct{ API *Client }

// New fails: this is not Linux.
func New(Options) (*Launcher, error) { return nil, errLinux }

// Landlock is false.
func (*Launcher) Landlock() bool { return false }

// OnDemand is false.
func (*Launcher) OnDemand() bool { return false }

// Plan fails.
func (*Launcher) Plan(Spec) (Plan, error) { return Plan{}, errLinux }

// Start fails.
func (*Launcher) Start(context.Context, Spec) (*VM, error) { return nil, errLinux }

// Adopt fails.
func (*Launcher) Adopt(Spec, Handle) (*VM, error) { return nil, errLinux }

// Destroy fails.
func (*Launcher) Destroy(context.Context, Spec) error { return errLinux }

// Handle is empty.
func (*VM) Handle() Handle { return Handle{} }

// Spec is empty.
func (*VM) Spec() Spec { return Spec{} }

// Done never ends.
func (*VM) Done() <-chan struct{} { return nil }

// Err says that this is not Linux.
func (*VM) Err() error { return errLinux }

// Kill fails.
func (*VM) Kill(context.Context) error { return errLinux }

// Release fails.
func (*VM) Release() error { return errLinux }

// Boot fails.
func (*VM) Boot(context.Context, Shape, *os.File) error { return errLinux }

// Restore fails.
func (*VM) Restore(context.Context, RestoreMode, *os.File) error { return errLinux }

// Snapshot fails.
func (*VM) Snapshot(context.Context, *Draft) error { return errLinux }

// DialGuest fails.
func (*VM) DialGuest(context.Context, uint32) (net.Conn, error) { return nil, errLinux }

// Serial fails.
func (*VM) Serial(int64) ([]byte, error) { return nil, errLinux }

// VMMLog fails.
func (*VM) VMMLog(int64) ([]byte, error) { return nil, errLinux }

// ListenGuest fails.
func ListenGuest(Spec, uint32) (*net.UnixListener, error) { return nil, errLinux }

// Probe fails.
func Probe(context.Context, string) (Version, error) { return Version{}, errLinux }

// Finding is one thing that a VM needs of its host, and whether it is there.
type Finding struct {
	What   string
	OK     bool
	Fatal  bool
	Detail string
	Remedy string
}

// String is a line for a person.
func (f Finding) String() string { return f.What + ": " + f.Detail + "; " + f.Remedy }

// Usable is false.
func Usable([]Finding) bool { return false }

// Findings says that this is not Linux.
func Findings(context.Context, string) []Finding {
	return []Finding{{What: "Linux", Fatal: true, Detail: "this is another system", Remedy: "run the node on Linux"}}
}

// Snapshots exists on Linux only.
type Snapshots struct{}

// Draft exists on Linux only.
type Draft struct{}

// OpenSnapshots fails.
func OpenSnapshots(string) (*Snapshots, error) { return nil, errLinux }

// KillUser fails.
func (*Launcher) KillUser(context.Context, uint32) error { return errLinux }

// Clean fails.
func (Spec) Clean() error { return errLinux }

// Serial fails.
func (Spec) Serial(int64) ([]byte, error) { return nil, errLinux }

// RestorePaused fails.
func (*VM) RestorePaused(context.Context, RestoreMode, *os.File) error { return errLinux }
