package sandboxd

import (
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/internal/testkit"
	"github.com/sluice-edge/sluice/sandboxd/netdev"
)

// TestTwoNodesOfOneAddressPool: a second node with another name and the same slot addresses would give two sandboxes one address,
// and each would get half of the other's answers. It is refused, in one line that names the flag.
func TestTwoNodesOfOneAddressPool(t *testing.T) {
	l := lab.New(t)
	setup := func(letter string) (err error) {
		l.Host.Run(func() {
			var m *NamespaceMachine
			m, err = NewNamespaceMachine(NamespaceOptions{
				GuestdPath: testkit.Program(t, "guestd"), StateDir: t.TempDir(), Network: netdev.Config{NamePrefix: l.Prefix()[:7] + letter},
			})
			if err != nil {
				return
			}
			t.Cleanup(func() { l.Host.Run(func() { _ = m.Close(t.Context()) }) }) // a refused one has little to close
			err = m.Setup(t.Context())
		})
		return err
	}
	if err := setup("1"); err != nil {
		t.Fatal(err)
	}
	err := setup("2")
	if err == nil || !strings.Contains(err.Error(), "-slot-prefix") || strings.Contains(err.Error(), "\n") {
		t.Errorf("a second node with the same addresses: %v, want one line that names -slot-prefix", err)
	}
}
