package main

import (
	"errors"
	"flag"
	"fmt"
	"os"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/certs"
	"github.com/sluice-edge/sluice/internal/config"
)

// Config is everything that an operator can say to an edge.
type Config struct {
	Domains        config.List
	Redis          string
	ClusterKeyFile string
	HTTPListen     string
	HTTPSListen    string
	CertFile       string
	KeyFile        string
	DevCADir       string
	DebugListen    string
	LogFormat      string
	LogLevel       string
}

func parseConfig(args []string, getenv func(string) string) (*Config, error) {
	var c Config
	fs := flag.NewFlagSet("edge", flag.ContinueOnError)
	fs.Var(&c.Domains, "domain", "base `domains` served, comma-separated; sandboxes are <port>-<id>.<domain>")
	fs.StringVar(&c.Redis, "redis", "redis://127.0.0.1:6379", "`URL` of the Redis that holds routes")
	fs.StringVar(&c.ClusterKeyFile, "cluster-key-file", "", "`file` with the secret that edges and nodes share (32 bytes or more)")
	fs.StringVar(&c.HTTPListen, "http-listen", "", "`address` for plaintext HTTP, such as :80; empty serves none")
	fs.StringVar(&c.HTTPSListen, "https-listen", ":443", "`address` for HTTPS; empty serves none")
	fs.StringVar(&c.CertFile, "cert", "", "PEM `file` with the wildcard certificate; reloaded when it changes")
	fs.StringVar(&c.KeyFile, "key", "", "PEM `file` with its key")
	fs.StringVar(&c.DevCADir, "dev-ca-dir", "", "`directory` for a development CA instead of -cert and -key")
	fs.StringVar(&c.DebugListen, "debug-listen", "127.0.0.1:9400", "`address` for /metrics, /healthz and profiles; keep it private")
	fs.StringVar(&c.LogFormat, "log-format", "json", "json or console")
	fs.StringVar(&c.LogLevel, "log-level", "info", "debug, info, warn or error")
	if err := config.Parse(fs, args, getenv, os.Stdout); err != nil {
		return nil, err
	}
	return &c, c.Validate()
}

// Validate returns every mistake at once.
func (c *Config) Validate() error {
	var errs []error
	if len(c.Domains) == 0 {
		errs = append(errs, errors.New("-domain is missing: give the base domain, such as -domain example.dev"))
	}
	if c.ClusterKeyFile == "" {
		errs = append(errs, errors.New("-cluster-key-file is missing: make one with `head -c 32 /dev/urandom | base64 > cluster.key`, the same for all edges and nodes"))
	}
	if c.HTTPListen == "" && c.HTTPSListen == "" {
		errs = append(errs, errors.New("-http-listen and -https-listen are both empty: there is nothing to serve"))
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		errs = append(errs, fmt.Errorf("-cert %q and -key %q go together", c.CertFile, c.KeyFile))
	}
	if c.HTTPSListen != "" && (c.CertFile == "") == (c.DevCADir == "") {
		errs = append(errs, errors.New("-https-listen wants either -cert and -key, or -dev-ca-dir"))
	}
	return errors.Join(errs...)
}

func (c *Config) certOptions(log *zap.Logger) certs.Options {
	opts := certs.Options{Domains: c.Domains, DevDir: c.DevCADir, Log: log.Named("certs")}
	if c.CertFile != "" {
		opts.Files = []certs.Pair{{CertFile: c.CertFile, KeyFile: c.KeyFile}}
	}
	return opts
}
