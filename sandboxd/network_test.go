package sandboxd

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/egress"
)

func TestUpdateNetwork(t *testing.T) {
	no := false
	bubble(t, func(t *testing.T, n *node) {
		s := spec(time.Hour)
		s.Network.AllowInternetAccess = &no
		s.Network.AllowOut = []string{"1.1.1.1"}
		sb, err := n.m.Create(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		// The ingress half of the argument must not count; what is omitted is cleared.
		change := Network{DenyOut: []string{"8.8.8.8"}, MaskRequestHost: "other", HTTPSPorts: []uint16{1}}
		if err := n.m.UpdateNetwork(t.Context(), sb.ID, change); err != nil {
			t.Fatal(err)
		}
		got, _ := n.m.Get(sb.ID)
		want := s.Network
		if got.Network.AllowInternetAccess != nil || got.Network.AllowOut != nil || !slices.Equal(got.Network.DenyOut, change.DenyOut) ||
			got.Network.MaskRequestHost != want.MaskRequestHost || !slices.Equal(got.Network.HTTPSPorts, want.HTTPSPorts) || !got.Network.AllowPublicTraffic {
			t.Errorf("Network after the update = %+v", got.Network)
		}
		if fence := n.host.fence(0); !fence.AllowInternet || len(fence.Allow) != 0 || len(fence.Deny) != 1 {
			t.Errorf("rules after the update = %+v", fence)
		}
		wantError(t, "UpdateNetwork", n.m.UpdateNetwork(t.Context(), sb.ID, Network{DenyOut: []string{"x"}}), errs.Invalid, "x")
		wantError(t, "UpdateNetwork", n.m.UpdateNetwork(t.Context(), "inone", Network{}), errs.NotFound, "doesn't exist")
	})
}

// TestUpdateNetworkFails: the old configuration stays in force, in memory and on disk, whichever half of the change failed.
func TestUpdateNetworkFails(t *testing.T) {
	changes := map[string]Network{"tighter": {DenyOut: []string{"0.0.0.0/0"}}, "looser": {}}
	for name, change := range changes {
		for _, how := range []string{"set fence", "after set fence"} {
			t.Run(name+", "+how, func(t *testing.T) {
				bubble(t, func(t *testing.T, n *node) {
					s := spec(time.Hour)
					s.Network.DenyOut = []string{"9.9.9.0/24"}
					sb, err := n.m.Create(t.Context(), s)
					if err != nil {
						t.Fatal(err)
					}
					before, _ := fenceOf(s.Network)
					n.host.setFail(how, errors.New("no memory"))
					if err := n.m.UpdateNetwork(t.Context(), sb.ID, change); errs.CodeOf(err) != errs.Internal {
						t.Errorf("UpdateNetwork() = %v", err)
					}
					rec, err := n.m.journal.read(sb.ID)
					got, _ := n.m.Get(sb.ID)
					if err != nil || !slices.Equal(rec.Sandbox.Network.DenyOut, s.Network.DenyOut) || !slices.Equal(got.Network.DenyOut, s.Network.DenyOut) {
						t.Errorf("stored after a failure: %v and %v, %v, want %v", rec.Sandbox.Network.DenyOut, got.Network.DenyOut, err, s.Network.DenyOut)
					}
					if fence := n.host.fence(0); !slices.Equal(fence.Deny, before.Deny) {
						t.Errorf("in force after a failure: %v, want %v", fence.Deny, before.Deny)
					}
				})
			})
		}
	}
}

// TestCrashDuringUpdateLeavesTheTighter reads the record at the moment the rules are applied: it is what a restart would apply.
func TestCrashDuringUpdateLeavesTheTighter(t *testing.T) {
	strict, loose := Network{DenyOut: []string{"0.0.0.0/0"}}, Network{DenyOut: []string{"8.8.8.8"}}
	for name, from := range map[string]Network{"from loose": loose, "from strict": strict} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				to := strict
				if name == "from strict" {
					to = loose
				}
				s := spec(time.Hour)
				s.Network = from
				sb, err := n.m.Create(t.Context(), s)
				if err != nil {
					t.Fatal(err)
				}
				var atApply record
				n.m.lives[sb.ID].instance = watchFence{n.m.lives[sb.ID].instance, func() { atApply, _ = n.m.journal.read(sb.ID) }}
				if err := n.m.UpdateNetwork(t.Context(), sb.ID, to); err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(atApply.Sandbox.Network.DenyOut, strict.DenyOut) {
					t.Errorf("record while the rules change = %v, want the strict one", atApply.Sandbox.Network.DenyOut)
				}
			})
		})
	}
}

func TestTightens(t *testing.T) {
	no := false
	policy := func(n Network) egress.Policy {
		t.Helper()
		p, err := fenceOf(n)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	open, closed := Network{}, Network{AllowInternetAccess: &no}
	deny8 := Network{DenyOut: []string{"8.8.8.0/24"}}
	deny9 := Network{DenyOut: []string{"9.9.9.9"}}
	both := Network{DenyOut: []string{"9.9.9.9", "8.8.8.0/24"}}
	hole := Network{DenyOut: []string{"8.8.8.0/24"}, AllowOut: []string{"8.8.8.8"}}
	tests := []struct {
		name     string
		from, to Network
		want     bool
	}{
		{"the same", deny8, deny8, true},
		{"open to closed", open, closed, true},
		{"closed to open", closed, open, false},
		{"one more", deny8, both, true},
		{"one less", both, deny8, false},
		{"another", deny8, deny9, false},
		{"hole made", deny8, hole, false},
		{"hole closed", hole, deny8, true},
		{"closed covers IPv6", Network{DenyOut: []string{"2001:4860::/32"}}, closed, true},
	}
	for _, tt := range tests {
		if got := tightens(policy(tt.from), policy(tt.to)); got != tt.want {
			t.Errorf("%s: tightens = %v, want %v", tt.name, got, tt.want)
		}
	}
}
