//go:build !linux

package namespace

import (
	"context"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Namespaces are Linux's. Elsewhere the package compiles, so that tools and editors work, and every start is refused.

// Machine starts no sandbox on this system.
type Machine struct{}

// Process is never made on this system.
type Process struct{}

var errLinuxOnly = errs.New(errs.Unavailable, "sandboxes in namespaces need Linux")

// MaybeInit does nothing.
func MaybeInit() {}

// New is refused.
func New(Config) (*Machine, error) { return nil, errLinuxOnly }

// Limitations says why.
func (*Machine) Limitations() []string { return []string{errLinuxOnly.Msg} }

// Start is refused.
func (*Machine) Start(context.Context, Spec) (*Process, error) { return nil, errLinuxOnly }

// Adopt is refused.
func (*Machine) Adopt(context.Context, Spec, Handle) (*Process, error) { return nil, errLinuxOnly }

// Destroy is refused.
func (*Machine) Destroy(context.Context, Spec) error { return errLinuxOnly }

// Handle is empty.
func (*Process) Handle() Handle { return Handle{} }

// Done never closes.
func (*Process) Done() <-chan struct{} { return nil }

// Err is what New said.
func (*Process) Err() error { return errLinuxOnly }

// Commit is refused.
func (*Process) Commit() error { return errLinuxOnly }

// Kill is refused.
func (*Process) Kill(context.Context) error { return errLinuxOnly }

// Release is refused.
func (*Process) Release() error { return errLinuxOnly }
