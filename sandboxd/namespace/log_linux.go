package namespace

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	maxLog  = 64 << 10 // what is kept of an agent's log, from its beginning
	maxSaid = 512      // what is shown of its end
)

// openLog is where the stages and the agent write, and the daemon's own way to read it. It is memory of a fixed size that
// no path leads to: whoever comes by the agent's descriptors in a sandbox can neither fill the host's disk nor change a
// file of the host, and the agent needs no daemon to go on writing. An adopted sandbox's log cannot be read.
func openLog() (write, read *os.File, err error) {
	fd, err := unix.MemfdCreate("guestd", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, nil, fmt.Errorf("make memory for guestd's log: %w", err)
	}
	read = os.NewFile(uintptr(fd), "guestd's log")
	err = read.Truncate(maxLog)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err == nil {
		write, err = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
	}
	if err != nil {
		read.Close()
		return nil, nil, fmt.Errorf("make memory for guestd's log: %w", err)
	}
	return write, read, nil
}

// lastSaid is the end of a log, for people. A sandbox may have written it.
func lastSaid(log *os.File) string {
	text := make([]byte, maxLog)
	if _, err := log.ReadAt(text, 0); err != nil {
		return ""
	}
	text = bytes.TrimSpace(bytes.TrimRight(text, "\x00"))
	return string(text[max(len(text)-maxSaid, 0):])
}
