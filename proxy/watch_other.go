//go:build !linux

package proxy

import (
	"context"
	"sync"
)

// watcher keeps the list of connections. Learning that a client has gone needs epoll: elsewhere it is noticed at the next
// byte written to it.
type watcher struct {
	mu    sync.Mutex // guards the fields below
	next  uint64
	conns map[uint64]*clientConn
}

const canWatch = false

func newWatcher() (*watcher, error) {
	return &watcher{conns: make(map[uint64]*clientConn), next: 1}, nil
}

func (w *watcher) add(c *clientConn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.watchID = w.next
	w.next++
	w.conns[c.watchID] = c
}

func (w *watcher) remove(c *clientConn) {
	w.mu.Lock()
	delete(w.conns, c.watchID)
	w.mu.Unlock()
}

func (w *watcher) each(f func(*clientConn)) {
	w.mu.Lock()
	conns := make([]*clientConn, 0, len(w.conns))
	for _, c := range w.conns {
		conns = append(conns, c)
	}
	w.mu.Unlock()
	for _, c := range conns {
		f(c)
	}
}

// Run waits for ctx.
func (w *watcher) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// tryRead is never called where raw is nil, and it always is here: see newClientConn.
func (c *clientConn) tryRead(uintptr) bool { panic("BUG: tryRead without epoll") }
