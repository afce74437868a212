package routing

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Kind is what a host name asks for.
type Kind uint8

// The kinds of names. The zero value is none of them.
const (
	KindSandbox Kind = iota + 1 // <port>-<id>[-ignored].<domain>: Port and Sandbox are set
	KindHeaders                 // sandbox.<domain>, localhost, an IP literal: E2b-Sandbox-Id and -Port decide, see ParseHeaders
	KindAPI                     // api.<domain>
)

// Name is a host name, understood.
type Name struct {
	Kind Kind
	Port uint16
	// Sandbox aliases the parsed input and dies with it; where upper case had to be folded it is a copy. A copy inside
	// Name could not work: a slice that points into its own struct dangles when the struct is returned.
	Sandbox []byte
}

// HostError is a name or a pair of headers that routes nowhere. Reason is the body of the 400, text/plain.
type HostError struct {
	Reason string
	coded  *errs.Error
}

// Error returns the contract's text.
func (e *HostError) Error() string { return e.Reason }

// Unwrap lets errs.CodeOf answer Invalid.
func (e *HostError) Unwrap() error { return e.coded }

func hostError(reason string) *HostError {
	return &HostError{Reason: reason, coded: errs.New(errs.Invalid, "%s", reason)}
}

// Made once: a stranger's nonsense costs no allocation.
var (
	errHost          = hostError("Invalid host")
	errSandboxID     = hostError("Invalid sandbox ID")
	errSandboxPort   = hostError("Invalid sandbox port")
	errMissingHeader = hostError("missing header")
)

const (
	// maxSandboxID lets <port>-<id> fit into one DNS label of 63 octets whatever the port.
	maxSandboxID = 63 - len("65535-")
	// maxHost is the longest DNS name in text, with a trailing dot.
	maxHost = 254
)

// Hosts is the fixed set of base domains that an edge serves.
type Hosts struct {
	domains [][]byte // lower case, without dots at the ends
}

// NewHosts takes base domains such as "example.dev". Case is folded and one trailing dot dropped; a port, a wildcard or an IP
// address is an error.
func NewHosts(domains ...string) (*Hosts, error) {
	if len(domains) == 0 {
		return nil, errs.New(errs.Invalid, "no base domain given")
	}
	h := new(Hosts)
	for _, d := range domains {
		name := strings.ToLower(strings.TrimSuffix(d, "."))
		if err := checkDomain(name); err != nil {
			return nil, errs.New(errs.Invalid, "base domain %q: %v", d, err)
		}
		if !slices.ContainsFunc(h.domains, func(have []byte) bool { return string(have) == name }) {
			h.domains = append(h.domains, []byte(name))
		}
	}
	return h, nil
}

func checkDomain(name string) error {
	if strings.Contains(name, ":") {
		return fmt.Errorf("give the name without a port")
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return fmt.Errorf("an IP address has no names below it")
	}
	// The longest name below it is <label of 63>.<domain>.
	if name == "" || len(name) > 253-64 {
		return fmt.Errorf("want 1 to %d characters", 253-64)
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("label %q is not one of a host name", label)
		}
		for i := range len(label) {
			if c := label[i]; !isLower(c) && !isDigit(c) && c != '-' {
				return fmt.Errorf("character %q is not one of a host name", c)
			}
		}
	}
	return nil
}

// Parse understands the value of a Host header, an :authority or an SNI: a name with at most one trailing dot, and at most
// one :port, which is checked and then ignored. Only one label may stand before a base domain. Errors are *HostError. It
// allocates nothing unless the id has upper-case letters or the host is an IPv6 literal.
func (h *Hosts) Parse(host []byte) (Name, error) {
	if len(host) > 0 && host[0] == '[' {
		return parseBracketed(host)
	}
	host, ok := cutPort(host)
	if !ok || len(host) > maxHost {
		return Name{}, errHost
	}
	if isIPv4(host) {
		return Name{Kind: KindHeaders}, nil
	}
	host = bytes.TrimSuffix(host, []byte{'.'})
	for _, c := range host {
		if !isLower(c) && !isDigit(c) && !isUpper(c) && c != '-' && c != '.' && c != '_' {
			return Name{}, errHost // user-info, percent escapes, spaces, anything beyond ASCII
		}
	}
	if equalFold(host, "localhost") {
		return Name{Kind: KindHeaders}, nil
	}
	label, ok := h.label(host)
	if !ok {
		return Name{}, errHost
	}
	switch {
	case equalFold(label, "sandbox"):
		return Name{Kind: KindHeaders}, nil
	case equalFold(label, "api"):
		return Name{Kind: KindAPI}, nil
	}
	return parseLabel(label)
}

// label returns the one label that stands before one of our domains.
func (h *Hosts) label(host []byte) ([]byte, bool) {
	dot := bytes.IndexByte(host, '.')
	if dot <= 0 || dot > 63 {
		return nil, false
	}
	for _, d := range h.domains {
		if equalFold(host[dot+1:], string(d)) {
			return host[:dot], true
		}
	}
	return nil, false
}

// parseLabel reads <port>-<id>[-ignored]. What follows the id is the constant client id that old SDKs append.
func parseLabel(label []byte) (Name, error) {
	portText, rest, found := bytes.Cut(label, []byte{'-'})
	if !found {
		return Name{}, errHost
	}
	id, _, _ := bytes.Cut(rest, []byte{'-'})
	port, ok := parsePort(portText)
	if !ok {
		return Name{}, errSandboxPort
	}
	if slices.ContainsFunc(id, isUpper) {
		id = bytes.ToLower(id)
	}
	if !validSandboxID(id) {
		return Name{}, errSandboxID
	}
	return Name{Kind: KindSandbox, Port: port, Sandbox: id}, nil
}

// ParseHeaders reads the values of E2b-Sandbox-Id and E2b-Sandbox-Port, for names of KindHeaders only; nil or empty means
// that the header is absent. The whole id must match, so unlike in a host name no client id may follow, and case counts.
func ParseHeaders(id, port []byte) (Name, error) {
	switch {
	case len(id) == 0 && len(port) == 0:
		return Name{}, errHost
	case len(id) == 0 || len(port) == 0:
		return Name{}, errMissingHeader
	case !validSandboxID(id):
		return Name{}, errSandboxID
	}
	number, ok := parsePort(port)
	if !ok {
		return Name{}, errSandboxPort
	}
	return Name{Kind: KindSandbox, Port: number, Sandbox: id}, nil
}

func validSandboxID(id []byte) bool {
	if len(id) == 0 || len(id) > maxSandboxID {
		return false
	}
	for _, c := range id {
		if !isLower(c) && !isDigit(c) {
			return false
		}
	}
	return true
}

// parsePort reads 1 to 65535, without sign or leading zeros.
func parsePort(text []byte) (uint16, bool) {
	if len(text) == 0 || len(text) > 5 || text[0] == '0' {
		return 0, false
	}
	n := 0
	for _, c := range text {
		if !isDigit(c) {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return uint16(n), n <= 65535
}

// cutPort drops a :port. A name without one is returned whole; two colons are left for the caller's character check.
func cutPort(host []byte) ([]byte, bool) {
	name, port, found := bytes.Cut(host, []byte{':'})
	if !found {
		return host, true
	}
	_, ok := parsePort(port)
	return name, ok
}

func parseBracketed(host []byte) (Name, error) {
	inside, after, found := bytes.Cut(host[1:], []byte{']'})
	if !found || len(inside) > len("ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255") {
		return Name{}, errHost
	}
	if len(after) > 0 {
		if _, ok := parsePort(after[1:]); after[0] != ':' || !ok {
			return Name{}, errHost
		}
	}
	addr, err := netip.ParseAddr(string(inside))
	if err != nil || !addr.Is6() || addr.Zone() != "" {
		return Name{}, errHost
	}
	return Name{Kind: KindHeaders}, nil
}

// isIPv4 tells whether host is four decimal numbers of 0 to 255 without leading zeros, and nothing else.
func isIPv4(host []byte) bool {
	if len(host) > len("255.255.255.255") {
		return false
	}
	numbers, value, digits := 0, 0, 0
	for i := 0; i <= len(host); i++ {
		if i == len(host) || host[i] == '.' {
			if digits == 0 || value > 255 {
				return false
			}
			numbers, value, digits = numbers+1, 0, 0
			continue
		}
		if !isDigit(host[i]) || digits > 0 && value == 0 {
			return false
		}
		value, digits = value*10+int(host[i]-'0'), digits+1
	}
	return numbers == 4
}

// equalFold compares with a lower-case name, folding ASCII only: Unicode folding would let the Kelvin sign pass for a k.
func equalFold(host []byte, lower string) bool {
	if len(host) != len(lower) {
		return false
	}
	for i, c := range host {
		if isUpper(c) {
			c += 'a' - 'A'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}
