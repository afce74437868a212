package sandboxd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	// routesInterval is how often the catalogue is compared with what runs here: the bound on how long a catalogue that lost its data
	// stays wrong. One comparison reads the node's own routes once and writes nothing when they agree.
	routesInterval = 5 * time.Second
	// routesRetry follows a write that failed, or a comparison that did.
	routesRetry = time.Second
)

// publish writes the route of a sandbox whose turn the caller holds.
func (m *Manager) publish(ctx context.Context, l *life, sb Sandbox) error {
	l.routed = true // even if this fails, it may have arrived
	ctx, cancel := context.WithTimeout(ctx, publishTime)
	defer cancel()
	err := m.publisher.Publish(ctx, routeOf(sb))
	if err == nil {
		return nil
	}
	m.stats.publishFailed.Inc()
	if errs.CodeOf(err) == errs.Conflict {
		return fmt.Errorf("publish route: %w", err)
	}
	return &errs.Error{Code: errs.Unavailable, Msg: "the route catalogue does not answer; try again in a moment", Err: err}
}

// tryPublish is publish where the catalogue is no reason to stop: the routes job will try again.
func (m *Manager) tryPublish(l *life) {
	if err := m.publish(l.ctx, l, m.record(l).Sandbox); err != nil {
		l.log.Warn("route not updated, will be tried again", zap.Error(err))
		poke(m.misrouted)
	}
}

// withdraw removes the route of a sandbox. When the catalogue does not answer, the end of the sandbox goes on: the routes job will
// find a route of ours without a sandbox, in this run or the next.
func (m *Manager) withdraw(l *life) {
	ctx, cancel := context.WithTimeout(context.Background(), withdrawTime)
	defer cancel()
	if err := m.publisher.Withdraw(ctx, l.id, l.generation); err != nil {
		m.stats.withdrawFailed.Inc()
		l.log.Warn("route not withdrawn, will be tried again", zap.Error(err))
		poke(m.misrouted)
	}
}

// routeOf is the route of a sandbox. Between running and paused it says paused; and only what has its memory is woken by traffic.
func routeOf(sb Sandbox) Published {
	p := Published{
		Sandbox:    sb.ID,
		Generation: sb.Generation,
		State:      sb.State,
		EndAt:      sb.EndAt,
		TokenHash:  sb.TokenHash,
		Mask:       sb.Network.MaskRequestHost,
		HTTPSPorts: sb.Network.HTTPSPorts,
		AutoResume: sb.AutoResume,
		EnvdHash:   sb.EnvdHash,
	}
	if sb.State != StateRunning {
		p.State, p.EndAt, p.AutoResume = StatePaused, time.Time{}, sb.AutoResume && sb.MemorySaved
	}
	return p
}

// keepRoutes makes the catalogue agree with the node, again and again. This one job is the remedy for a catalogue that was down at
// a kill, that lost its data, or that still names what a crashed run had published.
func (m *Manager) keepRoutes(ctx context.Context) error {
	timer := time.NewTimer(routesRetry)
	defer timer.Stop()
	failing, soon := false, true
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.misrouted:
			if !soon { // never postpone: while the catalogue is down, every write pokes us
				soon = true
				timer.Reset(routesRetry)
			}
			continue
		case <-timer.C:
		}
		err := m.agreeRoutes(ctx)
		switch {
		case err != nil && !failing:
			m.log.Warn("catalogue does not agree with this node yet", zap.Error(err))
		case err == nil && failing:
			m.log.Info("catalogue agrees with this node again")
		}
		failing = err != nil
		soon = failing
		if failing {
			timer.Reset(routesRetry)
			continue
		}
		timer.Reset(routesInterval)
	}
}

// agreeRoutes compares the catalogue's routes of this node with its sandboxes, removes those without a sandbox and writes those that
// are missing or different. A sandbox that is busy is left to whoever is at it.
func (m *Manager) agreeRoutes(ctx context.Context) error {
	listCtx, cancel := context.WithTimeout(ctx, publishTime)
	defer cancel()
	published, err := m.publisher.Published(listCtx)
	if err != nil {
		return fmt.Errorf("list own routes: %w", err)
	}
	var failures []error
	there := make(map[string]Published, len(published))
	for _, p := range published {
		if m.owns(p) {
			there[p.Sandbox] = p
			continue
		}
		withdrawCtx, cancel := context.WithTimeout(ctx, publishTime)
		if err := m.publisher.Withdraw(withdrawCtx, p.Sandbox, p.Generation); err != nil {
			failures = append(failures, fmt.Errorf("withdraw route of %q: %w", p.Sandbox, err))
		}
		cancel()
	}
	for _, sb := range m.List() {
		if p, ok := there[sb.ID]; ok && p.equal(routeOf(sb)) {
			continue
		}
		if err := m.republish(ctx, sb.ID); err != nil {
			failures = append(failures, err)
		}
		if len(failures) > 3 {
			break // it is down: no need to wait for each
		}
	}
	return errors.Join(failures...)
}

// owns tells whether a route belongs to a lifecycle on this node that is not ending.
func (m *Manager) owns(p Published) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	l, ok := m.lives[p.Sandbox]
	return ok && l.generation == p.Generation && l.rec.Sandbox.State != StateKilling
}

func (m *Manager) republish(ctx context.Context, id string) error {
	l := m.settled(id)
	if l == nil || !l.tryTurn() {
		return nil
	}
	defer l.endTurn()
	if m.settled(id) == nil {
		return nil
	}
	ctx, cancel := l.within(ctx)
	defer cancel()
	return m.publish(ctx, l, m.record(l).Sandbox)
}

// settled finds a sandbox that is in no transition; nil when it is.
func (m *Manager) settled(id string) *life {
	m.mu.RLock()
	defer m.mu.RUnlock()
	l, ok := m.lives[id]
	if ok && (l.rec.Sandbox.State == StateRunning || l.rec.Sandbox.State == StatePaused) {
		return l
	}
	return nil
}

// keepLease renews the node's lease. A catalogue that does not answer is not fatal: the edges see the node as lost until it does.
func (m *Manager) keepLease(ctx context.Context) error {
	tick := time.NewTicker(m.opts.LeaseTTL / 3)
	defer tick.Stop()
	for {
		m.announce(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// announce tells the catalogue what the node is now. Announcements follow one another: one that is held up must not arrive after a newer one
// and have edges and other nodes believe that a node which is ready still starts. One that was given up may, until the lease is renewed.
func (m *Manager) announce(ctx context.Context) {
	turn, cancel := context.WithTimeout(ctx, publishTime)
	defer cancel()
	var err error
	select {
	case m.leasing <- struct{}{}:
		err = m.announceNow(ctx)
		<-m.leasing
	case <-turn.Done():
		err = turn.Err()
	}
	if err != nil {
		m.stats.announceFailed.Inc()
		m.log.Warn("lease not renewed", zap.Error(err))
	}
}

func (m *Manager) announceNow(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, publishTime)
	defer cancel()
	return m.publisher.Announce(ctx, m.Capacity())
}
