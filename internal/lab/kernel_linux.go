package lab

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Kernel is a Debian cloud kernel with its modules.
type Kernel struct {
	Root    string // directory that it was extracted to, or "/"
	Image   string // vmlinuz
	Modules string // directory of .ko files
}

// KernelRootVariable names a directory into which the kernel's package was extracted (dpkg -x), for machines where it is not installed.
const KernelRootVariable = "SLUICE_KERNEL_ROOT"

// FindKernel looks for a Debian cloud kernel: below the directory that SLUICE_KERNEL_ROOT names, in .build/kernel of this module, and
// installed. The error says how to get one.
func FindKernel() (Kernel, error) {
	roots := []string{os.Getenv(KernelRootVariable)}
	if dir, err := moduleRoot(); err == nil {
		roots = append(roots, filepath.Join(dir, ".build", "kernel"))
	}
	for _, root := range append(roots, "/") {
		if root == "" {
			continue
		}
		images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*-cloud-amd64"))
		if err != nil {
			return Kernel{}, err
		}
		slices.Reverse(images) // the newest has the highest number, nearly always
		for _, image := range images {
			version := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
			for _, lib := range []string{"lib", "usr/lib"} {
				modules := filepath.Join(root, lib, "modules", version, "kernel")
				if st, err := os.Stat(modules); err == nil && st.IsDir() {
					return Kernel{Root: root, Image: image, Modules: modules}, nil
				}
			}
		}
	}
	return Kernel{}, errors.New("no Debian cloud kernel: apt-get install linux-image-cloud-amd64, or extract that package (apt-get download, dpkg -x) and name the directory in " + KernelRootVariable)
}

// ModuleFiles returns the files of these modules and of all that they need, in the order in which they are loaded. Names that the kernel
// does not have as modules are left out: they are built in, or whoever needs them will say so.
func (k Kernel) ModuleFiles(names ...string) ([]string, error) {
	index := map[string]string{}
	err := filepath.WalkDir(k.Modules, func(path string, _ os.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok && err == nil {
			index[moduleName(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list kernel modules: %w", err)
	}
	if len(index) == 0 {
		return nil, fmt.Errorf("%s has no uncompressed kernel modules", k.Modules)
	}
	var order []string
	seen := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		name = moduleName(name)
		path, ok := index[name]
		if seen[name] || !ok {
			return nil
		}
		seen[name] = true
		needs, err := moduleNeeds(path)
		if err != nil {
			return err
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		order = append(order, path)
		return nil
	}
	for _, n := range names {
		if err := add(n); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// moduleNeeds reads what a module says of itself; the package comes without the index that its installation would make.
func moduleNeeds(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", path, err)
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("read module %s: it has no .modinfo", path)
	}
	b, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", path, err)
	}
	var needs []string
	for _, field := range strings.Split(string(b), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			needs = append(needs, strings.Split(list, ",")...)
		}
		if list, ok := strings.CutPrefix(field, "softdep=pre: "); ok {
			needs = append(needs, strings.Fields(strings.Split(list, " post:")[0])...)
		}
	}
	return needs, nil
}

// moduleRoot is the directory of this Go module.
func moduleRoot() (string, error) {
	dir, err := os.Getwd() // of the package under test
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if filepath.Dir(dir) == dir {
			return "", errors.New("not inside the module")
		}
		dir = filepath.Dir(dir)
	}
}
