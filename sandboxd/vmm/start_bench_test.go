//go:build linux

package vmm_test

import (
	"os"
	"sync"
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

// BenchmarkStart20 starts twenty at once; ns/op is until the last of them runs.
func BenchmarkStart20(b *testing.B) {
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
	var boxes []*vmmtest.Box
	for range 20 {
		boxes = append(boxes, h.NewBox(b))
	}
	b.ResetTimer()
	for range b.N {
		vms := make([]*vmm.VM, len(boxes))
		var all sync.WaitGroup
		for i, box := range boxes {
			all.Go(func() {
				vm, err := l.Start(b.Context(), box.Spec)
				if err != nil {
					b.Error(err)
					return
				}
				vms[i] = vm
			})
		}
		all.Wait()
		b.StopTimer()
		for _, vm := range vms {
			if vm == nil {
				b.FailNow()
			}
			if err := vm.Kill(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
	}
}
