package sandboxd

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/link"
)

// openTime bounds one connect inside the sandbox. It is local and answers at once, unless a server in the sandbox lets its backlog
// fill up; then the edge should hear that it is busy, and not wait.
const openTime = 3 * time.Second

// Open connects to a port of a sandbox's lifecycle, for the link: an error is always a *link.VerdictError. A closed port is not
// tried again. The connection is opened inside the sandbox, so there is no forwarder that could lag behind a server that has just
// begun to listen, and "closed" is a fact that the edge wants fast.
func (m *Manager) Open(ctx context.Context, sandbox string, generation uint64, port uint16) (net.Conn, error) {
	conn, verdict := m.open(ctx, sandbox, generation, port)
	m.stats.opened(verdict)
	if verdict != link.Open {
		return nil, &link.VerdictError{Verdict: verdict}
	}
	return conn, nil
}

func (m *Manager) open(ctx context.Context, sandbox string, generation uint64, port uint16) (net.Conn, link.Verdict) {
	if port == 0 {
		return nil, link.Refused
	}
	l, instance, up, verdict := m.reachable(sandbox, generation)
	if verdict != link.Open {
		return nil, verdict
	}
	ctx, cancel := context.WithTimeout(ctx, openTime)
	defer cancel()
	stop := context.AfterFunc(up, cancel)
	defer stop()
	conn, err := instance.DialPort(ctx, port)
	// A sandbox that was paused or condemned while we dialled has had its connections reset already: this one would be missed.
	if up.Err() != nil {
		if err == nil {
			conn.Close()
		}
		return nil, link.NotHere
	}
	if err == nil {
		return conn, link.Open
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, link.PortClosed
	}
	if ce := l.log.Check(zap.DebugLevel, "connect inside sandbox"); ce != nil {
		ce.Write(zap.Uint16("port", port), zap.Error(err))
	}
	return nil, link.Busy
}

// reachable finds the instance of exactly that lifecycle, with the context in which it can be reached, or the verdict that says why there
// is none. "Not here" makes an edge drop its route, so a node that is starting says it of nothing: what it does not know yet is busy,
// and so is what it has not taken up yet.
func (m *Manager) reachable(sandbox string, generation uint64) (*life, Instance, context.Context, link.Verdict) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	l, ok := m.lives[sandbox]
	switch {
	case !ok && !m.isReady():
		return nil, nil, nil, link.Busy
	case !ok:
		return nil, nil, nil, link.NotHere
	case l.generation != generation:
		return nil, nil, nil, link.WrongGeneration
	case l.rec.Sandbox.State == StateAdopting:
		return nil, nil, nil, link.Busy
	case l.instance == nil || l.up.Err() != nil || l.condemned():
		return nil, nil, nil, link.NotHere
	}
	return l, l.instance, l.up, link.Open
}
