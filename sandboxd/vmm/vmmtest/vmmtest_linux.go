package vmmtest

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

// Ports of the test guest's vsock: it serves on one, and tells the host on the other that it is up.
const (
	GuestPort = 1024
	UpPort    = 1025
)

// FakeVersion is what the fake says it is.
const FakeVersion = "v52.0.0"

// Guest is what the fake's guest does beside counting, for tests of what stands on VMs. Its functions run in the fake's process.
type Guest struct {
	// Serve has who answers on a vsock port. The connection stands still while the VM is paused.
	Serve map[uint32]func(net.Conn)
	// Up is called when the VM has booted, not when it is restored; dial connects to a vsock port of the host.
	Up func(dial func(port uint32) (net.Conn, error))
	// Save and Load are its memory: what Save returns is in the snapshot, and what Load gets at a restore.
	Save func() []byte
	Load func([]byte)
}

// Main becomes what this binary was started as, if that is not a test. It then does not return. g may be nil.
func Main(g *Guest) {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "--version":
		fmt.Printf("cloud-hypervisor %s\nMigration Protocol Versions: 0\n", FakeVersion)
		os.Exit(0)
	case len(os.Args) > 2 && os.Args[1] == "--api-socket":
		os.Exit(runFake(os.Args[2], g))
	case os.Getpid() == 1 && os.Args[0] == "/init":
		runGuest()
	}
}

// guest is what answers on vsock, over whatever hardware there is.
type guest struct {
	hw    hardware
	count int64
}

type hardware interface {
	say(text string)                     // on the console
	disk() (io.ReaderAt, error)          // the private disk
	writeDisk(b []byte, off int64) error // and through to it
	mac() string                         // of the network card; empty when there is none
	off()                                // power
	crash()                              // as if the kernel had panicked
}

// answer is the whole protocol: a line in, a line out.
func (g *guest) answer(line string) string {
	verb, arg, _ := strings.Cut(line, " ")
	switch verb {
	case "next":
		g.count++
		return strconv.FormatInt(g.count, 10)
	case "say":
		g.hw.say(arg)
		return "ok"
	case "write":
		b := make([]byte, 512)
		copy(b, arg)
		if err := g.hw.writeDisk(b, 0); err != nil {
			return "error " + err.Error()
		}
		return "ok"
	case "read":
		r, err := g.hw.disk()
		if err != nil {
			return "error " + err.Error()
		}
		b := make([]byte, 512)
		if _, err := r.ReadAt(b, 0); err != nil {
			return "error " + err.Error()
		}
		text, _, _ := strings.Cut(string(b), "\x00")
		return text
	case "mac":
		return g.hw.mac()
	case "off":
		g.hw.off()
	case "crash":
		g.hw.crash()
	}
	return "error unknown verb"
}

func (g *guest) serve(c io.ReadWriter, step func(func())) {
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		var reply string
		step(func() { reply = g.answer(lines.Text()) })
		if _, err := io.WriteString(c, reply+"\n"); err != nil {
			return
		}
	}
}

// Ask sends a line to the test guest on an open connection and returns the line that it answers.
func Ask(c net.Conn, line string) (string, error) {
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return "", err
	}
	var reply []byte
	var b [1]byte
	for {
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(reply), nil
		}
		reply = append(reply, b[0])
	}
}

// Cmdline boots the test guest: its console is the serial line, and a panic ends it at once.
const Cmdline = "console=ttyS0 panic=-1 quiet loglevel=4 rdinit=/init mitigations=off no-kvmapf"

// Shape is that of the suite's VMs.
func Shape() vmm.Shape {
	return vmm.Shape{
		CPUs: 1, MemoryMiB: 160, Cmdline: Cmdline, MAC: "02:53:4c:00:00:02",
		Rates: vmm.Rates{NetBytes: 10 << 20, NetPackets: 10_000, DiskBytes: 50 << 20, DiskOps: 5_000},
	}
}
