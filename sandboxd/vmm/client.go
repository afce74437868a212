package vmm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/sluice-edge/sluice/internal/errs"

	"golang.org/x/sys/unix"
)

// Client speaks the hypervisor's API over its socket. Every call has a deadline of its own below the caller's, every answer a limit.
// Each call has its own connection: calls are rare, and a connection that was idle for an hour tells less than a new one.
type Client struct {
	socket     string
	call, slow time.Duration
}

// NewClient talks to the hypervisor that listens on socket.
func NewClient(socket string, o Options) *Client {
	o = o.withDefaults()
	return &Client{socket: socket, call: o.CallTimeout, slow: o.SlowTimeout}
}

const (
	maxAnswer   = 4 << 20 // vm.info of a VM with many devices is some 100 KiB
	maxErrLines = 8       // of an error's chain, in our error
	maxErrText  = 300     // of each
)

// APIError is a refusal by the hypervisor. Its text is the hypervisor's and is for the log.
type APIError struct {
	Call   string
	Status int
	Chain  []string // outermost first
}

// Error is the whole chain on one line.
func (e *APIError) Error() string {
	if len(e.Chain) == 0 {
		return fmt.Sprintf("%s: status %d", e.Call, e.Status)
	}
	return fmt.Sprintf("%s: status %d: %s", e.Call, e.Status, strings.Join(e.Chain, ": "))
}

// statusCodes is what a status means. The hypervisor answered 500 to almost everything until v53 and becomes more exact with every
// release, so nothing is decided by 500, and nothing by a status alone that vm.info could tell.
var statusCodes = map[int]errs.Code{
	http.StatusBadRequest:         errs.Invalid,
	http.StatusNotFound:           errs.NotFound,
	http.StatusMethodNotAllowed:   errs.Conflict,
	http.StatusConflict:           errs.Conflict,
	http.StatusTooManyRequests:    errs.Exhausted,
	http.StatusServiceUnavailable: errs.Unavailable,
}

// Ping is who answers.
type Ping struct {
	Version      string   `json:"version"`
	BuildVersion string   `json:"build_version"`
	PID          int64    `json:"pid"` // in its own pid namespace
	Features     []string `json:"features"`
}

// State of the VM, as the hypervisor tells it.
type State string

// The states.
const (
	StateCreated  State = "Created"
	StateRunning  State = "Running"
	StateShutdown State = "Shutdown"
	StatePaused   State = "Paused"
)

// Info is the VM.
type Info struct {
	State            State    `json:"state"`
	Config           VMConfig `json:"config"`
	MemoryActualSize int64    `json:"memory_actual_size"`
}

// Counters are the devices' own counts, by device and name.
type Counters map[string]map[string]uint64

// RestoreMode is how memory comes back.
type RestoreMode string

// The modes.
const (
	RestoreCopy     RestoreMode = "Copy"     // all of it before the restore returns
	RestoreOnDemand RestoreMode = "OnDemand" // faulted in; needs /dev/userfaultfd. A snapshot fails until it is all there.
)

type restoreRequest struct {
	SourceURL string        `json:"source_url"`
	Mode      RestoreMode   `json:"memory_restore_mode,omitempty"`
	NetFDs    []restoredNet `json:"net_fds,omitempty"`
	Resume    bool          `json:"resume,omitempty"`
}

type restoredNet struct {
	ID     string `json:"id"`
	NumFDs int    `json:"num_fds"`
}

// Ping asks whether the hypervisor serves.
func (c *Client) Ping(ctx context.Context) (Ping, error) {
	var p Ping
	err := c.do(ctx, request{call: "vmm.ping", method: http.MethodGet, answer: &p})
	if err == nil && p.Version == "" {
		return Ping{}, fmt.Errorf("vmm.ping: the answer names no version")
	}
	return p, err
}

// Create makes the VM without starting it.
func (c *Client) Create(ctx context.Context, v VMConfig) error {
	return c.do(ctx, request{call: "vm.create", body: v, slow: true})
}

// AddNet gives the VM a network card on a tap. The descriptor is copied: the caller keeps its own.
func (c *Client) AddNet(ctx context.Context, n NetConfig, tap *os.File) error {
	return c.do(ctx, request{call: "vm.add-net", body: n, files: []*os.File{tap}})
}

// AddDisk gives the VM a disk, by its path inside.
func (c *Client) AddDisk(ctx context.Context, d DiskConfig) error {
	return c.do(ctx, request{call: "vm.add-disk", body: d})
}

// RemoveDevice takes a device away.
func (c *Client) RemoveDevice(ctx context.Context, id string) error {
	return c.do(ctx, request{call: "vm.remove-device", body: map[string]string{"id": id}})
}

// Boot starts the VM.
func (c *Client) Boot(ctx context.Context) error {
	return c.do(ctx, request{call: "vm.boot", slow: true})
}

// Info describes the VM. NotFound, or another error with older hypervisors, when there is none.
func (c *Client) Info(ctx context.Context) (Info, error) {
	var i Info
	err := c.do(ctx, request{call: "vm.info", method: http.MethodGet, answer: &i})
	if err != nil {
		return Info{}, err
	}
	if !slices.Contains([]State{StateCreated, StateRunning, StateShutdown, StatePaused}, i.State) {
		return Info{}, fmt.Errorf("vm.info: unknown state %q", clip(string(i.State)))
	}
	return i, nil
}

// Counters asks the devices.
func (c *Client) Counters(ctx context.Context) (Counters, error) {
	var n Counters
	err := c.do(ctx, request{call: "vm.counters", method: http.MethodGet, answer: &n})
	return n, err
}

// Pause stops the virtual processors.
func (c *Client) Pause(ctx context.Context) error { return c.do(ctx, request{call: "vm.pause"}) }

// Resume lets them go on.
func (c *Client) Resume(ctx context.Context) error { return c.do(ctx, request{call: "vm.resume"}) }

// snapshot writes a paused VM into a directory, by its path inside.
func (c *Client) snapshot(ctx context.Context, dir string) error {
	return c.do(ctx, request{call: "vm.snapshot", body: map[string]string{"destination_url": fileURL(dir)}, slow: true})
}

// restore makes the VM of a snapshot, by its path inside; it is paused, unless resume is true. taps are in the order of nets.
func (c *Client) restore(ctx context.Context, dir string, mode RestoreMode, resume bool, tap *os.File) error {
	body := restoreRequest{SourceURL: fileURL(dir), Mode: mode, Resume: resume}
	var files []*os.File
	if tap != nil {
		body.NetFDs = []restoredNet{{ID: netID, NumFDs: 1}}
		files = []*os.File{tap}
	}
	return c.do(ctx, request{call: "vm.restore", body: body, slow: true, files: files})
}

// ShutdownVM stops the VM without asking the guest; the hypervisor stays.
func (c *Client) ShutdownVM(ctx context.Context) error {
	return c.do(ctx, request{call: "vm.shutdown"})
}

// Delete forgets the VM; the hypervisor stays.
func (c *Client) Delete(ctx context.Context) error { return c.do(ctx, request{call: "vm.delete"}) }

// PowerButton asks the guest to shut down.
func (c *Client) PowerButton(ctx context.Context) error {
	return c.do(ctx, request{call: "vm.power-button"})
}

// Resize changes processors and memory, within what the VM was made for. Zero leaves as is.
func (c *Client) Resize(ctx context.Context, cpus int, memoryBytes int64) error {
	body := map[string]int64{}
	if cpus > 0 {
		body["desired_vcpus"] = int64(cpus)
	}
	if memoryBytes > 0 {
		body["desired_ram"] = memoryBytes
	}
	return c.do(ctx, request{call: "vm.resize", body: body})
}

// ResizeDisk tells the guest the new size of a disk whose image has grown.
func (c *Client) ResizeDisk(ctx context.Context, id string, bytes int64) error {
	return c.do(ctx, request{call: "vm.resize-disk", body: map[string]any{"id": id, "desired_size": bytes}})
}

// Shutdown ends the hypervisor. It may be gone before its answer is out, so an answer that breaks off is a success; who wants to be
// sure waits for the process.
func (c *Client) Shutdown(ctx context.Context) error {
	err := c.do(ctx, request{call: "vmm.shutdown"})
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ECONNREFUSED) {
		return nil
	}
	return err
}

type request struct {
	call   string
	method string // empty means PUT
	body   any    // nil means none, and then there must be none
	answer any
	slow   bool
	files  []*os.File // passed along with the request's first byte
}

func (c *Client) do(ctx context.Context, r request) error {
	limit := c.call
	if r.slow {
		limit = c.slow
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer to %s within %v", r.call, limit))
	defer cancel()
	method := r.method
	if method == "" {
		method = http.MethodPut
	}
	var body io.Reader
	if r.body != nil {
		b, err := json.Marshal(r.body)
		if err != nil {
			return fmt.Errorf("%s: %w", r.call, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost/api/v1/"+r.call, body)
	if err != nil {
		return fmt.Errorf("%s: %w", r.call, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	status, answer, err := c.roundTrip(req, r.files)
	if err != nil {
		if ctx.Err() != nil {
			return &errs.Error{Code: errs.Unavailable, Msg: "the hypervisor does not answer", Err: fmt.Errorf("%s: %w", r.call, context.Cause(ctx))}
		}
		return &errs.Error{Code: errs.Unavailable, Msg: "the hypervisor does not answer", Err: fmt.Errorf("%s: %w", r.call, err)}
	}
	if status < 200 || status > 299 {
		refusal := &APIError{Call: r.call, Status: status, Chain: errorChain(answer)}
		return &errs.Error{Code: statusCodes[status], Msg: "the hypervisor refused " + r.call, Err: refusal}
	}
	if r.answer == nil {
		return nil
	}
	if err := json.Unmarshal(answer, r.answer); err != nil {
		return fmt.Errorf("%s: the answer %q is not what the API promises: %w", r.call, clip(string(answer)), err)
	}
	return nil
}

func (c *Client) roundTrip(req *http.Request, files []*os.File) (status int, answer []byte, err error) {
	transport := &http.Transport{
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 16 << 10,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", c.socket)
			if err != nil || len(files) == 0 {
				return conn, err
			}
			return &rightsConn{UnixConn: conn.(*net.UnixConn), files: files}, nil
		},
	}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return 0, nil, fmt.Errorf("read answer: %w", err)
	}
	if len(answer) > maxAnswer {
		return 0, nil, fmt.Errorf("the answer is longer than %d bytes", maxAnswer)
	}
	return resp.StatusCode, answer, nil
}

// rightsConn sends descriptors along with the first bytes that are written: the request they belong to.
type rightsConn struct {
	*net.UnixConn
	files []*os.File
}

// Write is called by one goroutine, the transport's.
func (c *rightsConn) Write(b []byte) (int, error) {
	if len(c.files) == 0 || len(b) == 0 {
		return c.UnixConn.Write(b)
	}
	var fds []int
	for _, f := range c.files {
		// Not File.Fd, which would make the tap block for everybody who shares it.
		raw, err := f.SyscallConn()
		if err != nil {
			return 0, err
		}
		if err := raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) }); err != nil {
			return 0, err
		}
	}
	n, _, err := c.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	runtime.KeepAlive(c.files)
	if err != nil {
		return n, err
	}
	c.files = nil
	if n < len(b) {
		m, err := c.UnixConn.Write(b[n:])
		return n + m, err
	}
	return n, nil
}

// errorChain is the body of a refusal: a JSON list of messages, or any text at all.
func errorChain(body []byte) []string {
	var chain []string
	if json.Unmarshal(body, &chain) != nil {
		if len(bytes.TrimSpace(body)) == 0 {
			return nil
		}
		chain = []string{string(body)}
	}
	if len(chain) > maxErrLines {
		chain = append(chain[:maxErrLines-1:maxErrLines-1], chain[len(chain)-1])
	}
	for i := range chain {
		chain[i] = clip(chain[i])
	}
	return chain
}

// clip makes text of the hypervisor, which repeats what the guest told it, fit for a log line.
func clip(s string) string {
	if len(s) > maxErrText {
		s = s[:maxErrText] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}
