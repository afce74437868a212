package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/errs"
)

func mustStore(t testing.TB) *Store {
	t.Helper()
	s, err := OpenStore(filepath.Join(t.TempDir(), "templates"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// smallOptions build a template of a few bytes.
func smallOptions(t testing.TB, s *Store, name string) Options {
	t.Helper()
	dir := t.TempDir()
	put(t, filepath.Join(dir, "agent"), []byte("\x7fELF agent"))
	put(t, filepath.Join(dir, "vmlinux"), elfKernel())
	put(t, filepath.Join(dir, "image.tar"), dockerArchive(t, [][]byte{tarOf(t, file{name: "etc/hello", body: "hello"})}))
	return Options{
		Store: s, Name: name, From: filepath.Join(dir, "image.tar"), Agent: filepath.Join(dir, "agent"), Kernel: filepath.Join(dir, "vmlinux"),
		StartCmd: "serve", Env: map[string]string{"B": "3", "C": "4"},
	}
}

func mustBuild(t testing.TB, o Options) Template {
	t.Helper()
	tmpl, err := Build(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	return tmpl
}

// leftovers are all files of a store but locks.
func leftovers(t testing.TB, s *Store) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Base(filepath.Dir(path)) != locksDir {
			rel, _ := filepath.Rel(s.dir, path)
			all = append(all, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := os.ReadDir(filepath.Join(s.dir, buildingDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		all = append(all, "half made: "+d.Name())
	}
	return all
}

func TestBuild(t *testing.T) {
	s := mustStore(t)
	var phases []Phase
	o := smallOptions(t, s, "Team/App:V1")
	tmpl, err := Build(t.Context(), o, func(step Step) {
		if len(phases) == 0 || phases[len(phases)-1] != step.Phase {
			phases = append(phases, step.Phase)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []Phase{PhaseSource, PhaseLayers, PhaseRoot, PhaseKernel, PhaseCommitted}; !slices.Equal(phases, want) {
		t.Errorf("phases %q, want %q", phases, want)
	}
	got, err := s.Get("team/app:v1")
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(tmpl) {
		t.Errorf("Get = %+v, Build returned %+v", got, tmpl)
	}
	if got.Name != "team/app" || got.Tag != "v1" || got.CPUs != 2 || got.MemoryMiB != 512 || got.DiskMiB != 1024 || got.StartCmd != "serve" ||
		got.User != "user" || got.Workdir != "/home/user" || !slices.Equal(got.Env, []string{"A=1", "B=3", "C=4"}) || !slices.Equal(got.Ports, []uint16{443, 8000}) {
		t.Errorf("manifest %+v", got.Manifest)
	}
	if err := got.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if n, err := got.Usage(); err != nil || n < got.Root.Size {
		t.Errorf("Usage = %d, %v", n, err)
	}
	want := []string{"team+app/v1/initramfs", "team+app/v1/kernel", "team+app/v1/manifest.json", "team+app/v1/root.erofs"}
	if left := leftovers(t, s); !slices.Equal(left, want) {
		t.Errorf("the store has %q", left)
	}

	// The same again is another build of the same files, in the place of the first.
	again := mustBuild(t, o)
	if again.Root != tmpl.Root || again.Initramfs != tmpl.Initramfs || again.Build == tmpl.Build {
		t.Errorf("built again: %+v, before: %+v", again.Manifest, tmpl.Manifest)
	}
	if left := leftovers(t, s); !slices.Equal(left, want) {
		t.Errorf("the store has %q", left)
	}

	o.Name = "other"
	mustBuild(t, o)
	all, err := s.List()
	if err != nil || len(all) != 2 || all[0].Name != "other" || all[1].Name != "team/app" {
		t.Errorf("List = %+v, %v", all, err)
	}
	for _, name := range []string{"other", "team/app:v1"} {
		if err := s.Remove(name); err != nil {
			t.Error(err)
		}
		if err := s.Remove(name); errs.CodeOf(err) != errs.NotFound {
			t.Errorf("Remove again = %v", err)
		}
		if _, err := s.Get(name); errs.CodeOf(err) != errs.NotFound {
			t.Errorf("Get after Remove = %v", err)
		}
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("the store has %q", left)
	}
}

// TestFailedBuildLeavesNothing: and what had the name before stays.
// TestAliasesAreNamesOfOneTemplate: one that another template had was taken without a word, and went on meaning the other.
func TestAliasesAreNamesOfOneTemplate(t *testing.T) {
	s := mustStore(t)
	o := smallOptions(t, s, "base")
	o.Aliases = []string{"usual"}
	for range 2 { // again in place of itself
		if _, err := Build(t.Context(), o, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, alias := range []string{"usual", "Base"} {
		other := smallOptions(t, s, "other")
		other.Aliases = []string{"fresh", alias}
		if _, err := Build(t.Context(), other, nil); errs.CodeOf(err) != errs.Conflict || !strings.Contains(err.Error(), "template 'base'") {
			t.Errorf("Build with the alias %q of another template = %v, want a conflict that names it", alias, err)
		}
	}
}

func TestFailedBuildLeavesNothing(t *testing.T) {
	s := mustStore(t)
	before := mustBuild(t, smallOptions(t, s, "app"))
	have := leftovers(t, s)
	broken := errors.New("broken")
	ctx, cancel := context.WithCancel(t.Context())
	for name, change := range map[string]func(*Options){
		"finish": func(o *Options) {
			o.Finish = func(_ context.Context, dir string, _ *Manifest) error {
				put(t, filepath.Join(dir, "snapshot/memory"), []byte("half"))
				return broken
			}
		},
		"interrupted":  func(o *Options) { o.Finish = func(context.Context, string, *Manifest) error { cancel(); return nil } },
		"no source":    func(o *Options) { o.From = "/no/such/file" },
		"bad image":    func(o *Options) { o.From = o.Agent },
		"no kernel":    func(o *Options) { o.Kernel = "/no/such/file" },
		"bad kernel":   func(o *Options) { o.Kernel = o.Agent },
		"no agent":     func(o *Options) { o.Agent = "" },
		"bad agent":    func(o *Options) { o.Agent = o.From },
		"absent agent": func(o *Options) { o.Agent = "/no/such/file" },
		"bad name":     func(o *Options) { o.Name = "../app" },
		"size":         func(o *Options) { o.CPUs, o.MemoryMiB, o.DiskMiB = -1, 1, 1 },
		"environment":  func(o *Options) { o.Env = map[string]string{"A=B": ""} },
		"limits":       func(o *Options) { o.Limits = Limits{Bytes: 10} },
		"layers":       func(o *Options) { o.Limits = Limits{Layers: -1} },
		"store":        func(o *Options) { o.Store = nil },
	} {
		o := smallOptions(t, s, "app")
		change(&o)
		use := t.Context()
		if name == "interrupted" {
			use = ctx
		}
		if _, err := Build(use, o, nil); err == nil {
			t.Errorf("%s: no error", name)
		}
		if left := leftovers(t, s); !slices.Equal(left, have) {
			t.Errorf("%s: the store has %q, had %q", name, left, have)
		}
	}
	if got, err := s.Get("app"); err != nil || got.Build != before.Build {
		t.Errorf("the template of before: %+v, %v", got, err)
	}
}

func TestFinishAddsFiles(t *testing.T) {
	s := mustStore(t)
	o := smallOptions(t, s, "app")
	o.Finish = func(ctx context.Context, dir string, m *Manifest) error {
		if _, err := os.Stat(filepath.Join(dir, m.Root.Name)); err != nil {
			return err
		}
		// While it is built nobody else builds or removes it, and it is not there yet.
		if _, err := Build(ctx, o, nil); errs.CodeOf(err) != errs.Conflict {
			t.Errorf("second build = %v", err)
		}
		if err := s.Remove("app:default"); errs.CodeOf(err) != errs.Conflict {
			t.Errorf("remove while it is built = %v", err)
		}
		if _, err := s.Get("app"); errs.CodeOf(err) != errs.NotFound {
			t.Errorf("get while it is built = %v", err)
		}
		if other, err := OpenStore(s.dir); err != nil || len(leftovers(t, other)) == 0 {
			t.Errorf("another process swept a living build: %v", err)
		}
		put(t, filepath.Join(dir, "snapshot/memory"), []byte("memory"))
		f, err := Describe(ctx, dir, "snapshot/memory")
		m.More = append(m.More, f)
		return err
	}
	tmpl := mustBuild(t, o)
	if err := os.WriteFile(filepath.Join(tmpl.Dir, "snapshot/memory"), []byte("MEMORY"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Get("app"); err != nil || got.Verify(t.Context()) == nil {
		t.Errorf("a changed byte is not noticed: %v", err)
	}
	if err := os.Truncate(filepath.Join(tmpl.Dir, "snapshot/memory"), 2); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get("app"); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a short file: %v", err)
	}
	all, err := s.List()
	if err == nil || len(all) != 1 || all[0].Name != "app" {
		t.Errorf("List with a damaged one = %+v, %v", all, err)
	}
}

// TestKilledBuilder: a builder that dies leaves a directory, which the next one to come removes.
func TestKilledBuilder(t *testing.T) {
	const variable = "SLUICE_TEST_BUILD_IN"
	if dir := os.Getenv(variable); dir != "" {
		s, err := OpenStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		o := smallOptions(t, s, "app")
		o.Finish = func(context.Context, string, *Manifest) error { return syscall.Kill(os.Getpid(), syscall.SIGKILL) }
		mustBuild(t, o)
		return
	}
	s := mustStore(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledBuilder$")
	cmd.Env = append(os.Environ(), variable+"="+s.dir)
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Fatalf("the builder was not killed:\n%s", out)
	}
	if left := leftovers(t, s); len(left) == 0 {
		t.Fatal("the killed builder left nothing: the test does not test")
	}
	if _, err := OpenStore(s.dir); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("the store has %q", left)
	}
	mustBuild(t, smallOptions(t, s, "app"))
}

func TestBadManifests(t *testing.T) {
	s := mustStore(t)
	tmpl := mustBuild(t, smallOptions(t, s, "app"))
	path := filepath.Join(tmpl.Dir, manifestName)
	good := string(mustRead(t, path))
	for name, raw := range map[string]string{
		"empty": "", "cut": good[:len(good)/2], "version": strings.Replace(good, `"version": 1`, `"version": 2`, 1),
		"unknown field": strings.Replace(good, `"version": 1`, `"version": 1, "more_of": 3`, 1),
		"outside":       strings.Replace(good, `"root.erofs"`, `"../../../etc/passwd"`, 1),
	} {
		if err := os.WriteFile(path, []byte(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get("app"); errs.CodeOf(err) != errs.Invalid || !strings.Contains(err.Error(), "app") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"version":1,"root":{"name":"r","size":1,"sha256":"` + strings.Repeat("0", 64) + `"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := parseManifest(raw)
		if err != nil {
			return
		}
		for _, file := range m.files() {
			if !filepath.IsLocal(file.Name) {
				t.Errorf("file %q", file.Name)
			}
		}
	})
}

func TestParseName(t *testing.T) {
	check := func(reference, want string) {
		t.Helper()
		n, err := ParseName(reference)
		if want == "" {
			if errs.CodeOf(err) != errs.Invalid {
				t.Errorf("ParseName(%q) = %v, %v", reference, n, err)
			}
			return
		}
		if err != nil || n.String() != want {
			t.Errorf("ParseName(%q) = %v, %v, want %s", reference, n, err, want)
		}
	}
	check("base", "base")
	check("Base:Default", "base")
	check("team/base:v1.2_3-4", "team/base:v1.2_3-4")
	for _, bad := range []string{"", "/", ":", "a/", "/a", "a:", ":a", "a/b/c", "a:b:c", "a b", "a/../b", "..", ".a", "a:.b", "a+b", "a~b", "ä", "a\x00", strings.Repeat("a", 300)} {
		check(bad, "")
	}
}

// TestLongestName: a reference that the grammar allows, and no directory can be named after, was no unknown template but trouble of the node.
func TestLongestName(t *testing.T) {
	s := mustStore(t)
	long := strings.Repeat("n", 128) + "/" + strings.Repeat("a", 127)
	if _, err := s.Get(long); errs.CodeOf(err) != errs.Invalid {
		t.Errorf("Get(%q) = %v, want it invalid", long, err)
	}
	longest := strings.Repeat("n", 100) + "/" + strings.Repeat("a", 99)
	if _, err := s.Get(longest); errs.CodeOf(err) != errs.NotFound {
		t.Errorf("Get(%q) = %v, want it not found", longest, err)
	}
	mustBuild(t, smallOptions(t, s, longest))
	if _, err := s.Get(longest); err != nil {
		t.Errorf("Get(%q) = %v", longest, err)
	}
}

func FuzzName(f *testing.F) {
	f.Add("team/base:v1")
	f.Fuzz(func(t *testing.T, reference string) {
		n, err := ParseName(reference)
		if err != nil {
			return
		}
		if again, err := ParseName(n.String()); err != nil || again != n {
			t.Errorf("%q is %v, which is %v, %v", reference, n, again, err)
		}
		if back, err := nameOfDir(n.dir(), n.Tag); err != nil || back != n {
			t.Errorf("%q has the directory %q, which is %v, %v", reference, n.dir(), back, err)
		}
		if len(n.dir()+tempSeparator) > 240 || len(n.Tag) > 240 {
			t.Errorf("%q has a directory with a longer name than there is", reference)
		}
		if dir := filepath.Join(n.dir(), n.Tag); !filepath.IsLocal(dir) || strings.Count(dir, "/") != 1 || strings.HasPrefix(dir, ".") {
			t.Errorf("%q has the directory %q", reference, dir)
		}
	})
}

func TestDisk(t *testing.T) {
	if _, err := exec.LookPath("mke2fs"); err != nil {
		t.Skip("SKIP: no mke2fs: install the package e2fsprogs")
	}
	var first []byte
	for range 2 {
		s := mustStore(t)
		path, err := s.Disk(t.Context(), 512)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := s.Disk(t.Context(), 512); err != nil || again != path {
			t.Errorf("Disk again = %s, %v", again, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Size != 512<<20 || st.Blocks*512 > 2<<20 {
			t.Errorf("the disk takes %d of %d bytes, %v", st.Blocks*512, st.Size, err)
		}
		raw := mustRead(t, path)
		if first == nil {
			first = raw
		}
		if !bytes.Equal(raw, first) {
			t.Error("two disks of a size differ")
		}
		private := filepath.Join(t.TempDir(), "private")
		if err := CopyDisk(private, path); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(mustRead(t, private), raw) {
			t.Error("the copy differs")
		}
		var cst unix.Stat_t
		if err := unix.Stat(private, &cst); err != nil || cst.Blocks > st.Blocks {
			t.Errorf("the copy takes %d blocks, the original %d, %v", cst.Blocks, st.Blocks, err)
		}
		if err := CopyDisk(private, path); !errors.Is(err, fs.ErrExist) {
			t.Errorf("copy over a file = %v", err)
		}
		if out, err := exec.Command("e2fsck", "-fn", private).CombinedOutput(); err != nil {
			t.Errorf("e2fsck: %v\n%s", err, out)
		}
		if left := leftovers(t, s); !slices.Equal(left, []string{disksDir + "/data-512.ext4"}) {
			t.Errorf("the store has %q", left)
		}
	}
	for _, mib := range []int{-1, 0, minDiskMiB - 1, maxDiskMiB + 1} {
		if _, err := mustStore(t).Disk(t.Context(), mib); errs.CodeOf(err) != errs.Invalid {
			t.Errorf("Disk(%d) = %v", mib, err)
		}
	}
	if err := CopyDisk(filepath.Join(t.TempDir(), "x"), "/no/such/disk"); err == nil {
		t.Error("copy of nothing succeeds")
	}
}
