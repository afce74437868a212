// Package guest is the agent inside a sandbox, which the E2B SDKs call envd, and the node's client for it. It serves processes, PTYs and files
// on port 49983, and the node's control calls on a private socket, or on vsock. cmd/guestd runs the agent, sandboxd holds the client.
//
// In a namespace the node makes everything around the agent and starts it. In a VM the same program is first the init: it loads modules, mounts
// disks, sets up the network and then starts itself again as the agent, in the way in which a node does, and again when that one ends.
//
// The agent is not a fence. It acts as root of the sandbox and does for the holder of the access token whatever that root may do; a request names
// the user that a process runs as and that new files belong to, as with E2B, but files are opened by the agent itself. The fence is around the
// sandbox. The other way round the client trusts nothing that comes back: whoever is root in the sandbox can replace this agent.
package guest

//go:generate ./generate.sh

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Version is the envd whose wire this agent speaks; SDKs switch features on by it.
	Version = "0.6.13"
	// Port is where SDKs find the agent.
	Port = 49983
	// ControlFDVariable names the descriptor of the control listener that the agent inherits.
	ControlFDVariable = "SLUICE_CONTROL_FD"

	// idleTimeout is longer than that of every proxy in front, so that the proxy is always the one that closes an idle connection.
	idleTimeout = 640 * time.Second
	// headerTimeout bounds a client that sends its request head byte by byte.
	headerTimeout = 30 * time.Second
	// maxHeaderBytes leaves room for X-Metadata headers; the kernel stores at most 64 KiB per attribute anyway.
	maxHeaderBytes = 128 << 10
)

// Options configure the agent. It wants a Control listener, or to be told that it may do without.
type Options struct {
	// Listen is the public listener; nil means port 49983 on every address, IPv4 and IPv6.
	Listen net.Listener
	// Control is the private listener for the node's calls. Until the first init came over it, clients are answered 503: before that nobody
	// has said whether there is a token, and no token means that everybody may do everything.
	Control net.Listener
	// Insecure serves clients without waiting for an init; Control may then be nil.
	Insecure bool
	// DefaultUser acts when a request names nobody and init named nobody; empty means "user", or root where there is no such user.
	DefaultUser string
	// Etc is the directory of passwd and group; empty means /etc.
	Etc string
	// PID1 says that the agent is the sandbox's init: it reaps orphans, and owns clock and hostname.
	PID1 bool
	// State is, in a VM, the directory on its disk where the agent keeps what it was told; nil says that this is no VM.
	State *os.Root
	// Restarted says that an earlier agent of the same boot has ended, and that this one goes on with what that one was told.
	Restarted bool
	// Serving is called once, when clients and the node can connect; it may be nil.
	Serving func()
	// Log is where the agent speaks; nil means nowhere.
	Log *slog.Logger
}

// agent holds what the parts share.
type agent struct {
	log       *slog.Logger
	accounts  accounts
	settings  settings
	processes *processes
	watchers  *watchers
	usage     usage
	pid1      bool
	state     *os.Root // of a VM, else nil

	initializing sync.Mutex // one init at a time
}

// Run serves until ctx ends or a listener fails, then kills what it started.
func Run(ctx context.Context, opts Options) error {
	if opts.Control == nil && !opts.Insecure {
		return errors.New("an agent without a control listener would never be given a token")
	}
	a := newAgent(opts)
	if a.pid1 || a.state != nil {
		a.processes.score = openOOMScore(a.log)
		// Nobody inside reads the agent's memory or takes its descriptors, not even with its own user id.
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
			return fmt.Errorf("forbid tracing: %w", err)
		}
	}
	listen := opts.Listen
	if listen == nil {
		var err error
		if listen, err = net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(Port))); err != nil {
			return fmt.Errorf("listen for clients: %w", err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	var wg sync.WaitGroup
	fail := make(chan error, 2)
	public := a.newServer(a.publicHandler())
	servers := []*http.Server{public}
	wg.Go(func() { fail <- serve(public, listen, "clients") })
	if opts.Control != nil {
		control := a.newServer(a.controlHandler())
		servers = append(servers, control)
		wg.Go(func() { fail <- serve(control, newDialListener(opts.Control, a.log), "the node") })
	}
	if a.pid1 {
		wg.Go(func() { a.processes.reapOrphans(ctx) })
	}
	wg.Go(func() { a.watchers.expire(ctx) })
	if opts.Serving != nil {
		wg.Go(opts.Serving)
	}

	var err error
	select {
	case <-ctx.Done():
	case err = <-fail:
	}
	cancel()
	a.processes.killAll()
	a.watchers.closeAll()
	for _, s := range servers {
		err = errors.Join(err, s.Close())
	}
	wg.Wait()
	return err
}

func newAgent(opts Options) *agent {
	log := opts.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	etc := opts.Etc
	if etc == "" {
		etc = "/etc"
	}
	a := &agent{
		log:       log,
		accounts:  accounts{etc: etc},
		processes: newProcesses(log),
		watchers:  newWatchers(),
		pid1:      opts.PID1,
		state:     opts.State,
	}
	a.settings.fallbackUser = opts.DefaultUser
	a.settings.now.ready = opts.Insecure
	if a.state != nil {
		a.takeUp(opts.Restarted)
	}
	return a
}

func (a *agent) newServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
		// No ReadTimeout and no WriteTimeout: uploads and event streams last as long as they move. Each sets its own deadlines.
	}
}

func serve(s *http.Server, l net.Listener, whom string) error {
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", whom, err)
	}
	return nil
}

// ControlListener takes the inherited control listener out of the environment; nil when there is none. The variable is removed and the descriptor
// closed on exec, so no process in the sandbox inherits either.
func ControlListener() (net.Listener, error) {
	value, ok := os.LookupEnv(ControlFDVariable)
	if !ok {
		return nil, nil
	}
	if err := os.Unsetenv(ControlFDVariable); err != nil {
		return nil, fmt.Errorf("remove %s: %w", ControlFDVariable, err)
	}
	fd, err := strconv.Atoi(value)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%s is %q, want a descriptor above 2", ControlFDVariable, value)
	}
	unix.CloseOnExec(fd)
	if l, ok, err := newVsockListener(fd); ok {
		return l, err
	}
	f := os.NewFile(uintptr(fd), "control")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("use descriptor %d as control listener: %w", fd, err)
	}
	return l, nil
}
