package vmm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"

	"golang.org/x/sys/unix"
)

func openSnapshots(t *testing.T) *Snapshots {
	t.Helper()
	s, err := OpenSnapshots(filepath.Join(t.TempDir(), "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// writeSparse writes blocks of data with holes and zeros between them.
func writeSparse(t *testing.T, path string) []byte {
	t.Helper()
	const size = 4<<20 + 123
	whole := make([]byte, size)
	random := rand.New(rand.NewPCG(1, 2))
	for _, at := range []int{0, 1 << 20, 1<<20 + 5000, 3<<20 + 7, size - 100} {
		for i := range 100 {
			whole[at+i] = byte(random.IntN(255) + 1)
		}
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 1 << 20, 3 << 20} {
		if _, err := f.WriteAt(whole[at:at+(300<<10)], at); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteAt(whole[size-100:], size-100); err != nil {
		t.Fatal(err)
	}
	return whole
}

func commitOne(t *testing.T, s *Snapshots, name string) (Snapshot, []byte) {
	t.Helper()
	d, err := s.Begin(name)
	if err != nil {
		t.Fatal(err)
	}
	whole := writeSparse(t, filepath.Join(d.Dir(), "memory-ranges"))
	if err := os.WriteFile(filepath.Join(d.Dir(), "config.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	snap, err := d.Commit(t.Context(), "v53.0.0", map[string]string{"template": "base"})
	if err != nil {
		t.Fatalf("Commit: %v", err)
	}
	if err := d.Abort(); err != nil {
		t.Errorf("Abort after Commit: %v", err)
	}
	return snap, whole
}

func TestSnapshot(t *testing.T) {
	s := openSnapshots(t)
	snap, whole := commitOne(t, s, "one")
	got, err := s.Open("one")
	if err != nil || got.Dir != snap.Dir || got.Manifest.Labels["template"] != "base" || got.Manifest.Hypervisor != "v53.0.0" || len(got.Manifest.Files) != 2 {
		t.Errorf("Open = %+v, %v", got, err)
	}
	if b, err := os.ReadFile(filepath.Join(snap.Dir, "memory-ranges")); err != nil || !bytes.Equal(b, whole) {
		t.Errorf("Commit changed the content: %v", err)
	}
	if err := s.Verify(t.Context(), "one"); err != nil {
		t.Errorf("Verify: %v", err)
	}
	// Of the zeros that were written, whole blocks became holes.
	used, err := s.Usage("one")
	if err != nil || used == 0 || used > 600<<10 {
		t.Errorf("Usage = %d, %v: zeros take space", used, err)
	}
	if total, err := s.TotalUsage(); err != nil || total < used {
		t.Errorf("TotalUsage = %d, %v", total, err)
	}

	second, err := s.Begin("one")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(second.Dir(), "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Commit(t.Context(), "v53.0.0", nil); errs.CodeOf(err) != errs.Conflict {
		t.Errorf("Commit under a name that is taken: %v, want Conflict", err)
	}
	if names, err := s.List(); err != nil || len(names) != 1 || names[0] != "one" {
		t.Errorf("List = %q, %v", names, err)
	}
	for range 2 {
		if err := s.Remove("one"); err != nil {
			t.Errorf("Remove: %v", err)
		}
	}
	if _, err := s.Open("one"); errs.CodeOf(err) != errs.NotFound {
		t.Errorf("Open of a removed one: %v, want NotFound", err)
	}
	if left, err := os.ReadDir(s.dir); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

// TestSnapshotTorn: whatever a crash or a disk does to a snapshot, it is refused with an error that names it.
func TestSnapshotTorn(t *testing.T) {
	edit := func(name string, f func(dir string) error) {
		t.Run(name, func(t *testing.T) {
			s := openSnapshots(t)
			snap, _ := commitOne(t, s, "one")
			if err := f(snap.Dir); err != nil {
				t.Fatal(err)
			}
			err := s.Verify(t.Context(), "one")
			if errs.CodeOf(err) != errs.Unavailable || !strings.Contains(errs.Message(err), `"one" is damaged`) {
				t.Errorf("Verify: %v, want Unavailable that names it", err)
			}
			if strings.Contains(errs.Message(err), s.dir) {
				t.Errorf("the message shows a path: %s", errs.Message(err))
			}
		})
	}
	edit("no manifest", func(dir string) error { return os.Remove(filepath.Join(dir, manifestName)) })
	edit("empty manifest", func(dir string) error { return os.Truncate(filepath.Join(dir, manifestName), 0) })
	edit("half manifest", func(dir string) error { return os.Truncate(filepath.Join(dir, manifestName), 50) })
	edit("later format", func(dir string) error { return rewriteManifest(dir, func(m *Manifest) { m.Version++ }) })
	edit("file outside", func(dir string) error {
		return rewriteManifest(dir, func(m *Manifest) { m.Files[0].Name = "../../etc/passwd" })
	})
	edit("missing file", func(dir string) error { return os.Remove(filepath.Join(dir, "config.json")) })
	edit("short memory", func(dir string) error { return os.Truncate(filepath.Join(dir, "memory-ranges"), 1<<20) })
	edit("long memory", func(dir string) error { return os.Truncate(filepath.Join(dir, "memory-ranges"), 5<<20) })
	edit("rotten file", func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "config.json"), []byte("[]"), 0o600)
	})
	edit("lost block", func(dir string) error {
		f, err := os.OpenFile(filepath.Join(dir, "memory-ranges"), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return errors.Join(unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 3<<20, 64<<10), f.Close())
	})
	edit("link", func(dir string) error {
		name := filepath.Join(dir, "config.json")
		return errors.Join(os.Remove(name), os.Symlink("/etc/passwd", name))
	})
}

func rewriteManifest(dir string, edit func(*Manifest)) error {
	name := filepath.Join(dir, manifestName)
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	edit(&m)
	if b, err = json.Marshal(m); err != nil {
		return err
	}
	return os.WriteFile(name, b, 0o600)
}

// TestSnapshotCrash: what was half-made when the process died is gone when the next one starts, and nothing of it was ever to be seen.
func TestSnapshotCrash(t *testing.T) {
	s := openSnapshots(t)
	commitOne(t, s, "whole")
	d, err := s.Begin("half")
	if err != nil {
		t.Fatal(err)
	}
	writeSparse(t, filepath.Join(d.Dir(), "memory-ranges"))
	if err := os.Mkdir(filepath.Join(s.dir, gonePrefix+"x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if names, err := s.List(); err != nil || len(names) != 1 {
		t.Errorf("List = %q, %v, want only what is whole", names, err)
	}
	if _, err := s.Open("half"); errs.CodeOf(err) != errs.NotFound {
		t.Errorf("Open of a draft: %v, want NotFound", err)
	}
	again, err := OpenSnapshots(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(s.dir); err != nil || len(left) != 1 || left[0].Name() != "whole" {
		t.Errorf("left are %v, %v", left, err)
	}
	if err := again.Verify(t.Context(), "whole"); err != nil {
		t.Errorf("Verify: %v", err)
	}
}

func TestSnapshotNames(t *testing.T) {
	s := openSnapshots(t)
	for _, name := range []string{"", ".", "..", "a/b", "../a", ".draft-x", "-", strings.Repeat("x", 129), "a\n"} {
		if _, err := s.Begin(name); errs.CodeOf(err) != errs.Invalid {
			t.Errorf("Begin(%q): %v, want Invalid", name, err)
		}
		if _, err := s.Open(name); errs.CodeOf(err) != errs.NotFound {
			t.Errorf("Open(%q): %v, want NotFound", name, err)
		}
		if err := s.Remove(name); err != nil {
			t.Errorf("Remove(%q): %v", name, err)
		}
	}
}

// TestTakeRefuses: a hypervisor that was taken over cannot hand us anything but plain files of its own.
func TestTakeRefuses(t *testing.T) {
	check := func(name string, prepare func(dir string) error) {
		t.Run(name, func(t *testing.T) {
			s := openSnapshots(t)
			d, err := s.Begin("one")
			if err != nil {
				t.Fatal(err)
			}
			out := t.TempDir()
			if err := os.Mkdir(filepath.Join(out, "s1"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := prepare(filepath.Join(out, "s1")); err != nil {
				t.Fatal(err)
			}
			r, err := os.OpenRoot(out)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			taken := make(chan error, 1)
			go func() { taken <- d.take(t.Context(), r, "s1") }()
			select {
			case err = <-taken:
			case <-time.After(time.Minute):
				t.Fatal("take waits for the hypervisor")
			}
			if err == nil {
				if _, err := d.Commit(t.Context(), "x", nil); err == nil {
					t.Error("it is taken")
				}
			}
			if err := d.Abort(); err != nil {
				t.Errorf("Abort: %v", err)
			}
		})
	}
	check("nothing", func(string) error { return nil })
	check("link", func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "config.json")) })
	check("pipe", func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "config.json"), 0o600) })
	check("directory", func(dir string) error { return os.Mkdir(filepath.Join(dir, "config.json"), 0o700) })
	check("hard link", func(dir string) error {
		a := filepath.Join(dir, "config.json")
		return errors.Join(os.WriteFile(a, nil, 0o600), os.Link(a, filepath.Join(filepath.Dir(dir), "b")))
	})
	check("manifest", func(dir string) error { return os.WriteFile(filepath.Join(dir, manifestName), []byte("{}"), 0o600) })
	check("pipe in its place", func(dir string) error { return errors.Join(os.Remove(dir), unix.Mkfifo(dir, 0o600)) })
	check("more than anybody could need", func(dir string) error {
		var all error
		for i := range 2 * maxTaken {
			all = errors.Join(all, os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600))
		}
		return all
	})
	check("hidden", func(dir string) error { return os.WriteFile(filepath.Join(dir, ".x"), nil, 0o600) })
}

// TestCleanOfADeepTree: a hypervisor that was taken over made directories in directories, one more than this process may have descriptors. The
// node could never remove them, and each attempt took all descriptors from everybody else for a moment.
// TestLeaseHoldsUpNothing: a hypervisor that was taken over kept leases on what it had written. Each open of it waited for as long as the kernel
// lets one, past every deadline, with a turn that the sandboxes of others waited for.
func TestLeaseHoldsUpNothing(t *testing.T) {
	base := t.TempDir()
	out, err := os.OpenRoot(base)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := out.Mkdir("s1", 0o700); err != nil {
		t.Fatal(err)
	}
	written := filepath.Join(base, "s1", "memory")
	if err := os.WriteFile(written, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	leased, err := os.Open(written)
	if err != nil {
		t.Fatal(err)
	}
	defer leased.Close()
	if _, err := unix.FcntlInt(leased.Fd(), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
		t.Skipf("no leases here: %v", err)
	}
	s, err := OpenSnapshots(filepath.Join(base, "place"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := s.Begin("saved")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.take(t.Context(), out, "s1"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if _, err := d.Commit(t.Context(), "v", nil); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("Commit of a file under a lease = %v, want that it is not to be had now", err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("Commit waited %v for whoever has a lease", took)
	}
}

// TestCommitThatFailsLast: a snapshot had its name although its maker was told that it had failed, and was restored later.
func TestCommitThatFailsLast(t *testing.T) {
	if os.Geteuid() == 0 {
		base, err := os.MkdirTemp("", "sluice-commit-") // which another user can reach
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(base)
		if err := os.Chown(base, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe", "-test.run", "^TestCommitThatFailsLast$", "-test.v")
		cmd.Dir, cmd.Env = base, append(os.Environ(), "TMPDIR="+base)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if text, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(text, []byte("--- PASS")) {
			t.Errorf("as a user whom modes bind: %v\n%s", err, text)
		}
		return
	}
	dir := filepath.Join(t.TempDir(), "place")
	s, err := OpenSnapshots(dir)
	if err != nil {
		t.Fatal(err)
	}
	d, err := s.Begin("saved")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d.Dir(), "memory"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o300); err != nil { // it can be written, and not opened to be synced
		t.Fatal(err)
	}
	if _, err := d.Commit(t.Context(), "v", nil); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("Commit = %v, want that it may not", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open("saved"); errs.CodeOf(err) != errs.NotFound {
		t.Errorf("Open after a commit that failed = %v, want that there is none", err)
	}
}

func TestCleanOfADeepTree(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	few := unix.Rlimit{Cur: 256, Max: old.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &old) }()
	spec := Spec{Dir: t.TempDir()}
	for _, dir := range []string{spec.runDir(), spec.outDir()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		at, err := unix.Open(dir, unix.O_PATH, 0)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 * few.Cur {
			if err := unix.Mkdirat(at, "d", 0o700); err != nil {
				t.Fatal(err)
			}
			next, err := unix.Openat(at, "d", unix.O_PATH, 0)
			if err != nil {
				t.Fatal(err)
			}
			unix.Close(at)
			at = next
		}
		unix.Close(at)
	}
	if err := clearRun(spec); err != nil {
		t.Errorf("clearRun: %v", err)
	}
	if err := spec.Clean(); err != nil {
		t.Errorf("Clean: %v", err)
	}
	if left, err := os.ReadDir(spec.Dir); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

// TestSnapshotFullDisk: a full disk has its own meaning, and leaves no half of a snapshot.
func TestSnapshotFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small disk")
	}
	dir := t.TempDir()
	if err := unix.Mount("small", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("cannot mount a small disk: %v", err)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	s, err := OpenSnapshots(filepath.Join(dir, "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, bytes.Repeat([]byte("x"), 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := s.Begin("one")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.CopyIn(t.Context(), "disk.img", big); errs.CodeOf(err) != errs.Exhausted {
		t.Errorf("CopyIn onto a full disk: %v, want Exhausted", err)
	}
	if left, err := os.ReadDir(d.Dir()); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
	if err := d.Abort(); err != nil {
		t.Errorf("Abort: %v", err)
	}
}

func TestCopySparse(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	whole := writeSparse(t, src)
	if err := CopySparse(t.Context(), dst, src); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(dst); err != nil || !bytes.Equal(got, whole) {
		t.Errorf("the copy differs: %v", err)
	}
	var a, b unix.Stat_t
	if err := errors.Join(unix.Stat(src, &a), unix.Stat(dst, &b)); err != nil || b.Blocks > a.Blocks {
		t.Errorf("the copy takes %d blocks of %d, %v", b.Blocks, a.Blocks, err)
	}
	if err := CopySparse(t.Context(), dst, src); !errors.Is(err, os.ErrExist) {
		t.Errorf("CopySparse onto a file: %v, want ErrExist", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	third := filepath.Join(dir, "third")
	if err := CopySparse(ctx, third, src); err == nil {
		t.Log("the file system shares blocks: nothing to interrupt")
	} else if _, serr := os.Lstat(third); !errors.Is(serr, os.ErrNotExist) {
		t.Errorf("an interrupted copy is left: %v", serr)
	}
	// Two files with the same bytes have the same sum, however sparse.
	full := filepath.Join(dir, "full")
	if err := os.WriteFile(full, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	var sums []string
	for _, name := range []string{src, dst, full} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		m, err := sumFile(t.Context(), f, nil)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, m.CRC32C)
	}
	if sums[0] != sums[1] || sums[0] != sums[2] {
		t.Errorf("sums differ: %q", sums)
	}
}
