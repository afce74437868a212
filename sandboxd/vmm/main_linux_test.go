package vmm_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
	"github.com/sluice-edge/sluice/sandboxd/vmm/vmmtest"

	"go.uber.org/zap/zaptest"
)

func TestMain(m *testing.M) {
	vmmtest.Main(&vmmtest.Guest{Serve: map[uint32]func(net.Conn){echoPort: func(c net.Conn) { _, _ = io.Copy(c, c) }},
		Save: func() []byte { return []byte("saved") }, Load: func(b []byte) { fmt.Fprintf(os.Stderr, "loaded %s\n", b) }})
	if spec := os.Getenv(starterVariable); spec != "" {
		startAndDie(spec)
	}
	code := m.Run()
	lab.CloseNested()
	os.Exit(code)
}

// echoPort is served by this test's guest beside the suite's.
const echoPort = 2000

func TestFake(t *testing.T) { vmmtest.Run(t, fakeHost) }

// TestReal needs cloud-hypervisor, and KVM here or in a nested host.
func TestReal(t *testing.T) {
	if !lab.InKVM(t) {
		return
	}
	vmmtest.Run(t, realHost)
	binary, err := lab.FindVMM()
	if err != nil {
		t.Fatal(err)
	}
	if v, err := vmm.Probe(t.Context(), binary); err != nil || v.Less(vmm.MinVersion) {
		t.Errorf("Probe = %v, %v", v, err)
	}
	found := vmm.Findings(t.Context(), binary)
	for _, f := range found {
		t.Log(f)
	}
	if !vmm.Usable(found) {
		t.Error("VMs run here, and the findings say that they cannot")
	}
}

func fakeHost(t *testing.T) vmmtest.Host {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l, err := vmm.New(vmm.Options{Binary: self, Log: zaptest.NewLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	h := vmmtest.Host{Launcher: l, Kernel: filepath.Join(dir, "kernel"), Initramfs: filepath.Join(dir, "initramfs")}
	if err := errors.Join(vmmtest.WriteKernel(h.Kernel, vmmtest.Faults{}), os.WriteFile(h.Initramfs, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	return h
}

// realHost boots the kernel of the nested host with this very test as its first process.
func realHost(t *testing.T) vmmtest.Host {
	t.Helper()
	binary, err := lab.FindVMM()
	if err != nil {
		t.Skip(err)
	}
	l, err := vmm.New(vmm.Options{
		Binary: binary, Log: zaptest.NewLogger(t),
		CallTimeout: time.Minute, SlowTimeout: 3 * time.Minute, // an emulated processor, on a busy machine
	})
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := lab.FindKernel()
	if err != nil {
		t.Skip(err)
	}
	initramfs := filepath.Join(t.TempDir(), "initramfs")
	if err := writeGuest(initramfs, kernel); err != nil {
		t.Fatal(err)
	}
	return vmmtest.Host{Launcher: l, Kernel: kernel.Image, Initramfs: initramfs, Real: true}
}

func writeGuest(path string, kernel lab.Kernel) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	modules, err := kernel.ModuleFiles("virtio_pci", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport")
	if err != nil {
		return err
	}
	files := []lab.File{{Path: "/init", Mode: 0o755, Src: self}}
	libs, err := vmm.Libraries(self)
	if err != nil {
		return err
	}
	for _, l := range libs {
		files = append(files, lab.File{Path: l, Mode: 0o755, Src: l})
	}
	var order strings.Builder
	for _, m := range modules {
		order.WriteString(filepath.Base(m) + "\n")
		files = append(files, lab.File{Path: "/modules/" + filepath.Base(m), Mode: 0o644, Src: m})
	}
	files = append(files, lab.File{Path: "/modules/order", Mode: 0o644, Data: []byte(order.String())})
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	return errors.Join(lab.WriteInitramfs(w, files), w.Flush(), f.Close())
}
