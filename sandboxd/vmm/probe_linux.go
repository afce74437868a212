package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"

	"golang.org/x/sys/unix"
)

// Probe runs the hypervisor to ask for its version, and refuses one that is too old.
func Probe(ctx context.Context, binary string) (Version, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "--version")
	cmd.Env = []string{}
	cmd.WaitDelay = time.Second
	out := limitedBuffer{max: 4096}
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		return Version{}, &errs.Error{Code: errs.Unavailable, Msg: "cloud-hypervisor does not run", Err: fmt.Errorf("%s --version: %w", binary, err)}
	}
	v, err := ParseVersion(string(out.b))
	if err != nil {
		return Version{}, err
	}
	if v.Less(MinVersion) {
		return v, errs.New(errs.Unavailable, "cloud-hypervisor is %v, and %v or newer is needed", v, MinVersion)
	}
	return v, nil
}

type limitedBuffer struct {
	b   []byte
	max int
}

func (l *limitedBuffer) Write(p []byte) (int, error) {
	l.b = append(l.b, p[:min(len(p), l.max-len(l.b))]...)
	return len(p), nil
}

// Finding is one thing that a VM needs of its host, and whether it is there.
type Finding struct {
	What   string // "cloud-hypervisor", "/dev/kvm" and so on
	OK     bool
	Fatal  bool   // when not OK: no VM can run. Else something is slower or less fenced.
	Detail string // what was found
	Remedy string // when not OK: what to do
}

// String is a line for a person.
func (f Finding) String() string {
	if f.OK {
		return fmt.Sprintf("ok       %s: %s", f.What, f.Detail)
	}
	mark := "warning "
	if f.Fatal {
		mark = "missing "
	}
	return fmt.Sprintf("%s %s: %s; %s", mark, f.What, f.Detail, f.Remedy)
}

// Usable tells whether nothing fatal was found.
func Usable(findings []Finding) bool {
	for _, f := range findings {
		if f.Fatal && !f.OK {
			return false
		}
	}
	return true
}

// hostView is what Findings asks of the host; tests have others.
type hostView struct {
	euid      int
	find      func() (string, error)
	probe     func(path string) (Version, error)
	device    func(path string, major uint32) error // exists, is that device, and opens for reading and writing
	kvmAPI    func() (int, error)
	landlock  int
	userfault bool
}

// Findings is the hypervisor's part of `sluice doctor`: everything that VMs need on this host, each with its remedy. binary is as in
// Find. There is no vhost in it: network and vsock are served by the hypervisor itself.
func Findings(ctx context.Context, binary string) []Finding {
	return findings(hostView{
		euid:      os.Geteuid(),
		find:      func() (string, error) { return Find(binary) },
		probe:     func(path string) (Version, error) { return Probe(ctx, path) },
		device:    openDevice,
		kvmAPI:    kvmAPI,
		landlock:  landlockABI(),
		userfault: userfaultMinor() != 0,
	})
}

func findings(h hostView) (list []Finding) {
	add := func(what string, fatal bool, err error, detail, remedy string) {
		f := Finding{What: what, OK: err == nil, Fatal: fatal, Detail: detail}
		if err != nil {
			f.Detail, f.Remedy = err.Error(), remedy
		}
		list = append(list, f)
	}
	var err error
	if h.euid != 0 {
		err = fmt.Errorf("this process has user id %d", h.euid)
	}
	add("root", true, err, "network, cgroups and users of VMs can be set up", "run the node as root; the VMs themselves run as users of their own")

	path, err := h.find()
	if cause, ok := errors.AsType[*exec.Error](err); ok {
		// The finding's name and its remedy say the rest, but for a file that was named.
		if err = cause.Err; strings.Contains(cause.Name, "/") && !strings.Contains(err.Error(), cause.Name) {
			err = fmt.Errorf("%s: %w", cause.Name, err)
		}
	}
	add("cloud-hypervisor", true, err, path, fmt.Sprintf("install Cloud Hypervisor %v or newer on PATH, or name it in SLUICE_CLOUD_HYPERVISOR", MinVersion))
	if err == nil {
		v, err := h.probe(path)
		add("cloud-hypervisor version", true, err, v.String(), fmt.Sprintf("install Cloud Hypervisor %v or newer, built for this machine", MinVersion))
	}

	err = h.device("/dev/kvm", miscMajor)
	detail := ""
	if err == nil {
		var version int
		version, err = h.kvmAPI()
		detail = fmt.Sprintf("API version %d", version)
		if err == nil && version != 12 {
			err = fmt.Errorf("API version %d, want 12", version)
		}
	}
	remedy := "load the module (modprobe kvm-intel or kvm-amd), switch virtualization on in the firmware, or, on a VM, switch nested virtualization on for it"
	switch {
	case errors.Is(err, os.ErrPermission):
		remedy = "let this process open it: in a container, pass --device /dev/kvm"
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		remedy = "the device has no driver behind it: load kvm-intel or kvm-amd, which need virtualization switched on in the firmware"
	case errors.Is(err, errNoSave):
		remedy = "use a host whose /dev/kvm is Linux's own (kvm-intel or kvm-amd)"
	}
	add("/dev/kvm", true, err, detail, remedy)

	err = h.device("/dev/net/tun", miscMajor)
	add("/dev/net/tun", true, err, "taps can be made", "load the module (modprobe tun); in a container, pass --device /dev/net/tun")

	err = nil
	if !h.userfault {
		err = errors.New("there is none")
	}
	add("/dev/userfaultfd", false, err, "snapshots are restored on demand", "use Linux 6.1 or newer with CONFIG_USERFAULTFD; until then a restore copies all memory first")

	err = nil
	if h.landlock < landlockWanted {
		err = fmt.Errorf("the kernel has version %d of it, and %d is needed", h.landlock, landlockWanted)
	}
	add("landlock", false, err, fmt.Sprintf("version %d", h.landlock),
		"use Linux 6.2 or newer with landlock among its security modules (lsm=landlock,…); without it the VM's mount namespace is the fence around its files")
	return list
}

func openDevice(path string, major uint32) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || unix.Major(st.Rdev) != major {
		return fmt.Errorf("%s is not the device", path)
	}
	return nil
}

// errNoSave is about drivers that stand in for the kernel's own, as some hosts of containers have them: their guests can run, but not be saved.
var errNoSave = errors.New("it cannot save a processor, so there are no snapshots")

// kvmAPI asks the driver for its version, and for a VM: a device whose processor cannot run guests fails only at the latter. What a
// hypervisor saves of a processor it asks for by name.
func kvmAPI() (int, error) {
	const getAPIVersion, createVM, checkExtension, nestedState = 0xae00, 0xae01, 0xae03, 157
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	version, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), getAPIVersion, 0)
	if errno != 0 {
		return 0, errno
	}
	vm, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), createVM, 0)
	if errno != 0 {
		return 0, fmt.Errorf("make a VM: %w", errno)
	}
	if err := unix.Close(int(vm)); err != nil {
		return 0, err
	}
	if size, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), checkExtension, nestedState); runtime.GOARCH == "amd64" && (errno != 0 || size == 0) {
		return 0, errNoSave
	}
	return int(version), nil
}

// landlockWanted is the version that the hypervisor insists on.
const landlockWanted = 3

func landlockABI() int {
	const version = 1 // LANDLOCK_CREATE_RULESET_VERSION
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, version)
	if errno != 0 {
		return 0
	}
	return int(v)
}

// userfaultMinor is the number of /dev/userfaultfd, which differs from boot to boot, or zero.
func userfaultMinor() uint32 {
	var st unix.Stat_t
	if unix.Stat("/dev/userfaultfd", &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || unix.Major(st.Rdev) != miscMajor {
		return 0
	}
	return unix.Minor(st.Rdev)
}
