package guest

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func netlinkMessage(kind uint16, seq uint32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(netlinkHeader+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, body...)
	return append(b, make([]byte, align4(len(body))-len(body))...)
}

func TestNetlinkRead(t *testing.T) {
	errno := func(e unix.Errno) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e))) }
	join := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	check := func(name string, b []byte, items int, wantDone bool, wantErr error) {
		t.Helper()
		got := 0
		done, err := (&netlink{seq: 7}).read(b, func([]byte) error { got++; return nil })
		if got != items || done != wantDone || !errors.Is(err, wantErr) {
			t.Errorf("%s: %d items, %v, %v, want %d, %v, %v", name, got, done, err, items, wantDone, wantErr)
		}
	}
	check("items", join(netlinkMessage(20, 7, []byte("abcde")), netlinkMessage(20, 7, nil)), 2, false, nil)
	check("the end", join(netlinkMessage(20, 7, nil), netlinkMessage(unix.NLMSG_DONE, 7, errno(0))), 1, true, nil)
	check("done", netlinkMessage(unix.NLMSG_ERROR, 7, errno(0)), 0, true, nil)
	check("refused", netlinkMessage(unix.NLMSG_ERROR, 7, errno(unix.EPERM)), 0, false, unix.EPERM)
	check("of another call", netlinkMessage(unix.NLMSG_ERROR, 6, errno(unix.EPERM)), 0, false, nil)
	check("short verdict", netlinkMessage(unix.NLMSG_ERROR, 7, []byte{1}), 0, false, errNetlink)
	check("longer than it is", netlinkMessage(20, 7, []byte("abcdefgh"))[:20], 0, false, errNetlink)
	short := netlinkMessage(20, 7, nil)
	binary.NativeEndian.PutUint32(short, 3)
	check("shorter than a header", short, 0, false, errNetlink)
}

func TestDiagAddress(t *testing.T) {
	var b [16]byte
	copy(b[:], []byte{127, 0, 0, 1})
	if got := diagAddress(unix.AF_INET, b[:]); got != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("IPv4: %v", got)
	}
	mapped := netip.MustParseAddr("::ffff:127.0.0.1").As16()
	if got := diagAddress(unix.AF_INET6, mapped[:]); !got.IsLoopback() || !got.Is4() {
		t.Errorf("mapped: %v", got)
	}
}
