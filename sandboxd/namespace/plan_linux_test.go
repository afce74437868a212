package namespace

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/internal/errs"
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
	v1 := cgroupHost{base: map[string]string{"memory": "/cg/memory/own", "pids": "/cg/pids/own", "cpu": "/cg/cpu/own"}}
	v2 := cgroupHost{base: map[string]string{"memory": "/cg/own", "pids": "/cg/own", "cpu": "/cg/own"}, unified: true}
	spec := goldenSpec()
	text := func(cfg Config, spec Spec, v view, h cgroupHost) string {
		cg := h.plan(spec.cgroupName(), spec.Limits)
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
	golden(t, "plan-rootless", text(rootless, own, host, cgroupHost{}))
}

// Whoever fills every file system in memory leaves some to run in: there is nobody to kill for what they hold.
func TestTmpfsLeavesMemory(t *testing.T) {
	for _, memory := range []int{64, 512, 8192} {
		spec := goldenSpec()
		spec.Limits.MemoryMiB = memory
		total := 0
		for _, op := range compile(Config{GuestdPath: "/g"}, spec, view{dir: "/v"}, cgroupPlan{}).Setup {
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
	f.Add("12 (a) b) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 777 0", "/x")
	f.Add("0: 2 0 10000 1 1 5 /x\n", "/x")
	f.Fuzz(func(t *testing.T, text, path string) {
		if n, err := parseStartTime([]byte(text)); err == nil && n != 0 && !strings.Contains(text, ")") {
			t.Errorf("a start time %d out of nothing", n)
		}
		for _, inode := range parseUnixSockets(strings.NewReader(text), path) {
			if !strings.Contains(text, inode) {
				t.Errorf("inode %q is not in the text", inode)
			}
		}
		if m, err := parseCgroupMounts(strings.NewReader(text)); err == nil {
			for c, mount := range m {
				if dir, err := mount.dir(path); err == nil && !strings.HasPrefix(dir, mount.point) && mount.point[0] == '/' {
					t.Errorf("cgroup %q lies outside of its mount: %q", c, dir)
				}
			}
		}
		if _, err := parseSelfCgroup(strings.NewReader(text)); err != nil && len(text) < 60000 {
			t.Errorf("parseSelfCgroup: %v", err)
		}
	})
}

func TestParseProc(t *testing.T) {
	if n, err := parseStartTime([]byte("12 (a) b) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 777 0")); n != 777 || err != nil {
		t.Errorf("start time = %d, %v", n, err)
	}
	own, err := parseSelfCgroup(strings.NewReader("5:cpu,cpuacct:/a\n4:memory:/b:c\n0::/u\n"))
	if err != nil || own["cpu"] != "/a" || own["memory"] != "/b:c" || own[""] != "/u" {
		t.Errorf("own cgroups = %v, %v", own, err)
	}
	mounts, err := parseCgroupMounts(strings.NewReader(
		"34 31 0:28 /outer /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"))
	if err != nil || mounts["cpu"].point != "/sys/fs/cgroup/cpu,cpuacct" || mounts[""].point != "/sys/fs/cgroup/unified" {
		t.Fatalf("mounts = %v, %v", mounts, err)
	}
	if dir, err := mounts["cpu"].dir("/outer/mine"); err != nil || dir != "/sys/fs/cgroup/cpu,cpuacct/mine" {
		t.Errorf("own directory = %q, %v", dir, err)
	}
	if dir, err := mounts["cpu"].dir("/elsewhere"); err == nil {
		t.Errorf("a cgroup outside of the mount = %q, want an error", dir)
	}
}
