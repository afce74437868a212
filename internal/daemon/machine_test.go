package daemon

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/sandboxd/netdev"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

func TestChooseMachine(t *testing.T) {
	well := []vmm.Finding{{What: "root", OK: true, Fatal: true}, {What: "landlock", Detail: "old", Remedy: "upgrade"}}
	lacking := append([]vmm.Finding{{What: "/dev/kvm", Fatal: true, Detail: "not there", Remedy: "load it"}, {What: "tun", Fatal: true, Detail: "not there", Remedy: "load it too"}}, well...)
	tests := []struct {
		name     string
		opts     MachineOptions
		findings []vmm.Finding // nil: they must not be asked for
		kind     string
		why      []string // or the error
	}{
		{"auto where it can be", MachineOptions{Kind: MachineAuto}, well, MachineVM, []string{"virtual machines", "can run"}},
		{"auto is the zero value", MachineOptions{}, well, MachineVM, []string{"virtual machines"}},
		{"auto where it cannot be", MachineOptions{Kind: MachineAuto}, lacking, MachineNamespace, []string{"namespaces", "/dev/kvm: not there; load it"}},
		{"auto with a root for namespaces", MachineOptions{Kind: MachineAuto, TemplateDir: "/"}, nil, MachineNamespace, []string{"-template-dir"}},
		{"namespace", MachineOptions{Kind: MachineNamespace}, nil, MachineNamespace, []string{"-machine"}},
		{"vm", MachineOptions{Kind: MachineVM}, well, MachineVM, []string{"-machine"}},
		{"vm where it cannot be", MachineOptions{Kind: MachineVM}, lacking, "", []string{"-machine vm", "/dev/kvm: not there; load it", "tun: not there; load it too", "doctor"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			kind, why, err := tt.opts.choose(func() []vmm.Finding {
				if tt.findings == nil {
					t.Error("the host was looked at for nothing")
				}
				return tt.findings
			})
			if (err == nil) != (tt.kind != "") || kind != tt.kind {
				t.Fatalf("choose() = %q, %v, want %q", kind, err, tt.kind)
			}
			if err != nil {
				why = err.Error()
			}
			for _, part := range tt.why {
				if !strings.Contains(why, part) {
					t.Errorf("choose() says %q, want %q in it", why, part)
				}
			}
			if err == nil && strings.Contains(why, "\n") {
				t.Errorf("choose() says %q, want one line", why)
			}
		})
	}
}

func TestMachineOptionsNameEveryMistake(t *testing.T) {
	opts := MachineOptions{Kind: "jail", Resolvers: []string{"here"}, TemplateDir: "/nonexistent", Pids: 1}
	err := opts.check()
	for _, part := range []string{"-machine", "-nameserver", "-template-dir", "-pids"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("check() = %v, want %s in it", err, part)
		}
	}
	opts = MachineOptions{Kind: MachineVM, TemplateDir: "/"}
	if err := opts.check(); err == nil || !strings.Contains(err.Error(), "sluice template build") {
		t.Errorf("check() of -machine vm with -template-dir = %v, want it to say how", err)
	}
}

func TestHypervisorFromTheEnvironment(t *testing.T) {
	t.Setenv(HypervisorVariable, "/opt/cloud-hypervisor")
	var o MachineOptions
	fs := flag.NewFlagSet("node", flag.ContinueOnError)
	o.Flags(fs)
	if err := fs.Parse(nil); err != nil || o.Hypervisor != "/opt/cloud-hypervisor" {
		t.Errorf("hypervisor = %q, %v, want what %s says", o.Hypervisor, err, HypervisorVariable)
	}
	if err := fs.Parse([]string{"-hypervisor", "/usr/bin/ch"}); err != nil || o.Hypervisor != "/usr/bin/ch" {
		t.Errorf("hypervisor = %q, %v, want what the flag says", o.Hypervisor, err)
	}
}

// A build boots beside a running node: they share neither names nor addresses, whatever the node's are.
func TestBuildsHaveANetworkOfTheirOwn(t *testing.T) {
	for _, node := range []netdev.Config{
		{NamePrefix: "sl", Prefix: netdev.DefaultPrefix, Prefix6: netdev.DefaultPrefix6},
		{NamePrefix: "exactly8", Prefix: netip.MustParsePrefix("10.11.0.0/16"), Prefix6: netip.MustParsePrefix("fd73:6c75:6963:65fe::/64")},
		{NamePrefix: "b", Prefix: netip.MustParsePrefix("10.13.0.0/16"), Prefix6: netip.MustParsePrefix("fd00::/64")},
		{NamePrefix: "bxactly8", Prefix: netip.MustParsePrefix("10.11.255.254/31"), Prefix6: netip.MustParsePrefix("fd00::/64")},
	} {
		b := buildNetwork(node)
		if b.NamePrefix == node.NamePrefix || b.Prefix.Overlaps(node.Prefix) || b.Prefix6.Overlaps(node.Prefix6) {
			t.Errorf("builds beside %+v are in %+v", node, b)
		}
		if n, err := netdev.New(b); err != nil || n.Capacity() != 1 {
			t.Errorf("network of builds %+v: %v, want one with a slot", b, err)
		}
	}
}

// A host without the programs is told of each; what only virtual machines need does not keep namespaces from running.
func TestDiagnose(t *testing.T) {
	dir := t.TempDir()
	guestd := filepath.Join(dir, "guestd")
	if err := os.WriteFile(guestd, []byte("\x7fELF"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	opts := MachineOptions{Kind: MachineAuto, Guestd: guestd, Hypervisor: filepath.Join(dir, "nothing"), NetworkName: "sl",
		SlotPrefix: netdev.DefaultPrefix.String(), SlotPrefix6: netdev.DefaultPrefix6.String()}
	state := filepath.Join(dir, "state")
	d := Diagnose(t.Context(), opts, state)
	if d.Err != nil || d.Kind != MachineNamespace || len(d.Limitations) == 0 {
		t.Errorf("a host without a hypervisor = %q, %v, limited in %q, want namespaces", d.Kind, d.Err, d.Limitations)
	}
	lacks(t, d, "cloud-hypervisor", false)

	opts.Kind = MachineVM
	opts.Kernel = filepath.Join(dir, "no-kernel")
	d = Diagnose(t.Context(), opts, state)
	if d.Err == nil || d.Kind != "" {
		t.Errorf("-machine vm on it = %q, %v, want an error", d.Kind, d.Err)
	}
	lacks(t, d, "cloud-hypervisor", true)
	lacks(t, d, "kernel", true)
	lacks(t, d, "mmdebstrap", false)
	lacks(t, d, "templates", false)
	if _, err := os.Stat(state); err == nil {
		t.Error("the doctor made the state directory")
	}

	opts.Kind, opts.Guestd = MachineNamespace, filepath.Join(dir, "no-guestd")
	d = Diagnose(t.Context(), opts, state)
	if d.Err == nil {
		t.Error("a node without its agent is called well")
	}
	lacks(t, d, "guestd", true)
}

func lacks(t *testing.T, d Diagnosis, what string, fatal bool) {
	t.Helper()
	for _, f := range d.Findings {
		if f.What == what {
			if f.OK || f.Fatal != fatal || f.Remedy == "" {
				t.Errorf("finding about %s = %+v, want one that is fatal (%v) and has a remedy", what, f, fatal)
			}
			return
		}
	}
	t.Errorf("no finding about %s", what)
}
