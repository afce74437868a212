package sandboxd

import (
	"syscall"
	"testing"
)

// mountSmall puts a file system of a few pages on dir.
func mountSmall(t *testing.T, dir string) (unmount func()) {
	t.Helper()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Skipf("mount tmpfs: %v", err)
	}
	return func() { syscall.Unmount(dir, syscall.MNT_DETACH) }
}
