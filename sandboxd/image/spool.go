package image

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
)

// spool keeps the content of files, one after the other, until the image is written. Its file has no name.
type spool struct {
	f   *os.File
	w   *bufio.Writer
	end int64
}

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
	return &spool{f: f, w: bufio.NewWriterSize(f, 256<<10)}, nil
}

// store takes exactly size bytes and returns where they are.
func (s *spool) store(r io.Reader, size int64) (offset int64, err error) {
	offset = s.end
	n, err := io.Copy(spoolWriter{s.w}, io.LimitReader(r, size))
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

// Close gives the space back.
func (s *spool) Close() { s.f.Close() }

type spoolWriter struct{ w *bufio.Writer }

func (s spoolWriter) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	if err != nil {
		err = &spoolError{err}
	}
	return n, err
}

var errNoSpace = errors.New("image is larger than the format can address")
