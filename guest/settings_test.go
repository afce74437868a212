package guest

import (
	"path/filepath"
	"testing"
)

func TestExpand(t *testing.T) {
	check := func(path, want string) {
		t.Helper()
		if got, err := expand(path, "/home/user"); err != nil || got != want {
			t.Errorf("expand(%q) = %q, %v, want %q", path, got, err, want)
		}
	}
	check("~", "/home/user")
	check("~/a", "/home/user/a")
	check("a/b", "/home/user/a/b")
	check("./../x", "/home/x")
	check("/etc/../etc/passwd/", "/etc/passwd")
	check("/", "/")
	check("a~b", "/home/user/a~b")
	if got, err := expand("~root/x", "/home/user"); err == nil {
		t.Errorf("expand(~root/x) = %q", got)
	}
}

func FuzzExpand(f *testing.F) {
	for _, seed := range []string{"", "~", "~/../..", "../../..", "/a//b/./c", "\xff\xfe", "~~", "a\nb"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		got, err := expand(path, "/home/user")
		if err != nil {
			return
		}
		if !filepath.IsAbs(got) || filepath.Clean(got) != got {
			t.Errorf("expand(%q) = %q, not an absolute clean path", path, got)
		}
		if again, err := expand(got, "/elsewhere"); err != nil || again != got {
			t.Errorf("expand(%q) = %q, %v, not stable", got, again, err)
		}
	})
}
