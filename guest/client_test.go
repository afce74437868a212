package guest

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestControlCalls(t *testing.T) {
	s := startAgent(t)
	if err := s.node.Health(t.Context()); err != nil {
		t.Errorf("Health = %v", err)
	}
	m, err := s.node.Metrics(t.Context())
	if err != nil || m.CPUCount < 1 || m.MemTotal <= 0 || m.MemUsed <= 0 || m.DiskTotal <= 0 || m.Timestamp == 0 {
		t.Errorf("Metrics = %+v, %v", m, err)
	}
	now := time.Now()
	mustInit(t, s, InitRequest{EnvVars: map[string]string{"A": "1"}, AccessToken: "new", Timestamp: now})
	// A retry of an older one comes too late and changes nothing.
	mustInit(t, s, InitRequest{EnvVars: map[string]string{"A": "0"}, AccessToken: "old", Timestamp: now.Add(-time.Second)})
	if res, body := s.do(t, "GET", "/envs", map[string]string{tokenHeader: "new"}, nil); res.StatusCode != 200 || body != `{"A":"1"}` {
		t.Errorf("envs = %d %s", res.StatusCode, body)
	}
	for name, req := range map[string]InitRequest{
		"environment": {EnvVars: map[string]string{"A=B": ""}},
		"user":        {DefaultUser: "ghost"},
	} {
		if err := s.node.Init(t.Context(), req); err == nil || !strings.Contains(err.Error(), "status 400") {
			t.Errorf("bad %s: %v", name, err)
		}
	}
}

func TestInitAnswersTheVersion(t *testing.T) {
	s := startAgent(t)
	conn, err := s.node.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	body := `{"hyperloopIP":"1.2.3.4","volumeMounts":[],"accessToken":"t","unknown":{}}`
	if _, err := io.WriteString(conn, "POST /init HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "+strconv.Itoa(len(body))+"\r\n\r\n"+body); err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(raw), "HTTP/1.1 204") || !strings.Contains(string(raw), "X-Envd-Version: "+Version+"\r\n") {
		t.Errorf("answer = %s, %v", raw, err)
	}
}

func TestDialPort(t *testing.T) {
	s := startAgent(t)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", "0.0.0.0:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("no listener on %s: %v", address, err)
			continue
		}
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(conn, conn)
			conn.Close()
		}()
		port := uint16(l.Addr().(*net.TCPAddr).Port)
		conn, err := s.node.DialPort(t.Context(), port)
		if err != nil {
			t.Fatalf("DialPort of %s = %v", address, err)
		}
		_, _ = io.WriteString(conn, "hello")
		if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
			t.Error(err)
		}
		if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
			t.Errorf("echo by %s = %q, %v", address, got, err)
		}
		conn.Close()
		l.Close()
		if _, err := s.node.DialPort(t.Context(), port); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("DialPort of a closed port = %v", err)
		}
	}
}

// serveOnce answers the first connection to a port of the sandbox.
func serveOnce(t *testing.T, handle func(*net.TCPConn)) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if conn, err := l.Accept(); err == nil {
			handle(conn.(*net.TCPConn))
			conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// Each direction of a stream ends by itself, with all of its bytes.
func TestDialPortHalfClose(t *testing.T) {
	s := startAgent(t)
	large := strings.Repeat("0123456789abcdef", 1<<16)
	// The server ends first.
	heard := make(chan string, 1)
	conn, err := s.node.DialPort(t.Context(), serveOnce(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, large)
		_ = c.CloseWrite()
		raw, _ := io.ReadAll(c)
		heard <- string(raw)
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, err := io.ReadAll(conn); err != nil || string(got) != large {
		t.Errorf("read %d bytes of %d, %v", len(got), len(large), err)
	}
	if _, err := io.WriteString(conn, "after your end"); err != nil {
		t.Errorf("write after the server's end: %v", err)
	}
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Error(err)
	}
	if got := <-heard; got != "after your end" {
		t.Errorf("the server heard %q", got)
	}
	// The node goes away, and the server notices.
	gone := make(chan error, 1)
	conn, err = s.node.DialPort(t.Context(), serveOnce(t, func(c *net.TCPConn) {
		_, err := io.Copy(io.Discard, struct{ io.Reader }{c})
		gone <- err
	}))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	<-gone
	// The server goes away while much is on its way to it.
	conn, err = s.node.DialPort(t.Context(), serveOnce(t, func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for err == nil {
		_, err = io.WriteString(conn, large)
	}
}

// A stream outlives the deadline of the call that opened it, and ends with the agent.
func TestStreamsEndWithTheAgent(t *testing.T) {
	inner, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	l := newDialListener(inner, newAgent(Options{}).log)
	ended := make(chan struct{})
	port := serveOnce(t, func(c *net.TCPConn) {
		_, _ = io.Copy(io.Discard, struct{ io.Reader }{c})
		close(ended)
	})
	ctx, cancel := context.WithCancel(t.Context())
	conn, err := NewClient(inner.Addr().String()).DialPort(ctx, port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cancel()
	if _, err := io.WriteString(conn, "still open"); err != nil {
		t.Errorf("write after the call was over: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	<-ended
	if _, err := io.ReadAll(conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("end of the stream: %v", err)
	}
}

// hostile is an agent that was replaced: it answers every connection with script.
func hostile(t *testing.T, script func(*net.UnixConn)) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "hostile")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			script(conn.(*net.UnixConn))
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		os.RemoveAll(dir)
	})
	return NewClient(filepath.Join(dir, "s"))
}

func openDescriptors(t *testing.T) int {
	t.Helper()
	items, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(items)
}

func TestDialPortTrustsNothing(t *testing.T) {
	file, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	gift := unix.UnixRights(int(file.Fd()))
	for _, c := range []struct {
		name string
		data string
		oob  []byte
		want string
	}{
		{"closes", "", nil, "EOF"},
		{"refused with a gift", "r", gift, "refused"},
		{"nonsense", "HTTP/1.1 200 OK\r\n\r\n", nil, "could not connect"},
		{"nonsense with a gift", "\x00", gift, "could not connect"},
		{"open with a gift", "orest", gift, ""},
	} {
		client := hostile(t, func(conn *net.UnixConn) {
			var hello [3]byte
			if _, err := io.ReadFull(conn, hello[:]); err != nil || hello != [3]byte{0, 0x1f, 0x90} {
				t.Errorf("%s: hello = %v, %v", c.name, hello, err)
			}
			if c.data != "" {
				_, _, _ = conn.WriteMsgUnix([]byte(c.data), c.oob, nil)
			}
		})
		before := openDescriptors(t)
		conn, err := client.DialPort(t.Context(), 8080)
		if err == nil {
			if got, err := io.ReadAll(conn); string(got) != "rest" || err != nil {
				t.Errorf("%s: %q, %v", c.name, got, err)
			}
			conn.Close()
		}
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: DialPort = %v, want %q", c.name, err, c.want)
		}
		// The other side of the connection closes in its own time.
		eventually(t, c.name+": no descriptor is left", func() bool { return openDescriptors(t) <= before })
	}
}

// What the sandbox does to its end of a stream is nothing to ours: it cannot make a read of the node block.
func TestStreamsShareNothingWithTheSandbox(t *testing.T) {
	silent := make(chan struct{})
	defer close(silent)
	client := hostile(t, func(conn *net.UnixConn) {
		raw, err := conn.SyscallConn()
		if err != nil {
			t.Error(err)
		} else if err := raw.Control(func(fd uintptr) { _ = unix.SetNonblock(int(fd), false) }); err != nil {
			t.Error(err)
		}
		_, _ = conn.Write([]byte{dialOpen})
		<-silent
	})
	conn, err := client.DialPort(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Error(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read = %v, want it to end", err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
}

func TestCallsAreBounded(t *testing.T) {
	silent := make(chan struct{})
	defer close(silent)
	stuck := hostile(t, func(*net.UnixConn) { <-silent })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := stuck.Health(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Health of a silent guest = %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := stuck.DialPort(ctx, 80); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("DialPort of a silent guest = %v", err)
	}
	check := func(name, answer, want string) {
		t.Helper()
		c := hostile(t, func(conn *net.UnixConn) {
			if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
				_, _ = io.WriteString(conn, answer)
			}
		})
		if _, err := c.Metrics(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: Metrics = %v, want %q", name, err, want)
		}
	}
	check("endless body", "HTTP/1.1 200 OK\r\n\r\n"+strings.Repeat("x", 1<<20), "larger than")
	check("endless head", "HTTP/1.1 200 OK\r\nX: "+strings.Repeat("x", 1<<20), "")
	check("redirect", "HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\nContent-Length: 0\r\n\r\n", "status 302")
	check("no JSON", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{x", "decode")
	check("no HTTP", "\x00\x01\x02", "call guest")
	check("wrong types", "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{\"cpu_count\":\"many\"}", "decode")
}

// TestDialEndsWithItsCall: a call gave up, and its dial went on for as long as the hypervisor lived: a muted one cost the node a descriptor
// and a goroutine every five seconds.
func TestDialEndsWithItsCall(t *testing.T) {
	ended := make(chan error, 1)
	client := NewClientDial(func(ctx context.Context) (net.Conn, error) {
		<-ctx.Done()
		ended <- ctx.Err()
		return nil, ctx.Err()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := client.Metrics(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Metrics of a guest that does not accept = %v", err)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the dial goes on")
	}
}

// Closing the control listener does not wait for connections that say nothing.
func TestControlListenerCloses(t *testing.T) {
	s := startAgent(t)
	for range 3 {
		conn, err := s.node.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	if err := s.node.Health(t.Context()); err != nil {
		t.Error(err)
	}
	inner, err := net.Listen("unix", filepath.Join(s.home, "other"))
	if err != nil {
		t.Fatal(err)
	}
	l := newDialListener(inner, newAgent(Options{}).log)
	silent, err := net.Dial("unix", filepath.Join(s.home, "other"))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if err := l.Close(); err != nil {
		t.Errorf("Close = %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close = %v", err)
	}
}
