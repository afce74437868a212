package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

// sleepyMachine is a machine of one kind of sandbox: a server somewhere, of which it remembers whether it is saved. All ports of all
// sandboxes lead there.
type sleepyMachine struct {
	server string

	mu      sync.Mutex // guards the fields below
	saved   map[string]sandboxd.Saved
	resumes int
	gate    chan struct{} // what a Suspend waits for; nil: nothing
}

func (*sleepyMachine) Name() string                                                       { return "sleepy" }
func (*sleepyMachine) Slots() int                                                         { return 16 }
func (*sleepyMachine) Setup(context.Context) error                                        { return nil }
func (*sleepyMachine) Maintain(context.Context) error                                     { return nil }
func (*sleepyMachine) Close(context.Context) error                                        { return nil }
func (*sleepyMachine) Release() error                                                     { return nil }
func (*sleepyMachine) Destroy(context.Context, sandboxd.Place, func(sandboxd.Step)) error { return nil }
func (*sleepyMachine) Occupied(context.Context) ([]int, error)                            { return nil, nil }
func (*sleepyMachine) Log(sandboxd.Place, int64) ([]byte, error)                          { return nil, nil }
func (*sleepyMachine) Snapshot(context.Context, sandboxd.Place, sandboxd.Instance, string) error {
	return errs.New(errs.Invalid, "this machine takes no snapshots")
}

func (m *sleepyMachine) Start(context.Context, sandboxd.Place, egress.Policy, func(sandboxd.Step)) (sandboxd.Instance, error) {
	return &sleepyInstance{server: m.server, done: make(chan struct{})}, nil
}

func (m *sleepyMachine) Adopt(context.Context, sandboxd.Place, json.RawMessage) (sandboxd.Instance, error) {
	return nil, errs.New(errs.NotFound, "nothing outlives this machine")
}

func (m *sleepyMachine) Suspend(ctx context.Context, p sandboxd.Place, _ sandboxd.Instance, memory bool, _ func(sandboxd.Step)) error {
	m.mu.Lock()
	gate := m.gate
	m.mu.Unlock()
	if gate != nil {
		select {
		case gate <- struct{}{}: // it has begun
		case <-ctx.Done():
			return ctx.Err()
		}
		select {
		case <-gate: // it may go on
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saved[p.ID] = sandboxd.Saved{Memory: memory, Bytes: 1}
	return nil
}

func (m *sleepyMachine) Resume(_ context.Context, p sandboxd.Place, _ egress.Policy, _ func(sandboxd.Step)) (sandboxd.Suspended, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.resumes++
	return &sleepyInstance{server: m.server, memory: m.saved[p.ID].Memory, done: make(chan struct{})}, nil
}

func (m *sleepyMachine) DropMemory(p sandboxd.Place) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saved[p.ID] = sandboxd.Saved{Bytes: 1}
	return nil
}

func (m *sleepyMachine) Saved(p sandboxd.Place) (sandboxd.Saved, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	saved, ok := m.saved[p.ID]
	if !ok {
		return saved, errs.New(errs.NotFound, "nothing is saved")
	}
	return saved, nil
}

func (m *sleepyMachine) resumed() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resumes
}

type sleepyInstance struct {
	server string
	memory bool
	done   chan struct{}
}

func (*sleepyInstance) Handle() json.RawMessage                             { return json.RawMessage(`{}`) }
func (*sleepyInstance) Commit() error                                       { return nil }
func (*sleepyInstance) Init(context.Context, guest.InitRequest) error       { return nil }
func (*sleepyInstance) Health(context.Context) error                        { return nil }
func (*sleepyInstance) SetFence(context.Context, egress.Policy) error       { return nil }
func (*sleepyInstance) Refusals() (egress.Refusals, error)                  { return egress.Refusals{}, nil }
func (*sleepyInstance) Release() error                                      { return nil }
func (*sleepyInstance) Err() error                                          { return nil }
func (*sleepyInstance) Continue(context.Context, guest.ResumeRequest) error { return nil }
func (*sleepyInstance) Metrics(context.Context) (guest.Metrics, error)      { return guest.Metrics{}, nil }
func (i *sleepyInstance) Memory() bool                                      { return i.memory }
func (i *sleepyInstance) Done() <-chan struct{}                             { return i.done }
func (i *sleepyInstance) DialPort(ctx context.Context, _ uint16) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", i.server)
}

// system is an edge and a node, and how a client of the one reaches the other.
type system struct {
	t       *testing.T
	machine *sleepyMachine
	node    *Node
	client  *http.Client
	metrics *metrics.Set // of the edge
}

// startSystem starts both, joined over the network or by a function call.
func startSystem(t *testing.T, direct bool) *system {
	t.Helper()
	listen := func() net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s of %d", r.Method, len(body))
	}))
	t.Cleanup(server.Close)
	s := &system{t: t, metrics: metrics.NewSet()}
	s.machine = &sleepyMachine{server: server.Listener.Addr().String(), saved: make(map[string]sandboxd.Saved)}
	store, key := routing.NewMemoryStore(), []byte("0123456789abcdef0123456789abcdef")
	apiLn, httpLn := listen(), listen()
	opts := NodeOptions{
		ID: "n1", Domain: "sluice.test", Store: store, Keys: auth.NewMemoryKeys(), ClusterKey: key, Machine: s.machine, StateDir: t.TempDir(),
		API: apiLn, APIAddr: apiLn.Addr().String(), LinkAddr: "direct", Log: zap.NewNop(), Metrics: metrics.NewSet(),
	}
	if !direct {
		opts.Link = listen()
		opts.LinkAddr = opts.Link.Addr().String()
	}
	var err error
	if s.node, err = NewNode(opts); err != nil {
		t.Fatal(err)
	}
	dial := s.node.Dial
	if !direct {
		dial = (&link.Dialer{Key: key}).Dial
	}
	edge, err := NewEdge(EdgeOptions{
		Domains: []string{"sluice.test"}, Store: store, Dial: dial, HTTP: httpLn, Log: zap.NewNop(), Metrics: s.metrics,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var jobs sync.WaitGroup
	for name, run := range map[string]func(context.Context) error{"node": s.node.Run, "edge": edge.Run} {
		jobs.Go(func() {
			if err := run(ctx); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", httpLn.Addr().String())
	}}
	s.client = &http.Client{Transport: tr, Timeout: 30 * time.Second}
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		cancel()
		jobs.Wait()
	})
	<-s.node.Ready()
	return s
}

// ask sends a request to a port of a sandbox and returns the answer.
func (s *system) ask(method string, port int, sandbox, body string, fields ...string) (int, string) {
	url := fmt.Sprintf("http://%d-%s.sluice.test/x", port, sandbox)
	req, err := http.NewRequestWithContext(context.Background(), method, url, strings.NewReader(body))
	if err != nil {
		s.t.Error(err)
		return 0, ""
	}
	for i := 0; i+1 < len(fields); i += 2 {
		req.Header.Set(fields[i], fields[i+1])
	}
	resp, err := s.client.Do(req)
	if err != nil {
		s.t.Error(err)
		return 0, ""
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Error(err)
	}
	return resp.StatusCode, string(answer)
}

func (s *system) wantResumes(want int) {
	s.t.Helper()
	if got := s.machine.resumed(); got != want {
		s.t.Errorf("%d resumes, want %d", got, want)
	}
}

// The whole way of a request that wakes a sandbox: edge, link, manager, route, and back, over the network and as `sluice dev` has it.
func TestTrafficWakesAPausedSandbox(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run(map[bool]string{false: "network", true: "direct"}[direct], func(t *testing.T) {
			s := startSystem(t, direct)
			sb, err := s.node.manager.Create(t.Context(), sandboxd.CreateSpec{
				Template: "base", Timeout: time.Minute, TokenHash: auth.HashToken([]byte("visitor")), EnvdToken: "agent", AutoResume: true,
			})
			if err != nil {
				t.Fatal(err)
			}
			pause := func(memory bool) {
				t.Helper()
				if err := s.node.manager.Pause(t.Context(), sb.ID, memory); err != nil {
					t.Fatal(err)
				}
			}
			const header = "e2b-traffic-access-token"
			wantAnswer := func(what string, want int, port int, fields ...string) {
				t.Helper()
				if status, body := s.ask("GET", port, sb.ID, "", fields...); status != want {
					t.Errorf("%s: %d %s, want %d", what, status, body, want)
				}
			}
			wantAnswer("running", 200, 3000, header, "visitor")
			pause(true)
			wantAnswer("paused, no token", 403, 3000)
			wantAnswer("paused, wrong token", 403, 3000, header, "stranger")
			wantAnswer("paused, the agent's port without its token", 403, 49983)
			wantAnswer("paused, the agent's port with the other token", 403, 49983, "X-Access-Token", "visitor")
			s.wantResumes(0)
			if got, err := s.node.manager.Get(sb.ID); err != nil || got.State != sandboxd.StatePaused {
				t.Fatalf("it is %s, %v, want paused", got.State, err)
			}

			var clients sync.WaitGroup
			for i := range 100 {
				clients.Go(func() {
					method, body := "GET", ""
					if i%2 == 1 {
						method, body = "POST", strings.Repeat("x", 8<<10)
					}
					status, answer := s.ask(method, 3000, sb.ID, body, header, "visitor")
					if want := fmt.Sprintf("%s of %d", method, len(body)); status != 200 || answer != want {
						t.Errorf("%d %q, want 200 %q", status, answer, want)
					}
				})
			}
			clients.Wait()
			s.wantResumes(1)

			pause(true)
			wantAnswer("the agent's port with its token", 200, 49983, "X-Access-Token", "agent")
			s.wantResumes(2)

			// A request in the middle of a pause waits for its end, and then for the resume.
			gate := make(chan struct{})
			s.machine.mu.Lock()
			s.machine.gate = gate
			s.machine.mu.Unlock()
			paused, answered := make(chan error, 1), make(chan struct{})
			go func() { paused <- s.node.manager.Pause(context.Background(), sb.ID, true) }()
			<-gate
			go func() {
				defer close(answered)
				wantAnswer("while it is being paused", 200, 3000, header, "visitor")
			}()
			for waiting := s.metrics.GetOrCreateCounter("sluice_proxy_wake_waiting"); waiting.Get() == 0; time.Sleep(time.Millisecond) {
				select {
				case <-answered:
					t.Fatal("answered by a sandbox that stands still")
				default:
				}
			}
			gate <- struct{}{}
			<-answered
			if err := <-paused; err != nil {
				t.Errorf("pause: %v", err)
			}
			s.wantResumes(3)
			s.machine.mu.Lock()
			s.machine.gate = nil
			s.machine.mu.Unlock()

			// Without its memory it would boot anew, which traffic does not ask for.
			pause(false)
			wantAnswer("paused without memory", 502, 3000, header, "visitor")
			s.wantResumes(3)
		})
	}
}
