package sandboxd

import (
	"context"
	"crypto/rand"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

// GoneReason says why a sandbox ended; it is the label of a counter.
type GoneReason string

// The reasons.
const (
	GoneKilled       GoneReason = "killed"        // a client asked for it
	GoneTimeout      GoneReason = "timeout"       // its deadline came
	GoneDied         GoneReason = "died"          // its process ended by itself
	GoneCreateFailed GoneReason = "create_failed" // it never ran
	GoneLost         GoneReason = "lost"          // after a restart of the node it was not whole
	GoneShutdown     GoneReason = "shutdown"      // the node stopped
)

var goneReasons = []GoneReason{GoneKilled, GoneTimeout, GoneDied, GoneCreateFailed, GoneLost, GoneShutdown}

// life is one sandbox from reserve to the end, over all its lifecycles: each pause ends one, and each resume begins another, with a
// generation and a slot of its own. Whoever holds its turn is the one goroutine that may act on it; the state says what that goroutine is
// doing to everybody else. A transition (creating, killing, and for machines that can: pausing, resuming) is entered under Manager.mu
// and left by the holder of the turn.
type life struct {
	// Fixed when registered.
	id     string
	log    *zap.Logger
	turn   chan struct{}   // capacity 1; holding it is having sent to it
	ctx    context.Context // ends when the sandbox is condemned, and with it whatever the holder of the turn is waiting for
	cancel context.CancelFunc

	buried chan struct{} // closed after the first attempt to remove it; buryErr is what came of that

	// Guarded by Manager.mu, and changed by the holder of the turn alone, who reads them without it.
	generation uint64 // of its present lifecycle; of a paused sandbox the last one, which its route still names
	place      Place  // its slot is NoSlot when nothing of it is on the host but the directory
	instance   Instance
	up         context.Context // ends when this lifecycle is not to be reached any more; not nil when instance is not
	down       context.CancelFunc

	// Guarded by Manager.mu.
	rec record
	// unrecorded says that the record on disk is not rec, because it could not be written.
	unrecorded bool
	reason     GoneReason // empty until condemned
	samples    samples
	refused    egress.Refusals // by this lifecycle, as of the last look
	revival    *revival        // the resume that is under way or waits for the end of a pause; nil when there is none
	wakeAfter  time.Time       // after a wake that failed
	atEnd      atEnd

	// Owned by the holder of the turn.
	routed  bool            // a route may exist
	reset   <-chan struct{} // closed when OnGone has returned; nil before it was called for this lifecycle
	buryErr error           // written before buried is closed
}

func newLife(rec record, place Place, log *zap.Logger) *life {
	ctx, cancel := context.WithCancel(context.Background())
	return &life{
		id:         rec.Sandbox.ID,
		generation: rec.Sandbox.Generation,
		place:      place,
		log:        log.With(zap.String("sandbox", rec.Sandbox.ID)),
		turn:       make(chan struct{}, 1),
		ctx:        ctx,
		cancel:     cancel,
		buried:     make(chan struct{}),
		rec:        rec,
	}
}

func (m *Manager) place(rec record) Place {
	return Place{
		ID:        rec.Sandbox.ID,
		Dir:       m.journal.path(rec.Sandbox.ID),
		Slot:      rec.Slot,
		Root:      rec.Root,
		CPUs:      rec.Sandbox.CPUs,
		MemoryMiB: rec.Sandbox.MemoryMiB,
		DiskMiB:   rec.Sandbox.DiskMiB,
	}
}

// visible tells whether clients may see the sandbox. Manager.mu is held.
func (l *life) visible() bool {
	switch l.rec.Sandbox.State {
	case StateRunning, StatePausing, StatePaused, StateResuming:
		return true
	}
	return false
}

// shown finds a sandbox that clients may see. Manager.mu is held.
func (m *Manager) shown(id string) (*life, error) {
	l, ok := m.lives[id]
	if ok && l.rec.Sandbox.State == StateAdopting {
		return nil, inTransition(id, StateAdopting)
	}
	if !ok || !l.visible() {
		return nil, notFound(id)
	}
	return l, nil
}

// condemned tells whether the end of the sandbox has begun in this run. Manager.mu is held.
func (l *life) condemned() bool { return l.reason != "" }

// tryTurn takes the turn if it is free.
func (l *life) tryTurn() bool {
	select {
	case l.turn <- struct{}{}:
		return true
	default:
		return false
	}
}

func (l *life) endTurn() { <-l.turn }

// within returns a context that also ends when the sandbox is condemned.
func (l *life) within(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(l.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}

// begin takes the turn of a running sandbox for one operation. It waits for another operation to end, and refuses at once when the
// sandbox is on its way out.
func (m *Manager) begin(ctx context.Context, id string) (l *life, end func(), err error) {
	leave, err := m.enter(ctx)
	if err != nil {
		return nil, nil, err
	}
	l, err = m.running(id)
	if err != nil {
		leave()
		return nil, nil, err
	}
	select {
	case l.turn <- struct{}{}:
	case <-l.ctx.Done():
		leave()
		return nil, nil, inTransition(id, StateKilling)
	case <-ctx.Done():
		leave()
		return nil, nil, &errs.Error{Code: errs.Unavailable, Msg: "the sandbox is busy with another request", Err: ctx.Err()}
	}
	end = func() { l.endTurn(); leave() }
	if _, err := m.running(id); err != nil {
		end()
		return nil, nil, err
	}
	return l, end, nil
}

// running finds a running sandbox, or says why it is none.
func (m *Manager) running(id string) (*life, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	l, ok := m.lives[id]
	if !ok {
		return nil, notFound(id)
	}
	switch state := l.rec.Sandbox.State; state {
	case StateRunning:
		return l, nil
	case StateCreating:
		return nil, notFound(id) // nobody was told this id yet
	default:
		return nil, inTransition(id, state)
	}
}

// record returns the record as it is now.
func (m *Manager) record(l *life) record {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return l.rec
}

// setRecord replaces the record in memory unless the sandbox was condemned meanwhile; the state is then the reaper's.
func (m *Manager) setRecord(l *life, rec record) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l.condemned() {
		return false
	}
	l.rec = rec
	return true
}

// enterState begins a transition of which the holder of the turn does the rest; false when the sandbox was condemned meanwhile.
func (m *Manager) enterState(l *life, state State) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l.condemned() {
		return false
	}
	l.rec.Sandbox.State = state
	return true
}

func notFound(id string) error {
	return errs.New(errs.NotFound, "Sandbox %q doesn't exist or you don't have access to it", clip(id))
}

// inTransition is the contract's answer to a request that came while something else is done to the sandbox.
func inTransition(id string, state State) error {
	if state == StateAdopting {
		return errs.New(errs.Unavailable, "the node is starting and has not taken up Sandbox %q again yet; try again in a moment", id)
	}
	doing := map[State]string{StateKilling: "killed", StatePausing: "paused", StateResuming: "resumed"}[state]
	if doing == "" {
		return errs.New(errs.Conflict, "Sandbox %q is %s", id, state)
	}
	return errs.New(errs.Conflict, "Sandbox %q is being %s", id, doing)
}

// newID returns "i" and 20 characters of [a-z0-9]: about 103 random bits, and always a DNS label with a port in front of it.
func newID() string { return randomID("i", 20) }

// randomID appends n characters of [a-z0-9] to prefix.
func randomID(prefix string, n int) string {
	const alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
	id := []byte(prefix)
	var random [32]byte
	for {
		rand.Read(random[:]) // never fails
		for _, b := range random {
			if b >= 252 { // 7 * 36: the rest would favour the first letters
				continue
			}
			id = append(id, alphabet[b%36])
			if len(id) == len(prefix)+n {
				return string(id)
			}
		}
	}
}

// now is the time as it survives the record: without a monotonic part, in milliseconds.
func now() time.Time { return time.Now().UTC().Round(0).Truncate(time.Millisecond) }
