package proxy

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// watcher learns that clients have gone while their requests are being served. Each connection is registered once, for its
// whole life, with an epoll of its own beside the runtime's: it costs a request nothing, where a goroutine that waits on
// the connection would cost two switches, and it works under TLS, whose reader must not be disturbed.
type watcher struct {
	epoll int
	wake  int // an eventfd: ends Run

	mu    sync.Mutex // guards the fields below
	next  uint64
	conns map[uint64]*clientConn // by the number that its events carry: descriptors are reused, numbers are not
}

const canWatch = true

func newWatcher() (*watcher, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		_ = unix.Close(epoll)
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	w := &watcher{epoll: epoll, wake: wake, conns: make(map[uint64]*clientConn), next: 1}
	if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		w.close()
		return nil, fmt.Errorf("watch eventfd: %w", err)
	}
	return w, nil
}

// add watches c until remove. A connection that cannot be watched is served all the same.
func (w *watcher) add(c *clientConn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.watchID = w.next
	w.next++
	w.conns[c.watchID] = c
	if c.raw == nil {
		return
	}
	// Edge-triggered: one event when the client's end of stream arrives, whatever data waits before it.
	event := unix.EpollEvent{Events: unix.EPOLLRDHUP | unix.EPOLLET&0xffffffff}
	event.Fd, event.Pad = int32(c.watchID), int32(c.watchID>>32) // #nosec G115 -- 64 bits in two halves
	_ = c.raw.Control(func(fd uintptr) { _ = unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, int(fd), &event) })
}

// remove forgets c. Closing its socket takes it out of the epoll.
func (w *watcher) remove(c *clientConn) {
	w.mu.Lock()
	delete(w.conns, c.watchID)
	w.mu.Unlock()
}

// each calls f for every connection, outside the lock.
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

// Run tells connections that their client has gone, until ctx ends.
func (w *watcher) Run(ctx context.Context) error {
	defer w.close()
	written := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_, _ = unix.Write(w.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		close(written)
	})
	defer func() {
		if !stop() {
			<-written // the descriptor must not be closed, and reused, under it
		}
	}()
	events := make([]unix.EpollEvent, 128)
	for {
		n, err := unix.EpollWait(w.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for clients: %w", err)
		}
		if ctx.Err() != nil {
			return nil
		}
		for i := range max(n, 0) {
			id := uint64(uint32(events[i].Fd)) | uint64(uint32(events[i].Pad))<<32 // #nosec G115
			w.mu.Lock()
			c := w.conns[id]
			w.mu.Unlock()
			if c != nil {
				c.clientGone()
			}
		}
	}
}

func (w *watcher) close() {
	_ = unix.Close(w.epoll)
	_ = unix.Close(w.wake)
}

// tryRead reads without waiting and reports whether there is anything to say: bytes, the end, or an error. The buffer is
// taken only then, so that an idle connection holds none.
func (c *clientConn) tryRead(fd uintptr) bool {
	c.acquireBuf()
	for {
		n, err := unix.Read(int(fd), c.buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			c.releaseBuf()
			return false
		}
		c.readN, c.readErr = max(n, 0), err
		return true
	}
}
