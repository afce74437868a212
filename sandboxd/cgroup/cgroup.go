// Package cgroup bounds what the processes of one sandbox use together, with version 2 of control groups or with version 1, and says
// what it cannot bound on this host. The machines of sandboxd call it; whose processes they are it does not know.
package cgroup

// Limits bound one sandbox. Zero means no limit, except for Pids.
type Limits struct {
	MemoryMiB int
	CPUs      int
	Pids      int // zero means 4096: a fork bomb must never be the host's problem
}

const defaultPids = 4096

// Processes is how many there may be.
func (l Limits) Processes() int {
	if l.Pids == 0 {
		return defaultPids
	}
	return l.Pids
}
