package proxy

import (
	"bytes"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/routing"
)

// envdPort is where the agent in the sandbox serves SDKs. It has its own token, so the traffic token does not guard it and
// no mask changes its Host.
const envdPort = 49983

// facts are what a decision needs to know of a request; the same for every protocol.
type facts struct {
	target []byte // the request target, for the control paths
	tokens int    // how many traffic tokens were presented
	token  []byte // the first of them

	envdTokens int // how many tokens of the agent's
	envdToken  []byte
}

// decision is what decide found. With a reason the request is refused; the zero reason lets it pass.
type decision struct {
	reason Reason
	mask   string // Host for the sandbox; empty: the public one
	wake   bool   // the sandbox is paused, and may be woken for this request
}

// decide is the whole of who may pass: pure, without I/O, and before any byte reaches the node. The caller has resolved the
// route: an unknown sandbox is "not found" even on a control path.
//
// A paused sandbox is "not found", unless it is to be woken by traffic: then by whoever may pass, and by nobody else. The agent
// checks its token by itself and cannot do it while it is paused, so for its port that is done here, by the hash in the
// route.
func decide(route *routing.Route, port uint16, f *facts) decision {
	if port == envdPort {
		if isControlPath(f.target) {
			return decision{reason: ReasonControlPath}
		}
		switch {
		case route.State == routing.Running:
			return decision{}
		case !route.AutoResume:
			return decision{reason: ReasonPaused}
		case route.EnvdHash == [32]byte{}: // the agent asks for none
		case f.envdTokens != 1 || !auth.TokenMatches(route.EnvdHash, f.envdToken):
			return decision{reason: ReasonResumeDenied}
		}
		return decision{wake: true}
	}
	if !route.Public() {
		switch {
		case f.tokens == 0:
			return decision{reason: ReasonTokenMissing}
		case f.tokens > 1: // which of them the sandbox's owner meant is not ours to choose
			return decision{reason: ReasonTokenInvalid}
		case !auth.TokenMatches(route.TokenHash, f.token):
			return decision{reason: ReasonTokenInvalid}
		}
	}
	if route.State != routing.Running && !route.AutoResume {
		return decision{reason: ReasonPaused}
	}
	return decision{mask: route.Mask, wake: route.State != routing.Running}
}

// controlPaths are envd's calls for the node alone.
var controlPaths = [...]string{"init", "freeze", "unfreeze", "collapse", "fsfreeze", "fsthaw", "upgrade"}

// isControlPath tells whether a target names a control path in any of the spellings that a server could take for one: with
// dot segments and repeated slashes, percent-encoded once or twice.
func isControlPath(target []byte) bool {
	path := target
	if i := bytes.IndexByte(path, '?'); i >= 0 { // not at '#': to a server it is part of the path
		path = path[:i]
	}
	if cleansToControl(path) {
		return true
	}
	for range 2 {
		if bytes.IndexByte(path, '%') < 0 {
			return false
		}
		path = percentDecode(path)
		if cleansToControl(path) {
			return true
		}
	}
	return false
}

// cleansToControl cleans the path as path.Clean does and compares what remains, without building it: what matters is only
// whether one segment is left, and which.
func cleansToControl(path []byte) bool {
	var only []byte // the segment at depth 1
	depth := 0
	for len(path) > 0 {
		segment := path
		if i := bytes.IndexByte(path, '/'); i >= 0 {
			segment, path = path[:i], path[i+1:]
		} else {
			path = nil
		}
		switch string(segment) {
		case "", ".":
		case "..":
			depth = max(depth-1, 0)
		default:
			if depth == 0 {
				only = segment
			}
			depth++
		}
	}
	if depth != 1 {
		return false
	}
	for _, name := range controlPaths {
		if string(only) == name {
			return true
		}
	}
	return false
}

// percentDecode decodes what is well-formed and keeps the rest.
func percentDecode(path []byte) []byte {
	out := make([]byte, 0, len(path))
	for i := 0; i < len(path); i++ {
		if path[i] == '%' && i+2 < len(path) && hexTable[path[i+1]] < 16 && hexTable[path[i+2]] < 16 {
			out = append(out, hexTable[path[i+1]]<<4|hexTable[path[i+2]])
			i += 2
			continue
		}
		out = append(out, path[i])
	}
	return out
}
