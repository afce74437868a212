package image

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	maxDocument = 8 << 20 // of a manifest, an index or a configuration
	maxIndexes  = 4       // within each other

	refAnnotation = "org.opencontainers.image.ref.name"
)

// blobs are the files of an OCI layout, wherever it is kept: in a directory or in an archive.
type blobs interface {
	open(name string) (io.ReadCloser, error)
	Close() error
}

type dirBlobs struct{ *os.Root }

func (d dirBlobs) open(name string) (io.ReadCloser, error) { return d.Open(name) }

func openLayout(dir, selected string) (*source, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, &errs.Error{Code: errs.NotFound, Msg: "no such OCI layout", Err: err}
	}
	src, err := layoutSource(dirBlobs{root}, selected)
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return src, nil
}

// layoutSource finds the image in a layout: the only one for this platform, or the one with the selected reference name.
func layoutSource(b blobs, selected string) (*source, error) {
	var index v1.IndexManifest
	if err := readDocument(b, "index.json", v1.Hash{}, &index); err != nil {
		return nil, err
	}
	desc, err := selectManifest(b, index.Manifests, selected, 0)
	if err != nil {
		return nil, err
	}
	var manifest v1.Manifest
	if err := readDocument(b, blobName(desc.Digest), desc.Digest, &manifest); err != nil {
		return nil, err
	}
	var file v1.ConfigFile
	if err := readDocument(b, blobName(manifest.Config.Digest), manifest.Config.Digest, &file); err != nil {
		return nil, err
	}
	if len(file.RootFS.DiffIDs) != len(manifest.Layers) {
		return nil, errs.New(errs.Invalid, "the manifest has %d layers, the configuration %d", len(manifest.Layers), len(file.RootFS.DiffIDs))
	}
	config, err := configOf(&file)
	if err != nil {
		return nil, err
	}
	src := &source{config: config, digest: desc.Digest.String(), close: b.Close}
	for i, l := range manifest.Layers {
		src.layers = append(src.layers, layer{
			digest: l.Digest.String(), diffID: file.RootFS.DiffIDs[i].String(), size: l.Size,
			open: func(context.Context) (io.ReadCloser, error) { return openBlob(b, blobName(l.Digest)) },
		})
	}
	return src, nil
}

func blobName(h v1.Hash) string { return path.Join("blobs", h.Algorithm, h.Hex) }

func openBlob(b blobs, name string) (io.ReadCloser, error) {
	r, err := b.open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &errs.Error{Code: errs.Invalid, Msg: fmt.Sprintf("the image lacks %q", clip(name)), Err: err}
	}
	return r, err
}

// readDocument decodes a JSON file of the layout and holds it to its digest, if it has one.
func readDocument(b blobs, name string, digest v1.Hash, into any) error {
	r, err := openBlob(b, name)
	if err != nil {
		return err
	}
	defer r.Close()
	raw, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if len(raw) > maxDocument {
		return errs.New(errs.Invalid, "%q is larger than %d bytes", clip(name), maxDocument)
	}
	if sum := sha256.Sum256(raw); digest.Hex != "" && digest.Hex != hex.EncodeToString(sum[:]) {
		return errs.New(errs.Invalid, "%q does not have the digest that it is named after", clip(name))
	}
	if err := json.NewDecoder(bytes.NewReader(raw)).Decode(into); err != nil {
		return errs.New(errs.Invalid, "%q is not what it should be: %v", clip(name), err)
	}
	return nil
}

// selectManifest looks through an index and the ones in it.
func selectManifest(b blobs, all []v1.Descriptor, selected string, depth int) (v1.Descriptor, error) {
	if depth > maxIndexes {
		return v1.Descriptor{}, errs.New(errs.Invalid, "the layout has indexes in indexes in indexes")
	}
	var found []v1.Descriptor
	var offered []string
	for _, d := range all {
		name := d.Annotations[refAnnotation]
		if !d.MediaType.IsIndex() && !d.MediaType.IsImage() {
			continue
		}
		if d.MediaType.IsImage() && d.Platform != nil && (d.Platform.OS != "linux" || d.Platform.Architecture != runtime.GOARCH) {
			offered = append(offered, fmt.Sprintf("%q for %s", cmp.Or(name, d.Digest.String()), d.Platform))
			continue
		}
		offered = append(offered, fmt.Sprintf("%q", cmp.Or(name, d.Digest.String())))
		if selected == "" || selected == name || selected == d.Digest.String() {
			found = append(found, d)
		}
	}
	slices.Sort(offered)
	switch list := clip(strings.Join(offered, ", ")); {
	case len(found) == 0 && selected != "":
		return v1.Descriptor{}, errs.New(errs.NotFound, "no image %q for linux/%s in it; there are: %s", clip(selected), runtime.GOARCH, list)
	case len(found) == 0:
		return v1.Descriptor{}, errs.New(errs.NotFound, "no image for linux/%s in it; there are: %s", runtime.GOARCH, list)
	case len(found) > 1:
		return v1.Descriptor{}, errs.New(errs.Invalid, "more than one image in it, add #NAME with one of: %s", list)
	}
	if !found[0].MediaType.IsIndex() {
		return found[0], nil
	}
	var inner v1.IndexManifest
	if err := readDocument(b, blobName(found[0].Digest), found[0].Digest, &inner); err != nil {
		return v1.Descriptor{}, err
	}
	return selectManifest(b, inner.Manifests, "", depth+1)
}
