package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Config is what an image says about how to run it.
type Config struct {
	User       string   `json:"user,omitempty"`
	Workdir    string   `json:"workdir,omitempty"`
	Env        []string `json:"env,omitempty"` // KEY=value
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	Ports      []uint16 `json:"ports,omitempty"` // exposed, TCP
}

// source is an opened image: layers to be put on top of each other, or a directory.
type source struct {
	layers []layer
	dir    string // instead of layers
	config Config
	digest string // of the image's manifest or configuration; "" for a directory
	made   int64  // when its making began, where that was just now; zero where it was there before
	close  func() error
}

// Kinds of sources, as prefixes of Options.From.
const (
	fromLayout    = "oci"
	fromArchive   = "docker-archive"
	fromReference = "docker"
	fromDirectory = "dir"
	fromDebian    = "mmdebstrap"
)

// parseSource takes the kind, the place and the selected image out of what an operator wrote. Without a kind it looks at what is there.
func parseSource(from string) (kind, place, selected string, err error) {
	kind, place, ok := strings.Cut(from, ":")
	switch {
	case ok && (kind == fromLayout || kind == fromArchive || kind == fromDebian):
		place, selected, _ = strings.Cut(place, "#")
	case ok && kind == fromDirectory:
	case ok && kind == fromReference:
		place = strings.TrimPrefix(place, "//")
	default:
		kind, place = "", from
	}
	if place == "" {
		return "", "", "", errs.New(errs.Invalid, "the image source %q names nothing", clip(from))
	}
	if kind != "" {
		return kind, place, selected, nil
	}
	place, selected, _ = strings.Cut(from, "#")
	info, err := os.Stat(place)
	switch {
	case err == nil && info.IsDir():
		if _, err := os.Stat(filepath.Join(place, "oci-layout")); err == nil {
			return fromLayout, place, selected, nil
		}
		return fromDirectory, from, "", nil
	case err == nil:
		return fromArchive, place, selected, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", "", "", fmt.Errorf("look at image source: %w", err)
	case strings.HasPrefix(from, "/") || strings.HasPrefix(from, "."):
		return "", "", "", errs.New(errs.NotFound, "the image source %q does not exist", clip(from))
	}
	return fromReference, from, "", nil
}

// openSource opens what --from names. temp is a directory for what has to be unpacked or made first; note is told what takes long.
func openSource(ctx context.Context, from, temp string, limits Limits, note func(string)) (*source, error) {
	kind, place, selected, err := parseSource(from)
	if err != nil {
		return nil, err
	}
	var src *source
	switch kind {
	case fromLayout:
		src, err = openLayout(place, selected)
	case fromArchive:
		src, err = openArchive(ctx, place, selected, temp, limits)
	case fromReference:
		src, err = openReference(ctx, place)
	case fromDirectory:
		src, err = openDirectory(place)
	case fromDebian:
		src, err = openDebian(ctx, place, selected, temp, note)
	}
	if err != nil {
		return nil, fmt.Errorf("open image %q: %w", clip(from), err)
	}
	if most := limits.withDefaults().Layers; len(src.layers) > most {
		src.Close()
		return nil, errs.New(errs.Invalid, "the image %q has %d layers, at most %d are possible", clip(from), len(src.layers), most)
	}
	return src, nil
}

// Close lets go of the archive, which was only read. Layers cannot be opened afterwards.
func (s *source) Close() {
	if s.close != nil {
		_ = s.close()
	}
}

func openDirectory(path string) (*source, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, &errs.Error{Code: errs.NotFound, Msg: "no such directory", Err: err}
	}
	if !info.IsDir() {
		return nil, errs.New(errs.Invalid, "not a directory")
	}
	return &source{dir: path}, nil
}

// What a template keeps of an image's configuration. It becomes a part of the manifest, which every create reads.
const (
	maxConfig = 128 << 10 // bytes of environment and commands
	maxPorts  = 1024
)

// configOf keeps what a template needs of an image's configuration.
func configOf(c *v1.ConfigFile) (Config, error) {
	if c.OS != "" && c.OS != "linux" {
		return Config{}, errs.New(errs.Invalid, "the image is for %s, want linux", clip(c.OS))
	}
	if c.Architecture != "" && c.Architecture != runtime.GOARCH {
		return Config{}, errs.New(errs.Invalid, "the image is for %s, this node is %s", clip(c.Architecture), runtime.GOARCH)
	}
	out := Config{
		User: c.Config.User, Workdir: c.Config.WorkingDir, Env: c.Config.Env,
		Entrypoint: c.Config.Entrypoint, Cmd: c.Config.Cmd,
	}
	if err := out.check(); err != nil {
		return Config{}, err
	}
	for port := range c.Config.ExposedPorts {
		number, protocol, _ := strings.Cut(port, "/")
		n, err := strconv.ParseUint(number, 10, 16)
		if err == nil && n > 0 && cmp.Or(protocol, "tcp") == "tcp" {
			out.Ports = append(out.Ports, uint16(n))
		}
	}
	slices.Sort(out.Ports)
	out.Ports = slices.Compact(out.Ports) // the protocol may be left out
	if len(out.Ports) > maxPorts {
		return Config{}, errs.New(errs.Invalid, "the image exposes %d ports, at most %d are possible", len(out.Ports), maxPorts)
	}
	return out, nil
}

// check refuses what no program can be given.
func (c *Config) check() error {
	size := 0
	for _, text := range slices.Concat([]string{c.User, c.Workdir}, c.Env, c.Entrypoint, c.Cmd) {
		size += len(text) + 8 // as the kernel counts: each has a pointer
		if strings.IndexByte(text, 0) >= 0 {
			return errs.New(errs.Invalid, "the image's configuration has a NUL byte in %q", clip(text))
		}
	}
	if size > maxConfig {
		return errs.New(errs.Invalid, "user, directory, environment and commands of the image have %d bytes, at most %d are possible", size, maxConfig)
	}
	return nil
}
