package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	// requestTimeout is how long one call may take, create included.
	requestTimeout = 70 * time.Second
	// maxBody is far above any body of an SDK; metadata and environment variables are the largest of it.
	maxBody = 1 << 20
	// maxKey bounds what is hashed and looked up for a stranger.
	maxKey = 256
)

// handler is the API. It satisfies gen.StrictServerInterface: each of its exported methods is one operation of openapi.yaml.
type handler struct {
	// Fixed after New.
	sandboxes  Sandboxes
	keys       *auth.Keyring
	tokens     auth.TokenKey
	domain     string
	maxTimeout time.Duration
	teamPaused int
	cluster    cluster
	operations map[string]*operation // by pattern of mux
	mux        *http.ServeMux
	log        *zap.Logger
	metrics    *metrics.Set

	// Safe for concurrent use.
	teams  *teams
	lists  *turns
	limits *limits
}

// call is what the steps before an operation found out about its request.
type call struct {
	operation string
	principal auth.Principal
	forwarded bool        // another node sent it: answer it here, whatever it is
	header    http.Header // as received, for asking other nodes in the caller's name
	uri       string
}

type callKey struct{}

// callOf never returns nil, so that the paths before a call is known need no care.
func callOf(ctx context.Context) *call {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c
	}
	return &call{operation: "unknown"}
}

// recorder remembers the status for the counters, and whether an answer has begun.
type recorder struct {
	http.ResponseWriter
	status int
}

func (w *recorder) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController and http.MaxBytesReader reach the connection.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// ServeHTTP is what surrounds every request: time, counters, and an answer even after a panic.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	c := &call{operation: "unknown"}
	op := h.operationOf(r)
	if op != nil {
		c.operation = op.id
	}
	ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), callKey{}, c), requestTimeout)
	defer cancel()
	r = r.WithContext(ctx)
	rec := &recorder{ResponseWriter: w}
	defer h.account(rec, c, start)
	defer h.recover(rec, r)
	if err := h.serve(rec, r, op, c); err != nil {
		h.writeError(rec, r, err)
	}
}

// serve is the life of a request until its operation is known to be allowed; enter takes over from there. When it returns an
// error it has sent nothing yet.
func (h *handler) serve(w http.ResponseWriter, r *http.Request, op *operation, c *call) error {
	setCORS(w.Header())
	if isPreflight(r) {
		w.Header().Set("Access-Control-Allow-Methods", "GET, POST, PUT, DELETE, OPTIONS")
		w.Header().Set("Access-Control-Allow-Headers", "*, Authorization") // the star does not cover Authorization
		w.Header().Set("Access-Control-Max-Age", "7200")
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	if op == nil {
		return h.noOperation(w, r)
	}
	c.header, c.uri, c.forwarded = r.Header, r.URL.RequestURI(), r.Header.Get(headerForwarded) != ""
	if !op.open {
		var err error
		if c.principal, err = h.authorize(w, r); err != nil {
			return err
		}
		if err := h.limits.take(w.Header(), c.principal.KeyID, op.id); err != nil {
			return err
		}
	}
	h.mux.ServeHTTP(w, r)
	return nil
}

// enter stands between the router and every operation: the body is read and checked, a list waits for its turn, and a call that
// belongs to another node goes there.
func (h *handler) enter(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		op := h.operations[r.Pattern]
		body, err := readBody(w, r, op)
		if err != nil {
			h.writeError(w, r, err)
			return
		}
		if err := op.validate(r, body); err != nil {
			h.writeError(w, r, err)
			return
		}
		if op.lists {
			release, err := h.lists.acquire(r.Context(), callOf(r.Context()).principal.Team)
			if err != nil {
				h.writeError(w, r, err)
				return
			}
			defer release()
		}
		if err := h.dispatch(w, r, op, body, next); err != nil {
			h.writeError(w, r, err)
		}
	})
}

// dispatch serves the call here, or lets the node serve it that has the sandbox, the snapshot or the room for a new one.
func (h *handler) dispatch(w http.ResponseWriter, r *http.Request, op *operation, body []byte, next http.Handler) error {
	alone := h.cluster.nodes == nil || callOf(r.Context()).forwarded
	switch {
	case op.sandbox:
		id, err := parseID(r.PathValue("sandboxID"))
		if err != nil {
			return err
		}
		if alone {
			break
		}
		node, err := h.locate(r.Context(), id)
		if err != nil {
			return err
		}
		if node != nil {
			return h.forward(w, r, node, body)
		}
	case op.named && !alone:
		node, err := h.locateSnapshot(r.Context(), r.PathValue("templateID"))
		if err != nil {
			return err
		}
		if node != nil {
			return h.forward(w, r, node, body)
		}
	case op.creates && !alone:
		return h.place(w, r, body, next)
	}
	next.ServeHTTP(w, r)
	return nil
}

// readBody reads the whole body, whether its length was announced or not, and leaves it readable once more. Bodies of operations
// that take none are left alone.
func readBody(w http.ResponseWriter, r *http.Request, op *operation) ([]byte, error) {
	if op.body == nil {
		return nil, nil
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, err
	}
	if err != nil {
		return nil, fail(http.StatusBadRequest, "Error when parsing request: the body did not arrive whole")
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	return body, nil
}

// operationOf returns nil when no operation has this method and path. A path that is not in its shortest form is no operation's:
// the router would redirect, and a redirected POST is rarely what a client wants.
func (h *handler) operationOf(r *http.Request) *operation {
	if path.Clean(r.URL.Path) != r.URL.Path {
		return nil
	}
	_, pattern := h.mux.Handler(r)
	return h.operations[pattern]
}

func (h *handler) noOperation(w http.ResponseWriter, r *http.Request) error {
	var allowed []string
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete} {
		if h.operationOf(&http.Request{Method: method, URL: r.URL, Host: r.Host}) != nil {
			allowed = append(allowed, method)
		}
	}
	if allowed == nil {
		return fail(http.StatusNotFound, "No such endpoint: %s %s", r.Method, clip(r.URL.Path))
	}
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	return fail(http.StatusMethodNotAllowed, "Method %s is not allowed here", r.Method)
}

// authorize accepts the key as SDKs send it, and as a bearer token for tools that only know that.
func (h *handler) authorize(w http.ResponseWriter, r *http.Request) (auth.Principal, error) {
	key := r.Header.Get("X-API-Key")
	if key == "" {
		if scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "bearer") {
			key = strings.TrimSpace(token)
		}
	}
	if key == "" {
		w.Header().Set("WWW-Authenticate", "Bearer")
		return auth.Principal{}, fail(http.StatusUnauthorized, "Missing API key: send it in the X-API-Key header")
	}
	if len(key) > maxKey {
		w.Header().Set("WWW-Authenticate", "Bearer")
		return auth.Principal{}, fail(http.StatusUnauthorized, "Invalid API key")
	}
	principal, err := h.keys.Authorize(r.Context(), []byte(key))
	if err != nil && errs.CodeOf(err) == errs.Denied {
		w.Header().Set("WWW-Authenticate", "Bearer")
		return auth.Principal{}, fail(http.StatusUnauthorized, "Invalid API key")
	}
	return principal, err
}

// account counts the request by operation and status, and logs it for who debugs.
func (h *handler) account(rec *recorder, c *call, start time.Time) {
	took := time.Since(start)
	status := rec.status // 0: the client went away before an answer
	h.metrics.GetOrCreateCounter(fmt.Sprintf("sluice_api_requests_total{operation=%q,status=%q}", c.operation, strconv.Itoa(status))).Inc()
	h.metrics.GetOrCreateHistogram(fmt.Sprintf("sluice_api_request_seconds{operation=%q}", c.operation)).Update(took.Seconds())
	if ce := h.log.Check(zap.DebugLevel, "request"); ce != nil {
		ce.Write(zap.String("operation", c.operation), zap.String("key", c.principal.KeyID), zap.Int("status", status), zap.Duration("took", took))
	}
}

func (h *handler) recover(rec *recorder, r *http.Request) {
	v := recover()
	if v == nil {
		return
	}
	if v == http.ErrAbortHandler { //nolint:errorlint // a panic value, compared as net/http does
		panic(v)
	}
	h.metrics.GetOrCreateCounter("sluice_api_panics_total").Inc()
	h.log.Error("panic in a request", zap.Any("panic", v), zap.ByteString("stack", debug.Stack()))
	if rec.status != 0 {
		panic(http.ErrAbortHandler) // half an answer is out: a reset is the only honest end
	}
	h.writeError(rec, r, errs.New(errs.Internal, "internal error"))
}

// setCORS lets browsers of every origin call: the key is in a header that no page sends by itself, so there is nothing to ride on.
func setCORS(header http.Header) {
	header.Set("Access-Control-Allow-Origin", "*")
	header.Set("Access-Control-Expose-Headers",
		"X-Next-Token, X-Total-Running, Sluice-Incomplete, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, Retry-After")
}

func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Origin") != "" && r.Header.Get("Access-Control-Request-Method") != ""
}

// clip keeps what a stranger sent from filling answers and logs.
func clip(s string) string { return clipTo(s, 128) }

func clipTo(s string, limit int) string {
	if len(s) > limit {
		return strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}
