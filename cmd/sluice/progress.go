package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/sandboxd/image"
)

// progressPause is how often a line that moves is written again.
const progressPause = 100 * time.Millisecond

// progress shows how far a build is: on a terminal one line that moves, and elsewhere a line for each stage.
type progress struct {
	out   io.Writer
	name  string // of the template
	width int    // of the terminal; zero is no terminal

	mu    sync.Mutex // a build may tell from several goroutines
	stage string
	moved time.Time
	open  bool // a line is on the terminal that is not ended
}

func newProgress(f *os.File, name string) *progress {
	p := &progress{out: f, name: name}
	if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
		p.width = max(int(size.Col), 20)
	}
	return p
}

// report shows a step.
func (p *progress) report(s image.Step) {
	p.mu.Lock()
	defer p.mu.Unlock()
	stage, amount := describeStep(s)
	if stage == "" || p.width == 0 && stage == p.stage {
		return
	}
	now := time.Now()
	if stage == p.stage && now.Sub(p.moved) < progressPause {
		return
	}
	p.stage, p.moved = stage, now
	line := "template " + p.name + ": " + stage
	if p.width == 0 {
		fmt.Fprintln(p.out, line)
		return
	}
	fmt.Fprint(p.out, "\r\x1b[K", cut(line+amount, p.width-1))
	p.open = true
}

// end takes the moving line away.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open {
		fmt.Fprint(p.out, "\r\x1b[K")
		p.open = false
	}
}

// describeStep says what a build is doing, and how much of that is done.
func describeStep(s image.Step) (stage, amount string) {
	switch s.Phase {
	case image.PhaseSource:
		stage = "finding the image"
	case image.PhaseLayers:
		stage = "reading the image"
		if s.Layers > 1 {
			stage = fmt.Sprintf("reading layer %d of %d", s.Layer, s.Layers)
		}
		const mib = 1 << 20
		switch {
		case s.Total > 0:
			amount = fmt.Sprintf(", %d of %d MiB", s.Done/mib, (s.Total+mib-1)/mib)
		case s.Done > 0:
			amount = fmt.Sprintf(", %d MiB", s.Done/mib)
		}
	case image.PhaseRoot:
		stage = "writing the root image"
	case image.PhaseKernel:
		stage = "adding kernel and initramfs"
	case image.PhaseFinish:
		stage = "booting it once"
	}
	if s.Note != "" {
		stage = s.Note
	}
	return strings.Map(printable, stage), amount
}

// printable keeps what an image or a program says from steering the terminal.
func printable(r rune) rune {
	if r < ' ' || r >= 0x7f && r < 0xa0 || r == utf8.RuneError {
		return '?'
	}
	return r
}

// cut shortens a line to so many characters.
func cut(line string, width int) string {
	if utf8.RuneCountInString(line) <= width {
		return line
	}
	runes := []rune(line)
	return string(runes[:width-1]) + "…"
}
