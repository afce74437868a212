package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-edge/sluice/guest/gen/process"
)

// maxExecBody bounds an exec: a command and its environment.
const maxExecBody = 1 << 20

// serveExec is POST /exec: a command in a shell, for whoever has no need of the streams of an SDK.
func (a *agent) serveExec(w http.ResponseWriter, r *http.Request) {
	var req execRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxExecBody)).Decode(&req); err != nil {
		writeError(w, http.StatusBadRequest, "error parsing body: "+err.Error())
		return
	}
	spec, err := a.planExec(req)
	if err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	p, out, err := a.processes.start(spec)
	if err != nil {
		a.failControl(w, "exec", err)
		return
	}
	if req.Background {
		p.out.unsubscribe(out)
		writeJSON(w, http.StatusOK, ExecResult{PID: int(p.pid)})
		return
	}
	defer p.out.unsubscribe(out)
	text, err := tailOf(r.Context(), p, out)
	if err != nil {
		p.kill() // nobody waits for it any more
		a.failControl(w, "exec", err)
		return
	}
	writeJSON(w, http.StatusOK, ExecResult{PID: int(p.pid), ExitCode: exitCode(p.cmd.ProcessState), Output: text, TimedOut: p.expired()})
}

// planExec turns a request into all that a start needs; it starts nothing.
func (a *agent) planExec(req execRequest) (startSpec, error) {
	if req.Cmd == "" {
		return startSpec{}, errors.New("no command")
	}
	act := a.actor
	if req.User != "" {
		act = a.accounts.find
	}
	u, err := act(req.User)
	if err != nil {
		return startSpec{}, fmt.Errorf("user %q: %w", req.User, err)
	}
	dir, err := a.resolve(req.Cwd, u)
	if err != nil {
		return startSpec{}, err
	}
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return startSpec{}, fmt.Errorf("cwd %q is not a directory", dir)
	}
	login, err := a.login(u)
	if err != nil {
		return startSpec{}, err
	}
	env, err := environment(u, a.settings.get().env, req.Env)
	if err != nil {
		return startSpec{}, err
	}
	shell, flags := "/bin/bash", "-lc"
	if _, err := os.Stat(shell); err != nil {
		shell, flags = "/bin/sh", "-c"
	}
	spec := startSpec{config: &process.ProcessConfig{Cmd: shell, Args: []string{flags, req.Cmd}}, merged: true, dir: dir, env: env, login: login}
	if req.TimeoutMS > 0 && !req.Background {
		spec.deadline = time.Now().Add(time.Duration(req.TimeoutMS) * time.Millisecond)
	}
	return spec, nil
}

// tailOf reads the output to its end and keeps the last of it.
func tailOf(ctx context.Context, p *running, out *reader) (string, error) {
	var tail []byte
	keep := func(e *process.ProcessEvent_DataEvent) {
		tail = append(tail, e.GetStdout()...)
		if len(tail) > maxExecOutput {
			tail = append(tail[:0], tail[len(tail)-maxExecOutput:]...)
		}
	}
	for {
		select {
		case e := <-out.queue:
			keep(e)
			continue
		case <-out.cut:
			return "", errTooSlow
		case <-ctx.Done():
			return "", ctx.Err()
		case <-p.out.done:
		}
		for {
			select {
			case e := <-out.queue:
				keep(e)
			default:
				return strings.ToValidUTF8(string(tail), "\uFFFD"), nil
			}
		}
	}
}

// exitCode is a shell's: that of the process, or 128 and the signal that killed it.
func exitCode(state *os.ProcessState) int {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return state.ExitCode()
}
