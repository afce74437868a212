package guest

import (
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

const nodeCmdline = "console=ttyS0 panic=-1 quiet loglevel=4 sluice.ip=169.254.0.21/30 sluice.gw=169.254.0.22 sluice.gwmac=02:53:4c:00:00:01 " +
	"sluice.ip6=fd73:6c75:6963:65ff::2/126 sluice.gw6=fd73:6c75:6963:65ff::1\n"

func TestParseNetwork(t *testing.T) {
	want := Network{
		Addr: netip.MustParsePrefix("169.254.0.21/30"), Gateway: netip.MustParseAddr("169.254.0.22"),
		Addr6: netip.MustParsePrefix("fd73:6c75:6963:65ff::2/126"), Gateway6: netip.MustParseAddr("fd73:6c75:6963:65ff::1"),
		GatewayMAC: net.HardwareAddr{2, 0x53, 0x4c, 0, 0, 1},
	}
	got, err := parseNetwork(nodeCmdline)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("parseNetwork = %+v, %v", got, err)
	}
	if text := want.Cmdline(); !strings.Contains(nodeCmdline, text) {
		t.Errorf("Cmdline = %q", text)
	}
	good := func(line string, want Network) {
		t.Helper()
		if got, err := parseNetwork(line); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("parseNetwork(%q) = %+v, %v, want %+v", line, got, err, want)
		}
	}
	good("", Network{})
	good("console=ttyS0 sluice.later=1 ip=dhcp", Network{})
	good("sluice.ip=10.0.0.1/8 sluice.ip=10.0.0.2/8", Network{Addr: netip.MustParsePrefix("10.0.0.2/8")})
	bad := func(line, want string) {
		t.Helper()
		if got, err := parseNetwork(line); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("parseNetwork(%q) = %+v, %v, want %q", line, got, err, want)
		}
	}
	bad("sluice.ip=", "sluice.ip")
	bad("sluice.ip=10.0.0.1", "sluice.ip")
	bad("sluice.ip=::1/64", "want an IPv4 address")
	bad("sluice.ip6=10.0.0.1/8", "want an IPv6 address")
	bad("sluice.gw=10.0.0.1", "want a neighbour")
	bad("sluice.ip=10.0.0.2/8 sluice.gw=11.0.0.1 sluice.gwmac=02:00:00:00:00:01", "want a neighbour")
	bad("sluice.ip=10.0.0.2/8 sluice.gw=10.0.0.2 sluice.gwmac=02:00:00:00:00:01", "want a neighbour")
	bad("sluice.ip=10.0.0.2/8 sluice.gw=10.0.0.1", "sluice.gwmac is missing")
	bad("sluice.gwmac=01:00:00:00:00:01", "one Ethernet card")
	bad("sluice.gwmac=02:00:00:00:00:00:00:01", "one Ethernet card")
}

// Whatever the line says, what comes out of it says the same again, and can be set up.
func FuzzParseNetwork(f *testing.F) {
	f.Add(nodeCmdline)
	f.Add("sluice.ip=1.2.3.4/32")
	f.Add("sluice.ip6=fe80::1%eth0/64 sluice.gw6=fe80::2%eth0 sluice.gwmac=02-00-00-00-00-01")
	f.Add("sluice.ip=::ffff:1.2.3.4/96")
	f.Fuzz(func(t *testing.T, line string) {
		n, err := parseNetwork(line)
		if err != nil {
			if !reflect.DeepEqual(n, Network{}) {
				t.Errorf("parseNetwork(%q) = %+v beside %v", line, n, err)
			}
			return
		}
		if again, err := parseNetwork(n.Cmdline()); err != nil || !reflect.DeepEqual(again, n) {
			t.Errorf("parseNetwork(%q) = %+v, of its own line %+v, %v", line, n, again, err)
		}
		if n.Gateway.IsValid() && !n.Addr.Contains(n.Gateway) || n.Gateway6.IsValid() && !n.Addr6.Contains(n.Gateway6) {
			t.Errorf("parseNetwork(%q) = %+v: a gateway out of reach", line, n)
		}
	})
}
