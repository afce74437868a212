package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/routing"
)

// The tests named after a number are the lines of docs/pitfalls.md: what happened to other proxies on fasthttp.

// answering is a sandbox that answers each request with the same bytes and then, if told so, closes.
func answering(t testing.TB, answer string, thenClose bool) *backend {
	return scripted(t, func(b *backend, c *rawConn, _ int) {
		for b.head(c) != "" {
			if _, err := io.WriteString(c.Conn, answer); err != nil || thenClose {
				return
			}
		}
	})
}

func edgeWith(t testing.TB, b *backend, change ...func(*Options)) *edge {
	e := startEdge(t, change...)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: b.addr})
	return e
}

func TestPitfall1UpgradeHeadersOnlyIfPresent(t *testing.T) {
	heads := make(chan string, 1)
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		heads <- b.head(c)
		c.write("HTTP/1.1 101 Switching Protocols\r\nUpgrade: Echo\r\nConnection: upgrade\r\nX-Y: z\r\n\r\nhello")
		_, _ = io.Copy(c.Conn, c.br)
		_ = c.Conn.(*net.TCPConn).CloseWrite()
	})
	e := edgeWith(t, b)
	c := e.connect(t)
	c.write("GET /x HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nconnection: keep-alive, upgrade\r\nUPGRADE: echo\r\n\r\nearly")
	c.expect("HTTP/1.1 101 Switching Protocols\r\nX-Y: z\r\nConnection: Upgrade\r\nUpgrade: Echo\r\n\r\nhelloearly")
	want := "GET /x HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nConnection: Upgrade\r\nUpgrade: echo\r\nX-Forwarded-For: 127.0.0.1\r\n" +
		"X-Forwarded-Host: 3000-isv.sluice.test\r\nX-Forwarded-Proto: http\r\n\r\n"
	if got := <-heads; got != want {
		t.Errorf("the sandbox got %q, want %q", got, want)
	}
	big := strings.Repeat("0123456789abcdef", 64<<10)
	go c.write(big)
	c.expect(big)
	// Half-close: our end reaches the sandbox, what it still says reaches us.
	c.write("last")
	if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	c.expect("last")
	c.expectEOF()
}

func TestPitfall1WebSocketThroughAMask(t *testing.T) {
	origin := make(chan http.Header, 1)
	addr := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		h := r.Header.Clone()
		h.Set("Host", r.Host)
		origin <- h
		ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"vite-hmr"}}) // checks Origin against Host
		if err != nil {
			return
		}
		defer ws.CloseNow()
		kind, data, err := ws.Read(r.Context())
		if err == nil {
			_ = ws.Write(r.Context(), kind, data)
		}
		_ = ws.Close(websocket.StatusNormalClosure, "bye")
	})
	e := startEdge(t)
	route := private("isv")
	route.Mask = "localhost:${PORT}"
	e.sandbox(t, route, map[uint16]string{3000: addr})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	dial := func(token string) (*websocket.Conn, *http.Response, error) {
		return websocket.Dial(ctx, "ws://3000-isv.sluice.test/hmr?token=x", &websocket.DialOptions{
			HTTPClient: e.client(t), Subprotocols: []string{"vite-hmr"},
			HTTPHeader: http.Header{"Origin": {"http://3000-isv.sluice.test"}, "E2b-Traffic-Access-Token": {token}},
		})
	}
	if _, resp, err := dial("wrong"); err == nil || resp == nil || resp.StatusCode != 403 {
		t.Fatalf("with a wrong token: %v %v", resp, err)
	}
	ws, _, err := dial(testToken)
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	if ws.Subprotocol() != "vite-hmr" {
		t.Errorf("subprotocol %q", ws.Subprotocol())
	}
	h := <-origin
	for name, want := range map[string]string{
		"Host": "localhost:3000", "Origin": "http://localhost:3000", "X-Forwarded-Host": "3000-isv.sluice.test", "E2b-Traffic-Access-Token": "",
	} {
		if h.Get(name) != want {
			t.Errorf("%s = %q, want %q", name, h.Get(name), want)
		}
	}
	message := strings.Repeat("x", 30<<10)
	if err := ws.Write(ctx, websocket.MessageText, []byte(message)); err != nil {
		t.Fatal(err)
	}
	if _, data, err := ws.Read(ctx); err != nil || string(data) != message {
		t.Fatalf("echo of %d bytes, %v", len(data), err)
	}
	if _, _, err := ws.Read(ctx); websocket.CloseStatus(err) != websocket.StatusNormalClosure {
		t.Errorf("close: %v", err)
	}
}

// Answers as bytes: what a sandbox says and what its client reads. A second request on the same connection shows that both
// sides stand where they should.
func TestAnswersOnTheWire(t *testing.T) {
	tests := []struct {
		name, method, answer, want string
		closes                     bool // the client's connection ends
		fresh                      bool // the sandbox's connection is not used again
		dirty                      bool // nor is this one, which the sandbox would keep
	}{
		{name: "length", method: "GET", answer: "HTTP/1.1 200 OK\r\ncontent-LENGTH: 5\r\nx-oDD: 1\r\n\r\nhello"},
		{name: "pitfall 2: HEAD", method: "HEAD", answer: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"},
		{name: "pitfall 2: HEAD of a chunked answer", method: "HEAD", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{name: "pitfall 2: HEAD without framing", method: "HEAD", answer: "HTTP/1.1 200 OK\r\n\r\n"},
		{name: "pitfall 2: 204", method: "GET", answer: "HTTP/1.1 204 No Content\r\n\r\n"},
		{name: "pitfall 2: 304 with a length", method: "GET", answer: "HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\nETag: \"a\"\r\n\r\n"},
		{name: "204 that announces a body", method: "GET", dirty: true,
			answer: "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\nX-A: b\r\n\r\n",
			want:   "HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n"},
		{name: "204 that announces none", method: "GET",
			answer: "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
			want:   "HTTP/1.1 204 No Content\r\n\r\n"},
		{name: "204 that announces chunks", method: "GET", dirty: true,
			answer: "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
			want:   "HTTP/1.1 204 No Content\r\n\r\n"},
		{name: "304 of a chunked answer", method: "GET",
			answer: "HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n",
			want:   "HTTP/1.1 304 Not Modified\r\n\r\n"},
		{name: "pitfall 3: chunks pass as they are", method: "GET",
			answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n1b\r\nabcdefghijklmnopqrstuvwxyz0\r\n0003;ext=\"a b\"\r\n1\r\n\r\n0\r\nX-T: yes\r\n\r\n"},
		{name: "pitfall 8: nothing is added", method: "GET", answer: "HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"},
		{name: "no reason phrase", method: "GET", answer: "HTTP/1.1 299\r\nContent-Length: 0\r\n\r\n"},
		{name: "pitfall 19: early hints are swallowed", method: "GET",
			answer: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
			want:   "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		{name: "hop-by-hop headers go", method: "GET",
			answer: "HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nKeep-Alive: timeout=5\r\nX-Hop: 1\r\nUpgrade: h2c\r\nContent-Length: 2\r\nX-A: b\r\n\r\nok",
			want:   "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: b\r\n\r\nok"},
		{name: "the sandbox's close is its own", method: "GET", fresh: true,
			answer: "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
			want:   "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		{name: "HTTP/1.0 with a length", method: "GET", fresh: true,
			answer: "HTTP/1.0 200 OK\r\nServer: SimpleHTTP\r\nContent-Length: 2\r\n\r\nok",
			want:   "HTTP/1.1 200 OK\r\nServer: SimpleHTTP\r\nContent-Length: 2\r\n\r\nok"},
		{name: "pitfall 5: no framing", method: "GET", fresh: true, closes: true,
			answer: "HTTP/1.0 200 OK\r\n\r\nuntil the end",
			want:   "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end"},
		{name: "426 says to what", method: "GET", answer: "HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n"},
		{name: "a cookie's bytes", method: "GET",
			answer: "HTTP/1.1 200 OK\r\nSet-Cookie: a=b;  Path=/\r\nset-cookie: c=\xc3\xa9\r\nContent-Length: 0\r\n\r\n"},
		{name: "compressed bytes", method: "GET",
			answer: "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x00\x00"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := answering(t, tt.answer, tt.fresh)
			e := edgeWith(t, b)
			c := e.connect(t)
			want := tt.want
			if want == "" {
				want = tt.answer
			}
			c.write(tt.method + " / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n")
			c.expect(want)
			if tt.closes {
				c.expectEOF()
				c = e.connect(t)
			}
			c.write(tt.method + " / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n")
			c.expect(want)
			wantConns := int32(1)
			if tt.fresh || tt.dirty {
				wantConns = 2
			}
			if n := b.conns.Load(); n != wantConns {
				t.Errorf("the sandbox saw %d connections, want %d", n, wantConns)
			}
		})
	}
}

// A sandbox is as hostile as a client: an answer that can be read in two ways is not passed on.
func TestMalformedAnswers(t *testing.T) {
	tests := []struct{ name, answer string }{
		{"two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!"},
		{"both lengths", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{"TE gzip", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"},
		{"TE in HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{"bad chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"},
		{"bare LF", "HTTP/1.1 200 OK\nContent-Length: 0\n\n"},
		{"pitfall 7: bare CR in a value", "HTTP/1.1 200 OK\r\nA: b\rSet-Cookie: c\r\nContent-Length: 0\r\n\r\n"},
		{"folded line", "HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n"},
		{"space before the colon", "HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n"},
		{"status with four digits", "HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n"},
		{"status 099", "HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n"},
		{"HTTP/2", "HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n"},
		{"not HTTP", "SSH-2.0-OpenSSH_9.2\r\n\r\n"},
		{"unasked 101", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"},
		{"endless interim answers", strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 100)},
		{"endless head", "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("b", 200<<10)},
		{"too many lines", "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", 300) + "\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := answering(t, tt.answer, false)
			e := edgeWith(t, b)
			c := e.connect(t)
			for i := range int32(2) {
				c.write(getRequest)
				resp, body := c.response("GET")
				if want := `{"sandboxId":"isv","message":"The sandbox sent an answer that is not valid HTTP","port":3000,"code":502}`; resp.StatusCode != 502 || body != want {
					t.Fatalf("got %d %s", resp.StatusCode, body)
				}
				if b.conns.Load() != i+1 {
					t.Fatal("the connection was used again")
				}
			}
		})
	}
}

// A sandbox that switches to what nobody asked for, or does not say to what, gets no tunnel.
func TestSwitchToAnotherProtocolIsRefused(t *testing.T) {
	for name, upgrade := range map[string]string{"another": "Upgrade: h2c\r\n", "none": "", "two": "Upgrade: websocket\r\nUpgrade: x\r\n"} {
		t.Run(name, func(t *testing.T) {
			e := edgeWith(t, answering(t, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"+upgrade+"\r\n", false))
			c := e.connect(t)
			c.write("GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			if resp, body := c.response("GET"); resp.StatusCode != 502 {
				t.Errorf("got %d %s", resp.StatusCode, body)
			}
		})
	}
}

func TestUpstreamClosedBeforeItAnswered(t *testing.T) {
	for name, partial := range map[string]string{"no byte": "", "part of a head": "HTTP/1.1 200 OK\r\nContent-"} {
		t.Run(name, func(t *testing.T) {
			b := answering(t, partial, true)
			e := edgeWith(t, b)
			c := e.connect(t)
			c.write(getRequest)
			resp, body := c.response("GET")
			want := `{"sandboxId":"isv","message":"The sandbox closed the connection before it answered","port":3000,"code":502}`
			if resp.StatusCode != 502 || body != want {
				t.Errorf("got %d %s", resp.StatusCode, body)
			}
			if b.heads.Load() != 1 {
				t.Errorf("sent %d times", b.heads.Load())
			}
		})
	}
}

func TestPitfall4ChunkedPatchIsStreamed(t *testing.T) {
	pieces := make(chan string, 10)
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		buf := make([]byte, 100)
		for {
			head := b.head(c)
			if head == "" {
				return
			}
			pieces <- head
			for piece := ""; !strings.HasSuffix(piece, "\r\n\r\n"); pieces <- piece {
				n, err := c.br.Read(buf)
				if err != nil {
					return
				}
				piece = string(buf[:n])
			}
			c.write("HTTP/1.1 204 No Content\r\nUpload-Offset: 10\r\n\r\n")
		}
	})
	e := edgeWith(t, b)
	c := e.connect(t)
	for range 2 {
		c.write("PATCH /files/1 HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nTransfer-Encoding: chunked\r\nUpload-Offset: 0\r\nTus-Resumable: 1.0.0\r\n\r\n")
		if head := <-pieces; !strings.Contains(head, "Upload-Offset: 0\r\nTus-Resumable: 1.0.0\r\n") || !strings.Contains(head, "Transfer-Encoding: chunked\r\n") {
			t.Fatalf("head %q", head)
		}
		// Each piece arrives before the next is sent, in its own framing, with the trailer.
		for _, piece := range []string{"5\r\nhello\r\n", "5;a=b\r\nworld\r\n", "0\r\nX-Sum: 1\r\n\r\n"} {
			c.write(piece)
			if got := <-pieces; got != piece {
				t.Fatalf("the sandbox read %q, want %q", got, piece)
			}
		}
		c.expect("HTTP/1.1 204 No Content\r\nUpload-Offset: 10\r\n\r\n")
	}
}

func TestPitfall5AnswersAreNotHeldBack(t *testing.T) {
	for name, head := range map[string]string{
		"identity": "HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nConnection: close\r\n\r\n",
		"chunked":  "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
		"length":   "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			next := make(chan string)
			b := scripted(t, func(b *backend, c *rawConn, _ int) {
				b.head(c)
				for piece := range next {
					c.write(piece)
				}
			})
			e := edgeWith(t, b)
			c := e.connect(t)
			c.write(getRequest)
			next <- head
			resp, err := http.ReadResponse(c.br, nil)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 5 { // lockstep: no next piece before this one has arrived
				piece := fmt.Sprintf("data: %d\n\n", i)
				if name == "chunked" {
					next <- fmt.Sprintf("%x\r\n%s\r\n", len(piece), piece)
				} else {
					next <- piece
				}
				got := make([]byte, len(piece))
				if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != piece {
					t.Fatalf("read %q, %v", got, err)
				}
			}
			close(next)
		})
	}
}

func TestPitfall6AnswerThatEndsInTheMiddleIsReset(t *testing.T) {
	for name, answer := range map[string]string{
		"length":    "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
		"chunked":   "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		"bad chunk": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		"spliced":   "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nhello",
	} {
		t.Run(name, func(t *testing.T) {
			seen := make(chan struct{})
			b := scripted(t, func(b *backend, c *rawConn, _ int) {
				b.head(c)
				c.write(answer)
				<-seen
				if name == "bad chunk" {
					c.write("junk")
				}
			})
			e := edgeWith(t, b)
			c := e.connect(t)
			c.write(getRequest)
			c.expect(answer)
			close(seen)
			c.expectReset()
			if got := e.counter(`sluice_proxy_refusals_total{reason="answer_cut"}`); got != 1 {
				t.Errorf("answer_cut counted %d times", got)
			}
		})
	}
}

func TestPitfall8NothingIsAddedToRequests(t *testing.T) {
	e := edgeWith(t, echoHead(t))
	c := e.connect(t)
	c.write("POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nContent-Length: 0\r\n\r\n")
	_, body := c.response("POST")
	want := "POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nContent-Length: 0\r\nX-Forwarded-For: 127.0.0.1\r\n" +
		"X-Forwarded-Host: 3000-isv.sluice.test\r\nX-Forwarded-Proto: http\r\n\r\n"
	if body != want {
		t.Errorf("got %q, want %q", body, want)
	}
}

func TestPitfall11UnreadBodyIsNotTheNextRequest(t *testing.T) {
	b := echoHead(t)
	e := edgeWith(t, b)
	smuggled := "GET /smuggled HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n"
	for name, framing := range map[string]string{
		"length":  fmt.Sprintf("Content-Length: %d\r\n\r\n", 100<<10),
		"chunked": "Transfer-Encoding: chunked\r\n\r\n19000\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := e.connect(t)
			c.write("POST / HTTP/1.1\r\nHost: 3000-nobody.sluice.test\r\n" + framing + smuggled)
			resp, _ := c.response("POST")
			if resp.StatusCode != 502 || !resp.Close {
				t.Errorf("got %d, close %v; want 502 and a close", resp.StatusCode, resp.Close)
			}
			c.expectEOF()
		})
	}
	t.Run("a body that is here whole is passed over", func(t *testing.T) {
		c := e.connect(t)
		c.write(fmt.Sprintf("POST / HTTP/1.1\r\nHost: 3000-nobody.sluice.test\r\nContent-Length: %d\r\n\r\n%s", len(smuggled), smuggled) +
			"GET /next HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n")
		if resp, _ := c.response("POST"); resp.StatusCode != 502 || resp.Close {
			t.Errorf("got %d, close %v", resp.StatusCode, resp.Close)
		}
		if _, body := c.response("GET"); !strings.HasPrefix(body, "GET /next ") {
			t.Errorf("next request: %q", body)
		}
	})
	if n := b.heads.Load(); n != 1 {
		t.Errorf("the sandbox saw %d requests, want 1", n)
	}
}

// A server in a sandbox that leaves a body unread takes it for the next request: never for that of another visitor.
func TestBodyLeftUnreadIsNotAnotherVisitorsRequest(t *testing.T) {
	ignores := scripted(t, func(b *backend, c *rawConn, _ int) { // as Python's http.server for a GET
		for head := b.head(c); head != ""; head = b.head(c) {
			writeAnswer(c, strings.Fields(head)[1])
		}
	}).addr
	netHTTP := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path) })
	const swallow = "GET /attack HTTP/1.1\r\nX-Swallow: "
	framings := map[string]string{
		"length":  fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(swallow), swallow),
		"chunked": fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(swallow), swallow),
	}
	for server, addr := range map[string]string{"scripted": ignores, "net/http": netHTTP} {
		for framing, rest := range framings {
			for _, method := range []string{"GET", "POST"} {
				t.Run(server+" "+method+" "+framing, func(t *testing.T) {
					e := startEdge(t)
					e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: addr})
					visit := func(request, want string) {
						t.Helper()
						c := e.connect(t)
						c.write(request)
						if _, body := c.response("GET"); body != want {
							t.Errorf("got the answer for %q, want that for %q", body, want)
						}
					}
					for range 2 {
						visit("GET /victim HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n", "/victim") // leaves a connection behind
						visit(method+" /mine HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n"+rest, "/mine")
					}
				})
			}
		}
	}
}

// What the SDKs call is POSTed to the agent and the API, which are ours and read what they are sent.
func TestBodiesToOurOwnServersShareAConnection(t *testing.T) {
	var opened atomic.Int32
	own := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path) }))
	own.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.Add(1)
		}
	}
	own.Start()
	t.Cleanup(own.Close)
	addr := own.Listener.Addr().String()
	e := startEdge(t, func(o *Options) {
		o.API = func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
	})
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{envdPort: addr})
	c := e.connect(t)
	for _, host := range []string{"49983-isv.sluice.test", "api.sluice.test"} {
		opened.Store(0)
		for _, method := range []string{"POST", "GET", "POST"} {
			c.write(method + " /x HTTP/1.1\r\nHost: " + host + "\r\nContent-Length: 5\r\n\r\nhello")
			if _, body := c.response(method); body != "/x" {
				t.Errorf("%s: %q", host, body)
			}
		}
		if n := opened.Load(); n != 1 {
			t.Errorf("%s: %d connections for 3 requests", host, n)
		}
	}
}

func TestPitfall12DirtyConnectionIsNotPooled(t *testing.T) {
	t.Run("bytes after the answer", func(t *testing.T) {
		b := answering(t, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", false)
		e := edgeWith(t, b)
		c := e.connect(t)
		for i := range int32(3) {
			c.write(getRequest)
			c.expect("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			if b.conns.Load() != i+1 {
				t.Fatal("the connection was used again")
			}
		}
	})
	t.Run("an answer that the client abandoned", func(t *testing.T) {
		b := scripted(t, func(b *backend, c *rawConn, n int) {
			b.head(c)
			if n > 1 {
				c.write("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				return
			}
			_, _ = io.WriteString(c.Conn, "HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
			_, _ = io.Copy(c.Conn, bytes.NewReader(make([]byte, 100000000)))
		})
		e := edgeWith(t, b)
		c := e.connect(t)
		c.write(getRequest)
		c.expect("HTTP/1.1 200 OK\r\n")
		_ = c.Conn.Close()
		c = e.connect(t)
		c.write(getRequest)
		c.expect("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	})
}

func TestPitfall13ClientGoneCancelsTheUpstream(t *testing.T) {
	for name, answer := range map[string]string{
		"before the answer": "",
		"in a silent answer": "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" +
			"3\r\na\n\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			cancelled := make(chan error, 1)
			b := scripted(t, func(b *backend, c *rawConn, _ int) {
				b.head(c)
				c.write(answer)
				_, err := c.br.ReadByte() // nothing comes but the end
				cancelled <- err
			})
			e := edgeWith(t, b)
			c := e.connect(t)
			c.write(getRequest)
			await(t, "the request", func() bool { return b.heads.Load() == 1 })
			if answer != "" {
				c.expect(answer)
			}
			_ = c.Conn.Close()
			select {
			case err := <-cancelled:
				if err == nil {
					t.Error("the sandbox got a byte")
				}
			case <-time.After(10 * time.Second):
				t.Fatal("the sandbox still works for nobody")
			}
			await(t, "the count", func() bool { return e.counter(`sluice_proxy_refusals_total{reason="client_gone"}`) == 1 })
		})
	}
}

// The sandbox closes a kept connection at the moment when a request arrives on it: the race that no check can win.
func TestPitfall14StaleConnectionIsRetriedOnce(t *testing.T) {
	var stale atomic.Bool
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		for i := 0; ; i++ {
			head := b.head(c)
			if head == "" || i > 0 && stale.Load() {
				return
			}
			if strings.HasPrefix(head, "POST ") {
				c.br.Discard(2)
			}
			c.write("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	e := edgeWith(t, b)
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	c := e.connect(t)
	c.write(getRequest)
	c.expect(ok)
	stale.Store(true)
	c.write(getRequest) // the kept connection dies on it
	c.expect(ok)
	if e.counter("sluice_proxy_retries_total") != 1 || b.conns.Load() != 2 {
		t.Errorf("%d retries, %d connections", e.counter("sluice_proxy_retries_total"), b.conns.Load())
	}
	// A POST may have been served: nobody knows, so it is not repeated, and the client is told the truth.
	before := b.heads.Load()
	c.write("POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nContent-Length: 2\r\n\r\nhi")
	resp, body := c.response("POST")
	if resp.StatusCode != 502 || !strings.Contains(body, "closed the connection before it answered") {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
	if got := b.heads.Load() - before; got != 1 {
		t.Errorf("the POST was sent %d times", got)
	}
}

func TestPitfall15BodiesAreStreamed(t *testing.T) {
	const size = 32 << 20
	addr := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 0 {
			w.Header().Set("Content-Length", fmt.Sprint(r.ContentLength))
		}
		_ = http.NewResponseController(w).EnableFullDuplex()
		_, _ = io.Copy(w, r.Body) // echoes while it still arrives
	})
	e := startEdge(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: addr})
	for _, chunked := range []bool{false, true} {
		body := io.LimitReader(pattern{}, size)
		req, _ := http.NewRequest("PUT", "http://3000-isv.sluice.test/", body)
		if !chunked {
			req.ContentLength = size
		}
		resp, err := e.client(t).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if n != size || err != nil {
			t.Errorf("chunked %v: %d bytes, %v", chunked, n, err)
		}
	}
}

type pattern struct{}

func (pattern) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(i)
	}
	return len(p), nil
}

func TestPitfall16ConnectionsPerClientAreCapped(t *testing.T) {
	b := echoHead(t)
	e := edgeWith(t, b, func(o *Options) { o.Limits.ConnsPerClient = 2 })
	first, second := e.connect(t), e.connect(t)
	for _, c := range []*rawConn{first, second} {
		c.write(getRequest)
		c.response("GET")
	}
	third := e.connect(t)
	resp, body := third.response("GET")
	if resp.StatusCode != 429 || body != "Too many connections from your address" || resp.Header.Get("Retry-After") == "" {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
	_ = first.Conn.Close()
	await(t, "room", func() bool {
		c := e.connect(t)
		c.write(getRequest)
		resp, _ := c.response("GET")
		_ = c.Conn.Close()
		return resp.StatusCode == 200
	})
}

func TestConnectionsInAllAreCapped(t *testing.T) {
	b := echoHead(t)
	e := edgeWith(t, b, func(o *Options) { o.Limits.Conns = 1 })
	first := e.connect(t)
	first.write(getRequest)
	first.response("GET")
	if resp, _ := e.connect(t).response("GET"); resp.StatusCode != 503 {
		t.Errorf("got %d", resp.StatusCode)
	}
}

func TestPitfall20ExpectContinue(t *testing.T) {
	bodies := make(chan string, 10)
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		for {
			head := b.head(c)
			if head == "" {
				return
			}
			if strings.Contains(head, "Expect") {
				bodies <- "forwarded the expectation"
			}
			body := make([]byte, 5)
			_, _ = io.ReadFull(c.br, body)
			bodies <- string(body)
			c.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
	e := edgeWith(t, b)
	e.sandbox(t, private("secret"), map[uint16]string{3000: b.addr})
	head := "POST / HTTP/1.1\r\nHost: %s\r\nExpect: 100-continue\r\nContent-Length: 5\r\n%s\r\n"

	t.Run("allowed", func(t *testing.T) {
		c := e.connect(t)
		for range 2 {
			c.write(fmt.Sprintf(head, "3000-isv.sluice.test", ""))
			c.expect("HTTP/1.1 100 Continue\r\n\r\n")
			c.write("hello")
			c.expect("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			if got := <-bodies; got != "hello" {
				t.Errorf("body %q", got)
			}
		}
	})
	t.Run("the body came without waiting", func(t *testing.T) {
		c := e.connect(t)
		c.write(fmt.Sprintf(head, "3000-isv.sluice.test", "") + "hello")
		c.expect("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		<-bodies
	})
	for name, request := range map[string]string{
		"wrong token": fmt.Sprintf(head, "3000-secret.sluice.test", "e2b-traffic-access-token: no\r\n"),
		"closed port": fmt.Sprintf(head, "9-isv.sluice.test", ""),
	} {
		t.Run(name, func(t *testing.T) {
			c := e.connect(t)
			c.write(request)
			resp, _ := c.response("POST") // the first thing that comes is no 100
			if resp.StatusCode < 400 || !resp.Close {
				t.Errorf("got %d, close %v", resp.StatusCode, resp.Close)
			}
			c.expectEOF()
		})
	}
	t.Run("HTTP/1.0 has no such thing", func(t *testing.T) {
		c := e.connect(t)
		c.write("POST / HTTP/1.0\r\nHost: 3000-isv.sluice.test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
		c.write("hello")
		c.expect("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		c.expectEOF()
		<-bodies
	})
}

func TestPipelinedRequestsAreAnsweredInOrder(t *testing.T) {
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		for {
			head := b.head(c)
			if head == "" {
				return
			}
			if strings.HasPrefix(head, "POST") {
				if strings.Contains(head, "chunked") {
					for line := ""; line != "0\r\n"; line, _ = c.br.ReadString('\n') {
					}
					c.br.Discard(2)
				} else {
					c.br.Discard(5)
				}
			}
			writeAnswer(c, strings.Fields(head)[1])
		}
	})
	e := edgeWith(t, b)
	c := e.connect(t)
	var want strings.Builder
	var all strings.Builder
	for i := range 50 {
		path := fmt.Sprintf("/%d", i)
		switch i % 4 {
		case 0:
			fmt.Fprintf(&all, "GET %s HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n", path)
		case 1:
			fmt.Fprintf(&all, "POST %s HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nContent-Length: 5\r\n\r\nhello", path)
		case 2:
			fmt.Fprintf(&all, "POST %s HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", path)
		case 3: // an answer of the edge's own in between
			fmt.Fprintf(&all, "GET %s HTTP/1.1\r\nHost: 9-isv.sluice.test\r\n\r\n", path)
			want.WriteString("closed ")
			continue
		}
		want.WriteString(path + " ")
	}
	go c.write(all.String())
	var got strings.Builder
	for range 50 {
		resp, body := c.response("GET")
		if resp.StatusCode == 502 {
			body = "closed"
		}
		got.WriteString(body + " ")
	}
	if got.String() != want.String() {
		t.Errorf("got  %s\nwant %s", got.String(), want.String())
	}
}

func TestConnectionCloseIsHonoured(t *testing.T) {
	e := edgeWith(t, answering(t, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", false))
	c := e.connect(t)
	c.write("GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nConnection: close\r\n\r\n")
	c.expect("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
	c.expectEOF()
	c = e.connect(t)
	c.write("GET / HTTP/1.0\r\nHost: 3000-isv.sluice.test\r\n\r\n")
	c.expect("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
	c.expectEOF()
	c = e.connect(t)
	for range 2 {
		c.write("GET / HTTP/1.0\r\nHost: 3000-isv.sluice.test\r\nConnection: keep-alive\r\n\r\n")
		c.expect("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok")
	}
}

// A sandbox may answer before it has read the request: the client reads that answer although its body is not wanted.
func TestEarlyAnswer(t *testing.T) {
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		b.head(c)
		c.write("HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
		time.Sleep(50 * time.Millisecond) // it leaves the body unread, which resets the connection
	})
	e := edgeWith(t, b)
	c := e.connect(t)
	c.write("POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nContent-Length: 1000000\r\n\r\n" + strings.Repeat("x", 50000))
	c.expect("HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
	c.expectEOF()
}

// A sandbox that answers, keeps its connection open and never reads the body does not hold the client.
func TestEarlyAnswerWithoutReading(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		b.head(c)
		c.write("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		<-hold
	})
	e := edgeWith(t, b)
	for name, framing := range map[string]string{"length": "Content-Length: 100000000\r\n\r\n", "chunked": "Transfer-Encoding: chunked\r\n\r\n5f5e100\r\n"} {
		t.Run(name, func(t *testing.T) {
			c := e.connect(t)
			c.write("POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n" + framing)
			go func() { _, _ = io.Copy(c.Conn, pattern{}) }()
			c.expect("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			_, _ = io.ReadAll(c.br) // it ends, in whichever way
		})
	}
}

func TestBodyTimeout(t *testing.T) {
	b := echoHead(t)
	e := edgeWith(t, b, func(o *Options) { o.Limits.Body = 50 * time.Millisecond })
	for name, request := range map[string]string{
		"short":   "Content-Length: 10\r\n\r\nhello",
		"long":    "Content-Length: 100000\r\n\r\nhello",
		"chunked": "Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
	} {
		t.Run(name, func(t *testing.T) {
			silent := scripted(t, func(b *backend, c *rawConn, _ int) {
				b.head(c)
				_, _ = io.Copy(io.Discard, c.br)
			})
			e.sandbox(t, routing.Route{Sandbox: "silent", Generation: 2}, map[uint16]string{3000: silent.addr})
			c := e.connect(t)
			c.write("POST / HTTP/1.1\r\nHost: 3000-silent.sluice.test\r\n" + request)
			if resp, body := c.response("POST"); resp.StatusCode != 408 || !resp.Close {
				t.Errorf("got %d, %s", resp.StatusCode, body)
			}
		})
	}
}

// The node's verdict beats the cached route: the edge asks the store again and goes where it says.
func TestMovedSandboxIsFoundAgain(t *testing.T) {
	b := echoHead(t)
	e := startEdge(t)
	e.sandbox(t, routing.Route{Sandbox: "isv", Generation: 5}, map[uint16]string{3000: b.addr})
	c := e.connect(t)
	c.write(getRequest)
	c.response("GET")
	e.mu.Lock() // the lifecycle ends, its pooled connections with it, and nobody told the edge
	delete(e.ports, life{"isv", 5})
	e.mu.Unlock()
	e.handler.link.Forget("isv", 5)
	c.write(getRequest)
	resp, body := c.response("GET")
	if resp.StatusCode != 502 || body != `{"sandboxId":"isv","message":"The sandbox was not found","code":502}` {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
	if e.counter("sluice_proxy_rerouted_total") != 1 {
		t.Error("the store was not asked again")
	}
}

func TestDialErrorsAreNotClosedPorts(t *testing.T) {
	verdicts := map[string]error{"busy": &link.VerdictError{Verdict: link.Busy}, "refused": &link.VerdictError{Verdict: link.Refused}, "gone": errors.New("no route to host")}
	wants := map[string]string{
		"busy":    `503 {"sandboxId":"isv","message":"The machine of this sandbox is too busy. Try again in a moment.","port":3000,"code":503}`,
		"refused": `503 {"sandboxId":"isv","message":"The machine of this sandbox refused the connection","port":3000,"code":503}`,
		"gone":    `502 {"sandboxId":"isv","message":"The machine of this sandbox could not be reached","port":3000,"code":502}`,
	}
	for name, verdict := range verdicts {
		t.Run(name, func(t *testing.T) {
			e := startEdge(t, func(o *Options) {
				o.Link = link.NewPool(func(context.Context, link.Target) (net.Conn, error) { return nil, verdict }, link.PoolOptions{})
			})
			e.sandbox(t, routing.Route{Sandbox: "isv"}, nil)
			c := e.connect(t)
			c.write(getRequest)
			resp, body := c.response("GET")
			if got := fmt.Sprintf("%d %s", resp.StatusCode, body); got != wants[name] {
				t.Errorf("got  %s\nwant %s", got, wants[name])
			}
		})
	}
}

func TestSandboxConnectionLimit(t *testing.T) {
	release := make(chan struct{})
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		b.head(c)
		<-release
		c.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	e := edgeWith(t, b, func(o *Options) { o.Limits.ConnsPerSandbox = 1 })
	first := e.connect(t)
	first.write(getRequest)
	await(t, "the first request", func() bool { return b.heads.Load() == 1 })
	second := e.connect(t)
	second.write(getRequest)
	resp, body := second.response("GET")
	want := `{"sandboxId":"isv","message":"The sandbox has too many concurrent incoming connections (limit: 1)","code":429,"connectionLimit":1}`
	if resp.StatusCode != 429 || body != want || resp.Header.Get("Retry-After") == "" {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
	close(release)
	first.response("GET")
}

// Uploads have a limit of their own, which ends with the body: the answer may take as long as it likes.
func TestSandboxBodyLimit(t *testing.T) {
	release := make(chan struct{})
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		if strings.HasPrefix(b.head(c), "POST") {
			_, _ = c.br.Discard(5000)
			<-release
		}
		c.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	e := edgeWith(t, b, func(o *Options) { o.Limits.BodiesPerSandbox = 1 })
	const head = "POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nContent-Length: 5000\r\n\r\n"
	first := e.connect(t)
	first.write(head)
	await(t, "the first upload", func() bool { return b.heads.Load() == 1 })
	second := e.connect(t)
	second.write(strings.Replace(head, "\r\n\r\n", "\r\nExpect: 100-continue\r\n\r\n", 1))
	resp, body := second.response("POST")
	want := `{"sandboxId":"isv","message":"The sandbox has too many concurrent uploads (limit: 1)","code":429,"connectionLimit":1}`
	if resp.StatusCode != 429 || body != want || resp.Header.Get("Retry-After") == "" {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
	third := e.connect(t)
	third.write(getRequest)
	if resp, _ := third.response("GET"); resp.StatusCode != 200 {
		t.Errorf("a request without a body: %d", resp.StatusCode)
	}
	first.write(strings.Repeat("x", 5000))
	await(t, "room", func() bool {
		of := life{"isv", 1}
		if !e.handler.bodies.acquire(of) {
			return false
		}
		e.handler.bodies.release(of)
		return true
	})
	fourth := e.connect(t)
	fourth.write(head + strings.Repeat("x", 5000))
	close(release)
	for _, c := range []*rawConn{first, fourth} {
		if resp, body := c.response("POST"); resp.StatusCode != 200 {
			t.Errorf("an upload within the limit: %d %s", resp.StatusCode, body)
		}
	}
}

func TestMaskedAnswersNameThePublicHost(t *testing.T) {
	answer := "HTTP/1.1 302 Found\r\nLocation: %s\r\nSet-Cookie: a=b; Domain=%s; Path=/\r\nAccess-Control-Allow-Origin: %s\r\nContent-Length: 0\r\n\r\n"
	tests := []struct{ location, domain, origin, wantLocation, wantDomain, wantOrigin string }{
		{"http://localhost:3000/a?b", "localhost", "http://localhost:3000", "http://3000-isv.sluice.test/a?b", "3000-isv.sluice.test", "http://3000-isv.sluice.test"},
		{"//localhost:3000/a", ".LOCALHOST", "*", "//3000-isv.sluice.test/a", ".3000-isv.sluice.test", "*"},
		{"/relative", "example.com", "null", "/relative", "example.com", "null"},
		{"https://localhost:3000", "localhost.example", "http://localhost:3001", "http://3000-isv.sluice.test", "localhost.example", "http://localhost:3001"},
		{"ftp://localhost:3000/a", "localhost; domain = .localhost:1 ;x", "ws://localhost:3000", "ftp://localhost:3000/a", "3000-isv.sluice.test; domain = .3000-isv.sluice.test ;x", "ws://localhost:3000"},
		{"HTTPS://localhost:3000/a", "x; Domain=", "a//localhost:3000", "http://3000-isv.sluice.test/a", "x; Domain=", "a//localhost:3000"},
		{"http://localhost:30000/", "x", "http://localhost", "http://localhost:30000/", "x", "http://localhost"},
	}
	for _, tt := range tests {
		b := answering(t, fmt.Sprintf(answer, tt.location, tt.domain, tt.origin), false)
		e := startEdge(t)
		e.sandbox(t, routing.Route{Sandbox: "isv", Mask: "localhost:${PORT}"}, map[uint16]string{3000: b.addr})
		c := e.connect(t)
		c.write(getRequest)
		c.expect(fmt.Sprintf(answer, tt.wantLocation, tt.wantDomain, tt.wantOrigin))
	}
}
