package guest

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxEntropy is as much as the kernel takes to start anew, twice over.
const maxEntropy = 64

// reseed gives the kernel secret bytes that nobody else has and makes it draw its random numbers from them at once. A machine that was
// restored would otherwise go on with those that its siblings have too.
func reseed(seed []byte) error {
	random, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("reseed: %w", err)
	}
	defer random.Close()
	info := struct { // rand_pool_info of linux/random.h
		bits, size int32
		buf        [maxEntropy]byte
	}{}
	n := copy(info.buf[:], seed)
	info.bits, info.size = int32(8*n), int32(n)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, random.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	// ENODATA is from a kernel that was never seeded before, and is now.
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, random.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 && !errors.Is(errno, unix.ENODATA) {
		return fmt.Errorf("reseed: %w", errno)
	}
	return nil
}
