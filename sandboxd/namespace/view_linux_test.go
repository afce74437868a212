package namespace

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/sluice-edge/sluice/internal/errs"
)

func TestViewTakesOnlyWhatEverybodyMayRead(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"public": 0o644, "secret": 0o640, "tool": 0o755} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "private"), 0o700), os.WriteFile(filepath.Join(dir, "private", "x"), nil, 0o644),
		os.Symlink("public", filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	im := image{}
	if err := im.take(dir); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"public": true, "tool": true, "link": true, "secret": false, "private": false, "private/x": false} {
		if _, ok := im[filepath.Join(dir, name)[1:]]; ok != want {
			t.Errorf("%s taken: %v, want %v", name, ok, want)
		}
	}
	same := image{}
	if err := same.take(dir); err != nil || same.sum() != im.sum() {
		t.Errorf("the same content has two names, or %v", err)
	}
	same.file("etc/new", "x")
	if same.sum() == im.sum() {
		t.Error("different content has one name")
	}
}

// Root inside owns what it sees of the host's /usr: what only the host's root may read there must not be seen.
func TestPrivateFilesOfUsrAreHidden(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("/usr/local/lib", "sluice-test-")
	if err != nil {
		t.Skipf("needs a writable /usr/local/lib: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o775); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"public": 0o644, "secret": 0o600, "group": 0o640, "tool": 0o711} {
		if err := errors.Join(os.WriteFile(filepath.Join(dir, name), []byte("host secret"), 0o600), os.Chmod(filepath.Join(dir, name), mode)); err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range map[string]os.FileMode{"private": 0o700, "list": 0o754, "pass": 0o751} {
		d := filepath.Join(dir, name)
		if err := errors.Join(os.Mkdir(d, 0o700), os.WriteFile(filepath.Join(d, "file"), []byte("host secret"), 0o644), os.Chmod(d, mode)); err != nil {
			t.Fatal(err)
		}
	}
	b := startBox(t, testMachine(t))
	if out := b.sh("cd " + dir + " && stat -c %a . && find . -mindepth 1 && cat public"); out != "775\n./public\nhost secret" {
		t.Errorf("seen of %s: %q", dir, out)
	}
	if out := b.sh("cd " + dir + " && mkdir private && echo mine >secret && cat secret && ls -A private"); out != "mine" {
		t.Errorf("names of hidden files used inside: %q", out)
	}
}

func TestViewHasNoCredentials(t *testing.T) {
	root, _, _, err := hostImage(false)
	if err != nil {
		t.Fatal(err)
	}
	for name := range root {
		for _, bad := range []string{"etc/shadow", "etc/gshadow", "etc/ssl/private", "etc/ssh", "etc/sudoers", "etc/machine-id", "etc/environment"} {
			if name == bad || strings.HasPrefix(name, bad+"/") {
				t.Errorf("the view holds %s", name)
			}
		}
	}
}

// A template may hold links that lead out of it. Nothing on the host may be mounted on, written or shown because of them.
func TestHostileTemplate(t *testing.T) {
	m := testMachine(t)
	template, host := t.TempDir(), t.TempDir()
	if err := os.Chmod(template, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(host, "secret"), []byte("host secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"tmp", "dev", "run", "proc", "home", "root", "var", "sys"} {
		if err := os.Symlink(host, filepath.Join(template, name)); err != nil {
			t.Fatal(err)
		}
	}
	b := startBox(t, m, func(s *Spec) { s.Template = template })
	if r := b.run(0, "self", "hog", "1"); r.Out != "held 1\n" {
		t.Errorf("a program in the template: %+v", r)
	}
	names, err := os.ReadDir(host)
	if err != nil || len(names) != 1 {
		t.Errorf("the host's directory holds %v, %v", names, err)
	}

	if err := errors.Join(os.Mkdir(filepath.Join(template, "etc"), 0o755),
		os.Symlink(filepath.Join(host, "secret"), filepath.Join(template, "etc", "passwd"))); err != nil {
		t.Fatal(err)
	}
	spec := testSpec(t)
	spec.NetNS, spec.Template = makeNetNS(t), template
	if p, err := m.Start(context.Background(), spec); err == nil {
		t.Error("an account file that lies outside of the template is read")
		_ = p.Kill(context.Background())
		_ = m.Destroy(context.Background(), spec)
	}
	wantNothingLeft(t, m, spec)
}

func TestStartTwiceIsAConflict(t *testing.T) {
	m := testMachine(t)
	b := startBox(t, m)
	if _, err := m.Start(context.Background(), b.spec); errs.CodeOf(err) != errs.Conflict {
		t.Errorf("second Start = %v, want Conflict", err)
	}
	if out := b.sh("echo alive"); out != "alive" {
		t.Errorf("the first after the second: %q", out)
	}
}

func TestManyAtOnce(t *testing.T) {
	m := testMachine(t)
	specs := make([]Spec, 6)
	for i := range specs {
		specs[i] = testSpec(t)
		specs[i].NetNS = makeNetNS(t)
	}
	var wg sync.WaitGroup
	for _, spec := range specs {
		wg.Go(func() {
			p, err := m.Start(context.Background(), spec)
			if err != nil {
				t.Errorf("Start: %v", err)
				return
			}
			if err := errors.Join(p.Commit(), m.Destroy(context.Background(), spec)); err != nil {
				t.Error(err)
			}
			<-p.Done()
		})
	}
	wg.Wait()
	for _, spec := range specs {
		wantNothingLeft(t, m, spec)
	}
}
