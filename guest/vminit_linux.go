package guest

import (
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// deviceTime is how long a device may take that a driver which has just been loaded is still making.
const deviceTime = 20 * time.Second

// isVMInit says whether this process is the first of a VM that was booted from an initramfs of ours. A container's first process is not.
func isVMInit() bool {
	if os.Getpid() != 1 {
		return false
	}
	_, err := os.Stat(modulesOrder)
	return err == nil
}

// runVM is the life of a VM's first process. It makes a machine out of a kernel and two disks and starts the agent in it, again whenever it
// ends: the agent itself cannot be the first process, because with that the machine would end. It does not return.
func runVM(log *slog.Logger) {
	// Nobody ends the machine by a signal; who may, can turn it off. They are caught and forgotten instead of ignored, which children inherit.
	signal.Notify(make(chan os.Signal, 1))
	control, state, err := bootVM(log)
	if err != nil {
		// The node finds this as the last words on the console.
		log.Error("boot failed", "error", err)
		turnOff()
	}
	supervise(log, control, state)
}

// bootVM does what an init does before it starts its first service.
func bootVM(log *slog.Logger) (control int, state *os.File, err error) {
	for _, m := range earlyMounts {
		if err := m.apply(); err != nil {
			return -1, nil, err
		}
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return -1, nil, err
	}
	network, err := parseNetwork(string(cmdline))
	if err != nil {
		return -1, nil, err
	}
	if err := loadModules(log); err != nil {
		return -1, nil, err
	}
	// Whoever is inside and takes all memory does not take the machine with it. The agent inherits this.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return -1, nil, fmt.Errorf("protect init: %w", err)
	}
	if state, err = enterRoot(log); err != nil {
		return -1, nil, err
	}
	setLimits(log)
	// A full disk is no reason not to boot, and none of these is one.
	if err := furnishRoot(); err != nil {
		log.Warn("root not furnished", "error", err)
	}
	if err := ensureUser("/"); err != nil {
		log.Warn("user not made", "error", err)
	}
	restoreHostname(log)
	if err := network.up(); err != nil {
		return -1, nil, err
	}
	if control, err = listenVsock(ControlPort); err != nil {
		return -1, nil, err
	}
	return control, state, nil
}

// await waits for something that the kernel does in its own time.
func await(what string, try func() error) error {
	for deadline := time.Now().Add(deviceTime); ; time.Sleep(5 * time.Millisecond) {
		err := try()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for %s: %w", what, err)
		}
	}
}

// setLimits gives programs what distributions give them, where the kernel's own defaults are those of a smaller age.
func setLimits(log *slog.Logger) {
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 1024, Max: 512 << 10}); err != nil {
		log.Warn("limit not set", "error", err)
	}
	for name, value := range map[string]string{
		"fs/protected_hardlinks": "1", "fs/protected_symlinks": "1", "net/ipv4/ping_group_range": "0 2147483647",
	} {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
			log.Warn("setting not changed", "setting", name, "error", err)
		}
	}
}

// restoreHostname gives a machine that was booted from a disk alone the name that it had.
func restoreHostname(log *slog.Logger) {
	name := "localhost"
	if raw, err := readSmall("/etc/hostname"); err == nil && strings.TrimSpace(string(raw)) != "" {
		name = strings.TrimSpace(string(raw))
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		log.Warn("hostname not set", "error", err)
	}
}

// turnOff ends the machine. It does not return.
func turnOff() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}
