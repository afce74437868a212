package sandboxd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

// fakeHost is a host in memory: networks and processes that exist until somebody removes them, whatever becomes of the manager
// that made them. fakeMachine works on it as the real machines do on the kernel, and passes the same suite.
type fakeHost struct {
	mu       sync.Mutex
	networks map[int]*fakeNetwork
	procs    map[string]*fakeProc
	log      []string // what happened, in order

	fail map[string]error         // by name of what is asked for; stays until removed
	hold map[string]chan struct{} // the same: waits until closed or its context ends
}

type fakeNetwork struct {
	fence    egress.Policy
	fenced   bool
	prepared bool // and not taken yet
}

type fakeProc struct {
	host      *fakeHost
	id        string
	dir       string
	slot      int
	committed bool
	init      guest.InitRequest
	memory    string // what runs in it: tests write it and look for it
	booted    bool   // its memory began empty
	frozen    bool
	went      []guest.ResumeRequest // when it went on
	done      chan struct{}
	err       error
	listeners map[uint16]net.Listener
}

func newFakeHost() *fakeHost {
	return &fakeHost{
		networks: make(map[int]*fakeNetwork), procs: make(map[string]*fakeProc),
		fail: make(map[string]error), hold: make(map[string]chan struct{}),
	}
}

// crash returns the host as it is after the orchestrator died at this moment: what was not committed dies with it.
func (h *fakeHost) crash() *fakeHost {
	h.mu.Lock()
	defer h.mu.Unlock()
	after := newFakeHost()
	for slot, n := range h.networks {
		after.networks[slot] = new(*n)
	}
	for id, p := range h.procs {
		if p.committed {
			after.procs[id] = &fakeProc{
				host: after, id: id, slot: p.slot, committed: true, init: p.init, memory: p.memory, booted: p.booted, frozen: p.frozen,
				done: make(chan struct{}), listeners: p.listeners,
			}
		}
	}
	return after
}

// leftovers names everything that exists.
func (h *fakeHost) leftovers() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []string
	for slot := range h.networks {
		all = append(all, fmt.Sprintf("network %d", slot))
	}
	for id := range h.procs {
		all = append(all, "process "+id)
	}
	slices.Sort(all)
	return all
}

func (h *fakeHost) note(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.log = append(h.log, fmt.Sprintf(format, args...))
}

func (h *fakeHost) events() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.log)
}

func (h *fakeHost) setFail(what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail[what] = err
}

// holdUp makes what wait until the returned function is called.
func (h *fakeHost) holdUp(what string) (release func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := make(chan struct{})
	h.hold[what] = c
	return sync.OnceFunc(func() { close(c) })
}

func (h *fakeHost) holdNothing() {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.hold)
}

func (h *fakeHost) ask(ctx context.Context, what string) error {
	h.mu.Lock()
	err, hold := h.fail[what], h.hold[what]
	h.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return ctx.Err()
}

// askOnce is for a failure that does not come again.
func (h *fakeHost) askOnce(what string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	err := h.fail[what]
	delete(h.fail, what)
	return err
}

func (h *fakeHost) proc(id string) *fakeProc {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.procs[id]
}

func (h *fakeHost) fence(slot int) egress.Policy {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.networks[slot].fence
}

// die ends a process as if it had done so by itself.
func (h *fakeHost) die(id string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dieLocked(h.procs[id], err)
}

func (h *fakeHost) dieLocked(p *fakeProc, err error) {
	select {
	case <-p.done:
		return
	default:
	}
	p.err = err
	close(p.done)
	for _, ln := range p.listeners {
		ln.Close()
	}
	delete(h.procs, p.id)
}

// remember writes what runs in a sandbox.
func (h *fakeHost) remember(id, memory string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.procs[id].memory = memory
}

// look returns a copy of a process as it is, without what only tests in it need; nil when there is none.
func (h *fakeHost) look(id string) *fakeProc {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.procs[id] == nil {
		return nil
	}
	return new(*h.procs[id])
}

type fakeMachine struct {
	host  *fakeHost
	slots int
}

// plainMachine is one that can do no more than every machine.
type plainMachine struct{ Machine }

func (m fakeMachine) Name() string                    { return "fake" }
func (m fakeMachine) Slots() int                      { return m.slots }
func (m fakeMachine) Setup(ctx context.Context) error { return m.host.ask(ctx, "setup") }
func (m fakeMachine) Maintain(ctx context.Context) error {
	return m.host.ask(ctx, "maintain")
}
func (m fakeMachine) Release() error { return nil }
func (m fakeMachine) Close(context.Context) error {
	if left := m.host.leftovers(); len(left) > 0 {
		return fmt.Errorf("closed while %q exist", left)
	}
	m.host.note("close")
	return nil
}

func (m fakeMachine) Start(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (Instance, error) {
	proc, err := m.enter(ctx, p, fence, reached)
	if err != nil {
		return nil, err
	}
	proc.booted = true
	if p.Root != "" {
		memory, err := os.ReadFile(p.Root + "/memory")
		if err != nil {
			return nil, err
		}
		proc.memory, proc.booted = string(memory), false
	}
	if err := os.WriteFile(p.Dir+"/rw", []byte("private layer"), 0o600); err != nil {
		return nil, err
	}
	reached(StepLayer)
	return proc, m.launch(ctx, proc, reached)
}

// enter gives a place its network with the rules in it.
func (m fakeMachine) enter(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (*fakeProc, error) {
	h := m.host
	h.mu.Lock()
	if n := h.networks[p.Slot]; n != nil && !n.prepared || h.procs[p.ID] != nil {
		h.mu.Unlock()
		return nil, fmt.Errorf("slot %d or sandbox %s exists", p.Slot, p.ID)
	}
	h.networks[p.Slot] = &fakeNetwork{}
	h.mu.Unlock()
	if err := h.ask(ctx, "network"); err != nil { // half made
		return nil, err
	}
	reached(StepNetwork)
	if err := h.ask(ctx, "fence"); err != nil {
		return nil, err
	}
	h.mu.Lock()
	*h.networks[p.Slot] = fakeNetwork{fence: fence, fenced: true}
	h.mu.Unlock()
	reached(StepFence)
	return &fakeProc{host: h, id: p.ID, dir: p.Dir, slot: p.Slot, done: make(chan struct{}), listeners: make(map[uint16]net.Listener)}, nil
}

// launch begins the process.
func (m fakeMachine) launch(ctx context.Context, proc *fakeProc, reached func(Step)) error {
	h := m.host
	h.mu.Lock()
	h.procs[proc.id] = proc
	h.mu.Unlock()
	reached(StepProcess)
	reached(StepRestored)
	if err := h.ask(ctx, "start"); err != nil {
		return err
	}
	reached(StepStarted)
	return nil
}

// Prepare makes the network of a slot ahead.
func (m fakeMachine) Prepare(ctx context.Context, slot int) error {
	m.host.mu.Lock()
	exists := m.host.networks[slot] != nil
	m.host.networks[slot] = &fakeNetwork{prepared: true}
	m.host.mu.Unlock()
	if exists {
		return fmt.Errorf("slot %d exists", slot)
	}
	return m.host.ask(ctx, "prepare")
}

// fakeSaved is the file in which a paused sandbox is kept.
type fakeSaved struct {
	HasMemory bool
	Memory    string
	Init      guest.InitRequest
}

// stepWritten is between two steps: all is saved, and the process still there.
const stepWritten Step = "written"

func (m fakeMachine) Suspend(ctx context.Context, p Place, i Instance, memory bool, reached func(Step)) (err error) {
	proc, h := i.(*fakeProc), m.host
	if !memory {
		if err := h.ask(ctx, "sync"); err != nil {
			return err
		}
	}
	if err := h.ask(ctx, "freeze"); err != nil {
		return err
	}
	proc.freeze(true)
	defer func() {
		if err != nil {
			proc.freeze(false)
		}
	}()
	reached(StepFrozen)
	if err := h.ask(ctx, "save"); err != nil {
		return err
	}
	saved := fakeSaved{HasMemory: memory, Init: proc.init}
	if memory {
		saved.Memory = proc.memory
	}
	if err := saved.write(p); err != nil {
		return err
	}
	reached(stepWritten)
	h.mu.Lock()
	h.dieLocked(proc, errors.New("suspended"))
	h.mu.Unlock()
	h.note("suspend %s", p.ID)
	reached(StepSaved)
	return nil
}

func (s fakeSaved) write(p Place) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.WriteFile(p.Dir+"/saved.new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(p.Dir+"/saved.new", p.Dir+"/saved")
}

func readFakeSaved(p Place) (s fakeSaved, err error) {
	text, err := os.ReadFile(p.Dir + "/saved")
	if errors.Is(err, os.ErrNotExist) {
		return s, errs.New(errs.NotFound, "nothing was saved")
	}
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, errs.New(errs.Unavailable, "the saved memory is damaged; the disk is kept")
	}
	return s, nil
}

func (m fakeMachine) Saved(p Place) (Saved, error) {
	s, err := readFakeSaved(p)
	return Saved{Memory: s.HasMemory, Bytes: int64(len(s.Memory))}, err
}

func (m fakeMachine) DropMemory(p Place) error {
	if err := m.host.ask(context.Background(), "drop"); err != nil {
		return err
	}
	s, err := readFakeSaved(p)
	if err != nil && errs.CodeOf(err) != errs.Unavailable {
		return err
	}
	s.HasMemory, s.Memory = false, ""
	return s.write(p)
}

func (m fakeMachine) Resume(ctx context.Context, p Place, fence egress.Policy, reached func(Step)) (Suspended, error) {
	saved, err := readFakeSaved(p)
	if err != nil {
		return nil, err
	}
	proc, err := m.enter(ctx, p, fence, reached)
	if err != nil {
		return nil, err
	}
	reached(StepLayer)
	if saved.HasMemory {
		proc.init, proc.memory, proc.frozen = saved.Init, saved.Memory, true
	}
	proc.booted = !saved.HasMemory
	if err := m.launch(ctx, proc, reached); err != nil {
		return nil, err
	}
	return proc, nil
}

func (m fakeMachine) Snapshot(ctx context.Context, p Place, i Instance, dir string) error {
	proc := i.(*fakeProc)
	proc.freeze(true)
	defer proc.freeze(false)
	if err := m.host.ask(ctx, "snapshot"); err != nil {
		return err
	}
	m.host.mu.Lock()
	memory := proc.memory
	m.host.mu.Unlock()
	return os.WriteFile(dir+"/memory", []byte(memory), 0o600)
}

func (p *fakeProc) freeze(frozen bool) {
	p.host.mu.Lock()
	defer p.host.mu.Unlock()
	p.frozen = frozen
}

func (p *fakeProc) Memory() bool { return !p.booted }

// Continue gives up the saved memory before the process goes on.
func (p *fakeProc) Continue(ctx context.Context, r guest.ResumeRequest) error {
	if err := p.host.ask(ctx, "continue"); err != nil {
		return err
	}
	place := Place{Dir: p.dir}
	if saved, err := readFakeSaved(place); err == nil {
		saved.HasMemory, saved.Memory = false, ""
		if err := saved.write(place); err != nil {
			return err
		}
	}
	p.host.mu.Lock()
	p.frozen = false
	p.went = append(p.went, r)
	p.host.mu.Unlock()
	if err := p.host.ask(ctx, "after continue"); err != nil {
		return fmt.Errorf("%w: %w", errUntold, err)
	}
	return nil
}

func (m fakeMachine) Adopt(ctx context.Context, p Place, handle json.RawMessage) (Instance, error) {
	if err := m.host.ask(ctx, "adopt"); err != nil {
		return nil, err
	}
	var id string
	if err := json.Unmarshal(handle, &id); err != nil {
		return nil, err
	}
	m.host.mu.Lock()
	defer m.host.mu.Unlock()
	proc := m.host.procs[id]
	if proc == nil || proc.slot != p.Slot || m.host.networks[p.Slot] == nil {
		return nil, errors.New("no such process")
	}
	proc.dir = p.Dir
	return proc, nil
}

func (m fakeMachine) Destroy(ctx context.Context, p Place, reached func(Step)) error {
	h := m.host
	if err := h.ask(ctx, "destroy"); err != nil {
		return err
	}
	h.note("stop %s", p.ID)
	h.mu.Lock()
	for id, proc := range h.procs {
		if id == p.ID || p.ID == "" && proc.slot == p.Slot {
			h.dieLocked(proc, errors.New("killed"))
		}
	}
	h.mu.Unlock()
	reached(StepStopped)
	if err := h.ask(ctx, "unwire"); err != nil {
		return err
	}
	h.note("unwire %s", p.ID)
	h.mu.Lock()
	delete(h.networks, p.Slot)
	h.mu.Unlock()
	reached(StepUnwired)
	return nil
}

func (m fakeMachine) Log(p Place, max int64) ([]byte, error) {
	text := "console of " + p.ID
	return []byte(text[:min(int64(len(text)), max)]), m.host.ask(context.Background(), "log")
}

func (m fakeMachine) Occupied(ctx context.Context) ([]int, error) {
	if err := m.host.ask(ctx, "occupied"); err != nil {
		return nil, err
	}
	m.host.mu.Lock()
	defer m.host.mu.Unlock()
	return slices.Collect(maps.Keys(m.host.networks)), nil
}

func (p *fakeProc) Handle() json.RawMessage { return json.RawMessage(fmt.Sprintf("%q", p.id)) }
func (p *fakeProc) Done() <-chan struct{}   { return p.done }
func (p *fakeProc) Err() error              { return p.err }
func (p *fakeProc) Release() error          { p.host.note("release %s", p.id); return nil }
func (p *fakeProc) Commit() error {
	if err := p.host.ask(context.Background(), "commit"); err != nil {
		return err
	}
	p.host.mu.Lock()
	defer p.host.mu.Unlock()
	p.committed = true
	return nil
}

func (p *fakeProc) Init(ctx context.Context, r guest.InitRequest) error {
	p.host.mu.Lock()
	p.init = r
	p.host.mu.Unlock()
	return p.host.ask(ctx, "init")
}
func (p *fakeProc) Health(ctx context.Context) error { return p.host.ask(ctx, "health") }
func (p *fakeProc) Metrics(ctx context.Context) (guest.Metrics, error) {
	err := p.host.ask(ctx, "metrics")
	if errors.Is(err, errPanic) {
		panic(err)
	}
	return guest.Metrics{CPUCount: 2, CPUUsedPct: 12.5}, err
}

// errPanic makes what it fails panic.
var errPanic = errors.New("index out of range")

func (p *fakeProc) SetFence(ctx context.Context, fence egress.Policy) error {
	if err := p.host.ask(ctx, "set fence"); err != nil {
		return err
	}
	p.host.mu.Lock()
	*p.host.networks[p.slot] = fakeNetwork{fence: fence, fenced: true}
	p.host.mu.Unlock()
	return p.host.askOnce("after set fence")
}

func (p *fakeProc) Refusals() (egress.Refusals, error) {
	return egress.Refusals{Denied: 3}, p.host.ask(context.Background(), "refusals")
}

// listen opens a port inside the sandbox; it is a real one, so tests in a bubble of time must not.
func (p *fakeProc) listen(port uint16) (net.Listener, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p.host.mu.Lock()
	defer p.host.mu.Unlock()
	p.listeners[port] = ln
	return ln, nil
}

func (p *fakeProc) DialPort(ctx context.Context, port uint16) (net.Conn, error) {
	if err := p.host.ask(ctx, "dial"); err != nil {
		return nil, err
	}
	p.host.mu.Lock()
	ln := p.listeners[port]
	p.host.mu.Unlock()
	if ln == nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", ln.Addr().String())
}

// fakeCatalogue is a store of routes in memory that can be down and can lose its data.
type fakeCatalogue struct {
	mu     sync.Mutex
	routes map[string]Published
	node   Capacity
	leases int
	writes int
	down   error
	late   time.Duration // how long the next announcement takes
	note   func(format string, args ...any)
}

func newFakeCatalogue() *fakeCatalogue {
	return &fakeCatalogue{routes: make(map[string]Published), note: func(string, ...any) {}}
}

func (c *fakeCatalogue) setDown(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = err
}

func (c *fakeCatalogue) loseData() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.routes)
}

func (c *fakeCatalogue) route(id string) (Published, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.routes[id]
	return p, ok
}

// lease is how often it was renewed and what was said last.
func (c *fakeCatalogue) lease() (times int, said Capacity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leases, c.node
}

func (c *fakeCatalogue) all() map[string]Published {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.routes)
}

func (c *fakeCatalogue) Publish(_ context.Context, p Published) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down != nil {
		return c.down
	}
	if c.routes[p.Sandbox].Generation > p.Generation {
		return errs.New(errs.Conflict, "lower generation")
	}
	c.writes++
	c.routes[p.Sandbox] = p
	c.note("publish %s", p.Sandbox)
	return nil
}

func (c *fakeCatalogue) Withdraw(_ context.Context, sandbox string, generation uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down != nil {
		return c.down
	}
	c.writes++
	if c.routes[sandbox].Generation == generation {
		delete(c.routes, sandbox)
	}
	c.note("withdraw %s", sandbox)
	return nil
}

func (c *fakeCatalogue) Published(context.Context) ([]Published, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Values(c.routes)), c.down
}

func (c *fakeCatalogue) Announce(_ context.Context, node Capacity) error {
	c.mu.Lock()
	late := c.late
	c.late = 0
	c.mu.Unlock()
	time.Sleep(late)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down != nil {
		return c.down
	}
	c.node = node
	c.leases++
	return nil
}
