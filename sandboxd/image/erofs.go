package image

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The root image is erofs without compression, written here. Debian 12's mkfs.erofs and mke2fs both want a directory with every file
// in place, owner, device and attribute included, so a build would have to unpack hostile archives as root; this writer needs
// neither root nor a tool, and its output is a function of the tree alone. docs/decisions/0013 has the argument; tests hold the output
// to fsck.erofs and the kernel. On-disk format: Linux, fs/erofs/erofs_fs.h.
const (
	erofsBlock       = 4096
	erofsSuper       = 1024
	erofsSuperSize   = 128
	erofsMagic       = 0xe0f5e1e2
	erofsSlot        = 32 // inodes are addressed in these
	erofsInodeSize   = 64 // the extended form
	erofsDirentSize  = 12
	erofsXattrHeader = 12

	erofsCompatChecksum = 1
	erofsCompatMtime    = 2

	erofsPlain  = 0 // content in blocks of its own
	erofsInline = 2 // its last, partial block follows the inode
)

// rootLabel is the volume name of root images, by which the guest can find them.
const rootLabel = "sluice-root"

// erofsNode is an inode with its place in the image.
type erofsNode struct {
	*inode
	parent  *erofsNode // of a directory
	dirents []dirent   // of a directory, in the order on disk
	links   uint32
	xattrs  []byte // encoded
	size    int64
	nid     uint64
	inline  int64 // bytes that follow the inode
	block   uint32
}

type dirent struct {
	name string
	node *erofsNode
}

// erofsPlan has every inode at its place, in the order in which they are written.
type erofsPlan struct {
	nodes  []*erofsNode
	blocks uint32 // of the whole image
	meta   uint32 // of superblock and inodes
}

// planErofs lays the tree out: superblock, inodes in the order of a walk, then content in the same order.
func planErofs(root *inode) (*erofsPlan, error) {
	p := &erofsPlan{}
	known := map[*inode]*erofsNode{}
	top := p.collect(root, nil, known)
	top.links += 2
	if err := p.place(); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *erofsPlan) collect(i *inode, parent *erofsNode, known map[*inode]*erofsNode) *erofsNode {
	n := &erofsNode{inode: i, parent: parent, xattrs: encodeXattrs(i.xattrs), size: i.size}
	known[i] = n
	p.nodes = append(p.nodes, n)
	switch {
	case i.isSymlink():
		n.size = int64(len(i.target))
	case i.isDir():
		if parent == nil {
			parent = n
		}
		n.dirents = []dirent{{".", n}, {"..", parent}}
		for _, name := range i.names() {
			child, ok := known[i.children[name].inode]
			if !ok {
				child = p.collect(i.children[name].inode, n, known)
			}
			if child.isDir() {
				child.links += 2
				n.links++
			} else {
				child.links++
			}
			n.dirents = append(n.dirents, dirent{name, child})
		}
		slices.SortFunc(n.dirents, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
		n.size = direntBytes(n.dirents)
	}
	return n
}

// place gives every inode its number and every content its blocks.
func (p *erofsPlan) place() error {
	at := int64(erofsSuper + erofsSuperSize)
	for _, n := range p.nodes {
		head := int64(erofsInodeSize + len(n.xattrs))
		if tail := n.size % erofsBlock; head+tail <= erofsBlock {
			n.inline = tail
		}
		at = align(at, erofsSlot)
		// What is inline must not cross a block. An inode without inline content may.
		if n.inline > 0 && at/erofsBlock != (at+head+n.inline-1)/erofsBlock {
			at = align(at, erofsBlock)
		}
		n.nid = uint64(at / erofsSlot)
		at += head + n.inline
	}
	block := align(at, erofsBlock) / erofsBlock
	p.meta = uint32(block)
	for _, n := range p.nodes {
		if n.size > n.inline {
			n.block = uint32(block)
			block += (n.size - n.inline + erofsBlock - 1) / erofsBlock
		}
		if block > math.MaxUint32 {
			return errNoSpace
		}
	}
	p.blocks = uint32(block)
	return nil
}

func align(n, to int64) int64 { return (n + to - 1) / to * to }

// write puts the image into f, front to back.
func (p *erofsPlan) write(f *os.File, content *spool) error {
	w := &erofsWriter{w: bufio.NewWriterSize(f, 1<<20), content: content}
	w.zeros(erofsSuper)
	w.bytes(p.superblock())
	for _, n := range p.nodes {
		w.until(int64(n.nid) * erofsSlot)
		w.bytes(n.encode())
		w.bytes(n.xattrs)
		w.node(n, n.size-n.inline, n.inline)
	}
	w.until(int64(p.meta) * erofsBlock)
	for _, n := range p.nodes {
		if n.size > n.inline {
			w.until(int64(n.block) * erofsBlock)
			w.node(n, 0, n.size-n.inline)
		}
	}
	w.until(int64(p.blocks) * erofsBlock)
	if w.err == nil {
		w.err = w.w.Flush()
	}
	if w.err != nil {
		return fmt.Errorf("write root image: %w", w.err)
	}
	return sealErofs(f)
}

// sealErofs writes the checksum of the first block.
func sealErofs(f *os.File) error {
	block := make([]byte, erofsBlock-erofsSuper)
	if _, err := f.ReadAt(block, erofsSuper); err != nil {
		return fmt.Errorf("read back superblock: %w", err)
	}
	// The kernel's crc32c has no final inversion.
	sum := ^crc32.Checksum(block, crc32.MakeTable(crc32.Castagnoli))
	if _, err := f.WriteAt(binary.LittleEndian.AppendUint32(nil, sum), erofsSuper+4); err != nil {
		return fmt.Errorf("write checksum: %w", err)
	}
	return nil
}

func (p *erofsPlan) superblock() []byte {
	b := make([]byte, erofsSuperSize)
	le := binary.LittleEndian
	le.PutUint32(b, erofsMagic)
	le.PutUint32(b[8:], erofsCompatChecksum|erofsCompatMtime)
	b[12] = 12 // log2 of the block size
	le.PutUint16(b[14:], uint16(p.nodes[0].nid))
	le.PutUint64(b[16:], uint64(len(p.nodes)))
	le.PutUint32(b[36:], p.blocks)
	copy(b[48:64], "sluice root v1\x00\x00") // the UUID says nothing: a random one would make every build another
	copy(b[64:80], rootLabel)
	return b
}

func (n *erofsNode) encode() []byte {
	b := make([]byte, erofsInodeSize)
	le := binary.LittleEndian
	layout := uint16(erofsPlain)
	if n.inline > 0 {
		layout = erofsInline
	}
	le.PutUint16(b, 1|layout<<1)
	if len(n.xattrs) > 0 {
		le.PutUint16(b[2:], uint16((len(n.xattrs)-erofsXattrHeader)/4+1))
	}
	le.PutUint16(b[4:], uint16(n.mode))
	le.PutUint64(b[8:], uint64(n.size))
	le.PutUint32(b[16:], n.block)
	le.PutUint32(b[20:], uint32(n.nid))
	le.PutUint32(b[24:], n.uid)
	le.PutUint32(b[28:], n.gid)
	le.PutUint64(b[32:], uint64(n.mtime))
	le.PutUint32(b[44:], n.links)
	return b
}

// xattrPrefixes are those that the format has a number for.
var xattrPrefixes = []struct {
	prefix string
	index  byte
}{
	{"user.", 1},
	{"system.posix_acl_access", 2},
	{"system.posix_acl_default", 3},
	{"trusted.", 4},
	{"security.", 6},
}

func splitXattr(name string) (index byte, suffix string, ok bool) {
	for _, p := range xattrPrefixes {
		suffix, ok := strings.CutPrefix(name, p.prefix)
		if ok && (suffix == "") == strings.HasPrefix(p.prefix, "system.") {
			return p.index, suffix, true
		}
	}
	return 0, "", false
}

func encodeXattrs(all []xattr) []byte {
	if len(all) == 0 {
		return nil
	}
	b := make([]byte, erofsXattrHeader)
	for _, x := range all {
		index, suffix, ok := splitXattr(x.name)
		if !ok {
			panic("BUG: extended attribute without a number: " + x.name)
		}
		b = append(b, byte(len(suffix)), index)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(x.value)))
		b = append(append(b, suffix...), x.value...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

// direntBytes is the size of a directory: blocks of entries and their names, of which only the last is not whole.
func direntBytes(all []dirent) int64 {
	size := int64(0)
	for block := range direntBlocks(all) {
		size = align(size, erofsBlock)
		for _, d := range block {
			size += erofsDirentSize + int64(len(d.name))
		}
	}
	return size
}

// direntBlocks cuts a directory into what fits a block each.
func direntBlocks(all []dirent) func(yield func([]dirent) bool) {
	return func(yield func([]dirent) bool) {
		for len(all) > 0 {
			n, used := 0, 0
			for n < len(all) && used+erofsDirentSize+len(all[n].name) <= erofsBlock {
				used += erofsDirentSize + len(all[n].name)
				n++
			}
			if !yield(all[:n]) {
				return
			}
			all = all[n:]
		}
	}
}

func encodeDirents(all []dirent) []byte {
	var b []byte
	for block := range direntBlocks(all) {
		b = append(b, make([]byte, int(align(int64(len(b)), erofsBlock))-len(b))...)
		names := len(block) * erofsDirentSize
		for _, d := range block {
			b = binary.LittleEndian.AppendUint64(b, d.node.nid)
			b = binary.LittleEndian.AppendUint16(b, uint16(names))
			b = append(b, fileType(d.node.mode), 0)
			names += len(d.name)
		}
		for _, d := range block {
			b = append(b, d.name...)
		}
	}
	return b
}

func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFIFO:
		return 5
	case unix.S_IFLNK:
		return 7
	}
	panic(fmt.Sprintf("BUG: inode of mode %o in the tree", mode))
}

// erofsWriter counts what it has written and remembers the first error.
type erofsWriter struct {
	w       *bufio.Writer
	content *spool
	at      int64
	err     error
}

func (w *erofsWriter) bytes(b []byte) {
	if w.err != nil {
		return
	}
	n, err := w.w.Write(b)
	w.at += int64(n)
	w.err = err
}

var zeroBlock [erofsBlock]byte

func (w *erofsWriter) zeros(n int64) {
	for ; n > 0 && w.err == nil; n -= min(n, erofsBlock) {
		w.bytes(zeroBlock[:min(n, erofsBlock)])
	}
}

func (w *erofsWriter) until(at int64) {
	if at < w.at && w.err == nil {
		panic(fmt.Sprintf("BUG: root image at %d, want to be at %d", w.at, at))
	}
	w.zeros(at - w.at)
}

// node writes size bytes of the node's content, from offset on.
func (w *erofsWriter) node(n *erofsNode, offset, size int64) {
	if size == 0 || w.err != nil {
		return
	}
	switch {
	case n.isSymlink():
		w.bytes([]byte(n.target)[offset : offset+size])
	case n.isDir():
		w.bytes(encodeDirents(n.dirents)[offset : offset+size])
	default:
		r, err := w.content.content(n.offset+offset, size)
		if err != nil {
			w.err = err
			return
		}
		got, err := io.Copy(w.w, r)
		w.at += got
		if err == nil && got != size {
			err = io.ErrUnexpectedEOF
		}
		w.err = err
	}
}
