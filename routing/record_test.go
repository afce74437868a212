package routing

import (
	"encoding/json"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

func sample(sandbox, node string, generation uint64) Route {
	return Route{
		Version: RouteVersion, Sandbox: sandbox, Node: node, Generation: generation, State: Running,
		EndAt: time.Date(2100, 1, 2, 3, 4, 5, 6000000, time.UTC),
	}
}

// TestStoredForm pins the schema: edges and nodes of different builds read each other's records.
func TestStoredForm(t *testing.T) {
	full := sample("isb", "n1", 18446744073709551615)
	full.TokenHash = [32]byte{0xab, 31: 0xcd}
	full.Mask = "localhost:${PORT}"
	full.Ports = map[uint16]PortSettings{8443: {HTTPS: true}}
	full.AutoResume = true
	full.EnvdHash = [32]byte{0x12, 31: 0x34}
	tests := []struct {
		record any
		want   string
	}{
		{full, `{"v":1,"gen":18446744073709551615,"id":"isb","node":"n1","state":"running","end":4102542245006,"token":"ab` + strings.Repeat("0", 60) +
			`cd","mask":"localhost:${PORT}","ports":{"8443":{"https":true}},"resume":true,"envd":"12` + strings.Repeat("0", 60) + `34"}`},
		{Route{Sandbox: "isb", Node: "n1", Generation: 1, State: Paused}, `{"v":1,"gen":1,"id":"isb","node":"n1","state":"paused","public":true}`},
		{Node{ID: "n1", LinkAddr: "a:1", APIAddr: "a:2", Sandboxes: 1, MaxSandboxes: 2, Machine: "vmm", Draining: true},
			`{"v":1,"id":"n1","link":"a:1","api":"a:2","n":1,"max":2,"machine":"vmm","drain":true}`},
	}
	for _, tt := range tests {
		got, err := json.Marshal(tt.record)
		if err != nil || string(got) != tt.want {
			t.Errorf("stored form of %+v = %s, %v, want %s", tt.record, got, err, tt.want)
		}
	}
}

func TestRecordsOfOtherSchemasAreRefused(t *testing.T) {
	const good = `{"v":1,"gen":1,"id":"isb","node":"n1","state":"running","token":"`
	const public = `{"v":1,"gen":1,"id":"isb","node":"n1","state":"running","public":true`
	hash := strings.Repeat("ab", 32)
	for _, bad := range []string{
		`{}`, `null`, `[]`, `"x"`, ``, `{`,
		`{"v":2,"gen":1,"id":"isb","node":"n1","state":"running","public":true}`,
		`{"v":0,"gen":1,"id":"isb","node":"n1","state":"running","public":true}`,
		`{"gen":1,"id":"isb","node":"n1","state":"running","public":true}`,
		`{"v":1,"gen":0,"id":"isb","node":"n1","state":"running","public":true}`,
		`{"v":1,"gen":-1,"id":"isb","node":"n1","state":"running","public":true}`,
		`{"v":1,"gen":18446744073709551616,"id":"isb","node":"n1","state":"running","public":true}`,
		`{"v":1,"gen":1,"id":"ISB","node":"n1","state":"running","public":true}`,
		`{"v":1,"gen":1,"id":"isb","node":"","state":"running","public":true}`,
		`{"v":1,"gen":1,"id":"isb","node":"n1","state":"creating","public":true}`,
		`{"v":1,"gen":1,"id":"isb","node":"n1","state":"running","end":-5,"public":true}`,
		`{"v":1,"gen":1,"id":"isb","node":"n1","state":"running","ports":{"0":{}},"public":true}`,
		`{"v":1,"gen":1,"id":"isb","node":"n1","state":"running","ports":{"65536":{}},"public":true}`,
		// Damaged ones that read as public, or with somebody else's token.
		`{"v":1,"gen":1,"id":"isb","node":"n1","state":"running"}`,
		good + `"}`,
		`{"v":1,"gen":1,"id":"isb","node":"n1","state":"running","token":null}`,
		`{"v":1,"gen":1,"id":"isb","node":"n1","state":"running","public":null}`,
		`{"v":1,"gen":1,"id":"isb","node":"n1","state":"running","public":false}`,
		`{"v":1,"gen":1,"id":"isb","node":"n1","state":"running","Public":true}`,
		`{"v":1,"gen":1,"id":"isb","node":"n1","\u017ftate":"running","public":true}`,
		good + hash + `","public":true}`,
		good + hash + `","token":"","public":true}`,
		good + hash + `","Token":"` + strings.Repeat("cd", 32) + `"}`,
		good + hash + `","token":"` + strings.Repeat("cd", 32) + `"}`,
		// The agent's token, damaged: without it anybody could wake the sandbox by the agent's port.
		public + `,"envd":"ab"}`, public + `,"envd":"` + strings.Repeat("zz", 32) + `"}`, public + `,"envd":"` + strings.Repeat("00", 32) + `"}`,
		public + `,"envd":"` + hash + `","envd":""}`, public + `,"Envd":"` + hash + `"}`,
		// Masks that are no Host.
		public + `,"mask":"a\r\nX: y"}`, public + `,"mask":"a b"}`, public + `,"mask":"a/b"}`, public + `,"mask":"${PORT"}`, public + `,"mask":"ü"}`,
		public + `,"mask":"` + strings.Repeat("a", 260) + `"}`,
		good + `ab"}`, good + strings.Repeat("zz", 32) + `"}`, good + strings.Repeat("ab", 33) + `"}`,
		good + strings.Repeat("00", 32) + `"}`, // would read as public
	} {
		r := sample("kept", "n1", 7)
		if err := json.Unmarshal([]byte(bad), &r); err == nil && bad != "null" {
			t.Errorf("%s was read as %+v", bad, r)
		}
		if r.Sandbox != "kept" {
			t.Errorf("%s was refused and yet changed the route", bad)
		}
	}
	for _, bad := range []string{`{}`, `{"v":2,"id":"n1"}`, `{"v":1,"id":"n1","Link":"a:1"}`, `{"v":1,"id":"n1","link":"a:1","link":"a:2"}`, `{"v":1,"id":""}`, `{"v":1,"id":"a:b"}`, `{"v":1,"id":"` + strings.Repeat("n", 65) + `"}`} {
		var n Node
		if err := json.Unmarshal([]byte(bad), &n); err == nil {
			t.Errorf("%s was read as %+v", bad, n)
		}
	}
}

func TestRouteEnded(t *testing.T) {
	r := sample("isb", "n1", 1)
	for _, tt := range []struct {
		state State
		end   time.Time
		now   time.Time
		want  bool
	}{
		{Running, r.EndAt, r.EndAt.Add(-1), false},
		{Running, r.EndAt, r.EndAt, true},
		{Running, time.Time{}, r.EndAt, false},
		{Paused, r.EndAt, r.EndAt.Add(time.Hour), false},
	} {
		r.State, r.EndAt = tt.state, tt.end
		if got := r.ended(tt.now); got != tt.want {
			t.Errorf("%s route with end %v ended at %v = %v, want %v", tt.state, tt.end, tt.now, got, tt.want)
		}
	}
}

// storedGeneration is the pattern of the scripts, in Go.
var storedGeneration = regexp.MustCompile(`^{"v":\d+,"gen":(\d+)[,}]`)

// FuzzRoute holds: what is read is written to what reads the same, and the scripts find the right generation in it.
func FuzzRoute(f *testing.F) {
	full := sample("isb", "n1", 1<<60)
	full.TokenHash[5], full.Mask, full.Ports = 1, "${PORT}.localhost:${PORT}", map[uint16]PortSettings{1: {}, 8443: {HTTPS: true}}
	for _, r := range []Route{full, sample("isb", "n1", 1)} {
		text, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte(`{"v":1,"gen":1,"gone":true}`))
	f.Add([]byte(`{"state":"paused","node":"n","id":"i","gen":3,"v":1,"ports":{},"end":9007199254740992,"public":true}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var first, second Route
		if json.Unmarshal(data, &first) != nil {
			if !reflect.DeepEqual(first, Route{}) {
				t.Fatalf("%q was refused and yet changed the route to %+v", data, first)
			}
			return
		}
		if first.Sandbox == "" {
			return // the JSON null, which encoding/json answers itself
		}
		text, err := json.Marshal(first)
		if err != nil {
			t.Fatalf("%q was read and cannot be written: %v", data, err)
		}
		if err := json.Unmarshal(text, &second); err != nil {
			t.Fatalf("%s was written and cannot be read: %v", text, err)
		}
		if !reflect.DeepEqual(canonical(first), canonical(second)) {
			t.Fatalf("%+v became %+v", first, second)
		}
		var raw struct{ Gen json.Number }
		if err := json.Unmarshal(text, &raw); err != nil {
			t.Fatal(err)
		}
		if m := storedGeneration.FindSubmatch(text); m == nil || string(m[1]) != raw.Gen.String() {
			t.Fatalf("the scripts do not find the generation in %s", text)
		}
	})
}

func FuzzNode(f *testing.F) {
	f.Add([]byte(`{"v":1,"id":"n1","link":"a:1","api":"a:2","n":1,"max":2,"machine":"vmm","drain":true}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var first, second Node
		if json.Unmarshal(data, &first) != nil || first.ID == "" {
			return
		}
		text, err := json.Marshal(first)
		if err != nil {
			t.Fatalf("%q was read and cannot be written: %v", data, err)
		}
		if err := json.Unmarshal(text, &second); err != nil || first != second {
			t.Fatalf("%+v became %+v, %v", first, second, err)
		}
	})
}

func TestInvalidRouteKeepsItsCodeThroughJSON(t *testing.T) {
	_, err := json.Marshal(Route{})
	if errs.CodeOf(marshalError(err)) != errs.Invalid {
		t.Errorf("marshalError(%v) = %v, want code invalid", err, marshalError(err))
	}
}
