// Package netdev makes the network of a sandbox: a network namespace that belongs to the host's user namespace, a veth pair
// into it, and the one constant table on the host that lets slots out and nothing else. What a sandbox may reach is not
// decided here but by the rules that sandboxd/egress puts inside the namespace; the host's table is the second fence behind
// them. Who uses which slot, and how long a used one rests before the next tenant gets it, is the caller's business.
//
// For a virtual machine the namespace is a router: the machine is plugged into a tap there, has the same addresses in every slot, and what
// it sends leaves with the slot's own.
//
// Every name and address follows from the prefix and the index, so whatever a crash left half made can be found and removed
// without a record of it. The table joins the host's other tables and cannot overrule them: where another firewall drops
// forwarded packets (Docker's does), it has to be told to let the slots' devices through.
package netdev

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"go.uber.org/zap"
)

// Defaults of Config.
var (
	DefaultPrefix  = netip.MustParsePrefix("10.12.0.0/16")
	DefaultPrefix6 = netip.MustParsePrefix("fd73:6c75:6963:6500::/64")
)

// DefaultMaxFlows is twice what the rules of sandboxd/egress allow a sandbox: those count anew after every change while older flows
// go on, and here flows that were cut inside last until nothing has been heard of them for long.
const DefaultMaxFlows = 16384

// GuestConstant is the address that every sandbox has besides its slot's own, always the same, so that a snapshot taken in one
// slot resumes in another. It never leaves the namespace. A virtual machine has no other.
var GuestConstant = netip.MustParseAddr("169.254.0.21")

const (
	netnsDir   = "/run/netns"
	guestDev   = "eth0"
	maxNameLen = 8 // of NamePrefix: with a dash and five digits it must stay below IFNAMSIZ
)

// Config says where the slots live. The zero value works.
type Config struct {
	Prefix  netip.Prefix // IPv4 addresses, two for each slot; zero means DefaultPrefix
	Prefix6 netip.Prefix // IPv6 addresses, two for each slot; zero means DefaultPrefix6
	// NamePrefix begins the name of every namespace, device and table; empty means "sl". Two nodes on one host need two of
	// them, lower-case letters and digits, at most eight.
	NamePrefix string
	// MaxFlows is how many flows a slot may have in the host's table of them, which everybody on the host shares; zero means
	// DefaultMaxFlows. More are dropped.
	MaxFlows uint32
	// Tap makes slots for virtual machines: what is fenced sits behind the device TapName, and does not live in the namespace itself.
	Tap bool
	Log *zap.Logger // nil means silence
}

// withDefaults fills in the zero fields and refuses what cannot work.
func (c Config) withDefaults() (Config, error) {
	if !c.Prefix.IsValid() {
		c.Prefix = DefaultPrefix
	}
	if !c.Prefix6.IsValid() {
		c.Prefix6 = DefaultPrefix6
	}
	if c.NamePrefix == "" {
		c.NamePrefix = "sl"
	}
	if c.MaxFlows == 0 {
		c.MaxFlows = DefaultMaxFlows
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	c.Prefix, c.Prefix6 = c.Prefix.Masked(), c.Prefix6.Masked()
	if !c.Prefix.Addr().Is4() || c.Prefix.Bits() > 31 {
		return c, fmt.Errorf("slot prefix %s: want an IPv4 prefix with room for a pair of addresses", c.Prefix)
	}
	if !c.Prefix6.Addr().Is6() || c.Prefix6.Addr().Is4In6() || c.Prefix6.Bits() > 127 {
		return c, fmt.Errorf("slot prefix %s: want an IPv6 prefix with room for a pair of addresses", c.Prefix6)
	}
	for _, link := range links() {
		if c.Tap && (link.Overlaps(c.Prefix) || link.Overlaps(c.Prefix6)) {
			return c, fmt.Errorf("slot prefixes %s and %s: every machine's own link is %s", c.Prefix, c.Prefix6, link)
		}
	}
	if len(c.NamePrefix) > maxNameLen {
		return c, fmt.Errorf("name prefix %q: longer than %d", c.NamePrefix, maxNameLen)
	}
	for _, r := range c.NamePrefix {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') {
			return c, fmt.Errorf("name prefix %q: only lower-case letters and digits", c.NamePrefix)
		}
	}
	return c, nil
}

// capacity is how many slots both prefixes hold, and never more than five digits can number.
func (c Config) capacity() int {
	bits := min(32-c.Prefix.Bits(), 128-c.Prefix6.Bits()) - 1
	return min(1<<min(bits, 17), 100000)
}

// plan is everything about a slot that follows from its index.
type plan struct {
	index               int
	netns, hostDev      string // path of the namespace; name of the host's end of the veth pair
	host, guest         netip.Addr
	host6, guest6       netip.Addr
	hostMAC, guestMAC   net.HardwareAddr
	prefixLen, prefix6L int
}

// plan works out slot index. The hardware addresses are fixed as well: with them both ends know their neighbour for good,
// nobody asks for addresses on the wire, and a snapshot finds the same neighbour in its next slot's place.
func (c Config) plan(index int) (plan, error) {
	if index < 0 || index >= c.capacity() {
		return plan{}, fmt.Errorf("slot %d: the prefixes %s and %s hold slots 0 to %d", index, c.Prefix, c.Prefix6, c.capacity()-1)
	}
	name := c.name(index)
	return plan{
		index:   index,
		netns:   c.path(index),
		hostDev: name,
		host:    nth(c.Prefix.Addr(), 2*index), guest: nth(c.Prefix.Addr(), 2*index+1),
		host6: nth(c.Prefix6.Addr(), 2*index), guest6: nth(c.Prefix6.Addr(), 2*index+1),
		hostMAC: hardwareAddr(0, index), guestMAC: hardwareAddr(1, index),
		prefixLen: 31, prefix6L: 127,
	}, nil
}

// name is shared by the namespace and the host's device. The dash keeps prefixes apart that begin alike.
func (c Config) name(index int) string { return c.NamePrefix + "-" + strconv.Itoa(index) }

// path is where the namespace is bound.
func (c Config) path(index int) string { return filepath.Join(netnsDir, c.name(index)) }

// index is the inverse of name.
func (c Config) index(name string) (int, bool) {
	digits, ok := strings.CutPrefix(name, c.NamePrefix+"-")
	if !ok {
		return 0, false
	}
	index, err := strconv.Atoi(digits)
	if err != nil || c.name(index) != name || index < 0 || index >= c.capacity() {
		return 0, false
	}
	return index, true
}

func (c Config) tableName() string { return tablePrefix + c.NamePrefix }

// tablePrefix begins the name of the host table of every node on this host.
const tablePrefix = "sluice_"

// nth is base+n; base is the first address of a prefix that has room for it.
func nth(base netip.Addr, n int) netip.Addr {
	if base.Is4() {
		b := base.As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
		return netip.AddrFrom4(b)
	}
	b := base.As16()
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])+uint64(n))
	return netip.AddrFrom16(b)
}

// hardwareAddr is locally administered (02): "SL", which end, and the index.
func hardwareAddr(end byte, index int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 'S', 'L', end<<4 | byte(index>>16), byte(index >> 8), byte(index)}
}

// Slot is the network of one sandbox, whole and up. It is valid until Release of its index.
type Slot struct {
	Index      int
	NetNS      string // path to hand to egress.Apply and to the machine
	HostDev    string
	GuestAddr  netip.Addr // the slot's own addresses inside; what leaves the namespace must come from these
	GuestAddr6 netip.Addr // zero where the host has no IPv6
	HostAddr   netip.Addr

	tap bool // Config.Tap

	mu sync.RWMutex // held while a socket is opened, so that Release cannot close ns under it
	ns int          // the namespace, open, so that a dial opens no path; -1 after Release
}

func newSlot(p plan, ns int, ipv6, tap bool) *Slot {
	s := &Slot{Index: p.index, NetNS: p.netns, HostDev: p.hostDev, GuestAddr: p.guest, HostAddr: p.host, tap: tap, ns: ns}
	if ipv6 {
		s.GuestAddr6 = p.guest6
	}
	return s
}
