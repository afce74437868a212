package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/internal/daemon"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/image"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

// storedTemplate builds a template of a few bytes that nobody boots.
func storedTemplate(t *testing.T, state, name string) image.Template {
	t.Helper()
	dir := t.TempDir()
	elf := make([]byte, 64)
	copy(elf, "\x7fELF\x02\x01")
	elf[18] = 0x3e // x86-64
	for name, data := range map[string][]byte{"vmlinux": elf, "agent": elf, "root/etc/hello": []byte("hello")} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	store, err := daemon.OpenTemplates(state)
	if err != nil {
		t.Fatal(err)
	}
	tmpl, err := image.Build(t.Context(), image.Options{
		Store: store, Name: name, From: "dir:" + filepath.Join(dir, "root"), Agent: filepath.Join(dir, "agent"), Kernel: filepath.Join(dir, "vmlinux"),
		Aliases: []string{"other-name"},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return tmpl
}

func TestTemplateListAndRemove(t *testing.T) {
	state := t.TempDir()
	list := func(args ...string) (string, error) {
		var out bytes.Buffer
		err := runTemplateList(append([]string{"-state-dir", state}, args...), &out)
		return out.String(), err
	}
	if out, err := list("-json"); err != nil || strings.TrimSpace(out) != "[]" {
		t.Errorf("ls -json of nothing = %q, %v, want []", out, err)
	}
	missing := filepath.Join(state, "missing")
	if out, err := list("-state-dir", missing); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "-state-dir") {
		t.Errorf("ls of no directory = %q, %v", out, err)
	}
	if _, err := os.Stat(missing); err == nil {
		t.Error("ls made the directory that it was to look into")
	}
	tmpl := storedTemplate(t, state, "team/app:v1")
	out, err := list()
	if err != nil || !strings.Contains(out, "team/app:v1  other-name") || !strings.Contains(out, "512 MiB") || strings.Count(out, "\n") != 2 {
		t.Errorf("ls = %q, %v, want a heading and the template", out, err)
	}
	out, err = list("-json")
	var rows []map[string]any
	if err != nil || json.Unmarshal([]byte(out), &rows) != nil || len(rows) != 1 || rows[0]["name"] != "team/app:v1" || rows[0]["build"] != tmpl.Build {
		t.Errorf("ls -json = %q, %v", out, err)
	}

	if err := runTemplateRemove([]string{"other-name", "-state-dir", state}, io.Discard); err == nil || !strings.Contains(err.Error(), "team/app:v1") {
		t.Errorf("rm of an alias = %v, want the name of its template", err)
	}

	// A damaged one is listed, and an error.
	if err := os.Truncate(tmpl.RootPath(), 1); err != nil {
		t.Fatal(err)
	}
	out, err = list()
	if err == nil || !strings.Contains(err.Error(), "build it again") || !strings.Contains(out, "damaged") {
		t.Errorf("ls with a damaged template = %q, %v", out, err)
	}
	var removed bytes.Buffer
	if err := runTemplateRemove([]string{"team/app:v1", "-state-dir", state}, &removed); err != nil || !strings.Contains(removed.String(), "team/app:v1") {
		t.Errorf("rm = %q, %v", removed.String(), err)
	}
	if err := runTemplateRemove([]string{"team/app:v1", "-state-dir", state}, &removed); errs.CodeOf(err) != errs.NotFound || !strings.Contains(err.Error(), state) {
		t.Errorf("rm twice = %v, want that there is none in %s", err, state)
	}
}

// TestErrorsDoNotSteerTheTerminal: what an image says is part of errors, and so are a registry's words and the last ones of a guest's console.
func TestErrorsDoNotSteerTheTerminal(t *testing.T) {
	var out bytes.Buffer
	complain(&out, errors.New("boot: the console ended with:\r\n\x1b]0;owned\a\x1b[2Jhello\u202e\u009b31m\n\tbye\rsluice: done"))
	want := "sluice: boot: the console ended with:\n\ufffd]0;owned\ufffd\ufffd[2Jhello\ufffd\ufffd31m\n bye\ufffdsluice: done\n"
	if out.String() != want {
		t.Errorf("printed %q, want %q", out.String(), want)
	}
	// An image that is for another system says for which.
	dir := t.TempDir()
	index := `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:` + strings.Repeat("0", 64) +
		`","platform":{"os":"\u001b]0;owned\u0007","architecture":"any"}}]}`
	for name, text := range map[string]string{"oci-layout": `{"imageLayoutVersion":"1.0.0"}`, "index.json": index} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	store, err := daemon.OpenTemplates(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	kernel := make([]byte, 64)
	copy(kernel, "\x7fELF\x02\x01")
	kernel[18] = 0x3e // x86-64
	if err := os.WriteFile(filepath.Join(dir, "vmlinux"), kernel, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = image.Build(t.Context(), image.Options{Store: store, Name: "x", From: dir, Agent: filepath.Join(dir, "vmlinux"), Kernel: filepath.Join(dir, "vmlinux")}, nil)
	out.Reset()
	complain(&out, err)
	if text := out.String(); !strings.Contains(text, "owned") || strings.ContainsAny(text, "\x1b\a") {
		t.Errorf("printed %q", text)
	}
}

func TestTemplateArguments(t *testing.T) {
	t.Setenv("SLUICE_STATE_DIR", t.TempDir())
	for _, tt := range []struct {
		args []string
		want string // in the error
	}{
		{[]string{"template"}, "build, ls or rm"},
		{[]string{"template", "make"}, `"make"`},
		{[]string{"template", "build"}, "name of the template is missing"},
		{[]string{"template", "build", "-from", "dir:/", "app", "-hypervisor", "/nonexistent"}, "cloud-hypervisor"}, // the name need not be first
		{[]string{"template", "build", "app", "-from", "dir:/", "web"}, `"web" is too much`},
		{[]string{"template", "build", "app"}, "-from is missing"},
		{[]string{"template", "build", "a b", "-from", "dir:/"}, "invalid template name"},
		{[]string{"template", "build", "app", "-from", "dir:/", "-env", "X"}, "KEY=value"},
		{[]string{"template", "build", "app", "-from", "dir:/", "-hypervisor", "/nonexistent"}, "cloud-hypervisor"},
		// What is wrong with the command is said on a host, too, that could not build anything.
		{[]string{"template", "build", "app", "-from", "dir:/", "-hypervisor", "/nonexistent", "-memory", "1"}, "1 MiB of memory"},
		{[]string{"template", "build", "app", "-from", "dir:/", "-hypervisor", "/nonexistent", "-alias", "a b"}, `invalid alias "a b"`},
		{[]string{"template", "build", "app", "-from", "/nonexistent", "-hypervisor", "/nonexistent"}, `"/nonexistent" does not exist`},
		{[]string{"template", "rm"}, "name of the template is missing"},
		{[]string{"template", "rm", "app"}, "'app' not found"},
	} {
		if err := dispatch(t.Context(), tt.args); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("sluice %s = %v, want %q in it", strings.Join(tt.args, " "), err, tt.want)
		}
	}
	b, err := parseTemplateBuild([]string{"app", "-from", "x", "-cpu", "1", "-memory", "256", "-disk", "2048", "-env", "A=b=c", "-env", "D=", "-alias", "x,y", "-start-cmd", "serve", "-ready-cmd", "ready"})
	if err != nil || b.image.CPUs != 1 || b.image.MemoryMiB != 256 || b.image.DiskMiB != 2048 || b.image.Env["A"] != "b=c" || len(b.image.Env) != 2 ||
		len(b.image.Aliases) != 2 || b.image.StartCmd != "serve" || b.image.ReadyCmd != "ready" {
		t.Errorf("parsed %+v, %v", b, err)
	}
}

func TestInterruptedBuildSaysSo(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	terminal, err := os.Create(filepath.Join(t.TempDir(), "terminal"))
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	err = runTemplateBuild(ctx, []string{"app", "-from", "dir:/", "-state-dir", t.TempDir()}, &bytes.Buffer{}, terminal)
	if err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("a build that is interrupted = %v", err)
	}
}

func TestProgress(t *testing.T) {
	steps := []image.Step{
		{Phase: image.PhaseSource},
		{Phase: image.PhaseSource, Note: "downloading \x1b[31mpackages"},
		{Phase: image.PhaseLayers, Layer: 1, Layers: 2, Total: 10 << 20},
		{Phase: image.PhaseLayers, Layer: 1, Layers: 2, Done: 5 << 20, Total: 10 << 20},
		{Phase: image.PhaseLayers, Layer: 2, Layers: 2, Total: -1},
		{Phase: image.PhaseRoot}, {Phase: image.PhaseKernel}, {Phase: image.PhaseFinish}, {Phase: image.PhaseFinish, Note: "booting"}, {Phase: image.PhaseCommitted},
	}
	show := func(width int) string {
		var out bytes.Buffer
		p := &progress{out: &out, name: "app", width: width}
		for _, s := range steps {
			p.report(s)
		}
		p.end()
		return out.String()
	}
	want := `template app: finding the image
template app: downloading ?[31mpackages
template app: reading layer 1 of 2
template app: reading layer 2 of 2
template app: writing the root image
template app: adding kernel and initramfs
template app: booting it once
template app: booting
`
	if got := show(0); got != want {
		t.Errorf("in a file = %q, want %q", got, want)
	}
	got := show(30)
	if strings.Contains(got, "\n") || !strings.HasSuffix(got, "\r\x1b[K") {
		t.Errorf("on a terminal = %q, want one line that moves and goes", got)
	}
	for line := range strings.SplitSeq(got, "\r\x1b[K") {
		if n := len([]rune(line)); n > 29 {
			t.Errorf("line %q has %d characters, the terminal 30", line, n)
		}
	}
}

func TestDiagnosisIsPrinted(t *testing.T) {
	var out bytes.Buffer
	d := daemon.Diagnosis{
		Kind: daemon.MachineNamespace, Why: "sandboxes are namespaces", Limitations: []string{"the disk"},
		Findings: []vmm.Finding{{What: "root", OK: true, Fatal: true, Detail: "yes"}, {What: "tun", Detail: "none", Remedy: "load it"}},
	}
	if err := printDiagnosis(&out, d); err != nil {
		t.Errorf("a host that is well enough: %v", err)
	}
	want := "ok       root: yes\nwarning  tun: none\n         -> load it\nlimited  the disk\n\nsandboxes are namespaces\n"
	if out.String() != want {
		t.Errorf("printed %q, want %q", out.String(), want)
	}
	d.Findings[1].Fatal, d.Err = true, errors.New("tun is missing")
	if err := printDiagnosis(&out, d); err == nil || !strings.Contains(out.String(), "missing  tun") {
		t.Errorf("a host that lacks something = %v, %q", err, out.String())
	}
}

func TestTemplateRates(t *testing.T) {
	b, err := parseTemplateBuild([]string{"x", "-from", "dir:/x", "-state-dir", "/x", "-net-mbit", "80", "-net-packets", "3", "-disk-rate", "2", "-disk-ops", "5"})
	if err != nil {
		t.Fatal(err)
	}
	if want := (image.Rates{NetBytes: 10_000_000, NetPackets: 3, DiskBytes: 2 << 20, DiskOps: 5}); b.image.Rates != want {
		t.Errorf("rates = %+v, want %+v", b.image.Rates, want)
	}
	if _, err := parseTemplateBuild([]string{"x", "-from", "dir:/x", "-state-dir", "/x", "-net-mbit", "9223372036854775807"}); err == nil {
		t.Error("an absurd rate was taken")
	}
}
