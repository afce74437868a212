package vmm

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// Where the loader looks without a cache or an environment, on every distribution that we know.
var libraryDirs = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu",
	"/lib64", "/usr/lib64", "/lib", "/usr/lib",
}

// libraries lists what a program needs beside itself: its loader and its libraries, by the paths at which the loader will look for
// them. A static program needs none.
func libraries(program string) ([]string, error) {
	f, err := elf.Open(program)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", program, err)
	}
	defer f.Close()
	var found []string
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		if p.Filesz > 4096 {
			return nil, fmt.Errorf("read %s: its loader's name is too long", program)
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return nil, fmt.Errorf("read loader of %s: %w", program, err)
		}
		loader := filepath.Clean(string(b[:max(len(b)-1, 0)]))
		if !filepath.IsAbs(loader) {
			return nil, fmt.Errorf("read %s: its loader %q is no absolute path", program, clip(loader))
		}
		found = append(found, loader)
	}
	seen := map[string]bool{}
	for _, l := range found {
		seen[filepath.Base(l)] = true
	}
	queue, err := f.ImportedLibraries()
	if err != nil {
		return nil, fmt.Errorf("read libraries of %s: %w", program, err)
	}
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if seen[name] {
			continue
		}
		seen[name] = true
		path, more, err := findLibrary(name, f.Class, f.Machine)
		if err != nil {
			return nil, fmt.Errorf("library of %s: %w", program, err)
		}
		found = append(found, path)
		queue = append(queue, more...)
	}
	slices.Sort(found)
	return found, nil
}

func findLibrary(name string, class elf.Class, machine elf.Machine) (path string, needs []string, err error) {
	if filepath.Base(name) != name {
		return "", nil, fmt.Errorf("%q is not the plain name of a library", clip(name))
	}
	for _, d := range libraryDirs {
		path := filepath.Join(d, name)
		f, err := elf.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", nil, err
		}
		needs, err := f.ImportedLibraries()
		f.Close()
		if f.Class != class || f.Machine != machine {
			continue
		}
		return path, needs, err
	}
	return "", nil, fmt.Errorf("%s: %w", name, os.ErrNotExist)
}
