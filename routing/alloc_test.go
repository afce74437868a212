//go:build !race

package routing

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

// settledTable holds one route that is fresh for as long as the test runs.
func settledTable(t testing.TB, sandbox string) *Table {
	t.Helper()
	store := NewMemoryStore()
	table := NewTable(store, TableOptions{})
	if err := store.PutNode(t.Context(), Node{ID: "n1", LinkAddr: "a:1"}, time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := store.PutRoute(t.Context(), sample(sandbox, "n1", 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := table.Resolve(t.Context(), []byte(sandbox), netip.Addr{}); err != nil {
		t.Fatal(err)
	}
	return table
}

func TestAllocations(t *testing.T) {
	hosts := newHosts(t)
	for _, host := range []string{
		"3000-i0123456789abcdefghij.example.dev", "3000-i0123456789abcdefghij-6532622b.Example.DEV.:8443", "api.example.dev", "sandbox.example.dev",
		"localhost:8080", "127.0.0.1:8080", "", "0-i.example.dev", "1-_.example.dev", "1-i.evil.test", "user@example.dev",
	} {
		input := []byte(host)
		if got := testing.AllocsPerRun(100, func() { hosts.Parse(input) }); got != 0 { // counted, not judged
			t.Errorf("Parse(%q) allocates %v times, want 0", host, got)
		}
	}
	id, port := []byte("i0123456789abcdefghij"), []byte("49983")
	if got := testing.AllocsPerRun(100, func() { ParseHeaders(id, port) }); got != 0 { // counted, not judged
		t.Errorf("ParseHeaders allocates %v times, want 0", got)
	}

	client := netip.MustParseAddr("2001:db8::1")
	for _, sandbox := range []string{"i0123456789abcdefghij", "i" + strings.Repeat("0", maxSandboxID-1)} {
		table := settledTable(t, sandbox)
		name, absent := []byte(sandbox), []byte(sandbox[:len(sandbox)-1]+"z")
		if got := testing.AllocsPerRun(1000, func() { table.Resolve(t.Context(), name, client) }); got != 0 { // counted, not judged
			t.Errorf("a hit on a name of %d characters allocates %v times, want 0", len(name), got)
		}
		table.Resolve(t.Context(), absent, client)                                                              // it becomes known as absent
		if got := testing.AllocsPerRun(1000, func() { table.Resolve(t.Context(), absent, client) }); got != 0 { // counted, not judged
			t.Errorf("a known absence allocates %v times, want 0", got)
		}
	}
}
