package link

import (
	"errors"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// splice moves src's bytes to dst inside the kernel until src ends.
//
// It is not io.Copy, whose splice keeps a pipe of 1 MiB for as long as it runs: most links are idle, pooled by an edge, and
// two pipes each are four descriptors and 20 KiB of kernel memory. Here a pipe is taken when bytes are there and given
// back before waiting. And a short message, which most are, is cheaper read and written than spliced.
func splice(dst, src syscall.RawConn, p *progress) error {
	s := splicer{}
	defer s.giveBack()
	drain, fill := s.drain, s.fill // one closure each for the connection, not for each chunk
	for {
		if err := src.Read(drain); err != nil {
			return err
		}
		if s.err != nil {
			return s.err
		}
		if s.n == 0 {
			return nil
		}
		n := s.n
		if err := dst.Write(fill); err != nil {
			return err
		}
		if s.err != nil {
			return s.err
		}
		p.add(n)
	}
}

// splicer is one direction of a spliced connection.
type splicer struct {
	bulk bool // the last chunk was long, so the next one goes through a pipe
	pipe *pipe
	buf  *[copyBufferSize]byte // what a short chunk goes through
	off  int                   // where in buf it starts
	n    int                   // bytes in buf or in the pipe
	err  error
}

const spliceFlags = unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE

// drain takes what src holds into the buffer or the pipe. It returns false when src has nothing yet.
func (s *splicer) drain(fd uintptr) bool {
	if s.bulk && s.pipe == nil {
		s.giveBack()
		if s.pipe, s.err = acquirePipe(); s.err != nil {
			return true
		}
	}
	if !s.bulk && s.buf == nil {
		s.giveBack()
		s.buf = copyBuffers.Get().(*[copyBufferSize]byte)
	}
	for {
		n, err := s.take(int(fd))
		switch {
		case err == nil:
			s.n, s.off = n, 0
			s.bulk = n >= copyBufferSize
			return true
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN): // a pipe would be empty here, so it is the socket that is not ready
			s.giveBack()
			s.bulk = false
			return false
		case errors.Is(err, unix.EINVAL): // this kind of socket cannot be spliced
			s.err = errCannotSplice
			return true
		default:
			s.err = err
			return true
		}
	}
}

func (s *splicer) take(fd int) (int, error) {
	if s.pipe == nil {
		return unix.Read(fd, s.buf[:])
	}
	n, err := unix.Splice(fd, nil, s.pipe.w, nil, pipeSize, spliceFlags)
	return int(n), err
}

// fill gives dst what the buffer or the pipe holds. It returns false when dst takes no more for now.
func (s *splicer) fill(fd uintptr) bool {
	for s.n > 0 {
		n, err := s.give(int(fd))
		switch {
		case err == nil && n > 0:
			s.n -= n
			s.off += n
		case err == nil:
			s.err = unix.EPIPE
			return true
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return false
		default:
			s.err = err
			return true
		}
	}
	return true
}

func (s *splicer) give(fd int) (int, error) {
	if s.pipe == nil {
		return unix.Write(fd, s.buf[s.off:s.off+s.n])
	}
	n, err := unix.Splice(s.pipe.r, nil, fd, nil, s.n, spliceFlags)
	return int(n), err
}

// giveBack parts with the buffer and the pipe: a pipe that is not empty is of no use to anybody else.
func (s *splicer) giveBack() {
	if s.buf != nil {
		copyBuffers.Put(s.buf)
		s.buf = nil
	}
	if s.pipe == nil {
		return
	}
	if s.n == 0 {
		releasePipe(s.pipe)
	} else {
		s.pipe.close()
	}
	s.pipe = nil
}

// pipeSize is how much one splice moves at most, and what a peer that does not read can pin in the kernel per
// direction. 1 MiB, as io.Copy has it, would be a tenth faster at 2 GB/s.
const pipeSize = 256 << 10

type pipe struct{ r, w int }

func (p *pipe) close() {
	_ = unix.Close(p.r) // a pipe of our own: nothing to flush, nothing to report
	_ = unix.Close(p.w)
}

// idlePipes bounds what is kept: as many as can be filled at one time, and some. It belongs to the process, as the
// descriptors do.
var idlePipes = make(chan *pipe, 8*runtime.GOMAXPROCS(0))

// acquirePipe returns an empty pipe, or errCannotSplice when the process has no descriptors left for one.
func acquirePipe() (*pipe, error) {
	select {
	case p := <-idlePipes:
		return p, nil
	default:
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, errCannotSplice
	}
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize) // a smaller pipe only moves less at a time
	return &pipe{r: fds[0], w: fds[1]}, nil
}

func releasePipe(p *pipe) {
	select {
	case idlePipes <- p:
	default:
		p.close()
	}
}

// awaitReset waits, after the end of its stream, until the peer resets the connection, which is an error, or both its
// directions are shut, which is not.
func awaitReset(raw syscall.RawConn) error {
	var gone error
	err := raw.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd)}} // errors and hang-ups are always told
		if _, err := unix.Poll(poll, 0); err != nil {
			return false
		}
		switch events := poll[0].Revents; {
		case events&unix.POLLERR != 0:
			gone = unix.ECONNRESET
			return true
		default:
			return events&unix.POLLHUP != 0
		}
	})
	if err != nil {
		return err
	}
	return gone
}
