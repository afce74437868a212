package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
)

// headerForwarded names the node that forwarded a request. Whoever receives it answers from its own sandboxes and asks nobody, so no
// request makes a second hop. A stranger who sends it gains nothing: he only loses sight of the other nodes, for the key is checked,
// the rate limited and the team's sandboxes counted all the same.
const headerForwarded = "Sluice-Forwarded-By"

const (
	// peerTimeout bounds how long a list waits for one node.
	peerTimeout = 5 * time.Second
	// maxPeerBody bounds what is read of one node's answer. It is above the largest list: legacyPageSize sandboxes with maxMetadata each.
	maxPeerBody = 32 << 20
	// maxPeersAtOnce bounds the nodes asked in parallel for one list.
	maxPeersAtOnce = 16
	// placeAttempts bounds the other nodes tried for one create; what nodes say about their room is seconds old.
	placeAttempts = 3
)

type cluster struct {
	self   string
	nodes  Nodes // nil: there is no other node
	client *http.Client
}

// newTransport reaches other nodes over the private network between them.
func newTransport() http.RoundTripper {
	return &http.Transport{
		Proxy:                  nil, // never through the environment's proxy: the request carries a key
		DialContext:            (&net.Dialer{Timeout: 2 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		MaxIdleConnsPerHost:    16,
		MaxConnsPerHost:        256,
		IdleConnTimeout:        90 * time.Second, // far below the idle time of Server, so that this side closes first
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true,
	}
}

func newClient(transport http.RoundTripper) *http.Client {
	return &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// locate returns the node that has the sandbox, or nil when this node is the one to answer, be it with "not found".
func (h *handler) locate(ctx context.Context, id string) (*routing.Node, error) {
	if _, err := h.sandboxes.Get(id); err == nil {
		return nil, nil
	}
	route, err := h.cluster.nodes.Route(ctx, id)
	if errs.CodeOf(err) == errs.NotFound {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up the node of sandbox %q: %w", id, err)
	}
	if route.Node == h.cluster.self {
		return nil, nil
	}
	nodes, err := h.cluster.nodes.Nodes(ctx)
	if err != nil {
		return nil, fmt.Errorf("look up node %q: %w", route.Node, err)
	}
	for i := range nodes {
		if nodes[i].ID == route.Node && nodes[i].APIAddr != "" {
			return &nodes[i], nil
		}
	}
	return nil, errs.New(errs.Unavailable, "The node of sandbox %q does not answer", id)
}

// ask sends the caller's request to another node. Only the header of the answer has arrived when it returns.
func (h *handler) ask(ctx context.Context, node *routing.Node, method, uri string, body []byte) (*http.Response, error) {
	var reader io.Reader = http.NoBody
	if len(body) > 0 {
		reader = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+node.APIAddr+uri, reader)
	if err != nil {
		return nil, fmt.Errorf("ask node %q: %w", node.ID, err)
	}
	header := callOf(ctx).header
	for _, name := range []string{"X-API-Key", "Authorization", "Content-Type", "User-Agent", "Traceparent", "Tracestate"} {
		if values := header[http.CanonicalHeaderKey(name)]; len(values) > 0 {
			req.Header[http.CanonicalHeaderKey(name)] = values
		}
	}
	req.Header.Set(headerForwarded, h.cluster.self)
	resp, err := h.cluster.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask node %q: %w", node.ID, err)
	}
	return resp, nil
}

// forward lets the node that has the sandbox answer the request.
func (h *handler) forward(w http.ResponseWriter, r *http.Request, node *routing.Node, body []byte) error {
	h.metrics.GetOrCreateCounter("sluice_api_forwarded_total").Inc()
	resp, err := h.ask(r.Context(), node, r.Method, callOf(r.Context()).uri, body)
	if err != nil {
		return &errs.Error{Code: errs.Unavailable, Msg: "The node of the sandbox does not answer", Err: err}
	}
	return relay(w, resp)
}

// relay passes an answer of another node on. Where both have a say (CORS, rate limits), this node's stands.
func relay(w http.ResponseWriter, resp *http.Response) error {
	defer resp.Body.Close()
	for _, name := range []string{"Content-Type", "Retry-After", "X-Next-Token", "X-Total-Running"} {
		if value := resp.Header.Get(name); value != "" {
			w.Header().Set(name, value)
		}
	}
	w.WriteHeader(resp.StatusCode)
	if _, err := io.Copy(w, resp.Body); err != nil {
		return &errs.Error{Code: errs.Unavailable, Msg: "The node of the sandbox does not answer", Err: fmt.Errorf("relay an answer: %w", err)}
	}
	return nil
}

// place lets the node create the sandbox that has the snapshot asked for, or else the node with the most room, this one first on ties.
func (h *handler) place(w http.ResponseWriter, r *http.Request, body []byte, next http.Handler) error {
	ctx := r.Context()
	switch node, err := h.snapshotFor(ctx, body); {
	case err != nil:
		return err
	case node != nil && node.ID == h.cluster.self:
		next.ServeHTTP(w, r)
		return nil
	case node != nil:
		resp, err := h.ask(ctx, node, r.Method, callOf(ctx).uri, body)
		if err != nil {
			return placementFailure(ctx, err)
		}
		h.metrics.GetOrCreateCounter("sluice_api_forwarded_total").Inc()
		return relay(w, resp)
	}
	nodes, err := h.cluster.nodes.Nodes(ctx)
	if err != nil {
		h.log.Warn("catalogue does not answer: placing here", zap.Error(err))
		nodes = nil
	}
	candidates, err := rank(h.cluster.self, h.sandboxes.Capacity(), nodes)
	if err != nil {
		return err
	}
	var last error
	for i, node := range candidates {
		if node.ID == h.cluster.self {
			next.ServeHTTP(w, r)
			return nil
		}
		if i >= placeAttempts {
			continue
		}
		resp, err := h.ask(ctx, &node, r.Method, callOf(ctx).uri, body)
		if err != nil {
			failed := placementFailure(ctx, err)
			if op, ok := errors.AsType[*net.OpError](err); !ok || op.Op != "dial" {
				return failed // the node may have created it: a second try could make two
			}
			h.log.Warn("node does not answer: placing on another", zap.String("upstream", node.ID), zap.Error(err))
			last = failed
			continue
		}
		full, err := refusedForRoom(resp)
		if err != nil {
			return placementFailure(ctx, err)
		}
		if !full {
			h.metrics.GetOrCreateCounter("sluice_api_forwarded_total").Inc()
			return relay(w, resp)
		}
		last = noRoom("no node has room", nil)
	}
	return last
}

// rank orders the nodes that may take a new sandbox, most room first. What this node knows of itself is newer than its record.
func rank(self string, capacity sandboxd.Capacity, nodes []routing.Node) ([]routing.Node, error) {
	all := []routing.Node{{ID: self, Sandboxes: capacity.Sandboxes, MaxSandboxes: capacity.MaxSandboxes, Draining: capacity.Draining}}
	for _, node := range nodes {
		if node.ID != self && node.APIAddr != "" {
			all = append(all, node)
		}
	}
	all = slices.DeleteFunc(all, func(n routing.Node) bool { return n.Draining })
	if len(all) == 0 {
		return nil, &failure{status: http.StatusServiceUnavailable, msg: "Failed to place sandbox: no node takes new sandboxes",
			errorCode: codeNoNode, retryAfter: 5 * time.Second}
	}
	room := func(n routing.Node) int { return n.MaxSandboxes - n.Sandboxes }
	all = slices.DeleteFunc(all, func(n routing.Node) bool { return room(n) <= 0 })
	if len(all) == 0 {
		return nil, noRoom("no node has room", nil)
	}
	slices.SortFunc(all, func(a, b routing.Node) int {
		return cmp.Or(cmp.Compare(room(b), room(a)), -compareBool(a.ID == self, b.ID == self), cmp.Compare(a.ID, b.ID))
	})
	return all, nil
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	default:
		return -1
	}
}

// noRoom is a full node or cluster. It is not a 429: the client's own use is not what is too much.
func noRoom(why string, err error) error {
	return &failure{status: http.StatusServiceUnavailable, msg: "Failed to place sandbox: " + why, errorCode: codeNoCapacity,
		retryAfter: 5 * time.Second, err: err}
}

func placementFailure(ctx context.Context, err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &failure{status: http.StatusGatewayTimeout, msg: "Failed to place sandbox: the node did not answer in time",
			errorCode: codeTimeout, err: err}
	}
	return &failure{status: http.StatusServiceUnavailable, msg: "Failed to place sandbox: the node does not answer",
		errorCode: codeCreateFailed, retryAfter: time.Second, err: err}
}

// refusedForRoom tells whether a node answered that it takes no more. The body of any other answer stays readable.
func refusedForRoom(resp *http.Response) (bool, error) {
	if resp.StatusCode != http.StatusServiceUnavailable {
		return false, nil
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // errors are short
	resp.Body.Close()
	if err != nil {
		return false, fmt.Errorf("read a refusal: %w", err)
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	var refusal gen.Error
	if err := json.Unmarshal(body, &refusal); err != nil || refusal.ErrorCode == nil {
		return false, nil //nolint:nilerr // not one of our refusals: the client shall see it as it is
	}
	return *refusal.ErrorCode == codeNoCapacity || *refusal.ErrorCode == codeNoNode, nil
}

// answer is what one other node said to a GET.
type answer struct {
	node   *routing.Node
	header http.Header
	body   []byte
}

// askAll asks every other node the same and gives each answer to use as it comes, one at a time, so that no more of them are held
// than are asked at once. A node that does not answer is counted as missing and logged, not an error: when one node
// of fifty is dead, who cleans up must still see the rest. Without the catalogue there is an error, for then every other node would
// be missing although all of them may be well; and so it is when a node finds the caller too fast, for he would not notice.
func (h *handler) askAll(ctx context.Context, uri string, use func(answer) error) (missing int, err error) {
	if h.cluster.nodes == nil || callOf(ctx).forwarded {
		return 0, nil
	}
	nodes, err := h.cluster.nodes.Nodes(ctx)
	if err != nil {
		return 0, fmt.Errorf("list the nodes: %w", err)
	}
	nodes = slices.DeleteFunc(slices.Clone(nodes), func(n routing.Node) bool { return n.ID == h.cluster.self || n.APIAddr == "" })
	turns := make(chan struct{}, maxPeersAtOnce)
	var wg sync.WaitGroup
	var mu sync.Mutex // guards missing and refused, and use runs under it
	var refused error
	for i := range nodes {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			result, err := h.askOne(ctx, &nodes[i], uri)
			mu.Lock()
			defer mu.Unlock()
			if _, ok := errors.AsType[*failure](err); ok {
				refused = err
				return
			}
			if err != nil {
				h.metrics.GetOrCreateCounter("sluice_api_peer_failures_total").Inc()
				h.log.Warn("node does not answer: its part is missing from a list", zap.String("upstream", nodes[i].ID), zap.Error(err))
				missing++
				return
			}
			if err := use(*result); err != nil {
				refused = fmt.Errorf("use the answer of node %q: %w", nodes[i].ID, err)
			}
		})
	}
	wg.Wait()
	return missing, refused
}

func (h *handler) askOne(ctx context.Context, node *routing.Node, uri string) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	resp, err := h.ask(ctx, node, http.MethodGet, uri, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusTooManyRequests {
		seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		return nil, rateLimited(time.Duration(seconds) * time.Second)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("node %q answered %s", node.ID, resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxPeerBody+1))
	if err != nil {
		return nil, fmt.Errorf("read the answer of node %q: %w", node.ID, err)
	}
	if len(body) > maxPeerBody {
		return nil, fmt.Errorf("the answer of node %q is larger than %d bytes", node.ID, maxPeerBody)
	}
	return &answer{node: node, header: resp.Header, body: body}, nil
}
