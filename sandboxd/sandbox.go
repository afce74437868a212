package sandboxd

import (
	"time"
)

// State is where a sandbox is in its life. Only running and paused ones are shown to clients; the others are transitions,
// during which a request waits or is told to come back.
type State string

// The states of a sandbox.
const (
	StateCreating State = "creating"
	StateRunning  State = "running"
	StatePausing  State = "pausing"
	StatePaused   State = "paused"
	StateResuming State = "resuming"
	StateKilling  State = "killing"
)

// Network is what a sandbox may reach and how it is reached. The egress half is AllowInternetAccess, AllowOut and DenyOut and
// can be replaced while the sandbox runs; the ingress half is fixed at create.
type Network struct {
	AllowInternetAccess *bool    `json:"allowInternetAccess,omitempty"` // nil means true
	AllowOut            []string `json:"allowOut,omitempty"`
	DenyOut             []string `json:"denyOut,omitempty"`
	AllowPublicTraffic  bool     `json:"allowPublicTraffic"`
	MaskRequestHost     string   `json:"maskRequestHost,omitempty"`
	HTTPSPorts          []uint16 `json:"httpsPorts,omitempty"`
}

// CreateSpec is all that a caller says about a new sandbox. The tokens are the caller's to derive; the manager keeps the nonce and
// the hash, and hands EnvdToken to the guest without ever writing it down.
type CreateSpec struct {
	Template  string // [namespace/]alias[:tag]
	Timeout   time.Duration
	Metadata  map[string]string
	EnvVars   map[string]string
	Network   Network
	Team      string
	Nonce     [16]byte
	TokenHash [32]byte // SHA-256 of the traffic token; zero means public
	EnvdToken string

	AutoPause       bool // at the deadline pause instead of kill, where the machine can
	AutoPauseMemory bool
	AutoResume      bool
}

// Sandbox is one sandbox at one moment, by value: what a caller holds never changes under it. Its maps and slices are shared and
// never written again.
type Sandbox struct {
	ID         string
	Generation uint64 // of this lifecycle; a route, a link connection and a pool entry belong to exactly one
	State      State
	Template   string // id of the template
	Alias      string // the name the template was asked for by
	StartedAt  time.Time
	EndAt      time.Time
	Timeout    time.Duration // as asked for at create
	CPUs       int
	MemoryMiB  int
	DiskMiB    int
	Metadata   map[string]string
	Network    Network
	Team       string
	Nonce      [16]byte
	TokenHash  [32]byte

	AutoPause       bool
	AutoPauseMemory bool
	AutoResume      bool
}

// Metrics is one sample of what a sandbox uses, as its guest agent reports it.
type Metrics struct {
	Time       time.Time
	CPUCount   int
	CPUUsedPct float64 // of one CPU: 200 means two busy CPUs
	MemUsed    uint64  // this and the following in bytes
	MemTotal   uint64
	MemCache   uint64
	DiskUsed   uint64
	DiskTotal  uint64
}
