package routing

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

// State is the part of a sandbox's lifecycle that an edge must know.
type State string

// The states that a route can have. A sandbox in transition has the route of the state it comes from, or none.
const (
	Running State = "running"
	Paused  State = "paused"
)

// RouteVersion and NodeVersion are the schemas that this build writes, and the only ones it reads. A field that old readers may
// ignore does not raise them; one that they must not ignore does.
const (
	RouteVersion = 1
	NodeVersion  = 1
)

// PortSettings is what is special about one port of a sandbox.
type PortSettings struct {
	HTTPS bool `json:"https,omitempty"` // the edge speaks TLS to it
}

// Route says where a sandbox is and who may reach it. It is a value: written whole, replaced whole, never edited.
type Route struct {
	Version    int // RouteVersion; zero means the same
	Sandbox    string
	Node       string
	Generation uint64 // of the lifecycle; a later one is greater, whichever node it is on
	State      State
	EndAt      time.Time               // to the millisecond; zero means no end, as for a paused sandbox
	TokenHash  [32]byte                // SHA-256 of the traffic token; zero means public
	Mask       string                  // maskRequestHost; empty means none
	Ports      map[uint16]PortSettings // only the ports that differ from the default
	AutoResume bool                    // traffic wakes it when it is paused
	EnvdHash   [32]byte                // SHA-256 of the agent's token, wanted of who wakes it by that port; zero means none is
}

// Public tells whether the sandbox takes traffic without a token.
func (r *Route) Public() bool { return r.TokenHash == [32]byte{} }

// ended tells whether the sandbox's time was over at now. Only its node knows whether it was extended since.
func (r *Route) ended(now time.Time) bool {
	return r.State != Paused && !r.EndAt.IsZero() && !now.Before(r.EndAt)
}

// routeJSON is the stored form. "v" and "gen" come first: the scripts read the generation from there. Whether a token is wanted is said
// either way: a record that lost its token must not open the sandbox. Names are lower-case ASCII, see checkKeys.
type routeJSON struct {
	Version    int                     `json:"v"`
	Generation uint64                  `json:"gen"`
	Gone       bool                    `json:"gone,omitempty"` // a tombstone: nothing else is set
	Sandbox    string                  `json:"id,omitempty"`
	Node       string                  `json:"node,omitempty"`
	State      State                   `json:"state,omitempty"`
	EndAtMilli int64                   `json:"end,omitempty"`
	TokenHash  string                  `json:"token,omitempty"`
	Public     bool                    `json:"public,omitempty"`
	Mask       string                  `json:"mask,omitempty"`
	Ports      map[uint16]PortSettings `json:"ports,omitempty"`
	AutoResume bool                    `json:"resume,omitempty"`
	EnvdHash   string                  `json:"envd,omitempty"`
}

// errGone is what decoding a tombstone gives.
var errGone = errors.New("the route was deleted")

// MarshalJSON writes the stored form and refuses a record that UnmarshalJSON would not read.
func (r Route) MarshalJSON() ([]byte, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	j := routeJSON{
		Version: RouteVersion, Generation: r.Generation, Sandbox: r.Sandbox, Node: r.Node, State: r.State,
		Public: r.Public(), Mask: r.Mask, Ports: r.Ports, AutoResume: r.AutoResume,
	}
	if !r.EndAt.IsZero() {
		j.EndAtMilli = r.EndAt.UnixMilli()
	}
	if !r.Public() {
		j.TokenHash = hex.EncodeToString(r.TokenHash[:])
	}
	if r.EnvdHash != [32]byte{} {
		j.EnvdHash = hex.EncodeToString(r.EnvdHash[:])
	}
	return json.Marshal(j)
}

// UnmarshalJSON reads the stored form. An unknown schema version is refused: a guess about who may pass is worse than none.
func (r *Route) UnmarshalJSON(data []byte) error {
	var j routeJSON
	if err := unmarshalStrict(data, &j); err != nil {
		return err
	}
	if j.Version != RouteVersion {
		return fmt.Errorf("route schema version %d, want %d", j.Version, RouteVersion)
	}
	if j.Gone {
		return errGone
	}
	read := Route{
		Version: RouteVersion, Sandbox: j.Sandbox, Node: j.Node, Generation: j.Generation, State: j.State,
		Mask: j.Mask, Ports: j.Ports, AutoResume: j.AutoResume,
	}
	if j.EndAtMilli != 0 {
		read.EndAt = time.UnixMilli(j.EndAtMilli).UTC()
	}
	if j.Public == (j.TokenHash != "") {
		return errors.New("want either a token hash or public")
	}
	if j.TokenHash != "" {
		if err := decodeHash(&read.TokenHash, j.TokenHash); err != nil {
			return fmt.Errorf("traffic token: %w", err)
		}
	}
	if j.EnvdHash != "" {
		if err := decodeHash(&read.EnvdHash, j.EnvdHash); err != nil {
			return fmt.Errorf("agent's token: %w", err)
		}
	}
	if err := read.validate(); err != nil {
		return err
	}
	*r = read
	return nil
}

// decodeHash refuses zero, which would mean that no token is asked for.
func decodeHash(dst *[32]byte, text string) error {
	sum, err := hex.DecodeString(text)
	if err != nil || len(sum) != len(dst) {
		return errors.New("hash is not 64 hex digits")
	}
	copy(dst[:], sum)
	if *dst == [32]byte{} {
		return errors.New("hash is zero, which would be no token")
	}
	return nil
}

// maxEndAt keeps end times within what milliseconds and JSON numbers carry exactly.
var maxEndAt = time.UnixMilli(1 << 53)

func (r *Route) validate() error {
	switch {
	case r.Version != 0 && r.Version != RouteVersion:
		return errs.New(errs.Invalid, "route schema version %d, want %d", r.Version, RouteVersion)
	case !validSandboxID([]byte(r.Sandbox)):
		return errs.New(errs.Invalid, "route with sandbox id %q", r.Sandbox)
	case !validNodeID(r.Node):
		return errs.New(errs.Invalid, "route of sandbox %q with node id %q", r.Sandbox, r.Node)
	case r.Generation == 0:
		return errs.New(errs.Invalid, "route of sandbox %q without a generation", r.Sandbox)
	case r.State != Running && r.State != Paused:
		return errs.New(errs.Invalid, "route of sandbox %q with state %q", r.Sandbox, r.State)
	case !r.EndAt.IsZero() && (r.EndAt.UnixMilli() <= 0 || r.EndAt.After(maxEndAt)):
		return errs.New(errs.Invalid, "route of sandbox %q ends at %v", r.Sandbox, r.EndAt)
	}
	if !validMask(r.Mask) {
		return errs.New(errs.Invalid, "route of sandbox %q with mask %q", r.Sandbox, r.Mask)
	}
	for port := range r.Ports {
		if port == 0 {
			return errs.New(errs.Invalid, "route of sandbox %q with settings for port 0", r.Sandbox)
		}
	}
	return nil
}

// validMask keeps out what cannot stand in a Host header. Whether it is a name is for whoever took it from a client to judge.
func validMask(mask string) bool {
	mask = strings.ReplaceAll(mask, "${PORT}", "65535") // the longest it can become
	if len(mask) > len(":65535")+253 {
		return false
	}
	for _, c := range []byte(mask) {
		if !isLower(c) && !isUpper(c) && !isDigit(c) && c != '.' && c != '-' && c != '_' && c != ':' {
			return false
		}
	}
	return true
}

// unmarshalStrict decodes an object in which no two names differ in case only, nor are the same: encoding/json takes either for one
// field, and the last of them would win.
func unmarshalStrict(data []byte, v any) error {
	if err := checkKeys(data); err != nil {
		return err
	}
	return json.Unmarshal(data, v)
}

func checkKeys(data []byte) error {
	decoder := json.NewDecoder(bytes.NewReader(data))
	if start, err := decoder.Token(); err != nil || start != json.Delim('{') {
		return errors.New("not a JSON object")
	}
	seen := make(map[string]bool)
	for decoder.More() {
		token, err := decoder.Token()
		if err != nil {
			return err
		}
		name, _ := token.(string)
		for _, c := range []byte(name) { // encoding/json also takes the long s for an s
			if isUpper(c) || c >= 0x80 {
				return fmt.Errorf("name %q is not in lower case", name)
			}
		}
		if seen[name] {
			return fmt.Errorf("name %q stands there twice", name)
		}
		seen[name] = true
		var skipped json.RawMessage
		if err := decoder.Decode(&skipped); err != nil {
			return err
		}
	}
	return nil
}

// Node is a node's lease: how to reach it and how full it is.
type Node struct {
	ID           string
	LinkAddr     string // of its link listener, host:port
	APIAddr      string // of its REST API, host:port; empty when it serves none
	Sandboxes    int
	MaxSandboxes int
	Machine      string
	Draining     bool // takes no new sandboxes
}

type nodeJSON struct {
	Version      int    `json:"v"`
	ID           string `json:"id"`
	LinkAddr     string `json:"link"`
	APIAddr      string `json:"api"`
	Sandboxes    int    `json:"n"`
	MaxSandboxes int    `json:"max"`
	Machine      string `json:"machine"`
	Draining     bool   `json:"drain"`
}

// MarshalJSON writes the stored form.
func (n Node) MarshalJSON() ([]byte, error) {
	if err := n.validate(); err != nil {
		return nil, err
	}
	return json.Marshal(nodeJSON{NodeVersion, n.ID, n.LinkAddr, n.APIAddr, n.Sandboxes, n.MaxSandboxes, n.Machine, n.Draining})
}

// UnmarshalJSON reads the stored form and refuses an unknown schema version.
func (n *Node) UnmarshalJSON(data []byte) error {
	var j nodeJSON
	if err := unmarshalStrict(data, &j); err != nil {
		return err
	}
	if j.Version != NodeVersion {
		return fmt.Errorf("node schema version %d, want %d", j.Version, NodeVersion)
	}
	read := Node{j.ID, j.LinkAddr, j.APIAddr, j.Sandboxes, j.MaxSandboxes, j.Machine, j.Draining}
	if err := read.validate(); err != nil {
		return err
	}
	*n = read
	return nil
}

func (n *Node) validate() error {
	if !validNodeID(n.ID) {
		return errs.New(errs.Invalid, "node id %q: want 1 to 64 of letters, digits, dot, dash, underscore", n.ID)
	}
	return nil
}

// validNodeID keeps node ids printable and free of ':', which separates the parts of a key.
func validNodeID(id string) bool {
	if id == "" || len(id) > 64 {
		return false
	}
	for i := range len(id) {
		if c := id[i]; !isLower(c) && !isDigit(c) && !isUpper(c) && c != '.' && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

func isLower(c byte) bool { return 'a' <= c && c <= 'z' }
func isUpper(c byte) bool { return 'A' <= c && c <= 'Z' }
func isDigit(c byte) bool { return '0' <= c && c <= '9' }
