package egress

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

// TestNotice: notices are whole packets to the machine, from whom it would believe them.
func TestNotice(t *testing.T) {
	check := func(proto uint8, src, dst string, wantProto uint8, wantFrom string) {
		t.Helper()
		from, to := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
		b := notice(proto, from, to)
		header, protoAt, addrs, size := 20, 9, 12, 4
		if from.Addr().Is6() {
			header, protoAt, addrs, size = 40, 6, 8, 16
		} else if checksum(b[:header]) != 0 {
			t.Errorf("notice(%d, %s, %s): the header's checksum is wrong", proto, src, dst)
		}
		sender, _ := netip.AddrFromSlice(b[addrs : addrs+size])
		receiver, _ := netip.AddrFromSlice(b[addrs+size : addrs+2*size])
		if b[protoAt] != wantProto || sender.String() != wantFrom || receiver != from.Addr() {
			t.Errorf("notice(%d, %s, %s) is of protocol %d from %s to %s, want %d from %s", proto, src, dst, b[protoAt], sender, receiver, wantProto, wantFrom)
		}
		body := b[header:]
		sum := body
		if wantProto != protoICMP {
			pseudo := append(sender.AsSlice(), receiver.AsSlice()...)
			pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(body)))
			sum = append(append(pseudo, 0, 0, 0, wantProto), body...)
		}
		if checksum(sum) != 0 {
			t.Errorf("notice(%d, %s, %s): the checksum is wrong", proto, src, dst)
		}
		if proto == protoTCP && (binary.BigEndian.Uint16(body) != to.Port() || binary.BigEndian.Uint16(body[2:]) != from.Port()) {
			t.Errorf("notice(%d, %s, %s) is between other ports", proto, src, dst)
		}
	}
	check(protoTCP, "169.254.0.21:4000", "1.1.1.1:443", protoTCP, "1.1.1.1")
	check(protoTCP, "[fd73:6c75:6963:65ff::2]:4001", "[2606:4700::1]:443", protoTCP, "2606:4700::1")
	check(protoUDP, "169.254.0.21:4000", "1.1.1.1:53", protoICMP, "169.254.0.22")
	check(protoUDP, "[fd73:6c75:6963:65ff::2]:4001", "[2606:4700::1]:53", protoICMPv6, "fd73:6c75:6963:65ff::1")
	if b := notice(protoICMP, netip.MustParseAddrPort("169.254.0.21:1"), netip.MustParseAddrPort("1.1.1.1:1")); b != nil {
		t.Errorf("notice of a ping = %x, want none", b)
	}
}
