package egress

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/internal/errs"
)

func TestParsePolicy(t *testing.T) {
	yes, no := true, false
	check := func(internet *bool, allow, deny, wantAllow, wantDeny string) {
		t.Helper()
		p, err := ParsePolicy(internet, strings.Fields(allow), strings.Fields(deny))
		if err != nil {
			t.Errorf("ParsePolicy(%q, %q): %v", allow, deny, err)
			return
		}
		if got := join(p.Allow); got != wantAllow {
			t.Errorf("ParsePolicy(%q, %q) allows %s, want %s", allow, deny, got, wantAllow)
		}
		if got := join(p.Deny); got != wantDeny {
			t.Errorf("ParsePolicy(%q, %q) denies %s, want %s", allow, deny, got, wantDeny)
		}
		if want := internet == nil || *internet; p.AllowInternet != want {
			t.Errorf("ParsePolicy(%v).AllowInternet = %v", want, p.AllowInternet)
		}
	}
	check(nil, "", "", "", "")
	check(&yes, "1.1.1.1", "", "1.1.1.1/32", "")
	check(&no, "8.8.8.0/24", "9.9.9.9", "8.8.8.0/24", "9.9.9.9/32")
	check(nil, "", "0.0.0.0/0", "", "0.0.0.0/0 ::/0")
	check(nil, "0.0.0.0/0", "::/0", "0.0.0.0/0 ::/0", "::/0")
	check(nil, "", "1.2.3.4/24 1.2.3.0/25 1.2.3.200", "", "1.2.3.0/24") // host bits, overlap
	check(nil, "", "1.2.2.0/24 1.2.3.0/24", "", "1.2.2.0/23")           // neighbours
	check(nil, "2606:4700:4700::1111", "2606:4700::1/32", "2606:4700:4700::1111/128", "2606:4700::/32")
	check(nil, "", "::ffff:1.2.3.4 ::ffff:1.2.3.0/120", "", "1.2.3.0/24")             // IPv4 in IPv6's clothes
	check(nil, "10.0.0.0/8 255.255.255.255", "", "10.0.0.0/8 255.255.255.255/32", "") // accepted, and refused by the rules
	check(nil, "1.1.1.1 1.1.1.1", "", "1.1.1.1/32", "")
}

func TestParsePolicyRefuses(t *testing.T) {
	const domainsNeedDeny = "When specifying allowed domains in allow out, you must include 'ALL_TRAFFIC' in deny out to block all other traffic."
	check := func(allow, deny, want string) {
		t.Helper()
		var allowOut, denyOut []string
		if allow != "" {
			allowOut = strings.Split(allow, ",")
		}
		if deny != "" {
			denyOut = strings.Split(deny, ",")
		}
		_, err := ParsePolicy(nil, allowOut, denyOut)
		if errs.CodeOf(err) != errs.Invalid || errs.Message(err) != want {
			t.Errorf("ParsePolicy(%q, %q) = %v, want Invalid %q", allow, deny, err, want)
		}
	}
	for _, deny := range []string{
		"example.com", "*", "0.0.0.0", "0.0.0.0/24", "0.0.0.5/0", "::", "::/128", "::5/0", "1.2.3.4/33", "1.2.3", "01.2.3.4", "1.2.3.4/08",
		"fe80::1%eth0", "fe80::%eth0/64", "::ffff:0.0.0.0/96", "::ffff:1.2.3.4/40", "1.2.3.4 ", "garbage here", "1.2.3.4-1.2.3.9", "-1.2.3.4",
	} {
		check("", deny, "invalid denied CIDR "+deny)
	}
	for _, allow := range []string{
		"0.0.0.0", "0.0.0.0/24", "::", "1.2.3.4/33", "1.2.3.400", "1.2.3", "fe80::1%eth0", "garbage here", "a..b", "-a.com", "*.", "a.*.com",
		"http://example.com", "example.com:443", "exa\x00mple.com", "ex\u00e4mple.com", "*.1", strings.Repeat("a", 64) + ".com",
	} {
		check(allow, "0.0.0.0/0", "invalid allowed address "+allow)
	}
	for _, allow := range []string{"example.com", "*", "*.example.com", "EXAMPLE.com.", "a_b.c-d", "localhost", "1.2.3.4,example.com"} {
		check(allow, "", domainsNeedDeny)
		check(allow, "::/0,128.0.0.0/1", domainsNeedDeny)
		domain := allow[strings.LastIndexByte(allow, ',')+1:]
		check(allow, "0.0.0.0/0", "domain rules are not supported by this version yet: replace "+domain+" in allow out by addresses or CIDRs")
	}
	check(",", "", "invalid allowed address ")
	check(strings.Repeat("x ", 200), "", "invalid allowed address "+strings.Repeat("x ", 200)[:253]+"...")
	many := strings.TrimSuffix(strings.Repeat("1.1.1.1,", MaxEntries+1), ",")
	check(many, "", "allow out and deny out take at most 1000 entries each")
	check("", many, "allow out and deny out take at most 1000 entries each")
}

// FuzzParsePolicy: whatever is accepted is normal, and reading it again gives the same; whatever is refused is the caller's fault.
func FuzzParsePolicy(f *testing.F) {
	f.Add("1.1.1.1", "0.0.0.0/0")
	f.Add("::ffff:1.2.3.4/120,*.example.com", "fe80::1%eth0")
	f.Add("255.255.255.255,0.0.0.0/0", "8000::/1,::/1")
	f.Fuzz(func(t *testing.T, allow, deny string) {
		p, err := ParsePolicy(nil, strings.Split(allow, ","), strings.Split(deny, ","))
		if err != nil {
			if errs.CodeOf(err) != errs.Invalid {
				t.Fatalf("ParsePolicy(%q, %q): %v is not the caller's fault", allow, deny, err)
			}
			return
		}
		for _, list := range [][]netip.Prefix{p.Allow, p.Deny} {
			for i, prefix := range list {
				if prefix != prefix.Masked() || prefix.Addr().Zone() != "" || prefix.Addr().Is4In6() {
					t.Fatalf("ParsePolicy(%q, %q) gives %s, which is not normal", allow, deny, prefix)
				}
				if i > 0 && (list[i-1].Overlaps(prefix) || !list[i-1].Addr().Less(prefix.Addr())) {
					t.Fatalf("ParsePolicy(%q, %q) gives %s after %s", allow, deny, prefix, list[i-1])
				}
			}
		}
		again, err := ParsePolicy(nil, texts(p.Allow), texts(p.Deny))
		if err != nil || !slices.Equal(again.Allow, p.Allow) || !slices.Equal(again.Deny, p.Deny) {
			t.Fatalf("ParsePolicy of its own result %v = %v, %v", p, again, err)
		}
		if text := Compile(p, Local()).String(); strings.Count(text, "{") != strings.Count(text, "}") {
			t.Fatalf("unbalanced text of %v:\n%s", p, text)
		}
	})
}

func TestVerdict(t *testing.T) {
	no := false
	check := func(p Policy, dst string, want Verdict) {
		t.Helper()
		if got := Compile(p, Local()).Verdict(netip.MustParseAddr(dst)); got != want {
			t.Errorf("Verdict(%s) = %v, want %v under allow %v, deny %v, internet %v", dst, got, want, p.Allow, p.Deny, p.AllowInternet)
		}
	}
	open, closed := parse(t, nil, "", ""), parse(t, &no, "", "")
	for _, dst := range []string{"1.1.1.1", "8.8.8.8", "11.0.0.1", "172.32.0.1", "100.128.0.1", "169.253.0.1", "2606:4700::1", "2a01::1"} {
		check(open, dst, Allowed)
		check(closed, dst, RefusedDenied)
		check(Policy{}, dst, RefusedDenied)
	}
	everything := parse(t, nil, "0.0.0.0/0", "")
	for _, dst := range []string{
		"0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1",
		"172.31.255.255", "192.0.0.8", "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.7", "224.0.0.1",
		"239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::7f00:1",
		"64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:a9fe:a9fe::1", "3fff::1", "fc00::1", "fd00:ec2::254",
		"fe80::1", "fec0::1", "ff02::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "5f00::1",
	} {
		check(open, dst, RefusedReserved)
		check(everything, dst, RefusedReserved) // an allow does not open them
		check(parse(t, nil, "", "0.0.0.0/0"), dst, RefusedReserved)
	}
	both := parse(t, nil, "1.1.1.1 8.8.8.0/24 2606:4700::/32", "0.0.0.0/0")
	check(both, "1.1.1.1", Allowed)
	check(both, "::ffff:8.8.8.8", Allowed)
	check(both, "8.8.9.8", RefusedDenied)
	check(both, "2606:4700::1", Allowed)
	check(both, "2606:4701::1", RefusedDenied)
	check(parse(t, nil, "8.8.8.8", "8.8.8.8"), "8.8.8.8", Allowed)
	check(parse(t, nil, "", "::/0"), "8.8.8.8", Allowed)
	protected := parse(t, nil, "5.6.7.0/24", "")
	protected.Protected = []netip.Prefix{netip.MustParsePrefix("5.6.7.8/32")}
	check(protected, "5.6.7.8", RefusedReserved)
	check(protected, "5.6.7.9", Allowed)
}

func TestReservedHoldsContract(t *testing.T) {
	r := Compile(Policy{AllowInternet: true}, Local())
	for _, text := range []string{"10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
		"::1/128", "fc00::/7", "fe80::/10"} {
		if prefix := netip.MustParsePrefix(text); !r.reserved.ContainsPrefix(prefix) {
			t.Errorf("%s is not reserved", prefix)
		}
	}
}

func parse(t *testing.T, internet *bool, allow, deny string) Policy {
	t.Helper()
	p, err := ParsePolicy(internet, strings.Fields(allow), strings.Fields(deny))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func texts(prefixes []netip.Prefix) (list []string) {
	for _, p := range prefixes {
		list = append(list, p.String())
	}
	return list
}

func join(prefixes []netip.Prefix) string { return strings.Join(texts(prefixes), " ") }
