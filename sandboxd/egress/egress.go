// Package egress fences what a sandbox may reach: a Policy, as the API states it, is compiled by a pure function into a Ruleset,
// a value with a text form in nft's own syntax, and Apply gives that to the kernel in one transaction inside the sandbox's network
// namespace. The namespace belongs to the host, so nothing inside the sandbox can alter it, and removing the namespace
// removes the rules. Making namespaces is sandboxd/netdev's business; this package only enters them.
//
// # What is decided, and in which order
//
// Every packet is judged by where it goes, also those of flows in progress: so a new ruleset holds for old flows from its first
// instant, without a list of what was allowed once. In order: ranges that no sandbox may ever reach (Reserved, and the policy's
// Protected); the allow list; the deny list; and what is left is allowed. Of what is allowed, a packet that begins a flow is
// refused while the sandbox has MaxFlows of them. A new ruleset begins to count at zero, so for as long as older flows last there
// may be more; the host's table, which counts on, is the second fence.
//
// What is refused is refused visibly: TCP with a reset, everything else with ICMP "administratively prohibited", so that a program
// sees it when it connects instead of waiting. Each reason has its counter.
//
// # A virtual machine
//
// Behind a tap (Forwarded) whoever is root can send any frame, not only packets. So there is a second table in the same transaction, which
// sees each frame before the kernel makes anything of it, and lets pass what an ordinary host sends to its gateway. What it drops is counted
// and, unlike a refusal, not answered.
package egress

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"

	"github.com/sluice-edge/sluice/internal/errs"
)

// MaxEntries bounds each list of a policy. The kernel would take more; a request of this size is already a mistake.
const MaxEntries = 1000

// DefaultMaxFlows is four times what a busy browser or a crawler keeps open, and a thirtieth of what a host tracks by default
// (net.netfilter.nf_conntrack_max is 262144): one sandbox cannot fill that table, which it shares with the node and its neighbours.
const DefaultMaxFlows = 8192

// Policy is what a sandbox may reach. The zero value reaches nothing.
type Policy struct {
	AllowInternet bool           // false: nothing but Allow
	Allow         []netip.Prefix // wins over Deny; without a deny it changes nothing
	Deny          []netip.Prefix
	Protected     []netip.Prefix // the node's own addresses, and whatever else its operator keeps from sandboxes; Allow does not open them
	MaxFlows      uint32         // to the outside at a time, closed ones not counted; zero means DefaultMaxFlows
}

// reserved is what no sandbox may reach, whatever its policy says: everything that is not a public unicast address, and the
// translations that would lead back to such an address. It holds the contract's list and closes the gaps in it.
var reserved = []string{
	"0.0.0.0/8",       // this network; Linux connects 0.0.0.0 to itself
	"10.0.0.0/8",      // private
	"100.64.0.0/10",   // carrier-grade NAT, which some clouds use for their own services
	"127.0.0.0/8",     // loopback
	"169.254.0.0/16",  // link-local: the metadata service of every cloud
	"172.16.0.0/12",   // private
	"192.0.0.0/24",    // protocol assignments
	"192.0.2.0/24",    // documentation; some use it inside, E2B for its node service
	"192.88.99.0/24",  // 6to4 relays, gone
	"192.168.0.0/16",  // private
	"198.18.0.0/15",   // benchmarks
	"198.51.100.0/24", // documentation
	"203.0.113.0/24",  // documentation
	"224.0.0.0/4",     // multicast
	"240.0.0.0/4",     // reserved, and broadcast

	// Public IPv6 is 2000::/3. Left and right of it: unspecified, loopback, IPv4-mapped (::ffff:0:0/96), NAT64 (64:ff9b::/96 and
	// 64:ff9b:1::/48, which lead to IPv4 addresses past these rules), unique local, link-local, site-local, multicast.
	"::/3", "4000::/2", "8000::/1",
	"2001::/23",     // protocol assignments, Teredo among them
	"2001:db8::/32", // documentation
	"2002::/16",     // 6to4: any IPv4 address in disguise
	"3fff::/20",     // documentation
}

// Reserved returns the ranges that are always refused.
func Reserved() []netip.Prefix {
	prefixes := make([]netip.Prefix, len(reserved))
	for i, text := range reserved {
		prefixes[i] = netip.MustParsePrefix(text)
	}
	return prefixes
}

// allTraffic is the SDKs' ALL_TRAFFIC. In both lists it means all traffic, so it stands for ::/0 as well: the SDKs have no other
// word for it, and a sandbox that was told to deny everything must not be left with IPv6.
const allTraffic = "0.0.0.0/0"

var (
	all4 = netip.MustParsePrefix(allTraffic)
	all6 = netip.MustParsePrefix("::/0")
)

// ParsePolicy reads the three fields of the API. Errors are errs.Invalid with the contract's messages. allowInternet false denies
// everything in place of denyOut, and the allow list still wins; nil means true. Addresses are normalised: IPv4-mapped IPv6 becomes
// IPv4, a bare address its single-address prefix, host bits are cleared, and overlapping entries are merged.
func ParsePolicy(allowInternet *bool, allowOut, denyOut []string) (Policy, error) {
	if len(allowOut) > MaxEntries || len(denyOut) > MaxEntries {
		return Policy{}, errs.New(errs.Invalid, "allow out and deny out take at most %d entries each", MaxEntries)
	}
	p := Policy{AllowInternet: allowInternet == nil || *allowInternet}
	var allow, deny []netip.Prefix
	for _, entry := range denyOut {
		prefixes, ok := parseEntry(entry)
		if !ok {
			return Policy{}, errs.New(errs.Invalid, "invalid denied CIDR %s", shown(entry))
		}
		deny = append(deny, prefixes...)
	}
	var domain string
	for _, entry := range allowOut {
		prefixes, ok := parseEntry(entry)
		switch {
		case ok:
			allow = append(allow, prefixes...)
		case !isDomain(entry):
			return Policy{}, errs.New(errs.Invalid, "invalid allowed address %s", shown(entry))
		case domain == "":
			domain = entry
		}
	}
	if domain != "" {
		if !slices.Contains(denyOut, allTraffic) {
			return Policy{}, errs.New(errs.Invalid,
				"When specifying allowed domains in allow out, you must include 'ALL_TRAFFIC' in deny out to block all other traffic.")
		}
		return Policy{}, errs.New(errs.Invalid,
			"domain rules are not supported by this version yet: replace %s in allow out by addresses or CIDRs", domain)
	}
	p.Allow, p.Deny = setOf(allow).Prefixes(), setOf(deny).Prefixes()
	return p, nil
}

// parseEntry reads an address or a CIDR. Unspecified addresses are refused but for the two that say everything.
func parseEntry(entry string) ([]netip.Prefix, bool) {
	switch entry {
	case allTraffic:
		return []netip.Prefix{all4, all6}, true
	case "::/0":
		return []netip.Prefix{all6}, true
	}
	var prefix netip.Prefix
	if addr, err := netip.ParseAddr(entry); err == nil {
		if addr.Zone() != "" {
			return nil, false
		}
		prefix = netip.PrefixFrom(addr, addr.BitLen())
	} else if prefix, err = netip.ParsePrefix(entry); err != nil { // which refuses zones
		return nil, false
	}
	if addr := prefix.Addr(); addr.Is4In6() {
		if prefix.Bits() < 96 {
			return nil, false // neither IPv4 nor, in earnest, IPv6
		}
		prefix = netip.PrefixFrom(addr.Unmap(), prefix.Bits()-96)
	}
	prefix = prefix.Masked()
	return []netip.Prefix{prefix}, !prefix.Addr().IsUnspecified()
}

// isDomain reports whether entry could name hosts: a name, "*" for every name, or "*." and a name.
func isDomain(entry string) bool {
	if entry == "*" {
		return true
	}
	name := strings.TrimSuffix(strings.TrimPrefix(entry, "*."), ".")
	if name == "" || len(name) > 253 {
		return false
	}
	labels := strings.Split(name, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if !isLetter(c) && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	// A name that ends in a number is an address that went wrong (1.2.3.400).
	return strings.ContainsFunc(labels[len(labels)-1], func(r rune) bool { return r > 0x7f || isLetter(byte(r)) })
}

func isLetter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

// shown is an entry as an error message shows it: whole, unless it is longer than any address or name.
func shown(entry string) string {
	if len(entry) > 253 {
		return entry[:253] + "..."
	}
	return entry
}

// setOf merges prefixes. They are valid, so the builder cannot fail.
func setOf(prefixes []netip.Prefix) *netipx.IPSet {
	var builder netipx.IPSetBuilder
	for _, p := range prefixes {
		builder.AddPrefix(p)
	}
	set, err := builder.IPSet()
	if err != nil {
		panic(fmt.Sprintf("BUG: merge of parsed prefixes: %v", err))
	}
	return set
}

// Verdict is what a ruleset says of a destination.
type Verdict uint8

// The verdicts, in the order in which they are looked for.
const (
	RefusedReserved Verdict = iota // reserved or protected
	Allowed                        // on the allow list, or on no list
	RefusedDenied                  // on the deny list
)

// Refusals counts what was turned away, in packets: one for a connection attempt, as many as were sent for a flow that was cut.
type Refusals struct {
	Reserved uint64 // to addresses that no sandbox may reach
	Denied   uint64 // to addresses that the policy denies
	Spoofed  uint64 // with a source address that is not the sandbox's
	Inbound  uint64 // unasked from outside
	Flows    uint64 // that would have begun one flow too many
	Frames   uint64 // from a machine, that are no packets of an ordinary host to its gateway
	Stale    uint64 // from a machine, of connections that are unknown here: it had them before it was paused, or before the rules cut them
}

// Reasons returns the counts by the label that metrics give them.
func (r Refusals) Reasons() map[string]uint64 {
	return map[string]uint64{
		reasonReserved: r.Reserved, reasonDenied: r.Denied, reasonSpoofed: r.Spoofed, reasonInbound: r.Inbound, reasonFlows: r.Flows,
		reasonFrame: r.Frames, reasonStale: r.Stale,
	}
}

// The typed list of reasons; also the names of the kernel's counters.
const (
	reasonReserved = "reserved"
	reasonDenied   = "denied"
	reasonSpoofed  = "spoofed"
	reasonInbound  = "inbound"
	reasonFlows    = "flows"
	reasonFrame    = "frame"
	reasonStale    = "stale"
)
