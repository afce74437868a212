package sdk

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/internal/testkit"
)

// TestCluster runs program g: two edges and two nodes that share one real Redis, which stops and comes back.
func TestCluster(t *testing.T) {
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("redis-server is not installed: apt-get install redis-server, or make test")
	}
	l := lab.New(t)
	l.Name("*."+domain, netip.MustParseAddr("127.0.0.1"))
	js := languages(t)[0]
	if js.missing != "" {
		t.Skip(js.missing)
	}
	dir := t.TempDir()
	redis := startRedis(t, l, dir)
	testkit.Program(t, "guestd") // beside the orchestrator
	keyFile := filepath.Join(dir, "cluster.key")
	if err := os.WriteFile(keyFile, []byte(strings.Repeat("cluster key of the test ", 3)), 0o600); err != nil {
		t.Fatal(err)
	}
	common := []string{"-redis", "redis://127.0.0.1:6379", "-cluster-key-file", keyFile, "-domain", domain}
	for i := 1; i <= 2; i++ {
		addr := fmt.Sprintf("127.0.1.%d", i)
		l.Host.Daemon(t, nil, testkit.Program(t, "orchestrator"), append([]string{
			"-node-id", fmt.Sprintf("node-%d", i),
			"-machine", "namespace",
			"-state-dir", filepath.Join(dir, fmt.Sprintf("node-%d", i)),
			"-link-listen", addr + ":5007", "-link-advertise", addr + ":5007",
			"-api-listen", addr + ":5008", "-api-advertise", addr + ":5008",
			"-debug-listen", addr + ":9401",
			"-network-name", fmt.Sprintf("%s%d", l.Prefix()[:7], i),
			"-slot-prefix", fmt.Sprintf("10.%d.0.0/16", 40+i),
			"-slot-prefix6", fmt.Sprintf("fd51:%d::/64", i),
		}, common...)...)
	}
	caDir := filepath.Join(dir, "ca")
	edges := []string{"127.0.0.1", "127.0.0.2"}
	for _, addr := range edges { // one after the other: the second finds the CA that the first made
		l.Host.Daemon(t, nil, testkit.Program(t, "edge"), append([]string{
			"-https-listen", addr + ":443", "-dev-ca-dir", caDir, "-debug-listen", addr + ":9400",
		}, common...)...)
		awaitOutput(t, l, "edge "+addr, "healthy", "curl", "-sf", "http://"+addr+":9400/healthz")
	}
	for i := 1; i <= 2; i++ {
		awaitOutput(t, l, "a node", "ready", "curl", "-sf", fmt.Sprintf("http://127.0.1.%d:9401/healthz", i))
	}
	key, err := l.Host.Command(t.Context(), testkit.Program(t, "sluice"), "key", "create", "-redis", "redis://127.0.0.1:6379", "-name", "test").Output()
	if err != nil {
		t.Fatalf("sluice key create: %v", err)
	}
	env := append(clientEnv(strings.TrimSpace(string(key)), filepath.Join(caDir, "ca.pem")), "LAB_EDGES="+strings.Join(edges, ","))

	runProgram(t, l, js, "g_cluster", env, func(what string) {
		switch what {
		case "check placement":
			for i := 1; i <= 2; i++ {
				node := fmt.Sprintf("node-%d", i)
				out, err := l.Host.Command(t.Context(), "redis-cli", "hlen", "sluice:node-routes:"+node).Output()
				if err != nil || strings.TrimSpace(string(out)) == "0" {
					t.Errorf("sandboxes on %s = %q, %v, want some on each node", node, out, err)
				}
			}
		case "stop redis":
			redis.stop(t)
		case "start redis":
			redis = startRedis(t, l, dir)
		default:
			t.Errorf("the program asks for %q", what)
		}
	})
}

// redisServer is a real one, on its usual port of the laboratory's host. It keeps its data when it stops.
type redisServer struct{ cmd *lab.Cmd }

func startRedis(t *testing.T, l *lab.Lab, dir string) *redisServer {
	t.Helper()
	cmd := l.Host.Command(context.Background(), "redis-server", "--bind", "127.0.0.1", "--port", "6379", "--dir", dir, "--appendonly", "yes", "--daemonize", "no", "--loglevel", "warning")
	if err := cmd.Start(); err != nil {
		t.Fatalf("start redis: %v", err)
	}
	awaitOutput(t, l, "redis", "PONG", "redis-cli", "ping")
	return &redisServer{cmd}
}

func (r *redisServer) stop(t *testing.T) {
	t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = r.cmd.Wait() // its exit status tells which signal it got
}

// awaitOutput runs a command on the host until it succeeds.
func awaitOutput(t *testing.T, l *lab.Lab, who, state string, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTime)
	defer cancel()
	for l.Host.Command(ctx, name, args...).Run() != nil {
		if ctx.Err() != nil {
			t.Fatalf("%s is not %s within %v", who, state, startTime)
		}
	}
}
