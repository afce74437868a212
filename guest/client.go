package guest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
)

const (
	// callTime bounds a call whose context has no earlier deadline: the other side may accept and never answer.
	callTime = 10 * time.Second
	// wakeTime bounds the first call of a VM that was restored: every page that the answer needs may have to come from a busy disk.
	wakeTime = time.Minute
	// clockSlack is how far a sandbox's clock may be off: that much may be the time of the call that sets it.
	clockSlack = time.Second
	// syncTime bounds a sync in the same way: a fifth of the sandbox's memory may have to go to its disk.
	syncTime = 2 * time.Minute
	// maxAnswer bounds what is read of an answer. The largest honest one is the output of a command, every byte of it escaped.
	maxAnswer = 8 * maxExecOutput
	// defaultExecTime is how long a command may run whose caller says nothing about it.
	defaultExecTime = time.Minute
)

// Ports of a VM's vsock.
const (
	// ControlPort is the guest's: what the control socket is in a namespace.
	ControlPort = 1024
	// UpPort is the host's. After a cold boot the agent connects to it once it serves, says "up\n" and closes.
	UpPort = 1025
)

// maxExecOutput is how much of a command's output an exec returns: the end of it.
const maxExecOutput = 16 << 10

// Client is the node's side of the control socket. The sandbox may have replaced the agent, so every call has a deadline and every answer a limit,
// and no descriptor is taken from it. A Client has no state to close: each call makes a connection of its own.
type Client struct {
	dial func(ctx context.Context) (net.Conn, error)
	http *http.Client
}

// NewClient talks to the agent's control socket at socketPath.
func NewClient(socketPath string) *Client {
	return NewClientDial(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socketPath)
	})
}

// NewClientDial talks over connections that dial makes: over vsock, say.
func NewClientDial(dial func(ctx context.Context) (net.Conn, error)) *Client {
	return &Client{dial: dial, http: &http.Client{
		Transport: &http.Transport{
			DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(callOf(ctx)) },
			DisableKeepAlives:      true,
			DisableCompression:     true, // a small answer must not unfold into a large one
			MaxResponseHeaderBytes: maxAnswer,
			Protocols:              http1Only(),
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// callKey is under what a call's context finds itself again. The transport hands a dial the values of it, but not its end, since another call
// could use the connection. Here none can: a guest that never says that it accepts would collect connections, one with each call.
type callKey struct{}

func callOf(ctx context.Context) context.Context {
	if call, ok := ctx.Value(callKey{}).(context.Context); ok {
		return call
	}
	return ctx
}

func http1Only() *http.Protocols {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	return p
}

// InitRequest is what a sandbox is told when it starts to belong to somebody.
type InitRequest struct {
	EnvVars        map[string]string
	AccessToken    string // empty opens the agent to everybody
	Timestamp      time.Time
	DefaultUser    string // empty leaves it to the agent
	DefaultWorkdir string
	Hostname       string
	LifecycleID    string // an init of the same lifecycle that is older than the last one changes nothing
	MergeEnv       bool   // lay EnvVars over what the agent has, instead of replacing it

	// For a VM, which has these to itself; a namespace gets them from outside.
	MAC       string   // of its network card; empty leaves it
	Resolvers []string // addresses of DNS servers; none leaves what the image says
}

// Metrics is what the sandbox says about itself. None of it can be trusted.
type Metrics struct {
	Timestamp  int64   `json:"ts"` // Unix seconds
	CPUCount   int     `json:"cpu_count"`
	CPUUsedPct float64 `json:"cpu_used_pct"` // of all CPUs together
	MemTotal   int64   `json:"mem_total"`    // bytes, as are the next two
	MemUsed    int64   `json:"mem_used"`
	MemCache   int64   `json:"mem_cache"`
	// For SDKs older than 0.2.4.
	MemTotalMiB int64 `json:"mem_total_mib"`
	MemUsedMiB  int64 `json:"mem_used_mib"`
	DiskUsed    int64 `json:"disk_used"` // bytes of the root filesystem
	DiskTotal   int64 `json:"disk_total"`
}

// Init gives the agent its identity and its environment. It may be called again, and replaces what was there. A VM gets fresh entropy with
// it: whatever it was restored from knows the same random numbers as all its siblings.
func (c *Client) Init(ctx context.Context, req InitRequest) error {
	env := req.EnvVars
	if env == nil {
		env = map[string]string{}
	}
	return c.callAt(ctx, req.Timestamp, "/init", initRequest{
		EnvVars: &env, AccessToken: &req.AccessToken, Timestamp: req.Timestamp, DefaultUser: &req.DefaultUser,
		DefaultWorkdir: &req.DefaultWorkdir, LifecycleID: req.LifecycleID, Hostname: req.Hostname,
		MergeEnv: req.MergeEnv, MAC: req.MAC, Resolvers: req.Resolvers, Entropy: newEntropy(),
	})
}

// callAt is a call that tells the sandbox what time it is. The first call of a machine that was restored may take long, because its memory is
// still on its way, and then its clock is late by as much: it is told again, until that takes no time.
func (c *Client) callAt(ctx context.Context, now time.Time, path string, ask any) error {
	began := time.Now()
	err := c.call(ctx, wakeTime, http.MethodPost, path, ask, http.StatusNoContent, nil)
	for range 3 {
		took := time.Since(began)
		if err != nil || now.IsZero() || took < clockSlack {
			return err
		}
		began, now = began.Add(took), now.Add(took)
		err = c.call(ctx, wakeTime, http.MethodPost, "/clock", clockRequest{Timestamp: now}, http.StatusNoContent, nil)
	}
	return err
}

// newEntropy is what the kernel of a VM wants for a new start, twice over.
func newEntropy() []byte {
	seed := make([]byte, 64)
	_, _ = rand.Read(seed) // never fails
	return seed
}

// ResumeRequest is what a sandbox is told that goes on after it was saved.
type ResumeRequest struct {
	Timestamp   time.Time
	LifecycleID string // for the agent's log
	// KeepConnections is for a VM that only stood still, and whose peers are where they were.
	KeepConnections bool
}

// Resume tells a VM that time has passed: it sets its clock, takes fresh entropy and ends the connections that it still believes in. It
// keeps everything that Init gave.
func (c *Client) Resume(ctx context.Context, req ResumeRequest) error {
	return c.callAt(ctx, req.Timestamp, "/resume", resumeRequest{
		Timestamp: req.Timestamp, LifecycleID: req.LifecycleID, Entropy: newEntropy(), KeepConnections: req.KeepConnections,
	})
}

// Sync has a VM write out what it keeps in memory of its disk. It takes as long as the disk does; ctx bounds it.
func (c *Client) Sync(ctx context.Context) error {
	return c.call(ctx, syncTime, http.MethodPost, "/sync", nil, http.StatusNoContent, nil)
}

// ExecRequest is a command for a shell in the sandbox.
type ExecRequest struct {
	Cmd     string
	User    string // empty means the default user
	Cwd     string // empty means the default working directory
	Env     map[string]string
	Timeout time.Duration // it is killed then; zero means a minute
	// Background starts it and does not wait: it outlives the call, has no timeout and its output goes nowhere.
	Background bool
}

// ExecResult is how a command ended, or that it runs.
type ExecResult struct {
	PID      int    `json:"pid"`
	ExitCode int    `json:"exitCode"` // of one that was killed: 128 and the signal
	Output   string `json:"output"`   // the end of what it wrote to stdout and stderr, at most 16 KiB
	TimedOut bool   `json:"timedOut"`
}

// Exec runs a command. That it fails is no error, but a result.
func (c *Client) Exec(ctx context.Context, req ExecRequest) (ExecResult, error) {
	limit := req.Timeout
	if limit <= 0 {
		limit = defaultExecTime
	}
	var res ExecResult
	err := c.call(ctx, limit+callTime, http.MethodPost, "/exec", execRequest{
		Cmd: req.Cmd, User: req.User, Cwd: req.Cwd, Env: req.Env, TimeoutMS: limit.Milliseconds(), Background: req.Background,
	}, http.StatusOK, &res)
	return res, err
}

// Health asks whether the agent answers.
func (c *Client) Health(ctx context.Context) error {
	return c.call(ctx, wakeTime, http.MethodGet, "/health", nil, http.StatusNoContent, nil)
}

// Metrics asks for a sample.
func (c *Client) Metrics(ctx context.Context) (Metrics, error) {
	var m Metrics
	err := c.call(ctx, callTime, http.MethodGet, "/metrics", nil, http.StatusOK, &m)
	return m, err
}

// call sends ask, unless it is nil, and decodes the answer into into, unless that is nil.
func (c *Client) call(ctx context.Context, limit time.Duration, method, path string, ask any, want int, into any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var body []byte
	if ask != nil {
		var err error
		if body, err = json.Marshal(ask); err != nil {
			return fmt.Errorf("encode call of guest %s: %w", path, err)
		}
	}
	req, err := http.NewRequestWithContext(context.WithValue(ctx, callKey{}, ctx), method, "http://guest"+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("call guest: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("call guest: %w", err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("read answer of guest to %s: %w", path, err)
	case len(raw) > maxAnswer:
		return fmt.Errorf("answer of guest to %s is larger than %d bytes", path, maxAnswer)
	case res.StatusCode != want:
		return fmt.Errorf("guest answered %s with status %d: %q", path, res.StatusCode, strings.ToValidUTF8(string(raw[:min(len(raw), 200)]), ""))
	case into == nil:
		return nil
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("decode answer of guest to %s: %w", path, err)
	}
	return nil
}

// DialPort connects to a server in the sandbox: the agent connects inside, and the connection to the agent is then the stream. It has
// CloseWrite where what dial makes has, as Unix sockets and vsock do. When nobody listens the error is syscall.ECONNREFUSED by errors.Is.
func (c *Client) DialPort(ctx context.Context, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial guest: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err = requestStream(conn, port)
	if !stop() && err == nil {
		err = ctx.Err() // the deadline is set, or is just being set
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("dial port %d through guest: %w", port, err)
	}
	return conn, nil
}

// requestStream reads the verdict and no byte more: what follows is the server's.
func requestStream(conn net.Conn, port uint16) error {
	if _, err := conn.Write([]byte{dialHello, byte(port >> 8), byte(port)}); err != nil {
		return err
	}
	var verdict [1]byte
	if _, err := io.ReadFull(conn, verdict[:]); err != nil {
		return err
	}
	switch verdict[0] {
	case dialOpen:
		return nil
	case dialRefused:
		return syscall.ECONNREFUSED
	default:
		return errors.New("guest could not connect")
	}
}
