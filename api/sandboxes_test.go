package api

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/sandboxd"
)

// TestLife leads one sandbox through every call about one sandbox. site.call holds each answer against openapi.yaml.
func TestLife(t *testing.T) {
	s := newSite(t, nil)
	want := func(method, path, body string, status int) reply {
		t.Helper()
		got := s.call(method, path, body)
		if got.StatusCode != status {
			t.Fatalf("%s %s %s = %d %s, want %d", method, path, body, got.StatusCode, got.body, status)
		}
		if status == http.StatusNoContent && len(got.body) > 0 {
			t.Errorf("%s %s has a body with 204: %q", method, path, got.body)
		}
		return got
	}
	created := mustDecode[gen.Sandbox](t, want("POST", "/v2/sandboxes", `{
		"templateID": "base", "timeout": 60, "metadata": {"a b": "c&d"}, "envVars": {"X": "1"}, "allow_internet_access": false,
		"network": {"allowOut": ["1.1.1.1"], "denyOut": ["0.0.0.0/0"], "allowPublicTraffic": false, "maskRequestHost": "localhost:${PORT}"},
		"autoPause": true, "autoResume": {"enabled": true}, "mcp": null, "iam": {}, "volumeMounts": [], "fromTheFuture": [1]}`, 201))
	if created.ClientID != "6532622b" || created.EnvdVersion != "0.6.13" || deref(created.Domain) != "sluice.localhost:8443" || deref(created.Alias) != "base" {
		t.Errorf("created %+v", created)
	}
	spec, sb := s.boxes.specs[created.SandboxID], s.boxes.boxes[created.SandboxID]
	if deref(created.TrafficAccessToken) == "" || spec.TokenHash != auth.HashToken([]byte(*created.TrafficAccessToken)) {
		t.Errorf("traffic token %v does not belong to the hash %x", created.TrafficAccessToken, spec.TokenHash)
	}
	if deref(created.EnvdAccessToken) == "" || spec.EnvdToken != *created.EnvdAccessToken || spec.EnvdToken == *created.TrafficAccessToken {
		t.Errorf("envd token %v is not the guest's %q", created.EnvdAccessToken, spec.EnvdToken)
	}
	if spec.Timeout != time.Minute || spec.Team != "team-a" || spec.EnvVars["X"] != "1" || !spec.AutoPause || !spec.AutoPauseMemory || !spec.AutoResume ||
		spec.Network.MaskRequestHost != "localhost:${PORT}" || spec.Network.AllowPublicTraffic || !isFalse(spec.Network.AllowInternetAccess) {
		t.Errorf("spec %+v", spec)
	}

	path := "/sandboxes/" + created.SandboxID
	detail := mustDecode[gen.SandboxDetail](t, want("GET", path+"-6532622b", "", 200))
	if detail.State != gen.Running || detail.Metadata["a b"] != "c&d" || !detail.EndAt.Equal(sb.EndAt) || !isFalse(detail.AllowInternetAccess) ||
		!detail.Lifecycle.AutoResume || detail.Lifecycle.OnTimeout != gen.Pause || deref(detail.EnvdAccessToken) != spec.EnvdToken ||
		deref(detail.Network.MaskRequestHost) != "localhost:${PORT}" || !isFalse(detail.Network.AllowPublicTraffic) {
		t.Errorf("detail %+v", detail)
	}

	want("PUT", path+"/network", `{"denyOut": ["8.8.8.8"]}`, 204)
	network := s.boxes.boxes[created.SandboxID].Network
	if network.AllowOut != nil || network.AllowInternetAccess != nil || len(network.DenyOut) != 1 || network.MaskRequestHost == "" {
		t.Errorf("after a full replacement network = %+v", network)
	}

	left := func() time.Duration {
		return time.Until(s.boxes.boxes[created.SandboxID].EndAt).Round(10 * time.Second)
	}
	for _, step := range []struct {
		path, body string
		status     int
		left       time.Duration
	}{
		{path + "/timeout", `{"timeout": 600}`, 204, 600 * time.Second},
		{path + "/timeout", `{"timeout": 100}`, 204, 100 * time.Second}, // may shorten
		{path + "/refreshes", `{"duration": 30}`, 204, 100 * time.Second},
		{path + "/refreshes", `{"duration": 200}`, 204, 200 * time.Second},
		{path + "/refreshes", ``, 204, 200 * time.Second},
		{"/v2" + path + "/connect", `{"timeout": 1}`, 200, 200 * time.Second}, // never shortens
		{"/v2" + path + "/connect", ``, 200, 300 * time.Second},
		{"/v2" + path + "/connect", `{}`, 200, 300 * time.Second},
		{path + "/connect", `{"timeout": 400}`, 200, 400 * time.Second},
		{path + "/pause", `{}`, 204, 400 * time.Second},
		{"/v2" + path + "/connect", `{"timeout": 500}`, 201, 500 * time.Second},
		{path + "/pause", ``, 204, 500 * time.Second},
		{path + "/connect", `{"timeout": 510}`, 201, 510 * time.Second},
		{path + "/pause", `{"memory": true}`, 204, 510 * time.Second},
		{path + "/resume", `{"timeout": 600}`, 201, 600 * time.Second},
		{path + "/timeout", `{"timeout": 9223372036854775807}`, 204, 24 * time.Hour}, // capped, and no overflow
		{path + "/timeout", `{"timeout": -5}`, 204, 0},
	} {
		want("POST", step.path, step.body, step.status)
		if got := left(); got != step.left {
			t.Errorf("after %s %s the sandbox has %v left, want %v", step.path, step.body, got, step.left)
		}
	}
	again := mustDecode[gen.Sandbox](t, want("POST", "/v2"+path+"/connect", "", 200))
	if deref(again.EnvdAccessToken) != spec.EnvdToken || deref(again.TrafficAccessToken) != *created.TrafficAccessToken {
		t.Errorf("connect gives other tokens than create")
	}

	samples := mustDecode[[]gen.SandboxMetric](t, want("GET", path+"/metrics", "", 200))
	if len(samples) != 3 || samples[0].TimestampUnix != 1000 {
		t.Errorf("metrics %+v", samples)
	}
	if some := mustDecode[[]gen.SandboxMetric](t, want("GET", path+"/metrics?start=1001&end=1005", "", 200)); len(some) != 1 {
		t.Errorf("metrics from 1001 to 1005: %+v", some)
	}
	many := mustDecode[struct{ Sandboxes map[string]gen.SandboxMetric }](t, want("GET", "/sandboxes/metrics?sandbox_ids="+created.SandboxID+",inope", "", 200))
	if len(many.Sandboxes) != 1 || many.Sandboxes[created.SandboxID].TimestampUnix != 1010 {
		t.Errorf("metrics of many: %+v", many)
	}
	want("HEAD", path, "", 200)

	want("DELETE", path, "", 204)
	for _, gone := range []struct{ method, path, body string }{
		{"DELETE", path, ""}, {"GET", path, ""}, {"GET", path + "/metrics", ""}, {"POST", path + "/timeout", `{"timeout": 1}`},
		{"POST", path + "/refreshes", ""}, {"POST", path + "/pause", ""}, {"POST", path + "/resume", ""}, {"POST", path + "/connect", `{"timeout": 1}`},
		{"POST", "/v2" + path + "/connect", ""}, {"PUT", path + "/network", "{}"}, {"POST", path + "/snapshots", ""}, {"POST", path + "/fork", ""},
		{"GET", path + "/logs", ""}, {"GET", "/v2" + path + "/logs", ""},
	} {
		got := s.call(gone.method, gone.path, gone.body)
		if text := fmt.Sprintf(`404 Sandbox %q doesn't exist or you don't have access to it`, created.SandboxID); got.message() != text {
			t.Errorf("%s %s after the kill = %s, want %s", gone.method, gone.path, got.message(), text)
		}
	}
}

func TestCreateFamilies(t *testing.T) {
	s := newSite(t, nil)
	for _, test := range []struct {
		path, body string
		timeout    time.Duration
		secured    bool
		private    bool
	}{
		{"/sandboxes", `{"templateID": "base"}`, 15 * time.Second, false, false},
		{"/sandboxes", `{"templateID": "base", "secure": true}`, 15 * time.Second, true, false},
		{"/sandboxes", `{"templateID": "base", "secure": true, "timeout": 300, "network": {"allowPublicTraffic": false}}`, 300 * time.Second, true, true},
		{"/v2/sandboxes", `{"templateID": "code-interpreter-v1"}`, 300 * time.Second, true, false},
		{"/v2/sandboxes", `{"templateID": "base", "secure": false, "timeout": 86400}`, 24 * time.Hour, true, false},
		{"/v2/sandboxes", `{"templateID": "base", "network": {"allowPublicTraffic": false}}`, 300 * time.Second, true, true},
		{"/v2/sandboxes", `{"templateID": "base", "network": {"allowPublicTraffic": true, "httpsPorts": [], "rules": {}, "maskRequestHost": ""}}`, 300 * time.Second, true, false},
	} {
		got := s.call("POST", test.path, test.body)
		if got.StatusCode != 201 {
			t.Errorf("POST %s %s = %s", test.path, test.body, got.message())
			continue
		}
		sb := mustDecode[gen.Sandbox](t, got)
		spec := s.boxes.specs[sb.SandboxID]
		if spec.Timeout != test.timeout {
			t.Errorf("POST %s %s: timeout %v, want %v", test.path, test.body, spec.Timeout, test.timeout)
		}
		if (sb.EnvdAccessToken != nil) != test.secured || (spec.EnvdToken != "") != test.secured {
			t.Errorf("POST %s %s: envd token %v, want one: %v", test.path, test.body, sb.EnvdAccessToken, test.secured)
		}
		if (sb.TrafficAccessToken != nil) != test.private || (spec.TokenHash != [32]byte{}) != test.private {
			t.Errorf("POST %s %s: traffic token %v, want one: %v", test.path, test.body, sb.TrafficAccessToken, test.private)
		}
		detail := mustDecode[gen.SandboxDetail](t, s.call("GET", "/sandboxes/"+sb.SandboxID, ""))
		if deref(detail.EnvdAccessToken) != deref(sb.EnvdAccessToken) {
			t.Errorf("GET tells another envd token than create")
		}
	}
}

func TestNoDomainIsNull(t *testing.T) {
	s := newSite(t, func(o *Options) { o.Domain = "" })
	got := s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`)
	if !strings.Contains(string(got.body), `"domain":null`) {
		t.Errorf("created %s, want a null domain", got.body)
	}
}

// TestRefusals has every input that is the client's mistake.
func TestRefusals(t *testing.T) {
	s := newSite(t, func(o *Options) { o.MaxTimeout = 2 * time.Hour })
	sb := mustDecode[gen.Sandbox](t, s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`))
	path := "/sandboxes/" + sb.SandboxID
	create := func(fields string) string { return `{"templateID": "base", ` + fields + `}` }
	deep := strings.Repeat("[", 20000)
	for _, test := range []struct{ method, path, body, want string }{
		// Bodies.
		{"POST", "/sandboxes", `{`, "400 Error when parsing request: "},
		{"POST", "/v2/sandboxes", `{"templateID": "base"} x`, "400 Error when parsing request: "},
		{"POST", "/v2/sandboxes", "{\"templateID\": \"\xff\"}", "400 Error when parsing request: "},
		{"POST", "/v2/sandboxes", deep, "400 Error when parsing request: "},
		{"POST", "/v2/sandboxes", ``, "400 validation error: request body: value is required"},
		{"POST", "/v2/sandboxes", `null`, "400 validation error: request body"},
		{"POST", "/v2/sandboxes", `[]`, "400 validation error: request body"},
		{"POST", "/v2/sandboxes", `{}`, `400 validation error: request body at "/templateID"`},
		{"POST", "/v2/sandboxes", `{"templateID": ""}`, `400 validation error: request body at "/templateID"`},
		{"POST", "/v2/sandboxes", `{"templateID": 5}`, `400 validation error: request body at "/templateID"`},
		{"POST", "/v2/sandboxes", create(`"timeout": "60"`), `400 validation error: request body at "/timeout"`},
		{"POST", "/v2/sandboxes", create(`"timeout": 1.5`), `400 validation error: request body at "/timeout"`},
		{"POST", "/v2/sandboxes", create(`"timeout": 1e30`), `400 `},
		{"POST", "/v2/sandboxes", create(`"timeout": 1.` + strings.Repeat("0", 1<<19)), "400 Error when parsing request: "},
		{"POST", "/v2/sandboxes", `{"templateID": "` + strings.Repeat("x", 1<<19) + `"}`, `404 Template "xxx`},
		{"POST", "/v2/sandboxes", create(`"network": {"denyOut": ["` + strings.Repeat("x", 1<<19) + `"]}`), "400 invalid denied CIDR xxx"},
		{"POST", "/v2/sandboxes", create(`"metadata": {"a": 1}`), `400 validation error: request body at "/metadata/a"`},
		{"POST", "/v2/sandboxes", create(`"metadata": ` + pairs(65, 1)), `400 validation error: request body at "/metadata": there must be at most 64 properties`},
		{"POST", "/v2/sandboxes", create(`"metadata": {"` + strings.Repeat("k", 257) + `": ""}`), `400 validation error: metadata: key "kkk`},
		{"POST", "/v2/sandboxes", create(`"metadata": ` + pairs(64, 256)), "400 validation error: metadata: larger than 16384 bytes as JSON"},
		{"POST", "/v2/sandboxes", create(`"envVars": ` + pairs(257, 1)), `400 validation error: request body at "/envVars": there must be at most 256 properties`},
		{"POST", "/v2/sandboxes", create(`"envVars": ` + pairs(256, 512)), "400 validation error: envVars: larger than 131072 bytes"},
		{"POST", "/v2/sandboxes", create(`"envVars": ["A=1"]`), `400 validation error: request body at "/envVars"`},
		{"POST", "/v2/sandboxes", create(`"envVars": {"A=B": "1"}`), `400 validation error: envVars: "A=B"`},
		{"POST", "/v2/sandboxes", create(`"envVars": {"A": "\u0000"}`), `400 validation error: envVars: "A"`},
		{"POST", "/v2/sandboxes", create(`"autoResume": {}`), `400 validation error: request body at "/autoResume/enabled"`},
		{"POST", "/v2/sandboxes", create(`"network": {"allowOut": "1.1.1.1"}`), `400 validation error: request body at "/network/allowOut"`},
		{"POST", "/v2/sandboxes", create(`"network": {"httpsPorts": ["443"]}`), `400 validation error: request body at "/network/httpsPorts/0"`},
		{"POST", "/v2/sandboxes", create(`"x": "` + strings.Repeat("x", 1<<20) + `"`), "413 Request body is larger than 1048576 bytes"},
		// Create.
		{"POST", "/v2/sandboxes", create(`"timeout": 0`), "400 Timeout must be greater than 0"},
		{"POST", "/sandboxes", create(`"timeout": -1`), "400 Timeout must be greater than 0"},
		{"POST", "/v2/sandboxes", create(`"timeout": 7201`), "400 Timeout cannot be greater than 2 hours"},
		{"POST", "/v2/sandboxes", create(`"timeout": 9223372036854775807`), "400 Timeout cannot be greater than 2 hours"},
		{"POST", "/v2/sandboxes", create(`"autoPauseMemory": false`), "400 autoPauseMemory=false only applies when autoPause is true."},
		{"POST", "/v2/sandboxes", create(`"autoPause": true, "autoPauseMemory": false, "autoResume": {"enabled": true}`), "400 autoPauseMemory=false keeps only the files"},
		{"POST", "/sandboxes", create(`"network": {"allowPublicTraffic": false}`),
			"400 You cannot create a sandbox without public access unless you enable secure envd access via 'secure' flag."},
		{"POST", "/v2/sandboxes", create(`"network": {"denyOut": ["example.com"]}`), "400 invalid denied CIDR example.com"},
		{"POST", "/v2/sandboxes", create(`"network": {"maskRequestHost": "-https://abcd"}`), "400 mask request host is not valid: -https://abcd"},
		{"POST", "/v2/sandboxes", create(`"network": {"maskRequestHost": "bücher.de"}`), `400 mask request host must be ASCII only, such as "xn--bcher-kva.de"`},
		{"POST", "/v2/sandboxes", create(`"network": {"egressProxy": {"address": "1.1.1.1:1080"}}`), "403 Egress proxy (network.egressProxy) is not enabled for this team."},
		{"POST", "/v2/sandboxes", create(`"network": {"rules": {"example.com": [{"transform": {"headers": {"a": "b"}}}]}}`), "400 network.rules is not supported by this server"},
		{"POST", "/v2/sandboxes", create(`"network": {"httpsPorts": [8443]}`), "400 network.httpsPorts is not supported by this server"},
		{"POST", "/v2/sandboxes", create(`"network": {"httpsPorts": [49983]}`), "400 network.httpsPorts: 49983"},
		{"POST", "/v2/sandboxes", create(`"network": {"httpsPorts": [65536]}`), "400 network.httpsPorts: 65536"},
		{"POST", "/v2/sandboxes", create(`"mcp": {"github": {}, "x": {"y": 1}}`), "400 mcp is not supported by this server"},
		{"POST", "/v2/sandboxes", create(`"iam": {"tokens": {"a": {"audience": "b"}}}`), "400 iam is not supported by this server"},
		{"POST", "/v2/sandboxes", create(`"volumeMounts": [{"name": "a", "path": "/a"}]`), "400 volumeMounts is not supported by this server"},
		{"POST", "/v2/sandboxes", `{"templateID": "nope"}`, `404 Template "nope" not found`},
		// Ids.
		{"GET", "/sandboxes/UPPER", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/i_1", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/" + sb.SandboxID + "-", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/" + sb.SandboxID + "-a-b", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/-6532622b", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/a%2Fb", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/%00", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/%C3%BC", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/" + strings.Repeat("a", 65), "", "400 Invalid sandbox ID"},
		{"DELETE", "/sandboxes/A", "", "400 Invalid sandbox ID"},
		{"POST", "/v2/sandboxes/A/connect", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/metrics?sandbox_ids=A", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/metrics?sandbox_ids=a,,b", "", "400 Invalid sandbox ID"},
		{"GET", "/sandboxes/metrics", "", "400 validation error: "},
		{"GET", "/sandboxes/metrics?sandbox_ids=" + strings.Repeat("a,", 100) + "a", "", "400 validation error: at most 100"},
		// State changes.
		{"POST", path + "/timeout", ``, "400 validation error: request body"},
		{"POST", path + "/timeout", `{}`, `400 validation error: request body at "/timeout"`},
		{"POST", path + "/timeout", `{"timeout": null}`, `400 validation error: request body at "/timeout"`},
		{"POST", path + "/refreshes", `{"duration": 3601}`, `400 validation error: request body at "/duration"`},
		{"POST", path + "/refreshes", `{"duration": -1}`, `400 validation error: request body at "/duration"`},
		{"POST", path + "/connect", ``, "400 validation error: request body"},
		{"POST", path + "/connect", `{}`, `400 validation error: request body at "/timeout"`},
		{"POST", path + "/connect", `{"timeout": -1}`, `400 validation error: request body at "/timeout"`},
		{"POST", path + "/connect", `{"timeout": 7201}`, "400 Timeout cannot be greater than 2 hours"},
		{"POST", "/v2" + path + "/connect", `{"timeout": 9223372036854775807}`, "400 Timeout cannot be greater than 2 hours"},
		{"POST", path + "/pause", `{"memory": "no"}`, `400 validation error: request body at "/memory"`},
		{"POST", path + "/pause", `{"requireHealthyGuest": true}`, "400 requireHealthyGuest is not supported by this server"},
		{"POST", path + "/resume", ``, "409 Sandbox"},
		{"PUT", path + "/network", ``, "400 validation error: request body"},
		{"PUT", path + "/network", `{"allowOut": [1]}`, `400 validation error: request body at "/allowOut/0"`},
		{"PUT", path + "/network", `{"denyOut": ["nope"]}`, "400 invalid denied CIDR nope"},
		{"PUT", path + "/network", `{"egressProxy": {"address": "a:1"}}`, "403 Egress proxy (network.egressProxy) is not enabled for this team."},
		{"PUT", path + "/network", `{"rules": {"a.com": [{}]}}`, "400 network.rules is not supported by this server"},
		{"GET", path + "/metrics?start=5&end=1", "", "400 validation error: start is after end"},
		{"GET", path + "/metrics?start=x", "", "400 validation error: "},
		// Snapshots, copies and logs.
		{"POST", path + "/snapshots", `{"name": 5}`, `400 validation error: request body at "/name"`},
		{"POST", path + "/snapshots", `{"name": "` + strings.Repeat("n", 257) + `"}`, `400 validation error: request body at "/name"`},
		{"POST", path + "/snapshots", `{"memory": false}`, "400 memory=false is not supported by this server"},
		{"POST", path + "/snapshots", `{"name": "Base:default"}`, `400 "Base:default" is the name of a template`},
		{"POST", path + "/fork", `{"count": 0}`, `400 validation error: request body at "/count"`},
		{"POST", path + "/fork", `{"count": 101}`, `400 validation error: request body at "/count"`},
		{"POST", path + "/fork", `{"timeout": 0}`, "400 Timeout must be greater than 0"},
		{"POST", path + "/fork", `{"timeout": 7201}`, "400 Timeout cannot be greater than 2 hours"},
		{"GET", "/snapshots?limit=0", "", "400 validation error: "},
		{"GET", "/snapshots?limit=101", "", "400 validation error: "},
		{"GET", "/snapshots?sandboxID=UPPER", "", "400 Invalid sandbox ID"},
		{"GET", "/snapshots?nextToken=garbage", "", "400 Invalid next token"},
		{"GET", "/snapshots?nextToken=" + cursor{id: "snapa", asc: true}.String(), "", "400 Invalid next token"},
		{"GET", path + "/logs?start=-1", "", "400 validation error: "},
		{"GET", path + "/logs?limit=-1", "", "400 validation error: "},
		{"GET", "/v2" + path + "/logs?limit=1001", "", "400 validation error: "},
		{"GET", "/v2" + path + "/logs?direction=up", "", "400 validation error: "},
		{"GET", "/v2" + path + "/logs?level=loud", "", "400 validation error: "},
		{"GET", "/v2" + path + "/logs?cursor=x", "", "400 validation error: "},
		{"DELETE", "/templates/base", "", `403 Template "base" belongs to the operator`},
		{"DELETE", "/templates/nope", "", `404 Template "nope" not found`},
		// Lists.
		{"GET", "/v2/sandboxes?limit=0", "", "400 validation error: "},
		{"GET", "/v2/sandboxes?limit=101", "", "400 validation error: "},
		{"GET", "/v2/sandboxes?limit=x", "", "400 validation error: "},
		{"GET", "/v2/sandboxes?order=up", "", "400 validation error: "},
		{"GET", "/v2/sandboxes?state=running,dead", "", `400 validation error: state "dead"`},
		{"GET", "/v2/sandboxes?startedAfter=yesterday", "", "400 validation error: "},
		{"GET", "/v2/sandboxes?nextToken=garbage", "", "400 Invalid next token"},
		{"GET", "/v2/sandboxes?metadata=user=%zz", "", `400 validation error: query: invalid URL escape "%zz"`},
		{"GET", "/sandboxes?metadata=user=%zz", "", `400 validation error: query: invalid URL escape "%zz"`},
		{"GET", "/sandboxes?metadata=user%3Da;x=1", "", "400 validation error: query: invalid semicolon separator in query"},
		{"GET", "/sandboxes?%", "", `400 validation error: query: invalid URL escape "%"`},
		{"GET", "/sandboxes?metadata=a%3D1&metadata=b%3D2", "", "400 validation error: "},
		{"GET", "/v2/sandboxes?state=running&state=paused", "", "400 validation error: "},
		{"GET", "/v2/sandboxes?metadata=%25zz", "", "400 Invalid metadata filter: "},
		{"GET", "/sandboxes?metadata=a%3D%25zz", "", "400 Invalid metadata filter: "},
		// Routes.
		{"GET", "/", "", "404 No such endpoint: GET /"},
		{"GET", "/nope", "", "404 No such endpoint: GET /nope"},
		{"GET", "/sandboxes/", "", "404 No such endpoint"},
		{"GET", "//sandboxes", "", "404 No such endpoint"},
		{"GET", "/v2/../sandboxes", "", "404 No such endpoint"},
		{"PATCH", "/sandboxes", "", "405 Method PATCH is not allowed here"},
		{"PUT", path, "", "405 Method PUT is not allowed here"},
		{"GET", path + "/timeout", "", "405 Method GET is not allowed here"},
		{"OPTIONS", path, "", "405 Method OPTIONS is not allowed here"},
	} {
		got := s.call(test.method, test.path, test.body).message()
		if !strings.HasPrefix(got, test.want) {
			t.Errorf("%s %s %.80s = %s, want %s", test.method, test.path, test.body, got, test.want)
		}
		if len(got) > maxMessage+50 { // the request is not repeated, however large it was
			t.Errorf("%s %s %.80s: the message has %d bytes", test.method, test.path, test.body, len(got))
		}
	}
	if len(s.boxes.specs) != 1 {
		t.Errorf("a refused create made a sandbox")
	}
}

// pairs is an object of n strings of that many bytes.
func pairs(n, size int) string {
	var members []string
	for i := range n {
		members = append(members, fmt.Sprintf(`"k%d": %q`, i, strings.Repeat("v", size)))
	}
	return "{" + strings.Join(members, ", ") + "}"
}

// TestNullIsLeftOut sends null for each optional field of every body, as clients in some languages do.
func TestNullIsLeftOut(t *testing.T) {
	s := newSite(t, nil)
	required := map[string]string{"templateID": `"base"`, "timeout": "60"}
	for pattern, op := range s.handler.operations {
		if op.body == nil {
			continue
		}
		method, path, _ := strings.Cut(strings.ReplaceAll(pattern, "{sandboxID}", "ix"), " ")
		schema := op.body.Content.Get("application/json").Schema.Value
		var base []string
		for _, name := range schema.Required {
			base = append(base, fmt.Sprintf("%q: %s", name, required[name]))
		}
		try := func(member string) {
			t.Helper()
			s.boxes.set("ix", func(sb *sandboxd.Sandbox) {
				sb.State, sb.Team = sandboxd.StateRunning, "team-a"
				if op.id == "resumeSandbox" {
					sb.State = sandboxd.StatePaused
				}
			})
			body := "{" + strings.Join(append(slices.Clone(base), member), ", ") + "}"
			if got := s.call(method, path, body); got.StatusCode >= 300 {
				t.Errorf("%s %s = %s", pattern, body, got.message())
			}
		}
		for name, property := range schema.Properties {
			if slices.Contains(schema.Required, name) {
				continue
			}
			try(fmt.Sprintf("%q: null", name))
			for inner := range property.Value.Properties {
				if !slices.Contains(property.Value.Required, inner) {
					try(fmt.Sprintf("%q: {%q: null}", name, inner))
				}
			}
		}
	}
}

func TestWrongContentType(t *testing.T) {
	s := newSite(t, nil)
	if got := s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`, "Content-Type", "text/plain").message(); !strings.HasPrefix(got, "400 validation error: ") {
		t.Errorf("text/plain = %s", got)
	}
	if got := s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`, "Content-Type", "application/json; charset=utf-8"); got.StatusCode != 201 {
		t.Errorf("with a charset = %s", got.message())
	}
	if got := s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`, "Content-Type", ""); got.StatusCode != 201 {
		t.Errorf("without a content type = %s", got.message())
	}
}

func TestAnotherTeamSeesNothing(t *testing.T) {
	s := newSite(t, nil)
	sb := mustDecode[gen.Sandbox](t, s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`))
	path := "/sandboxes/" + sb.SandboxID
	for _, test := range []struct{ method, path, body string }{
		{"GET", path, ""}, {"DELETE", path, ""}, {"POST", path + "/timeout", `{"timeout": 0}`}, {"POST", path + "/refreshes", ""}, {"POST", path + "/pause", ""},
		{"POST", "/v2" + path + "/connect", ""}, {"POST", path + "/resume", ""}, {"PUT", path + "/network", "{}"}, {"GET", path + "/metrics", ""},
		{"POST", path + "/snapshots", ""}, {"POST", path + "/fork", ""}, {"GET", path + "/logs", ""}, {"GET", "/v2" + path + "/logs", ""},
	} {
		if got := s.call(test.method, test.path, test.body, "X-API-Key", keyB); got.StatusCode != 404 {
			t.Errorf("%s %s by another team = %s, want 404", test.method, test.path, got.message())
		}
	}
	for _, list := range []string{"/sandboxes", "/v2/sandboxes"} {
		if got := s.call("GET", list, "", "X-API-Key", keyB); strings.TrimSpace(string(got.body)) != "[]" {
			t.Errorf("GET %s by another team = %s", list, got.body)
		}
	}
	if got := s.call("GET", "/sandboxes/metrics?sandbox_ids="+sb.SandboxID, "", "X-API-Key", keyB); strings.Contains(string(got.body), sb.SandboxID) {
		t.Errorf("metrics of many by another team = %s", got.body)
	}
	if got := s.call("GET", path, ""); got.StatusCode != 200 {
		t.Errorf("GET by its own team = %s", got.message())
	}
}

func TestTransitions(t *testing.T) {
	s := newSite(t, nil)
	for _, test := range []struct {
		state        sandboxd.State
		get, timeout string
	}{
		{sandboxd.StateCreating, "404 ", "404 "},
		{sandboxd.StateKilling, "404 ", "404 "},
		{sandboxd.StatePausing, "200 ", `409 Sandbox "ix" is being paused`},
		{sandboxd.StatePaused, "200 ", "204 "},
		{sandboxd.StateRunning, "200 ", "204 "},
	} {
		s.boxes.set("ix", func(sb *sandboxd.Sandbox) { sb.State, sb.Team = test.state, "team-a" })
		got := s.call("GET", "/sandboxes/ix", "")
		if !strings.HasPrefix(got.message(), test.get) {
			t.Errorf("GET while %s = %s, want %s", test.state, got.message(), test.get)
		}
		if wantState := map[bool]string{true: `"state":"running"`, false: `"state":"paused"`}[test.state == sandboxd.StateRunning]; got.StatusCode == 200 && !strings.Contains(string(got.body), wantState) {
			t.Errorf("GET while %s = %s", test.state, got.body)
		}
		if got := s.call("POST", "/sandboxes/ix/timeout", `{"timeout": 5}`); !strings.HasPrefix(got.message(), test.timeout) {
			t.Errorf("timeout while %s = %s, want %s", test.state, got.message(), test.timeout)
		}
	}
	s.boxes.set("ix", func(sb *sandboxd.Sandbox) { sb.State = sandboxd.StatePaused })
	if got := s.call("POST", "/sandboxes/ix/pause", "{}").message(); got != "409 Error pausing sandbox - sandbox 'ix' is already paused" {
		t.Errorf("second pause = %s", got)
	}
}

// TestPauseAndConnect has what the manager is told by each form of the two.
func TestPauseAndConnect(t *testing.T) {
	s := newSite(t, nil)
	sb := mustDecode[gen.Sandbox](t, s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`))
	path := "/sandboxes/" + sb.SandboxID
	for _, test := range []struct {
		pause      string
		keep       bool
		path, body string
		drop       bool
	}{
		{``, true, "/v2" + path + "/connect", ``, false},
		{`{}`, true, "/v2" + path + "/connect", `{"memory": true}`, false},
		{`{"memory": false}`, false, "/v2" + path + "/connect", `{"memory": false}`, true},
		{`{"memory": true}`, true, path + "/connect", `{"timeout": 60, "memory": false}`, true},
		{`{"memory": null}`, true, path + "/connect", `{"timeout": 60}`, false},
		{`{}`, true, path + "/resume", `{"memory": false, "autoPause": true}`, true},
		{`{}`, true, path + "/resume", ``, false},
	} {
		if got := s.call("POST", path+"/pause", test.pause); got.StatusCode != 204 || s.boxes.withMemory != test.keep {
			t.Errorf("pause %s = %s with memory %v, want %v", test.pause, got.message(), s.boxes.withMemory, test.keep)
		}
		if detail := mustDecode[gen.SandboxDetail](t, s.call("GET", path, "")); detail.State != gen.Paused {
			t.Errorf("after pause %s GET says %s", test.pause, detail.State)
		}
		if items := mustDecode[[]gen.ListedSandbox](t, s.call("GET", "/v2/sandboxes?state=paused", "")); len(items) != 1 || items[0].State != gen.Paused {
			t.Errorf("after pause %s the list of paused ones has %+v", test.pause, items)
		}
		if got := s.call("POST", path+"/pause", test.pause).message(); got != "409 Error pausing sandbox - sandbox '"+sb.SandboxID+"' is already paused" {
			t.Errorf("second pause = %s", got)
		}
		s.boxes.connects = nil
		if got := s.call("POST", test.path, test.body); got.StatusCode != 201 || len(s.boxes.connects) != 1 {
			t.Errorf("%s %s = %s", test.path, test.body, got.message())
			continue
		}
		if opts := s.boxes.connects[0]; opts.DropMemory != test.drop || opts.EnvdToken != *sb.EnvdAccessToken {
			t.Errorf("%s %s is told to the manager as %+v, want DropMemory %v and the sandbox's token", test.path, test.body, opts, test.drop)
		}
	}
	open := mustDecode[gen.Sandbox](t, s.call("POST", "/sandboxes", `{"templateID": "base"}`))
	s.call("POST", "/sandboxes/"+open.SandboxID+"/pause", "")
	s.boxes.connects = nil
	if got := s.call("POST", "/sandboxes/"+open.SandboxID+"/connect", `{"timeout": 5}`); got.StatusCode != 201 || s.boxes.connects[0].EnvdToken != "" {
		t.Errorf("connect to a sandbox that is not secured = %s, %+v", got.message(), s.boxes.connects)
	}
}

// TestPauseLosesARace: between the look and the act somebody else paused it.
func TestPauseLosesARace(t *testing.T) {
	for _, test := range []struct {
		state sandboxd.State
		want  string
	}{
		{sandboxd.StatePaused, "409 Error pausing sandbox - sandbox 'ix' is already paused"},
		{sandboxd.StatePausing, `409 Sandbox "ix" is being paused`},
	} {
		s := newSite(t, nil)
		s.boxes.set("ix", func(sb *sandboxd.Sandbox) { sb.State, sb.Team = sandboxd.StateRunning, "team-a" })
		s.handler.sandboxes = &racing{memory: s.boxes, state: test.state}
		if got := s.call("POST", "/sandboxes/ix/pause", "{}").message(); got != test.want {
			t.Errorf("pause of a sandbox that is %s meanwhile = %s, want %s", test.state, got, test.want)
		}
	}
}

// racing changes the state of a sandbox just before it is paused.
type racing struct {
	*memory
	state sandboxd.State
}

func (r *racing) Pause(ctx context.Context, id string, keepMemory bool) error {
	r.set(id, func(sb *sandboxd.Sandbox) { sb.State = r.state })
	return r.memory.Pause(ctx, id, keepMemory)
}

// TestResumeTakesAPlace: a paused sandbox is none of the running ones that a team may have, and becomes one again.
func TestResumeTakesAPlace(t *testing.T) {
	s := newSite(t, func(o *Options) { o.TeamSandboxes = 1 })
	sb := mustDecode[gen.Sandbox](t, s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`))
	s.call("POST", "/sandboxes/"+sb.SandboxID+"/pause", "")
	other := mustDecode[gen.Sandbox](t, s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`))
	if got := s.call("POST", "/v2/sandboxes/"+sb.SandboxID+"/connect", ""); got.StatusCode != 429 {
		t.Errorf("connect to a paused sandbox without a free place = %s, want 429", got.message())
	}
	if got := s.call("POST", "/v2/sandboxes/"+other.SandboxID+"/connect", ""); got.StatusCode != 200 {
		t.Errorf("connect to a running sandbox without a free place = %s", got.message())
	}
	s.call("DELETE", "/sandboxes/"+other.SandboxID, "")
	if got := s.call("POST", "/v2/sandboxes/"+sb.SandboxID+"/connect", ""); got.StatusCode != 201 {
		t.Errorf("connect with a free place = %s", got.message())
	}
}

func TestTokensAreHex(t *testing.T) {
	s := newSite(t, nil)
	sb := mustDecode[gen.Sandbox](t, s.call("POST", "/v2/sandboxes", `{"templateID": "base", "network": {"allowPublicTraffic": false}}`))
	for _, token := range []*string{sb.EnvdAccessToken, sb.TrafficAccessToken} {
		if raw, err := hex.DecodeString(deref(token)); err != nil || len(raw) != 32 {
			t.Errorf("token %q is not 64 hexadecimal digits", deref(token))
		}
	}
	if record, err := json.Marshal(s.boxes.boxes[sb.SandboxID]); err != nil || strings.Contains(string(record), *sb.EnvdAccessToken) || strings.Contains(string(record), *sb.TrafficAccessToken) {
		t.Errorf("the record holds a token: %s", record)
	}
}

func FuzzParseID(f *testing.F) {
	for _, seed := range []string{"iabc", "iabc-6532622b", "", "-", "a-b-c", "A", "ü", "a/b", "a\x00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := parseID(s)
		if err != nil {
			return
		}
		if !isID(id) || !strings.HasPrefix(s, id) {
			t.Errorf("parseID(%q) = %q", s, id)
		}
		if again, err := parseID(id); err != nil || again != id {
			t.Errorf("parseID(%q) = %q, %v, want the same again", id, again, err)
		}
	})
}
