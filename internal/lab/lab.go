// Package lab is a network laboratory for tests: a network namespace called the host, where Sluice runs, and behind its one
// cable an internet of our own, with servers on the addresses that documentation and users name (1.1.1.1, 8.8.8.8 and so on),
// over IPv4 and IPv6, plaintext and TLS. Behind the same cable lie traps: the private, link-local and metadata addresses that no
// sandbox may ever reach. Everything that arrives is recorded, so a test can say what got out and, above all, that something did
// not. The servers run in the test process; nothing touches the machine's own network.
//
// It needs root on Linux; elsewhere New skips the test. A Lab lives in open file descriptors and in the mount namespace that they
// keep: the kernel removes it when the test process ends, however it ends.
package lab

import (
	"net/netip"
	"time"
)

// Addresses of the host on its cable, public ones on purpose: a test can then see that a node's own address is closed for another
// reason than being private.
var (
	HostAddr  = netip.MustParseAddr("5.6.7.8")
	HostAddr6 = netip.MustParseAddr("2a01:4f8:77::8")

	gateway  = netip.MustParseAddr("5.6.7.1")
	gateway6 = netip.MustParseAddr("2a01:4f8:77::1")
)

// Internet lists the addresses with servers on them, Traps one address in each range that must stay out of reach. All of the
// ranges answer, not only these addresses.
var (
	Internet = addrs("1.1.1.1", "1.0.0.1", "8.8.8.8", "8.8.4.4", "9.9.9.9", "93.184.215.14", "140.82.121.3",
		"2606:4700:4700::1111", "2001:4860:4860::8888")
	Traps = addrs("169.254.169.254", "10.99.0.1", "172.16.99.1", "192.168.99.1", "100.64.99.1", "198.18.0.99", "192.0.2.1",
		"fd00:99::1", "64:ff9b::a9fe:a9fe", "2001:db8::99")
)

var trapRanges = prefixes("10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
	"192.168.0.0/16", "198.18.0.0/15", "240.0.0.0/5", "64:ff9b::/96", "2001:db8::/32", "fc00::/7")

// Ports of every server, beside 53 (DNS), 80 (HTTP) and 443 (HTTPS).
const (
	PortEcho   = 7    // TCP and UDP: what came goes back
	PortStream = 9000 // TCP: bytes without end; UDP: one datagram starts a stream of them
	PortSink   = 9001 // TCP and UDP: swallows and counts, see Lab.Sunk
)

// Hit is one arrival at a server: a connection accepted, a request read, or a datagram.
type Hit struct {
	Proto string // "tcp", "udp", "http", "https", "dns"
	At    netip.AddrPort
	From  netip.AddrPort
	Name  string // the Host of a request, the name asked for
	Time  time.Time
}

func addrs(texts ...string) (list []netip.Addr) {
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

func prefixes(texts ...string) (list []netip.Prefix) {
	for _, text := range texts {
		list = append(list, netip.MustParsePrefix(text))
	}
	return list
}
