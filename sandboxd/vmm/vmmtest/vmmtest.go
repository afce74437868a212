// Package vmmtest holds the fake hypervisor and the one suite that it and the real one pass. The fake is a program: it is started by the
// same launcher, in the same tree, takes its API socket as a descriptor and the tap through the API, and its guest answers on vsock. What
// it lacks is a processor: its guest is a counter and a disk.
//
// A test binary that uses the package calls Main first: it is the fake hypervisor too, and the first process of the real guest. All of
// it needs Linux.
package vmmtest
