package daemon

import (
	"reflect"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
)

// What a node publishes comes back from the catalogue as it was, every field of it: one that was lost would make the node write
// the same route again and again, and an edge judge by less than it was told.
func TestPublishedRoutesComeBackWhole(t *testing.T) {
	p := &publisher{store: routing.NewMemoryStore(), node: routing.Node{ID: "n1"}, leaseTTL: time.Minute}
	want := sandboxd.Published{
		Sandbox: "isb", Generation: 7, State: sandboxd.StatePaused, EndAt: time.UnixMilli(4102542245006).UTC(),
		TokenHash: sandboxd.TokenHash{1}, Mask: "localhost:${PORT}", HTTPSPorts: []uint16{8443}, AutoResume: true,
		EnvdHash: sandboxd.TokenHash{2},
	}
	for v, i := reflect.ValueOf(want), 0; i < v.NumField(); i++ {
		if v.Field(i).IsZero() {
			t.Errorf("the test says nothing about %s", v.Type().Field(i).Name)
		}
	}
	if err := p.Publish(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	got, err := p.Published(t.Context())
	if err != nil || len(got) != 1 || !reflect.DeepEqual(got[0], want) {
		t.Errorf("published %+v, %v, want %+v", got, err, want)
	}
}
