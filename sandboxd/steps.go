package sandboxd

// Step names a point in making or removing a sandbox. The machine and the manager report each one after it is done: the time since
// the last one is a phase in the histogram, and the crash tests stop the process at every one of them.
type Step string

// The steps of create, in order. A machine without a network of its own skips network and fence.
const (
	StepRecorded  Step = "recorded"  // the record is on disk, and nothing else exists
	StepNetwork   Step = "network"   // the network namespace and its way out exist
	StepFence     Step = "fence"     // the egress rules are in force
	StepStarted   Step = "started"   // the guest answers on its control connection; it dies with us
	StepInit      Step = "init"      // the guest has its identity
	StepHandle    Step = "handle"    // the record says running, and how to find the process
	StepCommitted Step = "committed" // the process outlives us
	StepPublished Step = "published" // edges can find it
)

// The steps of removal, in order.
const (
	StepWithdrawn Step = "withdrawn" // edges no longer find it, and its connections are reset
	StepCondemned Step = "condemned" // the record says killing: no restart will take it up again
	StepStopped   Step = "stopped"   // no process is left
	StepUnwired   Step = "unwired"   // the network namespace is gone, and the rules with it
	StepErased    Step = "erased"    // the directory is gone, and the record with it
)

var (
	createSteps = []Step{StepRecorded, StepNetwork, StepFence, StepStarted, StepInit, StepHandle, StepCommitted, StepPublished}
	removeSteps = []Step{StepWithdrawn, StepCondemned, StepStopped, StepUnwired, StepErased}
)
