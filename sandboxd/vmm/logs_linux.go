package vmm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Ended is how a hypervisor ended, with the last words of itself and of its guest. The guest chose the latter.
type Ended struct {
	How    string
	Log    []string
	Serial []string
}

// Error is one line.
func (e *Ended) Error() string {
	s := "the hypervisor " + e.How
	if len(e.Log) > 0 {
		s += "; its log: " + strings.Join(e.Log, " | ")
	}
	if len(e.Serial) > 0 {
		s += "; the guest's console: " + strings.Join(e.Serial, " | ")
	}
	return s
}

const (
	serialFile  = runName + "/" + serialName
	reasonLines = 5
	// logEvery bounds how far a log can outgrow its size: a guest's serial line makes some 100 KiB per second.
	logEvery = 2 * time.Second
)

// Serial returns the end of the guest's serial console, at most n bytes.
func (vm *VM) Serial(n int64) ([]byte, error) { return vm.spec.Serial(n) }

// Serial returns the end of the serial console of a VM, which may be gone as long as it was not cleaned up.
func (s Spec) Serial(n int64) ([]byte, error) { return readTail(s.Dir, serialFile, n) }

// VMMLog returns the end of what the hypervisor itself has said, at most n bytes.
func (vm *VM) VMMLog(n int64) ([]byte, error) { return readTail(vm.spec.Dir, vmmLogName, n) }

// boundLogs keeps the logs small while the hypervisor writes them. It frees the beginning instead of renaming the file, because the
// hypervisor keeps it open. While this process is down nobody does, and the guest can fill the node's disk as fast as its serial line.
func (vm *VM) boundLogs() {
	t := time.NewTicker(logEvery)
	defer t.Stop()
	for {
		select {
		case <-vm.done:
			return
		case <-t.C:
		}
		vm.mu.Lock()
		released := vm.released
		vm.mu.Unlock()
		if released {
			return
		}
		for _, name := range []string{vmmLogName, serialFile} {
			if err := boundLog(vm.spec.Dir, name, vm.keep); err != nil && !os.IsNotExist(err) {
				vm.log.Debug("bound log: " + err.Error())
			}
		}
	}
}

// boundLog frees all but the last keep bytes, once there are twice as many.
func boundLog(dir, name string, keep int64) error {
	f, err := openPlain(dir, name, os.O_WRONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Blocks*512 <= 2*keep {
		return nil
	}
	const block = 4096
	hole := (st.Size - keep) / block * block
	if hole <= 0 {
		return nil
	}
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, hole)
}

// readTail reads the end of a log; what was freed is not part of it.
func readTail(dir, name string, n int64) ([]byte, error) {
	f, err := openPlain(dir, name, os.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	n = min(n, st.Size())
	b := make([]byte, n)
	m, err := f.ReadAt(b, st.Size()-n)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read log: %w", err)
	}
	return bytes.TrimLeft(b[:m], "\x00"), nil
}

// tail is the last lines of a log, fit to print.
func (vm *VM) tail(name string, lines int) []string {
	b, err := readTail(vm.spec.Dir, name, 8<<10)
	if err != nil {
		return nil
	}
	return lastLines(b, lines)
}

func lastLines(b []byte, n int) (lines []string) {
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(clip(line)); line != "" {
			lines = append(lines, line)
		}
	}
	return lines[max(0, len(lines)-n):]
}

// openPlain opens a plain file below dir where a hypervisor may write: whatever it put there, we neither leave its directories nor block.
// An os.Root would not do: it follows links that stay beneath it, and beside those directories are links to the template's own files.
func openPlain(dir, name string, flag int) (*os.File, error) {
	parent, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(parent)
	fd, err := unix.Openat2(parent, name, &unix.OpenHow{
		Flags:   uint64(flag | unix.O_NONBLOCK | unix.O_NOFOLLOW | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a plain file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
