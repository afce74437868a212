package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/errs"
)

// device and inode number tell hard links from copies.
type fileID struct{ dev, ino uint64 }

// applyDirectory takes a directory for the only layer. It stays on the file system of the directory: what is mounted below, such as
// proc, is taken as an empty directory.
func (f *flattener) applyDirectory(ctx context.Context, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open directory: %w", err)
	}
	defer func() { _ = root.Close() }()
	var top unix.Stat_t
	if err := unix.Stat(dir, &top); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	f.tree.layer = 0
	known := map[fileID]string{}
	err = fs.WalkDir(root.FS(), ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if f.seen++; f.seen > f.limits.Entries {
			return errs.New(errs.Invalid, "the directory has more than %d entries", f.limits.Entries)
		}
		foreign, err := f.addFile(root, dir, name, top.Dev, known)
		if err != nil {
			return fmt.Errorf("entry %q: %w", clip(name), err)
		}
		if foreign {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read directory %s: %w", dir, err)
	}
	return nil
}

// addFile takes one file; foreign is true for a directory on which something else is mounted.
func (f *flattener) addFile(root *os.Root, dir, name string, dev uint64, known map[fileID]string) (foreign bool, err error) {
	parts, err := splitPath(name)
	if err != nil {
		return false, err
	}
	info, err := root.Lstat(name)
	if err != nil {
		return false, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return false, errors.ErrUnsupported
	}
	id := fileID{st.Dev, st.Ino}
	if first, ok := known[id]; ok && !info.IsDir() {
		target, err := splitPath(first)
		if err != nil {
			return false, err
		}
		return false, f.tree.link(parts, target)
	}
	i := &inode{mode: st.Mode & (unix.S_IFMT | 0o7777), uid: st.Uid, gid: st.Gid, mtime: max(st.Mtim.Sec, 0)}
	if i.xattrs, err = fileXattrs(path.Join(dir, name)); err != nil {
		return false, err
	}
	if err := f.remember(name, "", i.xattrs); err != nil {
		return false, err
	}
	switch i.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		i.children = map[string]*entry{}
		return st.Dev != dev, f.tree.put(parts, i)
	case unix.S_IFREG:
		err = f.addContent(root, name, i)
	case unix.S_IFLNK:
		i.mode = unix.S_IFLNK | 0o777
		i.target, err = root.Readlink(name)
	case unix.S_IFIFO:
	case unix.S_IFCHR, unix.S_IFBLK:
		f.dropped++
		return false, nil
	case unix.S_IFSOCK:
		return false, nil // nobody listens on it any more
	}
	if err != nil {
		return false, err
	}
	if st.Nlink > 1 {
		known[id] = name
	}
	return false, f.tree.put(parts, i)
}

func (f *flattener) addContent(root *os.Root, name string, i *inode) error {
	// Not blocking: what was a file may have become a FIFO.
	file, err := root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("it changed while it was read")
	}
	i.size = info.Size()
	if i.size > f.limits.Bytes-f.kept {
		return errs.New(errs.Invalid, "entry %q has %d bytes: the image may have %d in all", clip(name), i.size, f.limits.Bytes)
	}
	f.kept += i.size
	i.offset, err = f.spool.store(file, i.size)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("it became shorter while it was read")
	}
	return err
}

// fileXattrs reads attributes without following a symlink at the end of the path.
func fileXattrs(file string) ([]xattr, error) {
	list := make([]byte, maxXattrs)
	n, err := unix.Llistxattr(file, list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	records := map[string]string{}
	value := make([]byte, maxXattrs)
	for name := range strings.SplitSeq(string(list[:n]), "\x00") {
		if name == "" || !keepXattr(name) {
			continue
		}
		n, err := unix.Lgetxattr(file, name, value)
		if err != nil {
			return nil, fmt.Errorf("read extended attribute %q: %w", name, err)
		}
		records["SCHILY.xattr."+name] = string(value[:n])
	}
	return xattrsOf(records)
}
