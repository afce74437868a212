package guest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestExec(t *testing.T) {
	s := startAgent(t)
	mustInit(t, s, InitRequest{EnvVars: map[string]string{"A": "1", "B": "1"}, DefaultUser: "user"})
	run := func(req ExecRequest) ExecResult {
		t.Helper()
		res, err := s.node.Exec(t.Context(), req)
		if err != nil {
			t.Fatalf("Exec(%q): %v", req.Cmd, err)
		}
		return res
	}
	check := func(req ExecRequest, code int, output string) {
		t.Helper()
		if res := run(req); res.ExitCode != code || res.Output != output || res.TimedOut || res.PID == 0 {
			t.Errorf("Exec(%+v) = %+v, want %d, %q", req, res, code, output)
		}
	}
	check(ExecRequest{Cmd: `echo "$A $B $C"; pwd`, Env: map[string]string{"B": "2", "C": "3"}}, 0, "1 2 3\n"+s.home+"\n")
	check(ExecRequest{Cmd: "pwd", Cwd: "/"}, 0, "/\n")
	check(ExecRequest{Cmd: "echo out; echo err >&2; exit 3"}, 3, "out\nerr\n")
	check(ExecRequest{Cmd: "kill -TERM $$"}, 128+15, "")
	check(ExecRequest{Cmd: "cat"}, 0, "") // there is no input
	check(ExecRequest{Cmd: `printf '\377'`}, 0, "\uFFFD")
	if id, err := exec.Command("id", "-u").Output(); err == nil && os.Getuid() == 0 {
		check(ExecRequest{Cmd: "id -u", User: "root"}, 0, string(id))
		check(ExecRequest{Cmd: "id -u"}, 0, "54321\n")
	}
	if res := run(ExecRequest{Cmd: "seq 100000"}); len(res.Output) != maxExecOutput || !strings.HasSuffix(res.Output, "\n100000\n") {
		t.Errorf("much output: %d bytes, the end is %q", len(res.Output), res.Output[max(len(res.Output)-20, 0):])
	}
	// Of the output that takes most space in an answer, the end arrives too.
	if res := run(ExecRequest{Cmd: "head -c 100000 /dev/zero"}); res.Output != strings.Repeat("\x00", maxExecOutput) {
		t.Errorf("zeros: %d bytes", len(res.Output))
	}
	if res := run(ExecRequest{Cmd: "echo first; sleep 1000", Timeout: 50 * time.Millisecond}); !res.TimedOut || res.ExitCode != 128+9 {
		t.Errorf("a command that takes too long = %+v", res)
	}
	for name, req := range map[string]ExecRequest{
		"no command": {}, "user": {Cmd: "true", User: "ghost"}, "cwd": {Cmd: "true", Cwd: "/nowhere"}, "other's home": {Cmd: "true", Cwd: "~root"},
		"environment": {Cmd: "true", Env: map[string]string{"": "x"}},
	} {
		if res, err := s.node.Exec(t.Context(), req); err == nil || !strings.Contains(err.Error(), "status 400") {
			t.Errorf("bad %s: %+v, %v", name, res, err)
		}
	}
}

// A command in the background outlives the call, whatever it has to say.
func TestExecInTheBackground(t *testing.T) {
	s := startAgent(t)
	done := filepath.Join(s.home, "done")
	res, err := s.node.Exec(t.Context(), ExecRequest{Cmd: "seq 1000000; echo done > " + done, Background: true, Timeout: time.Nanosecond})
	if err != nil || res.PID == 0 || res.ExitCode != 0 || res.Output != "" {
		t.Fatalf("Exec = %+v, %v", res, err)
	}
	eventually(t, "the command has ended", func() bool {
		raw, err := os.ReadFile(done)
		return err == nil && string(raw) == "done\n"
	})
}
