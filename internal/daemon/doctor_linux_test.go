package daemon

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/internal/lab"
)

// TestDoctorLeavesNothing: trying out the network changes nothing of the host. It left a table behind, and a host that forwards.
func TestDoctorLeavesNothing(t *testing.T) {
	l := lab.New(t)
	look := func() string {
		var b strings.Builder
		l.Host.Run(func() {
			for _, path := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
				text, err := os.ReadFile("/proc/sys/net/" + path)
				if err != nil {
					t.Fatal(err)
				}
				b.Write(text)
			}
			devices, err := net.Interfaces()
			if err != nil {
				t.Fatal(err)
			}
			for _, dev := range devices {
				b.WriteString(dev.Name + "\n")
			}
		})
		if _, err := exec.LookPath("nft"); err != nil {
			t.Skip("no nft to look with: apt-get install nftables, or make test")
		}
		out, err := l.Host.Command(t.Context(), "nft", "list", "tables").CombinedOutput()
		if err != nil {
			t.Fatalf("list tables: %v\n%s", err, out)
		}
		b.Write(out)
		return b.String()
	}
	before := look()
	for _, tap := range []bool{false, true} {
		l.Host.Run(func() {
			if found := (&MachineOptions{}).tryNetwork(t.Context(), tap); !found.OK {
				t.Errorf("with tap %v: %s", tap, found.Detail)
			}
		})
		if after := look(); after != before {
			t.Errorf("with tap %v there was\n%s\nand now is\n%s", tap, before, after)
		}
	}
}

func TestDoctorWantsADirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if f := findSpace(file); f.OK || !f.Fatal || !strings.Contains(f.Detail, "not a directory") {
		t.Errorf("a state directory that is a file: %s", f)
	}
	if f := findSpace(filepath.Join(t.TempDir(), "not", "yet")); f.Fatal {
		t.Errorf("a state directory that is to be made: %s", f)
	}
}
