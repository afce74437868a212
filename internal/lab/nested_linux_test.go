package lab

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	code := m.Run()
	CloseNested()
	os.Exit(code)
}

// TestNestedKVM runs in both places: out here it starts the host, in there it finds a KVM that works.
func TestNestedKVM(t *testing.T) {
	if !InKVM(t) {
		return
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := FindVMM(); err != nil {
		t.Error(err)
	}
	if _, err := FindKernel(); err != nil {
		t.Error(err)
	}
}

func TestNestedCommands(t *testing.T) {
	if os.Getenv(InsideVariable) != "" {
		t.Skip("runs outside only")
	}
	if _, err := FindVMM(); err != nil {
		t.Skip(err)
	}
	n := NewNested(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	file := filepath.Join(t.TempDir(), "file")
	want := bytes.Repeat([]byte("sluice"), 100_000)
	if err := os.WriteFile(file, want, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := n.Put(ctx, file, "/tmp/a/b"); err != nil {
		t.Fatalf("Put: %v", err)
	}
	if got, err := n.Get(ctx, "/tmp/a/b"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("Get: %d bytes, %v; want %d", len(got), err, len(want))
	}
	if _, err := n.Get(ctx, "/tmp/none"); err == nil {
		t.Error("Get of a missing file succeeds")
	}
	if _, _, err := n.Run(ctx, Command{Args: []string{"/tmp/none"}}); err == nil {
		t.Error("Run of a missing program succeeds")
	}
	if _, code, err := n.Run(ctx, Command{Args: []string{"/sluice/cloud-hypervisor", "--no-such-flag"}}); err != nil || code == 0 {
		t.Errorf("Run = %d, %v, want a code and no error", code, err)
	}
	if out, code, err := n.Run(ctx, Command{Args: []string{"/sluice/cloud-hypervisor", "--version"}}); err != nil || code != 0 || !strings.HasPrefix(out, "cloud-hypervisor v") {
		t.Errorf("Run = %q, %d, %v", out, code, err)
	}
	if c, err := n.Dial(ctx, "127.0.0.1:1"); err == nil {
		c.Close()
		t.Error("Dial of a closed port succeeds")
	}
	// Its own command port, seen from inside: a connection through a connection.
	c, err := n.Dial(ctx, "127.0.0.1:7000")
	if err != nil {
		t.Fatalf("Dial: %v", err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "not json\n"); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || !bytes.Contains(got, []byte("invalid character")) {
		t.Errorf("through Dial: %q, %v", got, err)
	}

	gone, stop := context.WithCancel(ctx)
	stop()
	if _, _, err := n.Run(gone, Command{Args: []string{"/sluice/cloud-hypervisor", "--version"}}); err == nil {
		t.Error("Run after its context has ended succeeds")
	}
}
