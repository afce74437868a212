package sandboxd

import (
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRemovalOfADeepTree: a guest that nests directories must not cost the node a descriptor for each.
func TestRemovalOfADeepTree(t *testing.T) {
	n := newNode(t).start()
	sb := n.create(time.Hour)
	deep := n.file(sb.ID, "deep")
	if err := os.Mkdir(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Open(deep, unix.O_DIRECTORY, 0)
	for range 30000 {
		if err != nil {
			t.Fatal(err)
		}
		above := at
		if err := unix.Mkdirat(above, "d", 0o700); err != nil {
			t.Fatal(err)
		}
		at, err = unix.Openat(above, "d", unix.O_DIRECTORY, 0)
		unix.Close(above)
	}
	unix.Close(at)
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1000, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &before)
	if err := n.m.Kill(t.Context(), sb.ID); err != nil {
		t.Errorf("Kill() = %.200v", err)
	}
	n.wantNothingLeft()
}

// mountSmall puts a file system of that size on dir.
func mountSmall(t *testing.T, dir, size string) (unmount func()) {
	t.Helper()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("mount tmpfs: %v", err)
	}
	return func() { syscall.Unmount(dir, syscall.MNT_DETACH) }
}
