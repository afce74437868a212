package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"

	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/internal/daemon"
)

// Config is everything that an operator can say to a node.
type Config struct {
	NodeID         string
	Domain         string
	Redis          string
	ClusterKeyFile string
	StateDir       string
	LinkListen     string
	LinkAdvertise  string
	APIListen      string
	APIAdvertise   string
	DebugListen    string
	MaxSandboxes   int
	Team           daemon.TeamLimits
	Machine        daemon.MachineOptions
	LogFormat      string
	LogLevel       string
}

func parseConfig(args []string, getenv func(string) string) (*Config, error) {
	host, _ := os.Hostname() // an empty name is caught by Validate
	var c Config
	fs := flag.NewFlagSet("orchestrator", flag.ContinueOnError)
	fs.StringVar(&c.NodeID, "node-id", host, "`name` of this node, unique and the same after a restart")
	fs.StringVar(&c.Domain, "domain", "", "base `domain` that SDKs are told; may carry a port")
	fs.StringVar(&c.Redis, "redis", "redis://127.0.0.1:6379", "`URL` of the Redis that holds routes and API keys")
	fs.StringVar(&c.ClusterKeyFile, "cluster-key-file", "", "`file` with the secret that edges and nodes share (32 bytes or more)")
	fs.StringVar(&c.StateDir, "state-dir", "/var/lib/sluice", "`directory` of sandboxes and their records")
	fs.StringVar(&c.LinkListen, "link-listen", ":5007", "`address` for edges")
	fs.StringVar(&c.LinkAdvertise, "link-advertise", "", "`host:port` by which edges reach -link-listen")
	fs.StringVar(&c.APIListen, "api-listen", ":5008", "`address` for the REST API")
	fs.StringVar(&c.APIAdvertise, "api-advertise", "", "`host:port` by which edges and other nodes reach -api-listen")
	fs.StringVar(&c.DebugListen, "debug-listen", "127.0.0.1:9401", "`address` for /metrics, /healthz and profiles; keep it private")
	fs.IntVar(&c.MaxSandboxes, "max-sandboxes", 0, "most sandboxes at once on this node; 0 is the default")
	fs.IntVar(&c.Team.Sandboxes, "team-sandboxes", 0, "most sandboxes of one team that run at once in the cluster, the same on all nodes; 0 is no limit")
	fs.IntVar(&c.Team.Paused, "team-paused", 0, "most paused sandboxes of one team on this node, before it is refused new ones; 0 is 1000")
	fs.IntVar(&c.Team.Snapshots, "team-snapshots", 0, "most snapshots of one team on this node; 0 is 100")
	fs.StringVar(&c.LogFormat, "log-format", "json", "json or console")
	fs.StringVar(&c.LogLevel, "log-level", "info", "debug, info, warn or error")
	c.Machine.Flags(fs)
	if err := config.Parse(fs, args, getenv, os.Stdout); err != nil {
		return nil, err
	}
	return &c, c.Validate()
}

// Validate returns every mistake at once.
func (c *Config) Validate() error {
	var errs []error
	if c.NodeID == "" {
		errs = append(errs, errors.New("-node-id is missing and this host has no name"))
	}
	if c.Domain == "" {
		errs = append(errs, errors.New("-domain is missing: give the base domain, such as -domain example.dev"))
	}
	if c.ClusterKeyFile == "" {
		errs = append(errs, errors.New("-cluster-key-file is missing: make one with `head -c 32 /dev/urandom | base64 > cluster.key`, the same for all edges and nodes"))
	}
	for name, n := range map[string]int{
		"-max-sandboxes": c.MaxSandboxes, "-team-sandboxes": c.Team.Sandboxes, "-team-paused": c.Team.Paused, "-team-snapshots": c.Team.Snapshots,
	} {
		if n < 0 {
			errs = append(errs, fmt.Errorf("%s %d is negative", name, n))
		}
	}
	for name, addr := range map[string]string{"-link-advertise": c.LinkAdvertise, "-api-advertise": c.APIAdvertise} {
		if host, _, err := net.SplitHostPort(addr); err != nil || host == "" {
			errs = append(errs, fmt.Errorf("%s %q: give the host:port by which others reach this node", name, addr))
		}
	}
	return errors.Join(errs...)
}
