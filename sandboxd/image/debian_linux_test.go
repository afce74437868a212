package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// fakeDebian puts a program called mmdebstrap on the PATH that runs script instead, with the tar archive to give in $ARCHIVE.
func fakeDebian(t *testing.T, archive []byte, script string) {
	t.Helper()
	dir := t.TempDir()
	put(t, filepath.Join(dir, "root.tar"), archive)
	program := filepath.Join(dir, "mmdebstrap")
	text := fmt.Sprintf("#!/bin/sh\nARCHIVE=%s\necho \"I: automatically chosen mode: root\" >&2\necho \"I: running apt-get update...\" >&2\n%s\n", filepath.Join(dir, "root.tar"), script)
	if err := os.WriteFile(program, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestDebianSource(t *testing.T) {
	archive := tarOf(t, file{name: "etc/hello", body: "hello"})
	args := filepath.Join(t.TempDir(), "args")
	fakeDebian(t, archive, `printf '%s\n' "$@" >`+args+`; [ -d "$TMPDIR" ] && [ -n "$SOURCE_DATE_EPOCH" ] || exit 9; cat "$ARCHIVE"`)
	s := mustStore(t)
	o := smallOptions(t, s, "debian")
	o.From = "mmdebstrap:trixie#hello,world+1"
	var notes []string
	tmpl, err := Build(t.Context(), o, func(step Step) {
		if step.Note != "" {
			notes = append(notes, string(step.Phase)+" "+step.Note)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"source running apt-get update"}; !slices.Equal(notes, want) {
		t.Errorf("notes = %q, want %q", notes, want)
	}
	got := strings.Fields(string(mustRead(t, args)))
	if !slices.Contains(got, "--include=hello,world+1") || !slices.Contains(got, "trixie") || got[len(got)-1] != "-" {
		t.Errorf("mmdebstrap got %q", got)
	}
	if err := tmpl.Verify(t.Context()); err != nil {
		t.Error(err)
	}
}

// What a run of mmdebstrap itself has written is as old as it, so two runs differ in nothing but these times.
func TestTwoRunsOfDebianGiveOneImage(t *testing.T) {
	of := func(made time.Time) string {
		files := []file{{name: "bin/sh", body: "shell"}, {name: "var/log/dpkg.log", body: "log"}}
		old := tarOf(t, files[:1]...)
		s := mustSpool(t)
		tr := mustMerge(t, s, old, tarOf(t, files[1:]...))
		tr.root.inode.children["var"].inode.mtime = made.Unix() + 3
		tr.clamp(tr.newestBefore(made.Unix()))
		return digestOf(mustRead(t, rootImage(t, tr, s)))
	}
	if a, b := of(someTime.Add(time.Hour)), of(someTime.Add(48*time.Hour)); a != b {
		t.Errorf("the images of two runs are %s and %s", a, b)
	}
}

func TestDebianThatFails(t *testing.T) {
	archive := tarOf(t, file{name: "etc/hello", body: "hello"})
	build := func(ctx context.Context, from string) ([]string, error) {
		s := mustStore(t)
		o := smallOptions(t, s, "debian")
		o.From = from
		_, err := Build(ctx, o, nil)
		return leftovers(t, s), err
	}
	check := func(ctx context.Context, from string, code errs.Code, why string) {
		t.Helper()
		left, err := build(ctx, from)
		if errs.CodeOf(err) != code || !strings.Contains(err.Error(), why) {
			t.Errorf("build from %s = %v, want %s and %q", from, err, code, why)
		}
		if len(left) > 0 {
			t.Errorf("build from %s leaves %q", from, left)
		}
	}
	fakeDebian(t, archive, `touch "$TMPDIR/left"; printf 'reading\nE: no such suite: %s\n' here >&2; head -c 100 "$ARCHIVE"; exit 1`)
	check(t.Context(), "mmdebstrap:bookworm", errs.Unavailable, "no such suite: here")
	fakeDebian(t, archive, `exit 1`)
	check(t.Context(), "mmdebstrap:bookworm", errs.Unavailable, "does not say why")
	fakeDebian(t, archive, `echo well; exit 0`)
	check(t.Context(), "mmdebstrap:bookworm", errs.Invalid, "cut off")
	for _, from := range []string{"mmdebstrap:", "mmdebstrap:--help", "mmdebstrap:bookworm#a/b", "mmdebstrap:bookworm#good,-o", "mmdebstrap:Book worm"} {
		check(t.Context(), from, errs.Invalid, "")
	}

	// It is told to end, and has its time to clean up.
	cleaned := filepath.Join(t.TempDir(), "cleaned")
	started := filepath.Join(t.TempDir(), "started")
	if err := exec.Command("mkfifo", started).Run(); err != nil {
		t.Fatal(err)
	}
	fakeDebian(t, archive, `trap 'touch `+cleaned+`; exit 1' TERM; echo >`+started+`; while :; do sleep 0.01; done`)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, _ = os.ReadFile(started) // blocks until it runs
		cancel()
	}()
	left, err := build(ctx, "mmdebstrap:bookworm")
	if !errors.Is(err, context.Canceled) || len(left) > 0 {
		t.Errorf("a canceled build = %v and leaves %q", err, left)
	}
	if _, err := os.Stat(cleaned); err != nil {
		t.Errorf("it did not get its time to clean up: %v", err)
	}

	t.Setenv("PATH", t.TempDir())
	check(t.Context(), "mmdebstrap:bookworm", errs.Unavailable, "apt-get install mmdebstrap")
}
