package image

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/errs"
)

// spool keeps the content of files, one after the other, until the image is written. Its file has no name.
type spool struct {
	f    *os.File
	w    *bufio.Writer
	end  int64
	room func() (int64, error) // bytes that the disk has left; the tests replace it

	written, look int64 // of all, and when to look for room again
}

const (
	// keepFree is what a build leaves of the disk: sandboxes run and are paused on the same one, and the image is a stranger's.
	keepFree = 256 << 20
	// lookEvery is how much is written between two looks.
	lookEvery = 32 << 20
)

// spoolError is trouble of the node, not of the image.
type spoolError struct{ err error }

func (e *spoolError) Error() string { return e.err.Error() }
func (e *spoolError) Unwrap() error { return e.err }

func newSpool(dir string) (*spool, error) {
	f, err := os.CreateTemp(dir, "content-*")
	if err != nil {
		return nil, fmt.Errorf("make spool: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("make spool: %w", err)
	}
	return &spool{f: f, w: bufio.NewWriterSize(f, 256<<10), room: func() (int64, error) { return roomOf(f) }}, nil
}

// checkRoom refuses what would leave too little of the disk.
func (s *spool) checkRoom(want int64) error {
	left, err := s.room()
	if err != nil {
		return &spoolError{fmt.Errorf("look for disk space: %w", err)}
	}
	if left-want < keepFree {
		return &spoolError{errs.New(errs.Exhausted, "the disk has %d MiB left, and the image wants more than it may have of them: free some, or build elsewhere", left>>20)}
	}
	return nil
}

// Write takes what is not to be found again by its offset.
func (s *spool) Write(p []byte) (int, error) {
	if s.written >= s.look {
		if err := s.checkRoom(int64(len(p))); err != nil {
			return 0, err
		}
		s.look = s.written + lookEvery
	}
	n, err := s.w.Write(p)
	s.written += int64(n)
	if err != nil {
		err = &spoolError{err}
	}
	return n, err
}

// store takes exactly size bytes and returns where they are.
func (s *spool) store(r io.Reader, size int64) (offset int64, err error) {
	offset = s.end
	n, err := io.Copy(s, io.LimitReader(r, size))
	s.end += n
	if err != nil {
		return 0, err
	}
	if n != size {
		return 0, io.ErrUnexpectedEOF
	}
	return offset, nil
}

// content reads what was stored. All storing is done by then.
func (s *spool) content(offset, size int64) (io.Reader, error) {
	if err := s.flush(); err != nil {
		return nil, err
	}
	return io.NewSectionReader(s.f, offset, size), nil
}

func (s *spool) flush() error {
	if err := s.w.Flush(); err != nil {
		return &spoolError{err}
	}
	return nil
}

// roomOf is what ordinary users have left of the disk that a file is on.
func roomOf(f *os.File) (int64, error) {
	var disk unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &disk); err != nil {
		return 0, err
	}
	return int64(disk.Bavail) * disk.Bsize, nil
}

// Close gives the space back.
func (s *spool) Close() { s.f.Close() }

var errNoSpace = errors.New("image is larger than the format can address")
