package image

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	maxPath     = 4096     // PATH_MAX of every kernel that will read the image
	maxName     = 255      // NAME_MAX, likewise
	maxTarget   = 4095     // of a symlink: PATH_MAX less its terminating zero
	maxFollowed = 40       // symlinks in one path, as in the kernel
	maxSteps    = 64 << 20 // names looked up in all paths together: a symlink of one layer can make a thousand of one

	// Layers hide what is below them by files of these names.
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// inode is one file of whatever type. Hard links are several names of one inode. Content is in the spool, never on a file system
// of ours: nothing that an image says can reach outside of it.
type inode struct {
	mode     uint32 // type and permissions as in stat
	uid, gid uint32
	mtime    int64  // Unix seconds
	size     int64  // of a regular file
	offset   int64  // of its content in the spool
	target   string // of a symlink
	xattrs   []xattr
	children map[string]*entry // of a directory
	cleared  int               // the layer, counted from 1, that hides all that is below it in this directory; zero if none does
}

// xattr is one extended attribute with its whole name.
type xattr struct {
	name  string
	value string
}

// entry is a name in a directory.
type entry struct {
	*inode
	layer    int  // the last one that said something about this name
	implicit bool // a directory that no layer described: something below it was
}

func (i *inode) isDir() bool     { return i.mode&unix.S_IFMT == unix.S_IFDIR }
func (i *inode) isSymlink() bool { return i.mode&unix.S_IFMT == unix.S_IFLNK }
func (i *inode) isRegular() bool { return i.mode&unix.S_IFMT == unix.S_IFREG }

// names are the directory's children in byte order, which is the order of everything that we write.
func (i *inode) names() []string { return slices.Sorted(maps.Keys(i.children)) }

func newDir() *inode {
	return &inode{mode: unix.S_IFDIR | 0o755, children: map[string]*entry{}}
}

// tree is a root file system in memory, merged from layers that are put on top of each other.
type tree struct {
	root    entry
	layer   int // being applied
	entries int // names there are, without the root
	limit   int // of them
	steps   int // that walks may still take
}

func newTree(limit int) *tree {
	return &tree{root: entry{inode: newDir(), layer: -1, implicit: true}, limit: limit, steps: maxSteps}
}

// splitPath takes a path of a layer apart. Only what every other tool understands the same way passes.
func splitPath(path string) ([]string, error) {
	switch {
	case len(path) > maxPath:
		return nil, fmt.Errorf("path is longer than %d bytes", maxPath)
	case strings.IndexByte(path, 0) >= 0:
		return nil, errors.New("path contains a NUL byte")
	case strings.HasPrefix(path, "/"):
		return nil, errors.New("path is absolute")
	}
	var parts []string
	for part := range strings.SplitSeq(path, "/") {
		switch {
		case part == "" || part == ".":
			continue
		case part == "..":
			return nil, errors.New("path contains \"..\"")
		case len(part) > maxName:
			return nil, fmt.Errorf("a name in the path is longer than %d bytes", maxName)
		}
		parts = append(parts, part)
	}
	return parts, nil
}

// walk follows parts from the root to a directory. Symlinks on the way are followed inside the tree, as a process chrooted into it
// would, but not above its root. What is missing is made when create is set, and otherwise nil is returned.
func (t *tree) walk(parts []string, create bool) (*inode, error) {
	path := []*inode{t.root.inode}
	followed := 0
	for todo := slices.Clone(parts); len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		here := path[len(path)-1]
		if t.steps--; t.steps < 0 {
			return nil, errors.New("the symlinks in the image's paths take too long to follow")
		}
		switch name {
		case "", ".":
			continue
		case "..": // from a symlink: splitPath refuses it in paths
			if len(path) == 1 {
				return nil, errors.New("a symlink in the path leads out of the root")
			}
			path = path[:len(path)-1]
			continue
		}
		e, ok := here.children[name]
		switch {
		case !ok && !create:
			return nil, nil
		case !ok:
			e = &entry{inode: newDir(), layer: t.layer, implicit: true}
			if err := t.add(here, name, e); err != nil {
				return nil, err
			}
		case e.isSymlink():
			if followed++; followed > maxFollowed {
				return nil, errors.New("too many symlinks in the path")
			}
			if strings.HasPrefix(e.target, "/") {
				path = path[:1]
			}
			todo = append(strings.Split(e.target, "/"), todo...)
			continue
		case !e.isDir():
			return nil, fmt.Errorf("%q in the path is not a directory", clip(name))
		}
		path = append(path, e.inode)
		if len(path) > maxPath/2 {
			return nil, errors.New("directories are nested too deeply")
		}
	}
	return path[len(path)-1], nil
}

// add makes a new name.
func (t *tree) add(dir *inode, name string, e *entry) error {
	if t.entries >= t.limit {
		return fmt.Errorf("the image has more than %d files", t.limit)
	}
	t.entries++
	dir.children[name] = e
	return nil
}

// drop removes a name with all below it.
func (t *tree) drop(dir *inode, name string) {
	e, ok := dir.children[name]
	if !ok {
		return
	}
	if e.isDir() {
		for child := range e.children {
			t.drop(e.inode, child)
		}
	}
	delete(dir.children, name)
	t.entries--
}

// check says whether the current layer may still speak about path. It is asked before the content of a file is read.
func (t *tree) check(dir *inode, name string, isDir bool) error {
	e, ok := dir.children[name]
	if !ok || e.layer < t.layer || e.implicit && isDir || e.isDir() && isDir {
		return nil
	}
	return errors.New("the layer has this path twice")
}

// put gives path its inode of the current layer. A directory over a directory keeps what is in it; everything else replaces.
func (t *tree) put(parts []string, i *inode) error {
	if len(parts) == 0 {
		if !i.isDir() {
			return errors.New("the root is not a directory")
		}
		i.children, i.cleared = t.root.children, t.root.cleared
		t.root = entry{inode: i, layer: t.layer}
		return nil
	}
	dir, err := t.walk(parts[:len(parts)-1], true)
	if err != nil {
		return err
	}
	name := parts[len(parts)-1]
	if err := t.check(dir, name, i.isDir()); err != nil {
		return err
	}
	if old, ok := dir.children[name]; ok {
		if old.isDir() && i.isDir() {
			i.children, i.cleared = old.children, old.cleared
			dir.children[name] = &entry{inode: i, layer: t.layer}
			return nil
		}
		t.drop(dir, name)
	}
	return t.add(dir, name, &entry{inode: i, layer: t.layer})
}

// link makes path another name of what target names.
func (t *tree) link(parts, target []string) error {
	if len(parts) == 0 || len(target) == 0 {
		return errors.New("hard link to or from the root")
	}
	dir, err := t.walk(target[:len(target)-1], false)
	if err != nil {
		return fmt.Errorf("target of hard link: %w", err)
	}
	var old *entry
	if dir != nil {
		old = dir.children[target[len(target)-1]]
	}
	switch {
	case old == nil:
		return errors.New("target of hard link does not exist")
	case old.isDir():
		return errors.New("target of hard link is a directory")
	}
	into, err := t.walk(parts[:len(parts)-1], true)
	if err != nil {
		return err
	}
	name := parts[len(parts)-1]
	if into.children[name] == old {
		return errors.New("hard link to itself")
	}
	if err := t.check(into, name, false); err != nil {
		return err
	}
	inode := old.inode // what is dropped below may be the target's own directory entry
	t.drop(into, name)
	return t.add(into, name, &entry{inode: inode, layer: t.layer})
}

// whiteout hides path as the lower layers have it. What the current layer put there stays, whichever comes first in it.
func (t *tree) whiteout(parts []string) error {
	dir, err := t.walk(parts[:len(parts)-1], false)
	if err != nil || dir == nil {
		return err
	}
	t.hide(dir, parts[len(parts)-1])
	return nil
}

// opaque hides all that lower layers have in the directory.
func (t *tree) opaque(parts []string) error {
	dir, err := t.walk(parts, false)
	if err != nil || dir == nil {
		return err
	}
	t.clear(dir)
	return nil
}

// clear hides all that lower layers have in a directory. It does so once in a layer: what comes there later is the layer's own, and an
// archive can ask for it as often as it has entries.
func (t *tree) clear(dir *inode) {
	if dir.cleared == t.layer+1 {
		return
	}
	for name := range dir.children {
		t.hide(dir, name)
	}
	dir.cleared = t.layer + 1
}

func (t *tree) hide(dir *inode, name string) {
	e, ok := dir.children[name]
	if !ok {
		return
	}
	if e.isDir() {
		t.clear(e.inode)
	}
	if e.layer == t.layer {
		return
	}
	if !e.isDir() || len(e.children) == 0 {
		t.drop(dir, name)
		return
	}
	// Only what the current layer put below is left, and that makes it a directory that no layer described.
	fresh := newDir()
	fresh.children, fresh.cleared = e.children, e.cleared
	dir.children[name] = &entry{inode: fresh, layer: t.layer, implicit: true}
}

// clip shortens what came from outside for a message.
func clip(s string) string {
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}

// clamp makes no file newer than newest.
func (t *tree) clamp(newest int64) {
	var visit func(i *inode)
	visit = func(i *inode) {
		i.mtime = min(i.mtime, newest)
		for _, e := range i.children {
			visit(e.inode)
		}
	}
	visit(t.root.inode)
}

// newestBefore is the time of the newest file that is older than limit, or zero. What is not older came into being with the tree: clamped
// to this, the same packages give the same tree at any time.
func (t *tree) newestBefore(limit int64) (newest int64) {
	var visit func(i *inode)
	visit = func(i *inode) {
		if i.mtime < limit {
			newest = max(newest, i.mtime)
		}
		for _, e := range i.children {
			visit(e.inode)
		}
	}
	visit(t.root.inode)
	return newest
}
