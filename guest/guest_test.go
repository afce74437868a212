package guest

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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

// startAgent is an agent that was initialized, open to everybody.
func startAgent(t *testing.T) *sandbox {
	t.Helper()
	s := startFresh(t)
	mustInit(t, s, InitRequest{})
	return s
}

// startFresh is an agent that no node has spoken to.
func startFresh(t *testing.T) *sandbox {
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
	if err := Run(t.Context(), Options{Listen: l, Insecure: true}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Run() = %v, want %v", err, net.ErrClosed)
	}
}

// Nothing is served, and nothing runs, before the node has said who may come in.
func TestNothingIsServedBeforeInit(t *testing.T) {
	s := startFresh(t)
	for _, path := range []string{"GET /health", "GET /metrics", "GET /envs", "GET /files?path=/etc/passwd", "POST /files?path=/tmp/x", "POST /init",
		"POST /process.Process/Start", "POST /process.Process/List", "POST /filesystem.Filesystem/ListDir", "GET /"} {
		method, path, _ := strings.Cut(path, " ")
		res, body := s.do(t, method, path, map[string]string{"Content-Type": "application/json"}, strings.NewReader("{}"))
		if res.StatusCode != http.StatusServiceUnavailable || body != `{"code":503,"message":"the sandbox is starting"}` {
			t.Errorf("%s %s = %d %s", method, path, res.StatusCode, body)
		}
	}
	mustInit(t, s, InitRequest{AccessToken: "secret"})
	if res, _ := s.do(t, "GET", "/health", nil, nil); res.StatusCode != http.StatusNoContent {
		t.Errorf("health after init = %d", res.StatusCode)
	}
	if res, _ := s.do(t, "GET", "/envs", nil, nil); res.StatusCode != http.StatusUnauthorized {
		t.Errorf("envs without the token = %d", res.StatusCode)
	}
}

func TestRunWantsAControlListener(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := Run(t.Context(), Options{Listen: l}); err == nil {
		t.Error("an agent that nobody can give a token runs")
	}
}
