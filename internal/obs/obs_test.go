package obs

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/VictoriaMetrics/metrics"
)

func TestNewLoggerNamesTheMistake(t *testing.T) {
	if _, err := NewLogger("xml", "info"); err == nil || !strings.Contains(err.Error(), `"xml"`) {
		t.Errorf("NewLogger(xml) = %v, want an error with the value", err)
	}
	if _, err := NewLogger("json", "loud"); err == nil || !strings.Contains(err.Error(), `"loud"`) {
		t.Errorf("NewLogger(loud) = %v, want an error with the value", err)
	}
	for _, f := range LogFormats {
		if _, err := NewLogger(f, "debug"); err != nil {
			t.Errorf("NewLogger(%q) = %v", f, err)
		}
	}
}

func TestDebugServesUntilTheContextEnds(t *testing.T) {
	set := metrics.NewSet()
	set.NewCounter("sluice_test_total").Add(7)
	healthy := errors.New("store is down")
	d := &Debug{Metrics: set, Healthy: func() error { return healthy }}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx, ln) }()

	get := func(path string) (int, string) {
		t.Helper()
		resp, err := http.Get("http://" + ln.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	if code, body := get("/metrics"); code != 200 || !strings.Contains(body, "sluice_test_total 7") {
		t.Errorf("/metrics = %d %.80q, want the counter", code, body)
	}
	if code, body := get("/healthz"); code != 503 || !strings.Contains(body, "store is down") {
		t.Errorf("/healthz = %d %q, want 503 with the reason", code, body)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve() = %v after its context ended, want nil", err)
	}
}
