//go:build !race

package proxy

import (
	"io"
	"testing"

	"github.com/sluice-edge/sluice/routing"
)

// A proxied request allocates nothing of ours. What remains is fasthttp's: one byte that its reader for the idle state lets
// escape. The client and the sandbox of this test allocate nothing.
func TestProxiedRequestAllocations(t *testing.T) {
	e := startEdge(t)
	e.sandbox(t, private("isv"), map[uint16]string{3000: benchBackend(t)})
	c := mustDial(t, e.addr)
	defer c.Close()
	buf := make([]byte, len(benchAnswer))
	allocs := testing.AllocsPerRun(1000, func() {
		if _, err := c.Write(benchRequest); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			t.Fatal(err)
		}
	})
	if allocs > 1 {
		t.Errorf("%v allocations per request, want 1", allocs)
	}
}

func TestHeadAllocations(t *testing.T) {
	var h requestHead
	var a answerHead
	var out []byte
	rw := rewrite{mask: "localhost:${PORT}", port: 3000}
	route := private("isv")
	route.State, route.Mask = routing.Running, rw.mask
	allocs := testing.AllocsPerRun(100, func() {
		if err := h.parse(benchRequest); err != nil {
			t.Fatal(err)
		}
		if d := decide(&route, 3000, &facts{target: h.target, tokens: 1, token: h.get(fieldTrafficToken)}); d.reason != reasonNone {
			t.Fatal(d.reason)
		}
		out = h.appendRequest(out[:0], &rw)
		end, _, _ := headEnd(benchAnswer, 0)
		if err := a.parse(benchAnswer[:end], false); err != nil {
			t.Fatal(err)
		}
		out = a.appendAnswer(out[:0], &answerRewrite{close: true})
	})
	if allocs != 0 {
		t.Errorf("%v allocations, want 0", allocs)
	}
}
