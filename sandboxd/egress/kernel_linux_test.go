package egress

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// scratchNetNS is a namespace of its own for one test, with the path to it, and a device where rulesets look for a tap.
func scratchNetNS(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root: run the tests with sudo")
	}
	home, err := openNetNS("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(home)
	ns := -1
	err = inNetNS(home, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if ns, err = openNetNS("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		return netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap0"}, Mode: netlink.TUNTAP_MODE_TAP})
	})
	if err != nil {
		t.Skipf("no network namespace can be made here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Close(ns) })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns)
}

// nft runs the nft program in a namespace.
func nft(t testing.TB, netns, stdin string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("nft is missing: install the package nftables")
	}
	ns, err := openNetNS(netns)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ns)
	var out []byte
	err = inNetNS(ns, func() error {
		cmd := exec.Command(path, args...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("nft %s: %v\n%s\n%s", args, err, out, stdin)
	}
	return string(out)
}

// TestKernelHoldsText: what Apply sends, the text as nft reads it, and what nft lists afterwards are one and the same.
func TestKernelHoldsText(t *testing.T) {
	for name, r := range rulesets(t) {
		t.Run(name, func(t *testing.T) {
			applied, loaded := scratchNetNS(t), scratchNetNS(t)
			if err := Apply(applied, r); err != nil {
				t.Fatal(err)
			}
			nft(t, loaded, r.String(), "-c", "-f", "-")
			nft(t, loaded, r.String(), "-f", "-")
			want := listed(r)
			if got := normal(nft(t, applied, "", "list", "ruleset")); got != want {
				t.Errorf("the kernel holds\n%s\nwant\n%s", got, want)
			}
			if got := normal(nft(t, loaded, "", "list", "ruleset")); got != want {
				t.Errorf("nft made of the text\n%s\nwant\n%s", got, want)
			}
		})
	}
}

var (
	spaces = regexp.MustCompile(`\s+`)
	counts = regexp.MustCompile(`packets \d+ bytes \d+ `)
)

// listed is the text of a ruleset as nft lists it: without the lines that make room for it.
func listed(r Ruleset) string {
	return normal(strings.SplitN(r.String(), "\n", 1+2*len(r.tables))[2*len(r.tables)])
}

// normal is a listing on one line for each block, without the counts.
func normal(text string) string {
	text = counts.ReplaceAllString(spaces.ReplaceAllString(text, " "), "")
	return strings.ReplaceAll(strings.TrimSpace(text), "} ", "}\n")
}

// TestApplyReplaces: a ruleset leaves nothing of the one before it but the counts.
func TestApplyReplaces(t *testing.T) {
	netns := scratchNetNS(t)
	if counters, err := Counters(netns); err != nil || counters != (Refusals{}) {
		t.Fatalf("Counters before the first Apply = %v, %v", counters, err)
	}
	all := rulesets(t)
	for _, name := range []string{"mixed", "no-internet", "tap", "open", "allow-list", "allow-list", "no-internet", "open", "mixed"} {
		if err := Apply(netns, all[name]); err != nil {
			t.Fatalf("Apply %s: %v", name, err)
		}
		want := listed(all[name])
		if got := normal(nft(t, netns, "", "list", "ruleset")); got != want {
			t.Errorf("after %s the kernel holds\n%s\nwant\n%s", name, got, want)
		}
	}
	if err := Apply("/run/netns/there-is-no-such-thing", all["open"]); err == nil {
		t.Error("Apply to a namespace that is not there succeeded")
	}
}

// TestHalfAFence: rules for the frames of a machine that the kernel refuses, and those for its packets with them, leave everything as it
// was: no rules, or the older ones. Where there is no tap to hang them on it says so.
func TestHalfAFence(t *testing.T) {
	netns := scratchNetNS(t)
	whole := rulesets(t)["tap"]
	half := rulesets(t)["tap"]
	last := &half.tables[1].chains[len(half.tables[1].chains)-1]
	last.rules = append(last.rules, rule{gotoChain("nowhere")})
	if err := Apply(netns, half); !errors.Is(err, unix.ENOENT) || strings.Contains(err.Error(), "cannot filter") {
		t.Errorf("Apply of rules that lead nowhere = %v, want ENOENT, and no complaint about a kernel that can", err)
	}
	if got := nft(t, netns, "", "list", "ruleset"); got != "" {
		t.Errorf("after it the kernel holds\n%s", got)
	}
	if err := Apply(netns, whole); err != nil {
		t.Fatal(err)
	}
	if err := Apply(netns, half); !errors.Is(err, unix.ENOENT) {
		t.Errorf("Apply of rules that lead nowhere = %v, want ENOENT", err)
	}
	if got := normal(nft(t, netns, "", "list", "ruleset")); got != listed(whole) {
		t.Errorf("after it the kernel holds\n%s\nwant\n%s", got, listed(whole))
	}
	if err := Apply(netns, Compile(Policy{}, Forwarded("tap1", machineMAC, machine))); err == nil || !strings.Contains(err.Error(), "tap1") {
		t.Errorf("Apply without the tap = %v, want that it is missing", err)
	}
	if got := normal(nft(t, netns, "", "list", "ruleset")); got != listed(whole) {
		t.Errorf("after it the kernel holds\n%s\nwant\n%s", got, listed(whole))
	}
}

// TestKernelIsAsked: what a kernel lacks is said in words, and only if it lacks it.
func TestKernelIsAsked(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("asking the kernel needs root: run the tests with sudo")
	}
	r := Compile(Policy{}, Forwarded("there-is-no-such-tap", machineMAC)) // longer than a name can be, so that no kernel takes it
	for _, errno := range []error{unix.EOPNOTSUPP, unix.EAFNOSUPPORT, unix.ENOENT} {
		if err := r.explain(errno); !errors.Is(err, errno) || !strings.Contains(err.Error(), "CONFIG_NF_TABLES_NETDEV") {
			t.Errorf("explain(%v) = %v, want what to look for in the kernel's configuration", errno, err)
		}
	}
	local := Compile(Policy{}, Local())
	for _, err := range []error{r.explain(unix.EPERM), local.explain(unix.EPERM)} {
		if err != unix.EPERM {
			t.Errorf("explain(EPERM) = %v", err)
		}
	}
	if err := local.explain(unix.ENOENT); err != unix.ENOENT {
		t.Errorf("explain(ENOENT) of rules without frames = %v", err)
	}
}

// TestApplyTransitions goes from policy to policy in one namespace, with lists that share entries, touch and contain one another:
// each time the kernel must hold exactly the new one.
func TestApplyTransitions(t *testing.T) {
	netns := scratchNetNS(t)
	random := rand.New(rand.NewPCG(1, 2))
	pick := func() (list []string) {
		for range random.IntN(12) {
			bits := []int{0, 1, 8, 9, 16, 23, 24, 25, 30, 31, 32}[random.IntN(11)]
			list = append(list, fmt.Sprintf("%d.%d.%d.%d/%d",
				1+random.IntN(2)*254, random.IntN(2)*255, random.IntN(3), random.IntN(4), max(bits, 8)))
			list = append(list, fmt.Sprintf("26%02x:%x::/%d", random.IntN(3), random.IntN(4), 20+random.IntN(20)))
			if bits == 0 {
				list = append(list, "0.0.0.0/0")
			}
		}
		return list
	}
	for i := range 40 {
		allow, deny := pick(), pick()
		p, err := ParsePolicy(nil, allow, deny)
		if err != nil {
			t.Fatal(err)
		}
		r := Compile(p, Local(netip.MustParseAddr("10.12.0.1")))
		if err := Apply(netns, r); err != nil {
			t.Fatalf("transition %d to allow %v, deny %v: %v", i, allow, deny, err)
		}
		want := listed(r)
		if got := normal(nft(t, netns, "", "list", "ruleset")); got != want {
			t.Fatalf("after transition %d to allow %v, deny %v the kernel holds\n%s\nwant\n%s", i, allow, deny, got, want)
		}
	}
}

func BenchmarkApply1000(b *testing.B) {
	netns := scratchNetNS(b)
	var allow, deny []string
	for i := range MaxEntries {
		allow = append(allow, fmt.Sprintf("20.%d.%d.0/25", i/250, i%250))
		deny = append(deny, fmt.Sprintf("2600:%x::/48", i*2))
	}
	p, err := ParsePolicy(nil, allow, deny)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := Apply(netns, Compile(p, Local())); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkApply(b *testing.B) {
	netns := scratchNetNS(b)
	r := Compile(Policy{AllowInternet: true}, Local())
	for b.Loop() {
		if err := Apply(netns, r); err != nil {
			b.Fatal(err)
		}
	}
}
