package routing

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

func BenchmarkParse(b *testing.B) {
	hosts := newHosts(b)
	for _, host := range []string{"49983-i0123456789abcdefghij.example.dev", "127.0.0.1:8080", "49983-i0123456789abcdefghij.evil.test"} {
		b.Run(host, func(b *testing.B) {
			input := []byte(host)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					hosts.Parse(input) // one of the hosts is bad on purpose
				}
			})
		})
	}
}

// BenchmarkResolve is the hit that every request makes: of one sandbox by all processors, and spread over many sandboxes.
func BenchmarkResolve(b *testing.B) {
	for _, count := range []int{1, 10000} {
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			store := NewMemoryStore()
			table := NewTable(store, TableOptions{})
			go table.Run(b.Context()) // it ends with the benchmark
			client := netip.MustParseAddr("192.0.2.1")
			if err := store.PutNode(b.Context(), Node{ID: "n1", LinkAddr: "a:1"}, time.Hour); err != nil {
				b.Fatal(err)
			}
			names := make([][]byte, count)
			for i := range names {
				names[i] = fmt.Appendf(nil, "i%020d", i)
				if err := store.PutRoute(b.Context(), sample(string(names[i]), "n1", 1)); err != nil {
					b.Fatal(err)
				}
				table.Resolve(b.Context(), names[i], client) // warms the cache
			}
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for i := 0; pb.Next(); i = (i + 7919) % count {
					if _, err := table.Resolve(b.Context(), names[i], client); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
