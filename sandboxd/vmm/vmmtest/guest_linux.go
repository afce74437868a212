package vmmtest

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// runGuest is the first process of the real test guest. It does not return.
func runGuest() {
	fmt.Println("GUEST-FAILED", guestMain())
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// guestMain returns only when something is wrong.
func guestMain() error {
	for _, m := range [][2]string{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		_ = os.Mkdir(m[0], 0o755)
		if err := unix.Mount(m[1], m[0], m[1], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[0], err)
		}
	}
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(order)) {
		f, err := os.Open(filepath.Join("/modules", name))
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
			fmt.Println("load", name, err)
		}
		f.Close()
	}
	l, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("vsock: %w", err)
	}
	if err := unix.Bind(l, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: GuestPort}); err != nil {
		return fmt.Errorf("bind vsock: %w", err)
	}
	if err := unix.Listen(l, 16); err != nil {
		return fmt.Errorf("listen on vsock: %w", err)
	}
	fmt.Println("READY")
	go tellUp()
	g := &guest{hw: realHardware{}}
	steps := make(chan func())
	go func() {
		for fn := range steps {
			fn()
		}
	}()
	for {
		fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if err != nil {
			continue // a restore resets what was there
		}
		go func() {
			c := os.NewFile(uintptr(fd), "vsock")
			defer c.Close()
			g.serve(c, func(fn func()) {
				done := make(chan struct{})
				steps <- func() { fn(); close(done) }
				<-done
			})
		}()
	}
}

func tellUp() {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: UpPort}) == nil {
		_, _ = unix.Write(fd, []byte("up\n"))
	}
}

type realHardware struct{}

func (realHardware) say(text string) { fmt.Println(text) }

// device finds the disk by the way it can be used: the private one is the one that can be written.
func (realHardware) device() (string, error) {
	disks, err := filepath.Glob("/sys/block/vd*")
	if err != nil {
		return "", err
	}
	for _, d := range disks {
		if ro, err := os.ReadFile(d + "/ro"); err == nil && strings.TrimSpace(string(ro)) == "0" {
			return "/dev/" + filepath.Base(d), nil
		}
	}
	return "", os.ErrNotExist
}

func (h realHardware) disk() (io.ReaderAt, error) {
	name, err := h.device()
	if err != nil {
		return nil, err
	}
	// Past the page cache, which a restored guest would answer from.
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return directReader{os.NewFile(uintptr(fd), name)}, nil
}

// directReader reads into memory that is aligned as O_DIRECT demands.
type directReader struct{ f *os.File }

func (r directReader) ReadAt(b []byte, off int64) (int, error) {
	defer r.f.Close()
	buf := aligned(4096)
	n, err := r.f.ReadAt(buf, off)
	return copy(b, buf[:n]), err
}

func aligned(n int) []byte {
	b := make([]byte, 2*n)
	skip := n - int(uintptr(unsafe.Pointer(&b[0]))%uintptr(n))
	return b[skip : skip+n : skip+n]
}

func (h realHardware) writeDisk(b []byte, off int64) error {
	name, err := h.device()
	if err != nil {
		return err
	}
	d, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	if _, err := d.WriteAt(b, off); err != nil {
		return err
	}
	return d.Sync()
}

func (realHardware) mac() string {
	list, err := net.Interfaces()
	if err != nil {
		return ""
	}
	for _, i := range list {
		if i.Flags&net.FlagLoopback == 0 {
			return i.HardwareAddr.String()
		}
	}
	return ""
}

func (realHardware) off() { _ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) }

func (realHardware) crash() {
	_ = os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
}
