package sandboxd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/VictoriaMetrics/metrics"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/image"
)

// layersReady is how many copies of a writable layer are kept for the next sandboxes of a template, and layersKinds for how many templates:
// those that were asked for last.
const (
	layersReady = 3
	layersKinds = 8
	// layerMost is the disk space of a layer of which copies are kept: where the file system cannot share blocks, each takes as much again.
	layerMost = 256 << 20
)

// layers hands out the private writable layers of new sandboxes. A copy costs milliseconds that a create should not wait for, so copies of
// what was asked for lately are made ahead.
type layers struct {
	dir   string
	store *image.Store
	ready *metrics.Gauge
	made  *metrics.Counter // not ready when they were wanted

	filling sync.Mutex // held by the one who makes copies ahead

	mu     sync.Mutex // guards the fields below
	kinds  []*layerKind
	number int // of the last copy
}

// layerKind is the copies of one disk.
type layerKind struct {
	source fileID
	path   string
	copies []string
}

// fileID is a file, whatever its name is now: a template may be built anew under the same one. The number of an inode is given again as soon as
// its file is gone, to another team's snapshot perhaps; that one was written later.
type fileID struct {
	dev, inode    uint64
	size, written int64 // the latter in nanoseconds
}

func newLayers(dir string, store *image.Store, set *metrics.Set) *layers {
	return &layers{
		dir: dir, store: store,
		ready: set.GetOrCreateGauge("sluice_sandboxd_layers_ready", nil),
		made:  set.GetOrCreateCounter("sluice_sandboxd_layers_late_total"),
	}
}

// sweep removes all copies: those of an earlier run, or of this one when it ends.
func (l *layers) sweep() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kinds = nil
	l.ready.Set(0)
	if err := os.RemoveAll(l.dir); err != nil {
		return fmt.Errorf("remove writable layers: %w", err)
	}
	return nil
}

// take makes path a private copy of the disk at source, which path must be on the file system of. name is where that disk will be found
// for the next copies, unless another one has its place by then.
func (l *layers) take(source, name, path string) error {
	id, size, err := identify(source)
	if err != nil {
		return fmt.Errorf("find writable layer: %w", err)
	}
	for copied := l.pop(id, name, size); copied != ""; copied = l.pop(id, name, size) {
		if err := os.Rename(copied, path); err == nil {
			return nil
		}
		if err := ignoreAbsent(os.Remove(copied)); err != nil {
			return diskFull("take writable layer", err)
		}
	}
	l.made.Inc()
	if err := image.CopyDisk(path, source); err != nil {
		return diskFull("copy writable layer", err)
	}
	return nil
}

// pop returns a copy that was made ahead, or nothing, and notes that this disk is wanted.
func (l *layers) pop(id fileID, name string, size int64) string {
	if size > layerMost {
		return ""
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, kind := range l.kinds {
		if kind.source != id {
			continue
		}
		copy(l.kinds[1:i+1], l.kinds[:i])
		l.kinds[0] = kind
		kind.path = name
		if len(kind.copies) == 0 {
			return ""
		}
		last := kind.copies[len(kind.copies)-1]
		kind.copies = kind.copies[:len(kind.copies)-1]
		l.ready.Dec()
		return last
	}
	if last := len(l.kinds) - 1; last >= layersKinds && len(l.kinds[last].copies) == 0 {
		l.kinds = l.kinds[:last]
	}
	l.kinds = append([]*layerKind{{source: id, path: name}}, l.kinds...)
	return ""
}

// fill makes copies ahead, and removes those of disks that nobody asks for any more.
func (l *layers) fill(ctx context.Context) error {
	if !l.filling.TryLock() {
		return nil // somebody is at it
	}
	defer l.filling.Unlock()
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return fmt.Errorf("make directory of writable layers: %w", err)
	}
	l.dropGone()
	for ctx.Err() == nil {
		kind, source, path, surplus := l.next()
		for _, old := range surplus {
			if err := ignoreAbsent(os.Remove(old)); err != nil {
				return fmt.Errorf("remove writable layer: %w", err)
			}
		}
		if kind == nil {
			return nil
		}
		err := image.CopyDisk(path, source)
		if now, _, idErr := identify(source); idErr != nil || now != kind.source { // and what was copied may be another one's
			l.drop(kind)
			if err := ignoreAbsent(os.Remove(path)); err != nil {
				return fmt.Errorf("remove writable layer: %w", err)
			}
			continue
		}
		if err != nil {
			return diskFull("copy writable layer", err)
		}
		l.mu.Lock()
		kind.copies = append(kind.copies, path)
		l.ready.Inc()
		l.mu.Unlock()
	}
	return nil
}

// dropGone removes the copies of disks whose template is gone, or another one by now.
func (l *layers) dropGone() {
	l.mu.Lock()
	paths := make(map[*layerKind]string, len(l.kinds))
	for _, kind := range l.kinds {
		paths[kind] = kind.path
	}
	l.mu.Unlock()
	for kind, path := range paths {
		if now, _, err := identify(path); err != nil || now != kind.source {
			l.drop(kind)
		}
	}
}

// next is the disk that wants a copy most, where it is and where the copy goes; and copies that nobody wants.
func (l *layers) next() (kind *layerKind, source, path string, surplus []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.kinds) > layersKinds {
		last := l.kinds[len(l.kinds)-1]
		l.kinds = l.kinds[:len(l.kinds)-1]
		surplus = append(surplus, last.copies...)
		l.ready.Add(-float64(len(last.copies)))
	}
	for _, k := range l.kinds {
		if len(k.copies) < layersReady {
			l.number++
			return k, k.path, filepath.Join(l.dir, fmt.Sprintf("%d.img", l.number)), surplus
		}
	}
	return nil, "", "", surplus
}

func (l *layers) drop(kind *layerKind) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, k := range l.kinds {
		if k == kind {
			l.kinds = append(l.kinds[:i:i], l.kinds[i+1:]...)
			l.ready.Add(-float64(len(k.copies)))
			for _, path := range k.copies {
				_ = os.Remove(path) // sweep finds it again
			}
			return
		}
	}
}

// identify returns which file it is, and how much disk space it takes.
func identify(path string) (id fileID, size int64, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return fileID{}, 0, err
	}
	st := info.Sys().(*syscall.Stat_t)
	return fileID{uint64(st.Dev), st.Ino, info.Size(), info.ModTime().UnixNano()}, st.Blocks * 512, nil //nolint:unconvert // not everywhere 64 bits
}

// diskFull gives a full disk its meaning for whoever wanted something new on it.
func diskFull(what string, err error) error {
	if isFull(err) {
		return &errs.Error{Code: errs.Exhausted, Msg: "no disk space is left on the node", Err: fmt.Errorf("%s: %w", what, err)}
	}
	if errors.Is(err, syscall.EXDEV) {
		return fmt.Errorf("%s: templates and sandboxes must be on one file system: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
