package image

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The guest's init reads these, see package guest.
const (
	modulesDir   = "sluice/modules"
	modulesOrder = "sluice/modules/order" // file names in the order of loading, one to a line
)

// initFile is one file of an initramfs.
type initFile struct {
	name         string
	mode         uint32
	major, minor uint32 // of a device
	data         []byte
}

// initFiles are the files of a guest's initramfs: the agent as /init, and modules in their order. console and null are there because a
// program without them starts with its standard descriptors closed.
func initFiles(agent []byte, modules []module) []initFile {
	files := []initFile{
		{name: "dev/console", mode: unix.S_IFCHR | 0o600, major: 5, minor: 1},
		{name: "dev/null", mode: unix.S_IFCHR | 0o666, major: 1, minor: 3},
		{name: "init", mode: unix.S_IFREG | 0o755, data: agent},
	}
	var order strings.Builder
	for i, m := range modules {
		name := fmt.Sprintf("%03d-%s.ko", i, m.name)
		files = append(files, initFile{name: path.Join(modulesDir, name), mode: unix.S_IFREG | 0o644, data: m.data})
		order.WriteString(name + "\n")
	}
	return append(files, initFile{name: modulesOrder, mode: unix.S_IFREG | 0o644, data: []byte(order.String())})
}

// writeInitramfs writes the files as a compressed cpio archive. The same files give the same bytes.
func writeInitramfs(file string, files []initFile) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("make initramfs: %w", err)
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	zw := gzip.NewWriter(w) // every kernel with an initramfs can read it
	err = writeCpio(zw, files)
	for _, finish := range []func() error{zw.Close, w.Flush, f.Sync, f.Close} {
		if err == nil {
			err = finish()
		}
	}
	if err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return nil
}

// writeCpio writes the "newc" format, which is what kernels unpack, with the directories that the files need. Names are in byte order,
// which puts directories before what is in them.
func writeCpio(w io.Writer, files []initFile) error {
	all := slices.Clone(files)
	dirs := map[string]bool{".": true}
	for _, f := range files {
		for dir := path.Dir(f.name); !dirs[dir]; dir = path.Dir(dir) {
			dirs[dir] = true
			all = append(all, initFile{name: dir, mode: unix.S_IFDIR | 0o755})
		}
	}
	slices.SortFunc(all, func(a, b initFile) int { return strings.Compare(a.name, b.name) })
	for i, f := range all {
		if err := writeCpioEntry(w, uint32(i+1), f); err != nil {
			return err
		}
	}
	return writeCpioEntry(w, 0, initFile{name: "TRAILER!!!"})
}

func writeCpioEntry(w io.Writer, ino uint32, f initFile) error {
	links := 1
	if f.mode&unix.S_IFMT == unix.S_IFDIR {
		links = 2
	}
	// magic, ino, mode, uid, gid, nlink, mtime, size, device, rdevice, length of the name with its NUL, check
	_, err := fmt.Fprintf(w, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		ino, f.mode, 0, 0, links, 0, len(f.data), 0, 0, f.major, f.minor, len(f.name)+1, 0, f.name)
	if err != nil {
		return err
	}
	const head = 110
	if err := pad4(w, head+len(f.name)+1); err != nil {
		return err
	}
	if _, err := w.Write(f.data); err != nil {
		return err
	}
	return pad4(w, len(f.data))
}

func pad4(w io.Writer, n int) error {
	_, err := w.Write(make([]byte, (4-n%4)%4))
	return err
}
