package proxy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/routing"
)

func testCertificate(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"*." + testDomain},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func startTLSEdge(t testing.TB, change ...func(*Options)) *edge {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return startEdgeOn(t, tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{testCertificate(t)}}), change...)
}

func (e *edge) connectTLS(t testing.TB) *rawConn {
	t.Helper()
	nc, err := tls.Dial("tcp", e.addr, &tls.Config{InsecureSkipVerify: true, ServerName: "3000-isv." + testDomain}) //nolint:gosec // the test's own certificate
	if err != nil {
		t.Fatal(err)
	}
	return wrapRaw(t, nc)
}

func TestTLS(t *testing.T) {
	e := startTLSEdge(t)
	b := echoHead(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: b.addr})
	c := e.connectTLS(t)
	for range 3 {
		c.write(getRequest)
		_, body := c.response("GET")
		if !strings.HasSuffix(body, "X-Forwarded-Proto: https\r\n\r\n") {
			t.Fatalf("the sandbox got %q", body)
		}
	}
	c.write("GET / HTTP/1.1\nbad\n\n")
	if resp, _ := c.response("GET"); resp.StatusCode != 400 {
		t.Errorf("got %d", resp.StatusCode)
	}
	c.expectEOF()
}

// Under TLS the reader must not be disturbed, and still a client that leaves is noticed.
func TestTLSClientGoneCancelsTheUpstream(t *testing.T) {
	cancelled := make(chan error, 1)
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		b.head(c)
		_, err := c.br.ReadByte()
		cancelled <- err
	})
	e := startTLSEdge(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: b.addr})
	c := e.connectTLS(t)
	c.write(getRequest)
	await(t, "the request", func() bool { return b.heads.Load() == 1 })
	_ = c.Conn.Close()
	select {
	case <-cancelled:
	case <-time.After(10 * time.Second):
		t.Fatal("the sandbox still works for nobody")
	}
}

func TestTLSAnswerThatEndsInTheMiddleIsCut(t *testing.T) {
	b := answering(t, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", true)
	e := startTLSEdge(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: b.addr})
	c := e.connectTLS(t)
	c.write(getRequest)
	rest, err := io.ReadAll(c.br)
	if err == nil {
		t.Errorf("read %q and an end in good order", rest)
	}
}

func TestTLSUpgrade(t *testing.T) {
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		b.head(c)
		c.write("HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")
		_, _ = io.Copy(c.Conn, c.br)
	})
	e := startTLSEdge(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: b.addr})
	c := e.connectTLS(t)
	c.write("GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	c.expect("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	big := strings.Repeat("0123456789abcdef", 32<<10)
	go c.write(big)
	c.expect(big)
	if err := c.Conn.(*tls.Conn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	c.expectEOF()
}

func TestTLSUploadAndDownload(t *testing.T) {
	addr := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = w.Write(body)
	})
	e := startTLSEdge(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: addr})
	const size = 4 << 20
	resp, err := e.client(t).Post("https://3000-isv.sluice.test/", "application/octet-stream", io.LimitReader(pattern{}, size))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); n != size || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}
