package image

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/sluice-edge/sluice/internal/errs"
)

var update = flag.Bool("update", false, "rewrite golden files")

// bzImage is a kernel as far as its first sector goes.
func bzImage(version string) []byte {
	b := make([]byte, 0x1000)
	b[0x1fe], b[0x1ff] = 0x55, 0xaa
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x20e:], 0x400)
	copy(b[0x600:], version+" (builder@host) #1 SMP\x00")
	return b
}

// elfKernel is another.
func elfKernel() []byte {
	b := make([]byte, 64)
	copy(b, "\x7fELF\x02\x01\x01")
	b[18] = 0x3e
	return b
}

func put(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFindKernel(t *testing.T) {
	root := t.TempDir()
	for _, version := range []string{"6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "6.12.1-amd64", "6.1.0-57-cloud-amd64"} {
		put(t, filepath.Join(root, "boot/vmlinuz-"+version), bzImage(version))
		if version != "6.1.0-57-cloud-amd64" { // half removed: no modules
			put(t, filepath.Join(root, "lib/modules", version, "modules.builtin"), nil)
		}
	}
	put(t, filepath.Join(root, "boot/vmlinuz-9.9-cloud-broken"), []byte("not a kernel"))
	k, err := FindKernel(root, "")
	want := Kernel{"6.1.0-56-cloud-amd64", filepath.Join(root, "boot/vmlinuz-6.1.0-56-cloud-amd64"), filepath.Join(root, "lib/modules/6.1.0-56-cloud-amd64")}
	if err != nil || k != want {
		t.Errorf("FindKernel = %+v, %v, want %+v", k, err, want)
	}
	if k, err := FindKernel(filepath.Join(root, "boot/vmlinuz-6.12.1-amd64"), ""); err != nil || k.Version != "6.12.1-amd64" || k.Modules == "" {
		t.Errorf("FindKernel of a file = %+v, %v", k, err)
	}
	if k, err := FindKernel(filepath.Join(root, "boot/vmlinuz-6.1.0-57-cloud-amd64"), "/elsewhere"); err != nil || k.Modules != "/elsewhere" {
		t.Errorf("FindKernel with modules = %+v, %v", k, err)
	}
	own := filepath.Join(t.TempDir(), "vmlinux")
	put(t, own, elfKernel())
	if k, err := FindKernel(own, ""); err != nil || k != (Kernel{Image: own}) {
		t.Errorf("FindKernel of an ELF file = %+v, %v", k, err)
	}
	for path, code := range map[string]errs.Code{
		filepath.Join(root, "boot/vmlinuz-9.9-cloud-broken"):     errs.Invalid,
		filepath.Join(root, "boot/vmlinuz-6.1.0-57-cloud-amd64"): errs.NotFound,
		filepath.Join(root, "none"):                              errs.NotFound,
		t.TempDir():                                              errs.NotFound,
	} {
		if _, err := FindKernel(path, ""); errs.CodeOf(err) != code {
			t.Errorf("FindKernel(%q) = %v, want %s", path, err, code)
		}
	}
}

func TestBzImageVersion(t *testing.T) {
	check := func(raw []byte, want string, ok bool) {
		t.Helper()
		if !isBzImage(raw) {
			t.Error("not taken for a bzImage")
			return
		}
		if got, err := bzImageVersion(raw); got != want || (err == nil) != ok {
			t.Errorf("version = %q, %v, want %q", got, err, want)
		}
	}
	check(bzImage("6.1.0"), "6.1.0", true)
	check(bzImage("../../etc"), "", false)
	check(bzImage(".."), "", false)
	check(bzImage(""), "", false)
	check(bzImage("6.1.0")[:0x602], "", false)
	far := bzImage("6.1.0")
	binary.LittleEndian.PutUint16(far[0x20e:], 0xffff)
	check(far, "", false)
}

func FuzzKernelHead(f *testing.F) {
	f.Add(bzImage("6.1.0-cloud"))
	f.Add(elfKernel())
	f.Fuzz(func(t *testing.T, head []byte) {
		if isELF(head) || !isBzImage(head) {
			return
		}
		if v, err := bzImageVersion(head); err == nil && (!filepath.IsLocal(v) || v == ".") {
			t.Errorf("version %q is not the name of a directory", v)
		}
	})
}

const someDep = `kernel/fs/erofs/erofs.ko.xz: kernel/lib/libcrc32c.ko.xz
kernel/lib/libcrc32c.ko.xz:
kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko: kernel/net/vmw_vsock/vmw_vsock_virtio_transport_common.ko kernel/net/vmw_vsock/vsock.ko kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/net/vmw_vsock/vmw_vsock_virtio_transport_common.ko: kernel/net/vmw_vsock/vsock.ko
kernel/net/vmw_vsock/vsock.ko:
kernel/drivers/virtio/virtio.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/crypto/crc32c-intel.ko:
`

func parsedDep(t testing.TB, dep string) moduleIndex {
	t.Helper()
	x := moduleIndex{files: map[string]string{}, needs: map[string][]string{}, builtin: map[string]bool{"ext4": true}}
	if err := x.parseDep([]byte(dep)); err != nil {
		t.Fatal(err)
	}
	return x
}

func nothingToLoad(string) ([]byte, []string, error) { return nil, nil, nil }

func names(all []module) []string {
	var out []string
	for _, m := range all {
		out = append(out, m.name)
	}
	return out
}

func TestModuleClosure(t *testing.T) {
	x := parsedDep(t, someDep)
	got, err := x.closure([]string{"erofs", "ext4", "vmw_vsock_virtio_transport"}, []string{"crc32c_intel", "absent", "erofs"}, nothingToLoad)
	want := []string{"libcrc32c", "erofs", "vsock", "vmw_vsock_virtio_transport_common", "virtio", "virtio_ring", "vmw_vsock_virtio_transport", "crc32c_intel"}
	if err != nil || !slices.Equal(names(got), want) {
		t.Errorf("closure = %q, %v, want %q", names(got), err, want)
	}
	if _, err := x.closure([]string{"erofs", "overlay", "virtio_blk"}, nil, nothingToLoad); errs.CodeOf(err) != errs.NotFound || !strings.Contains(err.Error(), "overlay, virtio_blk") {
		t.Errorf("missing modules: %v", err)
	}
	x = parsedDep(t, "a.ko: b.ko\nb.ko: c.ko\nc.ko: a.ko\n")
	if _, err := x.closure([]string{"a"}, nil, nothingToLoad); errs.CodeOf(err) != errs.Invalid {
		t.Errorf("a circle: %v", err)
	}
	broken := errors.New("broken")
	x = parsedDep(t, "a.ko:\n")
	if _, err := x.closure([]string{"a"}, nil, func(string) ([]byte, []string, error) { return nil, nil, broken }); !errors.Is(err, broken) {
		t.Errorf("a module that cannot be read: %v", err)
	}
	for _, bad := range []string{"no colon", "../evil.ko:", "/abs.ko:", "noext:", ".ko:"} {
		x := moduleIndex{files: map[string]string{}, needs: map[string][]string{}}
		if err := x.parseDep([]byte(bad)); errs.CodeOf(err) != errs.Invalid {
			t.Errorf("parseDep(%q) = %v", bad, err)
		}
	}
}

func FuzzModulesDep(f *testing.F) {
	f.Add([]byte(someDep), "erofs")
	f.Add([]byte("a.ko: b.ko\nb.ko.xz: a.ko\n# comment\n"), "a")
	f.Fuzz(func(t *testing.T, dep []byte, want string) {
		x := moduleIndex{files: map[string]string{}, needs: map[string][]string{}, builtin: map[string]bool{}}
		if x.parseDep(dep) != nil {
			return
		}
		for _, file := range x.files {
			if !filepath.IsLocal(file) {
				t.Fatalf("module at %q", file)
			}
		}
		order, err := x.closure([]string{want}, nil, nothingToLoad)
		if err != nil {
			return
		}
		at := map[string]int{}
		for i, m := range order {
			if _, twice := at[m.name]; twice {
				t.Fatalf("%q is loaded twice", m.name)
			}
			at[m.name] = i
		}
		for _, m := range order {
			for _, need := range x.needs[m.name] {
				if i, ok := at[need]; !ok || i > at[m.name] {
					t.Fatalf("%q is loaded before %q", m.name, need)
				}
			}
		}
	})
}

func TestUnpackModule(t *testing.T) {
	want := bytes.Repeat([]byte("module "), 10_000)
	var gz, x, zst bytes.Buffer
	for _, w := range []struct {
		write func() error
	}{
		{func() error {
			w := gzip.NewWriter(&gz)
			_, err := w.Write(want)
			return errors.Join(err, w.Close())
		}},
		{func() error {
			w, err := xz.NewWriter(&x)
			if err != nil {
				return err
			}
			_, err = w.Write(want)
			return errors.Join(err, w.Close())
		}},
		{func() error {
			w, err := zstd.NewWriter(&zst)
			if err != nil {
				return err
			}
			_, err = w.Write(want)
			return errors.Join(err, w.Close())
		}},
	} {
		if err := w.write(); err != nil {
			t.Fatal(err)
		}
	}
	for file, raw := range map[string][]byte{"a.ko": want, "a.ko.gz": gz.Bytes(), "a.ko.xz": x.Bytes(), "a.ko.zst": zst.Bytes()} {
		if got, err := unpackModule(file, raw); err != nil || !bytes.Equal(got, want) {
			t.Errorf("unpackModule(%s) = %d bytes, %v", file, len(got), err)
		}
		if file == "a.ko" {
			continue
		}
		for _, bad := range [][]byte{nil, raw[:len(raw)/2], []byte("garbage garbage garbage")} {
			if _, err := unpackModule(file, bad); err == nil {
				t.Errorf("unpackModule(%s) of %d damaged bytes succeeds", file, len(bad))
			}
		}
	}
	if _, err := unpackModule("a.ko.lzma", nil); errs.CodeOf(err) != errs.Invalid {
		t.Errorf("unknown packing: %v", err)
	}
}

// TestModulesOfARealKernel: what depmod says and what the modules say themselves comes to the same.
func TestModulesOfARealKernel(t *testing.T) {
	k := testKernel(t)
	own, err := guestModulesOf(k)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"erofs", "overlay", "virtio_net"} {
		x, err := readModuleIndex(k.Modules)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(names(own), name) && !x.builtin[name] {
			t.Errorf("no %s among %q", name, names(own))
		}
	}
	if _, err := exec.LookPath("depmod"); err != nil {
		t.Skip("SKIP: no depmod: install the package kmod")
	}
	base := t.TempDir()
	modules := filepath.Join(base, "lib/modules", k.Version)
	if err := os.MkdirAll(filepath.Dir(modules), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(modules, os.DirFS(k.Modules)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("depmod", "-b", base, k.Version).CombinedOutput(); err != nil {
		t.Fatalf("depmod: %v\n%s", err, out)
	}
	byDepmod, err := guestModulesOf(Kernel{Version: k.Version, Modules: modules})
	if err != nil {
		t.Fatal(err)
	}
	a, b := slices.Sorted(slices.Values(names(own))), slices.Sorted(slices.Values(names(byDepmod)))
	if !slices.Equal(a, b) {
		t.Errorf("by depmod %q, by themselves %q", b, a)
	}
}

func TestInitramfs(t *testing.T) {
	var b bytes.Buffer
	files := initFiles([]byte("\x7fELF agent"), []module{{"virtio", []byte("v")}, {"virtio_blk", []byte("blk")}})
	if err := writeCpio(&b, files); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "initramfs.cpio.golden")
	if *update {
		put(t, golden, b.Bytes())
	}
	if want := mustRead(t, golden); !bytes.Equal(b.Bytes(), want) {
		t.Errorf("the archive changed: run with -update and look at the difference\n%q", b.Bytes())
	}
	cpio, err := exec.LookPath("cpio")
	if err != nil {
		t.Skip("SKIP: no cpio to read it: apt-get install cpio, or make test")
	}
	cmd := exec.Command(cpio, "-itv", "--quiet", "--numeric-uid-gid")
	cmd.Stdin = &b
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "sluice/modules/001-virtio_blk.ko") || !strings.Contains(string(out), "5,   1") {
		t.Errorf("cpio says %v\n%s", err, out)
	}
}

// parseCpio reads back what writeCpio writes.
func parseCpio(raw []byte) (files []initFile, err error) {
	for {
		if len(raw) < 110 || string(raw[:6]) != "070701" {
			return nil, fmt.Errorf("no entry at %q", raw[:min(len(raw), 20)])
		}
		var v [13]uint32
		for i := range v {
			if _, err := fmt.Sscanf(string(raw[6+8*i:14+8*i]), "%X", &v[i]); err != nil {
				return nil, err
			}
		}
		nameEnd := 110 + int(v[11])
		name := string(raw[110 : nameEnd-1])
		raw = raw[(nameEnd+3)/4*4:]
		if name == "TRAILER!!!" {
			if len(raw) != 0 {
				return nil, errors.New("bytes after the end")
			}
			return files, nil
		}
		files = append(files, initFile{name: name, mode: v[1], major: v[9], minor: v[10], data: raw[:v[6]]})
		raw = raw[(v[6]+3)/4*4:]
	}
}

func FuzzCpio(f *testing.F) {
	f.Add("a/b/c", []byte("content"), "d", []byte{})
	f.Add("x", []byte("1"), "x-y/z", []byte("22"))
	f.Fuzz(func(t *testing.T, nameA string, a []byte, nameB string, b []byte) {
		for _, name := range []string{nameA, nameB} {
			if parts, err := splitPath(name); err != nil || len(parts) == 0 || strings.Join(parts, "/") != name || name == "TRAILER!!!" {
				return
			}
		}
		if nameA == nameB || strings.HasPrefix(nameA, nameB+"/") || strings.HasPrefix(nameB, nameA+"/") {
			return
		}
		var out bytes.Buffer
		if err := writeCpio(&out, []initFile{{name: nameA, mode: 0o100644, data: a}, {name: nameB, mode: 0o100755, data: b}}); err != nil {
			t.Fatal(err)
		}
		files, err := parseCpio(out.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string][]byte{}
		for _, got := range files {
			if dir := filepath.Dir(got.name); dir != "." && seen[dir] == nil {
				t.Fatalf("%q comes before its directory", got.name)
			}
			seen[got.name] = append([]byte{}, got.data...)
		}
		if !bytes.Equal(seen[nameA], a) || !bytes.Equal(seen[nameB], b) {
			t.Fatalf("content differs: %q", seen)
		}
	})
}
