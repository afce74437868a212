package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"connectrpc.com/connect"

	"github.com/sluice-edge/sluice/guest/gen/filesystem"
)

// maxListed bounds one listing; a tree larger than this is not something to hold in one message.
const maxListed = 200_000

// filesystemService is the RPC service filesystem.Filesystem.
type filesystemService struct{ *agent }

// rpcError gives an error of the filesystem its Connect code.
func rpcError(doing string, err error) error {
	var already *connect.Error
	if errors.As(err, &already) {
		return err
	}
	code := connect.CodeInternal
	switch {
	case errors.Is(err, fs.ErrNotExist):
		code = connect.CodeNotFound
	case errors.Is(err, fs.ErrPermission):
		code = connect.CodePermissionDenied
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENAMETOOLONG),
		errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENOTEMPTY), errors.Is(err, syscall.EEXIST):
		code = connect.CodeInvalidArgument
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		code = connect.CodeResourceExhausted
	case errors.Is(err, context.DeadlineExceeded):
		code = connect.CodeDeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = connect.CodeCanceled
	}
	return connect.NewError(code, fmt.Errorf("%s: %w", doing, err))
}

func invalid(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}

// Stat describes one file; it does not follow a link.
func (s filesystemService) Stat(
	_ context.Context, req *connect.Request[filesystem.StatRequest],
) (*connect.Response[filesystem.StatResponse], error) {
	path, _, err := s.rpcPath(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	entry, err := s.newEntries().at(path)
	if err != nil {
		return nil, rpcError("file not found", err)
	}
	return connect.NewResponse(&filesystem.StatResponse{Entry: entry}), nil
}

// ListDir lists a directory, depth levels deep. It follows a link at the root and none below, and reports paths under the name that was asked.
func (s filesystemService) ListDir(
	ctx context.Context, req *connect.Request[filesystem.ListDirRequest],
) (*connect.Response[filesystem.ListDirResponse], error) {
	path, _, err := s.rpcPath(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if err := wantDirectory(path); err != nil {
		return nil, err
	}
	found := []*filesystem.EntryInfo{}
	err = s.newEntries().list(ctx, path, max(req.Msg.GetDepth(), 1), &found)
	if err != nil {
		return nil, rpcError("error listing directory", err)
	}
	return connect.NewResponse(&filesystem.ListDirResponse{Entries: found}), nil
}

func wantDirectory(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return rpcError("directory not found", err)
	}
	if !info.IsDir() {
		return invalid("path is not a directory: %s", path)
	}
	return nil
}

func (e *entries) list(ctx context.Context, dir string, depth uint32, found *[]*filesystem.EntryInfo) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	items, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, item := range items {
		if len(*found) == maxListed {
			return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("more than %d entries", maxListed))
		}
		path := filepath.Join(dir, item.Name())
		info, err := item.Info()
		if err != nil {
			continue // gone since the directory was read
		}
		*found = append(*found, e.describe(path, info))
		if !info.IsDir() || depth <= 1 {
			continue
		}
		if err := e.list(ctx, path, depth-1, found); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// MakeDir makes a directory and its parents for the acting user.
func (s filesystemService) MakeDir(
	_ context.Context, req *connect.Request[filesystem.MakeDirRequest],
) (*connect.Response[filesystem.MakeDirResponse], error) {
	path, u, err := s.rpcPath(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	switch info, err := os.Stat(path); {
	case err == nil && info.IsDir():
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("directory already exists: %s", path))
	case err == nil:
		return nil, invalid("path already exists but it is not a directory: %s", path)
	}
	if err := makeDirs(path, u); err != nil {
		return nil, rpcError("error creating directory", err)
	}
	entry, err := s.newEntries().at(path)
	if err != nil {
		return nil, rpcError("error reading directory", err)
	}
	return connect.NewResponse(&filesystem.MakeDirResponse{Entry: entry}), nil
}

// Move renames, and makes the destination's parents. Where rename cannot (two filesystems, or a directory of the read-only template below an
// overlay) it copies and removes, as mv does.
func (s filesystemService) Move(
	_ context.Context, req *connect.Request[filesystem.MoveRequest],
) (*connect.Response[filesystem.MoveResponse], error) {
	source, u, err := s.rpcPath(req.Header(), req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	target, _, err := s.rpcPath(req.Header(), req.Msg.GetDestination())
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(source); err != nil {
		return nil, rpcError("source file not found", err)
	}
	if err := makeDirs(filepath.Dir(target), u); err != nil {
		return nil, rpcError("error creating directory", err)
	}
	err = os.Rename(source, target)
	if errors.Is(err, syscall.EXDEV) {
		if err = copyTree(source, target); err == nil {
			err = os.RemoveAll(source)
		}
	}
	if err != nil {
		return nil, rpcError("error renaming", err)
	}
	entry, err := s.newEntries().at(target)
	if err != nil {
		return nil, rpcError("error reading moved file", err)
	}
	return connect.NewResponse(&filesystem.MoveResponse{Entry: entry}), nil
}

// copyTree copies files, directories and links with owner, mode and time. It builds the copy beside the target and renames it into place.
func copyTree(source, target string) error {
	if within(source, target) {
		return fmt.Errorf("move %s into itself: %w", source, syscall.EINVAL)
	}
	room, err := os.MkdirTemp(filepath.Dir(target), ".moving-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(room)
	built := filepath.Join(room, "tree")
	if err := copyNode(source, built); err != nil {
		return err
	}
	return os.Rename(built, target)
}

// within says whether path is dir or lies below it.
func within(dir, path string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && filepath.IsLocal(rel)
}

func copyNode(source, target string) error {
	info, err := os.Lstat(source)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.ErrUnsupported
	}
	u := account{UID: st.Uid, GID: st.Gid}
	lchown := func() error { return os.Lchown(target, int(st.Uid), int(st.Gid)) }
	switch {
	case info.Mode().IsDir():
		if err := os.Mkdir(target, 0o700); err != nil {
			return err
		}
		items, err := os.ReadDir(source)
		if err != nil {
			return err
		}
		for _, item := range items {
			if err := copyNode(filepath.Join(source, item.Name()), filepath.Join(target, item.Name())); err != nil {
				return err
			}
		}
	case info.Mode().IsRegular():
		if err := copyContent(source, target); err != nil {
			return err
		}
	case info.Mode()&fs.ModeSymlink != 0:
		to, err := os.Readlink(source)
		if err != nil {
			return err
		}
		if err := os.Symlink(to, target); err != nil {
			return err
		}
		return own(lchown, u)
	case info.Mode()&(fs.ModeNamedPipe|fs.ModeSocket) != 0:
		if err := syscall.Mknod(target, st.Mode, 0); err != nil {
			return err
		}
	default:
		return fmt.Errorf("copy device %s: %w", source, syscall.EINVAL)
	}
	if err := own(lchown, u); err != nil {
		return err
	}
	// After the owner, because a change of owner takes the set-id bits away.
	if err := os.Chmod(target, info.Mode()); err != nil {
		return err
	}
	return os.Chtimes(target, info.ModTime(), info.ModTime())
}

func copyContent(source, target string) error {
	from, err := os.Open(source)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	if err == nil {
		err = replaceMetadata(to, readMetadata(source))
	}
	return errors.Join(err, to.Close())
}

// Remove removes a file or a whole tree. What is not there is removed.
func (s filesystemService) Remove(
	_ context.Context, req *connect.Request[filesystem.RemoveRequest],
) (*connect.Response[filesystem.RemoveResponse], error) {
	path, _, err := s.rpcPath(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if path == "/" {
		return nil, invalid("the root directory cannot be removed")
	}
	if err := os.RemoveAll(path); err != nil {
		return nil, rpcError("error removing file or directory", err)
	}
	return connect.NewResponse(&filesystem.RemoveResponse{}), nil
}
