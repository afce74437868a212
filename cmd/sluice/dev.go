package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/VictoriaMetrics/metrics"

	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/internal/daemon"
	"github.com/sluice-edge/sluice/internal/devstack"
	"github.com/sluice-edge/sluice/internal/obs"
	"github.com/sluice-edge/sluice/internal/run"
)

// devConfig is what `sluice dev` can be told.
type devConfig struct {
	stack       devstack.Options
	debugListen string
	logFormat   string
	logLevel    string
}

func parseDevConfig(args []string, getenv func(string) string) (*devConfig, error) {
	var c devConfig
	fs := flag.NewFlagSet("sluice dev", flag.ContinueOnError)
	fs.StringVar(&c.stack.Domain, "domain", "sluice.localhost", "base `domain`; sandboxes are <port>-<id>.<domain>")
	fs.StringVar(&c.stack.HTTPListen, "http", "127.0.0.1:8080", "`address` for plaintext HTTP")
	fs.StringVar(&c.stack.HTTPSListen, "https", "127.0.0.1:8443", "`address` for HTTPS with the development CA")
	fs.StringVar(&c.stack.StateDir, "state-dir", defaultStateDir(getenv), "`directory` for sandboxes and the development CA")
	fs.IntVar(&c.stack.MaxSandboxes, "max-sandboxes", 0, "most sandboxes at once; 0 is the default of a node")
	fs.StringVar(&c.debugListen, "debug-listen", "", "`address` for /metrics, /healthz and profiles; empty serves none")
	fs.StringVar(&c.logFormat, "log-format", "console", "json or console")
	fs.StringVar(&c.logLevel, "log-level", "warn", "debug, info, warn or error")
	c.stack.Machine.Flags(fs)
	if err := config.Parse(fs, args, getenv, os.Stdout); err != nil {
		return nil, err
	}
	if c.stack.StateDir == "" {
		return nil, errors.New("-state-dir is empty: give a directory")
	}
	return &c, nil
}

// defaultStateDir follows the XDG base directory specification.
func defaultStateDir(getenv func(string) string) string {
	if state := getenv("XDG_STATE_HOME"); filepath.IsAbs(state) {
		return filepath.Join(state, "sluice")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return filepath.Join(home, ".local", "state", "sluice")
}

// runDev runs the whole system until ctx ends.
func runDev(ctx context.Context, args []string) error {
	cfg, err := parseDevConfig(args, os.Getenv)
	if err != nil {
		return err
	}
	log, err := obs.NewLogger(cfg.logFormat, cfg.logLevel)
	if err != nil {
		return err
	}
	counters := metrics.NewSet()
	cfg.stack.Log, cfg.stack.Metrics = log, counters
	var group run.Group
	if cfg.debugListen != "" {
		ln, err := daemon.Listen("-debug-listen", cfg.debugListen)
		if err != nil {
			return err
		}
		debug := &obs.Debug{Metrics: counters}
		group.Add("debug listener", func(ctx context.Context) error { return debug.Serve(ctx, ln) })
	}
	shown := newProgress(os.Stderr, "base")
	cfg.stack.Progress = shown.report
	stack, err := devstack.New(ctx, cfg.stack)
	shown.end()
	if ctx.Err() != nil {
		return nil // Ctrl-C before it was ready
	}
	if err != nil {
		return err
	}
	group.Add("stack", stack.Run)
	group.Add("greeting", func(ctx context.Context) error {
		select {
		case <-stack.Ready():
			greet(os.Stdout, stack, cfg.stack.Domain)
		case <-ctx.Done():
		}
		<-ctx.Done()
		return nil
	})
	return group.Run(ctx)
}

// greet prints what to paste into another terminal. Every line is a comment or a command, so that all of it can be pasted.
func greet(out io.Writer, s *devstack.Stack, domain string) {
	url := "http://" + s.HTTPAddr.String()
	var b strings.Builder
	fmt.Fprintf(&b, "# Sluice %s is ready. Ctrl-C stops it and removes every sandbox.\n", version)
	fmt.Fprintf(&b, "# %s\n", oneLine(s.Machine))
	for _, l := range s.Limitations {
		fmt.Fprintf(&b, "# note: %s\n", l)
	}
	fmt.Fprintf(&b, "\n# Plain http, for the SDKs and curl:\nexport E2B_API_KEY=%s\nexport E2B_API_URL=%s\nexport E2B_SANDBOX_URL=%s\n", s.APIKey, url, url)
	fmt.Fprintf(&b, "\n# Or https with the development CA. Names under %s must resolve to %s: curl, browsers and sluice do that\n"+
		"# by themselves for .localhost, Node and Python want libnss-myhostname, systemd-resolved, or lines in /etc/hosts.\n", domain, hostOf(s.HTTPSAddr))
	fmt.Fprintf(&b, "#   unset E2B_API_URL E2B_SANDBOX_URL\n#   export E2B_DOMAIN=%s\n#   export NODE_EXTRA_CA_CERTS=%s\n#   export SSL_CERT_FILE=%s\n", s.Domain, shellQuote(s.CAFile), shellQuote(s.CAFile))
	fmt.Fprintf(&b, "\n# Try it:\ncurl -s -X POST %s/v2/sandboxes -H \"X-API-Key: $E2B_API_KEY\" -H 'Content-Type: application/json' -d '{\"templateID\":\"base\"}'\n\n", url)
	_, _ = io.WriteString(out, b.String()) // a closed terminal is no reason to stop
}

// oneLine keeps a comment a comment.
func oneLine(text string) string { return strings.ReplaceAll(text, "\n", " ") }

// shellQuote makes one word of a path.
func shellQuote(path string) string {
	return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
}

func hostOf(addr net.Addr) string {
	host, _, err := net.SplitHostPort(addr.String())
	if err != nil {
		return addr.String()
	}
	return host
}
