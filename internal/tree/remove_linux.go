package tree

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxErrorPath bounds the text of a path in an error: a sandbox chooses its names, and an error goes to a log.
const maxErrorPath = 200

// Remove removes what a sandbox has filled: dir and everything in it, links themselves and not what they lead to. The
// tree may be of any depth and width. Three descriptors and little memory are all it takes, because a directory that is
// not empty is moved up to dir before it is emptied, so that the walk never goes down. It never enters a mount, which can
// neither be moved nor removed. Nobody may be using the tree. What cannot be removed is left, with all the rest gone, and
// the first reason is the error; that dir does not exist is none.
func Remove(dir string) error {
	parent, err := unix.Open(filepath.Dir(dir), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return removeError(dir, err)
	}
	defer unix.Close(parent)
	name := filepath.Base(dir)
	switch err := unlink(parent, name); {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case !errors.Is(err, unix.ENOTEMPTY):
		return removeError(dir, err)
	}
	root, err := openOwn(parent, name)
	if err != nil {
		return removeError(dir, err)
	}
	defer root.Close()
	r := remover{root: int(root.Fd()), prefix: ".removing-" + rand.Text() + "-"}
	r.empty(root)
	for n := 0; n < r.moved; n++ {
		r.removeMoved(n)
	}
	if err := unix.Unlinkat(parent, name, unix.AT_REMOVEDIR); err != nil && r.err == nil {
		r.err = err
	}
	if r.err != nil {
		return removeError(dir, r.err)
	}
	return nil
}

func removeError(dir string, err error) error {
	return fmt.Errorf("remove %s: %w", shortPath(dir), err)
}

func shortPath(path string) string {
	if len(path) > maxErrorPath {
		path = path[:maxErrorPath] + "..."
	}
	return fmt.Sprintf("%q", path)
}

// remover is one Remove. Directories that were not empty wait below root as prefix0, prefix1, ... up to moved.
type remover struct {
	root   int
	prefix string // that no sandbox can know
	moved  int
	err    error // the first
}

func (r *remover) fail(name string, err error) {
	if r.err == nil {
		r.err = fmt.Errorf("%s: %w", shortPath(name), err)
	}
}

// removeMoved empties one of the directories that wait.
func (r *remover) removeMoved(n int) {
	name := fmt.Sprint(r.prefix, n)
	dir, err := openOwn(r.root, name)
	if err != nil {
		r.fail(name, err)
		return
	}
	r.empty(dir)
	dir.Close()
	if err := unix.Unlinkat(r.root, name, unix.AT_REMOVEDIR); err != nil {
		r.fail(name, err)
	}
}

// empty takes everything out of dir. It reads again from the beginning as long as that helps, because a file system may
// skip names when others vanish during the reading.
func (r *remover) empty(dir *os.File) {
	for {
		gone := 0
		for {
			names, err := dir.Readdirnames(1024)
			for _, name := range names {
				if !strings.HasPrefix(name, r.prefix) && r.take(int(dir.Fd()), name) {
					gone++
				}
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				r.fail(dir.Name(), err)
				return
			}
		}
		if gone == 0 {
			return
		}
		if _, err := dir.Seek(0, io.SeekStart); err != nil {
			r.fail(dir.Name(), err)
			return
		}
	}
}

// take removes an entry, or moves it to where its turn will come.
func (r *remover) take(dir int, name string) bool {
	err := unlink(dir, name)
	if errors.Is(err, unix.ENOTEMPTY) {
		to := fmt.Sprint(r.prefix, r.moved)
		err = unix.Renameat(dir, name, r.root, to)
		if errors.Is(err, unix.EACCES) && allow(dir, name) == nil { // a directory that moves is written to: its ".."
			err = unix.Renameat(dir, name, r.root, to)
		}
		if err == nil {
			r.moved++
		}
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		r.fail(name, err)
		return false
	}
	return true
}

// unlink removes anything but a directory with something in it, which is ENOTEMPTY.
func unlink(dir int, name string) error {
	err := unix.Unlinkat(dir, name, 0)
	if !errors.Is(err, unix.EISDIR) {
		return err
	}
	err = unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
	if errors.Is(err, unix.EEXIST) { // the other name that POSIX has for it
		return unix.ENOTEMPTY
	}
	return err
}

// openOwn opens a directory to empty it, even one that its owner, when that is us and not root, has locked: overlay's work
// directory is one.
func openOwn(dir int, name string) (*os.File, error) {
	if os.Geteuid() != 0 {
		if err := allow(dir, name); err != nil {
			return nil, err
		}
	}
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// allow gives the owner of a directory all access. chmod follows links, so it is given the directory itself.
func allow(dir int, name string) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), 0o700)
}
