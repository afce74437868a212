//go:build !linux

package netdev

import (
	"context"
	"errors"
	"net"
	"os"
)

var errNotLinux = errors.New("network slots need Linux")

// Network is the slots of this node; it exists on Linux only.
type Network struct{}

// New fails: there are no network namespaces here.
func New(Config) (*Network, error) { return nil, errNotLinux }

// Setup fails like New.
func (n *Network) Setup(context.Context) error { return errNotLinux }

// Maintain fails like New.
func (n *Network) Maintain(context.Context) error { return errNotLinux }

// Path is of nothing: there are no slots.
func (n *Network) Path(int) string { return "" }

// Close fails like New.
func (n *Network) Close(context.Context) error { return errNotLinux }

// Acquire fails like New.
func (n *Network) Acquire(context.Context, int) (*Slot, error) { return nil, errNotLinux }

// Adopt fails like New.
func (n *Network) Adopt(int) (*Slot, error) { return nil, errNotLinux }

// Release fails like New.
func (n *Network) Release(context.Context, int) error { return errNotLinux }

// List fails like New.
func (n *Network) List(context.Context) ([]int, error) { return nil, errNotLinux }

// Capacity is zero: there are no slots.
func (n *Network) Capacity() int { return 0 }

// DialTCP fails like New.
func (s *Slot) DialTCP(context.Context, uint16) (net.Conn, error) { return nil, errNotLinux }

// OpenTap fails like New.
func (s *Slot) OpenTap() (*os.File, error) { return nil, errNotLinux }

// SetGuest fails like New.
func (s *Slot) SetGuest(net.HardwareAddr) error { return errNotLinux }
