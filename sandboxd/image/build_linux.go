package image

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Names of the files of a template.
const (
	rootName      = "root.erofs"
	kernelName    = "kernel"
	initramfsName = "initramfs"
)

// Options say what to build. Store, Name, From and Agent are needed.
type Options struct {
	Store *Store
	Name  string // [namespace/]alias[:tag]

	// From is oci:DIR[#NAME], docker-archive:FILE[#NAME], docker://REFERENCE, dir:DIR or mmdebstrap:SUITE[#PACKAGE,…]; without a kind, what
	// is found there.
	From string

	Agent   string // path of guestd, static
	Kernel  string // see FindKernel
	Modules string // see FindKernel

	CPUs      int // zero means 2
	MemoryMiB int // zero means 512
	DiskMiB   int // zero means 1024
	Rates     Rates
	Aliases   []string // further names, without tag

	StartCmd string
	ReadyCmd string
	User     string            // empty means the image's
	Workdir  string            // empty means the image's
	Env      map[string]string // on top of the image's

	// Newest clamps the times of files: later ones become this one. Zero leaves them.
	Newest time.Time
	Limits Limits

	// Finish adds to the template before it appears: it boots what is in dir and leaves a snapshot there. It adds its files to
	// m.More. When it fails, nothing of the build stays.
	Finish func(ctx context.Context, dir string, m *Manifest) error
}

func (o Options) withDefaults() Options {
	if o.CPUs == 0 {
		o.CPUs = 2
	}
	if o.MemoryMiB == 0 {
		o.MemoryMiB = 512
	}
	if o.DiskMiB == 0 {
		o.DiskMiB = 1024
	}
	return o
}

// Check finds what is wrong with the options by themselves: Build refuses them too, but a caller may have much to do before it.
func (o Options) Check() error {
	o = o.withDefaults()
	var all []error
	if _, err := ParseName(o.Name); err != nil {
		all = append(all, err)
	}
	if _, _, _, err := parseSource(o.From); err != nil {
		all = append(all, err)
	}
	if o.CPUs < 1 || o.CPUs > 256 {
		all = append(all, errs.New(errs.Invalid, "%d CPUs: want 1 to 256", o.CPUs))
	}
	if o.MemoryMiB < 64 || o.MemoryMiB > 1<<24 {
		all = append(all, errs.New(errs.Invalid, "%d MiB of memory: want 64 to %d", o.MemoryMiB, 1<<24))
	}
	if o.DiskMiB < minDiskMiB || o.DiskMiB > maxDiskMiB {
		all = append(all, errs.New(errs.Invalid, "a disk of %d MiB: want %d to %d", o.DiskMiB, minDiskMiB, maxDiskMiB))
	}
	for what, rate := range map[string]int64{
		"bytes of the network": o.Rates.NetBytes, "packets": o.Rates.NetPackets, "bytes of a disk": o.Rates.DiskBytes, "operations of a disk": o.Rates.DiskOps,
	} {
		if rate < 0 {
			all = append(all, errs.New(errs.Invalid, "%d %s a second: want 0 or more", rate, what))
		}
	}
	for _, alias := range o.Aliases {
		if n, err := ParseName(alias); err != nil || n.Tag != DefaultTag {
			all = append(all, errs.New(errs.Invalid, "invalid alias %q: want [namespace/]alias without a tag", clip(alias)))
		}
	}
	for key, value := range o.Env {
		if key == "" || strings.ContainsAny(key, "=\x00") || strings.IndexByte(value, 0) >= 0 {
			all = append(all, errs.New(errs.Invalid, "invalid environment variable %q", clip(key)))
		}
	}
	if strings.IndexByte(o.StartCmd+o.ReadyCmd+o.User+o.Workdir, 0) >= 0 {
		all = append(all, errs.New(errs.Invalid, "a command, user or directory contains a NUL byte"))
	}
	return errors.Join(all...)
}

// Phase is what a build is doing.
type Phase string

// The phases, in their order.
const (
	PhaseSource    Phase = "source"    // finding the image
	PhaseLayers    Phase = "layers"    // reading it
	PhaseRoot      Phase = "root"      // writing the root image
	PhaseKernel    Phase = "kernel"    // kernel and initramfs
	PhaseFinish    Phase = "finish"    // Options.Finish
	PhaseCommitted Phase = "committed" // the template is there
)

// Step is progress of a build. Done and Total count bytes of the current layer; Total is negative when it is not known.
type Step struct {
	Phase       Phase
	Note        string // what exactly, for people; may be empty
	Layer       int    // from 1
	Layers      int
	Done, Total int64
}

// Build makes a template and puts it in the store in place of what had its name. progress, which may be nil, is called often and
// must be quick. When Build fails or ctx ends nothing of it stays, and what had the name before is untouched.
func Build(ctx context.Context, o Options, progress func(Step)) (t Template, err error) {
	if progress == nil {
		progress = func(Step) {}
	}
	if o.Store == nil {
		return Template{}, errNoStore
	}
	if err := o.Check(); err != nil {
		return Template{}, err
	}
	if o.Agent == "" {
		return Template{}, errs.New(errs.Invalid, "no agent was given")
	}
	o = o.withDefaults()
	n, err := ParseName(o.Name)
	if err != nil {
		return Template{}, err
	}
	if err := o.Store.checkAliases(n, o.Aliases); err != nil {
		return Template{}, err
	}
	// Everything that can be wrong with the kernel is said before the first byte of an image is fetched.
	progress(Step{Phase: PhaseSource})
	kernel, err := FindKernel(o.Kernel, o.Modules)
	if err != nil {
		return Template{}, err
	}
	// Before the lock: what a dead builder of this very name has left is swept too.
	if err := o.Store.Sweep(); err != nil {
		return Template{}, err
	}
	unlock, err := o.Store.tryLock(n.dir())
	if err != nil {
		return Template{}, err
	}
	defer unlock()
	dir, err := o.Store.tempDir(n)
	if err != nil {
		return Template{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	// The machine's process has a user of its own and must reach the files.
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // what is in it has modes of its own
		return Template{}, fmt.Errorf("open build directory: %w", err)
	}

	m := Manifest{
		Version: manifestVersion, Name: n.Base(), Tag: n.Tag, Build: newBuildID(), Created: time.Now().UTC().Truncate(time.Second),
		Source: o.From, CPUs: o.CPUs, MemoryMiB: o.MemoryMiB, DiskMiB: o.DiskMiB, Rates: o.Rates, Aliases: o.Aliases, StartCmd: o.StartCmd, ReadyCmd: o.ReadyCmd,
		KernelVersion: kernel.Version,
	}
	if err := makeRoot(ctx, o, dir, &m, progress); err != nil {
		return Template{}, err
	}
	progress(Step{Phase: PhaseKernel})
	if err := makeBoot(ctx, o, kernel, dir, &m); err != nil {
		return Template{}, err
	}
	if o.Finish != nil {
		progress(Step{Phase: PhaseFinish})
		if err := o.Finish(ctx, dir, &m); err != nil {
			return Template{}, fmt.Errorf("finish template %s: %w", n, err)
		}
	}
	if err := ctx.Err(); err != nil {
		return Template{}, fmt.Errorf("build template %s: %w", n, err)
	}
	if err := o.Store.commit(n, dir, m); err != nil {
		return Template{}, err
	}
	progress(Step{Phase: PhaseCommitted})
	return Template{Manifest: m, Dir: o.Store.path(n)}, nil
}

func newBuildID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// makeRoot merges the source and writes the root image.
func makeRoot(ctx context.Context, o Options, dir string, m *Manifest, progress func(Step)) error {
	src, err := openSource(ctx, o.From, dir, o.Limits, func(text string) { progress(Step{Phase: PhaseSource, Note: text}) })
	if err != nil {
		return err
	}
	defer src.Close()
	s, err := newSpool(dir)
	if err != nil {
		return err
	}
	defer s.Close()
	f, err := flatten(ctx, src, s, o.Limits, progress)
	if err != nil {
		return err
	}
	if src.made != 0 {
		f.tree.clamp(f.tree.newestBefore(src.made))
	}
	if !o.Newest.IsZero() {
		f.tree.clamp(o.Newest.Unix())
	}
	progress(Step{Phase: PhaseRoot})
	if err := writeRoot(filepath.Join(dir, rootName), f.tree, s); err != nil {
		return err
	}
	if m.Root, err = describe(ctx, dir, rootName); err != nil {
		return err
	}
	m.SourceDigest = src.digest
	m.Config = src.config
	if o.User != "" {
		m.User = o.User
	}
	if o.Workdir != "" {
		m.Workdir = o.Workdir
	}
	m.Env = mergeEnv(m.Env, o.Env)
	return nil
}

func flatten(ctx context.Context, src *source, s *spool, limits Limits, progress func(Step)) (*flattener, error) {
	f := newFlattener(s, limits)
	if src.dir != "" {
		progress(Step{Phase: PhaseLayers, Layer: 1, Layers: 1, Total: -1})
		return f, f.applyDirectory(ctx, src.dir)
	}
	for i, l := range src.layers {
		step := Step{Phase: PhaseLayers, Layer: i + 1, Layers: len(src.layers), Total: l.size}
		progress(step)
		err := f.apply(ctx, i, l, func(n int64) {
			step.Done = n
			progress(step)
		})
		if err != nil {
			return nil, err
		}
	}
	return f, nil
}

func writeRoot(file string, t *tree, s *spool) error {
	p, err := planErofs(t.root.inode)
	if err != nil {
		return fmt.Errorf("lay out root image: %w", err)
	}
	if err := s.checkRoom(int64(p.blocks) * erofsBlock); err != nil {
		return fmt.Errorf("make root image: %w", err)
	}
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("make root image: %w", err)
	}
	defer f.Close()
	if err := p.write(f, s); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("write root image: %w", err)
	}
	return nil
}

// makeBoot adds kernel and initramfs.
func makeBoot(ctx context.Context, o Options, k Kernel, dir string, m *Manifest) error {
	if err := copyFile(filepath.Join(dir, kernelName), k.Image); err != nil {
		return fmt.Errorf("copy kernel: %w", err)
	}
	if err := WriteInitramfs(filepath.Join(dir, initramfsName), o.Agent, k); err != nil {
		return err
	}
	var err error
	if m.Kernel, err = describe(ctx, dir, kernelName); err != nil {
		return err
	}
	m.Initramfs, err = describe(ctx, dir, initramfsName)
	return err
}

// WriteInitramfs makes a guest's initramfs: the agent as init, and the modules of k that a guest needs.
func WriteInitramfs(file, agent string, k Kernel) error {
	program, err := os.ReadFile(agent)
	if err != nil {
		return fmt.Errorf("read agent: %w", err)
	}
	if !strings.HasPrefix(string(program), "\x7fELF") {
		return errs.New(errs.Invalid, "the agent %q is not a program", clip(agent))
	}
	modules, err := guestModulesOf(k)
	if err != nil {
		return fmt.Errorf("modules of kernel %s: %w", k.Version, err)
	}
	return writeInitramfs(file, initFiles(program, modules))
}

// mergeEnv lays variables over those of the image, which keep their order.
func mergeEnv(base []string, over map[string]string) []string {
	var out []string
	for _, kv := range base {
		key, _, ok := strings.Cut(kv, "=")
		if _, replaced := over[key]; ok && !replaced {
			out = append(out, kv)
		}
	}
	var added []string
	for key, value := range over {
		added = append(added, key+"="+value)
	}
	slices.Sort(added)
	return append(out, added...)
}
