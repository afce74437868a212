package sandboxd

import (
	"cmp"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"

	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// claim is a name on this host that one node has, until it gives it up or dies. It is taken twice: as an abstract socket, which
// belongs to the network namespace, as devices do, and as a locked file, which belongs to the mount namespace, as named network
// namespaces do. So two nodes that share either see each other.
type claim struct {
	socket net.Listener
	file   *os.File
}

// errClaimed means that another node has the name.
var errClaimed = errors.New("claimed by another node")

// takeClaim takes a name, or fails with errClaimed.
func takeClaim(dir, name string) (*claim, error) {
	socket, err := net.Listen("unix", "@sluice-"+name)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, errClaimed
	}
	if err != nil {
		return nil, err
	}
	file, err := lockFile(filepath.Join(dir, name))
	if err != nil {
		socket.Close()
		return nil, err
	}
	return &claim{socket, file}, nil
}

// lockFile makes and locks a file. Whoever had it before may have removed it since we opened it; then there is a new one to lock.
func lockFile(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, syscall.EWOULDBLOCK) {
				err = errClaimed
			}
			return nil, err
		}
		locked, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if there, err := os.Stat(path); err == nil && os.SameFile(there, locked) {
			return f, nil
		}
		f.Close()
	}
}

// text is what the last holder wrote.
func (c *claim) text() (string, error) {
	text, err := io.ReadAll(io.NewSectionReader(c.file, 0, 1<<10))
	return string(text), err
}

func (c *claim) write(text string) error {
	if err := c.file.Truncate(0); err != nil {
		return err
	}
	_, err := c.file.WriteAt([]byte(text), 0)
	return err
}

// leave gives the name up; what was written stays for the next holder.
func (c *claim) leave() error { return errors.Join(c.socket.Close(), c.file.Close()) }

// remove gives the name up and leaves nothing.
func (c *claim) remove() error { return errors.Join(os.Remove(c.file.Name()), c.leave()) }

// Every sandbox of a host has a range of user ids of its own, in the part of the number space that systemd's conventions leave
// unused (0x70000000 to 0x7fffffff): no account and no container manager has them. Each node has a sixteenth of it.
const (
	uidFirst = 0x70000000
	uidCount = 1 << 16 // of one sandbox
	uidNodes = 16
	uidSlots = (0x80000000 - uidFirst) / uidCount / uidNodes
)

// claimUIDs finds the part of the user ids that belongs to a node's name. The file of a part says whose it is, also while that node
// is being restarted and its sandboxes run on: it lies beside the names of their network namespaces and, as they do, lasts until
// the host starts anew. A name without a part looks first where its hash points, so that nodes that cannot see each other, in
// containers with a /run of their own, are apart most of the time. alive tells whether a node that is not running has left anything.
func claimUIDs(dir, node string, alive func(node string) (bool, error)) (part int, c *claim, err error) {
	hash := fnv.New32a()
	hash.Write([]byte(node))
	var order [uidNodes]int
	for i := range order {
		order[i] = int((hash.Sum32() + uint32(i)) % uidNodes)
	}
	for _, part := range order {
		text, err := os.ReadFile(uidsFile(dir, part))
		if err == nil && string(text) == node {
			c, err := takeClaim(dir, uidsName(part))
			return part, c, err
		}
	}
	for _, part := range order {
		c, err := takeClaim(dir, uidsName(part))
		if errors.Is(err, errClaimed) {
			continue
		}
		if err != nil {
			return 0, nil, err
		}
		owner, err := c.text()
		kept := false
		if err == nil && owner != "" {
			kept, err = alive(owner)
		}
		if err == nil && !kept {
			err = c.write(node)
		}
		if err == nil && !kept {
			return part, c, nil
		}
		if err := errors.Join(err, c.leave()); err != nil {
			return 0, nil, err
		}
	}
	return 0, nil, fmt.Errorf("all %d ranges of user ids belong to other nodes on this host", uidNodes)
}

func uidsName(part int) string             { return fmt.Sprintf("uids-%d", part) }
func uidsFile(dir string, part int) string { return filepath.Join(dir, uidsName(part)) }

// claimsDir is where nodes of one host meet.
const claimsDir = "/run/sluice"

// hostClaims is what one node has of its host for itself: the name of its network, the addresses of its slots and a part of the user ids.
type hostClaims struct {
	network string       // what the names of its namespaces and devices begin with
	slots   netip.Prefix // of the slots' addresses

	// Set by take, which comes before all else.
	name *claim
	uids *claim       // of a part of the user ids
	part int          // which one
	pool net.Listener // of the slots' addresses: an abstract socket, known in the network namespace in which they are
}

func newHostClaims(cfg netdev.Config) hostClaims {
	return hostClaims{network: cfg.NamePrefix, slots: cmp.Or(cfg.Prefix, netdev.DefaultPrefix).Masked()}
}

// take makes sure that nobody else on this host uses the same. It may be called again.
func (h *hostClaims) take() (err error) {
	if h.name == nil {
		h.name, err = takeClaim(claimsDir, "network-"+h.network)
		if errors.Is(err, errClaimed) {
			return fmt.Errorf("another node on this host uses the network name %q: stop it, or give this one its own (-network-name, with it -slot-prefix and -slot-prefix6, and a -state-dir)", h.network)
		}
		if err != nil {
			return fmt.Errorf("claim the network name %q: %w", h.network, err)
		}
	}
	if h.pool == nil {
		// Two sandboxes with one address on one host would each get half of the other's answers.
		h.pool, err = net.Listen("unix", "@sluice-slots-"+h.slots.String())
		if errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("another node on this host uses the slot addresses %s: give this one its own (-slot-prefix and -slot-prefix6)", h.slots)
		}
		if err != nil {
			return fmt.Errorf("claim the slot addresses %s: %w", h.slots, err)
		}
	}
	if h.uids == nil {
		if h.part, h.uids, err = claimUIDs(claimsDir, h.network, hasNetworks); err != nil {
			return fmt.Errorf("claim user ids: %w", err)
		}
	}
	return nil
}

// hasNetworks tells whether a node that is not running has left sandboxes.
func hasNetworks(node string) (bool, error) {
	names, err := filepath.Glob("/run/netns/" + node + "-*")
	return len(names) > 0, err
}

// uid is the first of the user ids of a slot.
func (h *hostClaims) uid(slot int) uint32 {
	return uidFirst + uint32(h.part*uidSlots+max(slot, 0))*uidCount
}

// leave lets go of everything; whose the user ids are stays known, for the sandboxes that stay.
func (h *hostClaims) leave() error { return h.giveUp((*claim).leave) }

// remove lets go of everything and leaves nothing.
func (h *hostClaims) remove() error { return h.giveUp((*claim).remove) }

func (h *hostClaims) giveUp(how func(*claim) error) error {
	var failures []error
	if h.pool != nil {
		failures = append(failures, h.pool.Close())
	}
	for _, c := range []*claim{h.uids, h.name} {
		if c != nil {
			failures = append(failures, how(c))
		}
	}
	h.uids, h.pool, h.name = nil, nil, nil
	return errors.Join(failures...)
}
