package egress_test

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// What frames are built of: layers from the outside in, each around what it carries.

// frame is Ethernet from the machine to the tap's card, unless said otherwise.
type frame struct {
	from, to net.HardwareAddr
	kind     uint16
	payload  []byte
}

func (f frame) bytes() []byte {
	b := slices.Concat(f.to, f.from, binary.BigEndian.AppendUint16(nil, f.kind), f.payload)
	for len(b) < 60 {
		b = append(b, 0)
	}
	return b
}

// ip4 is an IPv4 packet; options are padded by the caller.
type ip4 struct {
	src, dst netip.Addr
	proto    byte
	id       uint16
	fragment uint16 // flags and offset
	options  []byte
	payload  []byte
}

func (p ip4) bytes() []byte {
	size := 20 + len(p.options)
	b := make([]byte, size, size+len(p.payload))
	b[0], b[8], b[9] = 4<<4|byte(size/4), 64, p.proto
	binary.BigEndian.PutUint16(b[2:], uint16(size+len(p.payload)))
	binary.BigEndian.PutUint16(b[4:], p.id)
	binary.BigEndian.PutUint16(b[6:], p.fragment)
	copy(b[12:], p.src.AsSlice())
	copy(b[16:], p.dst.AsSlice())
	copy(b[20:], p.options)
	binary.BigEndian.PutUint16(b[10:], ^sum(0, b))
	return append(b, p.payload...)
}

// ip6 is an IPv6 packet; extension headers are part of the payload.
type ip6 struct {
	src, dst netip.Addr
	next     byte
	hops     byte // zero means 64
	payload  []byte
}

func (p ip6) bytes() []byte {
	b := make([]byte, 40, 40+len(p.payload))
	b[0], b[6], b[7] = 6<<4, p.next, p.hops
	if p.hops == 0 {
		b[7] = 64
	}
	binary.BigEndian.PutUint16(b[4:], uint16(len(p.payload)))
	copy(b[8:], p.src.AsSlice())
	copy(b[24:], p.dst.AsSlice())
	return append(b, p.payload...)
}

// udp is a datagram with its checksum.
func udp(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	b = append(b, payload...)
	binary.BigEndian.PutUint16(b[6:], ^sum(pseudo(src.Addr(), dst.Addr(), unix.IPPROTO_UDP, len(b)), b))
	return b
}

const (
	flagSYN = 1 << 1
	flagRST = 1 << 2
	flagACK = 1 << 4
)

// tcp is a segment with its checksum.
func tcp(src, dst netip.AddrPort, seq, ack uint32, flags byte, payload []byte) []byte {
	b := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint32(b[4:], seq)
	binary.BigEndian.PutUint32(b[8:], ack)
	b[12], b[13] = 5<<4, flags
	binary.BigEndian.PutUint16(b[14:], 65535)
	b = append(b, payload...)
	binary.BigEndian.PutUint16(b[16:], ^sum(pseudo(src.Addr(), dst.Addr(), unix.IPPROTO_TCP, len(b)), b))
	return b
}

// icmp is a message with its checksum, over IPv6 when src is.
func icmp(src, dst netip.Addr, kind, code byte, body []byte) []byte {
	b := append([]byte{kind, code, 0, 0}, body...)
	initial := uint32(0)
	if src.Is6() {
		initial = pseudo(src, dst, unix.IPPROTO_ICMPV6, len(b))
	}
	binary.BigEndian.PutUint16(b[2:], ^sum(initial, b))
	return b
}

// arp is a message of ARP for IPv4 over Ethernet.
func arp(operation uint16, fromMAC net.HardwareAddr, from netip.Addr, toMAC net.HardwareAddr, to netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, byte(operation >> 8), byte(operation)}
	return slices.Concat(b, fromMAC, from.AsSlice(), toMAC, to.AsSlice())
}

// pseudo is the sum over the header that checksums of IP's protocols include.
func pseudo(src, dst netip.Addr, proto, size int) uint32 {
	return uint32(sum(uint32(proto)+uint32(size), slices.Concat(src.AsSlice(), dst.AsSlice())))
}

// sum is the ones' complement sum of the internet's checksums.
func sum(total uint32, b []byte) uint16 {
	for i := 0; i+1 < len(b); i += 2 {
		total += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		total += uint32(b[len(b)-1]) << 8
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return uint16(total)
}
