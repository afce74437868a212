package sandboxd

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

// Create makes a sandbox and returns when its guest serves and edges can find it. When ctx ends before, nothing of it stays.
//
// There is no undo of single steps: all that a create acquires is derivable from the record that it wrote first, so a create that
// fails is removed the way a killed sandbox is, and the way reconcile removes one that a crash left half made.
func (m *Manager) Create(ctx context.Context, spec CreateSpec) (Sandbox, error) {
	leave, err := m.enter(ctx)
	if err != nil {
		return Sandbox{}, err
	}
	defer leave()
	from, err := m.findOrigin(spec)
	if err != nil {
		return Sandbox{}, err
	}
	defer m.endUse(from.snapshot)
	return m.createFrom(ctx, spec, from)
}

// origin is what a sandbox is made from: a template, or a snapshot in the words of one.
type origin struct {
	Template
	alias    string // the name it was asked for by
	snapshot string // its ID
}

// findOrigin finds a template or, if there is none of that name, a snapshot, which is in use until endUse.
func (m *Manager) findOrigin(spec CreateSpec) (origin, error) {
	tmpl, alias, err := m.findTemplate(spec.Template)
	if err == nil {
		return origin{Template: tmpl, alias: alias}, nil
	}
	if errs.CodeOf(err) == errs.NotFound {
		if from, ok := m.snapshots.use(spec.Template, spec.Team); ok {
			return from, nil
		}
	}
	return origin{}, err
}

// createFrom is Create from something that was found.
func (m *Manager) createFrom(ctx context.Context, spec CreateSpec, from origin) (Sandbox, error) {
	if err := m.checkTimeout(spec.Timeout); err != nil {
		return Sandbox{}, err
	}
	if _, ok := m.machine.(Suspender); spec.AutoPause && !ok {
		// Refused now: at the deadline the sandbox would be killed, and its work lost.
		return Sandbox{}, errs.New(errs.Invalid, "autoPause (lifecycle onTimeout 'pause') is not possible: the %s machine of this node has no "+
			"snapshots; leave it out and give a longer timeout", m.machine.Name())
	}
	fence, err := fenceOf(spec.Network)
	if err != nil {
		return Sandbox{}, err
	}
	done, err := m.queue(ctx, m.creating, spec.Team, "started")
	if err != nil {
		return Sandbox{}, err
	}
	defer done()
	l, err := m.reserve(spec, from)
	if err != nil {
		return Sandbox{}, err
	}

	began := time.Now()
	err = m.boot(ctx, l, initRequest(m.record(l), spec), spec.Timeout, fence)
	if err != nil {
		m.condemn(l, GoneCreateFailed)
		l.endTurn()
		<-l.buried
		return Sandbox{}, m.createError(ctx, l, err)
	}
	sb := m.record(l).Sandbox
	l.endTurn()
	m.stats.created.Inc()
	l.log.Info("sandbox created", zap.String("template", from.ID), zap.Duration("took", time.Since(began)))
	return sb, nil
}

// boot takes the steps of create in their order. The caller holds the turn and removes what is there when boot fails.
func (m *Manager) boot(ctx context.Context, l *life, init guest.InitRequest, timeout time.Duration, fence egress.Policy) error {
	ctx, cancel := l.within(ctx)
	defer cancel()
	reached := m.reporter(m.stats.createPhase)

	rec := m.record(l)
	if err := m.journal.create(rec); err != nil {
		return err
	}
	reached(StepRecorded)

	startCtx, cancelStart := context.WithTimeout(ctx, startTime)
	defer cancelStart()
	instance, err := m.machine.Start(startCtx, l.place, fence, reached)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	initCtx, cancelInit := context.WithTimeout(ctx, guestTime)
	defer cancelInit()
	init.Timestamp = time.Now()
	if err := instance.Init(initCtx, init); err != nil {
		return fmt.Errorf("init guest: %w", err)
	}
	if err := instance.Health(initCtx); err != nil {
		return fmt.Errorf("guest after init: %w", err)
	}
	reached(StepInit)

	rec.Sandbox.State = StateRunning
	rec.Sandbox.StartedAt = now()
	rec.Sandbox.EndAt = rec.Sandbox.StartedAt.Add(timeout)
	rec.Handle = instance.Handle()
	if err := m.journal.note(rec); err != nil {
		return err
	}
	reached(StepHandle)
	if err := instance.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	reached(StepCommitted)

	// Running comes before the route: an edge may use a route the moment it exists.
	if !m.adopt(l, rec, instance) {
		return inTransition(l.id, StateKilling)
	}
	if err := m.publish(ctx, l, rec.Sandbox); err != nil {
		return err
	}
	reached(StepPublished)
	return ctx.Err()
}

// adopt makes a life with a living instance a running sandbox; false when it was condemned meanwhile.
func (m *Manager) adopt(l *life, rec record, instance Instance) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l.condemned() {
		return false
	}
	if l.instance == nil { // else a pause failed, and it is the same
		l.refused = egress.Refusals{}
		l.atEnd = atEnd{}
	}
	l.rec = rec
	l.generation = rec.Sandbox.Generation
	l.instance = instance
	l.up, l.down = context.WithCancel(l.ctx)
	up := l.up
	m.jobs.Go(func() { m.attend(up, l, instance) })
	poke(m.endMoved)
	return true
}

// queue waits for one of the turns for what is expensive for a node: starting sandboxes, and saving them.
func (m *Manager) queue(ctx context.Context, turns *turns, team, doing string) (done func(), err error) {
	patience, cancel := context.WithTimeout(ctx, queueTime)
	defer cancel()
	done, ok := turns.acquire(patience, m.closing, team)
	switch {
	case ok:
		return done, nil
	case m.isClosing():
		return nil, errStopping
	case ctx.Err() != nil:
		return nil, &errs.Error{Code: errs.Unavailable, Msg: "gave up while waiting for others that are being " + doing, Err: ctx.Err()}
	default:
		return nil, errs.New(errs.Exhausted, "too many sandboxes are being %s on this node at once; try again in a moment", doing)
	}
}

// reserve registers a new life with its turn taken: the check of the limit and the entry are one step.
func (m *Manager) reserve(spec CreateSpec, from origin) (*life, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	slot, started, err := m.admitLocked()
	if err != nil {
		return nil, err
	}
	rec := record{Machine: m.machine.Name(), Slot: slot, Root: from.Root, User: cmp.Or(from.User, "user"), Workdir: from.Workdir, Sandbox: Sandbox{
		ID:              newID(),
		Generation:      m.nextGenerationLocked(started),
		State:           StateCreating,
		Template:        from.ID,
		Alias:           from.alias,
		StartedAt:       started,
		EndAt:           started.Add(spec.Timeout),
		Timeout:         spec.Timeout,
		CPUs:            from.CPUs,
		MemoryMiB:       from.MemoryMiB,
		DiskMiB:         from.DiskMiB,
		Metadata:        maps.Clone(spec.Metadata),
		Network:         spec.Network.clone(),
		Team:            spec.Team,
		Nonce:           spec.Nonce,
		TokenHash:       spec.TokenHash,
		EnvdHash:        hashOf(spec.EnvdToken),
		AutoPause:       spec.AutoPause,
		AutoPauseMemory: spec.AutoPauseMemory,
		AutoResume:      spec.AutoResume,
	}}
	l := newLife(rec, m.place(rec), m.log)
	l.turn <- struct{}{}
	m.lives[l.id] = l
	return l, nil
}

// admitLocked takes a slot for a sandbox that is to start, unless the node is full or in no state for it.
func (m *Manager) admitLocked() (slot int, at time.Time, err error) {
	if m.draining {
		return 0, at, errStopping
	}
	if m.broken {
		return 0, at, errs.New(errs.Unavailable, "this node cannot start sandboxes: its host's network is not in order")
	}
	if m.activeLocked() >= m.opts.MaxSandboxes {
		return 0, at, errs.New(errs.Exhausted, "this node is full (%d sandboxes)", m.opts.MaxSandboxes)
	}
	slot, ok := m.slots.acquire(time.Now())
	if !ok {
		return 0, at, errs.New(errs.Exhausted, "no network slot of this node is free; try again in a few seconds")
	}
	poke(m.slotTaken)
	return slot, now(), nil
}

// nextGenerationLocked is later than all before, also than those of sandboxes that are gone.
func (m *Manager) nextGenerationLocked(at time.Time) uint64 {
	m.lastGeneration = max(m.lastGeneration+1, uint64(at.UnixMilli()))
	return m.lastGeneration
}

// createError gives the failure of a create the meaning that its caller can use, and logs what only we can.
func (m *Manager) createError(ctx context.Context, l *life, err error) error {
	m.stats.createFailed.Inc()
	if ctx.Err() != nil {
		return &errs.Error{Code: errs.Unavailable, Msg: "the create was cancelled", Err: err}
	}
	if m.reasonOf(l) != GoneCreateFailed {
		return inTransition(l.id, StateKilling)
	}
	switch errs.CodeOf(err) {
	case errs.Unavailable, errs.Exhausted, errs.Conflict:
		return err
	}
	// Whatever else the parts below say, the caller's input was judged before they were asked: it is our fault.
	return &errs.Error{Code: errs.Internal, Msg: "Failed to place sandbox: the node could not start it", Err: err}
}

// hashOf is what the node keeps of a token.
func hashOf(token string) TokenHash {
	if token == "" {
		return TokenHash{}
	}
	return sha256.Sum256([]byte(token))
}

// initRequest is what a guest is told about itself. A caller's variables win over ours, and both over what the template has set.
func initRequest(rec record, spec CreateSpec) guest.InitRequest {
	env := identityOf(rec.Sandbox)
	maps.Copy(env, spec.EnvVars)
	return guest.InitRequest{
		EnvVars:        env,
		MergeEnv:       true,
		AccessToken:    spec.EnvdToken,
		Timestamp:      time.Now(),
		DefaultUser:    rec.User,
		DefaultWorkdir: rec.Workdir,
		Hostname:       rec.Sandbox.ID,
		LifecycleID:    lifecycleID(rec.Sandbox),
	}
}

func identityOf(sb Sandbox) map[string]string {
	return map[string]string{"E2B_SANDBOX": "true", "E2B_SANDBOX_ID": sb.ID, "E2B_TEMPLATE_ID": sb.Template}
}

func lifecycleID(sb Sandbox) string { return fmt.Sprintf("%s-%d", sb.ID, sb.Generation) }
