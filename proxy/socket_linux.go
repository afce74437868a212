package proxy

import "golang.org/x/sys/unix"

const (
	// waitingBytes is how much of an answer may wait in the kernel for its turn to be sent. What is under way comes on top and
	// is left to the kernel: a bound there would be one on the speed of clients far away.
	waitingBytes = 128 << 10

	// unservedBytes is how much of a client's body the kernel may hold for us; it doubles that for its own accounting, and gives
	// no more than net.core.rmem_max says. Left to itself it would let that grow to tens of MiB while a body moves, and
	// keep it when the sandbox stops reading. It is also what a client can have under way: 40 Mbit/s at 100 ms.
	unservedBytes = 512 << 10
)

// limitSocket bounds what a client that does not read, or whose sandbox does not, costs in the kernel, which also drops the
// connection when our bytes have not been taken for so many milliseconds: a reader that stalls on purpose, or a host that
// vanished. That costs nothing per write, as a deadline would.
func limitSocket(c *clientConn, millis int) {
	_ = c.raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, millis)
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, waitingBytes)
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, unservedBytes)
	})
}
