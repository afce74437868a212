package api

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/errs"
)

func TestFork(t *testing.T) {
	s := newSite(t, nil)
	source := mustDecode[gen.Sandbox](t, s.call("POST", "/v2/sandboxes", `{"templateID": "base", "metadata": {"a": "b"}, "network": {"allowPublicTraffic": false}}`))
	path := "/sandboxes/" + source.SandboxID + "/fork"
	for _, test := range []struct {
		body    string
		count   int
		timeout time.Duration
	}{
		{``, 1, 15 * time.Second}, {`{}`, 1, 15 * time.Second}, {`{"count": 3, "timeout": 60}`, 3, time.Minute}, {`{"timeout": 86400}`, 1, 24 * time.Hour},
	} {
		got := s.call("POST", path, test.body)
		if got.StatusCode != http.StatusCreated {
			t.Errorf("fork %s = %s", test.body, got.message())
			continue
		}
		results := mustDecode[[]gen.ForkResult](t, got)
		if len(results) != test.count {
			t.Errorf("fork %s = %d entries, want %d", test.body, len(results), test.count)
		}
		for _, r := range results {
			if r.Sandbox == nil || r.Error != nil {
				t.Errorf("fork %s has the entry %+v", test.body, r)
				continue
			}
			spec := s.boxes.specs[r.Sandbox.SandboxID]
			if spec.Timeout != test.timeout || spec.Metadata["a"] != "b" {
				t.Errorf("fork %s made a sandbox of %+v", test.body, spec)
			}
			if deref(r.Sandbox.EnvdAccessToken) != spec.EnvdToken || spec.EnvdToken == *source.EnvdAccessToken || spec.EnvdToken == "" {
				t.Errorf("a copy's envd token is %v", r.Sandbox.EnvdAccessToken)
			}
			if traffic := deref(r.Sandbox.TrafficAccessToken); traffic == *source.TrafficAccessToken || spec.TokenHash != auth.HashToken([]byte(traffic)) {
				t.Errorf("a copy's traffic token is %q", traffic)
			}
		}
	}
	open := mustDecode[gen.Sandbox](t, s.call("POST", "/sandboxes", `{"templateID": "base"}`))
	results := mustDecode[[]gen.ForkResult](t, s.call("POST", "/sandboxes/"+open.SandboxID+"/fork", ""))
	if results[0].Sandbox == nil || results[0].Sandbox.EnvdAccessToken != nil {
		t.Errorf("copy of a sandbox that is not secured: %+v", results[0])
	}
}

// TestForkFailsOneByOne: what becomes of each copy is its own, and only a call that tried none is an error.
func TestForkFailsOneByOne(t *testing.T) {
	s := newSite(t, func(o *Options) { o.TeamSandboxes = 4 })
	source := mustDecode[gen.Sandbox](t, s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`))
	path := "/sandboxes/" + source.SandboxID + "/fork"
	s.boxes.onFork = func(i int) error {
		if i == 1 {
			return errs.New(errs.Exhausted, "this node is full")
		}
		return nil
	}
	var got []string
	for _, r := range mustDecode[[]gen.ForkResult](t, s.call("POST", path, `{"count": 5}`)) {
		switch {
		case r.Sandbox != nil && r.Error == nil:
			got = append(got, "made")
		case r.Sandbox == nil && r.Error != nil:
			got = append(got, http.StatusText(int(r.Error.Code)))
		}
	}
	if want := "made,Service Unavailable,made,Too Many Requests,Too Many Requests"; strings.Join(got, ",") != want {
		t.Errorf("copies of a team with three free places = %v, want %s", got, want)
	}
	s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`)
	if got := s.call("POST", path, `{"count": 2}`); got.StatusCode != 429 || got.Header.Get("Retry-After") == "" {
		t.Errorf("fork of a team without a free place = %s, want 429", got.message())
	}
	if got := s.call("POST", "/sandboxes/"+source.SandboxID+"/pause", ""); got.StatusCode != 204 {
		t.Fatalf("pause = %s", got.message())
	}
	if got := s.call("POST", path, ""); got.StatusCode != 409 {
		t.Errorf("fork of a paused sandbox = %s, want 409", got.message())
	}
}
