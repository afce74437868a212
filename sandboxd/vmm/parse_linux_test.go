package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func FuzzReadConnected(f *testing.F) {
	f.Add([]byte("OK 1073741824\nhello"))
	f.Add([]byte("OK \n"))
	f.Add([]byte("NO\n"))
	f.Add(bytes.Repeat([]byte("x"), 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		err := readConnected(r)
		read := b[:len(b)-r.Len()]
		if len(read) > maxConnected {
			t.Errorf("%d bytes were read", len(read))
		}
		// Whatever it was, not a byte of the guest's was taken.
		if i := bytes.IndexByte(read, '\n'); i >= 0 && i != len(read)-1 {
			t.Errorf("it read on after the line: %q", read)
		}
		if err == nil && (!bytes.HasPrefix(read, []byte("OK ")) || !bytes.HasSuffix(read, []byte("\n"))) {
			t.Errorf("%q is taken for a yes", read)
		}
	})
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(`{"version":1,"hypervisor":"v53.0.0","files":[{"name":"config.json","size":1,"crc32c":"00000000"}]}`))
	f.Add([]byte(`{"version":1,"files":[{"name":"../x"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseManifest(b)
		if err != nil {
			return
		}
		for _, file := range m.Files {
			if filepath.Join("/snap", file.Name) != "/snap/"+file.Name || file.Name == "." || file.Name == ".." || file.Size < 0 {
				t.Errorf("a manifest names %q with %d bytes", file.Name, file.Size)
			}
		}
	})
}

func FuzzProc(f *testing.F) {
	f.Add("Name:\tx\nUid:\t70001\t70001\t70001\t70001\n")
	f.Fuzz(func(t *testing.T, status string) {
		if uid, ok := parseUID([]byte(status)); ok && !strings.Contains(status, "\nUid:") {
			t.Errorf("uid %d out of nothing", uid)
		}
	})
}

func TestParseProc(t *testing.T) {
	if uid, ok := parseUID([]byte("Name:\tx\nUid:\t70001\t1\t1\t1\n")); uid != 70001 || !ok {
		t.Errorf("uid = %d, %v", uid, ok)
	}
	if _, ok := parseUID([]byte("Name:\tUid:\nGid:\t1\n")); ok {
		t.Error("a name is taken for a user")
	}
}

func TestConnectGuest(t *testing.T) {
	check := func(name, answer string, want error) {
		t.Helper()
		ours, theirs := net.Pipe()
		defer ours.Close()
		go func() {
			b := make([]byte, 64)
			n, _ := theirs.Read(b)
			if string(b[:n]) == "CONNECT 1024\n" {
				_, _ = io.WriteString(theirs, answer)
			}
			theirs.Close()
		}()
		err := connectGuest(context.Background(), ours, 1024)
		if !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	check("yes", "OK 12\n", nil)
	check("hung up", "", unix.ECONNREFUSED)
	check("half", "OK", unix.ECONNREFUSED)

	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	go func() { _, _ = theirs.Read(make([]byte, 64)) }()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for range 3 {
			_, _ = theirs.Read(make([]byte, 64))
		}
	}()
	cancel()
	if err := connectGuest(ctx, ours, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("a guest that never answers: %v, want the context's error", err)
	}
}

// TestNoLinkLeadsOut: what a hypervisor leaves in its directories must not lead us to other files and sockets of the host.
func TestNoLinkLeadsOut(t *testing.T) {
	dir := t.TempDir()
	spec := Spec{Dir: filepath.Join(dir, "vm")}
	if err := os.MkdirAll(spec.runDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	serial := filepath.Join(spec.runDir(), serialName)
	if err := os.Symlink(secret, serial); err != nil {
		t.Fatal(err)
	}
	vm := &VM{spec: spec}
	if b, err := vm.Serial(100); err == nil {
		t.Errorf("Serial follows a link: %q", b)
	}
	if err := boundLog(spec.Dir, serialFile, 0); err == nil {
		t.Error("boundLog follows a link")
	}
	if err := os.Remove(serial); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(serial, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.Serial(100); err == nil {
		t.Error("Serial reads a pipe")
	}

	other := filepath.Join(dir, "other.sock")
	l, err := net.Listen("unix", other)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sock := filepath.Join(spec.runDir(), vsockName)
	if err := os.Symlink(other, sock); err != nil {
		t.Fatal(err)
	}
	if c, err := vm.DialGuest(context.Background(), 1); err == nil {
		c.Close()
		t.Error("DialGuest follows a link")
	}
	if err := os.Remove(sock); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(sock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.DialGuest(context.Background(), 1); err == nil {
		t.Error("DialGuest connects to a plain file")
	}
}

// TestLogIsNoLinkToATemplate: beside the directories of a hypervisor are links to what all sandboxes of a template share, and a link of its own
// in place of its console would have the node free the blocks of that.
func TestLogIsNoLinkToATemplate(t *testing.T) {
	spec := Spec{Dir: t.TempDir()}
	if err := os.Mkdir(spec.runDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	shared := filepath.Join(spec.Dir, "root.erofs")
	whole := bytes.Repeat([]byte("shared by all"), 100_000)
	if err := os.WriteFile(shared, whole, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../root.erofs", filepath.Join(spec.runDir(), serialName)); err != nil {
		t.Fatal(err)
	}
	if err := boundLog(spec.Dir, serialFile, 64<<10); err == nil {
		t.Error("boundLog follows a link that stays beneath the VM's directory")
	}
	if got, err := os.ReadFile(shared); err != nil || !bytes.Equal(got, whole) {
		t.Errorf("the file that all share is changed, %v", err)
	}
	if b, err := spec.Serial(10); err == nil {
		t.Errorf("Serial follows a link: %q", b)
	}
}

func TestBoundLog(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "log")
	line := []byte(strings.Repeat("x", 99) + "\n")
	var whole []byte
	for range 5000 {
		whole = append(whole, line...)
	}
	whole = append(whole, "the last line\n"...)
	if err := os.WriteFile(name, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	const keep = 64 << 10
	if err := boundLog(dir, "log", keep); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > 2*keep {
		t.Errorf("the log still takes %d bytes", st.Blocks*512)
	}
	if st.Size != int64(len(whole)) {
		t.Errorf("the log's size is %d: its writer would leave a gap", st.Size)
	}
	tail, err := readTail(dir, "log", keep/2)
	if err != nil || !bytes.Equal(tail, whole[len(whole)-keep/2:]) {
		t.Errorf("the end of the log is lost: %v", err)
	}
	if all, err := readTail(dir, "log", 1<<30); err != nil || len(all) < keep || len(all) > keep+4096 || all[0] == 0 {
		t.Errorf("of the log %d bytes are left, %v", len(all), err)
	}
	if got := lastLines([]byte("a\r\n\n\x1b[31mb\x1b[0m\n c \n"), 2); len(got) != 2 || got[0] != "[31mb [0m" || got[1] != "c" {
		t.Errorf("lastLines = %q", got)
	}
	// A small one is left alone.
	if err := os.WriteFile(name, line, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := boundLog(dir, "log", keep); err != nil {
		t.Fatal(err)
	}
	if got, err := readTail(dir, "log", keep); err != nil || !bytes.Equal(got, line) {
		t.Errorf("a small log: %q, %v", got, err)
	}
}

func TestFindings(t *testing.T) {
	good := hostView{
		find:      func() (string, error) { return "/usr/bin/cloud-hypervisor", nil },
		probe:     func(string) (Version, error) { return Version{Major: 53}, nil },
		device:    func(string, uint32) error { return nil },
		kvmAPI:    func() (int, error) { return 12, nil },
		landlock:  4,
		userfault: true,
	}
	var text strings.Builder
	show := func(name string, usable bool, edit func(*hostView)) {
		t.Helper()
		h := good
		edit(&h)
		list := findings(h)
		fmt.Fprintf(&text, "%s:\n", name)
		for _, f := range list {
			if !f.OK || name == "all well" {
				fmt.Fprintf(&text, "  %s\n", f)
			}
			if !f.OK && f.Remedy == "" {
				t.Errorf("%s: %s has no remedy", name, f.What)
			}
		}
		if Usable(list) != usable {
			t.Errorf("%s: usable is %v, want %v", name, !usable, usable)
		}
	}
	device := func(path string, err error) func(*hostView) {
		return func(h *hostView) {
			h.device = func(p string, _ uint32) error {
				if p == path {
					return fmt.Errorf("open %s: %w", p, err)
				}
				return nil
			}
		}
	}
	show("all well", true, func(*hostView) {})
	show("not root", false, func(h *hostView) { h.euid = 1000 })
	show("no binary", false, func(h *hostView) { h.find = func() (string, error) { return Find("/nonexistent") } })
	show("a directory for a binary", false, func(h *hostView) { h.find = func() (string, error) { return Find("/proc/self/") } })
	show("old binary", false, func(h *hostView) {
		h.probe = func(string) (Version, error) {
			return Version{}, errors.New("cloud-hypervisor is v40.0.0, and v52.0.0 or newer is needed")
		}
	})
	show("no kvm", false, device("/dev/kvm", unix.ENOENT))
	show("kvm is not ours", false, device("/dev/kvm", unix.EACCES))
	show("kvm without a driver", false, device("/dev/kvm", unix.ENXIO))
	show("kvm makes no VM", false, func(h *hostView) {
		h.kvmAPI = func() (int, error) { return 0, fmt.Errorf("make a VM: %w", unix.EBUSY) }
	})
	show("kvm saves no processor", false, func(h *hostView) { h.kvmAPI = func() (int, error) { return 0, errNoSave } })
	show("no tun", false, device("/dev/net/tun", unix.ENOENT))
	show("old kernel", true, func(h *hostView) { h.landlock, h.userfault = 2, false })
	golden(t, "findings", text.String())
}

func TestLibraries(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := libraries(self); err != nil {
		t.Errorf("of this test: %v", err)
	}
	libs, err := libraries("/bin/sh")
	if err != nil {
		t.Skipf("no shell to look at: %v", err)
	}
	if len(libs) < 2 {
		t.Errorf("libraries of a shell = %q, want its loader and more", libs)
	}
	for _, l := range libs {
		if _, err := os.Stat(l); err != nil {
			t.Error(err)
		}
	}
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := libraries(text); err == nil {
		t.Error("a script is taken for a program")
	}
}
