package sdk

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/internal/testkit"
)

// TestCluster runs program g: two edges and two nodes that share one real Redis, which stops and comes back.
func TestCluster(t *testing.T) {
	js, server := clusterNeeds(t)
	c := &cluster{lab: lab.New(t), programs: clusterPrograms(t), redisServer: server, machine: "namespace", dir: t.TempDir(), slower: 1}
	key := c.start(t)
	runProgram(t, c.lab, js, "g_cluster", clusterEnv(key, c.caFile(), 1), func(what string) { c.do(t, what) })
}

// clusterNeeds returns what runs program g, and redis-server.
func clusterNeeds(t *testing.T) (js language, redisServer string) {
	t.Helper()
	redisServer, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("redis-server is not installed: apt-get install redis-server, or make test")
	}
	js = languages(t)[0]
	if js.missing != "" {
		t.Skip(js.missing)
	}
	return js, redisServer
}

// clusterPrograms builds what a cluster runs and returns their directory.
func clusterPrograms(t *testing.T) (dir string) {
	t.Helper()
	for _, name := range []string{"guestd", "orchestrator", "edge", "sluice"} {
		dir = filepath.Dir(testkit.Program(t, name))
	}
	return dir
}

var (
	clusterEdges = []string{"127.0.0.1", "127.0.0.2"}
	clusterNodes = []string{"node-1", "node-2"}
)

const clusterRedis = "127.0.0.1:6379"

func clusterEnv(key, caFile string, slower int) []string {
	return append(clientEnv(key, caFile), "LAB_EDGES="+strings.Join(clusterEdges, ","), fmt.Sprintf("LAB_PATIENCE=%d", slower))
}

// cluster is clusterEdges and clusterNodes on the host of a laboratory, with a Redis that keeps its data when it stops.
type cluster struct {
	lab         *lab.Lab
	programs    string // directory of orchestrator, edge, sluice and guestd
	redisServer string
	machine     string
	dir         string              // of all that it keeps
	slower      int                 // how much more time everything gets
	flags       map[string][]string // more of them for a node

	redis *lab.Cmd
}

func (c *cluster) stateDir(node string) string { return filepath.Join(c.dir, node) }

func (c *cluster) caFile() string { return filepath.Join(c.dir, "ca", "ca.pem") }

// start starts all of it, and returns an API key.
func (c *cluster) start(t *testing.T) (key string) {
	t.Helper()
	c.lab.Name("*."+domain, netip.MustParseAddr(clusterEdges[0]))
	c.startRedis(t)
	keyFile := filepath.Join(c.dir, "cluster.key")
	if err := os.WriteFile(keyFile, []byte(strings.Repeat("cluster key of the test ", 3)), 0o600); err != nil {
		t.Fatal(err)
	}
	common := []string{"-redis", "redis://" + clusterRedis, "-cluster-key-file", keyFile, "-domain", domain}
	for i, node := range clusterNodes {
		addr := fmt.Sprintf("127.0.1.%d", i+1)
		c.lab.Host.Daemon(t, nil, filepath.Join(c.programs, "orchestrator"), slices.Concat([]string{
			"-node-id", node,
			"-machine", c.machine,
			"-state-dir", c.stateDir(node),
			"-link-listen", addr + ":5007", "-link-advertise", addr + ":5007",
			"-api-listen", addr + ":5008", "-api-advertise", addr + ":5008",
			"-debug-listen", addr + ":9401",
			"-network-name", fmt.Sprintf("%s%d", c.lab.Prefix()[:7], i+1),
			"-slot-prefix", fmt.Sprintf("10.%d.0.0/16", 41+i),
			"-slot-prefix6", fmt.Sprintf("fd51:%d::/64", i+1),
		}, common, c.flags[node])...)
	}
	for _, addr := range clusterEdges { // one after the other: the second finds the CA that the first made
		c.lab.Host.Daemon(t, nil, filepath.Join(c.programs, "edge"), append([]string{
			"-https-listen", addr + ":443", "-dev-ca-dir", filepath.Dir(c.caFile()), "-debug-listen", addr + ":9400",
		}, common...)...)
		c.await(t, "edge "+addr, c.healthy(addr+":9400"))
	}
	for i, node := range clusterNodes {
		c.await(t, node, c.healthy(fmt.Sprintf("127.0.1.%d:9401", i+1)))
	}
	out, err := c.lab.Host.Command(t.Context(), filepath.Join(c.programs, "sluice"), "key", "create", "-redis", "redis://"+clusterRedis, "-name", "test").Output()
	if err != nil {
		t.Fatalf("sluice key create: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// do does what program g asks for.
func (c *cluster) do(t *testing.T, what string) {
	t.Helper()
	switch what {
	case "check placement":
		client := c.redisClient()
		defer client.Close()
		for _, node := range clusterNodes {
			if n, err := client.HLen(t.Context(), "sluice:node-routes:"+node).Result(); err != nil || n == 0 {
				t.Errorf("%d sandboxes on %s (%v), want some on each node", n, node, err)
			}
		}
	case "stop redis":
		if err := c.redis.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		_ = c.redis.Wait() // its exit status tells which signal it got
	case "start redis":
		c.startRedis(t)
	default:
		t.Errorf("the program asks for %q", what)
	}
}

func (c *cluster) startRedis(t *testing.T) {
	t.Helper()
	host, port, _ := net.SplitHostPort(clusterRedis)
	c.redis = c.lab.Host.Command(context.Background(), c.redisServer, "--bind", host, "--port", port, "--dir", c.dir, "--appendonly", "yes", "--daemonize", "no", "--loglevel", "warning")
	if err := c.redis.Start(); err != nil {
		t.Fatalf("start redis: %v", err)
	}
	client := c.redisClient()
	defer client.Close()
	c.await(t, "redis", func(ctx context.Context) error { return client.Ping(ctx).Err() })
}

func (c *cluster) redisClient() *redis.Client {
	return redis.NewClient(&redis.Options{Addr: clusterRedis, Dialer: c.lab.Host.Dial})
}

func (c *cluster) healthy(addr string) func(ctx context.Context) error {
	client := &http.Client{Transport: &http.Transport{DialContext: c.lab.Host.Dial, DisableKeepAlives: true}}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/healthz", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("health is %s", resp.Status)
		}
		return nil
	}
}

// await probes who until it is up.
func (c *cluster) await(t *testing.T, who string, probe func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(c.slower)*startTime)
	defer cancel()
	for {
		err := probe(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s is not up within %v: %v", who, time.Duration(c.slower)*startTime, err)
		case <-time.After(20 * time.Millisecond * time.Duration(c.slower)):
		}
	}
}

// serveRequests does what the lines on connections to ln ask for, and answers each. A connection without a line ends it.
func (c *cluster) serveRequests(t *testing.T, ln net.Listener) {
	t.Helper()
	for {
		conn, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		what, _ := bufio.NewReader(conn).ReadString('\n')
		if what != "" {
			c.do(t, strings.TrimSpace(what))
			fmt.Fprintln(conn, "done")
		}
		conn.Close()
		if what == "" {
			return
		}
	}
}
