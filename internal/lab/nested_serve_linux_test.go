package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// outside is the nested host, for tests that are about the way into it.
func outside(t *testing.T) (*Nested, context.Context) {
	t.Helper()
	if os.Getenv(InsideVariable) != "" {
		t.Skip("runs outside only")
	}
	if _, err := FindVMM(); err != nil {
		t.Skip(err)
	}
	n := NewNested(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return n, ctx
}

// TestNestedForward sends much more than any buffer holds through a forwarded port, in both directions: its own command port, seen from
// inside.
func TestNestedForward(t *testing.T) {
	n, ctx := outside(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.Forward(t, ln, "127.0.0.1:7000")
	through := &Nested{addr: ln.Addr().String()}

	const size = 48 << 20
	data := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	start := time.Now()
	if _, err := through.call(ctx, nestedRequest{Put: NestedDisk + "/forwarded", Mode: 0o600, Size: size}, bytes.NewReader(data), io.Discard); err != nil {
		t.Fatalf("Put through the forwarded port: %v", err)
	}
	t.Logf("in: %d MiB in %v", size>>20, time.Since(start).Round(time.Millisecond))
	start = time.Now()
	sum := sha256.New()
	if _, err := through.call(ctx, nestedRequest{Get: NestedDisk + "/forwarded"}, nil, sum); err != nil {
		t.Fatalf("Get through the forwarded port: %v", err)
	}
	t.Logf("out: %d MiB in %v", size>>20, time.Since(start).Round(time.Millisecond))
	if want := sha256.Sum256(data); !bytes.Equal(sum.Sum(nil), want[:]) {
		t.Error("what came back is not what was sent")
	}

	// Nobody listens inside: nobody seems to listen out here.
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.Forward(t, closed, "127.0.0.1:1")
	c, err := net.Dial("tcp", closed.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c); err == nil || len(got) > 0 {
		t.Errorf("from a port that is closed inside: %q, %v, want a reset", got, err)
	}
}

// TestNestedDaemon is its own daemon: inside it says something and waits for the end. Asked for a list, it names what else of it there is.
func TestNestedDaemon(t *testing.T) {
	switch os.Getenv("SLUICE_TEST_DAEMON") {
	case "run":
		var fs unix.Statfs_t
		if err := unix.Statfs(NestedDisk, &fs); err != nil || fs.Type != unix.EXT4_SUPER_MAGIC {
			t.Fatalf("%s: type %#x, %v, want ext4", NestedDisk, fs.Type, err)
		}
		_, _ = os.Stdout.WriteString("value=42\n")
		select {}
	case "list":
		listOthers(t)
		return
	}
	n, ctx := outside(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	n.putSelf(ctx, t, self)
	command := func(what string) Command {
		return Command{Args: []string{"/sluice/test", "-test.run", "^TestNestedDaemon$", "-test.v"}, Env: []string{"SLUICE_TEST_DAEMON=" + what}, Dir: "/sluice/dir"}
	}
	d := n.Daemon(t, "daemon", command("run"))
	var got string
	d.Await(t, "its line", time.Minute, Value(&got, "value="))
	if got != "42" {
		t.Errorf("value = %q, want 42", got)
	}
	d.cancel()
	if err := d.Wait(ctx); err == nil {
		t.Error("a killed daemon ended well")
	}
	for { // its process goes, and no zombie stays
		out, code, err := n.Run(ctx, command("list"))
		if err != nil || code != 0 {
			t.Fatalf("list processes: %d, %v\n%s", code, err, out)
		}
		if !strings.Contains(out, "another: ") {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("processes stay:\n%s", out)
		}
	}
}

func listOthers(t *testing.T) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err != nil || pid == os.Getpid() {
			continue
		}
		stat, _ := os.ReadFile("/proc/" + e.Name() + "/stat") // none: it has just ended
		exe, _ := os.Readlink("/proc/" + e.Name() + "/exe")
		if exe == "/sluice/test" || bytes.Contains(stat, []byte(") Z ")) {
			t.Logf("another: %s", stat)
		}
	}
}

// TestNestedLab builds a laboratory inside and goes from its host to its internet.
func TestNestedLab(t *testing.T) {
	if !InKVM(t) {
		return
	}
	l := New(t)
	for _, addr := range []string{"1.1.1.1:80", "[2606:4700:4700::1111]:443"} {
		c, err := l.Host.Dial(t.Context(), "tcp", addr)
		if err != nil {
			t.Errorf("dial %s: %v", addr, err)
			continue
		}
		c.Close()
	}
	if n := l.Strangers(); n > 0 {
		t.Errorf("%d packets from strange addresses", n)
	}
}
