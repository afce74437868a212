package sandboxd

import (
	"context"
	"sync"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Fork makes copies of a running sandbox, which goes on. Each copy has the memory and the disk of the source at one moment, and its
// metadata, network, lifecycle and team; a failure of one is in its result. Copies that are not done when ctx ends are not made.
//
// They are made from a snapshot that nobody else finds and that is removed when they are made.
func (m *Manager) Fork(ctx context.Context, id string, specs []ForkSpec) ([]ForkResult, error) {
	if len(specs) == 0 {
		return nil, errs.New(errs.Invalid, "a fork needs a count of at least 1")
	}
	for _, spec := range specs {
		if err := m.checkTimeout(spec.Timeout); err != nil {
			return nil, err
		}
	}
	leave, err := m.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	source, from, err := m.copyForFork(ctx, id)
	if err != nil {
		return nil, err
	}
	defer m.endUse(from.snapshot)
	results := make([]ForkResult, len(specs))
	turns := make(chan struct{}, m.opts.ConcurrentCreates) // more would only wait for each other
	var wg sync.WaitGroup
	for i, spec := range specs {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			results[i].Sandbox, results[i].Err = m.createFrom(ctx, copyOf(source, spec), from)
		})
	}
	wg.Wait()
	return results, nil
}

// copyForFork takes a snapshot for one fork, which is in use until endUse. The copies name the template that the source was made from.
func (m *Manager) copyForFork(ctx context.Context, id string) (source Sandbox, from origin, err error) {
	l, end, err := m.begin(ctx, id)
	if err != nil {
		return Sandbox{}, origin{}, err
	}
	defer end()
	s, ok := m.machine.(Suspender)
	if !ok {
		return Sandbox{}, origin{}, m.cannotSave(id, "forked", "")
	}
	source = m.record(l).Sandbox
	r, err := m.snapshot(s, l, snapshotRecord{Removed: true})
	if err != nil {
		return Sandbox{}, origin{}, err
	}
	from = r.origin(m.snapshots, source.Alias)
	from.ID = source.Template
	return source, from, nil
}

func copyOf(source Sandbox, spec ForkSpec) CreateSpec {
	return CreateSpec{
		Timeout:         spec.Timeout,
		Metadata:        source.Metadata,
		Network:         source.Network,
		Team:            source.Team,
		Nonce:           spec.Nonce,
		TokenHash:       spec.TokenHash,
		EnvdToken:       spec.EnvdToken,
		AutoPause:       source.AutoPause,
		AutoPauseMemory: source.AutoPauseMemory,
		AutoResume:      source.AutoResume,
	}
}
