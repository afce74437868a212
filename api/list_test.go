package api

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/sandboxd"
)

// fill puts n sandboxes of team A on a site, one started every second; every third shares its start with the one before.
func fill(m *memory, n int) (ids []string) {
	start := time.Date(2026, 11, 1, 0, 0, 0, 123456000, time.UTC)
	for i := range n {
		id := fmt.Sprintf("%s%03d", m.prefix, i)
		at := start.Add(time.Duration(i-boolToInt(i%3 == 2)) * time.Second)
		m.set(id, func(sb *sandboxd.Sandbox) {
			sb.State, sb.Team, sb.Template, sb.Alias, sb.StartedAt, sb.EndAt = sandboxd.StateRunning, "team-a", "tmplbase", "base", at, at.Add(time.Hour)
			sb.Metadata = map[string]string{"parity": fmt.Sprint(i % 2), "a b": "c&d=e"}
			if i%5 == 4 {
				sb.State = sandboxd.StatePaused
			}
		})
		ids = append(ids, id)
	}
	return ids
}

func boolToInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

func idsOf(items []gen.ListedSandbox) []string {
	ids := []string{}
	for _, item := range items {
		ids = append(ids, item.SandboxID)
	}
	return ids
}

// pages follows the next tokens to the end.
func (s *site) pages(t *testing.T, params url.Values) (ids []string, pages int) {
	t.Helper()
	for {
		got := s.call("GET", "/v2/sandboxes?"+params.Encode(), "")
		if got.StatusCode != http.StatusOK {
			t.Fatalf("GET /v2/sandboxes?%s = %s", params.Encode(), got.message())
		}
		ids, pages = append(ids, idsOf(mustDecode[[]gen.ListedSandbox](t, got))...), pages+1
		next := got.Header.Get("X-Next-Token")
		if next == "" {
			return ids, pages
		}
		params.Set("nextToken", next)
	}
}

func TestPaging(t *testing.T) {
	s := newSite(t, nil)
	all := fill(s.boxes, 23)
	for _, limit := range []string{"1", "7", "23", "24", "100"} {
		for _, order := range []string{"", "asc", "desc"} {
			params := url.Values{"limit": {limit}}
			want := slices.Clone(all)
			if order != "" {
				params.Set("order", order)
			}
			if order != "asc" {
				slices.Reverse(want)
			}
			got, _ := s.pages(t, params)
			if !slices.Equal(got, want) {
				t.Errorf("limit %s order %q = %v, want %v", limit, order, got, want)
			}
		}
	}
	// A token carries its direction, as it does for a client that drops the order.
	first := s.call("GET", "/v2/sandboxes?limit=2&order=asc", "").Header.Get("X-Next-Token")
	second := mustDecode[[]gen.ListedSandbox](t, s.call("GET", "/v2/sandboxes?limit=2&nextToken="+first, ""))
	if got := idsOf(second); !slices.Equal(got, all[2:4]) {
		t.Errorf("the second ascending page = %v, want %v", got, all[2:4])
	}
	if got := s.call("GET", "/v2/sandboxes?order=desc&nextToken="+first, "").message(); got != "400 Invalid next token" {
		t.Errorf("an ascending token in a descending list = %s", got)
	}
}

func TestLegacyListIsCut(t *testing.T) {
	s := newSite(t, nil)
	ids := fill(s.boxes, legacyPageSize+2)
	for _, id := range ids {
		s.boxes.set(id, func(sb *sandboxd.Sandbox) { sb.State = sandboxd.StateRunning })
	}
	first := s.call("GET", "/sandboxes", "")
	got := idsOf(mustDecode[[]gen.ListedSandbox](t, first))
	if total := first.Header.Get("X-Total-Running"); len(got) != legacyPageSize || total != fmt.Sprint(len(ids)) {
		t.Errorf("v1 list has %d of %s, want %d of %d", len(got), total, legacyPageSize, len(ids))
	}
	rest, _ := s.pages(t, url.Values{"state": {"running"}, "nextToken": {first.Header.Get("X-Next-Token")}})
	if all := slices.Concat(got, rest); len(all) != len(ids) || rest[len(rest)-1] != ids[0] {
		t.Errorf("v1 list and what follows its token have %d sandboxes, the last %q, want %d and %q", len(all), rest[len(rest)-1], len(ids), ids[0])
	}
}

// TestLargestListFitsMaxPeerBody: a legal list that is too large for another node would be missing from the whole. Twelve sandboxes
// with a megabyte of "<" once made 72 MB of it.
func TestLargestListFitsMaxPeerBody(t *testing.T) {
	s := newSite(t, nil)
	create := func(metadata map[string]string) reply {
		t.Helper()
		body, err := json.Marshal(map[string]any{"templateID": "code-interpreter-v1", "metadata": metadata})
		if err != nil {
			t.Fatal(err)
		}
		return s.call("POST", "/v2/sandboxes", string(body))
	}
	frame := len(`{"k":""}` + "\n")
	for _, tt := range []struct {
		unit string
		size int // of the unit in a list
	}{{"<", 1}, {"\x01", 6}, {"\u2028", 6}, {`"`, 2}, {"ü", 2}} {
		most := (maxMetadata - frame) / tt.size
		if got := create(map[string]string{"k": strings.Repeat(tt.unit, most+1)}); got.message() != "400 validation error: metadata: larger than 16384 bytes as JSON" {
			t.Errorf("%d times %q = %s", most+1, tt.unit, got.message())
		}
		if got := create(map[string]string{"k": strings.Repeat(tt.unit, most)}); got.StatusCode != http.StatusCreated {
			t.Errorf("%d times %q = %s", most, tt.unit, got.message())
		}
	}
	list := s.call("GET", "/sandboxes", "")
	if n := len(s.boxes.boxes); len(list.body)/n*legacyPageSize > maxPeerBody || !strings.Contains(string(list.body), "<<") {
		t.Errorf("a list of %d has %d bytes; %d such would have more than the %d that nodes read, or are escaped", n, len(list.body), legacyPageSize, maxPeerBody)
	}
}

func TestListFilters(t *testing.T) {
	s := newSite(t, nil)
	all := fill(s.boxes, 20)
	s.boxes.set("other", func(sb *sandboxd.Sandbox) {
		sb.State, sb.Team, sb.StartedAt = sandboxd.StateRunning, "team-b", time.Now()
	})
	s.boxes.set("leaving", func(sb *sandboxd.Sandbox) {
		sb.State, sb.Team, sb.StartedAt = sandboxd.StateKilling, "team-a", time.Now()
	})
	s.boxes.set("coming", func(sb *sandboxd.Sandbox) {
		sb.State, sb.Team, sb.StartedAt = sandboxd.StateCreating, "team-a", time.Now()
	})
	keep := func(f func(i int) bool) (want []string) {
		for i, id := range all {
			if f(i) {
				want = append(want, id)
			}
		}
		slices.Reverse(want)
		return want
	}
	running := func(i int) bool { return i%5 != 4 }
	for _, test := range []struct {
		query   string
		want    []string
		running string
	}{
		{"", keep(func(int) bool { return true }), "16"},
		{"state=running", keep(running), "16"},
		{"state=paused", keep(func(i int) bool { return !running(i) }), "16"},
		{"state=running,paused", keep(func(int) bool { return true }), "16"},
		{"state=paused%2Crunning", keep(func(int) bool { return true }), "16"},
		{"template=base", keep(func(int) bool { return true }), "16"},
		{"template=tmplbase", keep(func(int) bool { return true }), "16"},
		{"template=other", nil, "0"},
		{"metadata=parity%3D1", keep(func(i int) bool { return i%2 == 1 }), "8"},
		{"metadata=parity%3D1%26a%252520b%3Dc%252526d%25253De", keep(func(i int) bool { return i%2 == 1 }), "8"},
		{"metadata=a%252520b%3Dc%252526d%25253De&state=paused", keep(func(i int) bool { return !running(i) }), "16"}, // as the JS SDK sends it
		{"metadata=parity%3D2", nil, "0"},
		{"metadata=nope%3D", nil, "0"},
		{"startedAfter=2026-11-01T00:00:05.123456Z", keep(func(i int) bool { return i > 5 }), "11"},
		{"startedAfter=2026-11-01T01:00:05.123456%2B01:00", keep(func(i int) bool { return i > 5 }), "11"},
		{"fromTheFuture=1", keep(func(int) bool { return true }), "16"},
	} {
		got := s.call("GET", "/v2/sandboxes?"+test.query, "")
		if ids := idsOf(mustDecode[[]gen.ListedSandbox](t, got)); !slices.Equal(ids, append([]string{}, test.want...)) {
			t.Errorf("list %q = %v, want %v", test.query, ids, test.want)
		}
		if total := got.Header.Get("X-Total-Running"); total != test.running {
			t.Errorf("list %q: X-Total-Running %q, want %q", test.query, total, test.running)
		}
	}
	if got := idsOf(mustDecode[[]gen.ListedSandbox](t, s.call("GET", "/sandboxes", ""))); !slices.Equal(got, keep(running)) {
		t.Errorf("v1 list = %v, want the running ones %v", got, keep(running))
	}
	if got := idsOf(mustDecode[[]gen.ListedSandbox](t, s.call("GET", "/sandboxes?metadata=parity%3D0", ""))); !slices.Equal(got, keep(func(i int) bool { return running(i) && i%2 == 0 })) {
		t.Errorf("v1 list by metadata = %v", got)
	}
}

func TestParseMetadata(t *testing.T) {
	for s, want := range map[string]map[string]string{
		"":                       nil,
		"a=b":                    {"a": "b"},
		"a%2520b%3Dc%2526d":      {"a b": "c&d"}, // after the query's own decoding
		"a%20b=c%26d":            nil,            // its whole decoded once more is "a b=c&d"
		"k=%252B":                {"k": "+"},
		"k":                      {"k": ""},
		"k=a=b":                  {"k": "a=b"},
		"a=1&b=2&":               {"a": "1", "b": "2"},
		"a=1&a=1":                {"a": "1"},
		"%C3%BC=%25F0%259F%2598": {"ü": "\xf0\x9f\x98"},
	} {
		if s == "a%20b=c%26d" {
			want = map[string]string{"a b": "c", "d": ""}
		}
		got, err := parseMetadata(s)
		if err != nil || !maps.Equal(got, want) {
			t.Errorf("parseMetadata(%q) = %v, %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"%", "%zz", "a=%25zz", "%25g=1", "a=1&a=2"} {
		if got, err := parseMetadata(s); err == nil {
			t.Errorf("parseMetadata(%q) = %v, want an error", s, got)
		}
	}
}

// encodeMetadata is what SDKs do, before the query's own encoding.
func encodeMetadata(metadata map[string]string) string {
	var pairs []string
	for key, value := range metadata {
		pairs = append(pairs, url.QueryEscape(key)+"="+url.QueryEscape(value))
	}
	return url.QueryEscape(strings.Join(pairs, "&"))
}

func FuzzParseMetadata(f *testing.F) {
	for _, seed := range []string{"", "a=b", "a%2520b%3Dc%2526d", "%", "=", "&&", "a=1&a=2", "%26%3D"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseMetadata(s)
		if err != nil {
			return
		}
		if again, err := parseMetadata(encodeMetadata(got)); err != nil || !maps.Equal(got, again) {
			t.Errorf("parseMetadata(%q) = %q, which comes back as %q, %v", s, got, again, err)
		}
	})
}

func TestParseCursor(t *testing.T) {
	at := time.Date(2026, 11, 24, 1, 2, 3, 45600, time.UTC)
	for _, c := range []cursor{{at, "iabc", false}, {at, "iabc", true}, {time.Unix(0, 0).UTC(), "0", false}} {
		token := c.String()
		if got, err := parseCursor(token); err != nil || got != c {
			t.Errorf("parseCursor(%q) = %v, %v, want %v", token, got, err, c)
		}
		if got, err := parseCursor(strings.TrimRight(token, "=")); err != nil || got != c {
			t.Errorf("parseCursor(%q) without padding = %v, %v, want %v", token, got, err, c)
		}
	}
	for _, text := range []string{
		"", "x", "__", "2026-11-24T01:02:03Z", "2026-11-24T01:02:03Z__", "2026-11-24T01:02:03Z__A", "2026-11-24T01:02:03Z__a__desc",
		"2026-11-24T01:02:03Z__a__asc__asc", "yesterday__a", "2026-11-24T01:02:03+01:00__a", "2026-11-24T01:02:03.100Z__a", "2026-13-24T01:02:03Z__a",
	} {
		if got, err := parseCursor(base64.URLEncoding.EncodeToString([]byte(text))); err == nil {
			t.Errorf("parseCursor of %q = %v, want an error", text, got)
		}
	}
	for _, token := range []string{"!", "====", "a", "MjAyNi0xMS0yNFQwMTowMjowM1pfX2E\n"} {
		if got, err := parseCursor(token); err == nil {
			t.Errorf("parseCursor(%q) = %v, want an error", token, got)
		}
	}
}

func FuzzParseCursor(f *testing.F) {
	f.Add(cursor{time.Unix(1, 2), "iabc", true}.String())
	f.Add("MjAyNi0xMS0yNFQwMTowMjowM1pfX2E=")
	f.Add("")
	f.Fuzz(func(t *testing.T, token string) {
		c, err := parseCursor(token)
		if err != nil {
			return
		}
		if strings.TrimRight(c.String(), "=") != strings.TrimRight(token, "=") || !isID(c.id) {
			t.Errorf("parseCursor(%q) = %v, which is written %q", token, c, c.String())
		}
	})
}
