// Package testkit is what tests of several packages share.
package testkit

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

var (
	programsMu sync.Mutex
	programs   = map[string]string{} // built by this process
)

// Program builds one of this module's commands, static as it is released, and returns the file, which everybody may execute.
// It is kept in .build/ at the module's root: the next test finds it, and another process that runs the old one is not disturbed.
func Program(t testing.TB, command string) string {
	t.Helper()
	programsMu.Lock()
	defer programsMu.Unlock()
	if file, ok := programs[command]; ok {
		return file
	}
	root := moduleRoot(t)
	dir := filepath.Join(root, ".build", "bin")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close() // releases it
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatalf("lock %s: %v", dir, err)
	}
	file := filepath.Join(dir, command)
	cmd := exec.Command("go", "build", "-o", file+".new", "./cmd/"+command)
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", command, err, out)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	programs[command] = file
	return file
}

func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd() // of the package under test
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if filepath.Dir(dir) == dir {
			t.Fatal("the test runs outside the module")
		}
		dir = filepath.Dir(dir)
	}
}
