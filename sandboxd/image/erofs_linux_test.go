package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// everything is an image with all that a file system can have, in two layers.
func everything(t testing.TB) [][]byte {
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff" +
		"\x10\x00\x04\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"
	lower := []file{
		{name: "./", kind: tar.TypeDir, mode: 0o755},
		{name: "etc/", kind: tar.TypeDir},
		{name: "etc/passwd", body: "root:x:0:0:root:/root:/bin/sh\n"},
		{name: "etc/gone", body: "x"},
		{name: "bin", kind: tar.TypeSymlink, link: "usr/bin"},
		{name: "usr/bin/", kind: tar.TypeDir},
		{name: "usr/bin/ping", body: "ping", mode: 0o755, xattrs: map[string]string{"security.capability": capability, "user.note": "hello"}},
		{name: "usr/bin/sudo", body: "sudo", mode: 0o4755},
		{name: "usr/bin/sudoedit", kind: tar.TypeLink, link: "usr/bin/sudo"},
		{name: "home/user/", kind: tar.TypeDir, mode: 0o700, uid: 1000, gid: 1000},
		{name: "home/user/.profile", body: "umask 022\n", uid: 1000, gid: 1000, xattrs: map[string]string{"system.posix_acl_access": acl}},
		{name: "home/far", kind: tar.TypeDir, uid: 4_000_000_000, gid: 4_000_000_001},
		{name: "run/pipe", kind: tar.TypeFifo, mode: 0o600},
		{name: "tmp/", kind: tar.TypeDir, mode: 0o1777},
		{name: "var/lib/old/", kind: tar.TypeDir},
		{name: "var/lib/old/a", body: "a"},
		{name: "dev/null", kind: tar.TypeChar, major: 1, minor: 3},
		{name: "long", kind: tar.TypeSymlink, link: strings.Repeat("../x/", 800)},
		{name: "big", body: strings.Repeat("0123456789abcdef", 1<<16)},
		{name: "odd", body: strings.Repeat("z", 3*4096+1)},
		{name: "page", body: strings.Repeat("y", 4096)},
		{name: "nearly", body: strings.Repeat("x", 4095)},
		{name: "empty"},
		{name: "ünï \"code\"\n", body: "odd name"},
		{name: strings.Repeat("n", 255), body: "long name"},
		{name: "wide/", kind: tar.TypeDir, xattrs: map[string]string{"user.wide": strings.Repeat("w", 6000)}},
	}
	for i := range 700 { // several blocks of directory entries
		lower = append(lower, file{name: fmt.Sprintf("wide/file-%04d-%s", i*7919%700, strings.Repeat("p", i%40)), body: strings.Repeat("b", i*13)})
	}
	upper := []file{
		{name: "etc/.wh.gone"},
		{name: "bin/new", body: "through a symlink", mode: 0o755},
		{name: "var/lib/old/.wh..wh..opq"},
		{name: "var/lib/old/b", body: "b"},
		{name: "etc/", kind: tar.TypeDir, mode: 0o750, gid: 7},
	}
	return [][]byte{tarOf(t, lower...), gzipped(t, tarOf(t, upper...))}
}

// TestImageInTheKernel mounts the image where the kernel can, and looks at every file as any program would.
func TestImageInTheKernel(t *testing.T) {
	s := mustSpool(t)
	tr := mustMerge(t, s, everything(t)...)
	image := rootImage(t, tr, s)
	withMount(t, image, func(dir string) { compareTree(t, dir, tr, s) })
}

// TestImageByTheTools holds the image to erofs-utils: its checker, and what it extracts.
func TestImageByTheTools(t *testing.T) {
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("SKIP: no fsck.erofs: install the package erofs-utils")
	}
	s := mustSpool(t)
	tr := mustMerge(t, s, everything(t)...)
	image := rootImage(t, tr, s)
	if out, err := exec.Command(fsck, image).CombinedOutput(); err != nil {
		t.Fatalf("fsck.erofs: %v\n%s", err, out)
	}
	if os.Geteuid() != 0 {
		t.Skip("SKIP: not root, cannot compare owners of an extracted image")
	}
	dir := filepath.Join(t.TempDir(), "out")
	if out, err := exec.Command(fsck, "--extract="+dir, "--preserve-owner", "--preserve-perms", image).CombinedOutput(); err != nil {
		t.Fatalf("fsck.erofs --extract: %v\n%s", err, out)
	}
	if got := string(mustRead(t, filepath.Join(dir, "usr/bin/new"))); got != "through a symlink" {
		t.Errorf("usr/bin/new = %q", got)
	}
}

// withMount calls f with the image mounted, in a mount namespace that ends with the test.
func withMount(t *testing.T, image string, f func(dir string)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIP: not root, cannot mount the image")
	}
	known := mustRead(t, "/proc/filesystems")
	if !bytes.Contains(known, []byte("erofs")) {
		t.Skip("SKIP: this kernel has no erofs: modprobe erofs")
	}
	dir := t.TempDir()
	done := make(chan error)
	skip := make(chan string, 1)
	go func() {
		// The thread is never unlocked, so it ends with the goroutine, and its mount namespace with it.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return err
			}
			err := unix.Mount(image, dir, "erofs", unix.MS_RDONLY, "")
			if errors.Is(err, unix.ENOTBLK) {
				skip <- "SKIP: this kernel mounts no erofs image from a file, and loop devices are left alone"
				return nil
			}
			if err != nil {
				return fmt.Errorf("mount %s: %w", image, err)
			}
			f(dir)
			return nil
		}()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	select {
	case why := <-skip:
		t.Skip(why)
	default:
	}
}

// compareTree compares what is mounted at dir with the tree, in both directions.
func compareTree(t *testing.T, dir string, tr *tree, s *spool) {
	t.Helper()
	links := map[*inode]int{}
	inodes := map[*inode]uint64{}
	seen := 0
	var visit func(path string, i *inode)
	visit = func(path string, i *inode) {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Error(err)
			return
		}
		links[i]++
		if old, ok := inodes[i]; ok && old != st.Ino {
			t.Errorf("%s: hard links are different files", path)
		}
		inodes[i] = st.Ino
		if st.Mode != i.mode || st.Uid != i.uid || st.Gid != i.gid || st.Mtim.Sec != i.mtime || st.Mtim.Nsec != 0 {
			t.Errorf("%s: mode %o owner %d:%d time %d, want %o %d:%d %d", path, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, i.mode, i.uid, i.gid, i.mtime)
		}
		if got, err := fileXattrs(path); err != nil || !slices.Equal(got, i.xattrs) {
			t.Errorf("%s: attributes %q, %v, want %q", path, got, err, i.xattrs)
		}
		switch {
		case i.isRegular():
			want := make([]byte, i.size)
			r, err := s.content(i.offset, i.size)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Read(want); err != nil && i.size > 0 {
				t.Fatal(err)
			}
			if got := mustRead(t, path); !bytes.Equal(got, want) {
				t.Errorf("%s: content differs", path)
			}
		case i.isSymlink():
			if got, err := os.Readlink(path); err != nil || got != i.target {
				t.Errorf("%s -> %q, %v, want %q", path, got, err, i.target)
			}
		case i.isDir():
			for name, e := range i.children {
				seen++
				visit(filepath.Join(path, name), e.inode)
			}
		}
	}
	visit(dir, tr.root.inode)
	on := -1 // without the root
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		on++
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if st, ok := info.Sys().(*syscall.Stat_t); ok && err == nil {
			for i, ino := range inodes {
				if ino == st.Ino && int(st.Nlink) != links[i] {
					t.Errorf("%s has %d links, want %d", path, st.Nlink, links[i])
				}
			}
		}
		return err
	})
	if err != nil || on != seen || seen != tr.entries {
		t.Errorf("%d files on disk, %d in the tree, which counts %d (%v)", on, seen, tr.entries, err)
	}
}

// TestSameInputSameImage: byte for byte, whatever the order of Go's maps was.
func TestSameInputSameImage(t *testing.T) {
	var first []byte
	for range 5 {
		s := mustSpool(t)
		raw := mustRead(t, rootImage(t, mustMerge(t, s, everything(t)...), s))
		if first == nil {
			first = raw
		}
		if !bytes.Equal(raw, first) {
			t.Fatal("the same layers gave two images")
		}
	}
}
