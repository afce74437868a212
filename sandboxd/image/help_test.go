package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// file is one entry of a test's layer. The zero type is a regular file.
type file struct {
	name, body, link string
	kind             byte
	mode             int64
	uid, gid         int
	xattrs           map[string]string
	major, minor     int64
}

var someTime = time.Unix(1_700_000_000, 0)

func tarOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		hdr := &tar.Header{
			Name: f.name, Linkname: f.link, Typeflag: f.kind, Mode: f.mode, Uid: f.uid, Gid: f.gid, ModTime: someTime,
			Size: int64(len(f.body)), Devmajor: f.major, Devminor: f.minor, Format: tar.FormatPAX,
		}
		if hdr.Typeflag == 0 {
			hdr.Typeflag = tar.TypeReg
		}
		if hdr.Mode == 0 {
			hdr.Mode = 0o644
			if f.kind == tar.TypeDir {
				hdr.Mode = 0o755
			}
		}
		for name, value := range f.xattrs {
			if hdr.PAXRecords == nil {
				hdr.PAXRecords = map[string]string{}
			}
			hdr.PAXRecords["SCHILY.xattr."+name] = value
		}
		if err := w.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, raw []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func digestOf(raw []byte) string {
	sum := sha256.Sum256(raw)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func layerOf(raw []byte) layer {
	return layer{size: int64(len(raw)), open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }}
}

func mustSpool(t testing.TB) *spool {
	t.Helper()
	s, err := newSpool(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// merge flattens layers.
func merge(t testing.TB, s *spool, limits Limits, raw ...[]byte) (*flattener, error) {
	t.Helper()
	src := &source{}
	for _, r := range raw {
		src.layers = append(src.layers, layerOf(r))
	}
	return flatten(t.Context(), src, s, limits, func(Step) {})
}

func mustMerge(t testing.TB, s *spool, raw ...[]byte) *tree {
	t.Helper()
	f, err := merge(t, s, Limits{}, raw...)
	if err != nil {
		t.Fatal(err)
	}
	return f.tree
}

// rootImage writes a tree as a root image and returns its path.
func rootImage(t testing.TB, tr *tree, s *spool) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "root.erofs")
	if err := writeRoot(path, tr, s); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustRead(t testing.TB, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
