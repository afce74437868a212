package egress

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// scratchNetNS is a namespace of its own for one test, with the path to it.
func scratchNetNS(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root: run the tests with sudo")
	}
	fd := make(chan int)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			fd <- -1
			return
		}
		ns, _ := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		fd <- ns
	}()
	ns := <-fd
	if ns < 0 {
		t.Skip("no network namespace can be made here: CAP_SYS_ADMIN is missing")
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
			want := normal(strings.SplitN(r.String(), "\n", 3)[2])
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
	for _, name := range []string{"mixed", "no-internet", "tap", "open"} {
		if err := Apply(netns, all[name]); err != nil {
			t.Fatalf("Apply %s: %v", name, err)
		}
		want := normal(strings.SplitN(all[name].String(), "\n", 3)[2])
		if got := normal(nft(t, netns, "", "list", "ruleset")); got != want {
			t.Errorf("after %s the kernel holds\n%s\nwant\n%s", name, got, want)
		}
	}
	if err := Apply("/run/netns/there-is-no-such-thing", all["open"]); err == nil {
		t.Error("Apply to a namespace that is not there succeeded")
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
