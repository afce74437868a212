package lab

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestWriteInitramfs(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	if err := os.WriteFile(src, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	err := WriteInitramfs(&b, []File{
		{Path: "/sbin/deep/tool", Mode: 0o755, Src: src},
		{Path: "/init", Mode: 0o755, Data: []byte("#!")},
		{Path: "/sbin/other", Mode: 0o644, Data: []byte("x")},
	})
	if err != nil {
		t.Fatal(err)
	}
	if b.Len()%4 != 0 {
		t.Errorf("%d bytes are not a multiple of four", b.Len())
	}
	if err := WriteInitramfs(&b, []File{{Path: "/x", Src: "/nonexistent"}}); err == nil {
		t.Error("a missing file is packed")
	}
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("no cpio to read it with: apt-get install cpio, or make test")
	}
	dir := t.TempDir()
	unpack := exec.Command("cpio", "-idm", "--quiet")
	unpack.Dir, unpack.Stdin = dir, &b
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	for name, want := range map[string]string{"init": "#!", "sbin/deep/tool": "from a file", "sbin/other": "x"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s = %q, %v, want %q", name, got, err, want)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "sbin/deep/tool")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("the mode is lost: %v", err)
	}
	if strings.Contains(b.String(), "TRAILER") {
		t.Log("cpio left the trailer unread")
	}
}
