package egress

import (
	"flag"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

var update = flag.Bool("update", false, "rewrite testdata/*.golden")

// What a machine behind a tap has.
var (
	machineMAC        = net.HardwareAddr{0x02, 'S', 'L', 0, 0, 2}
	machine, machine6 = netip.MustParseAddr("169.254.0.21"), netip.MustParseAddr("fd73:6c75:6963:65ff::2")
)

// rulesets are the golden ones: each policy of the API's documentation in the places where it can be in force.
func rulesets(t *testing.T) map[string]Ruleset {
	no := false
	guest, guest6 := netip.MustParseAddr("10.12.0.1"), netip.MustParseAddr("fd73:6c75:6963:6500::1")
	mixed := parse(t, nil, "1.1.1.1 8.8.8.0/24 2606:4700::/32 255.255.255.255", "9.9.9.0/31 9.9.9.9 9.9.9.10 8000::/1 ffff::/16")
	mixed.Protected = []netip.Prefix{netip.MustParsePrefix("5.6.7.8/32"), netip.MustParsePrefix("2a01:4f8:77::8/128")}
	return map[string]Ruleset{
		"open":        Compile(parse(t, nil, "", ""), Local(guest, guest6)),
		"no-internet": Compile(parse(t, &no, "", ""), Local(guest, guest6)),
		"allow-list":  Compile(parse(t, nil, "1.1.1.1 8.8.8.0/24", "0.0.0.0/0"), Local(guest, guest6)),
		"deny-list":   Compile(parse(t, nil, "", "8.8.8.8"), Local(guest, netip.Addr{})),
		"mixed":       Compile(mixed, Local()),
		"tap":         Compile(mixed, Forwarded("tap0", machineMAC, machine, machine6)),
	}
}

func TestGolden(t *testing.T) {
	for name, r := range rulesets(t) {
		path := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(path, []byte(r.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.String(); got != string(want) {
			t.Errorf("%s differs from %s; run with -update after looking at it:\n%s", name, path, got)
		}
	}
}

// TestCompileIsPure: compiling twice gives the same, and compiling leaves the policy as it was.
func TestCompileIsPure(t *testing.T) {
	p := parse(t, nil, "1.1.1.1 8.8.8.0/24", "0.0.0.0/0")
	allow := join(p.Allow)
	first, second := Compile(p, Local()).String(), Compile(p, Local()).String()
	if first != second || join(p.Allow) != allow {
		t.Error("Compile gave two texts for one policy, or changed it")
	}
}
