package namespace

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/cgroup"
)

func goldenSpec() Spec {
	return Spec{
		ID: "i0123", Dir: "/var/lib/sluice/sandboxes/i0123", NetNS: "/run/netns/sl7", UIDBase: 1 << 20, Hostname: "box",
		Limits: Limits{MemoryMiB: 512, CPUs: 2}, Resolv: []string{"10.12.0.0"},
	}
}

func TestPlanGolden(t *testing.T) {
	cfg := Config{GuestdPath: "/usr/lib/sluice/guestd", StateDir: "/var/lib/sluice"}
	host := view{dir: "/var/lib/sluice/view-1", programs: []string{"/usr", "/lib64"}, over: "/var/lib/sluice/over-1", idmap: true}
	v1 := cgroup.Host{Base: map[string]string{"memory": "/cg/memory/own", "pids": "/cg/pids/own", "cpu": "/cg/cpu/own"}}
	v2 := cgroup.Host{Base: map[string]string{"memory": "/cg/own", "pids": "/cg/own", "cpu": "/cg/own"}, Unified: true}
	spec := goldenSpec()
	text := func(cfg Config, spec Spec, v view, h cgroup.Host) string {
		cg := h.Plan(spec.cgroupName(), spec.Limits)
		s := compile(cfg, spec, v, cg).String()
		for _, f := range cg.Files {
			s += "limit " + f[0] + " = " + f[1] + "\n"
		}
		return s
	}
	golden(t, "plan-host", text(cfg, spec, host, v1))

	template := spec
	template.Template = "/srv/images/base"
	golden(t, "plan-template", text(cfg, template, view{dir: template.Template}, v2))

	rootless, own := cfg, spec
	rootless.Rootless, own.NetNS, own.UIDBase = true, "", 0
	golden(t, "plan-rootless", text(rootless, own, host, cgroup.Host{}))
}

// Whoever fills every file system in memory leaves some to run in: there is nobody to kill for what they hold.
func TestTmpfsLeavesMemory(t *testing.T) {
	for _, memory := range []int{64, 512, 8192} {
		spec := goldenSpec()
		spec.Limits.MemoryMiB = memory
		total := 0
		for _, op := range compile(Config{GuestdPath: "/g"}, spec, view{dir: "/v"}, cgroup.Plan{}).Setup {
			var size int
			if op.FS != "tmpfs" {
				continue
			}
			if n, err := fmt.Sscanf(op.Data, "size=%dm", &size); n != 1 || size < 1 {
				t.Errorf("%s: %v", op, err)
			}
			total += size
		}
		if total == 0 || total > memory*3/4 {
			t.Errorf("tmpfs of %d MiB with a memory of %d", total, memory)
		}
	}
}

func TestSpecIsChecked(t *testing.T) {
	if err := goldenSpec().validate(false); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*Spec){
		"no id":              func(s *Spec) { s.ID = "" },
		"id climbs":          func(s *Spec) { s.ID = "../x" },
		"relative directory": func(s *Spec) { s.Dir = "x" },
		"dirty directory":    func(s *Spec) { s.Dir = "/a/../b" },
		"root":               func(s *Spec) { s.Dir = "/" },
		"long directory":     func(s *Spec) { s.Dir = "/" + strings.Repeat("x", 100) },
		"no netns":           func(s *Spec) { s.NetNS = "" },
		"host's own ids":     func(s *Spec) { s.UIDBase = 0 },
		"ids overflow":       func(s *Spec) { s.UIDBase = 1<<32 - 10 },
		"negative memory":    func(s *Spec) { s.Limits.MemoryMiB = -1 },
		"host name":          func(s *Spec) { s.Hostname = "a\nb" },
		"name server":        func(s *Spec) { s.Resolv = []string{"1.1.1.1\noptions x"} },
	} {
		spec := goldenSpec()
		edit(&spec)
		if err := spec.validate(false); errs.CodeOf(err) != errs.Invalid {
			t.Errorf("%s: %v, want Invalid", name, err)
		}
	}
	if err := goldenSpec().validate(true); errs.CodeOf(err) != errs.Invalid {
		t.Errorf("rootless with a network namespace: %v, want Invalid", err)
	}
}

func FuzzParseProc(f *testing.F) {
	f.Add("0: 2 0 10000 1 1 5 /x\n", "/x")
	f.Fuzz(func(t *testing.T, text, path string) {
		for _, inode := range parseUnixSockets(strings.NewReader(text), path) {
			if !strings.Contains(text, inode) {
				t.Errorf("inode %q is not in the text", inode)
			}
		}
	})
}
