package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/api"
	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd"
)

var (
	testKey    = "e2b_" + strings.Repeat("a", 40)
	testTokens = auth.NewTokenKey([]byte(strings.Repeat("k", 32)))
	testNonce  = sandboxd.Nonce{1}
)

// node is a node's sandboxes without processes, as far as the operator's commands see them.
type node struct {
	api.Sandboxes

	mu    sync.Mutex
	boxes map[string]sandboxd.Sandbox
	log   string
	asked []string // what was done to sandboxes
}

func (n *node) Get(id string) (sandboxd.Sandbox, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	sb, ok := n.boxes[id]
	if !ok {
		return sb, errs.New(errs.NotFound, "no such sandbox")
	}
	return sb, nil
}

func (n *node) List() []sandboxd.Sandbox {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Values(n.boxes))
}

func (n *node) put(sb sandboxd.Sandbox) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.boxes[sb.ID] = sb
}

func (n *node) setLog(text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.log = text
}

func (n *node) Kill(_ context.Context, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, "kill "+id)
	delete(n.boxes, id)
	return nil
}

func (n *node) Pause(_ context.Context, id string, keepMemory bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, fmt.Sprintf("pause %s memory=%v", id, keepMemory))
	sb := n.boxes[id]
	sb.State = sandboxd.StatePaused
	n.boxes[id] = sb
	return nil
}

func (n *node) Connect(_ context.Context, id string, opts sandboxd.ConnectOptions) (sandboxd.Sandbox, bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, fmt.Sprintf("connect %s for %v drop=%v", id, opts.Timeout, opts.DropMemory))
	sb := n.boxes[id]
	resumed := sb.State == sandboxd.StatePaused
	sb.State = sandboxd.StateRunning
	n.boxes[id] = sb
	return sb, resumed, nil
}

func (n *node) Metrics(context.Context, string) ([]sandboxd.Metrics, error) {
	return []sandboxd.Metrics{{Time: time.Unix(1, 0), CPUCount: 2, CPUUsedPct: 12.4, MemUsed: 300 << 20, DiskUsed: 20 << 20}}, nil
}

func (n *node) Log(context.Context, string, int64) ([]byte, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return []byte(n.log), nil
}

// newServer serves the API over n.
func newServer(t *testing.T) (*node, string) {
	t.Helper()
	n := &node{boxes: map[string]sandboxd.Sandbox{}}
	keys := auth.NewMemoryKeys()
	hash, _ := auth.HashKey([]byte(testKey))
	if err := keys.PutKey(t.Context(), auth.KeyRecord{ID: "k", Team: "us", Hash: hash, Created: time.Unix(1, 0)}); err != nil {
		t.Fatal(err)
	}
	h, err := api.New(api.Options{Sandboxes: n, Keys: auth.NewKeyring(keys, auth.KeyringOptions{}), Tokens: testTokens, Domain: "sluice.localhost", Rate: -1})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return n, server.URL
}

func testSandbox(id string, state sandboxd.State) sandboxd.Sandbox {
	at := time.Now().Add(-90 * time.Second)
	return sandboxd.Sandbox{
		ID: id, State: state, Template: "base", Alias: "base", StartedAt: at, EndAt: at.Add(time.Hour), CPUs: 2, MemoryMiB: 512, DiskMiB: 2048, Team: "us",
		Nonce: testNonce, Network: sandboxd.Network{AllowPublicTraffic: true}, Metadata: map[string]string{"owner": "me"}, AutoPause: true, AutoResume: true,
	}
}

// said is what a command left behind.
type said struct {
	out, err string
	failure  error
}

// operate runs a command as the shell would, with the server in the environment.
func operate(t *testing.T, url string, line ...string) said {
	t.Helper()
	return operateWith(t, map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey}, line...)
}

func operateWith(t *testing.T, env map[string]string, line ...string) said {
	t.Helper()
	in, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	var out, errOut bytes.Buffer
	failure := operators[line[0]](t.Context(), line[1:], console{in: in, out: &out, err: &errOut, getenv: func(name string) string { return env[name] }})
	return said{out.String(), errOut.String(), failure}
}

var operators = map[string]func(context.Context, []string, console) error{
	"ls": runLs, "inspect": runInspect, "logs": runLogs, "exec": runExec, "pause": runPause, "resume": runResume, "kill": runKill,
}

func TestOperatorsAreCommands(t *testing.T) {
	for name := range operators {
		if !slices.ContainsFunc(commands, func(c command) bool { return c.name == name }) {
			t.Errorf("there is no command %s", name)
		}
	}
}

func TestLs(t *testing.T) {
	n, url := newServer(t)
	if got := operate(t, url, "ls"); got.failure != nil || strings.Count(got.out, "\n") != 1 || !strings.HasPrefix(got.out, "ID ") {
		t.Errorf("ls of nothing = %+v, want the header alone", got)
	}
	if got := operate(t, url, "ls", "-json"); got.failure != nil || got.out != "[]\n" {
		t.Errorf("ls -json of nothing = %+v", got)
	}
	n.put(testSandbox("irunning", sandboxd.StateRunning))
	paused := testSandbox("ipaused", sandboxd.StatePaused)
	paused.StartedAt, paused.Alias = paused.StartedAt.Add(-time.Hour), "evil\x1b[2J\nname"
	n.put(paused)
	got := operate(t, url, "ls")
	want := regexp.MustCompile(`(?m)\AID +TEMPLATE +STATE +CPUS +MEMORY +DISK +STARTED +ENDS\n` +
		`irunning +base +running +2 +512 MiB +2 GiB +1m3\ds ago +in 58m2\ds\n` +
		`ipaused +evil�\[2J name +paused +2 +512 MiB +2 GiB +1h1m ago +-\n\z`)
	if got.failure != nil || !want.MatchString(got.out) {
		t.Errorf("ls = %+v, want %s", got, want)
	}
	for _, test := range []struct {
		flags []string
		want  string
	}{
		{nil, "irunning ipaused"}, {[]string{"-state", "paused"}, "ipaused"}, {[]string{"--state=running,paused"}, "irunning ipaused"},
		{[]string{"-template", "nope"}, ""}, {[]string{"-metadata", "owner=me"}, "irunning ipaused"}, {[]string{"-metadata", "owner=you&me"}, ""},
		{[]string{"-metadata", "owner=one, two"}, ""},
	} {
		got := operate(t, url, append([]string{"ls", "-q"}, test.flags...)...)
		if ids := strings.Join(strings.Fields(got.out), " "); got.failure != nil || ids != test.want {
			t.Errorf("ls -q %v = %q, %v, want %q", test.flags, ids, got.failure, test.want)
		}
		var items []gen.ListedSandbox
		got = operate(t, url, append([]string{"ls", "-json"}, test.flags...)...)
		if err := json.Unmarshal([]byte(got.out), &items); err != nil || len(items) != len(strings.Fields(test.want)) {
			t.Errorf("ls -json %v = %q, %v", test.flags, got.out, err)
		}
	}
	for i := range 230 {
		n.put(testSandbox(fmt.Sprintf("imany%03d", i), sandboxd.StateRunning))
	}
	if got := operate(t, url, "ls", "-q"); strings.Count(got.out, "\n") != 232 {
		t.Errorf("ls of three pages has %d lines, want 232", strings.Count(got.out, "\n"))
	}
	if got := operate(t, url, "ls", "irunning"); got.failure == nil || !strings.Contains(got.failure.Error(), `"irunning" is no flag`) {
		t.Errorf("ls with a word = %v", got.failure)
	}
}

func TestInspect(t *testing.T) {
	n, url := newServer(t)
	sb := testSandbox("i1", sandboxd.StateRunning)
	sb.Network = sandboxd.Network{MaskRequestHost: "localhost:${PORT}", DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"1.1.1.1"}}
	n.put(sb)
	for _, line := range [][]string{{"inspect", "i1"}, {"inspect", "-json", "i1"}, {"inspect", "i1", "--json"}} {
		got := operate(t, url, line...)
		if got.failure != nil || strings.Contains(got.out, testTokens.Envd(testNonce)) {
			t.Errorf("%v = %+v, want no token in it", line, got)
		}
	}
	got := operate(t, url, "inspect", "i1")
	for _, want := range []string{
		`(?m)^id +i1$`, `(?m)^state +running$`, `(?m)^template +base$`, `(?m)^started +\d{4}-.*Z, 1m3\ds ago$`, `(?m)^ends .*, in 58m2\ds$`,
		`(?m)^at its end +pause, resumed by traffic$`, `(?m)^size +2 CPUs, 512 MiB memory, 2 GiB disk$`, `(?m)^uses +12% CPU, 300 MiB memory, 20 MiB disk$`,
		`(?m)^ports +<port>-i1\.sluice\.localhost$`, `(?m)^ingress +with its traffic token only$`, `(?m)^mask +localhost:\$\{PORT\}$`,
		`(?m)^egress +1\.1\.1\.1; else all but 0\.0\.0\.0/0$`, `(?m)^metadata +owner=me$`,
	} {
		if !regexp.MustCompile(want).MatchString(got.out) {
			t.Errorf("inspect = %s\nwant %s in it", got.out, want)
		}
	}
	var detail gen.SandboxDetail
	if got := operate(t, url, "inspect", "-json", "i1"); json.Unmarshal([]byte(got.out), &detail) != nil || detail.SandboxID != "i1" {
		t.Errorf("inspect -json = %+v", got)
	}
}

func TestLifecycle(t *testing.T) {
	n, url := newServer(t)
	n.put(testSandbox("i1", sandboxd.StateRunning))
	n.put(testSandbox("i2", sandboxd.StateRunning))
	for _, step := range []struct{ line, out, failure, asked string }{
		{"pause i1", "i1 paused\n", "", "pause i1 memory=true"},
		{"pause i1", "", "pause i1: Error pausing sandbox - sandbox 'i1' is already paused", ""},
		{"resume i1", "i1 running\n", "", "connect i1 for 5m0s drop=false"},
		{"resume i1 -timeout 1h", "i1 running (it was not paused)\n", "", "connect i1 for 1h0m0s drop=false"},
		{"pause -memory=false -json i1 i2", `{"sandboxID":"i1","state":"paused"}` + "\n" + `{"sandboxID":"i2","state":"paused"}` + "\n", "", "pause i1 memory=false,pause i2 memory=false"},
		{"resume -memory=false i2 -json", `{"sandboxID":"i2","state":"running"}` + "\n", "", "connect i2 for 5m0s drop=true"},
		{"resume -timeout 1ms i2", "", "-timeout 1ms is less than a second", ""},
		{"resume -timeout 48h i2", "", "Timeout cannot be greater than 24 hours", ""},
		{"kill i1 inope i2", "i1 killed\ni2 killed\n", `kill inope: Sandbox "inope" doesn't exist or you don't have access to it (` + "`sluice ls` shows", "kill i1,kill i2"},
		{"kill i1", "", "sluice ls", ""},
		{"kill", "", "which sandbox?", ""},
		{"pause", "", "which sandbox?", ""},
		{"kill UPPER", "", "Invalid sandbox ID", ""},
		{"kill ../templates/base", "", "No such endpoint", ""},
	} {
		n.asked = nil
		got := operate(t, url, strings.Fields(step.line)...)
		if got.out != step.out || (got.failure == nil) != (step.failure == "") || got.failure != nil && !strings.Contains(got.failure.Error(), step.failure) {
			t.Errorf("%s = %q, %v, want %q, %s", step.line, got.out, got.failure, step.out, step.failure)
		}
		if asked := strings.Join(n.asked, ","); asked != step.asked {
			t.Errorf("%s asks for %q, want %q", step.line, asked, step.asked)
		}
	}
}

// TestServerErrorsNameTheRemedy has what goes wrong before a sandbox is reached.
func TestServerErrorsNameTheRemedy(t *testing.T) {
	_, url := newServer(t)
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v2/sandboxes" {
			_, _ = io.WriteString(w, "<html>welcome</html>")
			return
		}
		http.Error(w, "<html>no</html>", http.StatusNotFound)
	}))
	defer page.Close()
	strange := httptest.NewTLSServer(http.NotFoundHandler())
	defer strange.Close()
	strange.Config.ErrorLog = log.New(io.Discard, "", 0)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := "http://" + l.Addr().String()
	l.Close()
	for _, test := range []struct {
		env   map[string]string
		line  string
		wants []string
	}{
		{nil, "ls", []string{"no server", "E2B_API_URL", "-api-url"}},
		{map[string]string{"E2B_API_URL": url}, "ls", []string{"no API key", "E2B_API_KEY", "sluice key create"}},
		{map[string]string{"E2B_API_URL": "127.0.0.1:8080", "E2B_API_KEY": testKey}, "ls", []string{"127.0.0.1:8080", "is no URL"}},
		{map[string]string{"E2B_API_URL": url, "E2B_API_KEY": "e2b_wrong"}, "ls", []string{"Invalid API key", "E2B_API_KEY", url}},
		{map[string]string{"E2B_API_URL": dead, "E2B_API_KEY": testKey}, "ls", []string{"no server answers at " + dead, "refused", "E2B_API_URL"}},
		{map[string]string{"E2B_API_URL": page.URL, "E2B_API_KEY": testKey}, "ls", []string{"no API of Sluice", "E2B_API_URL"}},
		{map[string]string{"E2B_API_URL": strange.URL, "E2B_API_KEY": testKey}, "ls", []string{"unknown authority", "SSL_CERT_FILE"}},
		{map[string]string{"E2B_API_URL": page.URL, "E2B_API_KEY": testKey}, "inspect i1", []string{"404 Not Found", "no answer of Sluice", "E2B_API_URL"}},
		{map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey}, "inspect inope", []string{"inope", "sluice ls"}},
		{map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey}, "inspect", []string{"which sandbox", "sluice ls"}},
		{map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey}, "inspect i1 i2", []string{`"i2" is too much`}},
		{map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey}, "logs i1 -n 1001", []string{"-n 1001"}},
		{map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey}, "ls -nope", []string{"-nope", "sluice ls -h"}},
		{map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey}, "exec inope", []string{"say what to run"}},
		{map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey}, "exec", []string{"which sandbox"}},
		{map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey}, "exec inope ls", []string{"inope", "sluice ls"}},
	} {
		got := operateWith(t, test.env, strings.Fields(test.line)...)
		for _, want := range test.wants {
			if got.failure == nil || !strings.Contains(got.failure.Error(), want) {
				t.Errorf("%s with %v = %v, want %q in it", test.line, test.env, got.failure, want)
			}
		}
		if got.failure != nil && strings.Contains(got.failure.Error(), testKey) {
			t.Errorf("%s with %v tells the key: %v", test.line, test.env, got.failure)
		}
	}
	flags := []string{"ls", "-api-url", url, "-api-key", testKey}
	if got := operateWith(t, map[string]string{"E2B_API_URL": dead, "E2B_API_KEY": "wrong"}, flags...); got.failure != nil {
		t.Errorf("flags do not win over the environment: %v", got.failure)
	}
	if got := operateWith(t, nil, "exec", "-h"); !errors.Is(got.failure, config.ErrHelp) || !strings.Contains(got.out, "usage: sluice exec [flags] ID [--] COMMAND") {
		t.Errorf("exec -h = %+v", got)
	}
	if got := operateWith(t, nil, "ls", "-h"); !strings.HasPrefix(got.out, "usage: sluice ls [flags]\n") {
		t.Errorf("ls -h = %+v", got)
	}
}

// TestLocalhostIsThisMachine: name servers know nothing below localhost, and the names of `sluice dev` are there.
func TestLocalhostIsThisMachine(t *testing.T) {
	n, address := newServer(t)
	n.put(testSandbox("i1", sandboxd.StateRunning))
	_, port, ok := strings.Cut(strings.TrimPrefix(address, "http://"), ":")
	if !ok {
		t.Fatalf("the server is at %q", address)
	}
	got := operate(t, "http://api.sluice-test.localhost:"+port, "ls", "-q")
	if got.failure != nil || got.out != "i1\n" {
		t.Errorf("ls by a name below localhost = %+v", got)
	}
}

func TestLogs(t *testing.T) {
	n, url := newServer(t)
	n.put(testSandbox("i1", sandboxd.StateRunning))
	n.setLog("[    0.1] boot\x1b[31m\r\n" + `time=2026-11-29T12:00:01Z level=INFO msg="process started" pid=7` + "\n")
	last := "2026-11-29T12:00:01Z INFO  process started pid=7\n"
	want := "[    0.1] boot\n" + last
	for _, test := range []struct {
		flags []string
		want  string
	}{
		{nil, want}, {[]string{"-n", "1"}, last}, {[]string{"-n", "0"}, ""},
		{[]string{"-json", "-n", "1"}, `{"fields":{"logger":"agent","pid":"7"},"level":"info","message":"process started","timestamp":"2026-11-29T12:00:01Z"}` + "\n"},
	} {
		if got := operate(t, url, append([]string{"logs", "i1"}, test.flags...)...); got.failure != nil || got.out != test.want {
			t.Errorf("logs %v = %+v, want %q", test.flags, got, test.want)
		}
	}
}

// TestLogsFollow goes on until the sandbox is gone.
func TestLogsFollow(t *testing.T) {
	n, url := newServer(t)
	n.put(testSandbox("i1", sandboxd.StateRunning))
	n.setLog("one\ntwo\n")
	out := newPipe()
	ended := make(chan error, 1)
	go func() {
		env := map[string]string{"E2B_API_URL": url, "E2B_API_KEY": testKey}
		ended <- runLogs(t.Context(), []string{"-f", "-n", "1", "i1"}, console{out: out, err: out, getenv: func(name string) string { return env[name] }})
	}()
	out.await(t, "two\n")
	n.setLog("one\ntwo\nthree\n")
	out.await(t, "two\nthree\n")
	n.setLog("two\nthree\nthree\nfour\n") // the beginning was lost
	out.await(t, "two\nthree\nthree\nfour\n")
	if err := n.Kill(t.Context(), "i1"); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil || out.String() != "two\nthree\nthree\nfour\nsluice: sandbox i1 is gone\n" {
		t.Errorf("logs -f = %v with %q", err, out.String())
	}
}

func TestOverlap(t *testing.T) {
	entries := func(s string) (list []gen.SandboxLogEntry) {
		for _, r := range s {
			list = append(list, gen.SandboxLogEntry{Message: string(r), Timestamp: time.Now()})
		}
		return list
	}
	for _, test := range []struct {
		seen, now string
		want      int
	}{
		{"", "", 0}, {"", "ab", 0}, {"ab", "ab", 2}, {"ab", "abc", 2}, {"abc", "bcd", 2}, {"abc", "xyz", 0}, {"aa", "aaa", 2}, {"aba", "bab", 2}, {"abc", "", 0},
	} {
		if got := overlap(entries(test.seen), entries(test.now)); got != test.want {
			t.Errorf("overlap(%q, %q) = %d, want %d", test.seen, test.now, got, test.want)
		}
	}
}

// pipe collects what a command writes while it runs.
type pipe struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	written chan struct{} // one element when there is something new
}

func newPipe() *pipe { return &pipe{written: make(chan struct{}, 1)} }

func (p *pipe) Write(data []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case p.written <- struct{}{}:
	default:
	}
	return p.buf.Write(data)
}

func (p *pipe) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.buf.String()
}

func (p *pipe) await(t *testing.T, text string) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	for !strings.Contains(p.String(), text) {
		select {
		case <-p.written:
		case <-deadline.C:
			t.Fatalf("still not written: %q in %q", text, p.String())
		}
	}
}
