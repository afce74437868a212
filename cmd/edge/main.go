// Command edge is the front: it terminates TLS, finds the node that owns a sandbox, decides whether a request may pass, and
// moves bytes. It holds no state that it cannot rebuild; run as many as you like.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/VictoriaMetrics/metrics"

	"github.com/sluice-edge/sluice/certs"
	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/internal/daemon"
	"github.com/sluice-edge/sluice/internal/obs"
	"github.com/sluice-edge/sluice/internal/run"
	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/routing"
)

var version = "dev" // set by the linker

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := serve(ctx, os.Args[1:]); err != nil && !errors.Is(err, config.ErrHelp) {
		fmt.Fprintln(os.Stderr, "edge:", err)
		os.Exit(1)
	}
}

// serve builds the edge bottom-up and runs it until ctx ends.
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
	store := routing.NewRedisStore(client, routing.RedisOptions{Log: log.Named("routing"), Metrics: counters})
	dialer := &link.Dialer{Key: clusterKey}

	opts := daemon.EdgeOptions{Domains: cfg.Domains, Store: store, Dial: dialer.Dial, Log: log, Metrics: counters}
	var group run.Group
	if cfg.HTTPListen != "" {
		if opts.HTTP, err = daemon.Listen("-http-listen", cfg.HTTPListen); err != nil {
			return err
		}
	}
	if cfg.HTTPSListen != "" {
		keeper, err := certs.New(ctx, cfg.certOptions(log))
		if err != nil {
			return err
		}
		group.Add("certificates", keeper.Run)
		opts.TLS = keeper.TLSConfig()
		if opts.HTTPS, err = daemon.Listen("-https-listen", cfg.HTTPSListen); err != nil {
			return err
		}
	}
	debugLn, err := daemon.Listen("-debug-listen", cfg.DebugListen)
	if err != nil {
		return err
	}
	edge, err := daemon.NewEdge(opts)
	if err != nil {
		return err
	}
	debug := &obs.Debug{Metrics: counters}
	group.Add("debug listener", func(ctx context.Context) error { return debug.Serve(ctx, debugLn) })
	group.Add("edge", edge.Run)
	log.Info("edge started", daemon.Fields(version, cfg.Domains)...)
	defer log.Info("edge stopped")
	return group.Run(ctx)
}
