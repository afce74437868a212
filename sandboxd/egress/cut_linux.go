package egress

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// cut ends the flows that the rules forbid. The rules alone already stop their packets; this makes the kernel forget the flows, so
// that nothing can take them up again, and tells the programs that hold their sockets, which would otherwise wait for data.
func (r Ruleset) cut(ns int) error {
	return inNetNS(ns, func() error {
		flows, err := r.cutConntrack()
		failed := []error{err}
		if r.tap != "" { // the sockets are in the machine
			if err := r.tell(flows); err != nil {
				failed = append(failed, fmt.Errorf("tell the machine: %w", err))
			}
			return errors.Join(failed...)
		}
		for _, proto := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			if !slices.ContainsFunc(flows, func(f *netlink.ConntrackFlow) bool { return f.Forward.Protocol == proto }) {
				continue
			}
			// A socket for IPv6 may hold a flow of IPv4.
			for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
				if err := r.cutSockets(family, proto); err != nil {
					failed = append(failed, fmt.Errorf("abort sockets: %w", err))
				}
			}
		}
		return errors.Join(failed...)
	})
}

// cutConntrack deletes the tracked flows that the rules forbid, and returns them. Looking is what costs, because the kernel walks a table
// for the whole machine: so it looks once for both families, and again only to delete.
func (r Ruleset) cutConntrack() (cut []*netlink.ConntrackFlow, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	flows, err := h.ConntrackTableList(netlink.ConntrackTable, unix.AF_UNSPEC)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // interrupted: flows came and went while we looked
		return nil, fmt.Errorf("list tracked flows: %w", err)
	}
	cut = slices.DeleteFunc(flows, func(flow *netlink.ConntrackFlow) bool { return !forbidden(r).MatchConntrackFlow(flow) })
	var failed []error
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if !slices.ContainsFunc(cut, func(f *netlink.ConntrackFlow) bool { return f.FamilyType == family }) {
			continue
		}
		_, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(family), forbidden(r))
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			failed = append(failed, fmt.Errorf("delete tracked flows: %w", err))
		}
	}
	return cut, errors.Join(failed...)
}

// forbidden picks the tracked flows that a ruleset forbids.
type forbidden Ruleset

// MatchConntrackFlow is netlink's filter interface.
func (f forbidden) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	src, _ := netip.AddrFromSlice(flow.Forward.SrcIP)
	dst, _ := netip.AddrFromSlice(flow.Forward.DstIP)
	return Ruleset(f).forbids(src, dst)
}

// Sizes and places in the kernel's inet_diag messages: the id of a socket (ports, addresses, device, cookie) follows four bytes in an
// answer and eight in a request, and is handed back as it came.
const (
	diagRequestLen = 56
	diagIDOffset   = 4
	diagIDLen      = 48
	diagSrcOffset  = diagIDOffset + 4
	diagDstOffset  = diagSrcOffset + 16
)

// diagStates are those of a TCP socket with a peer that is still there: all but closed, listening and the waits after the end.
const diagStates = 1<<1 | 1<<2 | 1<<3 | 1<<4 | 1<<5 | 1<<8

// cutSockets aborts the sockets of forbidden flows: their owners get an error at once. A kernel that cannot
// (CONFIG_INET_DIAG_DESTROY) leaves them to find out by themselves.
func (r Ruleset) cutSockets(family, proto byte) error {
	list := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	list.AddRawData(diagRequest(family, proto, nil))
	answers, err := list.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
	if errors.Is(err, unix.ENOENT) {
		return nil // a kernel that does not list sockets of this kind
	}
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	for _, answer := range answers {
		if len(answer) < diagIDOffset+diagIDLen {
			continue
		}
		src, dst := diagAddr(family, answer[diagSrcOffset:]), diagAddr(family, answer[diagDstOffset:])
		if !r.forbids(src, dst) {
			continue
		}
		destroy := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
		destroy.AddRawData(diagRequest(family, proto, answer[diagIDOffset:diagIDOffset+diagIDLen]))
		_, err := destroy.Execute(unix.NETLINK_INET_DIAG, 0)
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			return nil
		case err != nil && !errors.Is(err, unix.ENOENT): // ENOENT: it went by itself
			return err
		}
	}
	return nil
}

func diagRequest(family, proto byte, id []byte) []byte {
	b := make([]byte, diagRequestLen)
	b[0], b[1] = family, proto
	states := uint32(diagStates)
	if proto == unix.IPPROTO_UDP {
		states = 1<<1 | 1<<7 // connected, and not
	}
	binary.NativeEndian.PutUint32(b[4:], states)
	copy(b[8:], id)
	return b
}

func diagAddr(family byte, b []byte) netip.Addr {
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(b))
	}
	return netip.AddrFrom16([16]byte(b))
}
