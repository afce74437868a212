package sandboxd

// Step names a point in making or removing a sandbox. The machine and the manager report each one after it is done: the time since
// the last one is a phase in the histogram, and the crash tests stop the process at every one of them.
type Step string

// The steps of create, in order. A machine without a network of its own skips network and fence, one whose sandboxes are processes of
// this host skips layer, process and restored.
const (
	StepRecorded  Step = "recorded"  // the record is on disk, and nothing else exists
	StepNetwork   Step = "network"   // the network namespace and its way out exist
	StepFence     Step = "fence"     // the egress rules are in force
	StepLayer     Step = "layer"     // the private writable disk is there
	StepProcess   Step = "process"   // the hypervisor runs
	StepRestored  Step = "restored"  // the memory is there, or the kernel has booted
	StepStarted   Step = "started"   // the guest answers on its control connection; it dies with us
	StepInit      Step = "init"      // the guest has its identity
	StepHandle    Step = "handle"    // the record says running, and how to find the process
	StepCommitted Step = "committed" // the process outlives us
	StepPublished Step = "published" // edges can find it
)

// The steps of a pause, in order. After saved the place is destroyed, as in a removal.
const (
	StepPausing Step = "pausing" // the record says pausing
	StepHidden  Step = "hidden"  // the route says paused, and the connections are reset
	StepFrozen  Step = "frozen"  // the guest stands still
	StepSaved   Step = "saved"   // what it consists of is on disk, whole, and its process has ended
	StepPaused  Step = "paused"  // the record says paused and names no slot: only the directory is left
)

// The steps of a resume, in order, besides those that it has in common with create.
const (
	StepResuming  Step = "resuming"  // the record says resuming and names the slot, of which nothing exists yet
	StepContinued Step = "continued" // the guest runs
	StepRunning   Step = "running"   // the record says running
)

// The steps of a snapshot, in order.
const (
	StepStanding Step = "standing" // the record says that the guest may stand still
	StepCopied   Step = "copied"   // memory and disk are in a directory that nothing names yet, and the guest goes on
	StepNamed    Step = "named"    // the directory has its name and its description: sandboxes can be made from it
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
	createSteps = []Step{StepRecorded, StepNetwork, StepFence, StepLayer, StepProcess, StepRestored, StepStarted, StepInit, StepHandle,
		StepCommitted, StepPublished}
	pauseSteps  = []Step{StepPausing, StepHidden, StepFrozen, StepSaved, StepStopped, StepUnwired, StepPaused}
	resumeSteps = []Step{StepResuming, StepNetwork, StepFence, StepLayer, StepProcess, StepRestored, StepStarted, StepInit, StepHandle,
		StepCommitted, StepContinued, StepRunning, StepPublished}
	snapshotSteps = []Step{StepStanding, StepCopied, StepNamed}
	removeSteps   = []Step{StepWithdrawn, StepCondemned, StepStopped, StepUnwired, StepErased}
)
