package guest

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/sluice-edge/sluice/guest/gen/process"
	"github.com/sluice-edge/sluice/guest/gen/process/processconnect"
)

const (
	// inputChunk is how much input goes into one message. Each waits for the one before it, which is what keeps them in order.
	inputChunk = 64 << 10
	// signalTime bounds the calls beside the stream that do not carry input: they are short.
	signalTime = 10 * time.Second
	// shellKeepalive is how often, in seconds, the agent says that a silent program still runs: more often than any proxy loses patience.
	shellKeepalive = "50"
	// endOfInput is what a terminal sends when somebody types Ctrl-D.
	endOfInput = 0x04
)

// Shell runs programs in one sandbox, as a client of its agent: by the public surface, over whatever leads there.
type Shell struct {
	process processconnect.ProcessClient
	header  http.Header // of every call
}

// ShellOptions say where the sandbox is. URL and Sandbox are required.
type ShellOptions struct {
	URL     string // where the agent's port, or an edge that routes by header, answers
	Sandbox string // its id, for such an edge
	Token   string // of the agent; empty for a sandbox that is not secured
	User    string // who the programs run as; empty is the sandbox's default

	// Transport is http.DefaultTransport when nil.
	Transport http.RoundTripper
}

// NewShell connects to nothing yet.
func NewShell(opts ShellOptions) *Shell {
	header := http.Header{
		"E2b-Sandbox-Id":   {opts.Sandbox},
		"E2b-Sandbox-Port": {strconv.Itoa(Port)},
		// As SDKs ask for it: without, a stream that is silent for minutes would be cut on the way.
		"Keepalive-Ping-Interval": {shellKeepalive},
	}
	if opts.Token != "" {
		header.Set(tokenHeader, opts.Token)
	}
	if opts.User != "" {
		header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(opts.User+":")))
	}
	client := &http.Client{ // no timeout: a program may run for days
		Transport:     opts.Transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the token goes nowhere else
	}
	return &Shell{
		process: processconnect.NewProcessClient(client, strings.TrimSuffix(opts.URL, "/"), connect.WithProtoJSON(),
			connect.WithReadMaxBytes(maxMessageBytes)), // the sandbox is not trusted
		header: header,
	}
}

// WindowSize is that of a terminal, in characters.
type WindowSize struct{ Cols, Rows uint16 }

// Command is one program and what it is connected to.
type Command struct {
	Args []string // the program, looked up on the sandbox's PATH, and its arguments
	Env  map[string]string
	Dir  string // empty is the user's home

	Stdin  io.Reader // nil: no input. A Read that is under way when the program ends is not waited for
	Stdout io.Writer // with a terminal also of what the program writes to stderr
	Stderr io.Writer

	// Terminal gives the program a terminal of its own, in this size to begin with; nil gives it pipes. Ctrl-C and the like are then
	// bytes of Stdin, and the sandbox's kernel turns them into signals.
	Terminal *WindowSize
	Resized  <-chan WindowSize // later sizes; nil when there are none

	// Signals are passed on; of all that exist the agent knows SIGTERM and SIGKILL.
	Signals <-chan syscall.Signal
}

// Run runs the program until it has ended, and returns how: its exit code, or as shells report it 128 and the number of the signal that
// killed it. The program does not end with ctx: who wants that sends a signal. An error means that how it ended is unknown, or that it
// never ran.
func (s *Shell) Run(ctx context.Context, c Command) (exitCode int, err error) {
	if len(c.Args) == 0 {
		return 0, errors.New("run in sandbox: no program given")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req := &process.StartRequest{
		Process: &process.ProcessConfig{Cmd: c.Args[0], Args: c.Args[1:], Envs: c.Env},
		Stdin:   new(c.Stdin != nil),
	}
	if c.Dir != "" {
		req.Process.Cwd = &c.Dir
	}
	if c.Terminal != nil {
		req.Pty = c.Terminal.message()
	}
	stream, err := s.process.Start(ctx, withHeader(s, req))
	if err != nil {
		return 0, fmt.Errorf("run %q in sandbox: %w", c.Args[0], err)
	}
	defer stream.Close()
	pid, err := started(stream)
	if err != nil {
		return 0, fmt.Errorf("run %q in sandbox: %w", c.Args[0], err)
	}
	p := &remote{shell: s, selector: &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}, terminal: c.Terminal != nil}
	lost := make(chan error, 2) // one place for each that writes to it
	if c.Stdin != nil {
		go p.feed(ctx, c.Stdin, lost)
	}
	var control sync.WaitGroup
	control.Go(func() { p.control(ctx, c.Signals, c.Resized) })
	end, err := p.receive(stream, c.Stdout, c.Stderr)
	if errors.Is(err, errOutput) {
		p.signal(ctx, syscall.SIGTERM) // as a pipe that nobody reads would end it
	}
	cancel()
	control.Wait()
	if err != nil {
		select {
		case cause := <-lost: // what went wrong first says more
			err = cause
		default:
		}
		return 0, fmt.Errorf("run %q in sandbox: %w", c.Args[0], err)
	}
	return exitCodeOf(end), nil
}

// started reads the first event, which is the start.
func started(stream *connect.ServerStreamForClient[process.StartResponse]) (pid uint32, err error) {
	if !stream.Receive() {
		if err := stream.Err(); err != nil {
			return 0, err
		}
		return 0, io.ErrUnexpectedEOF
	}
	start := stream.Msg().GetEvent().GetStart()
	if start == nil {
		return 0, errors.New("the agent's first event is not the start")
	}
	return start.GetPid(), nil
}

// withHeader makes a request of m that the sandbox lets in.
func withHeader[M any](s *Shell, m *M) *connect.Request[M] {
	req := connect.NewRequest(m)
	for name, values := range s.header {
		req.Header()[name] = values
	}
	return req
}

func (w WindowSize) message() *process.PTY {
	return &process.PTY{Size: &process.PTY_Size{Cols: uint32(w.Cols), Rows: uint32(w.Rows)}}
}

// errOutput means that this side could not write what the program wrote.
var errOutput = errors.New("write its output")

// remote is a program that runs in the sandbox.
type remote struct {
	shell    *Shell
	selector *process.ProcessSelector
	terminal bool
}

// receive writes what the program writes, until its end.
func (p *remote) receive(stream *connect.ServerStreamForClient[process.StartResponse], stdout, stderr io.Writer) (*process.ProcessEvent_EndEvent, error) {
	for stream.Receive() {
		event := stream.Msg().GetEvent()
		if end := event.GetEnd(); end != nil {
			return end, nil
		}
		for _, part := range []struct {
			data []byte
			to   io.Writer
		}{{event.GetData().GetPty(), stdout}, {event.GetData().GetStdout(), stdout}, {event.GetData().GetStderr(), stderr}} {
			if len(part.data) == 0 || part.to == nil {
				continue
			}
			if _, err := part.to.Write(part.data); err != nil {
				return nil, fmt.Errorf("%w: %w", errOutput, err)
			}
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return nil, io.ErrUnexpectedEOF // the stream ended, the program did not
}

// feed sends the input until its end, which it tells the program as well.
func (p *remote) feed(ctx context.Context, input io.Reader, lost chan<- error) {
	buf := make([]byte, inputChunk)
	for {
		n, err := input.Read(buf)
		if n > 0 {
			if err := p.send(ctx, buf[:n]); err != nil {
				if !isGone(err) {
					lost <- fmt.Errorf("send input: %w", err)
				}
				return
			}
		}
		if err == nil {
			continue
		}
		// A reader that fails has no more input either; and the program has its own say about what to do without.
		if err := p.endInput(ctx); err != nil && !isGone(err) {
			lost <- fmt.Errorf("end input: %w", err)
		}
		return
	}
}

func (p *remote) send(ctx context.Context, data []byte) error {
	input := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: data}}
	if p.terminal {
		input.Input = &process.ProcessInput_Pty{Pty: data}
	}
	_, err := p.shell.process.SendInput(ctx, withHeader(p.shell, &process.SendInputRequest{Process: p.selector, Input: input}))
	return err
}

func (p *remote) endInput(ctx context.Context) error {
	if p.terminal {
		return p.send(ctx, []byte{endOfInput})
	}
	_, err := p.shell.process.CloseStdin(ctx, withHeader(p.shell, &process.CloseStdinRequest{Process: p.selector}))
	return err
}

// isGone tells whether the program has ended, or takes no more input: the stream has the rest of the story.
func isGone(err error) bool {
	code := connect.CodeOf(err)
	return code == connect.CodeNotFound || code == connect.CodeFailedPrecondition || errors.Is(err, context.Canceled)
}

// control passes signals and sizes on. When one of them does not arrive, the next may: the user sees what happens and tries again.
func (p *remote) control(ctx context.Context, signals <-chan syscall.Signal, resized <-chan WindowSize) {
	for {
		select {
		case <-ctx.Done():
			return
		case sig := <-signals:
			p.signal(ctx, sig)
		case size := <-resized:
			p.resize(ctx, size)
		}
	}
}

func (p *remote) signal(ctx context.Context, sig syscall.Signal) {
	ctx, cancel := context.WithTimeout(ctx, signalTime)
	defer cancel()
	_, _ = p.shell.process.SendSignal(ctx, withHeader(p.shell, &process.SendSignalRequest{Process: p.selector, Signal: process.Signal(sig)}))
}

func (p *remote) resize(ctx context.Context, size WindowSize) {
	ctx, cancel := context.WithTimeout(ctx, signalTime)
	defer cancel()
	_, _ = p.shell.process.Update(ctx, withHeader(p.shell, &process.UpdateRequest{Process: p.selector, Pty: size.message()}))
}

// Unreachable tells whether an error of Run means that the sandbox is not there, or not at that address.
func Unreachable(err error) bool {
	code := connect.CodeOf(err)
	return code == connect.CodeUnavailable || code == connect.CodeUnimplemented // the latter is what a 404 looks like
}

// maxSignal is the highest of Linux.
const maxSignal = 64

// exitCodeOf reads a signal's number back from its name, which is all that the protocol has of it.
func exitCodeOf(end *process.ProcessEvent_EndEvent) int {
	if end.GetExited() || end.GetExitCode() >= 0 {
		return int(end.GetExitCode()) & 0xff
	}
	name, killed := strings.CutPrefix(end.GetStatus(), "signal: ")
	name = strings.TrimSuffix(name, " (core dumped)")
	for n := syscall.Signal(1); killed && n <= maxSignal; n++ {
		if n.String() == name {
			return 128 + int(n)
		}
	}
	return 255
}
