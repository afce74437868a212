package guest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// assume makes a VM the one that init names: nothing that it was restored from, or copied from, shows any more. anew says that it is another
// one than before; else it keeps the ids that it gave itself. What must hold comes first, and fails the init.
func (a *agent) assume(req initRequest, anew bool) error {
	if len(req.Entropy) > 0 {
		if err := reseed(req.Entropy); err != nil {
			return err
		}
	}
	a.setClock(req.Timestamp)
	if req.MAC != "" {
		mac, err := net.ParseMAC(req.MAC)
		if err == nil {
			err = setMAC(mac)
		}
		if err != nil {
			return fmt.Errorf("set hardware address: %w", err)
		}
	}
	if req.Hostname != "" {
		if err := unix.Sethostname([]byte(req.Hostname)); err != nil {
			return fmt.Errorf("set hostname: %w", err)
		}
	}
	if anew {
		seed := req.Entropy
		if len(seed) == 0 {
			seed = newEntropy()
		}
		if err := writeMachineID(a.accounts.etc, idOf(seed, "machine-id")); err != nil {
			return fmt.Errorf("set machine id: %w", err)
		}
		if err := setBootID(idOf(seed, "boot_id")); err != nil {
			return fmt.Errorf("set boot id: %w", err)
		}
		a.forgetConnections() // those of whoever had this memory before
	}
	// The rest is for programs that look into files, and the disk may be full.
	if req.Hostname != "" {
		if err := writeHostname(a.accounts.etc, req.Hostname); err != nil {
			a.log.Warn("hostname not written", "error", err)
		}
	}
	if len(req.Resolvers) > 0 {
		if err := replaceFile(filepath.Join(a.accounts.etc, "resolv.conf"), resolvConf(req.Resolvers), 0o644); err != nil {
			a.log.Warn("resolvers not written", "error", err)
		}
	}
	return nil
}

// checkMachine refuses what assume could only half do.
func (r initRequest) checkMachine() error {
	if r.MAC != "" {
		if mac, err := net.ParseMAC(r.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
			return fmt.Errorf("mac %q is not the address of one Ethernet card", r.MAC)
		}
	}
	for _, text := range r.Resolvers {
		if _, err := netip.ParseAddr(text); err != nil {
			return fmt.Errorf("resolver %q is not an address", text)
		}
	}
	if len(r.Hostname) > 64 || strings.ContainsAny(r.Hostname, " \t\n\x00") {
		return fmt.Errorf("hostname %q is not one", r.Hostname)
	}
	return nil
}

// idOf is an id for one purpose, 16 bytes with the marks of a random UUID. It tells nothing about the seed.
func idOf(seed []byte, purpose string) [16]byte {
	sum := hmac.New(sha256.New, seed)
	sum.Write([]byte(purpose))
	id := [16]byte(sum.Sum(nil))
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return id
}

// writeMachineID follows machine-id(5). D-Bus has a copy of its own where it is no link.
func writeMachineID(etc string, id [16]byte) error {
	text := []byte(hex.EncodeToString(id[:]) + "\n")
	if err := replaceFile(filepath.Join(etc, "machine-id"), text, 0o444); err != nil {
		return err
	}
	const copied = "/var/lib/dbus/machine-id"
	if info, err := os.Lstat(copied); etc == "/etc" && err == nil && info.Mode().IsRegular() {
		return replaceFile(copied, text, 0o444)
	}
	return nil
}

const (
	bootIDPath = "/proc/sys/kernel/random/boot_id"
	bootIDFile = "/run/sluice-boot-id"
)

// setBootID replaces the id that the kernel gave itself, which is the same in everything that was restored from it. The kernel has no
// way to, so a file lies over it; the file is the same from then on and gets new content.
func setBootID(id [16]byte) error {
	h := hex.EncodeToString(id[:])
	text := strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-") + "\n"
	if err := os.WriteFile(bootIDFile, []byte(text), 0o444); err != nil {
		return err
	}
	if now, err := os.ReadFile(bootIDPath); err == nil && string(now) == text {
		return nil
	}
	if err := unix.Mount(bootIDFile, bootIDPath, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount boot id: %w", err)
	}
	return nil
}

func writeHostname(etc, name string) error {
	err := replaceFile(filepath.Join(etc, "hostname"), []byte(name+"\n"), 0o644)
	path := filepath.Join(etc, "hosts")
	old, rerr := readSmall(path)
	if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		return errors.Join(err, rerr)
	}
	return errors.Join(err, replaceFile(path, []byte(hostsWith(string(old), name)), 0o644))
}

// nameAddress is where a Debian machine finds its own name.
const nameAddress = "127.0.1.1"

// hostsWith gives the machine's own name its line in a hosts file, and adds what every such file has when it is missing.
func hostsWith(hosts, name string) string {
	var b strings.Builder
	local := false
	for line := range strings.Lines(hosts) {
		fields := strings.Fields(line)
		if len(fields) > 0 && fields[0] == nameAddress {
			continue
		}
		local = local || len(fields) > 1 && fields[0] == "127.0.0.1"
		b.WriteString(closeLine(line))
	}
	if !local {
		b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	}
	b.WriteString(nameAddress + "\t" + name + "\n")
	return b.String()
}

func resolvConf(resolvers []string) []byte {
	var b strings.Builder
	for _, r := range resolvers {
		b.WriteString("nameserver " + r + "\n")
	}
	return []byte(b.String())
}
