package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/routing"
)

// backendPorts is a node's half without a node: it opens what was put behind a port.
type backendPorts struct {
	mu    sync.Mutex // guards ports
	ports map[uint16]string
}

func (p *backendPorts) Open(ctx context.Context, _ string, _ uint64, port uint16) (net.Conn, error) {
	p.mu.Lock()
	addr, open := p.ports[port]
	p.mu.Unlock()
	if !open {
		return nil, &link.VerdictError{Verdict: link.PortClosed}
	}
	return new(net.Dialer).DialContext(ctx, "tcp", addr)
}

// linkKey is what the edges and nodes of these tests share.
var linkKey = []byte("0123456789abcdef0123456789abcdef")

// serveLink serves a node's half of the link until the test ends, over the network or within the process, and returns how an edge gets to it.
func serveLink(t testing.TB, node *link.Server, direct bool) (dial link.DialFunc, addr string) {
	t.Helper()
	if direct {
		return node.Direct(), "direct"
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var jobs sync.WaitGroup
	jobs.Go(func() { _ = node.Serve(ctx, ln) })
	t.Cleanup(func() {
		cancel()
		jobs.Wait()
	})
	return (&link.Dialer{Key: linkKey}).Dial, ln.Addr().String()
}

// startNode puts a node's half of the link, over the network, in front of who listens on port 3000 of the sandbox isv, and
// returns what changes an edge such that it goes there.
func startNode(t testing.TB, addr string) func(*Options) {
	t.Helper()
	node := link.NewServer(&backendPorts{ports: map[uint16]string{3000: addr}}, link.ServerOptions{Key: linkKey})
	dial, addr := serveLink(t, node, false)
	return func(o *Options) {
		o.Routes = fixedRoutes{target: &routing.Target{
			Route: &routing.Route{Sandbox: "isv", Generation: 7, State: routing.Running},
			Node:  &routing.Node{ID: "n", LinkAddr: addr},
		}}
		o.Link = link.NewPool(dial, link.PoolOptions{})
	}
}

// stuff writes until nobody takes more for a while, and returns how much was taken.
func stuff(c net.Conn) (taken int) {
	piece := make([]byte, 64<<10)
	for {
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := c.Write(piece)
		taken += n
		if err != nil {
			return taken
		}
	}
}

// When a sandbox stops reading an upload, or a client an answer, the sockets in between must not fill the host's memory. Each
// reader takes enough first for a kernel left to itself to make much room: 34 MiB of an upload, where it holds 3 now.
func TestStalledBodiesHoldLittleOfTheKernel(t *testing.T) {
	if !canWatch {
		t.Skip("the bounds are set where there is a Linux kernel")
	}
	const first, most = 32 << 20, 8 << 20
	small := func(c net.Conn) { // what the two ends hold themselves is not counted
		_ = c.(*net.TCPConn).SetReadBuffer(32 << 10)
		_ = c.(*net.TCPConn).SetWriteBuffer(32 << 10)
	}
	written, ended := make(chan int, 1), make(chan struct{})
	b := scripted(t, func(b *backend, c *rawConn, _ int) {
		small(c.Conn)
		if strings.HasPrefix(b.head(c), "GET") {
			c.write("HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
			written <- stuff(c.Conn)
			return
		}
		_, _ = io.CopyN(io.Discard, c.br, first)
		<-ended
	})
	defer close(ended)
	e := startEdge(t, startNode(t, b.addr))
	c := e.connect(t)
	small(c.Conn)
	c.write("POST / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nContent-Length: 1073741824\r\n\r\n")
	up := stuff(c.Conn) - first
	c = e.connect(t)
	small(c.Conn)
	c.write(getRequest)
	_, _ = io.CopyN(io.Discard, c.br, first)
	down := <-written - first
	t.Logf("%d KiB of an upload are held, %d KiB of an answer", up>>10, down>>10)
	if up > most || down > most {
		t.Errorf("%d bytes of an upload are held and %d of an answer, want at most %d", up, down, most)
	}
}

// The same over the real link, between processes and within one: verdicts, pooling, splicing, and the end of a lifecycle.
func TestOverTheLink(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run(map[bool]string{false: "network", true: "direct"}[direct], func(t *testing.T) {
			silent := make(chan struct{})
			b := scripted(t, func(b *backend, c *rawConn, _ int) {
				for {
					head := b.head(c)
					switch {
					case head == "":
						return
					case strings.HasPrefix(head, "GET /big"):
						c.write("HTTP/1.1 200 OK\r\nContent-Length: 8388608\r\n\r\n")
						_, _ = io.CopyN(c.Conn, pattern{}, 8<<20)
					case strings.HasPrefix(head, "GET /never"):
						c.write("HTTP/1.1 200 OK\r\nContent-Length: 8388608\r\n\r\nstart")
						<-silent
						return
					default:
						writeAnswer(c, head)
					}
				}
			})
			defer close(silent)
			node := link.NewServer(&backendPorts{ports: map[uint16]string{3000: b.addr}}, link.ServerOptions{Key: linkKey})
			dial, addr := serveLink(t, node, direct)
			target := &routing.Target{
				Route: &routing.Route{Sandbox: "isv", Generation: 7, State: routing.Running},
				Node:  &routing.Node{ID: "n", LinkAddr: addr},
			}
			e := startEdge(t, func(o *Options) {
				o.Routes = fixedRoutes{target: target}
				o.Link = link.NewPool(dial, link.PoolOptions{})
			})
			c := e.connect(t)
			for range 3 {
				c.write(getRequest)
				c.response("GET")
			}
			if b.conns.Load() != 1 {
				t.Errorf("%d connections for 3 requests", b.conns.Load())
			}
			c.write("GET / HTTP/1.1\r\nHost: 9-isv.sluice.test\r\n\r\n")
			if _, body := c.response("GET"); !strings.Contains(body, "port is not open") {
				t.Errorf("closed port: %s", body)
			}
			c.write("GET /big HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n")
			if _, body := c.response("GET"); len(body) != 8<<20 {
				t.Errorf("%d bytes", len(body))
			}
			c.write("GET /never HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n")
			c.expect("HTTP/1.1 200 OK\r\nContent-Length: 8388608\r\n\r\nstart")
			node.Reset("isv", 7)
			if _, err := io.ReadAll(c.br); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("after the lifecycle's end: %v, want a reset", err)
			}
			await(t, "the count", func() bool { return e.counter(`sluice_proxy_refusals_total{reason="answer_cut"}`) == 1 })
		})
	}
}
