package testkit

import (
	"syscall"
	"testing"
	"time"
)

// ProcessorTime is what this process has used so far, in all of its threads and in the kernel. Unlike a clock it does not tell what others
// do to the machine meanwhile.
func ProcessorTime(tb testing.TB) time.Duration {
	tb.Helper()
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}
