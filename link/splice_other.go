//go:build !linux

package link

import "syscall"

// splice needs Linux.
func splice(_, _ syscall.RawConn, _ *progress) error { return errCannotSplice }

// awaitReset cannot tell here: a reset after the end of a stream is noticed by the next write.
func awaitReset(syscall.RawConn) error { return nil }
