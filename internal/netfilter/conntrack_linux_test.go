package netfilter

import (
	"net/netip"
	"os"
	"sync"
	"testing"

	"github.com/sluice-edge/sluice/internal/testkit"
)

// BenchmarkForget tells what a processor has to do for each caller, alone and in a storm.
func BenchmarkForget(b *testing.B) {
	for name, together := range map[string]int{"alone": 1, "20 at once": 20} {
		b.Run(name, func(b *testing.B) {
			if os.Geteuid() != 0 {
				b.Skip("the kernel tells only root of its flows")
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
