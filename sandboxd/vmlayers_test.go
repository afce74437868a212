package sandboxd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/VictoriaMetrics/metrics"
)

// TestLayers: copies are made ahead of what was asked for, of the very file that has its name, and of nothing large.
func TestLayers(t *testing.T) {
	dir := t.TempDir()
	l := newLayers(filepath.Join(dir, "layers"), nil, metrics.NewSet())
	file := func(name, content string, size int64) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if size > 0 {
			if err := os.Truncate(path, size); err != nil {
				t.Fatal(err)
			}
		}
		return path
	}
	number := 0
	take := func(source string) string {
		t.Helper()
		number++
		to := filepath.Join(dir, "own", string(rune('a'+number)))
		if err := l.take(source, source, to); err != nil {
			t.Fatalf("take(%s) = %v", source, err)
		}
		text, err := os.ReadFile(to)
		if err != nil {
			t.Fatal(err)
		}
		return string(text[:min(len(text), 8)])
	}
	ready := func() int {
		t.Helper()
		if err := l.fill(t.Context()); err != nil {
			t.Fatal(err)
		}
		made, err := os.ReadDir(l.dir)
		if err != nil || float64(len(made)) != l.ready.Get() {
			t.Errorf("%d copies on disk, %v, and %v counted", len(made), err, l.ready.Get())
		}
		return len(made)
	}
	if err := os.Mkdir(filepath.Join(dir, "own"), 0o700); err != nil {
		t.Fatal(err)
	}
	one := file("one", "one", 0)
	if got := ready(); got != 0 {
		t.Errorf("%d copies before anything was asked for", got)
	}
	if got := take(one); got != "one" {
		t.Errorf("the first copy is %q", got)
	}
	if got := ready(); got != layersReady {
		t.Errorf("%d copies are ready, want %d", got, layersReady)
	}
	if late := l.made.Get(); late != 1 {
		t.Errorf("%d were late, want the first", late)
	}
	if got := take(one); got != "one" || l.made.Get() != 1 {
		t.Errorf("a ready copy is %q, late %d", got, l.made.Get())
	}

	// The template is built anew: what was copied of the old one is of no use.
	if err := os.Rename(file("other", "new", 0), one); err != nil {
		t.Fatal(err)
	}
	if got := take(one); got != "new" {
		t.Errorf("after a new build the copy is %q, want its", got)
	}
	if got := ready(); got != layersReady {
		t.Errorf("%d copies after a new build, want %d of the new one and none of the old", got, layersReady)
	}
	if got := take(one); got != "new" {
		t.Errorf("a ready copy after a new build is %q", got)
	}

	// Nobody asks for it any more.
	for i := range layersKinds + 1 {
		take(file("kind"+string(rune('a'+i)), "kind", 0))
	}
	if got := ready(); got != layersKinds*layersReady {
		t.Errorf("%d copies, want %d of %d disks", got, layersReady, layersKinds)
	}
	if err := l.sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(l.dir); !os.IsNotExist(err) {
		t.Errorf("after a sweep: %v", err)
	}
}

// TestLayersOfAnInodeThatCameBack: copies were known by the number of the inode of their disk. A snapshot that another team took after the disk
// was removed got the same number, and a sandbox made from it got the first one's disk.
func TestLayersOfAnInodeThatCameBack(t *testing.T) {
	dir := t.TempDir()
	l := newLayers(filepath.Join(dir, "layers"), nil, metrics.NewSet())
	theirs, ours := filepath.Join(dir, "theirs"), filepath.Join(dir, "ours")
	if err := os.WriteFile(theirs, []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(l.take(theirs, theirs, filepath.Join(dir, "sandbox1")), l.fill(t.Context())); err != nil {
		t.Fatal(err)
	}
	before, _, err := identify(theirs)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(theirs); err != nil {
		t.Fatal(err)
	}
	again := false
	for i := 0; i < 1000 && !again; i++ {
		path := filepath.Join(dir, fmt.Sprint("try", i))
		if err := os.WriteFile(path, []byte("ours"), 0o600); err != nil {
			t.Fatal(err)
		}
		now, _, err := identify(path)
		if err != nil {
			t.Fatal(err)
		}
		if again = now.inode == before.inode; again {
			err = os.Rename(path, ours)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if !again {
		t.Skip("this file system gives no inode number again")
	}
	own := filepath.Join(dir, "sandbox2")
	if err := l.take(ours, ours, own); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(own); err != nil || string(text) != "ours" {
		t.Errorf("the sandbox of another team has the disk %q, %v", text, err)
	}
	// Nor does what was made ahead of a disk outlive it.
	if err := l.fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if made, err := os.ReadDir(l.dir); err != nil || len(made) != layersReady {
		t.Errorf("%d copies, %v, want %d of what is there", len(made), err, layersReady)
	}
}
