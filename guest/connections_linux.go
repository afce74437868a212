package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// What the kernel says of a socket: inet_diag_msg of linux/inet_diag.h. Its sockid, which names the socket, starts at diagID.
const (
	diagSize     = 72
	diagID       = 4
	diagIDSize   = 48
	diagSource   = diagID + 4
	diagTarget   = diagSource + 16
	tcpClose     = 7
	tcpListen    = 10
	everyTCPMask = ^uint32(0) &^ (1<<tcpClose | 1<<tcpListen)
)

// resetConnections ends every TCP connection that leaves the machine, and says how many: after a sleep the other end is gone or has given
// up, and without a word from it a program would wait for ever. Connections within the machine have slept on both ends.
func resetConnections() (count int, err error) {
	nl, err := openNetlink(unix.NETLINK_INET_DIAG)
	if err != nil {
		return 0, err
	}
	defer nl.close()
	own := map[netip.Addr]bool{}
	for _, text := range ownAddresses() {
		if addr, err := netip.ParseAddr(text); err == nil {
			own[addr.WithZone("")] = true
		}
	}
	var doomed [][]byte
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		err := nl.dump(unix.SOCK_DIAG_BY_FAMILY, diagRequest(family, everyTCPMask, make([]byte, diagIDSize)), func(item []byte) error {
			if len(item) < diagSize {
				return errNetlink
			}
			if to := diagAddress(item[0], item[diagTarget:]); to.IsLoopback() || own[to] {
				return nil
			}
			doomed = append(doomed, diagRequest(item[0], everyTCPMask, item[diagID:diagID+diagIDSize]))
			return nil
		})
		if err != nil && !errors.Is(err, unix.ENOENT) { // a kernel without this family
			return 0, fmt.Errorf("list connections: %w", err)
		}
	}
	for _, request := range doomed {
		err := nl.do(unix.SOCK_DESTROY, 0, request)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTCONN): // it has ended by itself
		case err != nil:
			return count, fmt.Errorf("reset a connection: %w", err)
		default:
			count++
		}
	}
	return count, nil
}

// diagRequest is inet_diag_req_v2 about TCP.
func diagRequest(family byte, states uint32, id []byte) []byte {
	b := []byte{family, unix.IPPROTO_TCP, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, states)
	return append(b, id...)
}

// diagAddress reads one of a sockid's addresses, which take 16 bytes each whatever the family.
func diagAddress(family byte, b []byte) netip.Addr {
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrFrom16([16]byte(b[:16])).Unmap()
}
