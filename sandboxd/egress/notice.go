package egress

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// Numbers of the protocols that notices speak.
const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

// notice is the packet by which a machine learns that its flow from src to dst was cut, nil for protocols that have none. Of TCP it is a
// SYN in the peer's name, at the wrong time: the machine answers with an acknowledgement of what it really awaits, and gets the reset that
// belongs to it from the rules. We do not know the sequence numbers, and a reset with others is ignored. Of UDP it is what a packet of
// the flow would have got for an answer.
func notice(proto uint8, src, dst netip.AddrPort) []byte {
	switch proto {
	case protoTCP:
		segment := make([]byte, 20)
		binary.BigEndian.PutUint16(segment, dst.Port())
		binary.BigEndian.PutUint16(segment[2:], src.Port())
		const offset, syn = 5 << 4, 1 << 1
		segment[12], segment[13] = offset, syn
		return packet(dst.Addr(), src.Addr(), proto, 16, segment)
	case protoUDP:
		datagram := make([]byte, 8)
		binary.BigEndian.PutUint16(datagram, src.Port())
		binary.BigEndian.PutUint16(datagram[2:], dst.Port())
		binary.BigEndian.PutUint16(datagram[4:], uint16(len(datagram)))
		quoted := packet(src.Addr(), dst.Addr(), proto, 6, datagram)
		if src.Addr().Is4() {
			const unreachable, prohibited = 3, 13
			return packet(gateway4, src.Addr(), protoICMP, 2, slices.Concat([]byte{unreachable, prohibited, 0, 0, 0, 0, 0, 0}, quoted))
		}
		const unreachable, prohibited = 1, 1
		return packet(gateway6, src.Addr(), protoICMPv6, 2, slices.Concat([]byte{unreachable, prohibited, 0, 0, 0, 0, 0, 0}, quoted))
	}
	return nil
}

// packet puts an IP header before payload, and the checksum at its place in it.
func packet(src, dst netip.Addr, proto uint8, checksumAt int, payload []byte) []byte {
	pseudo := slices.Concat(src.AsSlice(), dst.AsSlice(), binary.BigEndian.AppendUint32(nil, uint32(len(payload))), []byte{0, 0, 0, proto})
	if proto == protoICMP {
		pseudo = nil
	}
	binary.BigEndian.PutUint16(payload[checksumAt:], checksum(append(pseudo, payload...)))
	const hops = 64
	var header []byte
	if src.Is4() {
		header = make([]byte, 20)
		header[0], header[8], header[9] = 4<<4|5, hops, proto
		binary.BigEndian.PutUint16(header[2:], uint16(len(header)+len(payload)))
		copy(header[12:], src.AsSlice())
		copy(header[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(header[10:], checksum(header))
	} else {
		header = make([]byte, 40)
		header[0], header[6], header[7] = 6<<4, proto, hops
		binary.BigEndian.PutUint16(header[4:], uint16(len(payload)))
		copy(header[8:], src.AsSlice())
		copy(header[24:], dst.AsSlice())
	}
	return append(header, payload...)
}

// checksum is the internet's: the complement of the ones' complement sum.
func checksum(b []byte) uint16 {
	total := uint32(0)
	for ; len(b) >= 2; b = b[2:] {
		total += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		total += uint32(b[0]) << 8
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return ^uint16(total)
}
