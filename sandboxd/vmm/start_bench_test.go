//go:build linux

package vmm_test

import (
	"os"
	"testing"

	"github.com/sluice-edge/sluice/sandboxd/vmm"
	"github.com/sluice-edge/sluice/sandboxd/vmm/vmmtest"
)

// BenchmarkStart is our own part of a start: the tree, the namespaces and the process, up to its first instruction.
func BenchmarkStart(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	l, err := vmm.New(vmm.Options{Binary: self})
	if err != nil {
		b.Fatal(err)
	}
	h := vmmtest.Host{Launcher: l, Kernel: self, Initramfs: self}
	box := h.NewBox(b)
	b.ResetTimer()
	for range b.N {
		vm, err := l.Start(b.Context(), box.Spec)
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := vm.Kill(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
