// Package sandboxd is the life of sandboxes on one node: it creates and kills them, keeps their deadlines, publishes their
// routes, opens connections to their ports, and after a crash takes up what still runs and removes what does not. It knows
// nothing of HTTP. The REST API calls it for its clients, the link's node half for the edges' connections.
package sandboxd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/internal/run"
)

// Options configures a Manager. Machine, Publisher and StateDir are required.
type Options struct {
	StateDir  string // holds one directory per sandbox, and the lock that keeps a second orchestrator out
	Machine   Machine
	Publisher Publisher

	// OnGone is called once when a lifecycle has ended and its route is withdrawn, before its process is killed: wiring resets the link
	// connections. Removal waits for it a second at most.
	OnGone func(sandbox string, generation uint64)

	Templates         []Template    // besides the machine's; where it has none besides base and code-interpreter-v1, and the same ID replaces
	MaxSandboxes      int           // that are not paused; zero means 100; never more than the machine has places
	TeamSandboxes     int           // of one team that are not paused; zero means no limit. The API counts those of all nodes; this one holds for wakes too
	TeamSnapshots     int           // of one team; zero means 100
	ConcurrentCreates int           // of one team, resumes included, and as many pauses and snapshots; zero means 8. All teams together have a quarter more; further ones wait for a while
	MaxTimeout        time.Duration // longest life from start; zero means 24h
	LeaseTTL          time.Duration // of the node's lease; renewed every third of it; zero means 10s
	ReadySlots        int           // slots prepared ahead where the machine can; zero means 2, less than zero none

	// KeepSandboxes leaves sandboxes running when Run ends, for a restarted orchestrator to take up. Otherwise they are killed, and
	// nothing of them stays on the host.
	KeepSandboxes bool

	Log     *zap.Logger
	Metrics *metrics.Set
}

// Limits on what the manager waits for. They are generous: each is for a part that is broken, not for one that is slow.
const (
	queueTime    = 15 * time.Second // for a turn to create or to save
	startTime    = 60 * time.Second // until the guest answers, which may have to boot
	guestTime    = 30 * time.Second // one control call to the guest, whose memory may still be on its way
	publishTime  = 2 * time.Second  // one write to the catalogue
	withdrawTime = time.Second      // delays every kill while the catalogue hangs, so it is short; the routes job repeats it
	maintainTime = 5 * time.Second  // one look at what the machine made on the host
	resetTime    = time.Second      // for the reset of connections; the process is killed even if they will not close
	destroyTime  = 30 * time.Second // one attempt to remove a sandbox
)

// maxStateDir leaves room in a socket's name, which holds 107 bytes, for "/sandboxes/", an ID of 21 bytes and the name of a file.
const maxStateDir = 60

// Manager owns every sandbox of a node. Its methods are safe for concurrent use; those that change something wait until Run has
// reconciled, and answer Unavailable once it stops.
type Manager struct {
	// Fixed after New.
	opts      Options
	machine   Machine
	publisher Publisher
	templates templates
	journal   journal
	slots     *slots
	snapshots *snapshots
	log       *zap.Logger
	stats     *stats
	reached   func(Step) // called after every step of create and removal; the crash tests end the process in it

	ready     chan struct{} // closed by Run when reconcile is done
	closing   chan struct{} // closed by close when Run begins to stop
	close     func()        // any number of times
	creating  *turns        // one per create or resume in progress
	saving    *turns        // one per pause or snapshot in progress
	endMoved  chan struct{} // capacity 1: some deadline changed
	misrouted chan struct{} // capacity 1: the catalogue may disagree with the node
	slotTaken chan struct{} // capacity 1: fewer slots may be ready than should
	leasing   chan struct{} // capacity 1: holds an element while the lease is written

	jobs sync.WaitGroup // whatever a method or a job started; added to under mu while not draining, or by a counted job

	mu             sync.RWMutex // guards the fields below and the changing ones of every life; never held across a wait
	lives          map[string]*life
	draining       bool
	broken         bool // what the machine made on the host is not whole
	lastGeneration uint64
}

// New makes a Manager. It touches nothing on the host; Run does.
func New(opts Options) (*Manager, error) {
	if opts.StateDir == "" || opts.Machine == nil || opts.Publisher == nil {
		return nil, errors.New("sandboxd: StateDir, Machine and Publisher are required")
	}
	dir, err := filepath.Abs(opts.StateDir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if len(dir) > maxStateDir {
		return nil, fmt.Errorf("state directory %q is longer than %d bytes: sockets in it would not fit", dir, maxStateDir)
	}
	opts.StateDir = dir
	opts.MaxSandboxes = cmp.Or(opts.MaxSandboxes, 100)
	opts.TeamSnapshots = cmp.Or(opts.TeamSnapshots, 100)
	opts.ConcurrentCreates = cmp.Or(opts.ConcurrentCreates, 8)
	opts.MaxTimeout = cmp.Or(opts.MaxTimeout, 24*time.Hour)
	opts.LeaseTTL = cmp.Or(opts.LeaseTTL, 10*time.Second)
	opts.ReadySlots = cmp.Or(opts.ReadySlots, 2)
	if opts.OnGone == nil {
		opts.OnGone = func(string, uint64) {}
	}
	if opts.Log == nil {
		opts.Log = zap.NewNop()
	}
	if opts.Metrics == nil {
		opts.Metrics = metrics.NewSet()
	}
	builtin := builtinTemplates
	if _, ok := opts.Machine.(Templates); ok {
		builtin = nil
	}
	m := &Manager{
		opts:      opts,
		machine:   opts.Machine,
		publisher: opts.Publisher,
		templates: newTemplates(opts.Templates, builtin),
		journal:   journal{filepath.Join(dir, "sandboxes"), &reserve{path: filepath.Join(dir, "reserve")}},
		slots:     newSlots(opts.Machine.Slots()),
		snapshots: newSnapshots(filepath.Join(dir, "snapshots")),
		log:       opts.Log.Named("sandboxd"),
		reached:   func(Step) {},
		ready:     make(chan struct{}),
		closing:   make(chan struct{}),
		creating:  newTurns(opts.ConcurrentCreates),
		saving:    newTurns(opts.ConcurrentCreates),
		endMoved:  make(chan struct{}, 1),
		misrouted: make(chan struct{}, 1),
		slotTaken: make(chan struct{}, 1),
		leasing:   make(chan struct{}, 1),
		lives:     make(map[string]*life),
	}
	m.stats = newStats(opts.Metrics, m)
	if places := m.machine.Slots(); m.opts.MaxSandboxes > places {
		m.log.Warn("machine has fewer places than sandboxes were asked for", zap.Int("sandboxes", places))
		m.opts.MaxSandboxes = places
	}
	m.close = sync.OnceFunc(func() { close(m.closing) })
	return m, nil
}

// Ready is closed when Run has reconciled and sandboxes may be created.
func (m *Manager) Ready() <-chan struct{} { return m.ready }

func (m *Manager) isReady() bool {
	select {
	case <-m.ready:
		return true
	default:
		return false
	}
}

// Run takes the state directory, reconciles it with the host, and keeps deadlines, routes and the node's lease until ctx ends. It
// returns when everything that the manager started is done. It may be called once.
func (m *Manager) Run(ctx context.Context) error {
	defer m.jobs.Wait()
	defer m.close()
	if err := os.MkdirAll(m.journal.dir, 0o711); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	lock, err := lockDir(m.opts.StateDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := m.snapshots.load(m.log); err != nil {
		return err
	}
	if err := m.machine.Setup(ctx); err != nil {
		return fmt.Errorf("prepare the host for the %s machine: %w", m.machine.Name(), err)
	}
	var jobs run.Group
	jobs.Add("reconcile", m.takeOver)
	jobs.Add("lease", m.keepLease) // at once: what has been taken up is reached again while the rest is still being looked at
	jobs.Add("host", m.whenReady(m.keepHost))
	jobs.Add("journal", m.keepJournal)
	jobs.Add("deadlines", m.whenReady(m.keepDeadlines))
	jobs.Add("routes", m.whenReady(m.keepRoutes))
	jobs.Add("slots", m.whenReady(m.keepReady))
	jobs.Add("snapshots", m.whenReady(m.keepSnapshots))
	err = jobs.Run(ctx)
	if !m.isReady() {
		return err // what the records say is left to the next start
	}
	return errors.Join(err, m.stop())
}

// Capacity is what the node says of itself in its lease.
func (m *Manager) Capacity() Capacity {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return Capacity{
		Sandboxes:    m.activeLocked(),
		MaxSandboxes: m.opts.MaxSandboxes,
		Machine:      m.machine.Name(),
		Draining:     m.draining || m.broken || !m.isReady(),
	}
}

// Get returns a sandbox that runs or is paused, or is between the two.
func (m *Manager) Get(id string) (Sandbox, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	l, err := m.shown(id)
	if err != nil {
		return Sandbox{}, err
	}
	return l.rec.Sandbox, nil
}

// List returns all sandboxes that run or are paused, or are between the two, in no order.
func (m *Manager) List() []Sandbox {
	m.mu.RLock()
	defer m.mu.RUnlock()
	all := make([]Sandbox, 0, len(m.lives))
	for _, l := range m.lives {
		if l.visible() {
			all = append(all, l.rec.Sandbox)
		}
	}
	return all
}

func (m *Manager) count() int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return len(m.lives)
}

func (m *Manager) active() int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.activeLocked()
}

// activeLocked counts the sandboxes that have, or may have, anything on the host besides their directory.
func (m *Manager) activeLocked() (n int) {
	for _, l := range m.lives {
		if l.place.Slot != NoSlot {
			n++
		}
	}
	return n
}

// activeOfLocked counts those of one team.
func (m *Manager) activeOfLocked(team string) (n int) {
	for _, l := range m.lives {
		if l.place.Slot != NoSlot && l.rec.Sandbox.Team == team && !l.condemned() {
			n++
		}
	}
	return n
}

// enter begins a method that changes something: it waits until the node is ready and makes Run wait for leave.
func (m *Manager) enter(ctx context.Context) (leave func(), err error) {
	select {
	case <-m.ready:
	case <-m.closing:
		return nil, errStopping
	case <-ctx.Done():
		return nil, &errs.Error{Code: errs.Unavailable, Msg: "the node is starting", Err: ctx.Err()}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.draining {
		return nil, errStopping
	}
	m.jobs.Add(1)
	return m.jobs.Done, nil
}

var errStopping = errs.New(errs.Unavailable, "the node is stopping")

// keepHost has the machine look after what it made on the host, as often as the lease is renewed. While that is broken the node takes no new
// sandboxes; those that run are left alone, because their own fence is inside their own network.
func (m *Manager) keepHost(ctx context.Context) error {
	tick := time.NewTicker(m.opts.LeaseTTL / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		err := m.maintain(ctx)
		if ctx.Err() != nil {
			return nil
		}
		m.mu.Lock()
		was := m.broken
		m.broken = err != nil
		m.mu.Unlock()
		switch {
		case err != nil:
			m.stats.hostBroken.Inc()
			if !was {
				m.log.Warn("host is not as the machine left it, no new sandboxes until it is", zap.Error(err))
			}
		case was:
			m.log.Info("host is whole again")
		}
	}
}

func (m *Manager) maintain(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, maintainTime)
	defer cancel()
	return m.machine.Maintain(ctx)
}

// stop ends all lives, or leaves the committed and the paused ones to the next run, and waits for every goroutine. When no sandbox is
// left but paused ones, nothing of the machine stays on the host either.
func (m *Manager) stop() error {
	m.mu.Lock()
	m.draining = true
	for _, l := range m.lives {
		if l.rec.Sandbox.State == StateCreating || !m.opts.KeepSandboxes {
			m.condemnLocked(l, GoneShutdown)
		}
	}
	m.mu.Unlock()
	m.close()
	m.announce(context.Background())
	m.jobs.Wait()
	readyErr := m.removeReady()
	if n := m.active(); n > 0 && m.opts.KeepSandboxes {
		return errors.Join(m.releaseAll(), readyErr)
	}
	if n := m.count(); n > 0 && !m.opts.KeepSandboxes {
		return fmt.Errorf("%d sandboxes could not be removed; the next start will try again", n)
	}
	if readyErr != nil {
		return readyErr
	}
	ctx, cancel := context.WithTimeout(context.Background(), destroyTime)
	defer cancel()
	if err := m.machine.Close(ctx); err != nil {
		return fmt.Errorf("remove what the %s machine made on the host: %w", m.machine.Name(), err)
	}
	return nil
}

// releaseAll lets go of the sandboxes that stay. Nobody else is left who could use their instances.
func (m *Manager) releaseAll() error {
	var failures []error
	for _, l := range m.lives {
		if l.instance == nil {
			continue
		}
		if err := l.instance.Release(); err != nil {
			failures = append(failures, fmt.Errorf("let go of sandbox %s: %w", l.id, err))
		}
	}
	if err := m.machine.Release(); err != nil {
		failures = append(failures, fmt.Errorf("let go of the %s machine: %w", m.machine.Name(), err))
	}
	return errors.Join(failures...)
}
