package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/errs"
)

// DataLabel is the volume name of writable layers, by which the guest can find them.
const DataLabel = "sluice-data"

const (
	minDiskMiB = 32
	maxDiskMiB = 16 << 20
)

// Disk returns an empty writable layer of the given size, made by the first who asks: a sparse ext4 image that is a function of
// its size alone. It is to be copied with CopyDisk, never to be written.
func (s *Store) Disk(ctx context.Context, mib int) (string, error) {
	if mib < minDiskMiB || mib > maxDiskMiB {
		return "", errs.New(errs.Invalid, "a disk of %d MiB: want %d to %d", mib, minDiskMiB, maxDiskMiB)
	}
	name := fmt.Sprintf("data-%d.ext4", mib)
	path := filepath.Join(s.dir, disksDir, name)
	if regular(path) == nil {
		return path, nil
	}
	unlock, err := s.lock(ctx, disksDir+name)
	if err != nil {
		return "", err
	}
	defer unlock()
	if regular(path) == nil {
		return path, nil
	}
	temp := path + ".new" // the lock says that it belongs to nobody alive
	if err := makeDisk(ctx, temp, mib); err != nil {
		return "", errors.Join(err, os.RemoveAll(temp))
	}
	if err := os.Rename(temp, path); err != nil {
		return "", errors.Join(fmt.Errorf("put disk in place: %w", err), os.Remove(temp))
	}
	return path, syncDir(filepath.Dir(path))
}

// diskFeatures are named one by one, since the defaults depend on the version of mke2fs and on the host's mke2fs.conf.
const diskFeatures = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink," +
	"extra_isize,metadata_csum"

func makeDisk(ctx context.Context, path string, mib int) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	defer f.Close()
	if err := f.Truncate(int64(mib) << 20); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	args := []string{
		"-q", "-F", "-t", "ext4", "-O", diskFeatures, "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-L", DataLabel,
		"-U", "5c1ce000-0000-4000-8000-00000000da7a",
		// Prezeroed: a sparse file reads as zeros, so nothing needs to be written now, nor by the guest's kernel later.
		"-E", "hash_seed=5c1ce000-0000-4000-8000-000000005eed,root_owner=0:0,lazy_itable_init=0,assume_storage_prezeroed=1",
	}
	// A journal holds what was changed but not yet put in its place. The default of 64 MiB and more is for busy servers.
	if mib >= 256 {
		args = append(args, "-J", "size=16")
	}
	cmd := exec.CommandContext(ctx, "mke2fs", append(args, path, strconv.Itoa(mib<<8))...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin", "LC_ALL=C", "MKE2FS_CONFIG=/dev/null", "E2FSPROGS_FAKE_TIME=1"}
	if cmd.Err != nil {
		if _, err := os.Stat("/usr/sbin/mke2fs"); err != nil {
			return &errs.Error{Code: errs.Unavailable, Msg: "mke2fs is missing: install the package e2fsprogs", Err: cmd.Err}
		}
		cmd.Path, cmd.Err = "/usr/sbin/mke2fs", nil
	}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mke2fs for a disk of %d MiB: %w: %s", mib, err, clip(strings.TrimSpace(said.String())))
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	return nil
}

// CopyDisk makes a private copy that shares its blocks with the original where the file system can, and else has the same holes. to must
// not exist; after an error it does not.
func CopyDisk(to, from string) (err error) {
	src, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("open disk: %w", err)
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("copy disk: %w", err)
	}
	defer dst.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(to))
		}
	}()
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err == nil {
		return nil
	}
	if err := copySparse(dst, src); err != nil {
		return fmt.Errorf("copy disk: %w", err)
	}
	return nil
}

func copySparse(dst, src *os.File) error {
	info, err := src.Stat()
	if err != nil {
		return err
	}
	if err := dst.Truncate(info.Size()); err != nil {
		return err
	}
	for at := int64(0); ; {
		from, err := src.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // nothing but a hole is left
		}
		if err != nil {
			return err
		}
		if at, err = src.Seek(from, unix.SEEK_HOLE); err != nil {
			return err
		}
		if _, err := src.Seek(from, io.SeekStart); err != nil {
			return err
		}
		if _, err := dst.Seek(from, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.CopyN(dst, src, at-from); err != nil {
			return err
		}
	}
}
