package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/internal/daemon"
	"github.com/sluice-edge/sluice/internal/devstack"
	"github.com/sluice-edge/sluice/loadtest"
)

// benchPort is where the backend listens in its sandboxes.
const benchPort = 3000

// benchConfig is what `sluice bench` can be told.
type benchConfig struct {
	rate        float64
	duration    time.Duration
	connections int
	only        config.List
	serve       string
	stack       devstack.Options
}

func parseBenchConfig(args []string, getenv func(string) string) (*benchConfig, error) {
	var c benchConfig
	fs := flag.NewFlagSet("sluice bench", flag.ContinueOnError)
	names := strings.Join(benchScenarios, ", ")
	fs.Float64Var(&c.rate, "rate", 1000, "requests per second, whatever the answers do")
	fs.DurationVar(&c.duration, "duration", 5*time.Second, "how long each scenario is measured")
	fs.IntVar(&c.connections, "connections", 64, "most requests under way at once")
	fs.Var(&c.only, "scenario", "`scenarios` to run: "+names+" (default all)")
	fs.StringVar(&c.serve, "serve", "", "be the backend on this `address` and nothing else")
	c.stack.Machine.Flags(fs)
	machine := fs.Lookup("machine")
	machine.Usage += "; here auto is namespace" // the edge is measured: a process outside against one that shares its kernel
	if err := config.Parse(fs, args, getenv, os.Stdout); err != nil {
		return nil, err
	}
	if c.stack.Machine.Kind == daemon.MachineAuto {
		c.stack.Machine.Kind = daemon.MachineNamespace
	}
	var all []error
	for _, name := range c.only {
		if !slices.Contains(benchScenarios, name) {
			all = append(all, fmt.Errorf("-scenario %q is none of %s", name, names))
		}
	}
	if !(c.rate > 0) {
		all = append(all, fmt.Errorf("-rate %v: want more than 0", c.rate))
	}
	if c.duration <= 0 {
		all = append(all, fmt.Errorf("-duration %v: want more than 0", c.duration))
	}
	if c.connections < 1 {
		all = append(all, fmt.Errorf("-connections %d: want 1 or more", c.connections))
	}
	return &c, errors.Join(all...)
}

// benchScenarios are what can be measured.
var benchScenarios = []string{"get", "token", "mask", "websocket"}

// wants says whether a scenario was asked for.
func (c *benchConfig) wants(name string) bool {
	return len(c.only) == 0 || slices.Contains(c.only, name)
}

// runBench loads the same backend twice: as a process of this host, and in a sandbox through the edge. The ratio is the result:
// generator, edge and backends share this machine.
func runBench(ctx context.Context, args []string) error {
	cfg, err := parseBenchConfig(args, os.Getenv)
	if err != nil {
		return err
	}
	if cfg.serve != "" {
		return serveBackend(ctx, cfg.serve, os.Stdout)
	}
	stateDir, err := os.MkdirTemp("", "sluice-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(stateDir)
	cfg.stack.Domain, cfg.stack.StateDir = "bench.localhost", stateDir
	cfg.stack.HTTPListen, cfg.stack.HTTPSListen = "127.0.0.1:0", "127.0.0.1:0"
	cfg.stack.Log, cfg.stack.Metrics = zap.NewNop(), metrics.NewSet()
	stack, err := devstack.New(ctx, cfg.stack)
	if err != nil {
		return err
	}
	return whileRunning(ctx, stack.Run, func(ctx context.Context) error { return benchStack(ctx, cfg, stack) })
}

// whileRunning calls do while run runs, and stops either when the other has ended.
func whileRunning(ctx context.Context, run, do func(ctx context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopped := make(chan error, 1)
	go func() {
		stopped <- run(ctx)
		cancel()
	}()
	err := do(ctx)
	cancel()
	failed := <-stopped
	if failed != nil && errors.Is(err, context.Canceled) {
		return failed // which is why
	}
	return errors.Join(err, failed)
}

func benchStack(ctx context.Context, cfg *benchConfig, stack *devstack.Stack) error {
	select {
	case <-stack.Ready():
	case <-ctx.Done():
		return ctx.Err()
	}
	direct, stopBackend, err := startBackend(ctx)
	if err != nil {
		return fmt.Errorf("start the backend: %w", err)
	}
	defer stopBackend()
	fmt.Printf("# %d CPUs for generator, edge and backends together; %.0f requests/s for %v each\n", runtime.NumCPU(), cfg.rate, cfg.duration)
	client := benchClient{url: "http://" + stack.HTTPAddr.String(), key: stack.APIKey}
	kinds := []struct {
		name    string
		network map[string]any
		build   func(sb benchSandbox) loadtest.Scenario
		direct  loadtest.Scenario
	}{
		{"get", nil, func(benchSandbox) loadtest.Scenario { return loadtest.SmallGet("/") }, loadtest.SmallGet("/")},
		{"token", map[string]any{"allowPublicTraffic": false},
			func(sb benchSandbox) loadtest.Scenario { return loadtest.TokenGet("/", sb.TrafficAccessToken) }, loadtest.TokenGet("/", "none")},
		{"mask", map[string]any{"maskRequestHost": "localhost:${PORT}"},
			func(benchSandbox) loadtest.Scenario {
				return loadtest.MaskGet("/host", "localhost:"+strconv.Itoa(benchPort))
			}, loadtest.MaskGet("/host", direct)},
		{"websocket", nil, func(benchSandbox) loadtest.Scenario { return loadtest.WebSocketEcho("/ws") }, loadtest.WebSocketEcho("/ws")},
	}
	var results []loadtest.Result
	for _, kind := range kinds {
		if !cfg.wants(kind.name) {
			continue
		}
		sb, err := client.create(ctx, kind.network)
		if err != nil {
			return fmt.Errorf("%s: %w", kind.name, err)
		}
		host := fmt.Sprintf("%d-%s.%s", benchPort, sb.SandboxID, stack.Domain)
		if err := client.startBackend(ctx, sb, host); err != nil {
			return fmt.Errorf("%s: %w", kind.name, err)
		}
		for _, side := range []loadtest.Options{
			{Label: "direct", Addr: direct, Scenario: kind.direct},
			{Label: "edge", Addr: stack.HTTPAddr.String(), Host: host, Scenario: kind.build(sb)},
		} {
			side.Rate, side.Duration, side.Warmup, side.Connections = cfg.rate, cfg.duration, time.Second, cfg.connections
			fmt.Fprintf(os.Stderr, "%s %s …\n", kind.name, side.Label)
			result, err := loadtest.Run(ctx, side)
			if err != nil {
				return fmt.Errorf("%s %s: %w", kind.name, side.Label, err)
			}
			results = append(results, result)
		}
	}
	return loadtest.WriteTable(os.Stdout, results)
}

// startBackend runs this program as the backend on a free port of the host, in a process of its own as in the sandbox.
func startBackend(ctx context.Context) (addr string, stop func(), err error) {
	self, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	cmd := exec.CommandContext(ctx, self, "bench", "-serve", "127.0.0.1:0")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed is how it ends
	}
	line := make([]byte, 64)
	n, err := out.Read(line) // the backend writes its address in one piece
	if err != nil && !errors.Is(err, io.EOF) {
		stop()
		return "", nil, err
	}
	addr = strings.TrimSpace(string(line[:n]))
	if _, _, err := net.SplitHostPort(addr); err != nil {
		stop()
		return "", nil, fmt.Errorf("backend said %q: %w", addr, err)
	}
	return addr, stop, nil
}
