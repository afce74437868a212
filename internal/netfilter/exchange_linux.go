package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// NewConn returns the library's connection on our transport. It works in the network namespace that the calling thread is in at
// each call, holds no descriptor between calls, and needs no closing.
func NewConn() (*nftables.Conn, error) {
	// The library means this door for tests. It is the only one to its transport, and what comes in by it are real answers.
	return nftables.New(nftables.WithTestDial(transport))
}

// transport is converse as the library wants it. An error is handed over as the kernel would report one, in a message: the
// library would ask for ever after one that came back by itself.
func transport(messages []netlink.Message) (answers []netlink.Message, err error) {
	if len(messages) == 0 {
		return nil, io.EOF // is there more? All there was came with the first answer.
	}
	err = converse(messages, func(m netlink.Message) error {
		answers = append(answers, m)
		return nil
	})
	if err != nil {
		errno := unix.EPROTO
		errors.As(err, &errno)
		asked := messages[0].Header
		return []netlink.Message{{
			Header: netlink.Header{Type: netlink.Error, Sequence: asked.Sequence, PID: asked.PID},
			Data:   binary.NativeEndian.AppendUint32(nil, uint32(-int32(errno))),
		}}, nil
	}
	return answers, nil
}

// Sizes of the buffers. The kernel's answers to a dump are at most 32 KiB each; one attribute, and so all that it wraps, is at
// most 64 KiB. Of an acknowledgement it counts about a KiB against the receive buffer.
const (
	answerSize    = 1 << 17
	ackSize       = 1 << 11
	receiveBuffer = 1 << 20 // at least
	sendOverhead  = 1 << 12
)

// converse sends complete messages in one datagram to netfilter in the calling thread's network namespace, and hands over every
// message that the kernel answers: also errors, acknowledgements and the ends of dumps. Its own error means that it could not ask,
// that answers were lost, or that each did not want more.
func converse(messages []netlink.Message, each func(answer netlink.Message) error) error {
	var request []byte
	for _, m := range messages {
		b, err := m.MarshalBinary()
		if err != nil {
			return fmt.Errorf("encode netlink message: %w", err)
		}
		request = append(request, b...)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	for _, option := range []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, len(request) + sendOverhead},
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, max(receiveBuffer, ackSize*len(messages))},
		{unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1}, // an error need not bring back the message that it is about
	} {
		if err := unix.SetsockoptInt(fd, option.level, option.name, option.value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	err = retry(func() error { return unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}) })
	if err != nil {
		return os.NewSyscallError("sendto", err)
	}
	return receive(fd, messages[0].Header.PID, each)
}

// receive drains the socket. Each answer to a dump makes the kernel prepare the next before it returns, so an empty socket means
// that there is nothing more.
func receive(fd int, pid uint32, each func(answer netlink.Message) error) error {
	buf := make([]byte, answerSize)
	for {
		var n int
		err := retry(func() (err error) {
			n, _, err = unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
			return err
		})
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil {
			return os.NewSyscallError("recvfrom", err)
		}
		if n > len(buf) {
			return fmt.Errorf("netlink answer of %d bytes: %w", n, unix.EMSGSIZE)
		}
		parsed, err := syscall.ParseNetlinkMessage(append([]byte(nil), buf[:n]...)) // the messages point into it
		if err != nil {
			return fmt.Errorf("decode netlink answer: %w", err)
		}
		for _, m := range parsed {
			err := each(netlink.Message{
				Header: netlink.Header{
					Length: m.Header.Len, Type: netlink.HeaderType(m.Header.Type), Flags: netlink.HeaderFlags(m.Header.Flags),
					Sequence: m.Header.Seq,
					PID:      pid, // of who asked; the kernel's answer names the socket, which is gone
				},
				Data: m.Data,
			})
			if err != nil {
				return err
			}
		}
	}
}

// retry repeats a call that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
