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
		if _, ok := conn.(*net.TCPConn); !ok {
			t.Errorf("DialPort gives %T, which cannot be spliced", conn)
		}
		_, _ = io.WriteString(conn, "hello")
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
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
	if _, err := NewClientDial(func(context.Context) (net.Conn, error) {
		a, _ := net.Pipe()
		return a, nil
	}).DialPort(t.Context(), 1); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("over a pipe: %v", err)
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
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	socket := func(domain, kind int) int {
		fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	listening, err := listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer listening.Close()
	many := make([]int, 200)
	for i := range many {
		many[i] = int(file.Fd())
	}
	for _, c := range []struct {
		name string
		data string
		fds  []int
		want string
	}{
		{"closes", "", nil, "EOF"},
		{"open without a descriptor", "o", nil, "no descriptor"},
		{"a file", "o", []int{int(file.Fd())}, "no socket"},
		{"a Unix socket", "o", pair[:1], "domain 1"},
		{"a datagram socket", "o", []int{socket(unix.AF_INET, unix.SOCK_DGRAM)}, "type 2"},
		{"not connected", "o", []int{socket(unix.AF_INET, unix.SOCK_STREAM)}, "not connected"},
		{"a listener", "o", []int{int(listening.Fd())}, "socket of guest has"},
		{"two descriptors", "o", many[:2], "more than one"},
		{"many descriptors", "o", many, "more than one"},
		{"refused with a gift", "r", many[:1], "refused"},
		{"nonsense", "HTTP/1.1 200 OK\r\n\r\n", nil, "could not connect"},
		{"nonsense with a gift", "\x00", many[:1], "could not connect"},
	} {
		client := hostile(t, func(conn *net.UnixConn) {
			var hello [3]byte
			if _, err := io.ReadFull(conn, hello[:]); err != nil || hello != [3]byte{0, 0x1f, 0x90} {
				t.Errorf("%s: hello = %v, %v", c.name, hello, err)
			}
			if c.data != "" {
				_, _, _ = conn.WriteMsgUnix([]byte(c.data), unix.UnixRights(c.fds...), nil)
			}
		})
		before := openDescriptors(t)
		conn, err := client.DialPort(t.Context(), 8080)
		if err == nil {
			conn.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: DialPort = %v, want %q", c.name, err, c.want)
		}
		// The other side of the connection closes in its own time.
		eventually(t, c.name+": no descriptor is left", func() bool { return openDescriptors(t) <= before })
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

func TestReceivedIgnoresNonsense(t *testing.T) {
	for _, oob := range []string{"", "x", strings.Repeat("\xff", 20), strings.Repeat("\x00", 24)} {
		if fds := received([]byte(oob)); len(fds) != 0 {
			t.Errorf("received(%q) = %v", oob, fds)
		}
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
