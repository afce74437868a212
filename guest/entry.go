package guest

import (
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sluice-edge/sluice/guest/gen/filesystem"
)

// entries describes files; it reads the account names once for all of them.
type entries struct {
	users, groups map[uint32]string
}

func (a *agent) newEntries() *entries {
	users, groups := a.accounts.names()
	return &entries{users, groups}
}

func (e *entries) at(path string) (*filesystem.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	return e.describe(path, info), nil
}

// describe is the entry of path. As with E2B a link has the type and mode of what it leads to, the size and owner of its own, and the
// resolved target; a link to nowhere has no type.
func (e *entries) describe(path string, info fs.FileInfo) *filesystem.EntryInfo {
	entry := &filesystem.EntryInfo{
		Name:         validName(filepath.Base(path)),
		Path:         validName(path),
		Type:         fileType(info.Mode()),
		Size:         info.Size(),
		Mode:         uint32(info.Mode().Perm()),
		Permissions:  info.Mode().String(),
		ModifiedTime: timestamppb.New(info.ModTime()),
		Metadata:     readMetadata(path),
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		entry.Owner, entry.Group = nameOf(e.users, st.Uid), nameOf(e.groups, st.Gid)
	}
	if info.Mode()&fs.ModeSymlink == 0 {
		return entry
	}
	entry.Type, entry.Mode = filesystem.FileType_FILE_TYPE_UNSPECIFIED, 0
	if behind, err := os.Stat(path); err == nil {
		entry.Type, entry.Mode = fileType(behind.Mode()), uint32(behind.Mode().Perm())
	}
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		target = path
	}
	target = validName(target)
	entry.SymlinkTarget = &target
	return entry
}

func fileType(m fs.FileMode) filesystem.FileType {
	switch {
	case m.IsRegular():
		return filesystem.FileType_FILE_TYPE_FILE
	case m.IsDir():
		return filesystem.FileType_FILE_TYPE_DIRECTORY
	case m&fs.ModeSymlink != 0:
		return filesystem.FileType_FILE_TYPE_SYMLINK
	default:
		return filesystem.FileType_FILE_TYPE_UNSPECIFIED
	}
}

func nameOf(names map[uint32]string, id uint32) string {
	if name, ok := names[id]; ok {
		return validName(name)
	}
	return strconv.FormatUint(uint64(id), 10)
}

// validName makes a name fit for a message. Linux names are bytes; one that is not UTF-8 would make the whole answer unencodable.
func validName(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
