package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd"
)

// CreateSandbox implements POST /sandboxes.
func (h *handler) CreateSandbox(ctx context.Context, req gen.CreateSandboxRequestObject) (gen.CreateSandboxResponseObject, error) {
	sb, err := h.create(ctx, req.Body, isTrue(req.Body.Secure), defaultLegacyTimeout)
	if err != nil {
		return nil, err
	}
	return gen.CreateSandbox201JSONResponse{SandboxJSONResponse: gen.SandboxJSONResponse(sb)}, nil
}

// CreateSandboxSecured implements POST /v2/sandboxes.
func (h *handler) CreateSandboxSecured(ctx context.Context, req gen.CreateSandboxSecuredRequestObject) (gen.CreateSandboxSecuredResponseObject, error) {
	sb, err := h.create(ctx, req.Body, true, defaultTimeout)
	if err != nil {
		return nil, err
	}
	return gen.CreateSandboxSecured201JSONResponse{SandboxJSONResponse: gen.SandboxJSONResponse(sb)}, nil
}

func (h *handler) create(ctx context.Context, body *gen.NewSandbox, secured bool, timeout time.Duration) (gen.Sandbox, error) {
	spec, err := h.specOf(body, secured, timeout)
	if err != nil {
		return gen.Sandbox{}, err
	}
	spec.Team = callOf(ctx).principal.Team
	if err := h.checkPaused(spec.Team); err != nil {
		return gen.Sandbox{}, err
	}
	_, release, err := h.admit(ctx, spec.Team, 1)
	if err != nil {
		return gen.Sandbox{}, err
	}
	defer release()
	sb, err := h.sandboxes.Create(ctx, spec)
	if err != nil {
		return gen.Sandbox{}, createFailure(ctx, err)
	}
	return h.encode(sb), nil
}

// specOf checks all that can be known without the node, in the contract's order, and derives the tokens. Lists of addresses and
// the template are the manager's to judge.
func (h *handler) specOf(body *gen.NewSandbox, secured bool, timeout time.Duration) (sandboxd.CreateSpec, error) {
	var none sandboxd.CreateSpec
	if body.Timeout != nil {
		var err error
		if timeout, err = h.checkTimeout(*body.Timeout); err != nil {
			return none, err
		}
	}
	autoResume := body.AutoResume != nil && body.AutoResume.Enabled
	if isFalse(body.AutoPauseMemory) {
		if !isTrue(body.AutoPause) {
			return none, errs.New(errs.Invalid, "autoPauseMemory=false only applies when autoPause is true.")
		}
		if autoResume {
			return none, errs.New(errs.Invalid, "autoPauseMemory=false keeps only the files: a filesystem-only snapshot cannot be auto-resumed by traffic.")
		}
	}
	if err := checkMetadata(body.Metadata); err != nil {
		return none, err
	}
	if err := checkEnv(body.EnvVars); err != nil {
		return none, err
	}
	if err := refuseUnsupported(body); err != nil {
		return none, err
	}
	network, err := networkOf(body, secured)
	if err != nil {
		return none, err
	}
	spec := sandboxd.CreateSpec{
		Template:        body.TemplateID,
		Timeout:         timeout,
		Metadata:        body.Metadata,
		EnvVars:         body.EnvVars,
		Network:         network,
		AutoPause:       isTrue(body.AutoPause),
		AutoPauseMemory: !isFalse(body.AutoPauseMemory),
		AutoResume:      autoResume,
	}
	spec.Nonce, spec.TokenHash, spec.EnvdToken = h.credentials(secured, network.AllowPublicTraffic)
	return spec, nil
}

// credentials are those of a new sandbox: what its tokens are derived from, and what it is told of them.
func (h *handler) credentials(secured, public bool) (nonce sandboxd.Nonce, traffic sandboxd.TokenHash, envd string) {
	if secured {
		nonce = auth.NewNonce()
		envd = h.tokens.Envd(nonce)
	}
	if !public {
		traffic = auth.HashToken([]byte(h.tokens.Traffic(nonce)))
	}
	return nonce, traffic, envd
}

// checkTimeout is for the calls whose timeout must be a time from now.
func (h *handler) checkTimeout(seconds int64) (time.Duration, error) {
	if seconds <= 0 {
		return 0, errs.New(errs.Invalid, "Timeout must be greater than 0")
	}
	if err := h.checkMaxTimeout(seconds); err != nil {
		return 0, err
	}
	return time.Duration(seconds) * time.Second, nil
}

// checkMaxTimeout compares seconds, for a large number of them does not fit a time.Duration.
func (h *handler) checkMaxTimeout(seconds int64) error {
	if seconds <= int64(h.maxTimeout/time.Second) {
		return nil
	}
	return errs.New(errs.Invalid, "Timeout cannot be greater than %s hours", strconv.FormatFloat(h.maxTimeout.Hours(), 'g', 4, 64))
}

// What a sandbox can carry along; openapi.yaml bounds the number of pairs.
const (
	maxMetadataKey = 256
	maxMetadata    = 16 << 10  // as JSON, which is how lists show it: control characters take six bytes there
	maxEnv         = 128 << 10 // as a process gets it; Linux starts none with a longer variable
)

// checkMetadata bounds what every list shows again for as long as the sandbox lives.
func checkMetadata(metadata map[string]string) error {
	for key := range metadata {
		if len(key) > maxMetadataKey {
			return errs.New(errs.Invalid, "validation error: metadata: key %q is longer than %d bytes", clip(key), maxMetadataKey)
		}
	}
	var size countingWriter
	if err := newEncoder(&size).Encode(metadata); err != nil {
		return fmt.Errorf("measure metadata: %w", err)
	}
	if size > maxMetadata {
		return errs.New(errs.Invalid, "validation error: metadata: larger than %d bytes as JSON", maxMetadata)
	}
	return nil
}

// countingWriter only counts.
type countingWriter int

func (c *countingWriter) Write(p []byte) (int, error) {
	*c += countingWriter(len(p))
	return len(p), nil
}

// checkEnv refuses what no process can be given.
func checkEnv(env map[string]string) error {
	size := 0
	for name, value := range env {
		size += len(name) + len("=") + len(value) + len("\x00")
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return errs.New(errs.Invalid, "validation error: envVars: %q is not a name and value that a process can have", clip(name))
		}
	}
	if size > maxEnv {
		return errs.New(errs.Invalid, "validation error: envVars: larger than %d bytes", maxEnv)
	}
	return nil
}

func createFailure(ctx context.Context, err error) error {
	switch code := errs.CodeOf(err); {
	case code == errs.Exhausted:
		return noRoom(errs.Message(err), err)
	case errors.Is(err, context.DeadlineExceeded) || errors.Is(ctx.Err(), context.DeadlineExceeded):
		return placementFailure(ctx, err)
	case code == errs.Unavailable:
		return &failure{status: http.StatusServiceUnavailable, msg: "Failed to place sandbox: " + errs.Message(err),
			errorCode: codeCreateFailed, retryAfter: time.Second, err: err}
	case code == errs.Internal:
		return &failure{status: http.StatusInternalServerError, msg: "Failed to place sandbox: internal error", errorCode: codeCreateFailed, err: err}
	default:
		return err
	}
}

func isTrue(b *bool) bool  { return b != nil && *b }
func isFalse(b *bool) bool { return b != nil && !*b }

// teams counts the creates under way of each team, so that two at once cannot both take the last place.
type teams struct {
	limit int // zero: no limit

	mu      sync.Mutex
	pending map[string]int
	changed chan struct{} // closed and replaced when a create ends
}

func newTeams(limit int) *teams {
	return &teams{limit: limit, pending: make(map[string]int), changed: make(chan struct{})}
}

// admit reserves as many of the team's places as are free, at most want and at least one, until release. The sandboxes of other nodes
// are counted once, before: creates on two nodes in the same instant can exceed the limit by one each, which is cheaper than a lock
// across the cluster.
func (h *handler) admit(ctx context.Context, team string, want int) (granted int, release func(), err error) {
	t := h.teams
	if t.limit <= 0 {
		return want, func() {}, nil
	}
	elsewhere, err := h.runningElsewhere(ctx)
	if err != nil {
		return 0, nil, err
	}
	for {
		t.mu.Lock()
		pending, changed := t.pending[team], t.changed
		if free := t.limit - h.runningHere(team) - elsewhere - pending; free > 0 {
			granted = min(want, free)
			t.pending[team] += granted
			t.mu.Unlock()
			return granted, func() { t.release(team, granted) }, nil
		}
		t.mu.Unlock()
		if pending == 0 {
			return 0, nil, t.full()
		}
		// A create that is just ending may be counted twice, as pending and as running: look again when it has ended.
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, nil, placementFailure(ctx, ctx.Err())
		}
	}
}

func (t *teams) full() error {
	return &failure{status: http.StatusTooManyRequests, retryAfter: 5 * time.Second,
		msg: "you have reached the maximum number of concurrent E2B sandboxes (" + strconv.Itoa(t.limit) + "). Kill some, or ask the operator for more."}
}

func (t *teams) release(team string, places int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pending[team] -= places
	if t.pending[team] == 0 {
		delete(t.pending, team)
	}
	close(t.changed)
	t.changed = make(chan struct{})
}

// checkPaused refuses new sandboxes to a team that keeps too many paused ones: each has its memory and its disk on the node's. No pause is
// refused, for at a deadline that would end the sandbox; so what runs at once can come on top.
func (h *handler) checkPaused(team string) error {
	n := 0
	for _, sb := range h.sandboxes.List() {
		if sb.Team == team && sb.State == sandboxd.StatePaused {
			n++
		}
	}
	if n < h.teamPaused {
		return nil
	}
	return &failure{status: http.StatusTooManyRequests, retryAfter: 5 * time.Second,
		msg: "you have reached the maximum number of paused sandboxes on this node (" + strconv.Itoa(h.teamPaused) + "). Kill some, or ask the operator for more."}
}

func (h *handler) runningHere(team string) int {
	n := 0
	for _, sb := range h.sandboxes.List() {
		if sb.Team == team && isShown(sb) && sb.State != sandboxd.StatePaused {
			n++
		}
	}
	return n
}

// runningElsewhere asks even when another node forwarded the create: the limit must not depend on a header that anybody can send.
func (h *handler) runningElsewhere(ctx context.Context) (int, error) {
	c := *callOf(ctx)
	c.forwarded = false
	total := 0
	_, err := h.askAll(context.WithValue(ctx, callKey{}, &c), "/v2/sandboxes?state=running&limit=1", func(a answer) error {
		if n, err := strconv.Atoi(a.header.Get("X-Total-Running")); err == nil && n > 0 {
			total += n
		}
		return nil
	})
	return total, err
}
