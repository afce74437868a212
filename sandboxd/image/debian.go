package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// DebianPackages are what a root image gets that names none: what programs of the SDKs expect to find.
var DebianPackages = []string{
	"bash", "ca-certificates", "curl", "git", "iproute2", "nodejs", "procps", "python-is-python3", "python3", "python3-pip", "python3-venv", "sudo",
}

// Debian is a root file system from Debian's own packages, by mmdebstrap.
type Debian struct {
	Suite    string
	Packages []string // besides the essential ones and apt; nil means DebianPackages
}

var (
	suitePattern   = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	packagePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]{1,99}$`)
)

// parseDebian reads SUITE and, after a '#', a list of packages.
func parseDebian(suite, packages string) (Debian, error) {
	d := Debian{Suite: suite}
	if packages != "" {
		d.Packages = strings.Split(packages, ",")
	}
	return d, d.validate()
}

func (d Debian) validate() error {
	if !suitePattern.MatchString(d.Suite) {
		return errs.New(errs.Invalid, "%q is no suite of Debian: want a name such as bookworm", clip(d.Suite))
	}
	for _, p := range d.Packages {
		if !packagePattern.MatchString(p) {
			return errs.New(errs.Invalid, "%q is no name of a package", clip(p))
		}
	}
	return nil
}

// args are mmdebstrap's. Documentation and translations stay away, those of packages that are installed later too.
func (d Debian) args() []string {
	packages := d.Packages
	if packages == nil {
		packages = DebianPackages
	}
	return []string{
		"--variant=apt", "--format=tar", "--include=" + strings.Join(packages, ","),
		`--aptopt=Acquire::Languages "none"`, "--dpkgopt=force-unsafe-io", // a root that is half-made is thrown away
		"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright",
		`--customize-hook=rm -f "$1/etc/hostname" "$1/etc/resolv.conf"`, // of this machine
		d.Suite, "-",
	}
}

// mmdebstrapGrace is how long mmdebstrap may take to clean up when it is told to end.
const mmdebstrapGrace = 20 * time.Second

// WriteTar makes the root file system and writes it as a tar archive. mmdebstrap works below temp and leaves nothing there. note, which
// may be nil, is told what it is doing.
func (d Debian) WriteTar(ctx context.Context, w io.Writer, temp string, note func(string)) error {
	if err := d.validate(); err != nil {
		return err
	}
	program, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return &errs.Error{Code: errs.Unavailable, Err: err,
			Msg: "mmdebstrap is not installed: apt-get install mmdebstrap, or name an image to take instead"}
	}
	cmd := exec.CommandContext(ctx, program, d.args()...)
	// With a time in SOURCE_DATE_EPOCH it leaves out what differs from one run to the next.
	cmd.Env = append(os.Environ(), "TMPDIR="+temp, fmt.Sprintf("SOURCE_DATE_EPOCH=%d", time.Now().Unix()))
	cmd.Dir = "/"
	cmd.Stdout = w
	said := &debianLog{note: note}
	cmd.Stderr = said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us, and we tell it
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = mmdebstrapGrace
	err = cmd.Run()
	if ctx.Err() != nil {
		return fmt.Errorf("run mmdebstrap: %w", ctx.Err())
	}
	if err != nil {
		return &errs.Error{Code: errs.Unavailable, Msg: fmt.Sprintf("mmdebstrap made no root of Debian %s: %s", d.Suite, said.complaint()), Err: err}
	}
	return nil
}

// debianLog takes what mmdebstrap says: lines that begin with "I: " are progress, and the last others are kept.
type debianLog struct {
	note func(string)
	line []byte
	kept []string
}

const maxDebianLine = 4 << 10

func (l *debianLog) Write(b []byte) (int, error) {
	for _, c := range b {
		if c != '\n' && c != '\r' {
			if len(l.line) < maxDebianLine {
				l.line = append(l.line, c)
			}
			continue
		}
		l.end(string(bytes.TrimSpace(l.line)))
		l.line = l.line[:0]
	}
	return len(b), nil
}

// debianSteps begin what is worth telling; the rest is mmdebstrap's own housekeeping.
var debianSteps = regexp.MustCompile(`^(running apt-get|downloading|extracting|installing|cleaning|creating) `)

func (l *debianLog) end(line string) {
	if text, ok := strings.CutPrefix(line, "I: "); ok {
		if l.note != nil && debianSteps.MatchString(text) {
			l.note(strings.TrimRight(text, "."))
		}
		return
	}
	if line == "" || line == "done" || strings.HasPrefix(line, "W: ") {
		return
	}
	if l.kept = append(l.kept, line); len(l.kept) > 8 {
		l.kept = l.kept[1:]
	}
}

// complaint is what went wrong: its errors, or the last that it said.
func (l *debianLog) complaint() string {
	l.end(string(bytes.TrimSpace(l.line)))
	l.line = nil
	var complaints []string
	for _, line := range l.kept {
		if text, ok := strings.CutPrefix(line, "E: "); ok {
			complaints = append(complaints, text)
		}
	}
	if complaints == nil {
		complaints = l.kept
	}
	if complaints == nil {
		return "it does not say why"
	}
	return strings.ToValidUTF8(strings.Join(complaints, "; "), "?")
}

// openDebian is the source of a root that is made now.
func openDebian(ctx context.Context, suite, packages, temp string, note func(string)) (_ *source, err error) {
	d, err := parseDebian(suite, packages)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(temp, "debian-*")
	if err != nil {
		return nil, fmt.Errorf("make file for mmdebstrap: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, fmt.Errorf("make file for mmdebstrap: %w", err)
	}
	began := time.Now().Unix()
	if err := d.WriteTar(ctx, f, temp, note); err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, fmt.Errorf("read what mmdebstrap wrote: %w", err)
	}
	return &source{
		layers: []layer{{size: size, open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bufio.NewReaderSize(io.NewSectionReader(f, 0, size), 256<<10)), nil
		}}},
		made:  began,
		close: f.Close,
	}, nil
}
