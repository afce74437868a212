package netdev

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const sysctlDir = "/proc/sys/net/"

// sysctl is one setting below /proc/sys/net, which shows the namespace of the thread that opens it.
type sysctl struct {
	path, value string
	optional    bool // absent on some kernels, and nothing is lost without it
}

// guestSysctls are set inside, before eth0 exists. With a tap the namespace is a router, and all that it tells the machine is what was
// refused.
func guestSysctls(ipv6, tap bool) []sysctl {
	forward, errorInterval := "0", "1000"
	if tap {
		forward, errorInterval = "1", "0" // every refusal is told, and what they cost is bounded by icmp_msgs_per_sec
	}
	settings := []sysctl{
		// A new namespace inherits the host's IPv4 settings, and a node forwards. First, because it resets others.
		{path: "ipv4/ip_forward", value: forward},
		{path: "ipv4/ip_unprivileged_port_start", value: "0"},       // port 80 for everyone: who else would want it
		{path: "ipv4/ping_group_range", value: "0 2147483647"},      // ping without privilege
		{path: "ipv4/conf/all/accept_redirects", value: "0"},        // the way out is fixed
		{path: "ipv4/conf/default/accept_redirects", value: "0"},    //
		{path: "ipv4/conf/default/accept_source_route", value: "0"}, //
		{path: "ipv4/conf/all/rp_filter", value: "1"},
		{path: "ipv4/conf/default/rp_filter", value: "1"},
		{path: "ipv4/conf/all/send_redirects", value: "0"},
		{path: "ipv4/conf/default/send_redirects", value: "0"},
		{path: "ipv4/icmp_ratelimit", value: errorInterval},
		{path: "ipv4/conf/default/arp_ignore", value: "1"}, // asked at one device it does not speak for another
	}
	if !ipv6 {
		return settings
	}
	return append(settings,
		sysctl{path: "ipv6/conf/all/forwarding", value: forward}, // first as well
		sysctl{path: "ipv6/icmp/ratelimit", value: errorInterval},
		sysctl{path: "ipv6/conf/all/disable_ipv6", value: "0"},
		sysctl{path: "ipv6/conf/default/disable_ipv6", value: "0"},
		sysctl{path: "ipv6/conf/default/accept_ra", value: "0"},
		sysctl{path: "ipv6/conf/all/accept_ra", value: "0"},
		sysctl{path: "ipv6/conf/default/autoconf", value: "0"},
		sysctl{path: "ipv6/conf/default/accept_redirects", value: "0"},
		sysctl{path: "ipv6/conf/default/addr_gen_mode", value: "1"}, // no link-local address: both ends know each other
	)
}

// flowSysctls are set inside where a machine's flows are translated. A machine that resumes in another slot brings connections along that
// this namespace knows nothing of: they must not be taken for new ones (loose) but refused, so that both ends learn of it at once. And
// what is not as expected in a connection that it does know is the machine's business (liberal): it would be reset for a lost packet.
func flowSysctls() []sysctl {
	return []sysctl{
		{path: "netfilter/nf_conntrack_tcp_loose", value: "0"},
		{path: "netfilter/nf_conntrack_tcp_be_liberal", value: "1"},
	}
}

// hostDevSysctls are set on the host's end before it goes up.
func hostDevSysctls(dev string, ipv6 bool) []sysctl {
	settings := []sysctl{
		{path: "ipv4/conf/" + dev + "/rp_filter", value: "1"},
		{path: "ipv4/conf/" + dev + "/send_redirects", value: "0"},
		{path: "ipv4/conf/" + dev + "/accept_redirects", value: "0"},
		{path: "ipv4/conf/" + dev + "/forwarding", value: "1"},
	}
	if !ipv6 {
		return settings
	}
	return append(settings,
		sysctl{path: "ipv6/conf/" + dev + "/disable_ipv6", value: "0"},
		sysctl{path: "ipv6/conf/" + dev + "/accept_ra", value: "0"},
		sysctl{path: "ipv6/conf/" + dev + "/accept_redirects", value: "0"},
		sysctl{path: "ipv6/conf/" + dev + "/addr_gen_mode", value: "1"},
	)
}

func writeSysctls(settings []sysctl) error {
	for _, s := range settings {
		err := os.WriteFile(sysctlDir+s.path, []byte(s.value), 0)
		if err != nil && !(s.optional && errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("set %s to %s: %w", s.path, s.value, err)
		}
	}
	return nil
}

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile(sysctlDir + path)
	return string(bytes.TrimSpace(b)), err
}

// forwarding lists the switches that Setup turns on, each with the name of the chain that remembers in the host's table that
// they were off: a note that outlives a crash and goes with the table.
var forwarding = []struct{ path, note string }{
	{"ipv4/ip_forward", "restore_ip_forward"},
	{"ipv6/conf/all/forwarding", "restore_ip6_forward"},
}

// enableForwardingLocked runs in the home namespace, after the table is in place: nothing of ours is ever forwarded without it.
func (n *Network) enableForwardingLocked() error {
	for _, f := range forwarding {
		if !n.ipv6 && strings.HasPrefix(f.path, "ipv6/") {
			continue
		}
		value, err := readSysctl(f.path)
		if err != nil {
			return fmt.Errorf("read %s: %w", f.path, err)
		}
		if value != "0" {
			continue
		}
		if f.path == "ipv6/conf/all/forwarding" {
			if err := n.keepRouterAdvertisements(); err != nil {
				return err
			}
		}
		if err := n.addNoteLocked(f.note); err != nil {
			return fmt.Errorf("note that %s was off: %w", f.path, err)
		}
		if err := writeSysctls([]sysctl{{path: f.path, value: "1"}}); err != nil {
			return err
		}
		n.cfg.Log.Info("forwarding enabled")
	}
	return nil
}

// keepRouterAdvertisements lets devices that learn their IPv6 route from a router go on doing so: a kernel that forwards
// ignores advertisements unless accept_ra is 2, and the host would lose its own way out minutes later.
func (n *Network) keepRouterAdvertisements() error {
	files, err := filepath.Glob(sysctlDir + "ipv6/conf/*/accept_ra")
	if err != nil {
		return err
	}
	for _, file := range files {
		path := strings.TrimPrefix(file, sysctlDir)
		if value, err := readSysctl(path); err != nil || value != "1" {
			continue // also when the device went away meanwhile
		}
		if err := writeSysctls([]sysctl{{path: path, value: "2"}}); err != nil {
			return err
		}
		n.mu.Lock()
		n.raSet = append(n.raSet, path)
		n.mu.Unlock()
	}
	return nil
}

// restoreForwarding turns off what the notes say was off.
func (n *Network) restoreForwarding(notes []string) error {
	var failed []error
	for _, f := range forwarding {
		for _, note := range notes {
			if note == f.note {
				failed = append(failed, writeSysctls([]sysctl{{path: f.path, value: "0"}}))
			}
		}
	}
	n.mu.Lock()
	changed := n.raSet
	n.raSet = nil
	n.mu.Unlock()
	for _, path := range changed {
		failed = append(failed, writeSysctls([]sysctl{{path: path, value: "1", optional: true}}))
	}
	return errors.Join(failed...)
}
