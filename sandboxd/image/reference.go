package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/sluice-edge/sluice/internal/errs"
)

// openReference finds an image in a registry. Credentials come from where docker and podman keep them.
func openReference(ctx context.Context, reference string) (*source, error) {
	ref, err := name.ParseReference(reference)
	if err != nil {
		return nil, errs.New(errs.Invalid, "neither a file nor an image reference: %v", err)
	}
	img, err := remote.Image(ref,
		remote.WithContext(ctx),
		remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}),
	)
	if err != nil {
		return nil, registryError(err)
	}
	manifest, err := img.Manifest()
	if err != nil {
		return nil, registryError(err)
	}
	if size := manifest.Config.Size; size < 0 || size > maxDocument { // the library reads as much as the manifest says
		return nil, errs.New(errs.Invalid, "the image's configuration has %d bytes, at most %d are possible", size, maxDocument)
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, registryError(err)
	}
	layers, err := img.Layers()
	if err != nil {
		return nil, registryError(err)
	}
	digest, err := img.Digest()
	if err != nil {
		return nil, registryError(err)
	}
	if len(layers) != len(file.RootFS.DiffIDs) {
		return nil, errs.New(errs.Invalid, "the manifest has %d layers, the configuration %d", len(layers), len(file.RootFS.DiffIDs))
	}
	config, err := configOf(file)
	if err != nil {
		return nil, err
	}
	src := &source{config: config, digest: digest.String()}
	for i, l := range layers {
		id, err := l.Digest()
		if err != nil {
			return nil, fmt.Errorf("digest of layer %d: %w", i+1, err)
		}
		size, err := l.Size()
		if err != nil {
			size = -1
		}
		src.layers = append(src.layers, layer{
			digest: id.String(), diffID: file.RootFS.DiffIDs[i].String(), size: size,
			open: func(context.Context) (io.ReadCloser, error) {
				r, err := l.Compressed()
				if err != nil {
					return nil, registryError(err)
				}
				return r, nil
			},
		})
	}
	return src, nil
}

// registryError gives the answers of a registry that an operator can act on their meaning.
func registryError(err error) error {
	answer, ok := errors.AsType[*transport.Error](err)
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("ask the registry: %w", err)
	}
	if !ok {
		return errs.New(errs.Unavailable, "the registry cannot be asked: %v", err)
	}
	switch answer.StatusCode {
	case http.StatusNotFound:
		return &errs.Error{Code: errs.NotFound, Msg: "the registry has no such image", Err: err}
	case http.StatusUnauthorized, http.StatusForbidden:
		return &errs.Error{Code: errs.Denied, Msg: "the registry refuses: log in with docker login or podman login, or check the name", Err: err}
	}
	return &errs.Error{Code: errs.Unavailable, Msg: fmt.Sprintf("the registry answered with status %d", answer.StatusCode), Err: err}
}
