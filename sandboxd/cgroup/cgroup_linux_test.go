package cgroup

import (
	"strings"
	"testing"
)

func FuzzParse(f *testing.F) {
	f.Add("34 31 0:28 /outer /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n", "/outer/mine")
	f.Add("5:cpu,cpuacct:/a\n4:memory:/b:c\n0::/u\n", "/")
	f.Fuzz(func(t *testing.T, text, path string) {
		if m, err := parseMounts(strings.NewReader(text)); err == nil {
			for c, mount := range m {
				if dir, err := mount.dir(path); err == nil && !strings.HasPrefix(dir, mount.point) && mount.point[0] == '/' {
					t.Errorf("cgroup %q lies outside of its mount: %q", c, dir)
				}
			}
		}
		if _, err := parseSelf(strings.NewReader(text)); err != nil && len(text) < 60000 {
			t.Errorf("parseSelf: %v", err)
		}
	})
}

func TestParse(t *testing.T) {
	own, err := parseSelf(strings.NewReader("5:cpu,cpuacct:/a\n4:memory:/b:c\n0::/u\n"))
	if err != nil || own["cpu"] != "/a" || own["memory"] != "/b:c" || own[""] != "/u" {
		t.Errorf("own cgroups = %v, %v", own, err)
	}
	mounts, err := parseMounts(strings.NewReader(
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
