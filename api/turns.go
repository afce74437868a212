package api

import (
	"context"
	"net/http"
	"sync"
	"time"
)

const (
	// maxLists bounds the lists that a node answers at once, and maxTeamLists those of one team. A list is held until its client has
	// read it, so that only these bound what clients that never read can hold.
	maxLists     = 64
	maxTeamLists = 8
	// turnPatience is how long a list waits for its turn: lists take milliseconds, and creates count a team's sandboxes by them.
	turnPatience = 2 * time.Second
)

// turns bounds the lists under way, so that one team cannot take the turns of the others.
type turns struct {
	all chan struct{} // one element per list under way

	mu    sync.Mutex
	teams map[string]*teamTurns // of the lists that wait or are under way
}

type teamTurns struct {
	taken chan struct{} // one element per list that waits for a turn in all, or has it
	users int           // guarded by turns.mu; the last one removes it
}

func newTurns() *turns {
	return &turns{all: make(chan struct{}, maxLists), teams: make(map[string]*teamTurns)}
}

// acquire waits for a turn, which is over when release is called.
func (t *turns) acquire(ctx context.Context, team string) (release func(), err error) {
	own := t.join(team)
	patience := time.NewTimer(turnPatience)
	defer patience.Stop()
	select {
	case own.taken <- struct{}{}:
	case <-patience.C:
		t.leave(team, own)
		return nil, &failure{status: http.StatusTooManyRequests, msg: "Too many lists at once: read the answers to the others first", retryAfter: time.Second}
	case <-ctx.Done():
		t.leave(team, own)
		return nil, ctx.Err()
	}
	giveBack := func() {
		<-own.taken
		t.leave(team, own)
	}
	select {
	case t.all <- struct{}{}:
	case <-patience.C:
		giveBack()
		return nil, &failure{status: http.StatusServiceUnavailable, msg: "This node is answering too many lists", retryAfter: time.Second}
	case <-ctx.Done():
		giveBack()
		return nil, ctx.Err()
	}
	return func() {
		<-t.all
		giveBack()
	}, nil
}

func (t *turns) join(team string) *teamTurns {
	t.mu.Lock()
	defer t.mu.Unlock()
	own := t.teams[team]
	if own == nil {
		own = &teamTurns{taken: make(chan struct{}, maxTeamLists)}
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
