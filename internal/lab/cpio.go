package lab

import (
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
)

// File is one file of an initramfs: its content is Data, or what the file Src holds.
type File struct {
	Path string // absolute; directories above it are made
	Mode os.FileMode
	Data []byte
	Src  string
}

// WriteInitramfs writes files as the archive that Linux unpacks at boot: cpio in its "newc" form, uncompressed, because unpacking is what
// an emulated processor does slowly.
func WriteInitramfs(w io.Writer, files []File) error {
	a := &archive{w: w}
	dirs := map[string]bool{"/": true, ".": true}
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	for _, f := range files {
		var above []string
		for d := path.Dir(f.Path); !dirs[d]; d = path.Dir(d) {
			dirs[d] = true
			above = append(above, d)
		}
		slices.Reverse(above)
		for _, d := range above {
			if err := a.entry(d, 0o040755, 0, nil); err != nil {
				return err
			}
		}
		if err := a.file(f); err != nil {
			return fmt.Errorf("pack %s: %w", f.Path, err)
		}
	}
	return a.end()
}

type archive struct {
	w     io.Writer
	inode uint32
	n     int64
}

func (a *archive) file(f File) error {
	mode := 0o100000 | uint32(f.Mode.Perm())
	if f.Src == "" {
		return a.entry(f.Path, mode, int64(len(f.Data)), strings.NewReader(string(f.Data)))
	}
	src, err := os.Open(f.Src)
	if err != nil {
		return err
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		return err
	}
	return a.entry(f.Path, mode, st.Size(), src)
}

func (a *archive) entry(name string, mode uint32, size int64, content io.Reader) error {
	name = strings.TrimPrefix(name, "/")
	if size >= 1<<32 {
		return fmt.Errorf("%d bytes do not fit", size)
	}
	a.inode++
	// magic ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	if err := a.write([]byte(head)); err != nil {
		return err
	}
	if content == nil {
		return nil
	}
	n, err := io.CopyN(a.w, content, size)
	a.n += n
	if err != nil {
		return err
	}
	return a.pad()
}

func (a *archive) write(b []byte) error {
	n, err := a.w.Write(b)
	a.n += int64(n)
	if err != nil {
		return err
	}
	return a.pad()
}

func (a *archive) pad() error {
	n, err := a.w.Write(make([]byte, (4-a.n%4)%4))
	a.n += int64(n)
	return err
}

func (a *archive) end() error { return a.entry("TRAILER!!!", 0, 0, nil) }
