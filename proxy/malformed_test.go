package proxy

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/routing"
)

// Framing that can be read in two ways is refused, never repaired: each of these gets an error and the end of the connection,
// and not one byte of it reaches the sandbox. What follows the malformed request is a request that an attacker would smuggle.
func TestMalformedRequestsAreRefused(t *testing.T) {
	e := startEdge(t)
	b := echoHead(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: b.addr})

	const host = "Host: 3000-isv.sluice.test\r\n"
	tests := []struct {
		name, request string
		status        int
	}{
		{"bare LF in the request line", "GET / HTTP/1.1\n" + host + "\r\n", 400},
		{"bare LF after a header", "GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\nA: b\r\n\r\n", 400},
		{"bare LF before the end", "GET / HTTP/1.1\r\n" + host + "\n", 400},
		{"bare LF everywhere", "GET / HTTP/1.1\nHost: 3000-isv.sluice.test\n\n", 400},
		{"bare CR in a value", "GET / HTTP/1.1\r\n" + host + "A: b\rC: d\r\n\r\n", 400},
		{"bare CR in the target", "GET /\rx HTTP/1.1\r\n" + host + "\r\n", 400},
		{"folded line", "GET / HTTP/1.1\r\n" + host + "A: b\r\n c\r\n\r\n", 400},
		{"folded line with a tab", "GET / HTTP/1.1\r\n" + host + "A: b\r\n\tTransfer-Encoding: chunked\r\n\r\n", 400},
		{"folded first line", "GET / HTTP/1.1\r\n " + host + "\r\n", 400},
		{"space before the colon", "GET / HTTP/1.1\r\n" + host + "Content-Length : 0\r\n\r\n", 400},
		{"tab before the colon", "GET / HTTP/1.1\r\n" + host + "Content-Length\t: 0\r\n\r\n", 400},
		{"space in a name", "GET / HTTP/1.1\r\n" + host + "A B: c\r\n\r\n", 400},
		{"no name", "GET / HTTP/1.1\r\n" + host + ": c\r\n\r\n", 400},
		{"no colon", "GET / HTTP/1.1\r\n" + host + "abc\r\n\r\n", 400},
		{"NUL in a value", "GET / HTTP/1.1\r\n" + host + "A: b\x00c\r\n\r\n", 400},
		{"DEL in a value", "GET / HTTP/1.1\r\n" + host + "A: b\x7fc\r\n\r\n", 400},
		{"NUL in a name", "GET / HTTP/1.1\r\n" + host + "A\x00: b\r\n\r\n", 400},
		{"byte above ASCII in a name", "GET / HTTP/1.1\r\n" + host + "\xc3\xa9: b\r\n\r\n", 400},
		{"control byte in the target", "GET /\x01 HTTP/1.1\r\n" + host + "\r\n", 400},
		{"space in the target", "GET /a b HTTP/1.1\r\n" + host + "\r\n", 400},
		{"two spaces", "GET  / HTTP/1.1\r\n" + host + "\r\n", 400},
		{"space at the end of the request line", "GET / HTTP/1.1 \r\n" + host + "\r\n", 400},
		{"tab in the request line", "GET\t/ HTTP/1.1\r\n" + host + "\r\n", 400},
		{"no target", "GET HTTP/1.1\r\n" + host + "\r\n", 400},
		{"no version", "GET /\r\n" + host + "\r\n", 400},
		{"HTTP/2.0", "GET / HTTP/2.0\r\n" + host + "\r\n", 400},
		{"HTTP/1.2", "GET / HTTP/1.2\r\n" + host + "\r\n", 400},
		{"http/1.1", "GET / http/1.1\r\n" + host + "\r\n", 400},
		{"HTTP/0.9", "GET /\r\n", 400},
		{"bad method", "G(T / HTTP/1.1\r\n" + host + "\r\n", 400},
		{"the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400},
		{"CONNECT", "CONNECT 3000-isv.sluice.test:443 HTTP/1.1\r\n" + host + "\r\n", 400},
		{"asterisk for GET", "GET * HTTP/1.1\r\n" + host + "\r\n", 400},
		{"fragment", "GET /a#b HTTP/1.1\r\n" + host + "\r\n", 400},
		{"fragment of an absolute target", "GET http://3000-isv.sluice.test/#b HTTP/1.1\r\n" + host + "\r\n", 400},
		{"relative target", "GET a HTTP/1.1\r\n" + host + "\r\n", 400},
		{"absolute target elsewhere", "GET http://3000-other.sluice.test/ HTTP/1.1\r\n" + host + "\r\n", 400},
		{"absolute target with a user", "GET http://a@3000-isv.sluice.test/ HTTP/1.1\r\n" + host + "\r\n", 400},
		{"absolute target of another scheme", "GET ftp://3000-isv.sluice.test/ HTTP/1.1\r\n" + host + "\r\n", 400},
		{"no Host", "GET / HTTP/1.1\r\n\r\n", 400},
		{"no Host in HTTP/1.0", "GET / HTTP/1.0\r\n\r\n", 400},
		{"empty Host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", 400},
		{"two Hosts", "GET / HTTP/1.1\r\n" + host + host + "\r\n", 400},
		{"two different Hosts", "GET / HTTP/1.1\r\n" + host + "Host: 3000-other.sluice.test\r\n\r\n", 400},
		{"Host with a user", "GET / HTTP/1.1\r\nHost: a@3000-isv.sluice.test\r\n\r\n", 400},
		{"Host list", "GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test, x\r\n\r\n", 400},
		{"both lengths", "POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		{"both lengths, the other way", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400},
		{"two lengths", "POST / HTTP/1.1\r\n" + host + "Content-Length: 0\r\nContent-Length: 5\r\n\r\n", 400},
		{"two equal lengths", "POST / HTTP/1.1\r\n" + host + "Content-Length: 0\r\ncontent-length: 0\r\n\r\n", 400},
		{"length list", "POST / HTTP/1.1\r\n" + host + "Content-Length: 0, 0\r\n\r\n", 400},
		{"negative length", "POST / HTTP/1.1\r\n" + host + "Content-Length: -1\r\n\r\n", 400},
		{"signed length", "POST / HTTP/1.1\r\n" + host + "Content-Length: +0\r\n\r\n", 400},
		{"hex length", "POST / HTTP/1.1\r\n" + host + "Content-Length: 0x0\r\n\r\n", 400},
		{"empty length", "POST / HTTP/1.1\r\n" + host + "Content-Length:\r\n\r\n", 400},
		{"length that overflows", "POST / HTTP/1.1\r\n" + host + "Content-Length: 18446744073709551616\r\n\r\n", 400},
		{"length with a space", "POST / HTTP/1.1\r\n" + host + "Content-Length: 1 0\r\n\r\n", 400},
		{"TE identity", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: identity\r\n\r\n", 400},
		{"TE gzip, chunked", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400},
		{"TE chunked, chunked", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400},
		{"TE twice", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		{"TE xchunked", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400},
		{"TE with a vertical tab", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400},
		{"TE empty", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding:\r\n\r\n0\r\n\r\n", 400},
		{"TE in HTTP/1.0", "POST / HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		{"chunk size with a space", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0 \r\n\r\n", 400},
		{"chunk size with a sign", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n", 400},
		{"chunk size with 0x", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n", 400},
		{"chunk size that overflows", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n\r\n", 400},
		{"chunk size without digits", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n;a\r\n\r\n", 400},
		{"bare LF after a chunk size", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\n\n", 400},
		{"bare LF in a chunk extension", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0;a\nb\r\n\r\n", 400},
		{"bare CR in a chunk extension", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0;a\rb\r\n\r\n", 400},
		{"chunk longer than its size", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", 400},
		{"bare LF after a chunk", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1\r\na\n0\r\n\r\n", 400},
		{"trailer that frames", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 5\r\n\r\n", 400},
		{"trailer that routes", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\nHost: x\r\n\r\n", 400},
		{"trailer that claims", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n", 400},
		{"trailer that claims in another spelling", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\nX_Forwarded_For: 6.6.6.6\r\n\r\n", 400},
		{"trailer with a space in its name", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\nA B: c\r\n\r\n", 400},
		{"folded trailer", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\n c\r\n\r\n", 400},
		{"expectation", "POST / HTTP/1.1\r\n" + host + "Expect: 200-ok\r\nContent-Length: 0\r\n\r\n", 417},
		{"head too large", "GET / HTTP/1.1\r\n" + host + "A: " + strings.Repeat("b", 80<<10) + "\r\n\r\n", 431},
		{"too many lines", "GET / HTTP/1.1\r\n" + host + strings.Repeat("A: b\r\n", maxLines) + "\r\n", 400},
		{"TLS on the plain port", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\r\n", 400},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := e.connect(t)
			c.write(tt.request + "GET /smuggled HTTP/1.1\r\n" + host + "\r\n")
			resp, err := http.ReadResponse(c.br, nil)
			if err != nil {
				t.Fatalf("no answer: %v", err)
			}
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != tt.status || !resp.Close || resp.Header.Get("Content-Type") != "text/plain; charset=utf-8" {
				t.Errorf("got %d, close %v, %q; want %d and a close", resp.StatusCode, resp.Close, body, tt.status)
			}
			c.expectEOF()
		})
	}
	if n := b.heads.Load(); n != 0 {
		t.Errorf("%d malformed requests reached the sandbox", n)
	}
	if n := b.conns.Load(); n != 0 {
		t.Errorf("%d connections to the sandbox were opened", n)
	}
}

// A chunked body that goes wrong after its beginning has gone out: the sandbox never sees an end, the client sees an error.
func TestMalformedChunkAfterTheFirst(t *testing.T) {
	e := startEdge(t)
	ended := make(chan error, 1)
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		b.head(c)
		_, err := io.Copy(io.Discard, c.br)
		ended <- err
	})
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: b.addr})
	c := e.connect(t)
	c.write("POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
	await(t, "the request", func() bool { return b.heads.Load() == 1 })
	c.write("5 \r\nworld\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n")
	resp, _ := c.response("POST")
	if resp.StatusCode != 400 || !resp.Close {
		t.Errorf("got %d, close %v", resp.StatusCode, resp.Close)
	}
	if err := <-ended; err == nil {
		t.Error("the sandbox saw an end in good order")
	}
}

// Slowloris: the whole head has one deadline, however it drips.
func TestHeadDeadline(t *testing.T) {
	e := startEdge(t, func(o *Options) { o.Limits.Head = 100 * time.Millisecond })
	c := e.connect(t)
	stop := make(chan struct{})
	go func() {
		for _, ch := range []byte("GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nX-Slow: " + strings.Repeat("a", 1000)) {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
				_, _ = c.Conn.Write([]byte{ch})
			}
		}
	}()
	resp, _ := c.response("GET")
	close(stop)
	if resp.StatusCode != 408 || !resp.Close {
		t.Errorf("got %d, close %v; want 408 and a close", resp.StatusCode, resp.Close)
	}
	if got := e.counter(`sluice_proxy_refusals_total{reason="head_timeout"}`); got != 1 {
		t.Errorf("head_timeout counted %d times", got)
	}
	// A connection that says nothing is closed without a word.
	e.connect(t).expectEOF()
}

// One CRLF before a request line is an old client's habit, not an attack.
func TestEmptyLineBeforeARequest(t *testing.T) {
	e := startEdge(t)
	b := echoHead(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: b.addr})
	c := e.connect(t)
	c.write("\r\n" + getRequest)
	if resp, _ := c.response("GET"); resp.StatusCode != 200 {
		t.Errorf("got %d", resp.StatusCode)
	}
}
