package image

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Directories of a store that are no templates; no name begins with a dot.
const (
	buildingDir = ".building" // half-made and half-removed templates
	locksDir    = ".locks"
	disksDir    = ".disks"
)

// Store keeps templates as <dir>/<name>/<tag>/, each with a manifest. A template appears and disappears in one step. Several processes
// may use one store.
type Store struct {
	dir string
}

// OpenStore opens the store in dir, makes it if need be, and removes what builders left there that died.
func OpenStore(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open template store: %w", err)
	}
	for _, sub := range []string{"", buildingDir, locksDir, disksDir} {
		// Others may pass and not look around: a machine's process has a user of its own, and is told its files.
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o711); err != nil {
			return nil, fmt.Errorf("make template store: %w", err)
		}
	}
	s := &Store{dir: dir}
	if err := s.Sweep(); err != nil {
		return nil, err
	}
	return s, nil
}

// Template is a finished template.
type Template struct {
	Manifest
	Dir string
}

// RootPath is the read-only root image.
func (t Template) RootPath() string { return filepath.Join(t.Dir, t.Root.Name) }

// KernelPath is the kernel.
func (t Template) KernelPath() string { return filepath.Join(t.Dir, t.Kernel.Name) }

// InitramfsPath is what the kernel unpacks as its first root.
func (t Template) InitramfsPath() string { return filepath.Join(t.Dir, t.Initramfs.Name) }

func (s *Store) path(n Name) string { return filepath.Join(s.dir, n.dir(), n.Tag) }

// Get finds a template by its name. One whose files are not what its manifest says is refused; Verify looks at every byte.
//
// A name that no template has may be another's alias.
func (s *Store) Get(reference string) (Template, error) {
	n, err := ParseName(reference)
	if err != nil {
		return Template{}, err
	}
	t, err := s.get(n)
	if errs.CodeOf(err) != errs.NotFound || n.Tag != DefaultTag {
		return t, err
	}
	all, _ := s.List() // what is broken in there is not what was asked for
	for _, other := range all {
		if slices.Contains(other.Aliases, n.Base()) {
			return other, nil
		}
	}
	return Template{}, err
}

// checkAliases refuses a further name of n that another template has: Get would go on finding that one.
func (s *Store) checkAliases(n Name, aliases []string) error {
	all, _ := s.List() // what is broken in there has no names
	for _, t := range all {
		if t.Name == n.Base() && t.Tag == n.Tag {
			continue
		}
		for _, alias := range aliases {
			if name, err := ParseName(alias); err == nil && (t.Name == name.Base() || slices.Contains(t.Aliases, name.Base())) {
				return errs.New(errs.Conflict, "alias '%s' is a name of template '%s' already: build that anew, or remove it", name, Name{Alias: t.Name, Tag: t.Tag})
			}
		}
	}
	return nil
}

func (s *Store) get(n Name) (Template, error) {
	t := Template{Dir: s.path(n)}
	raw, err := os.ReadFile(filepath.Join(t.Dir, manifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return Template{}, errs.New(errs.NotFound, "template '%s' not found", n)
	}
	if err != nil {
		return Template{}, fmt.Errorf("read manifest of template %s: %w", n, err)
	}
	if t.Manifest, err = parseManifest(raw); err != nil {
		return Template{}, fmt.Errorf("template %s: %w", n, err)
	}
	for _, f := range t.files() {
		info, err := os.Stat(filepath.Join(t.Dir, f.Name))
		if err != nil {
			return Template{}, fmt.Errorf("template %s is damaged, build it again: %w", n, err)
		}
		if info.Size() != f.Size {
			return Template{}, fmt.Errorf("template %s is damaged, build it again: %s has %d bytes, not %d", n, f.Name, info.Size(), f.Size)
		}
	}
	return t, nil
}

// Verify reads all files and compares them with the manifest.
func (t Template) Verify(ctx context.Context) error {
	for _, want := range t.files() {
		got, err := describe(ctx, t.Dir, want.Name)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("template %s is damaged, build it again: %s is not what the manifest says", t.Name, want.Name)
		}
	}
	return nil
}

// List returns all templates by name and tag. Of one that cannot be used only the name is returned, and the reason is part of the error.
func (s *Store) List() ([]Template, error) {
	var all []Template
	var broken error
	names, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	for _, name := range names {
		if strings.HasPrefix(name.Name(), ".") {
			continue
		}
		tags, err := os.ReadDir(filepath.Join(s.dir, name.Name()))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list templates: %w", err)
		}
		for _, tag := range tags {
			n, err := nameOfDir(name.Name(), tag.Name())
			if err != nil {
				continue // nothing of ours
			}
			t, err := s.get(n)
			if errs.CodeOf(err) == errs.NotFound {
				continue
			}
			if err != nil {
				broken = errors.Join(broken, err)
				t = Template{Manifest: Manifest{Name: n.Base(), Tag: n.Tag}, Dir: s.path(n)}
			}
			all = append(all, t)
		}
	}
	slices.SortFunc(all, func(a, b Template) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Tag, b.Tag)) })
	return all, broken
}

// Usage is what a template takes of the disk, in bytes: sparse files count with what is written of them.
func (t Template) Usage() (int64, error) {
	var sum int64
	err := filepath.WalkDir(t.Dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			sum += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("measure template %s: %w", t.Name, err)
	}
	return sum, nil
}

// Remove deletes a template. Files of it that somebody has open, or has linked elsewhere, stay with them.
func (s *Store) Remove(reference string) error {
	n, err := ParseName(reference)
	if err != nil {
		return err
	}
	unlock, err := s.tryLock(n.dir())
	if err != nil {
		return err
	}
	defer unlock()
	temp, err := s.tempDir(n)
	if err != nil {
		return err
	}
	err = os.Rename(s.path(n), filepath.Join(temp, n.Tag))
	if errors.Is(err, fs.ErrNotExist) {
		err = errs.New(errs.NotFound, "template '%s' not found", n)
	}
	if err == nil {
		err = syncDir(filepath.Dir(s.path(n)))
	}
	// Fails as long as there are other tags, and says nothing new then.
	_ = os.Remove(filepath.Dir(s.path(n)))
	return errors.Join(err, os.RemoveAll(temp))
}

// Sweep removes what dead builders left behind. Whoever is building holds the lock of the name, and keeps it from us.
func (s *Store) Sweep() error {
	left, err := os.ReadDir(filepath.Join(s.dir, buildingDir))
	if err != nil {
		return fmt.Errorf("look for dead builds: %w", err)
	}
	for _, d := range left {
		name, _, _ := strings.Cut(d.Name(), tempSeparator)
		unlock, err := s.tryLock(name)
		if errs.CodeOf(err) == errs.Conflict {
			continue
		}
		if err != nil {
			return err
		}
		err = os.RemoveAll(filepath.Join(s.dir, buildingDir, d.Name()))
		unlock()
		if err != nil {
			return fmt.Errorf("remove dead build: %w", err)
		}
	}
	return nil
}

// tempSeparator is in no name.
const tempSeparator = "~"

// tempDir makes a directory for a template that is not one yet, or no longer. The caller holds the lock of the name.
func (s *Store) tempDir(n Name) (string, error) {
	dir, err := os.MkdirTemp(filepath.Join(s.dir, buildingDir), n.dir()+tempSeparator)
	if err != nil {
		return "", fmt.Errorf("make build directory: %w", err)
	}
	return dir, nil
}

// commit makes what is in temp the template of this name, in one step. temp is gone afterwards, or holds what was there before.
func (s *Store) commit(n Name, temp string, m Manifest) error {
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("encode manifest: %w", err)
	}
	if err := writeFile(filepath.Join(temp, manifestName), append(raw, '\n')); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	if err := syncTree(temp); err != nil {
		return err
	}
	final := s.path(n)
	if err := os.MkdirAll(filepath.Dir(final), 0o711); err != nil {
		return fmt.Errorf("make directory of template: %w", err)
	}
	err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, final, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		err = os.Rename(temp, final)
	}
	if err != nil {
		return fmt.Errorf("put template in place: %w", err)
	}
	for _, dir := range []string{filepath.Dir(final), s.dir} {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// tryLock takes what one process at a time may hold, and lets go of by its death. Somebody else's lock is a conflict.
func (s *Store) tryLock(name string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(s.dir, locksDir, name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { f.Close() }, nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EWOULDBLOCK):
			f.Close()
			return nil, errs.New(errs.Conflict, "template '%s' is being built or removed by another process", strings.Replace(name, "+", "/", 1))
		}
		f.Close()
		return nil, fmt.Errorf("take lock: %w", err)
	}
}

// lock waits for its turn.
func (s *Store) lock(ctx context.Context, name string) (unlock func(), err error) {
	for {
		unlock, err := s.tryLock(name)
		if errs.CodeOf(err) != errs.Conflict {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for lock: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond): // a lock has no descriptor to wait on
		}
	}
}

func writeFile(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Close()
}

// copyFile copies a host's file into a build.
func copyFile(to, from string) error {
	if err := regular(from); err != nil {
		return err
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer dst.Close()
	if _, err := io.Copy(dst, src); err != nil {
		return err
	}
	return dst.Close()
}

// syncTree makes everything below dir safe on the disk.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() && !d.Type().IsRegular() {
			return err
		}
		return syncDir(path)
	})
}

// syncDir works for directories and files alike.
func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	return nil
}
