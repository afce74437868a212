package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The VM's disks, in the order in which the node attaches them.
const (
	rootDevice = "/dev/vda" // the template's root, which all of its sandboxes share
	dataDevice = "/dev/vdb" // this sandbox's own
)

// Where they are mounted in the initramfs. Once the new root is in place nobody can name these any more.
const (
	rootDir = "/sluice/root"
	dataDir = "/sluice/disk"
	newRoot = "/sluice/new"
)

// Directories of the data disk.
const (
	upperDir = dataDir + "/upper"
	workDir  = dataDir + "/work"
	stateDir = dataDir + "/sluice" // what the agent was told; the root file system does not show it
)

// mount is one step of the plan.
type mount struct {
	source, target, kind string
	flags                uintptr
	data                 string
	optional             bool // a kernel may not have it
}

// earlyMounts are what modules and disks are looked for in.
var earlyMounts = []mount{
	{source: "proc", target: "/proc", kind: "proc", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	{source: "sysfs", target: "/sys", kind: "sysfs", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	{source: "devtmpfs", target: "/dev", kind: "devtmpfs", flags: unix.MS_NOSUID, data: "mode=0755"},
}

// rootMounts make the root file system: what the template has, under what this sandbox wrote. Renaming a directory of the template works
// as on any disk, which package managers count on.
var rootMounts = []mount{
	{source: rootDevice, target: rootDir, kind: "erofs", flags: unix.MS_RDONLY},
	{source: dataDevice, target: dataDir, kind: "ext4", flags: unix.MS_NOATIME},
	{source: "root", target: newRoot, kind: "overlay", data: "lowerdir=" + rootDir + ",upperdir=" + upperDir + ",workdir=" + workDir + ",redirect_dir=on"},
}

// lateMounts are the rest of what a distribution's init mounts, seen from the new root.
var lateMounts = []mount{
	{source: "devpts", target: "/dev/pts", kind: "devpts", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "gid=5,mode=0620,ptmxmode=0666"},
	{source: "tmpfs", target: "/dev/shm", kind: "tmpfs", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=1777"},
	{source: "mqueue", target: "/dev/mqueue", kind: "mqueue", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, optional: true},
	{source: "tmpfs", target: "/run", kind: "tmpfs", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=0755"},
	{
		source: "cgroup2", target: "/sys/fs/cgroup", kind: "cgroup2", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC,
		data: "nsdelegate", optional: true,
	},
}

func (m mount) apply() error {
	// The target may be there, or be in a file system that makes it by itself.
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", m.target, err)
	}
	if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s (%s) on %s: %w", m.source, m.kind, m.target, err)
	}
	return nil
}

// enterRoot puts the root file system together and makes it the root of this process and of all that come from it. It returns the
// directory for the agent's own state, which then has no name.
func enterRoot(log *slog.Logger) (state *os.File, err error) {
	for _, device := range []string{rootDevice, dataDevice} {
		err := await(device, func() error { _, err := os.Stat(device); return err })
		if err != nil {
			return nil, err
		}
	}
	for _, m := range rootMounts[:2] {
		if err := m.apply(); err != nil {
			return nil, err
		}
	}
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{upperDir, 0o755}, {workDir, 0o700}, {stateDir, 0o700}} {
		if err := os.Mkdir(d.path, d.mode); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("prepare disk: %w", err)
		}
	}
	if err := rootMounts[2].apply(); err != nil {
		return nil, err
	}
	if state, err = os.Open(stateDir); err != nil {
		return nil, fmt.Errorf("prepare disk: %w", err)
	}
	if err := moveRoot(); err != nil {
		state.Close()
		return nil, err
	}
	for _, m := range lateMounts {
		switch err := m.apply(); {
		case err != nil && m.optional:
			log.Warn("not mounted", "error", err)
		case err != nil:
			state.Close()
			return nil, err
		}
	}
	return state, nil
}

// moveRoot takes the early mounts along and lays the new root over the initramfs, which cannot be unmounted.
func moveRoot() error {
	for _, m := range earlyMounts {
		target := filepath.Join(newRoot, m.target)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", m.target, err)
		}
		if err := unix.Mount(m.target, target, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", m.target, err)
		}
	}
	if err := os.Chdir(newRoot); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := errors.Join(unix.Chroot("."), os.Chdir("/")); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	return nil
}

// furnishRoot adds what programs count on and images leave out, or leave to an init.
func furnishRoot() error {
	var all []error
	for name, to := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(to, "/dev/"+name); err != nil && !errors.Is(err, os.ErrExist) {
			all = append(all, err)
		}
	}
	for path, mode := range map[string]os.FileMode{"/tmp": 0o777 | os.ModeSticky, "/run/lock": 0o777 | os.ModeSticky, "/etc": 0o755, "/root": 0o700} {
		err := os.Mkdir(path, mode)
		switch {
		case err == nil:
			err = os.Chmod(path, mode) // whatever the umask
		case errors.Is(err, os.ErrExist):
			err = nil
		}
		all = append(all, err)
	}
	return errors.Join(all...)
}
