package netfilter

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

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

// Flows are the flows that the kernel tracks in one network namespace. Its table has a quarter of a million buckets, and a look through them
// takes ten milliseconds of a processor even when they are empty; so callers that come while there is a look share the next one. The zero value
// is ready.
type Flows struct {
	looking sync.Mutex // held during a look, kernel calls and all

	mu   sync.Mutex // guards the field below and the sources of what it points to; never held across a kernel call
	next *look      // the one that has not begun; nil when nobody waits for it
}

// look goes through the table once, for all who asked before it began.
type look struct {
	sources []netip.Addr
	done    chan struct{} // closed by whom it belongs to, once err is set
	err     error
}

// Forget makes the kernel forget the flows that sources began. The caller is in the network namespace, on a locked thread.
func (f *Flows) Forget(sources ...netip.Addr) error {
	f.mu.Lock()
	l, joined := f.next, f.next != nil
	if !joined {
		l = &look{done: make(chan struct{})}
		f.next = l
	}
	l.sources = append(l.sources, sources...)
	f.mu.Unlock()
	if joined {
		<-l.done
		return l.err
	}

	f.looking.Lock()
	defer f.looking.Unlock()
	f.mu.Lock()
	f.next = nil
	f.mu.Unlock()
	l.err = forget(l.sources)
	close(l.done)
	return l.err
}

// forget is one look for each family that is among sources.
func forget(sources []netip.Addr) error {
	var v4, v6 []netip.Addr
	for _, source := range sources {
		if source.Is4() {
			v4 = append(v4, source)
		} else {
			v6 = append(v6, source)
		}
	}
	return errors.Join(forgetFamily(v4), forgetFamily(v6))
}

// forgetFamily is told of the flows of others too, and keeps none of them: the hundreds of thousands that they may have cost time but no memory.
func forgetFamily(sources []netip.Addr) error {
	if len(sources) == 0 {
		return nil
	}
	request, err := listing(sources)
	if err != nil {
		return err
	}
	var requests []netlink.Message
	err = exchange([]netlink.Message{request}, func(flow netlink.Message) error {
		m, err := forgetting(flow, sources)
		if m != nil {
			requests = append(requests, *m)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("list tracked flows of %s: %w", sources, err)
	}
	nothing := func(netlink.Message) error { return nil }
	for some := range slices.Chunk(requests, forgetAtOnce) {
		if err := exchange(some, nothing); err != nil && !errors.Is(err, unix.ENOENT) { // ENOENT: it went by itself
			return fmt.Errorf("delete tracked flows of %s: %w", sources, err)
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

// listing asks for the flows of a family; of IPv4, when there is one source, for no others. Kernels (6.18 among them) take an IPv6 source in
// such a filter for the one that is not wanted.
func listing(sources []netip.Addr) (netlink.Message, error) {
	attrs := netlink.NewAttributeEncoder()
	source := sources[0]
	if source.Is4() && len(sources) == 1 {
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

// forgetting is the request to forget a flow, or nil when the flow is of none of the sources. Most are of none: those cost no memory.
func forgetting(flow netlink.Message, sources []netip.Addr) (*netlink.Message, error) {
	family := sources[0]
	attrs := flow.Data[min(len(flow.Data), len(header(family))):]
	addrs := attribute(attribute(attrs, attrTupleOrig), attrTupleIP)
	source, ok := netip.AddrFromSlice(attribute(addrs, sourceAttr(family)))
	if !ok || !slices.Contains(sources, source) {
		return nil, nil
	}
	again := netlink.NewAttributeEncoder()
	again.Bytes(unix.NLA_F_NESTED|attrTupleOrig, attribute(attrs, attrTupleOrig))
	for _, attr := range []uint16{attrID, attrZone} { // this flow and no later one; a flow need not be in a zone
		if value := attribute(attrs, attr); value != nil {
			again.Bytes(attr, value)
		}
	}
	m, err := message(msgDeleteFlow, netlink.Request, family, again)
	return &m, err
}

// attribute is the value of the first attribute of a type in a list of them (struct nlattr: length, type, value, padding to 4 bytes); nil
// when there is none.
func attribute(list []byte, typ uint16) []byte {
	for len(list) >= unix.NLA_HDRLEN {
		length := int(binary.NativeEndian.Uint16(list))
		if length < unix.NLA_HDRLEN || length > len(list) {
			return nil
		}
		if binary.NativeEndian.Uint16(list[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER) == typ {
			return list[unix.NLA_HDRLEN:length]
		}
		list = list[min(len(list), (length+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1)):]
	}
	return nil
}

func sourceAttr(family netip.Addr) uint16 {
	if family.Is4() {
		return attrIPv4Source
	}
	return attrIPv6Source
}

// header is the nfgenmsg that begins every message: family (that of an address), version and a resource of none.
func header(family netip.Addr) []byte {
	if family.Is4() {
		return []byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0}
	}
	return []byte{unix.AF_INET6, unix.NFNETLINK_V0, 0, 0}
}

func message(kind netlink.HeaderType, flags netlink.HeaderFlags, family netip.Addr, attrs *netlink.AttributeEncoder) (netlink.Message, error) {
	body, err := attrs.Encode()
	data := append(header(family), body...)
	return netlink.Message{Header: netlink.Header{Length: uint32(unix.NLMSG_HDRLEN + len(data)), Type: kind, Flags: flags}, Data: data}, err
}
