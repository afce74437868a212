// Package obs builds what every daemon needs to be observed: the logger, the set of counters, and the debug listener that
// serves /metrics, /healthz and profiles. It knows no other package of this module; daemons hand its parts to constructors.
package obs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// LogFormats are the values that NewLogger takes: console for people, json for machines.
var LogFormats = []string{"console", "json"}

// NewLogger returns a logger on standard error. Level is a zap level ("debug", "info", "warn", "error").
func NewLogger(format, level string) (*zap.Logger, error) {
	lvl, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, fmt.Errorf("log level %q: want debug, info, warn or error", level)
	}
	cfg := zap.NewProductionConfig()
	cfg.Level = zap.NewAtomicLevelAt(lvl)
	cfg.EncoderConfig.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	cfg.DisableStacktrace = true // errors carry their chain; a panic prints its own stack
	switch format {
	case "json":
	case "console":
		cfg.Encoding = "console"
		cfg.EncoderConfig.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
		cfg.EncoderConfig.EncodeLevel = zapcore.CapitalLevelEncoder
		cfg.DisableCaller = true
	default:
		return nil, fmt.Errorf("log format %q: want one of %q", format, LogFormats)
	}
	return cfg.Build()
}

// Debug is the listener for operators. It is never reachable from the internet: its default address is on the loopback,
// and profiles tell secrets.
type Debug struct {
	// Metrics is written to /metrics in the Prometheus text format.
	Metrics *metrics.Set
	// Healthy answers /healthz: nil is 200, an error is 503 with its text. A nil func is always healthy.
	Healthy func() error
}

// Handler serves /metrics, /healthz and /debug/pprof/.
func (d *Debug) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		d.Metrics.WritePrometheus(w)
		metrics.WriteProcessMetrics(w)
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if d.Healthy != nil {
			if err := d.Healthy(); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// Serve serves on ln until ctx ends. It owns ln.
func (d *Debug) Serve(ctx context.Context, ln net.Listener) error {
	return ServeHTTP(ctx, ln, &http.Server{
		Handler:           d.Handler(),
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		// No WriteTimeout: a CPU profile takes as long as it was asked to.
	})
}

// ServeHTTP serves srv on ln until ctx ends, then gives requests in progress five seconds. It owns ln.
func ServeHTTP(ctx context.Context, ln net.Listener, srv *http.Server) error {
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		err := srv.Shutdown(grace)
		if errors.Is(err, context.DeadlineExceeded) {
			err = srv.Close()
		}
		stopped <- err
	})
	err := srv.Serve(ln)
	if stop() { // Serve ended by itself: nobody stopped it
		return err
	}
	return <-stopped
}
