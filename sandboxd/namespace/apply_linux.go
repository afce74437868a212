package namespace

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

var mountFlags = map[string]uintptr{
	"ro": unix.MS_RDONLY, "nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC,
}

func flagBits(names []string) (bits uintptr) {
	for _, n := range names {
		bits |= mountFlags[n]
	}
	return bits
}

// apply does the ops in order on the calling thread, whose working directory is the workspace. usernsFD is what idmap
// shifts owners by.
func apply(ops []Op, usernsFD int) error {
	for _, op := range ops {
		err := applyOne(op, usernsFD)
		if op.Optional && errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
	}
	return nil
}

func applyOne(op Op, usernsFD int) error {
	switch op.Do {
	case DoMkdir:
		// It may be there already: inside a template, for one. Mode and owner are then ours to set all the same.
		if err := unix.Mkdir(op.Dst, op.Mode); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		return own(op)
	case DoTouch:
		fd, err := unix.Open(op.Dst, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o644)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	case DoMount:
		return unix.Mount(op.Src, op.Dst, op.FS, flagBits(op.Flags), op.Data)
	case DoBind:
		return bind(op, unix.MS_BIND)
	case DoRbind:
		return bind(op, unix.MS_BIND|unix.MS_REC)
	case DoIdmap:
		return idmap(op, usernsFD)
	case DoNode:
		if err := unix.Mknod(op.Dst, unix.S_IFCHR|op.Mode, int(unix.Mkdev(uint32(op.Dev>>8), uint32(op.Dev&0xff)))); err != nil {
			return err
		}
		return own(op)
	case DoSymlink:
		return unix.Symlink(op.Src, op.Dst)
	case DoMask:
		return mask(op.Dst)
	case DoReadonly:
		return bind(Op{Src: op.Dst, Dst: op.Dst, Flags: []string{"ro", "nosuid", "nodev", "noexec"}}, unix.MS_BIND)
	case DoPivot:
		return pivot(op.Dst)
	}
	panic("BUG: unknown op " + string(op.Do))
}

// own sets what the umask or the file system took away. Following a link that a template planted would give a file of
// the host away, so links are not followed.
func own(op Op) error {
	fd, err := unix.Open(op.Dst, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if op.UID != 0 || op.GID != 0 {
		if err := unix.Fchownat(fd, "", int(op.UID), int(op.GID), unix.AT_EMPTY_PATH); err != nil {
			return err
		}
	}
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), op.Mode)
}

func bind(op Op, flags uintptr) error {
	if err := unix.Mount(op.Src, op.Dst, "", flags, ""); err != nil {
		return err
	}
	if len(op.Flags) == 0 {
		return nil
	}
	// The first call ignores every flag but the kind of bind. Flags that the source's mount has are kept: a user
	// namespace may not clear them.
	var st unix.Statfs_t
	if err := unix.Statfs(op.Dst, &st); err != nil {
		return err
	}
	kept := uintptr(st.Flags) & (unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	return unix.Mount("", op.Dst, "", unix.MS_BIND|unix.MS_REMOUNT|kept|flagBits(op.Flags), "")
}

func idmap(op Op, usernsFD int) error {
	fd, err := cloneIdmapped(op.Src, usernsFD)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.MoveMount(fd, "", unix.AT_FDCWD, op.Dst, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// cloneIdmapped is a detached read-only copy of the mount at src in which owner N is shown as the host id that N maps to
// in the user namespace. Closing it is all the cleaning up it needs.
func cloneIdmapped(src string, usernsFD int) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, src, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open_tree: %w", err)
	}
	attr := unix.MountAttr{
		Attr_set:  unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV,
		Userns_fd: uint64(usernsFD),
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("mount_setattr: %w", err)
	}
	return fd, nil
}

func mask(dst string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dst, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.Mount("tmpfs", dst, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=0,mode=0555,nr_inodes=2")
	}
	return unix.Mount(rootPath+"/dev/null", dst, "", unix.MS_BIND, "")
}

// pivot stacks the old root on top of the new one and takes it off, so that no directory for it is needed inside.
func pivot(dst string) error {
	if err := unix.Chdir(dst); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the old root: %w", err)
	}
	return unix.Chdir("/")
}

// writeFile writes a kernel file, which wants everything in one write.
func writeFile(name, content string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(content)
	return err
}
