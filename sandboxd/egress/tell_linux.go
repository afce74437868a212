package egress

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tell sends the machine a notice of each flow that was cut. The machine would find out by itself when it sends; one that only listens
// never would. Notices go straight to the tap, past conntrack, which would take them for new flows. What finds no room there is lost.
func (r Ruleset) tell(flows []*netlink.ConntrackFlow) error {
	if len(flows) == 0 {
		return nil
	}
	tap, err := net.InterfaceByName(r.tap)
	if err != nil {
		return fmt.Errorf("find %s: %w", r.tap, err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0) // protocol 0: it receives nothing
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	to := unix.SockaddrLinklayer{Ifindex: tap.Index, Halen: uint8(len(r.mac))}
	copy(to.Addr[:], r.mac)
	for _, flow := range flows {
		src, _ := netip.AddrFromSlice(flow.Forward.SrcIP)
		dst, _ := netip.AddrFromSlice(flow.Forward.DstIP)
		b := notice(flow.Forward.Protocol,
			netip.AddrPortFrom(src.Unmap(), flow.Forward.SrcPort), netip.AddrPortFrom(dst.Unmap(), flow.Forward.DstPort))
		if b == nil {
			continue
		}
		to.Protocol = bigEndian(unix.ETH_P_IP)
		if src.Unmap().Is6() {
			to.Protocol = bigEndian(unix.ETH_P_IPV6)
		}
		err := unix.Sendto(fd, b, 0, &to)
		full := errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EAGAIN)
		if err != nil && !full && !errors.Is(err, unix.ENETDOWN) { // down: nobody is plugged in
			return os.NewSyscallError("sendto", err)
		}
	}
	return nil
}

// bigEndian is a number as the wire has it.
func bigEndian(n uint16) uint16 { return n<<8 | n>>8 }
