package egress_test

import (
	"testing"

	"github.com/sluice-edge/sluice/internal/lab"
)

// TestDebianKernel holds the fence around machines to the kernel that a Debian node has, whose netfilter is made of modules and older
// than a developer's, in the nested host.
func TestDebianKernel(t *testing.T) {
	if !lab.InKVM(t) {
		return
	}
	t.Run("hostile machine", TestHostileMachine)
	t.Run("mutilated frames", TestMutilatedFrames)
	t.Run("neighbour", TestNeighbourIsPinned)
	t.Run("forwarded", TestForwarded)
	t.Run("large frames", TestForwardedLargeFrames)
	t.Run("resume elsewhere", TestResumeElsewhere)
	t.Run("flows", TestMachineCannotFillTheTable)
}
