package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/creack/pty"

	"github.com/sluice-edge/sluice/guest/gen/process"
)

// processService is the RPC service process.Process.
type processService struct{ *agent }

// Start runs a process and streams its output. The process outlives the stream; only the call's own deadline ends it.
func (s processService) Start(
	ctx context.Context, req *connect.Request[process.StartRequest], stream *connect.ServerStream[process.StartResponse],
) error {
	spec, err := s.plan(ctx, req)
	if err != nil {
		return err
	}
	p, r, err := s.processes.start(spec)
	if errors.Is(err, errEnding) {
		return connect.NewError(connect.CodeUnavailable, err)
	}
	if err != nil {
		return invalid("error starting process '%s': %w", strings.Join(append([]string{spec.config.GetCmd()}, spec.config.GetArgs()...), " "), err)
	}
	s.log.Debug("process started", "pid", p.pid, "cmd", spec.config.GetCmd())
	defer p.out.unsubscribe(r)
	return s.stream(ctx, p, r, keepalive(req.Header()), func(e *process.ProcessEvent) error {
		return stream.Send(&process.StartResponse{Event: e})
	})
}

// plan turns a request into all that a start needs; it starts nothing.
func (s processService) plan(ctx context.Context, req *connect.Request[process.StartRequest]) (startSpec, error) {
	m := req.Msg
	config := m.GetProcess()
	if config == nil {
		return startSpec{}, invalid("process is required")
	}
	dir, u, err := s.rpcPath(req.Header(), config.GetCwd())
	if err != nil {
		return startSpec{}, err
	}
	login, err := s.login(u)
	if err != nil {
		return startSpec{}, connect.NewError(connect.CodeUnauthenticated, err)
	}
	switch info, err := os.Stat(dir); {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return startSpec{}, invalid("cwd '%s' does not exist", dir)
	case err != nil:
		return startSpec{}, rpcError("error reading cwd", err)
	case !info.IsDir():
		return startSpec{}, invalid("cwd '%s' is not a directory", dir)
	}
	env, err := environment(u, s.settings.get().env, config.GetEnvs())
	if err != nil {
		return startSpec{}, connect.NewError(connect.CodeInvalidArgument, err)
	}
	spec := startSpec{config: config, tag: m.Tag, stdin: m.Stdin == nil || m.GetStdin(), dir: dir, env: env, login: login}
	spec.deadline, _ = ctx.Deadline()
	if m.Pty != nil {
		if spec.size, err = winsize(m.GetPty()); err != nil {
			return startSpec{}, err
		}
	}
	return spec, nil
}

// winsize is the size that a client asked for, or that of an old terminal.
func winsize(p *process.PTY) (*pty.Winsize, error) {
	cols, rows := p.GetSize().GetCols(), p.GetSize().GetRows()
	if cols > 65535 || rows > 65535 {
		return nil, invalid("pty size %dx%d is too large", cols, rows)
	}
	if cols == 0 {
		cols = 80
	}
	if rows == 0 {
		rows = 24
	}
	return &pty.Winsize{Cols: uint16(cols), Rows: uint16(rows)}, nil
}

// Connect joins the output of a process from now on. One that has just ended still tells its end.
func (s processService) Connect(
	ctx context.Context, req *connect.Request[process.ConnectRequest], stream *connect.ServerStream[process.ConnectResponse],
) error {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return err
	}
	r := p.out.subscribe()
	defer p.out.unsubscribe(r)
	return s.stream(ctx, p, r, keepalive(req.Header()), func(e *process.ProcessEvent) error {
		return stream.Send(&process.ConnectResponse{Event: e})
	})
}

// stream sends start, then output, then the end.
func (s processService) stream(
	ctx context.Context, p *running, r *reader, interval time.Duration, send func(*process.ProcessEvent) error,
) error {
	boundWrites(ctx)
	start := &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: p.pid}}
	if err := send(&process.ProcessEvent{Event: start}); err != nil {
		return err
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		var event *process.ProcessEvent
		select {
		case <-ctx.Done():
			return contextError(ctx.Err())
		case <-r.cut:
			return connect.NewError(connect.CodeResourceExhausted, errTooSlow)
		case data := <-r.queue:
			event = &process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: data}}
		case <-tick.C:
			event = &process.ProcessEvent{Event: &process.ProcessEvent_Keepalive{Keepalive: &process.ProcessEvent_KeepAlive{}}}
		case <-p.out.done:
			return s.finish(ctx, p, r, send)
		}
		if err := send(event); err != nil {
			return err
		}
		tick.Reset(interval)
	}
}

// finish sends what is still queued and the end. A process that died of the call's deadline ends in an error instead: so clients tell a timeout
// from a kill.
func (s processService) finish(ctx context.Context, p *running, r *reader, send func(*process.ProcessEvent) error) error {
	for {
		select {
		case data := <-r.queue:
			if err := send(&process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: data}}); err != nil {
				return err
			}
			continue
		default:
		}
		break
	}
	select {
	case <-r.cut:
		return connect.NewError(connect.CodeResourceExhausted, errTooSlow)
	default:
	}
	deadline, ok := ctx.Deadline()
	if p.expired() && ok && !time.Now().Before(deadline) {
		return contextError(context.DeadlineExceeded)
	}
	return send(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: p.end}})
}

func contextError(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	}
	return connect.NewError(connect.CodeCanceled, err)
}

func (s processService) find(selector *process.ProcessSelector) (*running, error) {
	p, err := s.processes.find(selector)
	switch {
	case errors.Is(err, errNoSelector):
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	case err != nil:
		return nil, connect.NewError(connect.CodeNotFound, err)
	}
	return p, nil
}

// findLive is find for calls that do something to a process: one that ended is not there.
func (s processService) findLive(selector *process.ProcessSelector) (*running, error) {
	p, err := s.find(selector)
	if err != nil {
		return nil, err
	}
	if p.isDead() {
		return nil, gone(p)
	}
	return p, nil
}

func gone(p *running) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("process with pid %d not found", p.pid))
}

// List names the running processes that clients started.
func (s processService) List(
	context.Context, *connect.Request[process.ListRequest],
) (*connect.Response[process.ListResponse], error) {
	list := &process.ListResponse{}
	for _, p := range s.processes.live() {
		list.Processes = append(list.Processes, &process.ProcessInfo{Config: p.config, Pid: p.pid, Tag: p.tag})
	}
	return connect.NewResponse(list), nil
}

// SendInput writes to stdin or to the PTY.
func (s processService) SendInput(
	ctx context.Context, req *connect.Request[process.SendInputRequest],
) (*connect.Response[process.SendInputResponse], error) {
	p, err := s.findLive(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := s.input(ctx, p, req.Msg.GetInput()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&process.SendInputResponse{}), nil
}

func (s processService) input(ctx context.Context, p *running, in *process.ProcessInput) error {
	var err error
	switch to := in.GetInput().(type) {
	case *process.ProcessInput_Stdin:
		err = p.write(ctx, to.Stdin, false)
	case *process.ProcessInput_Pty:
		err = p.write(ctx, to.Pty, true)
	default:
		return invalid("input names neither stdin nor pty")
	}
	return inputError(err)
}

func inputError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errNoStdin), errors.Is(err, errHasPTY), errors.Is(err, errNoPTY), errors.Is(err, errCloseOfPTY):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	default:
		return rpcError("error writing input", err)
	}
}

// StreamInput writes a stream of messages to one process, which the first names.
func (s processService) StreamInput(
	ctx context.Context, stream *connect.ClientStream[process.StreamInputRequest],
) (*connect.Response[process.StreamInputResponse], error) {
	var p *running
	for stream.Receive() {
		switch event := stream.Msg().GetEvent().(type) {
		case *process.StreamInputRequest_Start:
			if p != nil {
				return nil, invalid("the stream has already started")
			}
			var err error
			if p, err = s.findLive(event.Start.GetProcess()); err != nil {
				return nil, err
			}
		case *process.StreamInputRequest_Data:
			if p == nil {
				return nil, invalid("the first message must be start")
			}
			if err := s.input(ctx, p, event.Data.GetInput()); err != nil {
				return nil, err
			}
		case *process.StreamInputRequest_Keepalive:
		default:
			return nil, invalid("message without an event")
		}
	}
	if err := stream.Err(); err != nil {
		return nil, rpcError("error receiving input", err)
	}
	return connect.NewResponse(&process.StreamInputResponse{}), nil
}

// CloseStdin tells a process that no more input comes.
func (s processService) CloseStdin(
	ctx context.Context, req *connect.Request[process.CloseStdinRequest],
) (*connect.Response[process.CloseStdinResponse], error) {
	p, err := s.findLive(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := inputError(p.closeStdin(ctx)); err != nil {
		return nil, err
	}
	return connect.NewResponse(&process.CloseStdinResponse{}), nil
}

// SendSignal sends SIGTERM or SIGKILL.
func (s processService) SendSignal(
	ctx context.Context, req *connect.Request[process.SendSignalRequest],
) (*connect.Response[process.SendSignalResponse], error) {
	p, err := s.findLive(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	var signal syscall.Signal
	switch req.Msg.GetSignal() {
	case process.Signal_SIGNAL_SIGKILL:
		signal = syscall.SIGKILL
	case process.Signal_SIGNAL_SIGTERM:
		signal = syscall.SIGTERM
	default:
		return nil, invalid("invalid signal: %s", req.Msg.GetSignal())
	}
	switch err := p.signal(signal); {
	case errors.Is(err, os.ErrProcessDone):
		return nil, gone(p)
	case err != nil:
		return nil, rpcError("error sending signal", err)
	}
	if signal == syscall.SIGKILL {
		p.awaitDeath(ctx)
	}
	return connect.NewResponse(&process.SendSignalResponse{}), nil
}

// Update resizes a PTY.
func (s processService) Update(
	_ context.Context, req *connect.Request[process.UpdateRequest],
) (*connect.Response[process.UpdateResponse], error) {
	p, err := s.findLive(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if req.Msg.Pty != nil {
		size, err := winsize(req.Msg.GetPty())
		if err != nil {
			return nil, err
		}
		switch err := p.resize(size); {
		case errors.Is(err, errNoPTY):
			return nil, connect.NewError(connect.CodeFailedPrecondition, err)
		case err != nil:
			return nil, rpcError("error resizing pty", err)
		}
	}
	return connect.NewResponse(&process.UpdateResponse{}), nil
}
