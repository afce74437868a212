// Package devstack is the whole of Sluice in one process: an edge, a node and a store in memory. It is what `sluice dev` and
// `sluice bench` run and what end-to-end tests start on port 0.
package devstack

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/certs"
	"github.com/sluice-edge/sluice/internal/daemon"
	"github.com/sluice-edge/sluice/internal/run"
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd/image"
)

// Options say where the system listens and lives.
type Options struct {
	Domain      string // base domain, without a port
	HTTPListen  string
	HTTPSListen string
	StateDir    string // sandboxes, the development CA and the cluster key; made when absent

	Machine      daemon.MachineOptions
	MaxSandboxes int

	Progress func(image.Step) // of the default template, when it has to be made; nil means silence

	Log     *zap.Logger
	Metrics *metrics.Set
}

// Stack is the system, built and not yet running.
type Stack struct {
	HTTPAddr, HTTPSAddr net.Addr
	Domain              string // as SDKs use it: with the port of the https listener unless that is 443
	APIKey              string // the same in every run with this state directory
	CAFile              string
	Machine             string   // what sandboxes are, and why, for people
	Limitations         []string // what this host cannot enforce, for people

	group run.Group
	node  *daemon.Node
}

// New builds the system bottom-up. Its listeners are open when it returns; nothing is served before Run. Where sandboxes are virtual
// machines and there is no default template yet, it makes that, which takes minutes.
func New(ctx context.Context, opts Options) (_ *Stack, err error) {
	if _, err := routing.NewHosts(opts.Domain); err != nil {
		return nil, fmt.Errorf("-domain: %w", err)
	}
	if opts.MaxSandboxes < 0 {
		return nil, fmt.Errorf("-max-sandboxes %d is negative", opts.MaxSandboxes)
	}
	if opts.StateDir, err = filepath.Abs(opts.StateDir); err != nil {
		return nil, fmt.Errorf("-state-dir: %w", err)
	}
	if err := os.MkdirAll(opts.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("-state-dir: %w", err)
	}
	clusterKey, err := clusterKey(filepath.Join(opts.StateDir, "cluster.key"))
	if err != nil {
		return nil, err
	}
	var open []net.Listener
	defer func() {
		if err != nil {
			for _, ln := range open {
				ln.Close()
			}
		}
	}()
	listen := func(flagName, addr string) (net.Listener, error) {
		ln, err := daemon.Listen(flagName, addr)
		if err == nil {
			open = append(open, ln)
		}
		return ln, err
	}
	httpLn, err := listen("-http", opts.HTTPListen)
	if err != nil {
		return nil, err
	}
	httpsLn, err := listen("-https", opts.HTTPSListen)
	if err != nil {
		return nil, err
	}
	apiLn, err := listen("api listener", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	keeper, err := certs.New(ctx, certs.Options{
		Domains: []string{opts.Domain},
		DevDir:  filepath.Join(opts.StateDir, "ca"),
		Log:     opts.Log.Named("certs"),
	})
	if err != nil {
		return nil, err
	}
	s := &Stack{
		HTTPAddr:  httpLn.Addr(),
		HTTPSAddr: httpsLn.Addr(),
		Domain:    withPort(opts.Domain, httpsLn.Addr()),
		CAFile:    keeper.CAFile(),
	}
	store, keys := routing.NewMemoryStore(), auth.NewMemoryKeys()
	if s.APIKey, err = apiKey(ctx, filepath.Join(opts.StateDir, "api.key"), keys); err != nil {
		return nil, err
	}
	machine, err := daemon.OpenMachine(ctx, opts.Machine, opts.StateDir, opts.Log, opts.Metrics)
	if err != nil {
		return nil, err
	}
	s.Machine, s.Limitations = machine.Why, machine.Limitations
	if machine.Kind == daemon.MachineVM {
		if err := daemon.MakeDefaultTemplate(ctx, opts.Machine, opts.StateDir, opts.Log, opts.Progress); err != nil {
			return nil, err
		}
	}
	s.node, err = daemon.NewNode(daemon.NodeOptions{
		ID:           "dev",
		Domain:       s.Domain,
		Store:        store,
		Keys:         keys,
		ClusterKey:   clusterKey,
		Machine:      machine.Machine,
		StateDir:     opts.StateDir,
		API:          apiLn,
		APIAddr:      apiLn.Addr().String(),
		MaxSandboxes: opts.MaxSandboxes,
		Log:          opts.Log,
		Metrics:      opts.Metrics,
	})
	if err != nil {
		return nil, err
	}
	edge, err := daemon.NewEdge(daemon.EdgeOptions{
		Domains: []string{opts.Domain},
		Store:   store,
		Dial:    s.node.Dial,
		BareAPI: true,
		HTTP:    httpLn,
		HTTPS:   httpsLn,
		TLS:     keeper.TLSConfig(),
		Log:     opts.Log,
		Metrics: opts.Metrics,
	})
	if err != nil {
		return nil, err
	}
	s.group.Add("certificates", keeper.Run)
	s.group.Add("node", s.node.Run)
	s.group.Add("edge", edge.Run)
	return s, nil
}

// Run serves until ctx ends, then kills every sandbox and removes what it took from the host.
func (s *Stack) Run(ctx context.Context) error { return s.group.Run(ctx) }

// Ready is closed when sandboxes can be created.
func (s *Stack) Ready() <-chan struct{} { return s.node.Ready() }

// clusterKey reads the key of an earlier run, so that tokens of sandboxes that outlived a crash stay true, or makes one.
func clusterKey(file string) ([]byte, error) {
	key, err := daemon.ReadClusterKey(file)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	random := make([]byte, daemon.MinClusterKey)
	rand.Read(random)
	if err := os.WriteFile(file, base64.StdEncoding.AppendEncode(nil, random), 0o600); err != nil {
		return nil, fmt.Errorf("write cluster key: %w", err)
	}
	return daemon.ReadClusterKey(file)
}

// apiKey puts the key of an earlier run into the store, so that what was exported in other terminals stays true, or makes one.
func apiKey(ctx context.Context, file string, keys auth.KeyStore) (string, error) {
	key, record := auth.NewKeyRecord("sluice dev", "default")
	stored, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
			return "", fmt.Errorf("write API key: %w", err)
		}
	case err != nil:
		return "", fmt.Errorf("read API key: %w", err)
	default:
		hash, ok := auth.HashKey(stored)
		if !ok {
			return "", fmt.Errorf("%s holds no API key: remove it to have a new one made", file)
		}
		key, record.Hash = string(stored), hash
	}
	return key, keys.PutKey(ctx, record)
}

func withPort(domain string, addr net.Addr) string {
	if port := addr.(*net.TCPAddr).Port; port != 443 {
		return net.JoinHostPort(domain, strconv.Itoa(port))
	}
	return domain
}
