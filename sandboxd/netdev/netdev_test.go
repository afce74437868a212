package netdev

import (
	"net/netip"
	"testing"
)

func TestPlan(t *testing.T) {
	cfg, err := Config{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	check := func(index int, dev, host, guest, host6, guest6, mac string) {
		t.Helper()
		p, err := cfg.plan(index)
		if err != nil {
			t.Errorf("plan(%d): %v", index, err)
			return
		}
		got := [...]string{p.hostDev, p.host.String(), p.guest.String(), p.host6.String(), p.guest6.String(), p.guestMAC.String(), p.netns}
		if want := [...]string{dev, host, guest, host6, guest6, mac, "/run/netns/" + dev}; got != want {
			t.Errorf("plan(%d) = %v, want %v", index, got, want)
		}
	}
	check(0, "sl-0", "10.12.0.0", "10.12.0.1", "fd73:6c75:6963:6500::", "fd73:6c75:6963:6500::1", "02:53:4c:10:00:00")
	check(300, "sl-300", "10.12.2.88", "10.12.2.89", "fd73:6c75:6963:6500::258", "fd73:6c75:6963:6500::259", "02:53:4c:10:01:2c")
	check(32767, "sl-32767", "10.12.255.254", "10.12.255.255", "fd73:6c75:6963:6500::fffe", "fd73:6c75:6963:6500::ffff", "02:53:4c:10:7f:ff")
	for _, index := range []int{-1, 32768, 1 << 40} {
		if _, err := cfg.plan(index); err == nil {
			t.Errorf("plan(%d) succeeded", index)
		}
	}
}

// TestPath: the path of a slot is known before there is one.
func TestPath(t *testing.T) {
	cfg, err := Config{NamePrefix: "sl2"}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	if got := (&Network{cfg: cfg}).Path(17); got != "/run/netns/sl2-17" {
		t.Errorf("Path(17) = %q", got)
	}
}

func TestNames(t *testing.T) {
	cfg, err := Config{NamePrefix: "sl2"}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int{"sl2-0": 0, "sl2-17": 17, "sl2-32767": 32767} {
		if index, ok := cfg.index(name); !ok || index != want {
			t.Errorf("index(%q) = %d, %v, want %d", name, index, ok, want)
		}
	}
	for _, name := range []string{"", "sl2", "sl2-", "sl-20", "sl20", "sl2-01", "sl2-+1", "sl2--1", "sl2-32768", "sl2-1x", "xsl2-1", "sl2-1 "} {
		if index, ok := cfg.index(name); ok {
			t.Errorf("index(%q) = %d, want none", name, index)
		}
	}
}

func TestConfig(t *testing.T) {
	p := netip.MustParsePrefix
	check := func(c Config, capacity int) {
		t.Helper()
		c, err := c.withDefaults()
		if (err == nil) != (capacity > 0) {
			t.Errorf("withDefaults of %+v: %v", c, err)
			return
		}
		if err == nil && c.capacity() != capacity {
			t.Errorf("capacity of %s and %s = %d, want %d", c.Prefix, c.Prefix6, c.capacity(), capacity)
		}
	}
	check(Config{}, 32768)
	check(Config{Prefix: p("10.200.0.0/24")}, 128)
	check(Config{Prefix: p("10.200.0.8/31")}, 1)
	check(Config{Prefix6: p("fd00::/126")}, 2)
	check(Config{Prefix: p("10.0.0.0/8")}, 100000)
	check(Config{Prefix: p("10.0.0.1/32")}, 0)
	check(Config{Prefix: p("fd00::/64")}, 0)
	check(Config{Prefix6: p("10.0.0.0/8")}, 0)
	check(Config{Prefix6: p("::ffff:10.0.0.0/104")}, 0)
	check(Config{NamePrefix: "toolongname"}, 0)
	check(Config{NamePrefix: "a-b"}, 0)
	check(Config{NamePrefix: "A"}, 0)
}

// TestOwnLinkOfMachines: a slot's own addresses cannot be those that every machine has.
func TestOwnLinkOfMachines(t *testing.T) {
	check := func(cfg Config, wantOK bool) {
		t.Helper()
		if _, err := cfg.withDefaults(); (err == nil) != wantOK {
			t.Errorf("%s and %s with tap %v: %v, want ok %v", cfg.Prefix, cfg.Prefix6, cfg.Tap, err, wantOK)
		}
	}
	check(Config{Tap: true}, true)
	check(Config{Tap: true, Prefix: netip.MustParsePrefix("169.254.0.0/16")}, false)
	check(Config{Tap: true, Prefix: netip.MustParsePrefix("169.254.0.22/31")}, false)
	check(Config{Tap: true, Prefix: netip.MustParsePrefix("169.254.1.0/24")}, true)
	check(Config{Tap: true, Prefix6: netip.MustParsePrefix("fd73:6c75:6963:65ff::/64")}, false)
	check(Config{Tap: true, Prefix6: netip.MustParsePrefix("fd73:6c75:6963::/48")}, false)
	check(Config{Prefix: netip.MustParsePrefix("169.254.0.0/16")}, true)
	for _, link := range links() {
		if !link.Contains(GuestConstant) && !link.Contains(GuestConstant6) || !link.Contains(GuestGateway) && !link.Contains(GuestGateway6) {
			t.Errorf("%s is not the link of a machine and its gateway", link)
		}
	}
}
