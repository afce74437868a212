package netfilter

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Numbers of linux/netfilter/nfnetlink_conntrack.h.
const (
	msgFlow       = unix.NFNL_SUBSYS_CTNETLINK << 8 // a tracked flow
	msgGetFlow    = msgFlow | 1
	msgDeleteFlow = msgFlow | 2

	attrTupleOrig  = 1
	attrID         = 12
	attrZone       = 18
	attrFilter     = 25
	attrTupleIP    = 1 // in a tuple
	attrIPv4Source = 1 // in the tuple's addresses
	attrIPv6Source = 3
	attrOrigFlags  = 1 // in a filter
	attrReplyFlags = 2
	filterIPSource = 1 << 0
)

// forgetAtOnce is how many flows one datagram names.
const forgetAtOnce = 1000

// ForgetFlows makes the kernel forget the tracked flows that source began. Of IPv4 it tells us of no others; of IPv6 it tells us
// of all, and we keep none of them, so that the hundreds of thousands that others may have cost time but no memory.
func ForgetFlows(source netip.Addr) error {
	request, err := listing(source)
	if err != nil {
		return err
	}
	var forget []netlink.Message
	err = exchange([]netlink.Message{request}, func(flow netlink.Message) error {
		m, err := forgetting(flow, source)
		if m != nil {
			forget = append(forget, *m)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("list tracked flows of %s: %w", source, err)
	}
	nothing := func(netlink.Message) error { return nil }
	for some := range slices.Chunk(forget, forgetAtOnce) {
		if err := exchange(some, nothing); err != nil && !errors.Is(err, unix.ENOENT) { // ENOENT: it went by itself
			return fmt.Errorf("delete tracked flows of %s: %w", source, err)
		}
	}
	return nil
}

// exchange asks, and hands over each flow of the answer. An answer that says no is an error; that something is not there is one only
// if it is the only one.
func exchange(messages []netlink.Message, each func(flow netlink.Message) error) (refused error) {
	err := converse(messages, func(m netlink.Message) error {
		if m.Header.Type == msgFlow {
			return each(m)
		}
		if len(m.Data) < 4 { // no number of an error
			return nil
		}
		if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data))); errno != 0 && (refused == nil || errno != unix.ENOENT) {
			refused = errno
		}
		return nil
	})
	return cmp.Or(err, refused)
}

// listing asks for the flows that source began; of IPv6 for all, because kernels (6.18 among them) take the source in such a
// filter for the one that is not wanted.
func listing(source netip.Addr) (netlink.Message, error) {
	attrs := netlink.NewAttributeEncoder()
	if source.Is4() {
		attrs.Nested(attrTupleOrig, func(tuple *netlink.AttributeEncoder) error {
			tuple.Nested(attrTupleIP, func(ip *netlink.AttributeEncoder) error {
				ip.Bytes(attrIPv4Source, source.AsSlice())
				return nil
			})
			return nil
		})
		attrs.Nested(attrFilter, func(filter *netlink.AttributeEncoder) error {
			filter.Uint32(attrOrigFlags, filterIPSource)
			filter.Uint32(attrReplyFlags, 0)
			return nil
		})
	}
	return message(msgGetFlow, netlink.Request|netlink.Dump, source, attrs)
}

// forgetting is the request to forget a flow, or nil when the flow is not of source: a kernel may know no filter, and tell of all.
func forgetting(flow netlink.Message, source netip.Addr) (*netlink.Message, error) {
	attrs, err := attributes(flow.Data[min(len(flow.Data), len(header(source))):])
	if err != nil {
		return nil, err
	}
	tuple, err := attributes(attrs[attrTupleOrig])
	if err != nil {
		return nil, err
	}
	addrs, err := attributes(tuple[attrTupleIP])
	if err != nil || !slices.Equal(addrs[sourceAttr(source)], source.AsSlice()) {
		return nil, err
	}
	again := netlink.NewAttributeEncoder()
	again.Bytes(unix.NLA_F_NESTED|attrTupleOrig, attrs[attrTupleOrig])
	for _, attr := range []uint16{attrID, attrZone} { // this flow and no later one; a flow need not be in a zone
		if value, ok := attrs[attr]; ok {
			again.Bytes(attr, value)
		}
	}
	m, err := message(msgDeleteFlow, netlink.Request, source, again)
	return &m, err
}

// attributes is a list of netlink attributes by type.
func attributes(b []byte) (map[uint16][]byte, error) {
	decoder, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return nil, err
	}
	all := map[uint16][]byte{}
	for decoder.Next() {
		all[decoder.Type()] = decoder.Bytes()
	}
	return all, decoder.Err()
}

func sourceAttr(source netip.Addr) uint16 {
	if source.Is4() {
		return attrIPv4Source
	}
	return attrIPv6Source
}

// header is the nfgenmsg that begins every message: family, version and a resource of none.
func header(source netip.Addr) []byte {
	if source.Is4() {
		return []byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0}
	}
	return []byte{unix.AF_INET6, unix.NFNETLINK_V0, 0, 0}
}

func message(kind netlink.HeaderType, flags netlink.HeaderFlags, source netip.Addr, attrs *netlink.AttributeEncoder) (netlink.Message, error) {
	body, err := attrs.Encode()
	data := append(header(source), body...)
	return netlink.Message{Header: netlink.Header{Length: uint32(unix.NLMSG_HDRLEN + len(data)), Type: kind, Flags: flags}, Data: data}, err
}
