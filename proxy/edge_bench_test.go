package proxy

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/routing"
)

// The same request with and without us in between: the ratio is the result, the machine cancels out.
func BenchmarkDirect(b *testing.B) {
	addr := benchBackend(b)
	benchmarkGet(b, func() net.Conn { return mustDial(b, addr) })
}

func BenchmarkEdge(b *testing.B) {
	e := startEdge(b)
	e.sandbox(b, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: benchBackend(b)})
	benchmarkGet(b, func() net.Conn { return mustDial(b, e.addr) })
}

func BenchmarkEdgeTokenAndMask(b *testing.B) {
	e := startEdge(b)
	route := private("isv")
	route.Mask = "localhost:${PORT}"
	e.sandbox(b, route, map[uint16]string{3000: benchBackend(b)})
	benchmarkGet(b, func() net.Conn { return mustDial(b, e.addr) })
}

// A connection that carried a body to a sandbox's own server is used once; to the agent, again and again.
func BenchmarkEdgePost(b *testing.B) {
	for name, host := range map[string]string{"sandbox": "3000-isv", "agent": "49983-isv"} {
		b.Run(name, func(b *testing.B) {
			e := startEdge(b)
			addr := benchBackend(b)
			e.sandbox(b, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: addr, envdPort: addr})
			body := append(bytes.Repeat([]byte{'x'}, 1020), "\r\n\r\n"...) // ends as benchBackend wants it
			request := append([]byte("POST / HTTP/1.1\r\nHost: "+host+".sluice.test\r\nContent-Length: 1024\r\n\r\n"), body...)
			benchmarkRequest(b, request, func() net.Conn { return mustDial(b, e.addr) })
		})
	}
}

func BenchmarkEdgeTLS(b *testing.B) {
	cert := testCertificate(b)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	e := startEdgeOn(b, tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{cert}}))
	e.sandbox(b, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: benchBackend(b)})
	benchmarkGet(b, func() net.Conn {
		return tls.Client(mustDial(b, e.addr), &tls.Config{InsecureSkipVerify: true}) //nolint:gosec // the test's own certificate
	})
}

func mustDial(b testing.TB, addr string) net.Conn {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	return nc
}

var (
	benchRequest = []byte("GET /static/app.js?v=1 HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n" +
		"Accept: */*\r\nAccept-Language: en\r\nAccept-Encoding: gzip, br\r\nReferer: http://3000-isv.sluice.test/\r\nCookie: a=b; c=d\r\n" +
		"e2b-traffic-access-token: " + testToken + "\r\n\r\n")
	benchAnswer = append([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/javascript\r\nCache-Control: max-age=3600\r\nETag: \"abc\"\r\n"+
		"Content-Length: 1024\r\n\r\n"), bytes.Repeat([]byte{'x'}, 1024)...)
)

// benchBackend reads a request in one piece and writes its answer in one: next to nothing, so that what is measured is us.
func benchBackend(b testing.TB) string {
	be := startBackend(b, func(c *rawConn, _ int) {
		_ = c.SetDeadline(time.Time{})
		buf := make([]byte, 4096)
		for {
			n, err := c.Conn.Read(buf)
			if err != nil || !bytes.HasSuffix(buf[:n], []byte("\r\n\r\n")) {
				return
			}
			if _, err := c.Conn.Write(benchAnswer); err != nil {
				return
			}
		}
	})
	return be.addr
}

func benchmarkGet(b *testing.B, dial func() net.Conn) { benchmarkRequest(b, benchRequest, dial) }

func benchmarkRequest(b *testing.B, request []byte, dial func() net.Conn) {
	b.ReportAllocs()
	b.SetBytes(int64(len(benchAnswer)))
	b.RunParallel(func(pb *testing.PB) {
		nc := dial()
		defer nc.Close()
		buf := make([]byte, len(benchAnswer))
		for pb.Next() {
			if _, err := nc.Write(request); err != nil {
				b.Error(err)
				return
			}
			if _, err := io.ReadFull(nc, buf); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkParseRequest(b *testing.B) {
	var h requestHead
	b.ReportAllocs()
	b.SetBytes(int64(len(benchRequest)))
	for b.Loop() {
		if err := h.parse(benchRequest); err != nil {
			b.Fatal(err)
		}
	}
}

// The kernel moves the bytes of a long body between plain connections; under TLS they pass through us.
func BenchmarkLongBody(b *testing.B) {
	const size = 64 << 20
	head := []byte("HTTP/1.1 200 OK\r\nContent-Length: 67108864\r\n\r\n")
	be := startBackend(b, func(c *rawConn, _ int) {
		_ = c.SetDeadline(time.Time{})
		buf := make([]byte, 4096)
		piece := make([]byte, 1<<20)
		for {
			if _, err := c.Conn.Read(buf); err != nil {
				return
			}
			_, _ = c.Conn.Write(head)
			for range size / len(piece) {
				if _, err := c.Conn.Write(piece); err != nil {
					return
				}
			}
		}
	})
	e := startEdge(b)
	e.sandbox(b, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: be.addr})
	for name, addr := range map[string]string{"direct": be.addr, "edge": e.addr} {
		b.Run(name, func(b *testing.B) {
			nc := mustDial(b, addr)
			defer nc.Close()
			b.SetBytes(size)
			for b.Loop() {
				_, _ = nc.Write(benchRequest)
				if _, err := io.CopyN(io.Discard, nc, size+int64(len(head))); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A long upload through both halves of the link.
func BenchmarkLongUpload(b *testing.B) {
	const size, piece = 64 << 20, 1 << 20
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
	be := scripted(b, func(be *backend, c *rawConn, _ int) {
		_ = c.SetDeadline(time.Time{})
		buf := make([]byte, 256<<10)
		for be.head(c) != "" {
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(c.br, size), buf); err != nil {
				return
			}
			c.write(answer)
		}
	})
	e := startEdge(b, startNode(b, be.addr))
	for name, addr := range map[string]string{"direct": be.addr, "edge and node": e.addr} {
		b.Run(name, func(b *testing.B) {
			nc := mustDial(b, addr)
			defer nc.Close()
			data, got := make([]byte, piece), make([]byte, len(answer))
			b.SetBytes(size)
			for b.Loop() {
				_, _ = io.WriteString(nc, "POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nContent-Length: 67108864\r\n\r\n")
				for range size / piece {
					if _, err := nc.Write(data); err != nil {
						b.Fatal(err)
					}
				}
				if _, err := io.ReadFull(nc, got); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
