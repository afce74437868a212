package netdev

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/lab"
)

// TestTapInside: what a machine finds in front of it.
func TestTapInside(t *testing.T) {
	l := lab.New(t)
	n := newNetworkWith(t, l, Config{Tap: true})
	slot := acquire(t, n, 5)
	for path, want := range map[string]string{
		"ipv4/ip_forward":                                      "1",
		"ipv4/conf/tap0/rp_filter":                             "1",
		"ipv4/conf/tap0/accept_redirects":                      "0",
		"ipv4/conf/tap0/accept_source_route":                   "0",
		"ipv4/conf/tap0/send_redirects":                        "0",
		"ipv4/conf/tap0/forwarding":                            "1",
		"ipv6/conf/tap0/forwarding":                            "1",
		"ipv6/conf/eth0/forwarding":                            "1",
		"ipv6/conf/tap0/accept_ra":                             "0",
		"ipv6/conf/tap0/accept_redirects":                      "0",
		"netfilter/nf_conntrack_tcp_loose":                     "0",
		"netfilter/nf_conntrack_tcp_be_liberal":                "1",
		"ipv4/conf/all/send_redirects":                         "0",
		"ipv6/conf/eth0/accept_ra":                             "0",
		"ipv6/conf/default/accept_source_route":                "0",
		"ipv4/conf/default/accept_source_route":                "0",
		"ipv4/conf/default/arp_ignore":                         "1",
		"ipv4/conf/default/route_localnet":                     "0",
		"ipv6/conf/default/proxy_ndp":                          "0",
		"ipv4/conf/default/proxy_arp":                          "0",
		"ipv4/icmp_ratelimit":                                  "0",
		"ipv6/conf/default/seg6_enabled":                       "0",
		"ipv6/conf/default/drop_unsolicited_na":                "0",
		"ipv4/conf/default/accept_local":                       "0",
		"ipv4/conf/default/bootp_relay":                        "0",
		"ipv4/conf/default/mc_forwarding":                      "0",
		"ipv6/conf/default/mc_forwarding":                      "0",
		"ipv4/conf/default/igmpv3_unsolicited_report_interval": "1000",
	} {
		var got string
		if err := lab.Enter(slot.NetNS, func() { got, _ = readSysctl(path) }); err != nil {
			t.Fatal(err)
		}
		if got != want {
			t.Errorf("%s = %q inside, want %q", path, got, want)
		}
	}
	out := programIn(t, slot.NetNS, "ip", "-o", "addr")
	for _, want := range []string{"169.254.0.22/30", "fd73:6c75:6963:65ff::1/126", "10.12.0.11/31", "fd73:6c75:6963:6500::b/127"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %s among the addresses inside:\n%s", want, out)
		}
	}
	for _, not := range []string{GuestConstant.String(), GuestConstant6.String(), "fe80"} {
		if strings.Contains(out, not) {
			t.Errorf("%s is an address inside:\n%s", not, out)
		}
	}
	if out := programIn(t, slot.NetNS, "ip", "-d", "link", "show", TapName); !strings.Contains(out, TapMAC.String()) || !strings.Contains(out, "persist on") {
		t.Errorf("the tap is\n%s\nwant it to have %s and to stay", out, TapMAC)
	}
	want := "snat ip to 10.12.0.11 snat ip6 to fd73:6c75:6963:6500::b"
	if out := programIn(t, slot.NetNS, "nft", "list", "table", "inet", natTable); !containsWords(out, want) {
		t.Errorf("the translation is\n%s\nwant in it %s", out, want)
	}
	mac := net.HardwareAddr{0x06, 1, 2, 3, 4, 5}
	for range 2 {
		if err := slot.SetGuest(mac); err != nil {
			t.Fatal(err)
		}
	}
	out = programIn(t, slot.NetNS, "ip", "neigh", "show", "dev", TapName)
	for _, addr := range []netip.Addr{GuestConstant, GuestConstant6} {
		if want := fmt.Sprintf("%s lladdr %s PERMANENT", addr, mac); !strings.Contains(out, want) {
			t.Errorf("the neighbours are\n%s\nwant among them %s", out, want)
		}
	}
}

// containsWords reports whether the words are in text in this order.
func containsWords(text, words string) bool {
	for _, word := range strings.Fields(words) {
		_, after, ok := strings.Cut(text, word)
		if !ok {
			return false
		}
		text = after
	}
	return true
}

// TestOpenTap: there is one way into the tap at a time, and none to a tap that is not there.
func TestOpenTap(t *testing.T) {
	l := lab.New(t)
	n := newNetworkWith(t, l, Config{Tap: true})
	slot := acquire(t, n, 3)
	for range 2 { // the device stays when its descriptor goes
		tap, err := slot.OpenTap()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := slot.OpenTap(); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "slot 3") {
			t.Errorf("OpenTap of a tap that is open = %v, want EBUSY that names the slot", err)
		}
		raw, err := tap.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := raw.Control(func(fd uintptr) {
			size, err := unix.IoctlGetInt(int(fd), unix.TUNGETVNETHDRSZ)
			if err != nil || size != vnetHeaderSize {
				t.Errorf("the header has %d bytes, %v, want %d", size, err, vnetHeaderSize)
			}
		}); err != nil {
			t.Fatal(err)
		}
		if err := tap.Close(); err != nil {
			t.Fatal(err)
		}
	}
	programIn(t, slot.NetNS, "ip", "link", "del", TapName)
	if _, err := slot.OpenTap(); !errors.As(err, &netlink.LinkNotFoundError{}) {
		t.Errorf("OpenTap without a tap = %v, want that it is not there", err)
	}
	if out := programIn(t, slot.NetNS, "ip", "-o", "link"); strings.Contains(out, TapName) {
		t.Errorf("OpenTap made a device of its own:\n%s", out)
	}
	if err := slot.SetGuest(TapMAC); err == nil {
		t.Error("SetGuest without a tap succeeded")
	}
	if err := n.Release(t.Context(), 3); err != nil {
		t.Fatal(err)
	}
	if _, err := slot.OpenTap(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("OpenTap of a released slot = %v, want net.ErrClosed", err)
	}
}

// TestAdoptTap: a slot for a machine is taken over with its machine plugged in, and its translation is put back. One that is not whole,
// or not for a machine, is not.
func TestAdoptTap(t *testing.T) {
	l := lab.New(t)
	first := newNetworkWith(t, l, Config{Tap: true})
	slot, err := first.Acquire(t.Context(), 9)
	if err != nil {
		t.Fatal(err)
	}
	tap, err := slot.OpenTap()
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	programIn(t, slot.NetNS, "nft", "flush", "ruleset")

	second := newNetworkWith(t, l, Config{Tap: true})
	adopted, err := second.Adopt(9)
	if err != nil {
		t.Fatal(err)
	}
	if out := programIn(t, slot.NetNS, "nft", "list", "ruleset"); !containsWords(out, "snat ip to 10.12.0.19 snat ip6 to") {
		t.Errorf("the translation is\n%s", out)
	}
	if _, err := adopted.OpenTap(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("OpenTap = %v, want EBUSY: the machine is plugged in", err)
	}
	refused := func(what string) {
		t.Helper()
		if _, err := second.Adopt(9); err == nil {
			t.Errorf("Adopt took a slot %s", what)
		}
	}
	programIn(t, slot.NetNS, "ip", "addr", "del", GuestGateway.String()+"/30", "dev", TapName)
	refused("without the gateway's address")
	programIn(t, slot.NetNS, "ip", "addr", "add", GuestGateway.String()+"/30", "dev", TapName)
	programIn(t, slot.NetNS, "ip", "link", "set", TapName, "address", "02:00:00:00:00:01")
	refused("whose tap has another hardware address")
	programIn(t, slot.NetNS, "ip", "link", "set", TapName, "address", TapMAC.String())
	if _, err := second.Adopt(9); err != nil {
		t.Errorf("Adopt of a slot that is whole again: %v", err)
	}
	programIn(t, slot.NetNS, "ip", "link", "del", TapName)
	refused("without a tap")
	programIn(t, slot.NetNS, "ip", "link", "add", TapName, "address", TapMAC.String(), "type", "veth")
	programIn(t, slot.NetNS, "ip", "addr", "add", GuestGateway.String()+"/30", "dev", TapName)
	programIn(t, slot.NetNS, "ip", "addr", "add", GuestGateway6.String()+"/126", "dev", TapName)
	programIn(t, slot.NetNS, "ip", "link", "set", TapName, "up")
	refused("with another device in the tap's place")
	if err := second.Release(t.Context(), 9); err != nil {
		t.Fatal(err)
	}

	namespaces := newNetwork(t, l)
	acquire(t, namespaces, 9)
	refused("for processes, as one for a machine")
	acquire(t, second, 8)
	if _, err := namespaces.Adopt(8); err == nil {
		t.Error("Adopt took a slot for a machine, as one for processes")
	}
}

// TestTapKilledAnywhere is TestKilledAnywhere with a tap.
func TestTapKilledAnywhere(t *testing.T) {
	killAnywhere(t, Config{Tap: true}, "mount point", "namespace", "veth", "tap", "guest", "host")
}

// TestTapGoes: the tap of a released slot is gone although a process has it open, and the next tenant of the slot has one of its own.
func TestTapGoes(t *testing.T) {
	l := lab.New(t)
	n := newNetworkWith(t, l, Config{Tap: true})
	slot := acquire(t, n, 2)
	left, err := slot.OpenTap()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Release(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	if _, err := left.Write(make([]byte, vnetHeaderSize+60)); !errors.Is(err, unix.EBADFD) && !errors.Is(err, unix.EIO) {
		t.Errorf("a frame to the tap of a released slot: %v, want that the device is gone", err)
	}
	next := acquire(t, n, 2)
	tap, err := next.OpenTap()
	if err != nil {
		t.Errorf("the next tenant, while a process of the one before has not ended: %v", err)
	} else {
		tap.Close()
	}
	if err := left.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		t.Fatal(err)
	}
}
