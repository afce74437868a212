package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Limits bound what an image may unfold into. Zero fields mean the defaults.
type Limits struct {
	Entries int   // files, directories and links in all layers together; zero means a million
	Bytes   int64 // of all layers together, uncompressed; zero means 32 GiB
	Names   int64 // bytes of names, targets and attributes, all of which are kept in memory; zero means 512 MiB
	Layers  int   // zero means 256
}

func (l Limits) withDefaults() Limits {
	if l.Entries == 0 {
		l.Entries = 1_000_000
	}
	if l.Bytes == 0 {
		l.Bytes = 32 << 30
	}
	if l.Names == 0 {
		l.Names = 512 << 20
	}
	if l.Layers == 0 {
		l.Layers = 256
	}
	return l
}

const (
	maxXattrs     = 64 << 10 // bytes of all attributes of one file: what an erofs inode can hold and a kernel can list
	maxZstdWindow = 128 << 20
)

// layer is one archive of an image, lowest first.
type layer struct {
	digest string // of the blob as stored, "sha256:…"; "" is not checked
	diffID string // of the uncompressed archive, "sha256:…"; "" is not checked
	size   int64  // of the blob; negative when not known
	open   func(ctx context.Context) (io.ReadCloser, error)
}

// flattener merges layers into a tree, and keeps the content of files in a spool.
type flattener struct {
	tree    *tree
	spool   *spool
	limits  Limits
	seen    int   // entries of all layers
	bytes   int64 // of all layers, uncompressed
	kept    int64 // of files; more than bytes where archives have sparse files
	names   int64 // bytes of all that is said about files besides their content
	dropped int   // device nodes: the guest's kernel makes its own
}

func newFlattener(s *spool, limits Limits) *flattener {
	limits = limits.withDefaults()
	return &flattener{tree: newTree(limits.Entries), spool: s, limits: limits}
}

// apply puts one layer on top of what is there. progress is told how many bytes of the blob have been read.
func (f *flattener) apply(ctx context.Context, index int, l layer, progress func(int64)) error {
	name := fmt.Sprintf("layer %d", index+1)
	if l.digest != "" {
		name += " (" + clip(l.digest) + ")"
	}
	blob, err := l.open(ctx)
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	defer blob.Close()
	stored := &meter{r: blob, ctx: ctx, sum: sumFor(l.digest), progress: progress}
	plain, err := decompress(stored)
	if err != nil {
		return f.explain(ctx, name, "", err)
	}
	defer plain.Close()
	unpacked := &meter{r: plain, ctx: ctx, sum: sumFor(l.diffID), left: f.limits.Bytes - f.bytes, limited: true}
	f.tree.layer = index
	if entry, err := f.merge(tar.NewReader(unpacked)); err != nil {
		return f.explain(ctx, name, entry, err)
	}
	// What comes after the archive's end belongs to the digests all the same.
	if _, err := io.Copy(io.Discard, unpacked); err != nil {
		return f.explain(ctx, name, "", err)
	}
	if _, err := io.Copy(io.Discard, stored); err != nil {
		return f.explain(ctx, name, "", err)
	}
	f.bytes += unpacked.n
	if got := stored.digest(); l.digest != "" && got != l.digest {
		return invalidLayer(name, "", fmt.Errorf("its content has the digest %s", got))
	}
	if got := unpacked.digest(); l.diffID != "" && got != l.diffID {
		return invalidLayer(name, "", fmt.Errorf("its uncompressed content has the digest %s, the image's configuration says %s", got, clip(l.diffID)))
	}
	return nil
}

// sumFor is what a stream is hashed with: nothing where nobody says what the sum should be.
func sumFor(digest string) sum {
	if digest == "" {
		return noSum{}
	}
	return sha256.New()
}

func invalidLayer(layer, entry string, err error) error {
	if entry != "" {
		layer += fmt.Sprintf(", entry %q", clip(entry))
	}
	return errs.New(errs.Invalid, "%s: %v", layer, err)
}

// explain tells apart what is wrong with the layer from what is wrong with us.
func (f *flattener) explain(ctx context.Context, layer, entry string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("read %s: %w", layer, ctx.Err())
	}
	if ours, ok := errors.AsType[*spoolError](err); ok {
		return fmt.Errorf("keep content of %s: %w", layer, ours)
	}
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = fmt.Errorf("the archive is cut off: %w", err)
	case errors.Is(err, tar.ErrHeader):
		err = fmt.Errorf("not a tar archive, or a damaged one: %w", err)
	}
	return invalidLayer(layer, entry, err)
}

// merge reads an archive to its end. The entry is the one that the error is about.
func (f *flattener) merge(tr *tar.Reader) (entry string, err error) {
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			return "", nil
		}
		if err != nil {
			return entry, err
		}
		entry = hdr.Name
		if f.seen++; f.seen > f.limits.Entries {
			return entry, fmt.Errorf("the layers have more than %d entries", f.limits.Entries)
		}
		if err := f.mergeEntry(hdr, tr); err != nil {
			return entry, err
		}
	}
}

func (f *flattener) mergeEntry(hdr *tar.Header, content io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil // comments of git archive and the like
	}
	parts, err := splitPath(hdr.Name)
	if err != nil {
		return err
	}
	if done, err := f.mergeWhiteout(parts); done || err != nil {
		return err
	}
	i, err := inodeOf(hdr)
	if err != nil {
		return err
	}
	if err := f.remember(hdr.Name, hdr.Linkname, i.xattrs); err != nil {
		return err
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		if hdr.Size > f.limits.Bytes-f.kept {
			return fmt.Errorf("file of %d bytes: the image may have %d in all", hdr.Size, f.limits.Bytes)
		}
		f.kept += hdr.Size
		if len(parts) == 0 {
			return errors.New("the root is not a directory")
		}
		i.mode |= unix.S_IFREG
		if i.offset, err = f.spool.store(content, hdr.Size); err != nil {
			return err
		}
		i.size = hdr.Size
		return f.tree.put(parts, i)
	case tar.TypeDir:
		i.mode |= unix.S_IFDIR
		i.children = map[string]*entry{}
		return f.tree.put(parts, i)
	case tar.TypeSymlink:
		if hdr.Linkname == "" || len(hdr.Linkname) > maxTarget || strings.IndexByte(hdr.Linkname, 0) >= 0 {
			return errors.New("symlink without a usable target")
		}
		i.mode = unix.S_IFLNK | 0o777
		i.target = hdr.Linkname
		return f.tree.put(parts, i)
	case tar.TypeLink:
		target, err := splitPath(hdr.Linkname)
		if err != nil {
			return fmt.Errorf("target %q of hard link: %w", clip(hdr.Linkname), err)
		}
		return f.tree.link(parts, target)
	case tar.TypeFifo:
		i.mode |= unix.S_IFIFO
		return f.tree.put(parts, i)
	case tar.TypeChar, tar.TypeBlock:
		if hdr.Typeflag == tar.TypeChar && hdr.Devmajor == 0 && hdr.Devminor == 0 {
			return errors.New("a whiteout in overlayfs's form: the layer is an overlay's directory, not an image layer")
		}
		f.dropped++
		return nil
	}
	return fmt.Errorf("entry of unknown type %q", hdr.Typeflag)
}

// remember counts what an entry keeps in memory until the image is written. Compressed, it can come from a thousandth of that.
func (f *flattener) remember(name, target string, xattrs []xattr) error {
	f.names += int64(len(name) + len(target))
	for _, x := range xattrs {
		f.names += int64(len(x.name) + len(x.value))
	}
	if f.names > f.limits.Names {
		return fmt.Errorf("the names, targets and attributes of the image's files have more than %d bytes", f.limits.Names)
	}
	return nil
}

// mergeWhiteout handles the names by which a layer hides things. done is false for every other name.
func (f *flattener) mergeWhiteout(parts []string) (done bool, err error) {
	at := slices.IndexFunc(parts, func(p string) bool { return strings.HasPrefix(p, whiteoutPrefix) })
	if at < 0 {
		return false, nil
	}
	name := parts[at]
	last := at == len(parts)-1
	switch hidden := strings.TrimPrefix(name, whiteoutPrefix); {
	case last && name == whiteoutOpaque:
		return true, f.tree.opaque(parts[:at])
	case strings.HasPrefix(name, whiteoutMeta):
		return true, nil // aufs's own housekeeping
	case !last:
		return true, errors.New("a whiteout is not a directory")
	case hidden == "" || hidden == "." || hidden == "..":
		return true, errors.New("a whiteout that names nothing")
	default:
		return true, f.tree.whiteout(append(slices.Clone(parts[:at]), hidden))
	}
}

// inodeOf is what every type of entry has.
func inodeOf(hdr *tar.Header) (*inode, error) {
	const maxID = 1<<32 - 2 // the last one means "unchanged" to chown
	if hdr.Uid < 0 || hdr.Uid > maxID || hdr.Gid < 0 || hdr.Gid > maxID {
		return nil, fmt.Errorf("owner %d:%d is out of range", hdr.Uid, hdr.Gid)
	}
	if hdr.Size < 0 {
		return nil, fmt.Errorf("size %d is negative", hdr.Size)
	}
	xattrs, err := xattrsOf(hdr.PAXRecords)
	if err != nil {
		return nil, err
	}
	return &inode{
		mode: uint32(hdr.Mode) & 0o7777, uid: uint32(hdr.Uid), gid: uint32(hdr.Gid),
		mtime: max(hdr.ModTime.Unix(), 0), xattrs: xattrs,
	}, nil
}

// xattrsOf are the attributes that mean something in a guest, in order.
func xattrsOf(records map[string]string) ([]xattr, error) {
	const prefix = "SCHILY.xattr."
	var all []xattr
	total := 0
	for key, value := range records {
		name, ok := strings.CutPrefix(key, prefix)
		if !ok || !keepXattr(name) {
			continue
		}
		if _, suffix, ok := splitXattr(name); !ok || len(suffix) > maxName {
			return nil, fmt.Errorf("extended attribute %q has no usable name", clip(name))
		}
		if total += len(name) + len(value) + 16; total > maxXattrs {
			return nil, fmt.Errorf("extended attributes of more than %d bytes", maxXattrs)
		}
		all = append(all, xattr{name, value})
	}
	slices.SortFunc(all, func(a, b xattr) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

// keepXattr leaves out labels of the machine that the layer was made on, and what the guest's overlayfs would obey.
func keepXattr(name string) bool {
	switch {
	case name == "security.selinux", strings.HasPrefix(name, "trusted.overlay."), strings.HasPrefix(name, "user.overlay."):
		return false
	case name == "system.posix_acl_access", name == "system.posix_acl_default":
		return true
	}
	return strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "security.") || strings.HasPrefix(name, "trusted.")
}

// sum is what a meter needs of a hash.
type sum interface {
	io.Writer
	Sum([]byte) []byte
}

// meter counts, hashes and bounds a stream, and ends it with its context.
type meter struct {
	r        io.Reader
	ctx      context.Context //nolint:containedctx // the reader's lifetime is the call's
	sum      sum
	n        int64
	left     int64
	limited  bool
	progress func(int64)
}

func (m *meter) Read(p []byte) (int, error) {
	if err := m.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := m.r.Read(p)
	m.n += int64(n)
	_, _ = m.sum.Write(p[:n]) // hashes do not fail
	if m.limited && m.n > m.left {
		return 0, errors.New("the image unfolds into more bytes than it may")
	}
	if m.progress != nil && n > 0 {
		m.progress(m.n)
	}
	return n, err
}

func (m *meter) digest() string { return "sha256:" + hex.EncodeToString(m.sum.Sum(nil)) }

// decompress looks at the first bytes: media types are often wrong.
func decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, fmt.Errorf("damaged gzip: %w", err)
		}
		return zr, nil
	case bytes.Equal(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		zr, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return nil, fmt.Errorf("damaged zstd: %w", err)
		}
		return zr.IOReadCloser(), nil
	}
	return io.NopCloser(br), nil
}
