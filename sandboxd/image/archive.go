package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/sluice-edge/sluice/internal/errs"
)

// What an image archive may list: a few files per layer.
const (
	maxArchiveFiles = 100_000
	maxArchiveNames = 64 << 20 // bytes of their names and targets: each may have a megabyte of them
)

// archiveBlobs is a tar archive whose files are read where they lie.
type archiveBlobs struct {
	f     *os.File
	files map[string]archived
}

type archived struct {
	offset, size int64
	link         string // another file of the archive
}

// openArchive opens what `docker save` and `podman save` write: docker's manifest.json, or an OCI layout as a tar.
func openArchive(ctx context.Context, file, selected, temp string, limits Limits) (*source, error) {
	b, err := openArchiveBlobs(ctx, file, temp, limits)
	if err != nil {
		return nil, err
	}
	var src *source
	if _, ok := b.files["manifest.json"]; ok {
		src, err = dockerSource(b, selected)
	} else if _, ok := b.files["index.json"]; ok {
		src, err = layoutSource(b, selected)
	} else {
		err = errs.New(errs.Invalid, "not an image archive: it has neither manifest.json nor index.json")
	}
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return src, nil
}

func openArchiveBlobs(ctx context.Context, file, temp string, limits Limits) (_ *archiveBlobs, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, &errs.Error{Code: errs.NotFound, Msg: "cannot open the archive", Err: err}
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if f, err = unpackedArchive(ctx, f, temp, limits); err != nil {
		return nil, err
	}
	b := &archiveBlobs{f: f, files: map[string]archived{}}
	names := 0
	tr := tar.NewReader(f)
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return b, nil
		}
		if err != nil {
			return nil, errs.New(errs.Invalid, "not a tar archive, or a damaged one: %v", err)
		}
		if len(b.files) >= maxArchiveFiles {
			return nil, errs.New(errs.Invalid, "the archive lists more than %d files", maxArchiveFiles)
		}
		if names += len(hdr.Name) + len(hdr.Linkname); names > maxArchiveNames {
			return nil, errs.New(errs.Invalid, "the names in the archive have more than %d bytes", maxArchiveNames)
		}
		// The tar reader takes whole headers from the file and nothing ahead of them, so here is where the content begins.
		at, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, fmt.Errorf("read archive: %w", err)
		}
		name := path.Clean("/" + hdr.Name)[1:]
		var entry archived
		switch hdr.Typeflag {
		case tar.TypeReg:
			entry = archived{offset: at, size: hdr.Size}
		case tar.TypeSymlink:
			entry = archived{link: path.Join("/", path.Dir(name), hdr.Linkname)[1:]}
		case tar.TypeLink:
			entry = archived{link: path.Clean("/" + hdr.Linkname)[1:]}
		default:
			continue
		}
		if _, twice := b.files[name]; twice {
			return nil, errs.New(errs.Invalid, "the archive has %q twice", clip(name))
		}
		b.files[name] = entry
	}
}

// unpackedArchive is f, or what it decompresses to.
func unpackedArchive(ctx context.Context, f *os.File, temp string, limits Limits) (*os.File, error) {
	head := make([]byte, 4)
	switch n, err := f.ReadAt(head, 0); {
	case n > 0:
	case errors.Is(err, io.EOF):
		return f, errs.New(errs.Invalid, "the archive is empty")
	case errors.Is(err, syscall.EISDIR):
		return f, errs.New(errs.Invalid, "it is a directory: use dir: for a root filesystem, oci: for an OCI layout")
	default:
		return f, fmt.Errorf("read archive: %w", err)
	}
	if head[0] != 0x1f && head[0] != 0x28 {
		return f, nil
	}
	plain, err := decompress(f)
	if err != nil {
		return f, errs.New(errs.Invalid, "%v", err)
	}
	defer plain.Close()
	s, err := newSpool(temp)
	if err != nil {
		return f, err
	}
	bounded := &meter{r: plain, ctx: ctx, sum: noSum{}, left: limits.withDefaults().Bytes, limited: true}
	_, err = io.Copy(s, bounded)
	if err == nil {
		err = s.flush()
	}
	if err == nil {
		_, err = s.f.Seek(0, io.SeekStart)
	}
	if _, ours := errors.AsType[*spoolError](err); err != nil && !ours && ctx.Err() == nil {
		err = errs.New(errs.Invalid, "decompress archive: %v", err)
	}
	if err != nil {
		s.Close()
		return f, err
	}
	f.Close()
	return s.f, nil
}

// noSum is a hash that nobody asks for.
type noSum struct{}

func (noSum) Write(p []byte) (int, error) { return len(p), nil }
func (noSum) Sum(b []byte) []byte         { return b }

func (b *archiveBlobs) Close() error { return b.f.Close() }

func (b *archiveBlobs) open(name string) (io.ReadCloser, error) {
	name = path.Clean("/" + name)[1:]
	for range 8 {
		entry, ok := b.files[name]
		switch {
		case !ok:
			return nil, fmt.Errorf("open %q in the archive: %w", clip(name), fs.ErrNotExist)
		case entry.link == "":
			return io.NopCloser(io.NewSectionReader(b.f, entry.offset, entry.size)), nil
		}
		name = entry.link
	}
	return nil, errs.New(errs.Invalid, "links in the archive go in circles at %q", clip(name))
}

// dockerSource reads docker's own manifest. It has no digests of layers, but the configuration has those of their content.
func dockerSource(b blobs, selected string) (*source, error) {
	var images []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := readDocument(b, "manifest.json", v1.Hash{}, &images); err != nil {
		return nil, err
	}
	var tags []string
	at := -1
	for i, img := range images {
		tags = append(tags, img.RepoTags...)
		if selected != "" && slices.Contains(img.RepoTags, selected) || selected == "" && len(images) == 1 {
			at = i
		}
	}
	if at < 0 {
		return nil, errs.New(errs.Invalid, "the archive has %d images; add #NAME with one of: %s", len(images), clip(strings.Join(tags, ", ")))
	}
	img := images[at]
	var raw json.RawMessage
	if err := readDocument(b, img.Config, v1.Hash{}, &raw); err != nil {
		return nil, err
	}
	digest, _, err := v1.SHA256(strings.NewReader(string(raw)))
	if err != nil {
		return nil, fmt.Errorf("hash configuration: %w", err)
	}
	var file v1.ConfigFile
	if err := json.Unmarshal(raw, &file); err != nil {
		return nil, errs.New(errs.Invalid, "%q is not an image configuration: %v", clip(img.Config), err)
	}
	if len(file.RootFS.DiffIDs) != len(img.Layers) {
		return nil, errs.New(errs.Invalid, "the manifest has %d layers, the configuration %d", len(img.Layers), len(file.RootFS.DiffIDs))
	}
	config, err := configOf(&file)
	if err != nil {
		return nil, err
	}
	src := &source{config: config, digest: digest.String(), close: b.Close}
	for i, name := range img.Layers {
		src.layers = append(src.layers, layer{
			diffID: file.RootFS.DiffIDs[i].String(), size: -1,
			open: func(context.Context) (io.ReadCloser, error) { return openBlob(b, name) },
		})
	}
	return src, nil
}
