package routingtest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Redis is a real redis-server on a free port of 127.0.0.1, gone when the test ends. It writes an append-only file, so that
// what it holds survives Stop and Start.
type Redis struct {
	Addr string

	t       testing.TB
	dir     string
	args    []string
	cluster bool
	proc    *exec.Cmd
	exited  chan struct{} // closed when proc is gone and its output is complete
	output  bytes.Buffer
}

// StartRedis starts a server with additional arguments. Where there is no redis-server the test is skipped, and says so.
func StartRedis(t testing.TB, args ...string) *Redis {
	t.Helper()
	r := &Redis{t: t, dir: t.TempDir(), args: args}
	quietClient()
	r.launch()
	return r
}

// StartCluster starts a Cluster of one server that holds all slots: it refuses whatever a larger one refuses, such as a script over
// keys of different slots.
func StartCluster(t testing.TB) *Redis {
	t.Helper()
	r := &Redis{t: t, dir: t.TempDir(), args: []string{"--cluster-enabled", "yes"}, cluster: true}
	quietClient()
	r.launch()
	if answer, err := r.command("CLUSTER ADDSLOTSRANGE 0 16383"); err != nil || answer != "+OK" {
		t.Fatalf("CLUSTER ADDSLOTSRANGE = %q, %v", answer, err)
	}
	eventually(t, "the cluster is ready", func() bool {
		answer, err := r.command("GET x") // -CLUSTERDOWN until then
		return err == nil && answer == "$-1"
	})
	return r
}

// quietClient keeps go-redis from printing a line per failed dial: servers are away on purpose here.
var quietClient = sync.OnceFunc(func() { redis.SetLogger(silence{}) })

type silence struct{}

func (silence) Printf(context.Context, string, ...any) {}

func (r *Redis) launch() {
	r.t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		r.t.Skip("SKIPPED: there is no redis-server on this machine; on Debian: apt-get install redis-server")
	}
	r.t.Cleanup(r.Stop)
	for range 5 { // another process may take the port between the look and the start
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			r.t.Fatal(err)
		}
		r.Addr = ln.Addr().String()
		ln.Close()
		if r.tryStart() {
			return
		}
	}
	r.t.Fatalf("redis-server does not start:\n%s", r.output.String())
}

// Start starts the server again after Stop, on the same port and with what it held.
func (r *Redis) Start() {
	r.t.Helper()
	if !r.tryStart() {
		r.t.Fatalf("redis-server does not start again:\n%s", r.output.String())
	}
}

func (r *Redis) tryStart() bool {
	_, port, err := net.SplitHostPort(r.Addr)
	if err != nil {
		r.t.Fatal(err)
	}
	// Written before it is answered, and synced by the kernel in its own time: while a sync of the server's own is under way it answers what
	// it has not written yet, and what is killed here would have forgotten it.
	args := append([]string{"--port", port, "--bind", "127.0.0.1", "--dir", r.dir, "--save", "", "--appendonly", "yes", "--appendfsync", "no"}, r.args...)
	r.proc = exec.Command("redis-server", args...)
	r.proc.Stdout, r.proc.Stderr = &r.output, &r.output
	r.proc.Dir = r.dir
	r.proc.SysProcAttr = dieWithParent()
	if err := r.proc.Start(); err != nil {
		r.t.Fatal(err)
	}
	exited := make(chan struct{})
	r.exited = exited
	go func(proc *exec.Cmd) {
		_ = proc.Wait() // killed, or a port that is taken: the loop below tells
		close(exited)
	}(r.proc)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		select {
		case <-exited:
			return false
		default:
		}
		if answer, err := r.command("PING"); err == nil && answer == "+PONG" {
			return true
		}
	}
	r.Stop()
	return false
}

// Stop kills the server at once, as a crash would. Stopping twice is no error.
func (r *Redis) Stop() {
	if r.proc == nil {
		return
	}
	r.signal(syscall.SIGKILL)
	<-r.exited
	r.proc = nil
}

// Pause stops the server without closing a connection: it accepts, and does not answer.
func (r *Redis) Pause() { r.signal(syscall.SIGSTOP) }

// Continue ends Pause.
func (r *Redis) Continue() { r.signal(syscall.SIGCONT) }

func (r *Redis) signal(sig os.Signal) {
	if err := r.proc.Process.Signal(sig); err != nil && sig != syscall.SIGKILL {
		r.t.Errorf("signal redis-server: %v", err)
	}
}

// Client returns a client for the server as it was started, closed when the test ends. Its time-outs are those that a daemon should use.
func (r *Redis) Client(t testing.TB) redis.UniversalClient {
	opts := redis.UniversalOptions{
		Addrs:                 []string{r.Addr},
		IsClusterMode:         r.cluster,
		PoolSize:              16,
		ContextTimeoutEnabled: true,
		DialTimeout:           time.Second,
		ReadTimeout:           time.Second,
		WriteTimeout:          time.Second,
	}
	client := redis.NewUniversalClient(&opts)
	t.Cleanup(func() { client.Close() }) // the test is over
	return client
}

// command sends one line and returns the first line of the answer.
func (r *Redis) command(line string) (string, error) {
	conn, err := net.DialTimeout("tcp", r.Addr, time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	if _, err := fmt.Fprintf(conn, "%s\r\n", line); err != nil {
		return "", err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(answer), err
}
