package netdev

import (
	"net"
	"net/netip"
)

// TapName is the device in the namespace of a slot for a virtual machine (Config.Tap) at which the machine is plugged in.
const TapName = "tap0"

// TapMAC is the tap's own hardware address, which the machine knows for its gateway's: the same in every slot, so that a snapshot finds
// its neighbour wherever it resumes.
var TapMAC = net.HardwareAddr{0x02, 'S', 'L', 0, 0, 1}

// The link between the namespace and a machine. The machine has GuestConstant and GuestConstant6 and sends everything by way of the
// gateways, which are the namespace's. None of these addresses leaves the namespace: what goes out gets the slot's own in their place.
var (
	GuestGateway   = netip.MustParseAddr("169.254.0.22")
	GuestConstant6 = netip.MustParseAddr("fd73:6c75:6963:65ff::2")
	GuestGateway6  = netip.MustParseAddr("fd73:6c75:6963:65ff::1")
)

// Lengths of the link's prefixes.
const (
	linkBits  = 30
	linkBits6 = 126
)

// links are the prefixes of the link, which no slot's own address may be in.
func links() []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(GuestConstant, linkBits).Masked(), netip.PrefixFrom(GuestConstant6, linkBits6).Masked()}
}
