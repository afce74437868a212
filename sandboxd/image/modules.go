package image

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/sluice-edge/sluice/internal/errs"
)

// maxModule bounds a module once unpacked; the largest of a distribution are a few MiB.
const maxModule = 64 << 20

// guestModules are what a guest needs before it has a root, and what its agent ends connections with. Those that a kernel has built in are not
// missing.
var guestModules = []string{
	"virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "vsock", "vmw_vsock_virtio_transport", "erofs", "ext4", "overlay", "inet_diag", "tcp_diag",
}

// optionalModules are taken along where they exist: faster checksums for ext4, and consoles other than the serial one.
var optionalModules = []string{"crc32c_generic", "crc32c_intel", "virtio_console", "virtio_balloon"}

// moduleIndex is what a modules directory says: where each module is, what it needs, and what the kernel has built in.
type moduleIndex struct {
	files   map[string]string   // name to path below the directory
	needs   map[string][]string // name to names
	builtin map[string]bool
}

// moduleName is a path's module in the kernel's spelling: without directory and suffixes, with '_' for '-'.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModuleIndex reads what depmod has written. A kernel package that was only unpacked has no modules.dep yet; then the modules
// themselves say what they need.
func readModuleIndex(dir string) (moduleIndex, error) {
	x := moduleIndex{files: map[string]string{}, needs: map[string][]string{}, builtin: map[string]bool{}}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return x, fmt.Errorf("read built-in modules: %w", err)
	}
	for line := range strings.Lines(string(builtin)) {
		if line = strings.TrimSpace(line); line != "" {
			x.builtin[moduleName(line)] = true
		}
	}
	dep, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if errors.Is(err, fs.ErrNotExist) {
		return x, x.scan(dir)
	}
	if err != nil {
		return x, fmt.Errorf("read module dependencies: %w", err)
	}
	return x, x.parseDep(dep)
}

// parseDep reads modules.dep: a line per module, its path, a colon, and the paths of all that it needs.
func (x *moduleIndex) parseDep(dep []byte) error {
	lines := bufio.NewScanner(bytes.NewReader(dep))
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		file, needs, ok := strings.Cut(line, ":")
		if !ok {
			return errs.New(errs.Invalid, "modules.dep, line %d: no colon", n)
		}
		if err := x.addFile(file); err != nil {
			return fmt.Errorf("modules.dep, line %d: %w", n, err)
		}
		name := moduleName(file)
		for need := range strings.FieldsSeq(needs) {
			x.needs[name] = append(x.needs[name], moduleName(need))
		}
	}
	if err := lines.Err(); err != nil {
		return &errs.Error{Code: errs.Invalid, Msg: "modules.dep is not a text file", Err: err}
	}
	return nil
}

func (x *moduleIndex) addFile(file string) error {
	if !filepath.IsLocal(file) || moduleName(file) == "" || !strings.Contains(path.Base(file), ".ko") {
		return errs.New(errs.Invalid, "%q is not the path of a module", clip(file))
	}
	if _, ok := x.files[moduleName(file)]; !ok {
		x.files[moduleName(file)] = file
	}
	return nil
}

// scan finds the modules. What they need is read by closure, of those that it takes.
func (x *moduleIndex) scan(dir string) error {
	root := filepath.Join(dir, "kernel")
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.Contains(d.Name(), ".ko") {
			return err
		}
		rel, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		return x.addFile(filepath.ToSlash(rel))
	})
	if err != nil {
		return fmt.Errorf("look for modules: %w", err)
	}
	x.needs = nil
	return nil
}

// module is one to load, unpacked.
type module struct {
	name string
	data []byte
}

// closure returns the wanted modules with all that they need, in an order in which they can be loaded. load returns a module's
// bytes and, when the index does not know them, the names that it needs.
func (x *moduleIndex) closure(required, optional []string, load func(file string) ([]byte, []string, error)) ([]module, error) {
	var order []module
	const visiting, done = 1, 2
	state := map[string]int{}
	var missing []string
	var visit func(name string) error
	visit = func(name string) error {
		name = strings.ReplaceAll(name, "-", "_")
		file, ok := x.files[name]
		switch {
		case state[name] == done || !ok && x.builtin[name]:
			return nil
		case state[name] == visiting:
			return errs.New(errs.Invalid, "kernel modules need each other in a circle at %q", clip(name))
		case !ok:
			missing = append(missing, name)
			return nil
		}
		state[name] = visiting
		data, needs, err := load(file)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		if x.needs != nil {
			needs = x.needs[name]
		}
		for _, need := range needs {
			if err := visit(need); err != nil {
				return err
			}
		}
		state[name] = done
		order = append(order, module{name, data})
		return nil
	}
	for _, name := range required {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	if len(missing) > 0 {
		return nil, errs.New(errs.NotFound, "the kernel has no module %s, neither to load nor built in", strings.Join(missing, ", "))
	}
	for _, name := range optional {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// guestModulesOf loads what a guest needs from a kernel's modules directory.
func guestModulesOf(k Kernel) ([]module, error) {
	if k.Modules == "" {
		return nil, nil
	}
	x, err := readModuleIndex(k.Modules)
	if err != nil {
		return nil, err
	}
	return x.closure(guestModules, optionalModules, func(file string) ([]byte, []string, error) {
		raw, err := os.ReadFile(filepath.Join(k.Modules, filepath.FromSlash(file)))
		if err != nil {
			return nil, nil, err
		}
		data, err := unpackModule(file, raw)
		if err != nil {
			return nil, nil, err
		}
		needs, err := moduleNeeds(data)
		return data, needs, err
	})
}

// unpackModule undoes the compression that distributions store modules with, so that the guest need not know of it.
func unpackModule(file string, raw []byte) ([]byte, error) {
	var r io.Reader = bytes.NewReader(raw)
	switch path.Ext(file) {
	case ".ko":
	case ".gz":
		zr, err := gzip.NewReader(r)
		if err != nil {
			return nil, fmt.Errorf("damaged gzip: %w", err)
		}
		r = zr
	case ".xz":
		zr, err := xz.ReaderConfig{DictCap: maxModule}.NewReader(r)
		if err != nil {
			return nil, fmt.Errorf("damaged xz: %w", err)
		}
		r = zr
	case ".zst":
		zr, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return nil, fmt.Errorf("damaged zstd: %w", err)
		}
		defer zr.Close()
		r = zr
	default:
		return nil, errs.New(errs.Invalid, "module %q is packed in an unknown way", clip(file))
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	switch {
	case err == nil && len(data) == 0:
		return nil, errs.New(errs.Invalid, "module %q is empty", clip(file))
	case err != nil:
		return nil, fmt.Errorf("unpack: %w", err)
	case len(data) > maxModule:
		return nil, errs.New(errs.Invalid, "module %q has more than %d bytes", clip(file), maxModule)
	}
	return data, nil
}

// moduleNeeds reads "depends=a,b" of a module's own description.
func moduleNeeds(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("not a module: %w", err)
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("not a module: it has no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("read .modinfo: %w", err)
	}
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := strings.CutPrefix(string(field), "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
