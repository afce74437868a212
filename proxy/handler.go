package proxy

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/link"
	"github.com/sluice-edge/sluice/routing"
)

// serve serves the request whose head has been read, and reports whether the connection can take another.
func (c *clientConn) serve() (keep bool) {
	h := c.srv.h
	x := acquireExchange(c)
	h.stats.requests.Inc()
	h.stats.inFlight.Inc()
	defer func() {
		if p := recover(); p != nil {
			h.stats.panics.Inc()
			h.log.Error("panic", zap.Any("error", p), zap.ByteString("stack", debug.Stack()))
			keep = h.fail(c, x, &fault{reason: ReasonPanic})
		}
		x.abandon()
		h.stats.inFlight.Dec()
		h.logRequest(c, x)
		if keep && len(x.extra) > 0 {
			c.unread(x.extra) // last: the head that it overwrites is not needed any more
		}
		releaseExchange(x)
	}()
	if err := h.serve(c, x); err != nil {
		return h.fail(c, x, err)
	}
	return x.keep
}

// serve is the life of one request. When it returns an error before x.started it has sent nothing yet: fail answers.
func (h *Handler) serve(c *clientConn, x *exchange) error {
	name, err := h.name(&c.head)
	if err != nil {
		return err
	}
	if name.Kind == routing.KindAPI {
		return h.serveAPI(c, x)
	}
	x.port = name.Port
	// When the node knows better than the route, or the sandbox has been woken, the whole way is gone once more, the decision
	// included: another lifecycle may have another token.
	for rerouted, woken := false, 0; ; {
		err := h.serveSandbox(c, x, name)
		switch {
		case err == nil:
			return nil
		case moved(err) && !rerouted:
			rerouted = true
			h.reroute(x, err)
		case !errors.Is(err, errAsleep):
			return err
		case x.wrote:
			// It met the sandbox running, and a pause has cut it off. Who waits for an answer that never comes would undo
			// every pause.
			return &fault{reason: ReasonUpstreamClosed, err: err}
		case woken == mostWakes:
			return &fault{reason: ReasonTransitioning, err: err}
		default:
			if err := h.wake(c, x); err != nil {
				return err
			}
			woken++
			rerouted, x.absent = false, 0
		}
	}
}

// reroute drops the route that a node has shown to be wrong.
func (h *Handler) reroute(x *exchange, err error) {
	h.stats.rerouted.Inc()
	h.routes.Forget(x.target.Sandbox, x.target.Generation)
	x.pool.Forget(x.target.Sandbox, x.target.Generation)
	if v, ok := errors.AsType[*link.VerdictError](err); ok && v.Verdict == link.NotHere {
		x.absent = x.target.Generation
	}
}

// name finds out what the request is for: by its Host, and only where that says nothing by the routing headers.
func (h *Handler) name(head *requestHead) (routing.Name, error) {
	name, err := h.hosts.Parse(head.get(fieldHost))
	if err == nil && name.Kind == routing.KindHeaders {
		if head.twice[fieldSandboxID] || head.twice[fieldSandboxPort] {
			return name, &fault{reason: ReasonMalformed, text: "Malformed request: more than one routing header"}
		}
		if h.bareAPI && head.get(fieldSandboxID) == nil && head.get(fieldSandboxPort) == nil {
			return routing.Name{Kind: routing.KindAPI}, nil
		}
		name, err = routing.ParseHeaders(head.get(fieldSandboxID), head.get(fieldSandboxPort))
	}
	if host, ok := errors.AsType[*routing.HostError](err); ok {
		return name, &fault{reason: ReasonBadHost, text: host.Reason}
	}
	return name, err
}

// serveSandbox finds the sandbox, decides, and forwards.
func (h *Handler) serveSandbox(c *clientConn, x *exchange, name routing.Name) error {
	target, err := h.routes.Resolve(c.ctx, name.Sandbox, c.addr.Addr())
	if err != nil {
		x.target.Sandbox = string(name.Sandbox)
		return resolveFault(err)
	}
	route := target.Route
	if route.AutoResume && route.Generation == x.absent {
		// The store says again what the node has denied: it is about to publish the sandbox's pause, or its end. The node knows
		// which, and is asked as for one that is paused.
		paused := *route
		paused.State = routing.Paused
		route = &paused
	}
	x.target = link.Target{
		Addr: target.Node.LinkAddr, Sandbox: route.Sandbox, Generation: route.Generation, Port: name.Port, Client: c.addr,
	}
	x.pool = h.link
	if route.Ports[name.Port].HTTPS {
		x.pool = h.linkTLS
	}
	f := facts{target: c.head.target}
	f.token, f.tokens = c.head.credential(fieldTrafficToken)
	f.envdToken, f.envdTokens = c.head.credential(fieldEnvdToken)
	d := decide(route, name.Port, &f)
	if d.reason != reasonNone {
		return &fault{reason: d.reason}
	}
	if x.pool == nil {
		return &fault{reason: ReasonDialFailed, err: errors.New("the port speaks TLS, and no way to it is set")}
	}
	if d.wake {
		return errAsleep
	}
	of := life{route.Sandbox, route.Generation}
	if !h.load.acquire(of) {
		return &fault{reason: ReasonSandboxCap}
	}
	defer h.load.release(of)
	x.rw = rewrite{client: c.addr.Addr(), tls: c.tls, mask: d.mask, port: name.Port, envd: name.Port == envdPort}
	if name.Port != envdPort { // a tunnel to envd would lead past the control paths
		x.rw.protocol = c.head.wantsUpgrade()
	}
	return x.run()
}

// credential returns the first credential under a name and how many there are: two stand for any number.
func (h *requestHead) credential(f field) (first []byte, n int) {
	first = h.get(f)
	switch {
	case first == nil:
		return nil, 0
	case h.twice[f]:
		return first, 2
	}
	return first, 1
}

// serveAPI forwards to a node's API, which has its own keys: nothing is decided here and no credential is taken out.
func (h *Handler) serveAPI(c *clientConn, x *exchange) error {
	node, err := h.routes.PickNode(c.ctx)
	if err != nil {
		return &fault{reason: ReasonNoAPI, err: err}
	}
	x.api = true
	x.pool = c.srv.api
	x.target = link.Target{Addr: node.APIAddr, Sandbox: node.APIAddr}
	x.rw = rewrite{client: c.addr.Addr(), tls: c.tls, trusted: true}
	return x.run()
}

// resolveFault says what the client is told when there is no route. That the store is down is never told as "not found": SDKs
// take that for the sandbox's death.
func resolveFault(err error) error {
	f := &fault{err: err}
	switch {
	case errors.Is(err, routing.ErrNodeLost):
		f.reason = ReasonNodeLost
	case errs.CodeOf(err) == errs.NotFound:
		f.reason = ReasonNotFound
	case errs.CodeOf(err) == errs.Exhausted:
		f.reason = ReasonTooManyMisses
	case errors.Is(err, context.Canceled):
		f.reason = ReasonClientGone
	default:
		f.reason = ReasonStoreDown
	}
	return f
}

// openError wraps an error from opening a connection, to tell it from those of the exchange.
type openError struct{ err error }

func (e *openError) Error() string { return fmt.Sprintf("open connection: %v", e.err) }
func (e *openError) Unwrap() error { return e.err }

// moved tells whether the node said that it does not have this lifecycle of the sandbox.
func moved(err error) bool {
	open, ok := errors.AsType[*openError](err)
	if !ok {
		return false
	}
	v, ok := errors.AsType[*link.VerdictError](open.err)
	return ok && (v.Verdict == link.NotHere || v.Verdict == link.WrongGeneration)
}

// openFault says what the client is told when there is no connection to the sandbox.
func openFault(err error, api bool) *fault {
	f := &fault{reason: ReasonDialFailed, err: err}
	if v, ok := errors.AsType[*link.VerdictError](err); ok {
		switch v.Verdict {
		case link.NotHere, link.WrongGeneration:
			f.reason = ReasonNotFound
		case link.PortClosed:
			f.reason = ReasonPortClosed
		case link.Busy:
			f.reason = ReasonNodeBusy
		default:
			f.reason = ReasonNodeRefused
		}
		return f
	}
	if api {
		f.reason = ReasonNoAPI
	}
	return f
}

// fail ends a request that has no answer, or not the whole of one, and reports whether the connection can go on.
func (h *Handler) fail(c *clientConn, x *exchange, err error) (keep bool) {
	_, _ = x.finishBody(0) // from here on nobody else reads from the client
	f := faultOf(err, x)
	if c.isGone() && f.reason != ReasonPanic {
		f.reason = ReasonClientGone // whatever it looked like from here
	}
	x.reason, x.err = f.reason, f.err
	h.stats.refused(f.reason)
	if f.reason == ReasonClientGone || f.reason == ReasonAnswerCut || x.started {
		c.reset()
		return false
	}
	keep = c.head.persistent() && !c.srv.draining.Load() && f.reason != ReasonPanic && x.skipBody()
	x.status = refusals[f.reason].status
	limit := h.limits.ConnsPerSandbox
	if f.reason == ReasonBodyCap {
		limit = h.limits.BodiesPerSandbox
	}
	answer := appendRefusal(x.out[:0], f, &subject{
		sandbox: x.target.Sandbox, port: x.port, path: string(pathOnly(c.head.target)), limit: limit,
		html: c.head.wantsPage(), head: string(c.head.method) == "HEAD", close: !keep, keep: c.head.http10,
	})
	if c.send(answer) != nil {
		return false
	}
	if !keep {
		c.linger()
	}
	return keep
}

// faultOf classifies an error once, at the end of the request.
func faultOf(err error, x *exchange) *fault {
	if f, ok := errors.AsType[*fault](err); ok {
		return f
	}
	if open, ok := errors.AsType[*openError](err); ok {
		return openFault(open.err, x.api)
	}
	return &fault{reason: ReasonUpstreamClosed, err: err}
}

// logRequest writes the access log: at Debug, without a query string and without anything that a header said.
func (h *Handler) logRequest(c *clientConn, x *exchange) {
	ce := h.log.Check(zap.DebugLevel, "request")
	if ce == nil {
		return
	}
	ce.Write(
		zap.Stringer("client", c.addr),
		zap.String("sandbox", x.target.Sandbox),
		zap.Uint16("port", x.port),
		zap.ByteString("method", c.head.method),
		zap.ByteString("path", pathOnly(c.head.target)),
		zap.Int("status", x.status),
		zap.Stringer("code", x.reason),
		zap.Duration("took", time.Since(x.began)),
		zap.Error(x.err),
	)
}

func pathOnly(target []byte) []byte {
	for i, ch := range target {
		if ch == '?' {
			return target[:i]
		}
	}
	return target
}
