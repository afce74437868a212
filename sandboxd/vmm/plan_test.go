package vmm

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/internal/errs"
)

var update = flag.Bool("update", false, "rewrite golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; run with -update and read the diff. Got:\n%s", file, got)
	}
}

func goldenSpec() Spec {
	return Spec{
		ID: "i1", Dir: "/var/lib/sluice/vm/i1", NetNS: "/run/netns/i1", UID: 70001,
		Cgroups: []string{"/sys/fs/cgroup/sluice/i1"}, Kernel: "/var/lib/sluice/templates/base/kernel",
		Initramfs: "/var/lib/sluice/templates/base/initramfs", Root: "/var/lib/sluice/templates/base/root.img",
		Disk: "/var/lib/sluice/vm/i1/disk.img",
	}
}

func TestPlan(t *testing.T) {
	m := machine{
		binary: "/usr/bin/cloud-hypervisor", userfault: 126,
		libraries: []string{"/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"},
	}
	golden(t, "plan-boot", compile(m, goldenSpec()).String())
	s := goldenSpec()
	s.Snapshot = "/var/lib/sluice/snapshots/base"
	golden(t, "plan-restore", compile(machine{binary: "/usr/bin/cloud-hypervisor"}, s).String())
	bare := Spec{ID: "i2", Dir: "/v/i2", NetNS: "/run/netns/i2", UID: 70002, Kernel: "/v/kernel"}
	golden(t, "plan-bare", compile(machine{binary: "/usr/bin/cloud-hypervisor"}, bare).String())
}

func TestConfig(t *testing.T) {
	show := func(name string, spec Spec, shape Shape) {
		t.Helper()
		c, err := Config(spec, shape)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.MarshalIndent(map[string]any{"vm.create": c, "vm.add-net": netConfig(shape)}, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, string(b)+"\n")
	}
	full := Shape{
		CPUs: 2, MemoryMiB: 512, Cmdline: "console=ttyS0 panic=-1", MAC: "02:53:4c:00:00:02", Landlock: true,
		Rates: Rates{NetBytes: 125 << 20, NetPackets: 100_000, DiskBytes: 100 << 20, DiskOps: 5000},
	}
	show("config-full", goldenSpec(), full)
	show("config-bare", Spec{Kernel: "/k"}, Shape{CPUs: 1, MemoryMiB: 128, Rates: Rates{NetPackets: 10}})
}

func TestShapesThatAreRefused(t *testing.T) {
	good := Shape{CPUs: 1, MemoryMiB: 128}
	check := func(name string, edit func(*Shape)) {
		t.Helper()
		s := good
		edit(&s)
		if _, err := Config(Spec{Kernel: "/k"}, s); errs.CodeOf(err) != errs.Invalid {
			t.Errorf("%s: %v, want Invalid", name, err)
		}
	}
	if _, err := Config(Spec{Kernel: "/k"}, good); err != nil {
		t.Errorf("a good shape: %v", err)
	}
	check("no CPU", func(s *Shape) { s.CPUs = 0 })
	check("too many CPUs", func(s *Shape) { s.CPUs = 255 })
	check("no memory", func(s *Shape) { s.MemoryMiB = 0 })
	check("absurd memory", func(s *Shape) { s.MemoryMiB = 1 << 40 })
	check("negative rate", func(s *Shape) { s.Rates.DiskOps = -1 })
	check("line end", func(s *Shape) { s.Cmdline = "a\nb" })
	check("MAC", func(s *Shape) { s.MAC = "tap0" })
	check("group MAC", func(s *Shape) { s.MAC = "01:00:5e:00:00:01" })
}

func TestSpecsThatAreRefused(t *testing.T) {
	check := func(name string, edit func(*Spec)) {
		t.Helper()
		s := goldenSpec()
		edit(&s)
		if err := s.validate(); errs.CodeOf(err) != errs.Invalid {
			t.Errorf("%s: %v, want Invalid", name, err)
		}
	}
	if err := goldenSpec().validate(); err != nil {
		t.Errorf("a good spec: %v", err)
	}
	check("id", func(s *Spec) { s.ID = "../x" })
	check("no id", func(s *Spec) { s.ID = "" })
	check("relative directory", func(s *Spec) { s.Dir = "vm/i1" })
	check("unclean directory", func(s *Spec) { s.Dir = "/vm/../i1" })
	check("root", func(s *Spec) { s.Dir = "/" })
	check("long directory", func(s *Spec) { s.Dir = "/" + strings.Repeat("x", 100) })
	check("root's id", func(s *Spec) { s.UID = 0 })
	check("an account's id", func(s *Spec) { s.UID = 1000 })
	check("nobody's id", func(s *Spec) { s.UID = 1<<32 - 1 })
	check("no netns", func(s *Spec) { s.NetNS = "" })
	check("no kernel", func(s *Spec) { s.Kernel = "" })
	check("relative kernel", func(s *Spec) { s.Kernel = "kernel" })
	check("relative cgroup", func(s *Spec) { s.Cgroups = []string{"x"} })
}

func TestParseVersion(t *testing.T) {
	check := func(text string, want Version) {
		t.Helper()
		if got, err := ParseVersion(text); err != nil || got != want {
			t.Errorf("ParseVersion(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
	check("cloud-hypervisor v53.0.0\nMigration Protocol Versions: 0\n", Version{53, 0, 0})
	check("cloud-hypervisor v52.1", Version{52, 1, 0})
	check("cloud-hypervisor v51.2.3-15-gabcdef0-dirty\n", Version{51, 2, 3})
	for _, text := range []string{"", "cloud-hypervisor", "qemu v53.0.0\n", "cloud-hypervisor vX.Y\n", "cloud-hypervisor v999999.0\n", "cloud-hypervisor v5\n"} {
		if v, err := ParseVersion(text); err == nil {
			t.Errorf("ParseVersion(%q) = %v, want an error", text, v)
		}
	}
	for _, v := range []Version{{51, 9, 9}, {0, 0, 0}} {
		if !v.Less(MinVersion) {
			t.Errorf("%v is new enough", v)
		}
	}
	for _, v := range []Version{{52, 0, 0}, {52, 0, 1}, {52, 1, 0}, {53, 0, 0}} {
		if v.Less(MinVersion) {
			t.Errorf("%v is too old", v)
		}
	}
}

func FuzzParseVersion(f *testing.F) {
	f.Add("cloud-hypervisor v53.0.0\n")
	f.Add("cloud-hypervisor v52.1-dirty")
	f.Fuzz(func(t *testing.T, text string) {
		v, err := ParseVersion(text)
		if err != nil {
			return
		}
		if again, err := ParseVersion("cloud-hypervisor " + v.String()); err != nil || again != v {
			t.Errorf("ParseVersion(%q) = %v, which reads as %v, %v", text, v, again, err)
		}
	})
}

func FuzzErrorChain(f *testing.F) {
	f.Add([]byte(`["Internal Server Error","Error from API","no"]`))
	f.Add([]byte("<html>"))
	f.Add([]byte{0xff, 0, '\n'})
	f.Fuzz(func(t *testing.T, body []byte) {
		text := (&APIError{Call: "vm.boot", Status: 500, Chain: errorChain(body)}).Error()
		if len(text) > maxErrLines*(3*maxErrText+10)+100 {
			t.Errorf("an error of %d bytes", len(text))
		}
		if strings.ContainsAny(text, "\n\r\x00\x1b") {
			t.Errorf("the error is not one clean line: %q", text)
		}
	})
}
