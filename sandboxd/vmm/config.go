package vmm

import (
	"fmt"
	"net"
	"strings"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Shape is how big a VM is and how fast it may be. It is fixed when the VM is made; a restored VM has the shape of its snapshot.
type Shape struct {
	CPUs      int
	MemoryMiB int
	Cmdline   string // of the kernel
	MAC       string // of the guest's network card; the same in all sandboxes, like its address
	Rates     Rates

	// Landlock adds the kernel's own fence around the hypervisor's files. Findings say whether the kernel has it.
	Landlock bool
}

// Rates bound a VM per second; zero means no limit. A burst of one second's worth is let through.
type Rates struct {
	NetBytes, NetPackets int64 // each direction has its own bucket
	DiskBytes, DiskOps   int64 // of each disk
}

// The constants of every VM's devices.
const (
	GuestCID  = 3 // vsock address of the guest; each hypervisor has its own vsock, so all have the same
	netID     = "net0"
	rootID    = "root"
	diskID    = "disk"
	refillMs  = 1000
	rawImage  = "Raw"
	maxMemory = 1 << 20 // MiB
	maxCPUs   = 254
)

// VMConfig is the body of vm.create, the part of it that we use. What is left out has the hypervisor's default.
type VMConfig struct {
	CPUs     CPUsConfig     `json:"cpus"`
	Memory   MemoryConfig   `json:"memory"`
	Payload  PayloadConfig  `json:"payload"`
	Disks    []DiskConfig   `json:"disks,omitempty"`
	Net      []NetConfig    `json:"net,omitempty"` // only in answers: a network card is added with its descriptor
	RNG      RNGConfig      `json:"rng"`
	Serial   ConsoleConfig  `json:"serial"`
	Console  ConsoleConfig  `json:"console"`
	Vsock    *VsockConfig   `json:"vsock,omitempty"`
	Landlock bool           `json:"landlock_enable,omitempty"`
	Rules    []LandlockRule `json:"landlock_rules,omitempty"`
}

// CPUsConfig is the processors.
type CPUsConfig struct {
	Boot   int  `json:"boot_vcpus"`
	Max    int  `json:"max_vcpus"`
	Nested bool `json:"nested"` // always said: the default lets guests run guests, which is attack surface for nothing
}

// MemoryConfig is the memory, in bytes. It is always shared, which means a file in memory instead of anonymous pages: only then does the
// hypervisor know which pages the guest never touched, and leaves them out of a snapshot.
type MemoryConfig struct {
	Size   int64 `json:"size"`
	Shared bool  `json:"shared"`
}

// PayloadConfig is what is booted.
type PayloadConfig struct {
	Kernel    string `json:"kernel"`
	Cmdline   string `json:"cmdline,omitempty"`
	Initramfs string `json:"initramfs,omitempty"`
}

// DiskConfig is a virtio-blk device.
type DiskConfig struct {
	ID        string       `json:"id"`
	Path      string       `json:"path"`
	ReadOnly  bool         `json:"readonly"`
	ImageType string       `json:"image_type"` // never guessed from the content, which the guest writes
	Rates     *RateLimiter `json:"rate_limiter_config,omitempty"`
}

// NetConfig is a virtio-net device; its tap comes as a descriptor.
type NetConfig struct {
	ID        string       `json:"id"`
	MAC       string       `json:"mac,omitempty"`
	NumQueues int          `json:"num_queues,omitempty"`
	QueueSize int          `json:"queue_size,omitempty"`
	Rates     *RateLimiter `json:"rate_limiter_config,omitempty"`
}

// RateLimiter has a bucket for bytes and one for operations, which are packets for a network card.
type RateLimiter struct {
	Bandwidth *TokenBucket `json:"bandwidth,omitempty"`
	Ops       *TokenBucket `json:"ops,omitempty"`
}

// TokenBucket holds Size tokens and is full again after RefillTime milliseconds.
type TokenBucket struct {
	Size       int64 `json:"size"`
	RefillTime int64 `json:"refill_time"`
}

// RNGConfig is where virtio-rng takes its bytes from.
type RNGConfig struct {
	Src string `json:"src"`
}

// ConsoleConfig is a serial line or a virtio console.
type ConsoleConfig struct {
	Mode string `json:"mode"`
	File string `json:"file,omitempty"`
}

// VsockConfig is the guest's vsock; on the host it is a Unix socket.
type VsockConfig struct {
	CID    uint32 `json:"cid"`
	Socket string `json:"socket"`
}

// LandlockRule opens one path to the hypervisor.
type LandlockRule struct {
	Path   string `json:"path"`
	Access string `json:"access"`
}

func (s Shape) validate() error {
	switch {
	case s.CPUs < 1 || s.CPUs > maxCPUs:
		return errs.New(errs.Invalid, "%d CPUs: a VM has 1 to %d", s.CPUs, maxCPUs)
	case s.MemoryMiB < 16 || s.MemoryMiB > maxMemory:
		return errs.New(errs.Invalid, "%d MiB of memory: a VM has 16 to %d", s.MemoryMiB, maxMemory)
	case min(s.Rates.NetBytes, s.Rates.NetPackets, s.Rates.DiskBytes, s.Rates.DiskOps) < 0:
		return errs.New(errs.Invalid, "a rate of the VM is negative")
	case strings.ContainsAny(s.Cmdline, "\x00\n"):
		return errs.New(errs.Invalid, "kernel command line %q has a line end or a zero byte", s.Cmdline)
	}
	if s.MAC != "" {
		if mac, err := net.ParseMAC(s.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
			return errs.New(errs.Invalid, "MAC %q is not the address of one Ethernet card", s.MAC)
		}
	}
	return nil
}

// Config is the body of vm.create for a VM of this shape with the files of this spec. Pure.
func Config(spec Spec, shape Shape) (VMConfig, error) {
	if err := shape.validate(); err != nil {
		return VMConfig{}, err
	}
	c := VMConfig{
		CPUs:    CPUsConfig{Boot: shape.CPUs, Max: shape.CPUs},
		Memory:  MemoryConfig{Size: int64(shape.MemoryMiB) << 20, Shared: true},
		Payload: PayloadConfig{Kernel: insideKernel, Cmdline: shape.Cmdline},
		RNG:     RNGConfig{Src: insideRandom},
		Serial:  ConsoleConfig{Mode: "File", File: insideRun + "/" + serialName},
		Console: ConsoleConfig{Mode: "Off"},
		Vsock:   &VsockConfig{CID: GuestCID, Socket: insideRun + "/" + vsockName},
	}
	if spec.Initramfs != "" {
		c.Payload.Initramfs = insideInitramfs
	}
	limiter := limiterOf(shape.Rates.DiskBytes, shape.Rates.DiskOps)
	if spec.Root != "" {
		c.Disks = append(c.Disks, DiskConfig{ID: rootID, Path: insideRoot, ReadOnly: true, ImageType: rawImage, Rates: limiter})
	}
	if spec.Disk != "" {
		c.Disks = append(c.Disks, DiskConfig{ID: diskID, Path: insideDisk, ImageType: rawImage, Rates: limiter})
	}
	if shape.Landlock {
		// Files named above are opened to it by themselves. The hypervisor refuses rules for what does not exist, and a snapshot carries
		// them along: so these are in every tree.
		c.Landlock = true
		c.Rules = []LandlockRule{{insideRun, "rw"}, {insideOut, "rw"}, {insideSnapshot, "r"}, {insideDevices, "rw"}}
	}
	return c, nil
}

// netConfig is the guest's one network card.
func netConfig(shape Shape) NetConfig {
	return NetConfig{
		ID: netID, MAC: shape.MAC, NumQueues: 2, QueueSize: 256,
		Rates: limiterOf(shape.Rates.NetBytes, shape.Rates.NetPackets),
	}
}

func limiterOf(bytes, ops int64) *RateLimiter {
	if bytes == 0 && ops == 0 {
		return nil
	}
	bucket := func(n int64) *TokenBucket {
		if n == 0 {
			return nil
		}
		return &TokenBucket{Size: n, RefillTime: refillMs}
	}
	return &RateLimiter{Bandwidth: bucket(bytes), Ops: bucket(ops)}
}

// fileURL is how the API names a directory inside. Its own parser takes what follows the scheme as it is.
func fileURL(dir string) string { return fmt.Sprintf("file://%s", dir) }
