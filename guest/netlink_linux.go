package guest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// netlink is a socket to the kernel for one thing after the other. The agent needs a handful of messages, for which a library would be ten
// times as much code in every sandbox.
type netlink struct {
	fd  int
	seq uint32
}

func openNetlink(protocol int) (*netlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind netlink: %w", err)
	}
	return &netlink{fd: fd}, nil
}

func (nl *netlink) close() { unix.Close(nl.fd) }

// do sends one message and waits for the kernel's verdict.
func (nl *netlink) do(kind, flags uint16, body []byte) error {
	return nl.call(kind, flags|unix.NLM_F_ACK, body, func([]byte) error { return nil })
}

// dump asks for a list and hands on what is in it.
func (nl *netlink) dump(kind uint16, body []byte, each func(item []byte) error) error {
	return nl.call(kind, unix.NLM_F_DUMP, body, each)
}

const netlinkHeader = unix.SizeofNlMsghdr

func (nl *netlink) call(kind, flags uint16, body []byte, each func(item []byte) error) error {
	nl.seq++
	msg := make([]byte, 0, netlinkHeader+len(body))
	msg = binary.NativeEndian.AppendUint32(msg, uint32(netlinkHeader+len(body)))
	msg = binary.NativeEndian.AppendUint16(msg, kind)
	msg = binary.NativeEndian.AppendUint16(msg, flags|unix.NLM_F_REQUEST)
	msg = binary.NativeEndian.AppendUint32(msg, nl.seq)
	msg = binary.NativeEndian.AppendUint32(msg, 0) // from whom: the kernel knows
	msg = append(msg, body...)
	if err := unix.Sendto(nl.fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for {
		got, _, err := unix.Recvfrom(nl.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if done, err := nl.read(buf[:got], each); done || err != nil {
			return err
		}
	}
}

var errNetlink = errors.New("malformed netlink message")

// read goes through one datagram; done when it had the end of the answer.
func (nl *netlink) read(b []byte, each func(item []byte) error) (done bool, err error) {
	for len(b) >= netlinkHeader {
		size := int(binary.NativeEndian.Uint32(b))
		kind, seq := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:])
		if size < netlinkHeader || size > len(b) {
			return false, errNetlink
		}
		body := b[netlinkHeader:size]
		b = b[min(align4(size), len(b)):]
		if seq != nl.seq {
			continue // of an earlier call that gave up
		}
		switch kind {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return false, errNetlink
			}
			if code := int32(binary.NativeEndian.Uint32(body)); code != 0 {
				return false, unix.Errno(-code)
			}
			return true, nil
		default:
			if err := each(body); err != nil {
				return false, err
			}
		}
	}
	return false, nil
}

func align4(n int) int { return (n + 3) &^ 3 }

// appendAttribute adds an attribute to the body of a message.
func appendAttribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, align4(len(value))-len(value))...)
}

// bodyOf is one of the kernel's fixed structures, with which the body of a message begins.
func bodyOf(fields any) []byte {
	b, err := binary.Append(nil, binary.NativeEndian, fields)
	if err != nil {
		panic("BUG: not a structure of numbers: " + err.Error())
	}
	return b
}
