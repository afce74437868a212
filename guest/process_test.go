package guest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/sluice-edge/sluice/guest/gen/process"
)

// outcome is everything that a stream told.
type outcome struct {
	pid                 uint32
	stdout, stderr, pty string
	end                 *process.ProcessEvent_EndEvent
	err                 error
}

type eventStream interface {
	Receive() bool
	Err() error
	Close() error
}

// collect reads a stream to its end. event gets the current message's event; seen is called after each.
func collect[M interface {
	GetEvent() *process.ProcessEvent
}](stream interface {
	eventStream
	Msg() M
}, seen func(*outcome)) outcome {
	var o outcome
	for first := true; stream.Receive(); first = false {
		e := stream.Msg().GetEvent()
		switch {
		case e.GetStart() != nil:
			if !first {
				o.err = errors.New("start is not the first event")
				return o
			}
			o.pid = e.GetStart().GetPid()
		case e.GetData() != nil:
			o.stdout += string(e.GetData().GetStdout())
			o.stderr += string(e.GetData().GetStderr())
			o.pty += string(e.GetData().GetPty())
		case e.GetEnd() != nil:
			o.end = e.GetEnd()
		}
		if seen != nil {
			seen(&o)
		}
	}
	o.err = stream.Err()
	stream.Close()
	return o
}

func sh(script string) *process.StartRequest {
	return &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", script}}}
}

func (s *sandbox) start(ctx context.Context, t *testing.T, req *process.StartRequest, user string) *connect.ServerStreamForClient[process.StartResponse] {
	t.Helper()
	r := connect.NewRequest(req)
	if user != "" {
		r.Header().Set("Authorization", basic(user))
	}
	stream, err := s.process.Start(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func basic(user string) string {
	r := &http.Request{Header: http.Header{}}
	r.SetBasicAuth(user, "")
	return r.Header.Get("Authorization")
}

func (s *sandbox) run(t *testing.T, script, user string) outcome {
	t.Helper()
	return collect(s.start(t.Context(), t, sh(script), user), nil)
}

func byPID(pid uint32) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}
}

func (s *sandbox) send(t *testing.T, p *process.ProcessSelector, stdin string) error {
	t.Helper()
	_, err := s.process.SendInput(t.Context(), connect.NewRequest(&process.SendInputRequest{
		Process: p, Input: &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte(stdin)}}}))
	return err
}

func (s *sandbox) signal(t *testing.T, p *process.ProcessSelector, signal process.Signal) error {
	t.Helper()
	_, err := s.process.SendSignal(t.Context(), connect.NewRequest(&process.SendSignalRequest{Process: p, Signal: signal}))
	return err
}

func TestRunCommand(t *testing.T) {
	s := startAgent(t)
	mustInit(t, s, InitRequest{EnvVars: map[string]string{"FROM_INIT": "1", "BOTH": "init"}})
	o := s.run(t, "echo out; echo err >&2; exit 3", "")
	if o.stdout != "out\n" || o.stderr != "err\n" || o.end.GetExitCode() != 3 || !o.end.GetExited() || o.end.GetStatus() != "exit status 3" ||
		o.end.GetError() != "exit status 3" || o.err != nil || o.pid == 0 {
		t.Errorf("outcome = %+v", o)
	}
	o = s.run(t, "true", "")
	if o.end.GetExitCode() != 0 || o.end.Error != nil || o.end.GetStatus() != "exit status 0" {
		t.Errorf("success = %v", o.end)
	}
	req := sh("pwd; env | sort")
	req.Process.Envs = map[string]string{"BOTH": "request", "X": "a=b c"}
	o = collect(s.start(t.Context(), t, req, ""), nil)
	want := s.home + "\nBOTH=request\nFROM_INIT=1\nHOME=" + s.home + "\nLOGNAME=user\nPATH=" + defaultPath + "\nPWD=" + s.home + "\nUSER=user\nX=a=b c\n"
	if o.stdout != want {
		t.Errorf("environment = %q, want %q", o.stdout, want)
	}
	o = collect(s.start(t.Context(), t, &process.StartRequest{Process: &process.ProcessConfig{Cmd: "echo", Args: []string{"by", "PATH"}}}, ""), nil)
	if o.stdout != "by PATH\n" {
		t.Errorf("by PATH: %+v", o)
	}
}

func TestRunAsUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to become other users: run the tests as root")
	}
	s := startAgent(t)
	for user, want := range map[string]string{
		"":         "54321:54321:54321 54400\n",
		"user":     "54321:54321:54321 54400\n",
		"root":     "0:0:0\n",
		"stranger": "54322:54322:54322\n",
	} {
		if o := s.run(t, "echo $(id -u):$(id -g):$(id -G)", user); o.stdout != want {
			t.Errorf("as %q = %q, want %q (%v)", user, o.stdout, want, o.err)
		}
	}
	mustInit(t, s, InitRequest{DefaultUser: "stranger", DefaultWorkdir: "/tmp"})
	if o := s.run(t, "id -u; pwd", ""); o.stdout != "54322\n/tmp\n" {
		t.Errorf("default of init = %q", o.stdout)
	}
}

// The agent leaks nothing of its own into what it starts.
func TestChildrenInheritNothing(t *testing.T) {
	s := startAgent(t)
	script := "for fd in /proc/self/fd/*; do echo ${fd##*/}; done"
	// What the test itself was started with may be open everywhere.
	raw, err := exec.Command("/bin/sh", "-c", script).Output()
	if err != nil {
		t.Fatal(err)
	}
	before := strings.Fields(string(raw))
	o := s.run(t, script, "")
	for _, fd := range strings.Fields(o.stdout) {
		if !slices.Contains(before, fd) {
			t.Errorf("descriptor %s is inherited; without the agent there are %q", fd, before)
		}
	}
	script = "grep -E 'Sig(Blk|Ign)' /proc/self/status"
	if raw, err = exec.Command("/bin/sh", "-c", script).Output(); err != nil {
		t.Fatal(err)
	}
	if o = s.run(t, script, ""); o.stdout != string(raw) {
		t.Errorf("signals blocked or ignored are %q; without the agent %q", o.stdout, raw)
	}
}

func TestStartRefusals(t *testing.T) {
	s := startAgent(t)
	check := func(name string, req *process.StartRequest, user string, code connect.Code, text string) {
		t.Helper()
		o := collect(s.start(t.Context(), t, req, user), nil)
		wantCode(t, o.err, code)
		if o.err != nil && !strings.Contains(o.err.Error(), text) {
			t.Errorf("%s: error = %v, want %q in it", name, o.err, text)
		}
	}
	cwd := func(path string) *process.StartRequest {
		req := sh("true")
		req.Process.Cwd = &path
		return req
	}
	config := func(c *process.ProcessConfig) *process.StartRequest { return &process.StartRequest{Process: c} }
	writeTest(t, filepath.Join(s.home, "f"), "not executable")
	check("cwd", cwd("nope"), "", connect.CodeInvalidArgument, "cwd '"+s.home+"/nope' does not exist")
	check("cwd is a file", cwd("f"), "", connect.CodeInvalidArgument, "is not a directory")
	check("user", sh("true"), "ghost", connect.CodeUnauthenticated, "invalid username: 'ghost'")
	check("nothing", &process.StartRequest{}, "", connect.CodeInvalidArgument, "process is required")
	check("no command", config(&process.ProcessConfig{}), "", connect.CodeInvalidArgument, "no command")
	check("absent", config(&process.ProcessConfig{Cmd: "no-such-command"}), "", connect.CodeInvalidArgument, "not found")
	check("absent path", config(&process.ProcessConfig{Cmd: "/no/such"}), "", connect.CodeInvalidArgument, "no such file")
	check("not executable", config(&process.ProcessConfig{Cmd: "./f"}), "", connect.CodeInvalidArgument, "permission denied")
	check("nul", config(&process.ProcessConfig{Cmd: "/bin/echo", Args: []string{"a\x00"}}), "", connect.CodeInvalidArgument, "invalid argument")
	check("env", config(&process.ProcessConfig{Cmd: "/bin/echo", Envs: map[string]string{"A=B": "x"}}), "", connect.CodeInvalidArgument, "environment")
	check("pty", &process.StartRequest{Process: sh("true").Process, Pty: &process.PTY{Size: &process.PTY_Size{Cols: 70000}}}, "",
		connect.CodeInvalidArgument, "too large")
	if os.Getuid() != 0 {
		check("other user", sh("true"), "stranger", connect.CodeUnauthenticated, "cannot run as user 'stranger'")
	}
}

func TestHostileJSON(t *testing.T) {
	s := startAgent(t)
	for name, body := range map[string]string{
		"deep":       strings.Repeat(`{"process":`, 20000),
		"array":      `[]`,
		"not UTF-8":  "{\"path\":\"\xff\"}",
		"wrong type": `{"path":{}}`,
		"cut":        `{"path":"`,
		"number":     `{"depth":1e400}`,
		"nothing":    ``,
	} {
		res, got := s.do(t, "POST", "/filesystem.Filesystem/ListDir", map[string]string{"Content-Type": "application/json"}, strings.NewReader(body))
		if name == "nothing" { // as {}: the home directory
			continue
		}
		if res.StatusCode != 400 || !strings.Contains(got, `"invalid_argument"`) {
			t.Errorf("%s: %d %s", name, res.StatusCode, got)
		}
	}
	res, got := s.do(t, "POST", "/filesystem.Filesystem/Stat", map[string]string{"Content-Type": "application/json"},
		strings.NewReader(`{"path":"~","added_in_a_later_version":[1,{}]}`))
	if res.StatusCode != 200 || !strings.Contains(got, `"type":"FILE_TYPE_DIRECTORY"`) || !strings.Contains(strings.ReplaceAll(got, " ", ""), `"size":"`) {
		t.Errorf("unknown field: %d %s", res.StatusCode, got)
	}
	if res, _ := s.do(t, "POST", "/process.Process/Start", map[string]string{"Content-Type": "application/connect+json"},
		strings.NewReader("\x00\xff\xff\xff\xff{}")); res.StatusCode != 200 {
		t.Errorf("huge envelope: %d", res.StatusCode)
	}
	if err := s.node.Health(t.Context()); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

func TestStdin(t *testing.T) {
	s := startAgent(t)
	tag := "my tag"
	req := sh("cat; echo end; exec sleep 600")
	req.Tag = &tag
	stream := s.start(t.Context(), t, req, "")
	selector := &process.ProcessSelector{Selector: &process.ProcessSelector_Tag{Tag: tag}}
	closeStdin := func() {
		t.Helper()
		if _, err := s.process.CloseStdin(t.Context(), connect.NewRequest(&process.CloseStdinRequest{Process: selector})); err != nil {
			t.Errorf("CloseStdin = %v", err)
		}
	}
	o := collect(stream, func(o *outcome) {
		switch {
		case o.end != nil:
		case o.stdout == "":
			if err := s.send(t, selector, "one\n"); err != nil {
				t.Errorf("SendInput = %v", err)
			}
		case o.stdout == "one\n":
			in := s.process.StreamInput(t.Context())
			event := func(r *process.StreamInputRequest) {
				if err := in.Send(r); err != nil {
					t.Errorf("StreamInput = %v", err)
				}
			}
			event(&process.StreamInputRequest{Event: &process.StreamInputRequest_Start{Start: &process.StreamInputRequest_StartEvent{Process: byPID(o.pid)}}})
			event(&process.StreamInputRequest{Event: &process.StreamInputRequest_Keepalive{Keepalive: &process.StreamInputRequest_KeepAlive{}}})
			event(&process.StreamInputRequest{Event: &process.StreamInputRequest_Data{Data: &process.StreamInputRequest_DataEvent{
				Input: &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte("two\n")}}}}})
			if _, err := in.CloseAndReceive(); err != nil {
				t.Errorf("CloseAndReceive = %v", err)
			}
			closeStdin()
		case o.stdout == "one\ntwo\nend\n":
			closeStdin() // it is closed, and that is fine
			wantCode(t, s.send(t, selector, "three\n"), connect.CodeFailedPrecondition)
			if err := s.signal(t, byPID(o.pid), process.Signal_SIGNAL_SIGKILL); err != nil {
				t.Errorf("SendSignal = %v", err)
			}
			// Killed means gone: whoever asks next finds nobody.
			wantCode(t, s.signal(t, byPID(o.pid), process.Signal_SIGNAL_SIGKILL), connect.CodeNotFound)
			if !dead(int(o.pid)) {
				t.Error("killed, and still there")
			}
		}
	})
	if o.stdout != "one\ntwo\nend\n" {
		t.Errorf("outcome = %+v", o)
	}
	no := false
	req = sh("cat; echo end")
	req.Stdin = &no
	if o := collect(s.start(t.Context(), t, req, ""), nil); o.stdout != "end\n" {
		t.Errorf("without stdin: %+v", o)
	}
}

// Input that a process does not read must not outlive the call that brought it, nor hold up the next one for ever.
func TestStdinThatNobodyReads(t *testing.T) {
	s := startAgent(t)
	stream := s.start(t.Context(), t, sh("sleep 600"), "")
	o := collect(stream, func(o *outcome) {
		if o.end != nil {
			return
		}
		for range 2 {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			_, err := s.process.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{
				Process: byPID(o.pid), Input: &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: make([]byte, 1<<20)}}}))
			cancel()
			wantCode(t, err, connect.CodeDeadlineExceeded)
		}
		if err := s.signal(t, byPID(o.pid), process.Signal_SIGNAL_SIGKILL); err != nil {
			t.Errorf("SendSignal = %v", err)
		}
	})
	if o.end.GetStatus() != "signal: killed" {
		t.Errorf("outcome = %+v", o)
	}
}

func TestPTY(t *testing.T) {
	if _, err := os.Stat("/dev/ptmx"); err != nil {
		t.Skip("needs /dev/ptmx: mount devpts")
	}
	s := startAgent(t)
	req := sh(`stty size; [ -O "$(tty)" ] && echo mine; read x; stty size; echo got $x`)
	req.Pty = &process.PTY{Size: &process.PTY_Size{Cols: 91, Rows: 31}}
	sent := false
	o := collect(s.start(t.Context(), t, req, ""), func(o *outcome) {
		if sent || !strings.Contains(o.pty, "mine\r\n") {
			return
		}
		sent = true
		if _, err := s.process.Update(t.Context(), connect.NewRequest(&process.UpdateRequest{
			Process: byPID(o.pid), Pty: &process.PTY{Size: &process.PTY_Size{Cols: 100, Rows: 40}}})); err != nil {
			t.Errorf("Update = %v", err)
		}
		wantCode(t, s.send(t, byPID(o.pid), "x"), connect.CodeFailedPrecondition)
		_, err := s.process.CloseStdin(t.Context(), connect.NewRequest(&process.CloseStdinRequest{Process: byPID(o.pid)}))
		wantCode(t, err, connect.CodeFailedPrecondition)
		if _, err := s.process.SendInput(t.Context(), connect.NewRequest(&process.SendInputRequest{
			Process: byPID(o.pid), Input: &process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: []byte("hello\n")}}})); err != nil {
			t.Errorf("SendInput = %v", err)
		}
	})
	if want := "31 91\r\nmine\r\nhello\r\n40 100\r\ngot hello\r\n"; o.pty != want || o.end.GetExitCode() != 0 {
		t.Errorf("pty = %q, want %q; %+v", o.pty, want, o)
	}
	o = collect(s.start(t.Context(), t, sh("exec sleep 600"), ""), func(o *outcome) {
		if o.end != nil {
			return
		}
		_, err := s.process.Update(t.Context(), connect.NewRequest(&process.UpdateRequest{
			Process: byPID(o.pid), Pty: &process.PTY{Size: &process.PTY_Size{Cols: 1, Rows: 1}}}))
		wantCode(t, err, connect.CodeFailedPrecondition)
		if err := s.signal(t, byPID(o.pid), process.Signal_SIGNAL_SIGTERM); err != nil {
			t.Errorf("SendSignal = %v", err)
		}
	})
	if o.end.GetStatus() != "signal: terminated" || o.end.GetExitCode() != -1 || o.end.GetExited() {
		t.Errorf("end = %v", o.end)
	}
}

func TestSignals(t *testing.T) {
	s := startAgent(t)
	wantCode(t, s.signal(t, byPID(1<<30), process.Signal_SIGNAL_SIGKILL), connect.CodeNotFound)
	wantCode(t, s.signal(t, nil, process.Signal_SIGNAL_SIGKILL), connect.CodeInvalidArgument)
	o := collect(s.start(t.Context(), t, sh("trap 'echo term; exit 7' TERM; echo ready; while :; do sleep 0.01; done"), ""), func(o *outcome) {
		if o.stdout != "ready\n" || o.end != nil {
			return
		}
		wantCode(t, s.signal(t, byPID(o.pid), process.Signal_SIGNAL_UNSPECIFIED), connect.CodeInvalidArgument)
		if err := s.signal(t, byPID(o.pid), process.Signal_SIGNAL_SIGTERM); err != nil {
			t.Errorf("SendSignal = %v", err)
		}
	})
	if o.stdout != "ready\nterm\n" || o.end.GetExitCode() != 7 {
		t.Errorf("outcome = %+v", o)
	}
	wantCode(t, s.signal(t, byPID(o.pid), process.Signal_SIGNAL_SIGKILL), connect.CodeNotFound)
}

// A kill reaches what the shell started: otherwise `cd app && serve` would leave the server running.
func TestKillReachesTheGroup(t *testing.T) {
	s := startAgent(t)
	var child int
	o := collect(s.start(t.Context(), t, sh("sleep 600 & echo $!; wait"), ""), func(o *outcome) {
		if child != 0 || !strings.HasSuffix(o.stdout, "\n") {
			return
		}
		child, _ = strconv.Atoi(strings.TrimSpace(o.stdout))
		if err := s.signal(t, byPID(o.pid), process.Signal_SIGNAL_SIGKILL); err != nil {
			t.Errorf("SendSignal = %v", err)
		}
	})
	if o.end.GetStatus() != "signal: killed" {
		t.Errorf("outcome = %+v", o)
	}
	eventually(t, "the child is gone", func() bool { return dead(child) })
}

// dead says that a process is gone or a zombie.
func dead(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(raw), ") ")
	return strings.HasPrefix(rest, "Z")
}

func TestDeadlineKills(t *testing.T) {
	s := startAgent(t)
	// Set by hand: the client library would give up by itself first.
	req := connect.NewRequest(sh("sleep 600"))
	req.Header().Set("Connect-Timeout-Ms", "100")
	stream, err := s.process.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	o := collect(stream, nil)
	wantCode(t, o.err, connect.CodeDeadlineExceeded)
	eventually(t, "the process is gone", func() bool { return dead(int(o.pid)) })
}

func TestDisconnectDoesNotKill(t *testing.T) {
	s := startAgent(t)
	ctx, cancel := context.WithCancel(t.Context())
	var pid uint32
	collect(s.start(ctx, t, sh("echo ready; read x; echo late $x; exit 5"), ""), func(o *outcome) {
		pid = o.pid
		if o.stdout != "" {
			cancel()
		}
	})
	defer cancel()
	connectTo := func() *connect.ServerStreamForClient[process.ConnectResponse] {
		stream, err := s.process.Connect(t.Context(), connect.NewRequest(&process.ConnectRequest{Process: byPID(pid)}))
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	res, err := s.process.List(t.Context(), connect.NewRequest(&process.ListRequest{}))
	if err != nil || len(res.Msg.GetProcesses()) != 1 || res.Msg.GetProcesses()[0].GetPid() != pid ||
		res.Msg.GetProcesses()[0].GetConfig().GetCmd() != "/bin/sh" {
		t.Errorf("List = %v, %v", res, err)
	}
	sent := false
	o := collect(connectTo(), func(*outcome) {
		if !sent {
			sent = true
			if err := s.send(t, byPID(pid), "joined\n"); err != nil {
				t.Errorf("SendInput = %v", err)
			}
		}
	})
	if o.pid != pid || o.stdout != "late joined\n" || o.end.GetExitCode() != 5 {
		t.Errorf("joined = %+v", o)
	}
	// The result is kept for who comes late, but the process is no longer one.
	if o := collect(connectTo(), nil); o.end.GetExitCode() != 5 || o.pid != pid {
		t.Errorf("late = %+v", o)
	}
	if res, err := s.process.List(t.Context(), connect.NewRequest(&process.ListRequest{})); err != nil || len(res.Msg.GetProcesses()) != 0 {
		t.Errorf("List afterwards = %v, %v", res, err)
	}
	wantCode(t, s.send(t, byPID(pid), "x"), connect.CodeNotFound)
	pid = 1 << 30
	if o := collect(connectTo(), nil); o.err == nil || !strings.Contains(o.err.Error(), "process with pid 1073741824 not found") {
		t.Errorf("unknown = %v", o.err)
	}
}

// A daemon that keeps the output open does not keep the command from ending, and does not die of a broken pipe.
func TestDaemonDoesNotHoldUpTheEnd(t *testing.T) {
	s := startAgent(t)
	mark := filepath.Join(s.home, "mark")
	o := s.run(t, "(sleep 2; echo too late && echo alive > "+mark+") & echo started", "")
	if o.stdout != "started\n" || o.end.GetExitCode() != 0 {
		t.Errorf("outcome = %+v", o)
	}
	eventually(t, "the daemon could write", func() bool { got, _ := os.ReadFile(mark); return string(got) == "alive\n" })
}

func TestLargeOutputArrivesWhole(t *testing.T) {
	s := startAgent(t)
	o := s.run(t, "head -c 5000000 /dev/zero; echo; head -c 1000000 /dev/zero >&2", "")
	if len(o.stdout) != 5000001 || len(o.stderr) != 1000000 || o.end == nil {
		t.Errorf("%d and %d bytes, end %v, %v", len(o.stdout), len(o.stderr), o.end, o.err)
	}
}

// A client that does not read stops the process, and costs no more than buffers. When it goes, the process goes on.
func TestClientThatDoesNotRead(t *testing.T) {
	s := startAgent(t)
	mark := filepath.Join(s.home, "mark")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream := s.start(ctx, t, sh("head -c 100000000 /dev/zero; echo done > "+mark), "")
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	time.Sleep(300 * time.Millisecond) // a faster or slower machine can only make this test pass
	if _, err := os.Stat(mark); err == nil {
		t.Error("100 MB went somewhere although nobody reads")
	}
	cancel()
	eventually(t, "the process could go on", func() bool { _, err := os.Stat(mark); return err == nil })
}

func TestManyAtOnce(t *testing.T) {
	s := startAgent(t)
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			stream, err := s.process.Start(t.Context(), connect.NewRequest(sh(fmt.Sprintf("echo %d; exit %d", i, i))))
			if err != nil {
				t.Error(err)
				return
			}
			if o := collect(stream, nil); o.stdout != fmt.Sprintf("%d\n", i) || int(o.end.GetExitCode()) != i {
				t.Errorf("process %d: %+v", i, o)
			}
		})
	}
	wg.Wait()
}

func TestKeepalive(t *testing.T) {
	s := startAgent(t)
	req := connect.NewRequest(sh("sleep 600"))
	req.Header().Set("Keepalive-Ping-Interval", "1")
	stream, err := s.process.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var pid uint32
	for stream.Receive() {
		if e := stream.Msg().GetEvent(); e.GetStart() != nil {
			pid = e.GetStart().GetPid()
		} else if e.GetKeepalive() != nil {
			if err := s.signal(t, byPID(pid), process.Signal_SIGNAL_SIGKILL); err != nil {
				t.Errorf("SendSignal = %v", err)
			}
			return
		}
	}
	t.Errorf("no keepalive: %v", stream.Err())
}

func TestKeepaliveHeader(t *testing.T) {
	for value, want := range map[string]time.Duration{
		"": 90 * time.Second, "50": 50 * time.Second, "0": 90 * time.Second, "-1": 90 * time.Second, "x": 90 * time.Second, "999999999999": 90 * time.Second,
	} {
		if got := keepalive(http.Header{"Keepalive-Ping-Interval": {value}}); got != want {
			t.Errorf("keepalive(%q) = %v, want %v", value, got, want)
		}
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	writeTest(t, filepath.Join(dir, "tool"), "#!/bin/sh\n")
	writeTest(t, filepath.Join(dir, "plain"), "")
	if err := os.Chmod(filepath.Join(dir, "tool"), 0o755); err != nil {
		t.Fatal(err)
	}
	check := func(cmd string, env []string, want string) {
		t.Helper()
		got, err := lookPath(cmd, dir, env)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("lookPath(%q, %q) = %q, %v, want %q", cmd, env, got, err, want)
		}
	}
	check("tool", []string{"PATH=/nowhere:" + dir}, filepath.Join(dir, "tool"))
	check("tool", []string{"PATH="}, "")
	check("tool", []string{"PATH=."}, filepath.Join(dir, "tool"))
	check("tool", []string{"PATH=" + dir, "PATH=/nowhere"}, "")
	check("plain", []string{"PATH=" + dir}, "")
	check("./tool", nil, "./tool")
	check("", nil, "")
	check("a\x00", nil, "")
}

func TestMapped(t *testing.T) {
	file := filepath.Join(t.TempDir(), "uid_map")
	writeTest(t, file, "         0     100000      65536\n     70000          5          1\n")
	for id, want := range map[uint32]bool{0: true, 65535: true, 65536: false, 70000: true, 70001: false} {
		if got := mapped(file, id); got != want {
			t.Errorf("mapped(%d) = %v", id, got)
		}
	}
	if !mapped("/no/such/file", 5) {
		t.Error("without user namespaces every id is there")
	}
}

func TestEndedProcessesAreBounded(t *testing.T) {
	ps := newProcesses(newAgent(Options{}).log)
	for i := range maxEnded + 50 {
		p := &running{pid: uint32(i), out: newFanout()}
		ps.byPID[p.pid] = p
		ps.retire(p)
	}
	if len(ps.byPID) != maxEnded || len(ps.ended) != maxEnded {
		t.Errorf("kept %d and %d", len(ps.byPID), len(ps.ended))
	}
}

func TestKillAllLeavesNothing(t *testing.T) {
	ps := newProcesses(newAgent(Options{}).log)
	p, r, err := ps.start(startSpec{config: sh("sleep 600 & sleep 600").Process, dir: "/", stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	p.out.unsubscribe(r)
	ps.killAll()
	if !p.isDead() {
		t.Error("still there")
	}
	if _, _, err := ps.start(startSpec{config: sh("true").Process, dir: "/"}); !errors.Is(err, errEnding) {
		t.Errorf("start afterwards = %v", err)
	}
}
