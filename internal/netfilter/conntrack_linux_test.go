package netfilter

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"sync"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/testkit"
)

// flowOf is a flow as the kernel tells of it.
func flowOf(tb testing.TB, source netip.Addr, id uint32) netlink.Message {
	tb.Helper()
	attrs := netlink.NewAttributeEncoder()
	attrs.ByteOrder = binary.BigEndian
	attrs.Nested(attrTupleOrig, func(tuple *netlink.AttributeEncoder) error {
		tuple.Nested(attrTupleIP, func(ip *netlink.AttributeEncoder) error {
			ip.Bytes(attrIPv4Source, source.AsSlice())
			ip.Bytes(attrIPv4Source+1, []byte{1, 1, 1, 1})
			return nil
		})
		tuple.Nested(2, func(proto *netlink.AttributeEncoder) error { // its ports
			proto.Uint8(1, unix.IPPROTO_TCP)
			return nil
		})
		return nil
	})
	attrs.Uint32(attrID, id)
	m, err := message(msgFlow, 0, source, attrs)
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

// TestForgetting: of the flows that the kernel tells of, those of the sources are named again with the tuple and the number that they have, and
// those of others cost no memory, however many there are.
func TestForgetting(t *testing.T) {
	mine, other := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("192.0.2.8")
	sources := []netip.Addr{netip.MustParseAddr("192.0.2.6"), mine}
	flow := flowOf(t, mine, 77)
	m, err := forgetting(flow, sources)
	if err != nil || m == nil || m.Header.Type != msgDeleteFlow {
		t.Fatalf("forgetting() = %+v, %v", m, err)
	}
	for _, attr := range []uint16{attrTupleOrig, attrID} {
		if got, want := attribute(m.Data[4:], attr), attribute(flow.Data[4:], attr); want == nil || !bytes.Equal(got, want) {
			t.Errorf("attribute %d is %x, want %x", attr, got, want)
		}
	}
	if attribute(m.Data[4:], attrZone) != nil {
		t.Error("it names a zone, and is in none")
	}
	flow = flowOf(t, other, 77)
	if allocs := testing.AllocsPerRun(100, func() {
		if m, err := forgetting(flow, sources); m != nil || err != nil {
			t.Errorf("forgetting() of another's flow = %+v, %v", m, err)
		}
	}); allocs > 0 {
		t.Errorf("a flow of others costs %v allocations", allocs)
	}
}

func FuzzForgetting(f *testing.F) {
	source := netip.MustParseAddr("192.0.2.7")
	f.Add(flowOf(f, source, 77).Data)
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := forgetting(netlink.Message{Data: data}, []netip.Addr{source})
		if err == nil && m != nil && !bytes.Contains(data, source.AsSlice()) {
			t.Errorf("%x is taken for a flow of %s", data, source)
		}
	})
}

// BenchmarkForget tells what a processor has to do for each caller, alone and in a storm.
func BenchmarkForget(b *testing.B) {
	for name, together := range map[string]int{"alone": 1, "20 at once": 20} {
		b.Run(name, func(b *testing.B) {
			if os.Geteuid() != 0 {
				b.Skip("the kernel tells only root of its flows: run it as root")
			}
			flows := &Flows{}
			began := testkit.ProcessorTime(b)
			for range b.N {
				var callers sync.WaitGroup
				for i := range together { // addresses of documentation, which no flow has
					callers.Go(func() {
						if err := flows.Forget(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: byte(i)})); err != nil {
							b.Error(err)
						}
					})
				}
				callers.Wait()
			}
			b.ReportMetric(float64(testkit.ProcessorTime(b)-began)/float64(b.N*together)/1e6, "cpu-ms/caller")
		})
	}
}
