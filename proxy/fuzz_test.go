package proxy

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"strings"
	"testing"
)

// What we accept, net/http reads the same way; and what we send, we would accept, with the same framing.
func FuzzRequestHead(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	f.Add([]byte("POST /x?y HTTP/1.1\r\nHost: a:1\r\nContent-Length: 5\r\nConnection: close, X-A\r\nX-A: b\r\nTE: trailers\r\n\r\n"))
	f.Add([]byte("POST http://a/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\nOrigin: http://a\r\n\r\n"))
	f.Add([]byte("GET / HTTP/1.0\r\nHost: [::1]:80\r\nUpgrade: websocket\r\nConnection: Upgrade, keep-alive\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		end, _, err := headEnd(b, 0)
		if err != nil || end == 0 {
			return
		}
		var h requestHead
		if h.parse(b[:end]) != nil {
			return
		}
		checkAgainstNetHTTP(t, &h, b[:end])
		for _, mask := range []string{"", "localhost:${PORT}"} {
			rw := rewrite{client: netip.MustParseAddr("192.0.2.1"), mask: mask, port: 8080, protocol: h.wantsUpgrade()}
			out := h.appendRequest(nil, &rw)
			outEnd, _, err := headEnd(out, 0)
			if err != nil || outEnd != len(out) {
				t.Fatalf("what goes out has another end: %q, %v", out, err)
			}
			var again requestHead
			if err := again.parse(out); err != nil {
				t.Fatalf("what goes out is refused: %v\n%q\nfrom %q", err, out, b)
			}
			if !bytes.Equal(again.method, h.method) || !bytes.Equal(again.target, h.target) || again.framing != h.framing ||
				again.length != h.length || again.http10 != h.http10 {
				t.Fatalf("framing changed\n%q\nfrom %q", out, b)
			}
			if mask == "" && !bytes.Equal(again.get(fieldHost), h.get(fieldHost)) {
				t.Fatalf("host changed in %q", out)
			}
			if again.has(fieldTrafficToken) || again.has(fieldEnvdToken) || again.has(fieldSandboxID) || again.has(fieldExpect) {
				t.Fatalf("a header that is ours went out: %q", out)
			}
		}
	})
}

func checkAgainstNetHTTP(t *testing.T, h *requestHead, b []byte) {
	req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
	if err != nil {
		return // it may be stricter
	}
	if req.Method != string(h.method) {
		t.Fatalf("method %q, net/http says %q", h.method, req.Method)
	}
	chunked := len(req.TransferEncoding) > 0
	if chunked != (h.framing == framingChunked) {
		t.Fatalf("chunked %v, net/http says %v: %q", h.framing == framingChunked, chunked, b)
	}
	if !chunked && req.ContentLength != h.length {
		t.Fatalf("length %d, net/http says %d: %q", h.length, req.ContentLength, b)
	}
}

func FuzzAnswerHead(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"), false)
	f.Add([]byte("HTTP/1.0 302 \r\nLocation: http://localhost:8080/a\r\nSet-Cookie: a=b; Domain=.localhost; x\r\nConnection: close\r\n\r\n"), true)
	f.Add([]byte("HTTP/1.1 101\r\nUpgrade: websocket\r\nAccess-Control-Allow-Origin: //localhost:8080\r\nTransfer-Encoding: chunked\r\n\r\n"), false)
	f.Fuzz(func(t *testing.T, b []byte, head bool) {
		end, _, err := headEnd(b, 0)
		if err != nil || end == 0 {
			return
		}
		var a answerHead
		if a.parse(b[:end], head) != nil {
			return
		}
		if resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b[:end])), &http.Request{Method: "GET"}); err == nil && !head && a.status >= 200 {
			if resp.StatusCode != a.status || (len(resp.TransferEncoding) > 0) != (a.framing == framingChunked) ||
				a.framing == framingLength && resp.ContentLength != a.length {
				t.Fatalf("net/http reads %q as %v", b, resp)
			}
		}
		for _, rw := range []answerRewrite{
			{}, {close: true, tls: true}, {keep: true}, {protocol: true},
			{mask: []byte("localhost:8080"), host: []byte("8080-isv.sluice.test"), tls: true},
		} {
			out := a.appendAnswer(nil, &rw)
			if a.untouched(&rw) && !bytes.Equal(out, b[:end]) {
				t.Fatalf("a head that may pass as it is became %q, from %q", out, b)
			}
			outEnd, _, err := headEnd(out, 0)
			if err != nil || outEnd != len(out) {
				t.Fatalf("what goes out has another end: %q, %v", out, err)
			}
			var again answerHead
			if err := again.parse(out, head); err != nil {
				t.Fatalf("what goes out is refused: %v\n%q\nfrom %q", err, out, b)
			}
			if again.status != a.status || again.framing != a.framing || again.length != a.length {
				t.Fatalf("framing changed\n%q\nfrom %q", out, b)
			}
			if rw.close && !again.close {
				t.Fatalf("no close in %q", out)
			}
		}
	})
}

// However a body is cut into pieces it is read the same way, and what is complete for us is complete for net/http, at the
// same byte.
func FuzzChunks(f *testing.F) {
	f.Add([]byte("5\r\nhello\r\n0\r\n\r\nnext"), 7)
	f.Add([]byte("00a;x=\"y\"\r\n0123456789\r\n0\r\nX-T: v\r\n\r\n"), 1)
	f.Add([]byte("fffffffffffffff\r\n"), 3)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		var whole chunkScanner
		used, err := whole.scan(b)
		if cut < 0 || cut > len(b) {
			return
		}
		var pieces chunkScanner
		used1, err1 := pieces.scan(b[:cut])
		if err1 == nil && !pieces.done() {
			if used1 != cut {
				t.Fatalf("%d of %d bytes used", used1, cut)
			}
			var used2 int
			used2, err1 = pieces.scan(b[cut:])
			used1 += used2
		}
		if used != used1 || whole.done() != pieces.done() || !errors.Is(err, err1) {
			t.Fatalf("whole: %d %v %v, in pieces: %d %v %v: %q", used, whole.done(), err, used1, pieces.done(), err1, b)
		}
		if !whole.done() {
			return
		}
		br := bufio.NewReader(bytes.NewReader(b))
		if _, err := io.Copy(io.Discard, httputil.NewChunkedReader(br)); err != nil {
			t.Fatalf("net/http refuses %q: %v", b[:used], err)
		}
		for { // the trailer section is left to the caller
			line, err := br.ReadString('\n')
			if err != nil {
				t.Fatalf("net/http finds no end in %q", b)
			}
			if line == "\r\n" {
				break
			}
			if strings.TrimSpace(line) == "" {
				t.Fatalf("another end: %q", b)
			}
		}
		rest, _ := io.ReadAll(br)
		if len(b)-len(rest) != used {
			t.Fatalf("we end at %d, net/http at %d: %q", used, len(b)-len(rest), b)
		}
	})
}

// No spelling that path.Clean and percent-decoding turn into a control path passes.
func FuzzControlPath(f *testing.F) {
	for _, s := range []string{"/init", "//init/", "/a/../init?x", "/%69nit", "/%2e%2e/freeze", "/a%2f..%2finit", "/initx", "/x#/../init", "/%2569nit"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		if !strings.HasPrefix(target, "/") {
			return
		}
		got := isControlPath([]byte(target))
		if want := controlPathByStdlib(target); want && !got {
			t.Fatalf("%q is a control path to net/http", target)
		}
	})
}
