// Command orchestrator is a node: it runs sandboxes, fences their egress, serves the E2B-compatible REST API, and accepts
// connections from the edges.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/internal/daemon"
	"github.com/sluice-edge/sluice/internal/obs"
	"github.com/sluice-edge/sluice/internal/run"
	"github.com/sluice-edge/sluice/routing"
)

var version = "dev" // set by the linker

func main() {
	daemon.MaybeSandboxInit()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := serve(ctx, os.Args[1:]); err != nil && !errors.Is(err, config.ErrHelp) {
		fmt.Fprintln(os.Stderr, "orchestrator:", err)
		os.Exit(1)
	}
}

// serve builds the node bottom-up and runs it until ctx ends. Sandboxes stay: the next start adopts them.
func serve(ctx context.Context, args []string) error {
	cfg, err := parseConfig(args, os.Getenv)
	if err != nil {
		return err
	}
	log, err := obs.NewLogger(cfg.LogFormat, cfg.LogLevel)
	if err != nil {
		return err
	}
	counters := metrics.NewSet()
	clusterKey, err := daemon.ReadClusterKey(cfg.ClusterKeyFile)
	if err != nil {
		return err
	}
	client, err := daemon.OpenRedis(cfg.Redis)
	if err != nil {
		return err
	}
	defer client.Close()
	machine, err := daemon.OpenMachine(ctx, cfg.Machine, cfg.StateDir, log, counters)
	if err != nil {
		return err
	}
	log.Info("machine chosen", zap.String("machine", machine.Kind), zap.String("why", machine.Why))
	for _, l := range machine.Limitations {
		log.Warn("machine is limited on this host", zap.String("limitation", l))
	}
	if machine.Kind == daemon.MachineVM && cfg.Machine.DefaultTemplate != "" {
		if err := daemon.MakeDefaultTemplate(ctx, cfg.Machine, cfg.StateDir, log, nil); err != nil {
			return err
		}
	}
	linkLn, err := daemon.Listen("-link-listen", cfg.LinkListen)
	if err != nil {
		return err
	}
	apiLn, err := daemon.Listen("-api-listen", cfg.APIListen)
	if err != nil {
		return err
	}
	debugLn, err := daemon.Listen("-debug-listen", cfg.DebugListen)
	if err != nil {
		return err
	}
	node, err := daemon.NewNode(daemon.NodeOptions{
		ID:            cfg.NodeID,
		Domain:        cfg.Domain,
		Store:         routing.NewRedisStore(client, routing.RedisOptions{Log: log.Named("routing"), Metrics: counters}),
		Keys:          auth.NewRedisKeys(client),
		ClusterKey:    clusterKey,
		Machine:       machine.Machine,
		StateDir:      cfg.StateDir,
		Link:          linkLn,
		LinkAddr:      cfg.LinkAdvertise,
		API:           apiLn,
		APIAddr:       cfg.APIAdvertise,
		MaxSandboxes:  cfg.MaxSandboxes,
		Team:          cfg.Team,
		KeepSandboxes: true,
		Log:           log,
		Metrics:       counters,
	})
	if err != nil {
		return err
	}
	debug := &obs.Debug{Metrics: counters, Healthy: node.Healthy}
	var group run.Group
	group.Add("debug listener", func(ctx context.Context) error { return debug.Serve(ctx, debugLn) })
	group.Add("node", node.Run)
	log.Info("node started", zap.String("version", version), zap.String("node", cfg.NodeID), zap.String("machine", machine.Kind))
	defer log.Info("node stopped")
	return group.Run(ctx)
}
