package tree

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// makeDeep makes so many directories, each in the last one.
func makeDeep(t *testing.T, dir, name string, levels int) {
	t.Helper()
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range levels {
		if err := unix.Mkdirat(at, name, 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(at, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(at)
		at = next
	}
	unix.Close(at)
}

func wantGone(t *testing.T, dir string) {
	t.Helper()
	if err := Remove(dir); err != nil {
		t.Errorf("Remove = %v", err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", dir, err)
	}
}

// os.RemoveAll holds a descriptor for each level: a deep tree was one that no node could ever remove, and killed it.
func TestRemoveDeeperThanDescriptors(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	where := "/dev/shm" // a disk takes half a minute
	if unix.Access(where, unix.W_OK) != nil {
		where = ""
	}
	dir, err := os.MkdirTemp(where, "slrm-")
	if err != nil {
		t.Fatal(err)
	}
	makeDeep(t, dir, strings.Repeat("d", 200), 100_000)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
			t.Error(err)
		}
	}()
	wantGone(t, dir)
}

func TestRemoveWide(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wide")
	for i := range 1000 {
		if err := os.MkdirAll(filepath.Join(dir, fmt.Sprint("a", i%50), fmt.Sprint("b", i)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("a", i%50), fmt.Sprint("b", i), "f"), nil, 0o400); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), nil, 0o400); err != nil {
			t.Fatal(err)
		}
	}
	wantGone(t, dir)
	wantGone(t, dir) // a second time is no error
	wantGone(t, filepath.Join(dir, "child", "of", "nothing"))
}

func TestRemoveFollowsNoLinks(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "keep"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "links")
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"dir": outside, "file": filepath.Join(outside, "keep"), "root": "/", "up": "../..", "sub/dir": outside, "sub/self": ".", "nowhere": "/nonexistent",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	top := filepath.Join(t.TempDir(), "top")
	if err := os.Symlink(outside, top); err != nil {
		t.Fatal(err)
	}
	wantGone(t, dir)
	wantGone(t, top)
	if names, err := os.ReadDir(outside); err != nil || len(names) != 1 {
		t.Errorf("outside of the tree are left %v, %v", names, err)
	}
}

func TestRemoveEntersNoMount(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: run the tests as root, or in a privileged container")
	}
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "keep"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "mounts")
	long := strings.Repeat("n", 250)
	mounted := filepath.Join(dir, "a", long)
	if err := errors.Join(os.MkdirAll(mounted, 0o755), os.WriteFile(filepath.Join(dir, "f"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(outside, mounted, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := Remove(mounted); !errors.Is(err, unix.EBUSY) {
		t.Errorf("Remove of a mount = %v, want EBUSY", err)
	}
	err := Remove(dir)
	if uerr := unix.Unmount(mounted, 0); uerr != nil {
		// Moved up before the mount in it was found.
		all, _ := filepath.Glob(filepath.Join(dir, ".removing-*", long))
		for _, m := range all {
			uerr = unix.Unmount(m, 0)
		}
		if uerr != nil {
			t.Fatal(uerr)
		}
	}
	if !errors.Is(err, unix.EBUSY) || len(err.Error()) > 2*maxErrorPath+100 || strings.Contains(err.Error(), long) {
		t.Errorf("Remove over a mount = %v, want a short EBUSY", err)
	}
	if _, err := os.Stat(filepath.Join(outside, "keep")); err != nil {
		t.Errorf("what was mounted: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "f")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the rest is left: %v", err)
	}
	wantGone(t, dir)
}

// TestRemoveLocked runs again as somebody who is not root, to whom the permissions of his own directories matter.
func TestRemoveLocked(t *testing.T) {
	if os.Geteuid() == 0 {
		const stranger = 54321
		dir, err := os.MkdirTemp("", "slrm-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		if err := os.Chown(dir, stranger, stranger); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestRemoveLocked$")
		cmd.Dir, cmd.Env = dir, []string{"TMPDIR=" + dir}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: stranger, Gid: stranger}}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	dir := filepath.Join(t.TempDir(), "locked")
	if err := os.MkdirAll(filepath.Join(dir, "a/b/c"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"a/b/c", "a/b", "a", ""} {
		if err := errors.Join(os.WriteFile(filepath.Join(dir, d, "f"), nil, 0), os.Chmod(filepath.Join(dir, d), 0)); err != nil {
			t.Fatal(err)
		}
	}
	wantGone(t, dir)
}
