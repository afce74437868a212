package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd"
)

func TestAuthorization(t *testing.T) {
	s := newSite(t, nil)
	for _, test := range []struct {
		key, authorization string
		want               string
	}{
		{keyA, "", "200 "},
		{"", "Bearer " + keyA, "200 "},
		{"", "bearer  " + keyA, "200 "},
		{keyA, "Bearer nonsense", "200 "}, // the SDK's header is the one that counts
		{"", "", "401 Missing API key"},
		{"", "Basic " + keyA, "401 Missing API key"},
		{"", keyA, "401 Missing API key"},
		{"nonsense", "Bearer " + keyA, "401 Invalid API key"},
		{"e2b_" + strings.Repeat("c", 40), "", "401 Invalid API key"},
		{strings.ToUpper(keyA), "", "401 Invalid API key"},
		{strings.Repeat("a", 10000), "", "401 Invalid API key"},
		{"", "Bearer " + strings.Repeat("a", 10000), "401 Invalid API key"},
	} {
		got := s.call("GET", "/sandboxes", "", "X-API-Key", test.key, "Authorization", test.authorization)
		if !strings.HasPrefix(got.message(), test.want) {
			t.Errorf("key %.50q, authorization %.50q = %s, want %s", test.key, test.authorization, got.message(), test.want)
		}
		if (got.Header.Get("WWW-Authenticate") != "") != (got.StatusCode == 401) {
			t.Errorf("key %.50q: WWW-Authenticate %q with %d", test.key, got.Header.Get("WWW-Authenticate"), got.StatusCode)
		}
	}
	// What needs no key, and what is refused before its body is looked at.
	if got := s.call("GET", "/health", "", "X-API-Key", ""); got.StatusCode != 200 || len(got.body) == 0 {
		t.Errorf("GET /health = %d %q", got.StatusCode, got.body)
	}
	if got := s.call("POST", "/v2/sandboxes", "{", "X-API-Key", ""); got.StatusCode != 401 {
		t.Errorf("a bad body without a key = %s, want 401", got.message())
	}
	if got := s.call("GET", "/nope", "", "X-API-Key", ""); got.StatusCode != 404 {
		t.Errorf("an unknown route without a key = %s, want 404", got.message())
	}
}

func TestCORS(t *testing.T) {
	s := newSite(t, nil)
	preflight := s.call("OPTIONS", "/v2/sandboxes", "", "X-API-Key", "", "Origin", "https://app.example", "Access-Control-Request-Method", "POST")
	if preflight.StatusCode != 204 || preflight.Header.Get("Access-Control-Allow-Origin") != "*" || preflight.Header.Get("Access-Control-Allow-Headers") == "" ||
		!strings.Contains(preflight.Header.Get("Access-Control-Allow-Methods"), "PUT") {
		t.Errorf("preflight = %d %v", preflight.StatusCode, preflight.Header)
	}
	for _, got := range []reply{s.call("GET", "/v2/sandboxes", ""), s.call("GET", "/nope", ""), s.call("GET", "/sandboxes", "", "X-API-Key", "")} {
		expose := got.Header.Get("Access-Control-Expose-Headers")
		if got.Header.Get("Access-Control-Allow-Origin") != "*" || !strings.Contains(expose, "X-Next-Token") || !strings.Contains(expose, "Retry-After") {
			t.Errorf("answer %d has no CORS headers: %v", got.StatusCode, got.Header)
		}
	}
}

func TestMethodNotAllowedNamesTheMethods(t *testing.T) {
	s := newSite(t, nil)
	if got := s.call("PATCH", "/sandboxes/i1", "").Header.Get("Allow"); got != "GET, DELETE" {
		t.Errorf("Allow = %q", got)
	}
}

// TestErrorsFromBelow has what the manager can answer, and that nobody outside learns what only the log may say.
func TestErrorsFromBelow(t *testing.T) {
	logs, seen := observer.New(zapcore.DebugLevel)
	s := newSite(t, func(o *Options) { o.Log = zap.New(logs) })
	secret := errors.New("open /var/lib/secret: refused")
	for _, test := range []struct {
		err             error
		want, errorCode string
		retry           bool
	}{
		{secret, "500 Failed to place sandbox: internal error", "sandbox_create_failed", false},
		{fmt.Errorf("boot: %w", secret), "500 Failed to place sandbox: internal error", "sandbox_create_failed", false},
		{&errs.Error{Code: errs.Exhausted, Msg: "no slot", Err: secret}, "503 Failed to place sandbox: no slot", "sandbox_capacity_unavailable", true},
		{&errs.Error{Code: errs.Unavailable, Msg: "not ready", Err: secret}, "503 Failed to place sandbox: not ready", "sandbox_create_failed", true},
		{context.DeadlineExceeded, "504 Failed to place sandbox: the node did not answer in time", "sandbox_placement_timeout", false},
		{errs.New(errs.Invalid, "bad"), "400 bad", "", false},
		{errs.New(errs.NotFound, "no template"), "404 no template", "", false},
		{errs.New(errs.Denied, "no"), "403 no", "", false},
		{errs.New(errs.Conflict, "busy"), "409 busy", "", false},
	} {
		s.boxes.onCreate = func(sandboxd.CreateSpec) error { return test.err }
		got := s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`)
		if got.message() != test.want {
			t.Errorf("create failing with %v = %s, want %s", test.err, got.message(), test.want)
		}
		body := mustDecode[gen.Error](t, got)
		if deref(body.ErrorCode) != test.errorCode {
			t.Errorf("create failing with %v: error_code %q, want %q", test.err, deref(body.ErrorCode), test.errorCode)
		}
		if _, err := strconv.Atoi(got.Header.Get("Retry-After")); (err == nil) != test.retry {
			t.Errorf("create failing with %v: Retry-After %q", test.err, got.Header.Get("Retry-After"))
		}
		if bytes.Contains(got.body, []byte("secret")) {
			t.Errorf("create failing with %v tells the client %s", test.err, got.body)
		}
	}
	if n := seen.FilterMessage("request failed").Len(); n != 2 {
		t.Errorf("%d errors logged, want the 2 internal ones", n)
	}
	s.boxes.onCreate = func(sandboxd.CreateSpec) error { panic("a bug of ours") }
	if got := s.call("POST", "/v2/sandboxes", `{"templateID": "base"}`).message(); got != "500 internal error" {
		t.Errorf("after a panic = %s", got)
	}
	if seen.FilterMessage("panic in a request").Len() != 1 {
		t.Error("the panic is not in the log")
	}
	for _, entry := range seen.All() {
		if text := fmt.Sprint(entry.Message, entry.ContextMap()); strings.Contains(text, keyA) {
			t.Errorf("the log has the key: %s", text)
		}
	}
}

func TestRequestsAreCounted(t *testing.T) {
	s := newSite(t, nil)
	s.call("GET", "/sandboxes/i1", "")
	s.call("GET", "/sandboxes/i1", "")
	s.call("GET", "/health", "")
	s.call("GET", "/nope/"+strings.Repeat("x", 100), "")
	var text bytes.Buffer
	s.metrics.WritePrometheus(&text)
	for _, want := range []string{
		`sluice_api_requests_total{operation="getSandbox",status="404"} 2`,
		`sluice_api_requests_total{operation="getHealth",status="200"} 1`,
		`sluice_api_requests_total{operation="unknown",status="404"} 1`,
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("metrics lack %s:\n%s", want, text.String())
		}
	}
}

func TestRateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, func(o *Options) { o.Rate, o.Burst = 0.5, 3 })
		for i := range 3 {
			got := s.call("GET", "/sandboxes", "")
			if got.StatusCode != 200 || got.Header.Get("RateLimit-Limit") != "3" || got.Header.Get("RateLimit-Remaining") != strconv.Itoa(2-i) {
				t.Errorf("call %d = %d %v", i, got.StatusCode, got.Header)
			}
		}
		got := s.call("GET", "/sandboxes", "")
		if got.message() != "429 Rate limit exceeded" || got.Header.Get("Retry-After") != "2" || got.Header.Get("RateLimit-Remaining") != "0" || got.Header.Get("RateLimit-Reset") != "6" {
			t.Errorf("call beyond the burst = %s %v", got.message(), got.Header)
		}
		if got := s.call("GET", "/sandboxes", "", "X-API-Key", keyB); got.StatusCode != 200 {
			t.Errorf("another key = %s", got.message())
		}
		if got := s.call("GET", "/v2/sandboxes", ""); got.StatusCode != 200 {
			t.Errorf("another operation = %s", got.message())
		}
		time.Sleep(2 * time.Second)
		if got := s.call("GET", "/sandboxes", ""); got.StatusCode != 200 {
			t.Errorf("after Retry-After = %s", got.message())
		}
	})
	s := newSite(t, func(o *Options) { o.Rate = -1 })
	for range 500 {
		if got := s.call("GET", "/health", ""); got.StatusCode != 200 {
			t.Fatalf("without a limit = %s", got.message())
		}
	}
}

// TestServer goes over a real connection once: the chunked body of the SDKs, and the header limits.
func TestServer(t *testing.T) {
	s := newSite(t, nil)
	server := httptest.NewUnstartedServer(nil)
	server.Config = Server(s.handler)
	server.Start()
	defer server.Close()
	req, err := http.NewRequestWithContext(t.Context(), "POST", server.URL+"/v2/sandboxes", struct{ *strings.Reader }{strings.NewReader(`{"templateID": "base"}`)})
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"X-Api-Key": {keyA}, "Content-Type": {"application/json"}, "lang_version": {"24"}}
	resp, err := server.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 201 || req.ContentLength != 0 {
		t.Errorf("create with a chunked body = %d", resp.StatusCode)
	}
	if c := server.Config; c.ReadHeaderTimeout == 0 || c.ReadTimeout == 0 || c.WriteTimeout <= requestTimeout || c.IdleTimeout == 0 || c.MaxHeaderBytes == 0 {
		t.Errorf("a limit of the server is missing: %+v", c)
	}
}

func TestNewWantsItsParts(t *testing.T) {
	for name, opts := range map[string]Options{
		"nothing":          {},
		"no keys":          {Sandboxes: newMemory("i")},
		"no token key":     {Sandboxes: newMemory("i"), Keys: newKeyring(t)},
		"no name in Nodes": {Sandboxes: newMemory("i"), Keys: newKeyring(t), Tokens: auth.NewTokenKey([]byte("k")), Nodes: &catalogue{}},
	} {
		if _, err := New(opts); err == nil {
			t.Errorf("New with %s succeeds", name)
		}
	}
}
