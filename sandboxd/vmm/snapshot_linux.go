package vmm

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/internal/tree"

	"golang.org/x/sys/unix"
)

// Snapshots is a directory of snapshots, each a directory of its own with a manifest. A snapshot appears whole or not at all: it is
// written under another name, synced and renamed. What a crash leaves half-made is removed by the next OpenSnapshots.
type Snapshots struct{ dir string }

// Manifest is what a snapshot consists of. It is written last.
type Manifest struct {
	Version    int               `json:"version"` // of this format
	Hypervisor string            `json:"hypervisor"`
	Created    time.Time         `json:"created"`
	Labels     map[string]string `json:"labels,omitempty"` // of the caller: what must match when it is restored
	Files      []ManifestFile    `json:"files"`            // sorted by name
}

// ManifestFile is one file.
type ManifestFile struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	CRC32C string `json:"crc32c"` // of what is not zero, see sumFile; finds what is torn or rotten, not what is forged
}

// Snapshot is one that is whole, as far as its manifest and the sizes of its files tell. Verify reads everything.
type Snapshot struct {
	Name     string
	Dir      string
	Manifest Manifest
}

const (
	manifestName    = "manifest.json"
	manifestVersion = 1
	maxManifest     = 1 << 20
	draftPrefix     = ".draft-"
	gonePrefix      = ".gone-"
)

var snapshotPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// OpenSnapshots opens the directory, makes it if it is missing, and removes what is half-made or half-removed. One process owns it.
func OpenSnapshots(dir string) (*Snapshots, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), draftPrefix) || strings.HasPrefix(e.Name(), gonePrefix) {
			if err := tree.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, fmt.Errorf("remove half-made snapshot: %w", err)
			}
		}
	}
	return &Snapshots{dir: dir}, nil
}

// Draft is a snapshot that is being written. Exactly one of Commit and Abort ends it.
type Draft struct {
	s    *Snapshots
	name string
	dir  string
}

// Begin makes an empty draft. The name is taken only by Commit.
func (s *Snapshots) Begin(name string) (*Draft, error) {
	if !snapshotPattern.MatchString(name) {
		return nil, errs.New(errs.Invalid, "snapshot name %q is not 1 to 128 of [A-Za-z0-9_.-]", name)
	}
	dir, err := os.MkdirTemp(s.dir, draftPrefix)
	if err != nil {
		return nil, diskError("begin snapshot", err)
	}
	return &Draft{s: s, name: name, dir: dir}, nil
}

// Dir is where the draft's files are; more may be put there until Commit, with plain names.
func (d *Draft) Dir() string { return d.dir }

// CopyIn copies a file into the draft, as sparse as it is.
func (d *Draft) CopyIn(ctx context.Context, name, src string) error {
	return CopySparse(ctx, filepath.Join(d.dir, name), src)
}

// maxTaken bounds how many files a hypervisor may write for one snapshot; an honest one writes three.
const maxTaken = 64

// take moves the files of a directory where a hypervisor may write into the draft. Only plain files are taken, and they are made the
// node's own, so that the next VM's user can read them and no VM's user can write them.
func (d *Draft) take(ctx context.Context, from *os.Root, name string) error {
	// It may have put anything in place of the directory: a link, or a pipe that would be waited for.
	dir, err := from.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(maxTaken + 1)
	switch {
	case errors.Is(err, io.EOF):
		return errors.New("the hypervisor wrote nothing")
	case err != nil:
		return err
	case len(names) > maxTaken:
		return fmt.Errorf("the hypervisor wrote more than %d files", maxTaken)
	}
	target, err := os.Open(d.dir)
	if err != nil {
		return err
	}
	defer target.Close()
	for _, n := range names {
		if !snapshotPattern.MatchString(n) || n == manifestName {
			return fmt.Errorf("the hypervisor wrote a file named %q", clip(n))
		}
		err := moveFile(dir, n, target)
		if errors.Is(err, unix.EXDEV) {
			err = d.copyFrom(ctx, dir, n)
		}
		if err != nil {
			return diskError("take "+n, err)
		}
		if err := own(filepath.Join(d.dir, n)); err != nil {
			return err
		}
	}
	return nil
}

// moveFile moves anything but a directory, which its owner could go on filling.
func moveFile(from *os.File, name string, to *os.File) error {
	if err := unix.Linkat(int(from.Fd()), name, int(to.Fd()), name, 0); err != nil {
		return err
	}
	return unix.Unlinkat(int(from.Fd()), name, 0)
}

// discard removes a directory where a hypervisor may write at this very moment. What there is more than an honest one would leave stays
// until its VM's directory is removed.
func discard(from *os.Root, name string) {
	dir, err := from.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(maxTaken)
	for _, n := range names {
		_ = unix.Unlinkat(int(dir.Fd()), n, 0)
	}
	_ = from.Remove(name)
}

// copyFrom is for a VM's directory on another file system.
func (d *Draft) copyFrom(ctx context.Context, dir *os.File, name string) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	src := os.NewFile(uintptr(fd), name)
	defer src.Close()
	return copySparse(ctx, filepath.Join(d.dir, name), src)
}

// own makes a file root's, readable by every VM's user: the directories above are root's alone, and a VM sees what is bound into its tree.
func own(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		return fmt.Errorf("%s is not a plain file", filepath.Base(path))
	}
	if err := unix.Fchown(fd, os.Geteuid(), os.Getegid()); err != nil {
		return err
	}
	return unix.Fchmod(fd, 0o444)
}

// Commit sums and syncs the draft's files, writes the manifest and gives the snapshot its name. A name that is taken is a Conflict; the
// draft is gone after any error.
func (d *Draft) Commit(ctx context.Context, hypervisor string, labels map[string]string) (snap Snapshot, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Abort())
		}
	}()
	m := Manifest{Version: manifestVersion, Hypervisor: hypervisor, Created: time.Now().UTC().Truncate(time.Second), Labels: labels}
	entries, err := os.ReadDir(d.dir) // sorted
	if err != nil {
		return Snapshot{}, fmt.Errorf("commit snapshot %s: %w", d.name, err)
	}
	for _, e := range entries {
		if e.Name() == manifestName || !e.Type().IsRegular() {
			return Snapshot{}, fmt.Errorf("commit snapshot %s: %q cannot be part of one", d.name, e.Name())
		}
		if ctx.Err() != nil {
			return Snapshot{}, fmt.Errorf("commit snapshot %s: %w", d.name, context.Cause(ctx))
		}
		// Whoever wrote it may have a lease on it still (fcntl(2)), which an open would wait for.
		f, err := os.OpenFile(filepath.Join(d.dir, e.Name()), os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return Snapshot{}, fmt.Errorf("commit snapshot %s: %w", d.name, err)
		}
		entry, err := sumFile(ctx, f, dig)
		if err == nil {
			err = f.Sync()
		}
		f.Close()
		if err != nil {
			return Snapshot{}, diskError("commit snapshot "+d.name, err)
		}
		entry.Name = e.Name()
		m.Files = append(m.Files, entry)
	}
	if len(m.Files) == 0 {
		return Snapshot{}, fmt.Errorf("commit snapshot %s: it is empty", d.name)
	}
	text, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return Snapshot{}, err
	}
	if err := writeSynced(filepath.Join(d.dir, manifestName), append(text, '\n')); err != nil {
		return Snapshot{}, diskError("commit snapshot "+d.name, err)
	}
	if err := os.Chmod(d.dir, 0o755); err != nil { // the VM that is restored from it looks inside
		return Snapshot{}, fmt.Errorf("commit snapshot %s: %w", d.name, err)
	}
	if err := syncDir(d.dir); err != nil {
		return Snapshot{}, diskError("commit snapshot "+d.name, err)
	}
	final := filepath.Join(d.s.dir, d.name)
	err = unix.Renameat2(unix.AT_FDCWD, d.dir, unix.AT_FDCWD, final, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		return Snapshot{}, errs.New(errs.Conflict, "a snapshot named %q exists", d.name)
	}
	if err != nil {
		return Snapshot{}, diskError("commit snapshot "+d.name, err)
	}
	if err := syncDir(d.s.dir); err != nil { // nobody may find what its maker believes to have failed
		return Snapshot{}, diskError("commit snapshot "+d.name, errors.Join(err, os.Rename(final, d.dir)))
	}
	d.dir = ""
	return Snapshot{Name: d.name, Dir: final, Manifest: m}, nil
}

// Abort removes the draft. After Commit it does nothing.
func (d *Draft) Abort() error {
	if d.dir == "" {
		return nil
	}
	err := os.RemoveAll(d.dir)
	if err == nil {
		d.dir = ""
	}
	return err
}

// Open returns a snapshot that is whole as far as its manifest and the sizes of its files tell. One that is not is refused: NotFound
// when there is none, Unavailable when it is torn.
func (s *Snapshots) Open(name string) (Snapshot, error) {
	if !snapshotPattern.MatchString(name) {
		return Snapshot{}, errs.New(errs.NotFound, "there is no snapshot %q", clip(name))
	}
	dir := filepath.Join(s.dir, name)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return Snapshot{}, errs.New(errs.NotFound, "there is no snapshot %q", name)
	}
	torn := func(err error) error {
		return &errs.Error{Code: errs.Unavailable, Err: err,
			Msg: fmt.Sprintf("snapshot %q is damaged: remove it and make it again", name)}
	}
	text, err := readLimited(filepath.Join(dir, manifestName), maxManifest)
	if err != nil {
		return Snapshot{}, torn(err)
	}
	m, err := parseManifest(text)
	if err != nil {
		return Snapshot{}, torn(err)
	}
	for _, f := range m.Files {
		st, err := os.Lstat(filepath.Join(dir, f.Name))
		if err == nil && (!st.Mode().IsRegular() || st.Size() != f.Size) {
			err = fmt.Errorf("%s has %d bytes, and its manifest says %d", f.Name, st.Size(), f.Size)
		}
		if err != nil {
			return Snapshot{}, torn(err)
		}
	}
	return Snapshot{Name: name, Dir: dir, Manifest: m}, nil
}

// Verify reads the whole snapshot and compares it with its manifest.
func (s *Snapshots) Verify(ctx context.Context, name string) error {
	snap, err := s.Open(name)
	if err != nil {
		return err
	}
	for _, want := range snap.Manifest.Files {
		f, err := os.OpenFile(filepath.Join(snap.Dir, want.Name), os.O_RDONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return fmt.Errorf("verify snapshot %s: %w", name, err)
		}
		got, err := sumFile(ctx, f, nil)
		f.Close()
		if err != nil {
			return fmt.Errorf("verify snapshot %s: %w", name, err)
		}
		if got.Size != want.Size || got.CRC32C != want.CRC32C {
			return &errs.Error{Code: errs.Unavailable, Msg: fmt.Sprintf("snapshot %q is damaged: remove it and make it again", name),
				Err: fmt.Errorf("%s has checksum %s, and its manifest says %s", want.Name, got.CRC32C, want.CRC32C)}
		}
	}
	return nil
}

// List returns the names, sorted, of all snapshots, damaged ones too.
func (s *Snapshots) List() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && snapshotPattern.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Remove removes a snapshot. A VM that was restored from it on demand keeps what it needs. One that is not there is no error.
func (s *Snapshots) Remove(name string) error {
	if !snapshotPattern.MatchString(name) {
		return nil
	}
	gone := filepath.Join(s.dir, gonePrefix+randomName())
	err := os.Rename(filepath.Join(s.dir, name), gone) // so that a crash leaves no half of it under its name
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = errors.Join(syncDir(s.dir), os.RemoveAll(gone)) // after a crash of the host too it has no name any more
	}
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", name, err)
	}
	return nil
}

// Usage is the disk space that a snapshot takes, which is less than its sizes where it is sparse.
func (s *Snapshots) Usage(name string) (bytes int64, err error) {
	if !snapshotPattern.MatchString(name) {
		return 0, nil
	}
	return Usage(filepath.Join(s.dir, name))
}

// TotalUsage is the disk space of everything here, drafts included.
func (s *Snapshots) TotalUsage() (bytes int64, err error) { return Usage(s.dir) }

// Usage is the disk space that a directory takes with all that is in it.
func Usage(dir string) (bytes int64, err error) {
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err == nil {
			bytes += st.Blocks * 512
		}
		return nil
	})
	return bytes, err
}

// parseManifest accepts what Commit writes, and nothing that names a file outside of the snapshot.
func parseManifest(text []byte) (Manifest, error) {
	var m Manifest
	if err := json.Unmarshal(text, &m); err != nil {
		return Manifest{}, fmt.Errorf("read manifest: %w", err)
	}
	if m.Version != manifestVersion {
		return Manifest{}, fmt.Errorf("read manifest: its version is %d, and this program knows %d", m.Version, manifestVersion)
	}
	if len(m.Files) == 0 {
		return Manifest{}, errors.New("read manifest: it names no files")
	}
	for i, f := range m.Files {
		if !snapshotPattern.MatchString(f.Name) || f.Name == manifestName || f.Size < 0 {
			return Manifest{}, fmt.Errorf("read manifest: file %q cannot be part of a snapshot", clip(f.Name))
		}
		if i > 0 && m.Files[i-1].Name >= f.Name {
			return Manifest{}, fmt.Errorf("read manifest: file %q is out of order", clip(f.Name))
		}
	}
	return m, nil
}

const sumBlock = 64 << 10

// sumFile sums a file's content: of each block of 64 KiB that is not all zeros its position and its bytes. So holes cost nothing, and a
// copy that is sparse elsewhere has the same sum. onZeros is told of blocks that are zeros without being holes; nil is nobody.
func sumFile(ctx context.Context, f *os.File, onZeros func(f *os.File, pos, n int64) error) (ManifestFile, error) {
	st, err := f.Stat()
	if err != nil {
		return ManifestFile{}, err
	}
	if !st.Mode().IsRegular() {
		return ManifestFile{}, fmt.Errorf("%s is not a plain file", filepath.Base(f.Name()))
	}
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	buf := make([]byte, sumBlock)
	for pos := int64(0); pos < st.Size(); {
		if err := ctx.Err(); err != nil {
			return ManifestFile{}, context.Cause(ctx)
		}
		data, err := nextData(f, pos, st.Size())
		if err != nil {
			return ManifestFile{}, err
		}
		if pos = max(pos, data/sumBlock*sumBlock); pos >= st.Size() {
			break
		}
		n, err := f.ReadAt(buf, pos)
		if err != nil && !errors.Is(err, io.EOF) {
			return ManifestFile{}, err
		}
		if n == 0 {
			return ManifestFile{}, io.ErrUnexpectedEOF // it shrank
		}
		if !allZero(buf[:n]) {
			var at [8]byte
			binary.BigEndian.PutUint64(at[:], uint64(pos))
			h.Write(at[:])
			h.Write(buf[:n])
		} else if onZeros != nil {
			if err := onZeros(f, pos, int64(n)); err != nil {
				return ManifestFile{}, err
			}
		}
		pos += sumBlock
	}
	return ManifestFile{Size: st.Size(), CRC32C: hex.EncodeToString(h.Sum(nil))}, nil
}

// dig makes a hole of a block that is zeros: memory that a guest has had and cleared, or that came back from an earlier snapshot.
func dig(f *os.File, pos, n int64) error {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, pos, n)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	return err
}

// nextData is where the first byte at or after pos is that may not be zero; size when there is none.
func nextData(f *os.File, pos, size int64) (int64, error) {
	at, err := unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return size, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTSUP):
		return pos, nil // a file system without holes
	case err != nil:
		return 0, fmt.Errorf("find data in %s: %w", filepath.Base(f.Name()), err)
	}
	return at, nil
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 })
}

// CopySparse copies a file to a new one, sharing its blocks where the file system can and leaving its holes out elsewhere.
func CopySparse(ctx context.Context, dst, src string) error {
	in, err := os.OpenFile(src, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0) // a VM's disk is its user's
	if err != nil {
		return fmt.Errorf("copy %s: %w", src, err)
	}
	defer in.Close()
	return copySparse(ctx, dst, in)
}

func copySparse(ctx context.Context, dst string, in *os.File) (err error) {
	st, err := in.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("copy %s: not a plain file", in.Name())
	}
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return diskError("copy "+in.Name(), err)
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			err = diskError("copy "+in.Name(), errors.Join(err, os.Remove(dst)))
		}
	}()
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		return nil
	}
	if err := out.Truncate(st.Size()); err != nil {
		return err
	}
	buf := make([]byte, sumBlock)
	for pos := int64(0); pos < st.Size(); {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		data, err := nextData(in, pos, st.Size())
		if err != nil {
			return err
		}
		if pos = max(pos, data/sumBlock*sumBlock); pos >= st.Size() {
			break
		}
		n, err := in.ReadAt(buf, pos)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		if !allZero(buf[:n]) {
			if _, err := out.WriteAt(buf[:n], pos); err != nil {
				return err
			}
		}
		pos += int64(n)
	}
	return nil
}

// diskError gives a full disk its meaning.
func diskError(what string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return &errs.Error{Code: errs.Exhausted, Msg: "no disk space is left on the node", Err: fmt.Errorf("%s: %w", what, err)}
	}
	return fmt.Errorf("%s: %w", what, err)
}

func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", filepath.Base(path), limit)
	}
	return b, err
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func randomName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
