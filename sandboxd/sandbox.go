package sandboxd

import (
	"encoding/hex"
	"fmt"
	"slices"
	"time"
)

// State is where a sandbox is in its life. Clients know running and paused ones; pausing and resuming count as paused for them, and the
// others are not shown. All but these two are transitions, during which a request waits or is told to come back. Adopting is never written to disk: it is that of a sandbox of an earlier
// run, from its record being read until its process has been found.
type State string

// The states of a sandbox.
const (
	StateCreating State = "creating"
	StateAdopting State = "adopting"
	StateRunning  State = "running"
	StatePausing  State = "pausing"
	StatePaused   State = "paused"
	StateResuming State = "resuming"
	StateKilling  State = "killing"
)

var states = []State{StateCreating, StateAdopting, StateRunning, StatePausing, StatePaused, StateResuming, StateKilling}

// Nonce is what a sandbox's tokens are derived from, together with a key that this package never sees.
type Nonce [16]byte

// TokenHash is the SHA-256 of a traffic token; the zero value means that the sandbox is public.
type TokenHash [32]byte

// MarshalText writes hexadecimal digits, so that records can be read by people.
func (n Nonce) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, n[:]), nil }

// UnmarshalText reads what MarshalText wrote.
func (n *Nonce) UnmarshalText(text []byte) error { return decodeHex(n[:], text) }

// MarshalText writes hexadecimal digits.
func (h TokenHash) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h[:]), nil }

// UnmarshalText reads what MarshalText wrote.
func (h *TokenHash) UnmarshalText(text []byte) error { return decodeHex(h[:], text) }

func decodeHex(dst, text []byte) error {
	if len(text) != hex.EncodedLen(len(dst)) {
		return fmt.Errorf("%d hexadecimal digits, want %d", len(text), hex.EncodedLen(len(dst)))
	}
	_, err := hex.Decode(dst, text)
	return err
}

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

// clone returns a copy that shares nothing with what a caller holds.
func (n Network) clone() Network {
	if n.AllowInternetAccess != nil {
		n.AllowInternetAccess = new(*n.AllowInternetAccess)
	}
	n.AllowOut, n.DenyOut, n.HTTPSPorts = slices.Clone(n.AllowOut), slices.Clone(n.DenyOut), slices.Clone(n.HTTPSPorts)
	return n
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
	Nonce     Nonce
	TokenHash TokenHash // SHA-256 of the traffic token; zero means public
	EnvdToken string    // the sandbox keeps its SHA-256, too

	AutoPause       bool // at the deadline pause instead of kill, where the machine can
	AutoPauseMemory bool
	AutoResume      bool
}

// Sandbox is one sandbox at one moment, by value: what a caller holds never changes under it. Its maps and slices are shared and
// never written again. It is also the greater part of the record on disk, so it holds no secret: neither tokens nor environment
// variables.
type Sandbox struct {
	ID         string            `json:"id"`
	Generation uint64            `json:"generation"` // of this lifecycle; a route, a link connection and a pool entry belong to exactly one
	State      State             `json:"state"`
	Template   string            `json:"template"`  // id of the template
	Alias      string            `json:"alias"`     // the name the template was asked for by
	StartedAt  time.Time         `json:"startedAt"` // of this lifecycle, as is the next
	EndAt      time.Time         `json:"endAt"`
	Timeout    time.Duration     `json:"timeoutNanos"` // as asked for at create
	CPUs       int               `json:"cpus"`
	MemoryMiB  int               `json:"memoryMiB"`
	DiskMiB    int               `json:"diskMiB"`
	Metadata   map[string]string `json:"metadata,omitempty"`
	Network    Network           `json:"network"`
	Team       string            `json:"team,omitempty"`
	Nonce      Nonce             `json:"nonce"`
	TokenHash  TokenHash         `json:"tokenHash"`
	EnvdHash   TokenHash         `json:"envdHash"` // SHA-256 of the agent's token, for edges; zero means that there is none

	AutoPause       bool `json:"autoPause,omitempty"`
	AutoPauseMemory bool `json:"autoPauseMemory,omitempty"`
	AutoResume      bool `json:"autoResume,omitempty"`

	MemorySaved bool `json:"memorySaved,omitempty"` // of a paused one: it will go on where it was; otherwise it will boot from its disk
}

// ConnectOptions is what Connect is told.
type ConnectOptions struct {
	Timeout    time.Duration // the sandbox lives at least this long from now
	EnvdToken  string        // the agent's, for a guest that boots anew because its memory was not saved; it is not written down
	DropMemory bool          // boot from the disk although memory was saved; a sandbox that runs is left alone
}

// Snapshot is a copy of a running sandbox, memory and disk, that sandboxes are made from: by its ID or its name in place of a template's.
type Snapshot struct {
	ID        string    `json:"id"`
	Name      string    `json:"name,omitempty"`
	Team      string    `json:"team,omitempty"` // the only one that knows it
	SandboxID string    `json:"sandbox"`        // what it was copied from
	Template  string    `json:"template"`       // id of the template of that
	CPUs      int       `json:"cpus"`
	MemoryMiB int       `json:"memoryMiB"`
	DiskMiB   int       `json:"diskMiB"`
	Created   time.Time `json:"created"`
	Bytes     int64     `json:"bytes"` // of disk space
}

// ForkSpec is what a caller says about one copy of a running sandbox; all else is as the sandbox has it.
type ForkSpec struct {
	Timeout   time.Duration
	Nonce     Nonce
	TokenHash TokenHash
	EnvdToken string
}

// ForkResult is what became of one ForkSpec: a sandbox or an error.
type ForkResult struct {
	Sandbox Sandbox
	Err     error
}

// Metrics is one sample of what a sandbox uses, as its guest agent reports it.
type Metrics struct {
	Time       time.Time
	CPUCount   int
	CPUUsedPct float64 // of all its CPUs together
	MemUsed    uint64  // this and the following in bytes
	MemTotal   uint64
	MemCache   uint64
	DiskUsed   uint64
	DiskTotal  uint64
}
