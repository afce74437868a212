package proxy

import (
	"bytes"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"testing"
)

// Traefik's users asked for months what its fast path was doing: ours counts from the start.
func TestPitfall9EverythingIsCounted(t *testing.T) {
	e := edgeWith(t, echoHead(t))
	c := e.connect(t)
	c.write(getRequest)
	c.response("GET")
	c.write("GET / HTTP/1.1\r\nHost: 3000-inobody.sluice.test\r\n\r\n")
	c.response("GET")
	for name, want := range map[string]uint64{
		"sluice_proxy_connections":                              1,
		"sluice_proxy_requests_total":                           2,
		"sluice_proxy_requests_in_flight":                       0,
		`sluice_proxy_answers_total{class="2xx"}`:               1,
		`sluice_proxy_refusals_total{reason="not_found"}`:       1,
		`sluice_proxy_refusals_total{reason="upstream_closed"}`: 0,
	} {
		await(t, name, func() bool { return e.counter(name) == want }) // the answer is out a moment before the counter
	}
	var text bytes.Buffer
	e.metrics.WritePrometheus(&text)
	if !bytes.Contains(text.Bytes(), []byte(`sluice_proxy_answers_total{class="2xx"} 1`)) {
		t.Errorf("the counters are not in the text format:\n%s", text.Bytes())
	}
}

// fasthttp before v1.77.0 takes an unread body for the next request, among other things: see pitfalls 11 and 19.
func TestPitfall10FasthttpIsNotAnOldOne(t *testing.T) {
	mod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	version := regexp.MustCompile(`github\.com/valyala/fasthttp v1\.(\d+)\.`).FindSubmatch(mod)
	if version == nil {
		t.Fatal("go.mod names no fasthttp v1")
	}
	if minor, err := strconv.Atoi(string(version[1])); err != nil || minor < 77 {
		t.Errorf("fasthttp is v1.%s, want v1.77 or newer", version[1])
	}
}

// An idle connection costs its goroutine and little else. The bound is several times what it costs, and a fraction of what one
// kept buffer of a large head would.
func TestPitfall17IdleConnectionsAreSmall(t *testing.T) {
	const conns, most = 300, 32 << 10
	e := edgeWith(t, echoHead(t), func(o *Options) { o.Limits.HeadBytes = 64 << 10 })
	large := "GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nX-Large: " + string(bytes.Repeat([]byte{'x'}, 30<<10)) + "\r\n\r\n"
	inUse := func() uint64 {
		runtime.GC()
		runtime.GC() // what a pool held goes with the second
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before := inUse()
	open := make([]*rawConn, conns)
	for i := range open {
		open[i] = e.connect(t)
		open[i].write(large)
		open[i].response("GET")
	}
	each := (inUse() - before) / conns
	runtime.KeepAlive(open)
	t.Logf("%d bytes for an idle connection, both ends", each)
	if each > most {
		t.Errorf("an idle connection costs %d bytes, want at most %d", each, most)
	}
}
