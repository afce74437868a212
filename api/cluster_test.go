package api

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
)

// newCluster starts one API per name, each on a real listener and with its own sandboxes, over one catalogue.
func newCluster(t *testing.T, change func(*Options), names ...string) (map[string]*site, *catalogue) {
	t.Helper()
	shared := &catalogue{routes: make(map[string]string)}
	sites := make(map[string]*site)
	for _, name := range names {
		transport := newTransport().(*http.Transport)
		t.Cleanup(transport.CloseIdleConnections)
		sites[name] = newSite(t, func(o *Options) {
			o.Sandboxes, o.NodeID, o.Nodes, o.Transport, o.Rate = newMemory(name), name, shared, transport, -1
			if change != nil {
				change(o)
			}
		})
		server := httptest.NewUnstartedServer(nil)
		server.Config = Server(sites[name].handler)
		server.Start()
		t.Cleanup(server.Close)
		shared.nodes = append(shared.nodes, routing.Node{ID: name, APIAddr: server.Listener.Addr().String(), MaxSandboxes: 1000})
	}
	return sites, shared
}

// put makes a sandbox on the node and its route.
func (c *catalogue) put(s *site, node, id string) {
	at := time.Now().UTC().Truncate(time.Millisecond)
	s.boxes.set(id, func(sb *sandboxd.Sandbox) {
		sb.State, sb.Team, sb.Template, sb.StartedAt, sb.EndAt = sandboxd.StateRunning, "team-a", "tmplbase", at, at.Add(time.Hour)
		sb.Nonce[0], sb.Network.AllowPublicTraffic = 1, true
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	c.routes[id] = node
}

// deadAddr is an address where nobody listens.
func deadAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestCallsReachTheOtherNode(t *testing.T) {
	sites, shared := newCluster(t, nil, "a", "b")
	shared.put(sites["b"], "b", "bx")
	here, there := sites["a"], sites["b"]
	direct := there.call("GET", "/sandboxes/bx", "")
	if through := here.call("GET", "/sandboxes/bx-6532622b", ""); string(through.body) != string(direct.body) || through.StatusCode != 200 {
		t.Errorf("GET through the other node = %d %s, want %s", through.StatusCode, through.body, direct.body)
	}
	for _, test := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "/sandboxes/bx/timeout", `{"timeout": 100}`, 204},
		{"POST", "/sandboxes/bx/refreshes", ``, 204},
		{"PUT", "/sandboxes/bx/network", `{"denyOut": ["8.8.8.8"]}`, 204},
		{"PUT", "/sandboxes/bx/network", `{"denyOut": ["nope"]}`, 400},
		{"GET", "/sandboxes/bx/metrics?start=1001&end=1009", ``, 200},
		{"POST", "/v2/sandboxes/bx/connect", ``, 200},
		{"POST", "/sandboxes/bx/pause", `{}`, 204},
		{"POST", "/sandboxes/bx/pause", `{}`, 409},
		{"POST", "/sandboxes/bx/connect", `{"timeout": 5}`, 201},
		{"POST", "/sandboxes/bx/snapshots", `{}`, 201},
		{"GET", "/sandboxes/bx/logs", ``, 200},
		{"GET", "/v2/sandboxes/bx/logs?limit=5&direction=backward", ``, 200},
		{"DELETE", "/sandboxes/bx", ``, 204},
		{"DELETE", "/sandboxes/bx", ``, 404}, // the route is still there, the sandbox is not
	} {
		if got := here.call(test.method, test.path, test.body); got.StatusCode != test.status {
			t.Errorf("%s %s %s through the other node = %s, want %d", test.method, test.path, test.body, got.message(), test.status)
		}
	}
	shared.put(there, "b", "by")
	if got := here.call("GET", "/sandboxes/by", "", "X-API-Key", keyB); got.StatusCode != 404 {
		t.Errorf("another team through the other node = %s", got.message())
	}
	if got := here.call("GET", "/sandboxes/by", "", "X-API-Key", "", "Authorization", "Bearer "+keyA); got.StatusCode != 200 {
		t.Errorf("with a bearer token through the other node = %s", got.message())
	}
}

// TestNoSecondHop: each node believes that the other has the sandbox.
func TestNoSecondHop(t *testing.T) {
	sites, shared := newCluster(t, nil, "a", "b")
	shared.routes["lost"] = "b"
	sites["b"].handler.cluster.nodes = &catalogue{nodes: shared.nodes, routes: map[string]string{"lost": "a"}}
	if got := sites["a"].call("GET", "/sandboxes/lost", ""); got.StatusCode != 404 {
		t.Errorf("a route in a circle = %s, want 404", got.message())
	}
	// And a stranger who sends the header only loses sight of the other nodes.
	shared.put(sites["b"], "b", "bx")
	if got := sites["a"].call("GET", "/sandboxes/bx", "", headerForwarded, "b"); got.StatusCode != 404 {
		t.Errorf("with a stranger's header = %s, want 404", got.message())
	}
	if got := sites["a"].call("GET", "/v2/sandboxes", "", headerForwarded, "zzz"); string(got.body) != "[]\n" {
		t.Errorf("list with a stranger's header = %s", got.body)
	}
	if got := sites["a"].call("GET", "/sandboxes/bx", "", headerForwarded, "b", "X-API-Key", ""); got.StatusCode != 401 {
		t.Errorf("a stranger's header instead of a key = %s, want 401", got.message())
	}
}

func TestListOfSeveralNodes(t *testing.T) {
	sites, shared := newCluster(t, nil, "a", "b", "c")
	shared.nodes[2].Draining = true // takes no new ones, but has some
	var all []string
	for i, name := range []string{"a", "b", "c", "b", "a"} {
		all = append(all, fill(sites[name].boxes, 6+i)...) // the same starting times on all nodes
	}
	slices.Sort(all)
	all = slices.Compact(all)
	for _, limit := range []string{"1", "4", "100"} {
		for _, order := range []string{"asc", "desc"} {
			var first []string
			for _, name := range []string{"a", "b", "c"} {
				ids, _ := sites[name].pages(t, url.Values{"limit": {limit}, "order": {order}})
				if first == nil {
					first = ids
				}
				if !slices.Equal(ids, first) {
					t.Errorf("limit %s %s: node %s lists %v, node a %v", limit, order, name, ids, first)
				}
				if sorted := slices.Sorted(slices.Values(ids)); !slices.Equal(sorted, all) {
					t.Errorf("limit %s %s: node %s lists %v, want each of %v once", limit, order, name, sorted, all)
				}
			}
		}
	}
	want := 0
	for _, s := range sites {
		for _, sb := range s.boxes.List() {
			want += boolToInt(sb.State == sandboxd.StateRunning)
		}
	}
	got := sites["b"].call("GET", "/v2/sandboxes?limit=2&metadata=a%252520b%3Dc%252526d%25253De", "")
	if got.Header.Get("X-Total-Running") != fmt.Sprint(want) || got.Header.Get("Sluice-Incomplete") != "" {
		t.Errorf("header %v, want X-Total-Running %d", got.Header, want)
	}
	if items := mustDecode[[]gen.ListedSandbox](t, sites["c"].call("GET", "/sandboxes", "")); len(items) != want {
		t.Errorf("v1 list has %d, want the %d running ones", len(items), want)
	}
}

func TestMetricsOfSeveralNodes(t *testing.T) {
	sites, shared := newCluster(t, nil, "a", "b")
	shared.put(sites["a"], "a", "ax")
	shared.put(sites["b"], "b", "bx")
	got := mustDecode[struct{ Sandboxes map[string]gen.SandboxMetric }](t, sites["a"].call("GET", "/sandboxes/metrics?sandbox_ids=ax,bx,cx", ""))
	if ids := slices.Sorted(maps.Keys(got.Sandboxes)); !slices.Equal(ids, []string{"ax", "bx"}) {
		t.Errorf("metrics of %v, want of ax and bx", ids)
	}
}

func TestDeadNode(t *testing.T) {
	sites, shared := newCluster(t, nil, "a", "b")
	shared.put(sites["a"], "a", "ax")
	shared.put(sites["b"], "b", "bx")
	shared.routes["cx"], shared.routes["dx"] = "c", "d" // d has no lease at all
	shared.nodes = append(shared.nodes, routing.Node{ID: "c", APIAddr: deadAddr(t), MaxSandboxes: 1000})
	for id, want := range map[string]string{"ax": "200 ", "bx": "200 ", "cx": "503 The node of the sandbox does not answer", "dx": `503 The node of sandbox "dx" does not answer`} {
		got := sites["a"].call("GET", "/sandboxes/"+id, "")
		if !strings.HasPrefix(got.message(), want) {
			t.Errorf("GET %s = %s, want %s", id, got.message(), want)
		}
		if got.StatusCode == 503 && got.Header.Get("Retry-After") != "1" {
			t.Errorf("GET %s: Retry-After %q", id, got.Header.Get("Retry-After"))
		}
	}
	got := sites["a"].call("GET", "/v2/sandboxes", "")
	if items := mustDecode[[]gen.ListedSandbox](t, got); len(items) != 2 || got.Header.Get("Sluice-Incomplete") != "1" {
		t.Errorf("list without node c = %d sandboxes, Sluice-Incomplete %q", len(items), got.Header.Get("Sluice-Incomplete"))
	}
	if got := sites["a"].call("GET", "/sandboxes", ""); got.StatusCode != 200 || got.Header.Get("Sluice-Incomplete") != "1" {
		t.Errorf("v1 list without node c = %d, Sluice-Incomplete %q", got.StatusCode, got.Header.Get("Sluice-Incomplete"))
	}
}

// TestRateLimitOfAnotherNode: half a list would look like a whole one to a client that is too fast.
func TestRateLimitOfAnotherNode(t *testing.T) {
	sites, _ := newCluster(t, nil, "a", "b")
	var err error
	if sites["b"].handler.limits, err = newLimits(0.1, 1); err != nil {
		t.Fatal(err)
	}
	if got := sites["a"].call("GET", "/v2/sandboxes", ""); got.StatusCode != 200 || got.Header.Get("Sluice-Incomplete") != "" {
		t.Errorf("first list = %s", got.message())
	}
	got := sites["a"].call("GET", "/v2/sandboxes", "")
	if n, _ := strconv.Atoi(got.Header.Get("Retry-After")); got.message() != "429 Rate limit exceeded" || n < 9 {
		t.Errorf("second list = %s, Retry-After %d", got.message(), n)
	}
}

func TestCatalogueDown(t *testing.T) {
	sites, shared := newCluster(t, nil, "a", "b")
	shared.put(sites["a"], "a", "ax")
	shared.put(sites["b"], "b", "bx")
	shared.err = &errs.Error{Code: errs.Unavailable, Msg: "the catalogue does not answer", Err: errors.New("dial redis")}
	for path, want := range map[string]string{
		"/sandboxes/ax":                            "200 ",
		"/sandboxes/bx":                            "503 the catalogue does not answer",
		"/v2/sandboxes":                            "503 the catalogue does not answer",
		"/sandboxes":                               "503 the catalogue does not answer",
		"/sandboxes/metrics?sandbox_ids=ax":        "200 ",
		"/sandboxes/metrics?sandbox_ids=ax,bx":     "503 the catalogue does not answer",
		"/templates":                               "200 ",
		"/sandboxes/metrics?sandbox_ids=notan_id,": "400 Invalid sandbox ID",
	} {
		if got := sites["a"].call("GET", path, ""); !strings.HasPrefix(got.message(), want) {
			t.Errorf("GET %s = %s, want %s", path, got.message(), want)
		}
	}
	if got := sites["a"].call("POST", "/v2/sandboxes", `{"templateID": "base"}`); got.StatusCode != 201 || sites["a"].boxes.made != 1 {
		t.Errorf("create = %s", got.message())
	}
}

func TestPlacement(t *testing.T) {
	for name, test := range map[string]struct {
		prepare func(t *testing.T, sites map[string]*site, shared *catalogue)
		want    string // the node, or the error
		code    string
		forward bool // sent by another node
	}{
		"itself on ties": {func(*testing.T, map[string]*site, *catalogue) {}, "a", "", false},
		"the most room":  {func(_ *testing.T, _ map[string]*site, c *catalogue) { c.nodes[1].MaxSandboxes = 1001 }, "b", "", false},
		"what it knows of itself is newer than its record": {func(_ *testing.T, sites map[string]*site, c *catalogue) {
			sites["a"].boxes.max, c.nodes[0].MaxSandboxes = 10, 5000
		}, "b", "", false},
		"not a draining one": {func(_ *testing.T, _ map[string]*site, c *catalogue) {
			c.nodes[1].MaxSandboxes, c.nodes[1].Draining = 5000, true
		}, "a", "", false},
		"not itself when draining": {func(_ *testing.T, sites map[string]*site, _ *catalogue) { sites["a"].boxes.draining = true }, "b", "", false},
		"not one without an address": {func(_ *testing.T, _ map[string]*site, c *catalogue) {
			c.nodes[1].MaxSandboxes, c.nodes[1].APIAddr = 5000, ""
		}, "a", "", false},
		"the next when one is dead": {func(t *testing.T, _ map[string]*site, c *catalogue) {
			c.nodes = append(c.nodes, routing.Node{ID: "c", APIAddr: deadAddr(t), MaxSandboxes: 5000})
		}, "a", "", false},
		"the next when one filled up meanwhile": {func(_ *testing.T, sites map[string]*site, c *catalogue) {
			c.nodes[1].MaxSandboxes, sites["b"].boxes.max = 5000, 0
		}, "a", "", false},
		"nobody has room": {func(_ *testing.T, sites map[string]*site, c *catalogue) {
			c.nodes[1].Sandboxes, sites["a"].boxes.max = 1000, 0
		}, "503 Failed to place sandbox: no node has room", codeNoCapacity, false},
		"all filled up meanwhile": {func(_ *testing.T, sites map[string]*site, c *catalogue) {
			sites["a"].boxes.max, sites["b"].boxes.max = 0, 0
		}, "503 Failed to place sandbox: no node has room", codeNoCapacity, false},
		"nobody takes any": {func(_ *testing.T, sites map[string]*site, c *catalogue) {
			c.nodes[1].Draining, sites["a"].boxes.draining = true, true
		}, "503 Failed to place sandbox: no node takes new sandboxes", codeNoNode, false},
		"all but itself are dead, and itself is full": {func(t *testing.T, sites map[string]*site, c *catalogue) {
			c.nodes[1].APIAddr, sites["a"].boxes.max = deadAddr(t), 0
		}, "503 Failed to place sandbox: the node does not answer", codeCreateFailed, false},
		"here when it was forwarded": {func(_ *testing.T, _ map[string]*site, c *catalogue) { c.nodes[1].MaxSandboxes = 5000 }, "a", "", true},
	} {
		t.Run(name, func(t *testing.T) {
			sites, shared := newCluster(t, nil, "a", "b")
			test.prepare(t, sites, shared)
			var header []string
			if test.forward {
				header = []string{headerForwarded, "b"}
			}
			got := sites["a"].call("POST", "/v2/sandboxes", `{"templateID": "base", "metadata": {"k": "v"}}`, header...)
			if got.StatusCode != 201 {
				if got.message() != test.want || deref(mustDecode[gen.Error](t, got).ErrorCode) != test.code {
					t.Errorf("create = %s %s, want %s %s", got.message(), got.body, test.want, test.code)
				}
				return
			}
			sb := mustDecode[gen.Sandbox](t, got)
			if !strings.HasPrefix(sb.SandboxID, test.want) || sites[test.want].boxes.boxes[sb.SandboxID].Metadata["k"] != "v" {
				t.Errorf("created %s, want it on %s", sb.SandboxID, test.want)
			}
		})
	}
}

// TestNoSecondCreate: a node that took the request and then died may have made the sandbox.
func TestNoSecondCreate(t *testing.T) {
	sites, shared := newCluster(t, nil, "a")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 1))
			c.Close()
		}
	}()
	shared.nodes = append(shared.nodes, routing.Node{ID: "z", APIAddr: l.Addr().String(), MaxSandboxes: 5000})
	got := sites["a"].call("POST", "/v2/sandboxes", `{"templateID": "base"}`)
	if got.message() != "503 Failed to place sandbox: the node does not answer" || sites["a"].boxes.made != 0 {
		t.Errorf("create = %s and %d made here, want an error and none", got.message(), sites["a"].boxes.made)
	}
}

// TestHalfAnAnswerIsNoAnswer: a client must notice when the other node breaks off in the middle.
func TestHalfAnAnswerIsNoAnswer(t *testing.T) {
	_, shared := newCluster(t, nil, "a")
	half := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"sandboxID":`))
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	defer half.Close()
	shared.nodes = append(shared.nodes, routing.Node{ID: "z", APIAddr: half.Listener.Addr().String()})
	shared.routes["zx"] = "z"
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+shared.nodes[0].APIAddr+"/sandboxes/zx", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", keyA)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return // it broke before the header was out, which is as good
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("half an answer looks whole: %d %q", resp.StatusCode, body)
	}
}

// TestTeamLimitCountsAllNodes: on whichever node, and whatever headers are sent.
func TestTeamLimitCountsAllNodes(t *testing.T) {
	sites, shared := newCluster(t, func(o *Options) { o.TeamSandboxes = 2 }, "a", "b")
	shared.put(sites["a"], "a", "ax")
	shared.put(sites["b"], "b", "bx")
	for _, header := range [][]string{nil, {headerForwarded, "b"}} {
		if got := sites["a"].call("POST", "/v2/sandboxes", `{"templateID": "base"}`, header...); got.StatusCode != 429 {
			t.Errorf("create with header %v = %s, want 429", header, got.message())
		}
	}
	if got := sites["a"].call("POST", "/v2/sandboxes", `{"templateID": "base"}`, "X-API-Key", keyB); got.StatusCode != 201 {
		t.Errorf("create of another team = %s", got.message())
	}
}
