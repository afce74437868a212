package lab

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestInternet(t *testing.T) {
	l := New(t)
	l.Name("example.com", netip.MustParseAddr("93.184.215.14"), netip.MustParseAddr("2606:4700:4700::1111"))
	l.Name("*.sbx.localhost", netip.MustParseAddr("127.0.0.1"))
	pem, err := os.ReadFile(l.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext:       l.Host.Dial,
		TLSClientConfig:   &tls.Config{RootCAs: pool},
		DisableKeepAlives: true,
	}}
	for _, tt := range []struct{ url, want string }{
		{"http://1.1.1.1/", "http 1.1.1.1 1.1.1.1\n"},
		{"https://8.8.8.8/", "https 8.8.8.8 8.8.8.8\n"},
		{"https://example.com/", "https 93.184.215.14 example.com\n"},
		{"https://[2606:4700:4700::1111]/", "https 2606:4700:4700::1111 [2606:4700:4700::1111]\n"},
		{"http://169.254.169.254/", "http 169.254.169.254 169.254.169.254\n"},
		{"http://[fd00:99::1]/", "http fd00:99::1 [fd00:99::1]\n"},
		{"http://10.3.2.1/", "http 10.3.2.1 10.3.2.1\n"},
	} {
		resp, err := client.Get(tt.url)
		if err != nil {
			t.Errorf("GET %s: %v", tt.url, err)
			continue
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(body) != tt.want {
			t.Errorf("GET %s = %q, want %q", tt.url, body, tt.want)
		}
	}
	for _, at := range Internet {
		for _, network := range []string{"tcp", "udp"} {
			if got := exchange(t, l, network, netip.AddrPortFrom(at, PortEcho)); got != "ping\n" {
				t.Errorf("echo by %s at %s = %q", network, at, got)
			}
		}
	}
	if hits := l.Hits(netip.MustParseAddr("169.254.169.254")); len(hits) != 2 || hits[1].From.Addr() != HostAddr {
		t.Errorf("hits on the metadata trap = %v, want a connection and a request from the host", hits)
	}
	if l.Trapped() == 0 || l.Strangers() != 0 {
		t.Errorf("trapped %d, strangers %d: want some and none", l.Trapped(), l.Strangers())
	}
}

func exchange(t *testing.T, l *Lab, network string, to netip.AddrPort) string {
	t.Helper()
	conn, err := l.Host.Dial(t.Context(), network, to.String())
	if err != nil {
		t.Errorf("dial %s %s: %v", network, to, err)
		return ""
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	io.WriteString(conn, "ping\n")
	line, _ := bufio.NewReader(conn).ReadString('\n')
	return line
}

// TestCommand is a program on the host: it resolves by the laboratory's DNS, reaches the host's own listeners and the internet, and
// sees neither the machine's devices nor its named namespaces.
func TestCommand(t *testing.T) {
	l := New(t)
	l.Name("*.sbx.localhost", netip.MustParseAddr("127.0.0.1"))
	ln, err := l.Host.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Host) }))
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	script := `cd /; getent ahostsv4 3000-abc.sbx.localhost | head -1; ls /run/netns | wc -l; grep -c eth0 /proc/self/net/dev`
	out, err := l.Host.Command(t.Context(), "sh", "-c", script+"; true").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 3 || !strings.HasPrefix(lines[0], "127.0.0.1") || lines[1] != "0" || lines[2] != "0" {
		t.Errorf("a program saw %q", lines)
	}
	if _, err := os.Stat("/usr/bin/curl"); err == nil {
		out, err = l.Host.Command(t.Context(), "curl", "-sS", "--max-time", "5", "http://api.sbx.localhost:"+port+"/").CombinedOutput()
		if err != nil || string(out) != "api.sbx.localhost:"+port {
			t.Errorf("curl of a name = %q, %v", out, err)
		}
		out, err = l.Host.Command(t.Context(), "curl", "-sS", "--max-time", "5", "--cacert", l.CAFile, "https://1.1.1.1/").CombinedOutput()
		if err != nil || string(out) != "https 1.1.1.1 1.1.1.1\n" {
			t.Errorf("curl of 1.1.1.1 = %q, %v", out, err)
		}
	}
}

// TestCloseEndsPrograms: what a test started and forgot, and what that started, is gone with the laboratory.
func TestCloseEndsPrograms(t *testing.T) {
	var inode map[uint64]bool
	t.Run("inner", func(t *testing.T) {
		l := New(t)
		cmd := l.Host.Command(context.Background(), "sh", "-c", "sleep 600 & sleep 600")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { go cmd.Wait() })
		inode = l.Host.namespaces()
		if len(inode) != 1 {
			t.Fatalf("namespaces = %v, want the host's alone", inode)
		}
	})
	deadline := time.Now().Add(5 * time.Second)
	for killInside(inode) != 0 {
		if time.Now().After(deadline) {
			t.Fatal("processes of the laboratory outlived it")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestSweep: what a killed test process left in /run/netns is removed by the next laboratory; what a living one has stays.
func TestSweep(t *testing.T) {
	New(t) // or skip
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	stale := filepath.Join(netnsDir, prefixOf(dead.Process.Pid, 1)+"-0")
	living := filepath.Join(netnsDir, prefixOf(os.Getppid(), 1)+"-0")
	for _, path := range []string{stale, living} {
		if err := os.WriteFile(path, nil, 0o444); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(path)
	}
	New(t)
	if _, err := os.Stat(stale); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the remains of a dead process are still there: %v", err)
	}
	if _, err := os.Stat(living); err != nil {
		t.Errorf("a living process lost its slot: %v", err)
	}
}
