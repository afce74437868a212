package api

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
)

func TestTemplates(t *testing.T) {
	s := newSite(t, nil)
	templates := mustDecode[[]gen.Template](t, s.call("GET", "/templates", ""))
	if len(templates) != 2 || templates[0].Aliases[0] != "base" || templates[1].Names[0] != "code-interpreter-v1" {
		t.Errorf("templates %+v", templates)
	}
}

// TestSnapshots leads one snapshot through its life, as SDKs do: create, list, create from it, delete.
func TestSnapshots(t *testing.T) {
	s := newSite(t, nil)
	if got := s.call("GET", "/snapshots", ""); strings.TrimSpace(string(got.body)) != "[]" {
		t.Errorf("snapshots at first = %s", got.body)
	}
	source := mustDecode[gen.Sandbox](t, s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`))
	path := "/sandboxes/" + source.SandboxID
	unnamed := mustDecode[gen.SnapshotInfo](t, s.call("POST", path+"-6532622b/snapshots", `{}`))
	named := mustDecode[gen.SnapshotInfo](t, s.call("POST", path+"/snapshots", `{"name": "mine", "memory": true, "fromTheFuture": 1}`))
	if len(unnamed.Names) != 0 || unnamed.SandboxID != source.SandboxID || !slices.Equal(named.Names, []string{"mine"}) || named.SnapshotID == unnamed.SnapshotID {
		t.Errorf("made %+v and %+v", unnamed, named)
	}
	for _, test := range []struct {
		query string
		want  []string
	}{
		{"", []string{named.SnapshotID, unnamed.SnapshotID}},
		{"?sandboxID=" + source.SandboxID, []string{named.SnapshotID, unnamed.SnapshotID}},
		{"?sandboxID=iother", nil},
		{"?name=mine", []string{named.SnapshotID}},
		{"?name=Mine:default", []string{named.SnapshotID}},
		{"?name=mine:v2", nil},
		{"?name=" + unnamed.SnapshotID, []string{unnamed.SnapshotID}},
	} {
		if ids := snapshotIDs(mustDecode[[]gen.SnapshotInfo](t, s.call("GET", "/snapshots"+test.query, ""))); !slices.Equal(ids, test.want) {
			t.Errorf("GET /snapshots%s = %v, want %v", test.query, ids, test.want)
		}
	}
	for _, reference := range []string{named.SnapshotID, "mine"} {
		got := s.call("POST", "/v2/sandboxes", `{"templateID": "`+reference+`"}`)
		if got.StatusCode != 201 || mustDecode[gen.Sandbox](t, got).TemplateID != "tmplbase" {
			t.Errorf("create from %s = %s %s", reference, got.message(), got.body)
		}
	}
	// Another team.
	if got := s.call("GET", "/snapshots", "", "X-API-Key", keyB); strings.TrimSpace(string(got.body)) != "[]" {
		t.Errorf("snapshots of another team = %s", got.body)
	}
	for _, reference := range []string{named.SnapshotID, "mine"} {
		if got := s.call("POST", "/v2/sandboxes", `{"templateID": "`+reference+`"}`, "X-API-Key", keyB); got.StatusCode != 404 {
			t.Errorf("create by another team from %s = %s, want 404", reference, got.message())
		}
		if got := s.call("DELETE", "/templates/"+reference, "", "X-API-Key", keyB); got.StatusCode != 404 {
			t.Errorf("delete of %s by another team = %s, want 404", reference, got.message())
		}
	}
	// A paused source.
	if got := s.call("POST", path+"/pause", "{}"); got.StatusCode != 204 {
		t.Fatalf("pause = %s", got.message())
	}
	if got := s.call("POST", path+"/snapshots", "{}"); got.StatusCode != 409 {
		t.Errorf("snapshot of a paused sandbox = %s, want 409", got.message())
	}
	for _, step := range []struct {
		reference string
		status    int
	}{{named.SnapshotID, 204}, {named.SnapshotID, 404}, {"mine", 404}, {unnamed.SnapshotID + ":default", 204}, {unnamed.SnapshotID, 404}} {
		if got := s.call("DELETE", "/templates/"+step.reference, ""); got.StatusCode != step.status {
			t.Errorf("delete of %s = %s, want %d", step.reference, got.message(), step.status)
		}
	}
}

func snapshotIDs(items []gen.SnapshotInfo) (ids []string) {
	for _, item := range items {
		ids = append(ids, item.SnapshotID)
	}
	return ids
}

// keep puts a snapshot on a node.
func (m *memory) keep(id, name, team string, created time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.snapshots = append(m.snapshots, sandboxd.Snapshot{ID: id, Name: name, Team: team, SandboxID: "isource", Template: "tmplbase", Created: created})
}

func TestSnapshotsOfSeveralNodes(t *testing.T) {
	sites, _ := newCluster(t, nil, "a", "b", "c")
	at := time.Unix(1000, 0)
	var want []string
	for i := range 23 {
		id := fmt.Sprintf("snap%02d", 22-i)
		want = append(want, id)
		sites[[]string{"a", "b", "c"}[i%3]].boxes.keep(id, "", "team-a", at.Add(time.Duration(22-i)/4*time.Second)) // several at the same time
	}
	slices.Sort(want)
	slices.Reverse(want)
	for _, limit := range []string{"1", "5", "100"} {
		var got []string
		for token := ""; ; {
			page := sites["b"].call("GET", "/snapshots?"+url.Values{"limit": {limit}, "nextToken": {token}}.Encode(), "")
			got = append(got, snapshotIDs(mustDecode[[]gen.SnapshotInfo](t, page))...)
			if token = page.Header.Get("X-Next-Token"); token == "" {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("in pages of %s: %v, want %v", limit, got, want)
		}
	}
}

// TestCreateFromTheNodeThatHasIt: and not where there is most room.
func TestCreateFromTheNodeThatHasIt(t *testing.T) {
	sites, shared := newCluster(t, nil, "a", "b", "c")
	shared.nodes[2].MaxSandboxes = 5000
	sites["a"].boxes.keep("snapa", "old", "team-a", time.Unix(3, 0))
	sites["b"].boxes.keep("snapb", "mine", "team-a", time.Unix(2, 0))
	sites["a"].boxes.keep("snapold", "mine", "team-a", time.Unix(1, 0))
	sites["c"].boxes.keep("snapother", "mine", "team-b", time.Unix(9, 0))
	for _, test := range []struct{ reference, node string }{
		{"snapa", "a"}, {"old", "a"}, {"snapb", "b"}, {"SNAPB:default", "b"}, {"mine", "b"}, {"base", "c"},
	} {
		got := sites["a"].call("POST", "/v2/sandboxes", `{"templateID": "`+test.reference+`"}`)
		if got.StatusCode != 201 || !strings.HasPrefix(mustDecode[gen.Sandbox](t, got).SandboxID, test.node) {
			t.Errorf("create from %s = %s %s, want it on %s", test.reference, got.message(), got.body, test.node)
		}
	}
	for _, test := range []struct{ body, want string }{
		{`{"templateID": "nope"}`, "404 "}, {`{"templateID": "snapother"}`, "404 "}, {`{"templateID": "../x"}`, "404 "}, {`{`, "400 "},
	} {
		if got := sites["a"].call("POST", "/v2/sandboxes", test.body).message(); !strings.HasPrefix(got, test.want) {
			t.Errorf("create with %s = %s, want %s", test.body, got, test.want)
		}
	}
	// Its node is full: nobody else can make it.
	sites["b"].boxes.max = 0
	if got := sites["a"].call("POST", "/v2/sandboxes", `{"templateID": "snapb"}`); got.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("create on a full node = %s, want 503", got.message())
	}
}

func TestDeleteOnTheNodeThatHasIt(t *testing.T) {
	sites, shared := newCluster(t, nil, "a", "b")
	sites["b"].boxes.keep("snapb", "mine", "team-a", time.Unix(2, 0))
	sites["a"].boxes.keep("snapa", "mine", "team-a", time.Unix(1, 0))
	for _, step := range []struct {
		reference string
		key       string
		status    int
	}{
		{"snapb", keyB, 404}, {"mine", keyA, 204}, {"snapb", keyA, 404}, {"mine", keyA, 204}, {"mine", keyA, 404}, {"base", keyA, 403},
	} {
		if got := sites["a"].call("DELETE", "/templates/"+step.reference, "", "X-API-Key", step.key); got.StatusCode != step.status {
			t.Errorf("delete of %s = %s, want %d", step.reference, got.message(), step.status)
		}
	}
	// "Not found" would be a guess when a node is silent.
	shared.nodes = append(shared.nodes, routing.Node{ID: "z", APIAddr: deadAddr(t), MaxSandboxes: 1000})
	for _, call := range [][3]string{{"DELETE", "/templates/snapz", ""}, {"POST", "/v2/sandboxes", `{"templateID": "snapz"}`}} {
		if got := sites["a"].call(call[0], call[1], call[2]); got.StatusCode != 503 || got.Header.Get("Retry-After") == "" {
			t.Errorf("%s %s with a dead node = %s, want 503", call[0], call[1], got.message())
		}
	}
	if got := sites["a"].call("GET", "/snapshots", ""); got.StatusCode != 200 || got.Header.Get("Sluice-Incomplete") != "1" {
		t.Errorf("list with a dead node = %s, Sluice-Incomplete %q", got.message(), got.Header.Get("Sluice-Incomplete"))
	}
	if got := sites["a"].call("POST", "/v2/sandboxes", `{"templateID": "base"}`); got.StatusCode != 201 {
		t.Errorf("create from a template with a dead node = %s", got.message())
	}
}
