package guest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/guest/gen/filesystem"
)

const (
	// maxWatchers bounds the polling watchers; the kernel gives a user 128 inotify instances in all.
	maxWatchers = 100
	// maxQueued bounds the events that a polling watcher keeps between two polls, as the kernel bounds its own queue.
	maxQueued = 16384
	// watcherIdle is how long a polling watcher lives that nobody polls.
	watcherIdle = time.Hour
	// maxAnnounced bounds what a tree remembers of events it made itself.
	maxAnnounced = 4096
)

var errOverflow = errors.New("events came faster than they were read, and some are lost")

// tree watches one directory, and with recursive all below it. One goroutine calls run.
type tree struct {
	root      string // as the client named it, for relative names
	recursive bool
	describe  *entries // nil when events carry no entry
	notify    *fsnotify.Watcher

	// announced are the paths whose creation run reported by itself, because they were found in a directory that had just appeared. The
	// kernel reports those that came after the watch a second time.
	announced map[string]struct{}
}

func (a *agent) newTree(path string, recursive, describe, networkMounts bool) (*tree, error) {
	if err := wantDirectory(path); err != nil {
		return nil, err
	}
	if !networkMounts && onNetwork(path) {
		return nil, invalid("cannot watch path on network filesystem: %s", path)
	}
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, rpcError("error creating watcher", err)
	}
	t := &tree{root: path, recursive: recursive, notify: notify, announced: map[string]struct{}{}}
	if describe {
		t.describe = a.newEntries()
	}
	if err := t.add(path, nil); err != nil {
		return nil, errors.Join(rpcError("error watching directory", err), notify.Close())
	}
	return t, nil
}

// onNetwork says whether changes to path can be made where this kernel does not see them.
func onNetwork(path string) bool {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC,
		unix.V9FS_MAGIC, unix.CEPH_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.CODA_SUPER_MAGIC:
		return true
	}
	return false
}

// add watches dir, and what is in it if the tree is recursive. found is called for everything below dir; nil means that nobody wants to know.
func (t *tree) add(dir string, found func(path string) error) error {
	if err := t.notify.Add(dir); err != nil {
		return err
	}
	if !t.recursive {
		return nil
	}
	items, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, item := range items {
		path := filepath.Join(dir, item.Name())
		if found != nil {
			if err := found(path); err != nil {
				return err
			}
		}
		if !item.IsDir() {
			continue
		}
		// What is gone again, or closed to an agent that is not root, is not watched; the rest is.
		if err := t.add(path, found); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	return nil
}

// run hands events to emit until ctx ends, emit fails or the kernel's queue overflows. A slow emit is felt in that queue, not in our memory.
// wake calls emit with nil.
func (t *tree) run(ctx context.Context, wake <-chan time.Time, emit func(*filesystem.FilesystemEvent) error) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-wake:
			if err := emit(nil); err != nil {
				return err
			}
		case event, ok := <-t.notify.Events:
			if !ok {
				return context.Canceled
			}
			if err := t.handle(event, emit); err != nil {
				return err
			}
		case err, ok := <-t.notify.Errors:
			if !ok {
				return context.Canceled
			}
			if errors.Is(err, fsnotify.ErrEventOverflow) {
				err = connect.NewError(connect.CodeDataLoss, errOverflow)
			}
			return err
		}
	}
}

// eventTypes are in the order in which a client should see them when one notification carries several.
var eventTypes = []struct {
	op   fsnotify.Op
	kind filesystem.EventType
}{
	{fsnotify.Create, filesystem.EventType_EVENT_TYPE_CREATE},
	{fsnotify.Write, filesystem.EventType_EVENT_TYPE_WRITE},
	{fsnotify.Chmod, filesystem.EventType_EVENT_TYPE_CHMOD},
	{fsnotify.Rename, filesystem.EventType_EVENT_TYPE_RENAME},
	{fsnotify.Remove, filesystem.EventType_EVENT_TYPE_REMOVE},
}

func (t *tree) handle(event fsnotify.Event, emit func(*filesystem.FilesystemEvent) error) error {
	if event.Name == t.root {
		return nil // about the directory itself, whose name the client knows
	}
	for _, e := range eventTypes {
		if !event.Has(e.op) {
			continue
		}
		if e.kind == filesystem.EventType_EVENT_TYPE_CREATE {
			if _, told := t.announced[event.Name]; told {
				delete(t.announced, event.Name)
				continue
			}
		}
		if e.op&(fsnotify.Remove|fsnotify.Rename) != 0 {
			delete(t.announced, event.Name)
		}
		if err := t.report(event.Name, e.kind, emit); err != nil {
			return err
		}
	}
	if !t.recursive || !event.Has(fsnotify.Create) {
		return nil
	}
	if info, err := os.Lstat(event.Name); err != nil || !info.IsDir() {
		return nil
	}
	// Whatever was made in the new directory before it was watched left no notification.
	err := t.add(event.Name, func(path string) error {
		if len(t.announced) < maxAnnounced {
			t.announced[path] = struct{}{}
		}
		if err := t.report(path, filesystem.EventType_EVENT_TYPE_CREATE, emit); err != nil {
			return err
		}
		if info, err := os.Lstat(path); err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
			return nil
		}
		return t.report(path, filesystem.EventType_EVENT_TYPE_WRITE, emit)
	})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	return err
}

func (t *tree) report(path string, kind filesystem.EventType, emit func(*filesystem.FilesystemEvent) error) error {
	name, err := filepath.Rel(t.root, path)
	if err != nil {
		return nil
	}
	event := &filesystem.FilesystemEvent{Name: validName(name), Type: kind}
	gone := kind == filesystem.EventType_EVENT_TYPE_REMOVE || kind == filesystem.EventType_EVENT_TYPE_RENAME
	if t.describe != nil && !gone {
		event.Entry, _ = t.describe.at(path) // it may be gone again
	}
	return emit(event)
}

// keepalive is the interval that a client asked for.
func keepalive(h http.Header) time.Duration {
	const fallback = 90 * time.Second
	seconds, err := strconv.Atoi(h.Get("Keepalive-Ping-Interval"))
	if err != nil || seconds <= 0 || seconds > 3600 {
		return fallback
	}
	return time.Duration(seconds) * time.Second
}

// WatchDir streams the changes in a directory.
func (s filesystemService) WatchDir(
	ctx context.Context, req *connect.Request[filesystem.WatchDirRequest], stream *connect.ServerStream[filesystem.WatchDirResponse],
) error {
	m := req.Msg
	path, _, err := s.rpcPath(req.Header(), m.GetPath())
	if err != nil {
		return err
	}
	t, err := s.newTree(path, m.GetRecursive(), m.GetIncludeEntry(), m.GetAllowNetworkMounts())
	if err != nil {
		return err
	}
	defer t.notify.Close()
	boundWrites(ctx)
	start := &filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Start{Start: &filesystem.WatchDirResponse_StartEvent{}}}
	if err := stream.Send(start); err != nil {
		return err
	}
	interval := keepalive(req.Header())
	tick := time.NewTimer(interval)
	defer tick.Stop()
	err = t.run(ctx, tick.C, func(event *filesystem.FilesystemEvent) error {
		defer tick.Reset(interval)
		if event == nil {
			ping := &filesystem.WatchDirResponse_Keepalive{Keepalive: &filesystem.WatchDirResponse_KeepAlive{}}
			return stream.Send(&filesystem.WatchDirResponse{Event: ping})
		}
		return stream.Send(&filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Filesystem{Filesystem: event}})
	})
	return rpcError("watch ended", err)
}

// watchers are those that clients poll.
type watchers struct {
	mu     sync.Mutex
	byID   map[string]*watcher
	closed bool
}

// watcher collects events of a tree between polls.
type watcher struct {
	tree   *tree
	cancel context.CancelFunc
	done   chan struct{} // closed by collect

	mu     sync.Mutex
	events []*filesystem.FilesystemEvent
	err    error // why collecting ended, or errOverflow; told once
	polled time.Time
}

func newWatchers() *watchers { return &watchers{byID: map[string]*watcher{}} }

func (w *watcher) collect(ctx context.Context) {
	defer close(w.done)
	err := w.tree.run(ctx, nil, func(event *filesystem.FilesystemEvent) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.events) == maxQueued {
			w.err = connect.NewError(connect.CodeDataLoss, errOverflow)
			return nil
		}
		w.events = append(w.events, event)
		return nil
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = rpcError("watch ended", err)
}

// poll takes the events since the last one. An error comes once, after the events that came before it.
func (w *watcher) poll() ([]*filesystem.FilesystemEvent, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.polled = time.Now()
	if len(w.events) > 0 {
		events := w.events
		w.events = nil
		return events, nil
	}
	err := w.err
	w.err = nil
	return nil, err
}

func (w *watcher) close() {
	w.cancel()
	<-w.done
	_ = w.tree.notify.Close() // nothing is left to flush
}

func (ws *watchers) add(t *tree) (string, error) {
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{tree: t, cancel: cancel, done: make(chan struct{}), polled: time.Now()}
	id := rand.Text()
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.closed || len(ws.byID) >= maxWatchers {
		cancel()
		return "", connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("more than %d watchers", maxWatchers))
	}
	ws.byID[id] = w
	go w.collect(ctx)
	return id, nil
}

func (ws *watchers) get(id string) (*watcher, error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if w, ok := ws.byID[id]; ok {
		return w, nil
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("watcher with id %s not found", id))
}

func (ws *watchers) remove(id string) error {
	w, err := ws.get(id)
	if err != nil {
		return err
	}
	ws.mu.Lock()
	delete(ws.byID, id)
	ws.mu.Unlock()
	w.close()
	return nil
}

// expire closes watchers that nobody polls any more: their clients died without saying goodbye.
func (ws *watchers) expire(ctx context.Context) {
	tick := time.NewTicker(watcherIdle / 10)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			ws.closeIf(func(w *watcher) bool {
				w.mu.Lock()
				defer w.mu.Unlock()
				return now.Sub(w.polled) > watcherIdle
			})
		}
	}
}

func (ws *watchers) closeAll() {
	ws.mu.Lock()
	ws.closed = true
	ws.mu.Unlock()
	ws.closeIf(func(*watcher) bool { return true })
}

func (ws *watchers) closeIf(old func(*watcher) bool) {
	var closing []*watcher
	ws.mu.Lock()
	for id, w := range ws.byID {
		if old(w) {
			delete(ws.byID, id)
			closing = append(closing, w)
		}
	}
	ws.mu.Unlock()
	for _, w := range closing {
		w.close()
	}
}

// CreateWatcher starts to collect changes for a client that polls.
func (s filesystemService) CreateWatcher(
	_ context.Context, req *connect.Request[filesystem.CreateWatcherRequest],
) (*connect.Response[filesystem.CreateWatcherResponse], error) {
	m := req.Msg
	path, _, err := s.rpcPath(req.Header(), m.GetPath())
	if err != nil {
		return nil, err
	}
	t, err := s.newTree(path, m.GetRecursive(), m.GetIncludeEntry(), m.GetAllowNetworkMounts())
	if err != nil {
		return nil, err
	}
	id, err := s.watchers.add(t)
	if err != nil {
		return nil, errors.Join(err, t.notify.Close())
	}
	return connect.NewResponse(&filesystem.CreateWatcherResponse{WatcherId: id}), nil
}

// GetWatcherEvents takes what was collected since the last call.
func (s filesystemService) GetWatcherEvents(
	_ context.Context, req *connect.Request[filesystem.GetWatcherEventsRequest],
) (*connect.Response[filesystem.GetWatcherEventsResponse], error) {
	w, err := s.watchers.get(req.Msg.GetWatcherId())
	if err != nil {
		return nil, err
	}
	events, err := w.poll()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystem.GetWatcherEventsResponse{Events: events}), nil
}

// RemoveWatcher ends a polling watcher.
func (s filesystemService) RemoveWatcher(
	_ context.Context, req *connect.Request[filesystem.RemoveWatcherRequest],
) (*connect.Response[filesystem.RemoveWatcherResponse], error) {
	if err := s.watchers.remove(req.Msg.GetWatcherId()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystem.RemoveWatcherResponse{}), nil
}
