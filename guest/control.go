package guest

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxInitBody bounds an init: mostly environment, which the kernel would not take larger than this anyway.
const maxInitBody = 4 << 20

// initRequest is the body of POST /init. A field that is absent changes nothing; unknown fields are for other agents.
type initRequest struct {
	EnvVars        *map[string]string `json:"envVars,omitempty"`
	AccessToken    *string            `json:"accessToken,omitempty"`
	Timestamp      time.Time          `json:"timestamp,omitzero"`
	DefaultUser    *string            `json:"defaultUser,omitempty"`
	DefaultWorkdir *string            `json:"defaultWorkdir,omitempty"`
	LifecycleID    string             `json:"lifecycleID,omitempty"`
	Hostname       string             `json:"hostname,omitempty"`
	MergeEnv       bool               `json:"mergeEnv,omitempty"`
	MAC            string             `json:"mac,omitempty"`
	Resolvers      []string           `json:"resolvers,omitempty"`
	Entropy        []byte             `json:"entropy,omitempty"`
}

// resumeRequest is the body of POST /resume.
type resumeRequest struct {
	Timestamp       time.Time `json:"timestamp,omitzero"`
	LifecycleID     string    `json:"lifecycleID,omitempty"`
	Entropy         []byte    `json:"entropy,omitempty"`
	KeepConnections bool      `json:"keepConnections,omitempty"`
}

// clockRequest is the body of POST /clock.
type clockRequest struct {
	Timestamp time.Time `json:"timestamp"`
}

// execRequest is the body of POST /exec.
type execRequest struct {
	Cmd        string            `json:"cmd"`
	User       string            `json:"user,omitempty"`
	Cwd        string            `json:"cwd,omitempty"`
	Env        map[string]string `json:"env,omitempty"`
	TimeoutMS  int64             `json:"timeout_ms,omitempty"`
	Background bool              `json:"background,omitempty"`
}

// controlHandler is what the node may ask on the private socket. Who can connect there is the node.
func (a *agent) controlHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", serveHealth)
	mux.HandleFunc("GET /metrics", a.serveMetrics)
	mux.HandleFunc("POST /init", a.serveInit)
	mux.HandleFunc("POST /resume", a.serveResume)
	mux.HandleFunc("POST /clock", a.serveClock)
	mux.HandleFunc("POST /sync", a.serveSync)
	mux.HandleFunc("POST /exec", a.serveExec)
	mux.HandleFunc("/", serveNotFound)
	return mux
}

func (a *agent) serveInit(w http.ResponseWriter, r *http.Request) {
	var req initRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxInitBody)).Decode(&req); err != nil {
		writeError(w, http.StatusBadRequest, "error parsing body: "+err.Error())
		return
	}
	if req.EnvVars != nil {
		if _, err := environment(account{}, *req.EnvVars); err != nil {
			writeError(w, http.StatusBadRequest, err.Error())
			return
		}
	}
	if req.DefaultUser != nil && *req.DefaultUser != "" {
		if _, err := a.accounts.find(*req.DefaultUser); err != nil {
			writeError(w, http.StatusBadRequest, "default user: "+err.Error())
			return
		}
	}
	if err := req.checkMachine(); err != nil && a.state != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	if err := a.initialize(req); err != nil {
		a.failControl(w, "init", err)
		return
	}
	w.Header().Set("X-Envd-Version", Version)
	w.WriteHeader(http.StatusNoContent)
}

// initialize follows an init that was found right. A machine becomes another one before anybody may come in.
func (a *agent) initialize(req initRequest) error {
	a.initializing.Lock()
	defer a.initializing.Unlock()
	now := a.settings.saved()
	if late(req, now) {
		return nil
	}
	if a.state != nil {
		if err := a.assume(req, req.Hostname == "" || req.Hostname != now.Hostname); err != nil {
			return err
		}
	}
	a.settings.apply(req)
	a.log.Info("initialized", "lifecycle", req.LifecycleID)
	if a.state != nil {
		a.save(a.settings.saved())
	} else if a.pid1 {
		a.adoptMachine(req)
	}
	return nil
}

// adoptMachine sets clock and hostname, where a namespace has its own and the agent may. It shares the host's clock and needs nothing there.
func (a *agent) adoptMachine(req initRequest) {
	if req.Hostname != "" {
		if err := unix.Sethostname([]byte(req.Hostname)); err != nil {
			a.log.Debug("hostname not set", "error", err)
		}
	}
	a.setClock(req.Timestamp)
}

// The dial protocol shares the control socket with HTTP: the first byte tells them apart, since no HTTP method begins with a NUL. The
// request is dialHello and the port in network order; the answer is one verdict byte, and after dialOpen the connection is the stream to that
// port, each direction of which ends by itself. No descriptor is handed over: its file description would be shared with the sandbox, which could
// make the node's threads block on it. A server's reset arrives as an end of stream.
const (
	dialHello = 0x00

	dialOpen    = 'o'
	dialRefused = 'r' // nobody listens
	dialFailed  = 'f'

	// dialTime is for all addresses together. They are local: a listener whose backlog is full is the only thing that can take time.
	dialTime = 3 * time.Second
	// helloTime is how long a new control connection may say nothing.
	helloTime = 10 * time.Second
	// maxDials bounds the connections of the control socket that have not shown what they are, or are dialing.
	maxDials = 256
	// maxStreams bounds those that are streams. With the pipes that the kernel moves their bytes through they take six descriptors each.
	maxStreams = 4096
)

// dialListener answers dial requests by itself and hands every other connection on, as a listener for HTTP.
type dialListener struct {
	net.Listener
	log   *slog.Logger
	web   chan net.Conn // closed by accept, when all that it started is done
	slots chan struct{}
	flows chan struct{} // holds one for each stream
	done  chan struct{} // closed by Close
	err   error         // of the inner Accept; written before web is closed

	mu     sync.Mutex
	ours   map[net.Conn]struct{} // not handed on, or streams
	closed bool
}

func newDialListener(inner net.Listener, log *slog.Logger) *dialListener {
	l := &dialListener{
		Listener: inner, log: log, web: make(chan net.Conn), slots: make(chan struct{}, maxDials),
		flows: make(chan struct{}, maxStreams), done: make(chan struct{}), ours: map[net.Conn]struct{}{},
	}
	go l.accept()
	return l
}

func (l *dialListener) accept() {
	defer close(l.web)
	var open sync.WaitGroup
	defer open.Wait()
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			if pause(err) {
				continue
			}
			l.err = err
			return
		}
		l.slots <- struct{}{}
		open.Go(func() {
			if !l.track(conn) {
				<-l.slots
				return
			}
			defer l.untrack(conn)
			target := l.sort(conn)
			<-l.slots
			if target != nil {
				_ = conn.SetDeadline(time.Time{})
				relay(conn, target)
				<-l.flows
			}
		})
	}
}

// track makes conn one that Close closes; false when that has happened.
func (l *dialListener) track(conn net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		conn.Close()
		return false
	}
	l.ours[conn] = struct{}{}
	return true
}

func (l *dialListener) untrack(conn net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.ours, conn)
}

// pause waits out a shortage of descriptors; false for an error that stays.
func pause(err error) bool {
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ECONNABORTED) {
		time.Sleep(50 * time.Millisecond)
		return true
	}
	return false
}

// sort finds out what a connection is for. What it returns is the other end of a stream.
func (l *dialListener) sort(conn net.Conn) *net.TCPConn {
	var first [1]byte
	_ = conn.SetDeadline(time.Now().Add(helloTime))
	if _, err := conn.Read(first[:]); err != nil {
		conn.Close()
		return nil
	}
	if first[0] == dialHello {
		select {
		case l.flows <- struct{}{}:
		default:
			_, _ = conn.Write([]byte{dialFailed})
			conn.Close()
			return nil
		}
		target, err := answerDial(conn)
		if err != nil {
			l.log.Debug("dial for the node failed", "error", err)
			conn.Close()
			<-l.flows
		}
		return target
	}
	_ = conn.SetDeadline(time.Time{})
	select {
	case l.web <- &peekedConn{Conn: conn, first: first[:]}:
	case <-l.done:
		conn.Close()
	}
	return nil
}

// Accept returns the next HTTP connection.
func (l *dialListener) Accept() (net.Conn, error) {
	select {
	case conn, ok := <-l.web:
		if !ok {
			return nil, l.err
		}
		return conn, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept, and whatever has not come out of it. It returns when that is done.
func (l *dialListener) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	for conn := range l.ours {
		conn.Close()
	}
	l.mu.Unlock()
	close(l.done)
	err := l.Listener.Close()
	for conn := range l.web {
		conn.Close()
	}
	return err
}

// peekedConn gives back the byte that was read to sort it.
type peekedConn struct {
	net.Conn
	first []byte
}

func (c *peekedConn) Read(p []byte) (int, error) {
	if len(c.first) > 0 && len(p) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// answerDial connects to the port that the node names, and says so.
func answerDial(conn net.Conn) (*net.TCPConn, error) {
	var port [2]byte
	if _, err := io.ReadFull(conn, port[:]); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), dialTime)
	defer cancel()
	target, err := dialLocal(ctx, uint16(port[0])<<8|uint16(port[1]))
	verdict := byte(dialOpen)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		verdict = dialRefused
	case err != nil:
		verdict = dialFailed
	}
	if _, werr := conn.Write([]byte{verdict}); werr != nil {
		if target != nil {
			target.Close()
		}
		return nil, errors.Join(err, werr)
	}
	return target, err
}

// relay carries both directions until both have ended, or one has broken.
func relay(node net.Conn, target *net.TCPConn) {
	var back sync.WaitGroup
	back.Go(func() { carryTo(node, target) })
	carryTo(target, node)
	back.Wait()
	node.Close()
	target.Close()
}

// carryTo copies one direction and passes its end on. An error closes both, so that the other direction does not wait for ever.
func carryTo(dst, src net.Conn) {
	_, err := io.Copy(dst, src)
	if half, ok := dst.(interface{ CloseWrite() error }); ok && err == nil {
		err = half.CloseWrite()
	}
	if err != nil {
		dst.Close()
		src.Close()
	}
}

// dialLocal connects to a server in the sandbox, on whichever of its addresses it listens: most listen on loopback or everywhere. Refused
// everywhere is refused.
func dialLocal(ctx context.Context, port uint16) (*net.TCPConn, error) {
	var errs []error
	for _, addresses := range []func() []string{loopback, ownAddresses} {
		for _, addr := range addresses() {
			conn, err := dialAddress(ctx, net.JoinHostPort(addr, strconv.Itoa(int(port))))
			if err == nil {
				return conn, nil
			}
			errs = append(errs, err)
		}
	}
	return nil, errors.Join(errs...)
}

func dialAddress(ctx context.Context, address string) (*net.TCPConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok || talksToItself(tcp) {
		conn.Close()
		return nil, syscall.ECONNREFUSED
	}
	return tcp, nil
}

// talksToItself notices TCP's simultaneous open: a connection to a local port of the ephemeral range that nobody listens on can be given that very
// port as its own, and then succeeds.
func talksToItself(c *net.TCPConn) bool { return c.LocalAddr().String() == c.RemoteAddr().String() }

func loopback() []string { return []string{"127.0.0.1", "::1"} }

// ownAddresses are those of the other interfaces. A server that is bound to one of them answers only there.
func ownAddresses() []string {
	ifaces, err := net.Interfaces()
	if err != nil {
		return nil
	}
	var all []string
	for _, iface := range ifaces {
		addrs, err := iface.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			prefix, err := netip.ParsePrefix(a.String())
			if err != nil || prefix.Addr().IsLoopback() {
				continue
			}
			addr := prefix.Addr()
			if addr.IsLinkLocalUnicast() && addr.Is6() {
				addr = addr.WithZone(iface.Name)
			}
			all = append(all, addr.String())
		}
	}
	return all
}
