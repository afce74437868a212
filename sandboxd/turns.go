package sandboxd

import (
	"context"
	"sync"
)

// turns bounds what is expensive for a node: starting sandboxes, or saving them. How long one takes is up to its guest, which may say nothing
// until a timeout; so no team can have all of them, nor wait in front of the others.
type turns struct {
	most int           // of one team
	all  chan struct{} // one element per turn that is taken

	mu    sync.Mutex            // guards the fields below
	teams map[string]*teamTurns // of the turns that are taken or waited for
}

type teamTurns struct {
	taken chan struct{} // one element per turn that the team waits for in all, or has
	users int           // guarded by turns.mu; the last one removes it
}

// newTurns gives so many to a team, and a quarter more to all of them.
func newTurns(most int) *turns {
	return &turns{most: most, all: make(chan struct{}, most+max(1, most/4)), teams: make(map[string]*teamTurns)}
}

// acquire waits for a turn, which is over when release is called. ok is false when ctx or closing ended before.
func (t *turns) acquire(ctx context.Context, closing <-chan struct{}, team string) (release func(), ok bool) {
	own := t.join(team)
	if !enterRoom(ctx, closing, own.taken) {
		t.leave(team, own)
		return nil, false
	}
	if !enterRoom(ctx, closing, t.all) {
		<-own.taken
		t.leave(team, own)
		return nil, false
	}
	return func() {
		<-t.all
		<-own.taken
		t.leave(team, own)
	}, true
}

func enterRoom(ctx context.Context, closing <-chan struct{}, room chan<- struct{}) bool {
	select {
	case room <- struct{}{}:
		return true
	case <-ctx.Done():
	case <-closing:
	}
	return false
}

func (t *turns) join(team string) *teamTurns {
	t.mu.Lock()
	defer t.mu.Unlock()
	own := t.teams[team]
	if own == nil {
		own = &teamTurns{taken: make(chan struct{}, t.most)}
		t.teams[team] = own
	}
	own.users++
	return own
}

func (t *turns) leave(team string, own *teamTurns) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if own.users--; own.users == 0 {
		delete(t.teams, team)
	}
}
