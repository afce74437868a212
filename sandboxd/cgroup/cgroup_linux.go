package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/pidfd"
)

// Host is where on this host a sandbox's cgroups go. A sandbox's cgroup is a child of the daemon's own: whatever bounds the daemon
// bounds its sandboxes too.
type Host struct {
	Base    map[string]string // controller -> directory
	Unified bool              // version 2: all directories are the same one
}

// supervisorName is the leaf that the daemon moves to, because version 2 wants no process in a cgroup that has children
// with controllers. systemd's DelegateSubgroup= may have put it there already.
const supervisorName = "supervisor"

// Controllers are those that limits want.
var Controllers = []string{"memory", "pids", "cpu"}

// Plan is the cgroups of one sandbox: directories to make, then files to write.
type Plan struct {
	Dirs        []string
	Files       [][2]string
	Controllers []string
}

// Has tells whether a controller takes part.
func (p Plan) Has(controller string) bool { return slices.Contains(p.Controllers, controller) }

// Plan is pure.
func (h Host) Plan(name string, l Limits) Plan {
	var p Plan
	for _, c := range Controllers {
		base, ok := h.Base[c]
		if !ok {
			continue
		}
		dir := filepath.Join(base, name)
		p.Controllers = append(p.Controllers, c)
		if !slices.Contains(p.Dirs, dir) {
			p.Dirs = append(p.Dirs, dir)
		}
		file := func(name, value string) { p.Files = append(p.Files, [2]string{filepath.Join(dir, name), value}) }
		bytes := strconv.FormatInt(int64(l.MemoryMiB)<<20, 10)
		switch {
		case c == "pids":
			file("pids.max", strconv.Itoa(l.Processes()))
		case c == "memory" && l.MemoryMiB > 0 && h.Unified:
			file("memory.max", bytes)
			file("memory.swap.max", "0")
		case c == "memory" && l.MemoryMiB > 0:
			file("memory.limit_in_bytes", bytes)
			file("memory.memsw.limit_in_bytes", bytes) // memory and swap together; after the other, which may not exceed it
		case c == "cpu" && l.CPUs > 0 && h.Unified:
			file("cpu.max", fmt.Sprintf("%d 100000", l.CPUs*100000))
		case c == "cpu" && l.CPUs > 0:
			file("cpu.cfs_period_us", "100000")
			file("cpu.cfs_quota_us", strconv.Itoa(l.CPUs*100000))
		}
	}
	return p
}

// Make makes the cgroups, or sets the limits of those that exist.
func (p Plan) Make() error {
	for _, d := range p.Dirs {
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	for _, f := range p.Files {
		err := writeFile(f[0], f[1])
		if optional(f[0]) && errors.Is(err, os.ErrNotExist) {
			continue // a kernel that does not account for swap
		}
		if err != nil {
			return fmt.Errorf("limit cgroup to %s: %w", f[1], err)
		}
	}
	return nil
}

func optional(name string) bool {
	base := filepath.Base(name)
	return base == "memory.swap.max" || base == "memory.memsw.limit_in_bytes"
}

// Remove kills what is left inside and removes the directory. Idempotent.
func Remove(ctx context.Context, dir string) error {
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		if kerr := killAll(dir); kerr != nil {
			return fmt.Errorf("empty cgroup %s: %w", dir, kerr)
		}
		// A killed process leaves its cgroup only when it has been torn down; there is nothing to wait on in version 1.
		if err := sleep(ctx, 2*time.Millisecond); err != nil {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
}

func killAll(dir string) error {
	err := writeFile(filepath.Join(dir, "cgroup.kill"), "1")
	if err == nil {
		return nil
	}
	// A frozen process does not die of a signal until it is thawed.
	_ = writeFile(filepath.Join(dir, "freezer.state"), "THAWED")
	pids, err := members(dir)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		pidfd.KillIf(pid, func() bool {
			now, err := members(dir)
			return err == nil && slices.Contains(now, pid)
		})
	}
	return nil
}

func members(dir string) ([]int, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 { // zero is a process of another pid namespace
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Probe finds the directories in which this process may make cgroups with limits. Every reason why a controller cannot be had is
// in why.
func Probe() (h Host, why []string) {
	h.Base = map[string]string{}
	own, mounts, err := readHierarchies()
	if err != nil {
		return h, []string{err.Error()}
	}
	for _, c := range Controllers {
		m, ok := mounts[c]
		if !ok {
			continue
		}
		dir, err := m.dir(own[c])
		if err == nil {
			err = try(dir, c)
		}
		if err != nil {
			why = append(why, fmt.Sprintf("%s: %v", c, err))
			continue
		}
		h.Base[c] = dir
	}
	if len(h.Base) > 0 || len(why) > 0 {
		return h, why
	}
	m, ok := mounts[""]
	if !ok {
		return h, []string{"no cgroup file system is mounted"}
	}
	h.Unified = true
	dir, err := m.dir(own[""])
	if err == nil {
		h.Base, err = prepareUnified(dir)
	}
	if err != nil && os.Geteuid() == 0 {
		// Other processes live beside us, as in a terminal's scope. The root may have children and processes both.
		h.Base, err = prepareUnified(m.point)
	}
	if err != nil {
		return Host{}, []string{err.Error()}
	}
	for _, c := range Controllers {
		if _, ok := h.Base[c]; !ok {
			why = append(why, c+": not delegated to this cgroup")
		}
	}
	return h, why
}

// Limitations says, for each controller that is missing, why that is and what happens instead. why is what Probe returned.
func (h Host) Limitations(why []string, instead map[string]string) (out []string) {
	for _, c := range Controllers {
		if _, ok := h.Base[c]; ok {
			continue
		}
		reason := "no such controller"
		for _, w := range why {
			if strings.HasPrefix(w, c+":") || !strings.Contains(w, ":") || len(why) == 1 {
				reason = w
			}
		}
		out = append(out, fmt.Sprintf("no %s cgroup (%s): %s", c, reason, instead[c]))
	}
	return out
}

// prepareUnified makes dir, or the parent of a supervisor leaf, hand its controllers to children.
func prepareUnified(dir string) (map[string]string, error) {
	if filepath.Base(dir) == supervisorName {
		dir = filepath.Dir(dir)
	}
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return nil, err
	}
	base := map[string]string{}
	for _, c := range strings.Fields(string(b)) {
		if !slices.Contains(Controllers, c) {
			continue
		}
		err := writeFile(filepath.Join(dir, "cgroup.subtree_control"), "+"+c)
		if errors.Is(err, unix.EBUSY) {
			err = leaveForSupervisor(dir, c)
		}
		if err != nil {
			return nil, fmt.Errorf("hand %s to children: %w", c, err)
		}
		if err := try(dir, c); err != nil {
			return nil, err
		}
		base[c] = dir
	}
	return base, nil
}

// leaveForSupervisor moves this process to a leaf, and only it: others in the cgroup are not ours to move. If they are in
// the way, we come back.
func leaveForSupervisor(dir, controller string) error {
	leaf := filepath.Join(dir, supervisorName)
	if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	err := writeFile(filepath.Join(leaf, "cgroup.procs"), "0")
	if err == nil {
		err = writeFile(filepath.Join(dir, "cgroup.subtree_control"), "+"+controller)
	}
	if err == nil {
		return nil
	}
	return errors.Join(err, writeFile(filepath.Join(dir, "cgroup.procs"), "0"), unix.Rmdir(leaf))
}

// tryCgroup makes a cgroup and removes it again: permission bits alone do not tell.
func try(dir, controller string) error {
	probe := filepath.Join(dir, fmt.Sprintf("sluice-probe-%d", os.Getpid()))
	if err := os.Mkdir(probe, 0o755); err != nil {
		return err
	}
	defer func() { _ = unix.Rmdir(probe) }() // it is empty
	file := map[string]string{"memory": "memory.limit_in_bytes", "pids": "pids.max", "cpu": "cpu.cfs_quota_us"}[controller]
	unified := map[string]string{"memory": "memory.max", "pids": "pids.max", "cpu": "cpu.max"}[controller]
	for _, f := range []string{file, unified} {
		if unix.Access(filepath.Join(probe, f), unix.W_OK) == nil {
			return nil
		}
	}
	return fmt.Errorf("no %s in a new cgroup", file)
}

// mount is one mounted hierarchy. root is the part of it that the mount shows.
type mount struct{ root, point string }

func (m mount) dir(own string) (string, error) {
	rel, err := filepath.Rel(m.root, own)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", fmt.Errorf("own cgroup %s is outside of what is mounted at %s", own, m.point)
	}
	return filepath.Join(m.point, rel), nil
}

func readHierarchies() (own map[string]string, mounts map[string]mount, err error) {
	self, err := os.Open("/proc/self/cgroup")
	if err != nil {
		return nil, nil, err
	}
	defer self.Close()
	info, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, nil, err
	}
	defer info.Close()
	own, err = parseSelf(self)
	if err != nil {
		return nil, nil, err
	}
	mounts, err = parseMounts(info)
	return own, mounts, err
}

// parseSelf reads /proc/self/cgroup: controller -> path; the empty controller is version 2.
func parseSelf(r io.Reader) (map[string]string, error) {
	own := map[string]string{}
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		parts := strings.SplitN(sc.Text(), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for _, c := range strings.Split(parts[1], ",") {
			own[c] = parts[2]
		}
	}
	return own, sc.Err()
}

// parseMounts reads /proc/self/mountinfo: controller -> its mount; the empty controller is version 2.
func parseMounts(r io.Reader) (map[string]mount, error) {
	mounts := map[string]mount{}
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 {
			continue
		}
		m := mount{root: left[3], point: left[4]}
		switch right[0] {
		case "cgroup2":
			mounts[""] = m
		case "cgroup":
			for _, opt := range strings.Split(right[2], ",") {
				if slices.Contains(Controllers, opt) {
					mounts[opt] = m
				}
			}
		}
	}
	return mounts, sc.Err()
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

func writeFile(name, content string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(content)
	return err
}
