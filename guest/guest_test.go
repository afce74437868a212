package guest

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/sluice-edge/sluice/guest/gen/filesystem/filesystemconnect"
	"github.com/sluice-edge/sluice/guest/gen/process/processconnect"
)

// testUID belongs to nobody on any sane machine.
const testUID = 54321

// sandbox is an agent that runs in the test's process, over real sockets, with accounts of its own.
type sandbox struct {
	url     string
	home    string // of the user "user"
	node    *Client
	process processconnect.ProcessClient
	files   filesystemconnect.FilesystemClient
}

func startAgent(t *testing.T) *sandbox {
	t.Helper()
	dir, err := os.MkdirTemp("", "guest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	home := filepath.Join(dir, "home")
	etc := filepath.Join(dir, "etc")
	self := strconv.Itoa(os.Getuid())
	uid := self
	if os.Getuid() == 0 {
		uid = strconv.Itoa(testUID)
	}
	for _, d := range []string{home, etc} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	writeTest(t, filepath.Join(etc, "passwd"), "root:x:"+self+":"+strconv.Itoa(os.Getgid())+":root:"+dir+":/bin/sh\n"+
		"user:x:"+uid+":"+uid+"::"+home+":/bin/sh\nstranger:x:54322:54322::/:/bin/sh\n")
	writeTest(t, filepath.Join(etc, "group"), "root:x:0:\nuser:x:"+uid+":\ncrew:x:54400:other,user\n")
	if os.Getuid() == 0 {
		if err := os.Chown(home, testUID, testUID); err != nil {
			t.Fatal(err)
		}
	}
	public, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "control")
	control, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, Options{Listen: public, Control: control, Etc: etc}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run() = %v", err)
		}
	})
	url := "http://" + public.Addr().String()
	return &sandbox{
		url: url, home: home, node: NewClient(socket),
		process: processconnect.NewProcessClient(http.DefaultClient, url, connect.WithProtoJSON()),
		files:   filesystemconnect.NewFilesystemClient(http.DefaultClient, url, connect.WithProtoJSON()),
	}
}

func writeTest(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func wantCode(t *testing.T, err error, code connect.Code) {
	t.Helper()
	if connect.CodeOf(err) != code {
		t.Errorf("error = %v, want code %v", err, code)
	}
}

// eventually waits for something that another process or the kernel does in its own time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("still not so: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func mustInit(t *testing.T, s *sandbox, req InitRequest) {
	t.Helper()
	if err := s.node.Init(t.Context(), req); err != nil {
		t.Fatal(err)
	}
}

func TestRunEndsWhenAListenerFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := Run(t.Context(), Options{Listen: l}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Run() = %v, want %v", err, net.ErrClosed)
	}
}
