package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Kernel is a kernel to boot guests with, and where its modules are.
type Kernel struct {
	Version string // as uname -r; "" for an ELF kernel without modules
	Image   string // path of the bzImage or ELF file
	Modules string // path of lib/modules/<version>; "" when everything is built in
}

// FindKernel looks for a kernel. path is the root of a file system or of an unpacked kernel package, or the kernel's own file;
// empty means this machine. Of several, Debian's cloud kernels come first and then the newest: they are small and have what a
// guest needs. modules says where the modules of a kernel file are, when they are not beside it.
func FindKernel(path, modules string) (Kernel, error) {
	if path == "" {
		path = "/"
	}
	info, err := os.Stat(path)
	if err != nil {
		return Kernel{}, &errs.Error{Code: errs.NotFound, Msg: fmt.Sprintf("no kernel at %q", clip(path)), Err: err}
	}
	if !info.IsDir() {
		return kernelFile(path, modules)
	}
	images, err := filepath.Glob(filepath.Join(path, "boot", "vmlinu[xz]-*"))
	if err != nil {
		return Kernel{}, fmt.Errorf("look for kernels: %w", err)
	}
	slices.SortFunc(images, func(a, b string) int { return -compareKernels(filepath.Base(a), filepath.Base(b)) })
	var reasons []string
	for _, image := range images {
		k, err := kernelFile(image, modules)
		if err == nil {
			return k, nil
		}
		reasons = append(reasons, err.Error())
	}
	why := "there is no boot/vmlinuz-* in it"
	if len(reasons) > 0 {
		why = strings.Join(reasons, "; ")
	}
	return Kernel{}, errs.New(errs.NotFound, "no usable kernel under %q (%s): install the package linux-image-cloud-amd64, or name the directory "+
		"it was unpacked to", clip(path), why)
}

// kernelFile checks a kernel and finds the modules of its version.
func kernelFile(image, modules string) (Kernel, error) {
	head, err := readHead(image)
	if err != nil {
		return Kernel{}, err
	}
	k := Kernel{Image: image, Modules: modules}
	switch {
	case isELF(head):
		name := filepath.Base(image)
		if _, version, ok := strings.Cut(name, "-"); ok {
			k.Version = version
		}
	case isBzImage(head):
		if k.Version, err = bzImageVersion(head); err != nil {
			return Kernel{}, fmt.Errorf("kernel %s: %w", image, err)
		}
	default:
		return Kernel{}, errs.New(errs.Invalid, "%q is neither a bzImage nor an ELF kernel", clip(image))
	}
	if k.Modules != "" || k.Version == "" {
		return k, nil
	}
	base := filepath.Dir(filepath.Dir(image)) // <base>/boot/vmlinuz-*
	for _, dir := range []string{"lib/modules", "usr/lib/modules"} {
		found := filepath.Join(base, dir, k.Version)
		if info, err := os.Stat(found); err == nil && info.IsDir() {
			k.Modules = found
			return k, nil
		}
	}
	if isELF(head) {
		return k, nil
	}
	return Kernel{}, errs.New(errs.NotFound, "the modules of kernel %q are not in %q", clip(k.Version), filepath.Join(base, "lib/modules"))
}

// readHead reads what tells a kernel from other files.
func readHead(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open kernel: %w", err)
	}
	defer f.Close()
	head := make([]byte, 64<<10)
	n, err := f.ReadAt(head, 0)
	if n == 0 {
		return nil, fmt.Errorf("read kernel: %w", err)
	}
	return head[:n], nil
}

func isELF(head []byte) bool {
	const x8664, aarch64 = 0x3e, 0xb7
	if len(head) < 20 || !bytes.HasPrefix(head, []byte("\x7fELF\x02\x01")) {
		return false
	}
	machine := binary.LittleEndian.Uint16(head[18:])
	return machine == x8664 || machine == aarch64
}

// isBzImage knows the setup header of the x86 boot protocol.
func isBzImage(head []byte) bool {
	return len(head) > 0x220 && head[0x1fe] == 0x55 && head[0x1ff] == 0xaa && string(head[0x202:0x206]) == "HdrS"
}

// bzImageVersion is the first word of the version text that the setup header points to.
func bzImageVersion(head []byte) (string, error) {
	at := int(binary.LittleEndian.Uint16(head[0x20e:])) + 0x200
	if at == 0x200 || at >= len(head) {
		return "", errors.New("the boot header has no version")
	}
	text, _, ok := bytes.Cut(head[at:], []byte{0})
	version, _, _ := strings.Cut(string(text), " ")
	if !ok || version == "" || len(version) > 64 || strings.ContainsAny(version, "/\x00") || version[0] == '.' {
		return "", errors.New("the boot header has no usable version")
	}
	return version, nil
}

// compareKernels orders by preference: cloud kernels last, that is best, then by version with numbers as numbers.
func compareKernels(a, b string) int {
	if x, y := strings.Contains(a, "-cloud-"), strings.Contains(b, "-cloud-"); x != y {
		if x {
			return 1
		}
		return -1
	}
	return compareVersions(a, b)
}

func compareVersions(a, b string) int {
	for a != "" && b != "" {
		x, y := digits(a), digits(b)
		if x == "" || y == "" {
			if a[0] != b[0] {
				return int(a[0]) - int(b[0])
			}
			a, b = a[1:], b[1:]
			continue
		}
		n, m := strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
		if len(n) != len(m) {
			return len(n) - len(m)
		}
		if n != m {
			return strings.Compare(n, m)
		}
		a, b = a[len(x):], b[len(y):]
	}
	return len(a) - len(b)
}

func digits(s string) string {
	return s[:len(s)-len(strings.TrimLeft(s, "0123456789"))]
}

// regular says whether path is a file that can be copied.
func regular(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %w: not a regular file", path, fs.ErrInvalid)
	}
	return nil
}
