package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/sandboxd/image"
)

// The default template is made where there is none, and only there.
func TestDefaultTemplateIsMadeOnce(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	machine := MachineOptions{Hypervisor: filepath.Join(dir, "nothing"), DefaultTemplate: "docker://registry.invalid/image"}
	makeIt := func() error { return MakeDefaultTemplate(t.Context(), machine, state, zap.NewNop(), nil) }
	if err := makeIt(); err == nil || !strings.Contains(err.Error(), machine.DefaultTemplate) || !strings.Contains(err.Error(), "cloud-hypervisor") {
		t.Errorf("a default template without a hypervisor = %v, want to hear of both", err)
	}

	elf := make([]byte, 64)
	copy(elf, "\x7fELF\x02\x01")
	elf[18] = 0x3e // x86-64
	for _, name := range []string{"vmlinux", "agent"} {
		if err := os.WriteFile(filepath.Join(dir, name), elf, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	store, err := OpenTemplates(state)
	if err != nil {
		t.Fatal(err)
	}
	tmpl, err := image.Build(t.Context(), image.Options{
		Store: store, Name: baseTemplate, From: "dir:" + dir, Agent: filepath.Join(dir, "agent"), Kernel: filepath.Join(dir, "vmlinux"),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := makeIt(); err != nil {
		t.Errorf("a default template that is there already = %v", err)
	}
	if err := os.Truncate(tmpl.RootPath(), 1); err != nil {
		t.Fatal(err)
	}
	if err := makeIt(); err == nil || !strings.Contains(err.Error(), "build it again") {
		t.Errorf("a damaged default template = %v, want it to be said", err)
	}
}
