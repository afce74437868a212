package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	manifestName    = "manifest.json"
	manifestVersion = 1
)

// File is one file of a template.
type File struct {
	Name   string `json:"name"` // relative to the template's directory
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Rates bound each sandbox of a template, per second; what is zero is the node's to say.
type Rates struct {
	NetBytes   int64 `json:"net_bytes,omitempty"` // each direction by itself, as are packets
	NetPackets int64 `json:"net_packets,omitempty"`
	DiskBytes  int64 `json:"disk_bytes,omitempty"` // of each of its two disks, as are operations
	DiskOps    int64 `json:"disk_ops,omitempty"`
}

// Manifest is what a template says about itself. It is written last, so a directory with one is whole.
type Manifest struct {
	Version int       `json:"version"`
	Name    string    `json:"name"` // without tag
	Tag     string    `json:"tag"`
	Aliases []string  `json:"aliases,omitempty"` // further names, without tag
	Build   string    `json:"build"`             // of this build alone: 32 random hex digits
	Created time.Time `json:"created"`

	Source       string `json:"source"` // as it was named
	SourceDigest string `json:"source_digest,omitempty"`

	Root          File   `json:"root"`
	Kernel        File   `json:"kernel"`
	KernelVersion string `json:"kernel_version,omitempty"`
	Initramfs     File   `json:"initramfs"`
	More          []File `json:"more,omitempty"` // what Options.Finish added: a snapshot

	CPUs      int `json:"cpus"`
	MemoryMiB int `json:"memory_mib"`
	DiskMiB   int `json:"disk_mib"`

	Rates Rates `json:"rates,omitzero"`

	StartCmd string `json:"start_cmd,omitempty"`
	ReadyCmd string `json:"ready_cmd,omitempty"`
	Config          // user, working directory, environment, command and ports: the image's, overridden by the build's
}

func (m Manifest) files() []File {
	return append([]File{m.Root, m.Kernel, m.Initramfs}, m.More...)
}

// parseManifest reads a manifest of a version that we know.
func parseManifest(raw []byte) (Manifest, error) {
	var version struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(raw, &version); err != nil {
		return Manifest{}, &errs.Error{Code: errs.Invalid, Msg: "the manifest is damaged, build the template again", Err: err}
	}
	if version.Version != manifestVersion {
		return Manifest{}, errs.New(errs.Invalid, "the manifest has version %d, this program reads %d: build the template again", version.Version, manifestVersion)
	}
	var m Manifest
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&m); err != nil {
		return Manifest{}, &errs.Error{Code: errs.Invalid, Msg: "the manifest is damaged, build the template again", Err: err}
	}
	for _, f := range m.files() {
		if !filepath.IsLocal(f.Name) || f.Name == "." || f.Size < 0 || len(f.SHA256) != 2*sha256.Size {
			return Manifest{}, errs.New(errs.Invalid, "the manifest names no usable file by %q", clip(f.Name))
		}
	}
	return m, nil
}

// Describe measures a file of a build directory for its manifest. Options.Finish uses it for what it adds.
func Describe(ctx context.Context, dir, name string) (File, error) { return describe(ctx, dir, name) }

func describe(ctx context.Context, dir, name string) (File, error) {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return File{}, fmt.Errorf("hash %s: %w", name, err)
	}
	defer f.Close()
	m := &meter{r: f, ctx: ctx, sum: sha256.New()}
	if _, err := io.Copy(io.Discard, m); err != nil {
		return File{}, fmt.Errorf("hash %s: %w", name, err)
	}
	return File{Name: name, Size: m.n, SHA256: m.digest()[len("sha256:"):]}, nil
}

var errNoStore = errors.New("no template store was given")
