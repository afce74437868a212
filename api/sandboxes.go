package api

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd"
)

const (
	// maxIDs bounds one request for the metrics of many.
	maxIDs = 100
	// minRefresh is the least that a refresh keeps a sandbox alive.
	minRefresh = 15 * time.Second
	// maxID is far above the 21 characters of our ids, and keeps a stranger's from being looked up.
	maxID = 64
)

// parseID accepts `<id>` and the `<id>-<clientID>` of old SDKs.
func parseID(s string) (string, error) {
	id, suffix, dashed := strings.Cut(s, "-")
	if !isID(id) || dashed && !isID(suffix) {
		return "", errs.New(errs.Invalid, "Invalid sandbox ID %q", clip(s))
	}
	return id, nil
}

func isID(s string) bool {
	if s == "" || len(s) > maxID {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}

// notFound is also what a team hears about a sandbox of another team.
func notFound(id string) error {
	return errs.New(errs.NotFound, "Sandbox %q doesn't exist or you don't have access to it", id)
}

// visible returns the sandbox when it is on this node, belongs to the caller's team, and is neither on its way in nor out.
func (h *handler) visible(ctx context.Context, rawID string) (sandboxd.Sandbox, error) {
	id, err := parseID(rawID)
	if err != nil {
		return sandboxd.Sandbox{}, err
	}
	sb, err := h.sandboxes.Get(id)
	if err != nil {
		return sandboxd.Sandbox{}, unseen(id, err)
	}
	if sb.Team != callOf(ctx).principal.Team || !isShown(sb) {
		return sandboxd.Sandbox{}, notFound(id)
	}
	return sb, nil
}

// unseen words "not found" as the contract does and leaves every other error as it is.
func unseen(id string, err error) error {
	if err != nil && errs.CodeOf(err) == errs.NotFound {
		return notFound(id)
	}
	return err
}

func isShown(sb sandboxd.Sandbox) bool {
	return sb.State != sandboxd.StateCreating && sb.State != sandboxd.StateKilling
}

// shownState is one of the two states that clients know.
func shownState(sb sandboxd.Sandbox) gen.SandboxState {
	if sb.State == sandboxd.StateRunning {
		return gen.Running
	}
	return gen.Paused
}

// isSecured tells whether the sandbox has tokens. Those without have no nonce to derive them from.
func isSecured(sb sandboxd.Sandbox) bool { return sb.Nonce != sandboxd.Nonce{} }

func (h *handler) envdToken(sb sandboxd.Sandbox) *string {
	if !isSecured(sb) {
		return nil
	}
	token := h.tokens.Envd(sb.Nonce)
	return &token
}

func (h *handler) trafficToken(sb sandboxd.Sandbox) *string {
	if sb.Network.AllowPublicTraffic || !isSecured(sb) {
		return nil
	}
	token := h.tokens.Traffic(sb.Nonce)
	return &token
}

func optional[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

func (h *handler) encode(sb sandboxd.Sandbox) gen.Sandbox {
	return gen.Sandbox{
		TemplateID:         sb.Template,
		SandboxID:          sb.ID,
		ClientID:           clientID,
		Alias:              optional(sb.Alias),
		EnvdVersion:        envdVersion,
		EnvdAccessToken:    h.envdToken(sb),
		TrafficAccessToken: h.trafficToken(sb),
		Domain:             optional(h.domain),
	}
}

// GetHealth implements GET /health.
func (h *handler) GetHealth(context.Context, gen.GetHealthRequestObject) (gen.GetHealthResponseObject, error) {
	return gen.GetHealth200TextResponse("ok\n"), nil
}

// GetSandbox implements GET /sandboxes/{sandboxID}.
func (h *handler) GetSandbox(ctx context.Context, req gen.GetSandboxRequestObject) (gen.GetSandboxResponseObject, error) {
	sb, err := h.visible(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	onTimeout := gen.Kill
	if sb.AutoPause {
		onTimeout = gen.Pause
	}
	return gen.GetSandbox200JSONResponse{
		TemplateID:          sb.Template,
		SandboxID:           sb.ID,
		ClientID:            clientID,
		Alias:               optional(sb.Alias),
		StartedAt:           sb.StartedAt.UTC(),
		EndAt:               sb.EndAt.UTC(),
		CPUCount:            int32(sb.CPUs),
		MemoryMB:            int32(sb.MemoryMiB),
		DiskSizeMB:          int32(sb.DiskMiB),
		State:               shownState(sb),
		EnvdVersion:         envdVersion,
		EnvdAccessToken:     h.envdToken(sb),
		AllowInternetAccess: sb.Network.AllowInternetAccess,
		Domain:              optional(h.domain),
		Metadata:            sb.Metadata,
		Network: &gen.SandboxNetwork{
			AllowOut:           sb.Network.AllowOut,
			DenyOut:            sb.Network.DenyOut,
			AllowPublicTraffic: &sb.Network.AllowPublicTraffic,
			MaskRequestHost:    optional(sb.Network.MaskRequestHost),
		},
		Lifecycle: &gen.SandboxLifecycle{AutoResume: sb.AutoResume, OnTimeout: onTimeout},
	}, nil
}

// KillSandbox implements DELETE /sandboxes/{sandboxID}.
func (h *handler) KillSandbox(ctx context.Context, req gen.KillSandboxRequestObject) (gen.KillSandboxResponseObject, error) {
	sb, err := h.visible(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	if err := h.sandboxes.Kill(ctx, sb.ID); err != nil {
		return nil, unseen(sb.ID, err)
	}
	return gen.KillSandbox204Response{}, nil
}

// SetSandboxTimeout implements POST /sandboxes/{sandboxID}/timeout.
func (h *handler) SetSandboxTimeout(ctx context.Context, req gen.SetSandboxTimeoutRequestObject) (gen.SetSandboxTimeoutResponseObject, error) {
	sb, err := h.visible(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	timeout := min(max(0, req.Body.Timeout), int64(h.maxTimeout/time.Second)) // before it is multiplied, which may overflow
	if err := h.sandboxes.SetTimeout(ctx, sb.ID, time.Duration(timeout)*time.Second); err != nil {
		return nil, unseen(sb.ID, err)
	}
	return gen.SetSandboxTimeout204Response{}, nil
}

// RefreshSandbox implements POST /sandboxes/{sandboxID}/refreshes.
func (h *handler) RefreshSandbox(ctx context.Context, req gen.RefreshSandboxRequestObject) (gen.RefreshSandboxResponseObject, error) {
	sb, err := h.visible(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	duration := minRefresh
	if req.Body != nil && req.Body.Duration != nil {
		duration = max(minRefresh, time.Duration(*req.Body.Duration)*time.Second)
	}
	if err := h.sandboxes.Refresh(ctx, sb.ID, duration); err != nil {
		return nil, unseen(sb.ID, err)
	}
	return gen.RefreshSandbox204Response{}, nil
}

// PauseSandbox implements POST /sandboxes/{sandboxID}/pause.
func (h *handler) PauseSandbox(ctx context.Context, req gen.PauseSandboxRequestObject) (gen.PauseSandboxResponseObject, error) {
	sb, err := h.visible(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	if req.Body != nil && isTrue(req.Body.RequireHealthyGuest) {
		return nil, notSupported("requireHealthyGuest")
	}
	if sb.State == sandboxd.StatePaused {
		return nil, alreadyPaused(sb.ID)
	}
	keepMemory := req.Body == nil || !isFalse(req.Body.Memory)
	err = h.sandboxes.Pause(ctx, sb.ID, keepMemory)
	if errs.CodeOf(err) == errs.Conflict {
		if now, getErr := h.sandboxes.Get(sb.ID); getErr == nil && now.State == sandboxd.StatePaused {
			return nil, alreadyPaused(sb.ID) // somebody else was faster
		}
	}
	if err != nil {
		return nil, unseen(sb.ID, err)
	}
	return gen.PauseSandbox204Response{}, nil
}

// alreadyPaused is what SDKs take a 409 on pause for.
func alreadyPaused(id string) error {
	return errs.New(errs.Conflict, "Error pausing sandbox - sandbox '%s' is already paused", id)
}

// ResumeSandbox implements POST /sandboxes/{sandboxID}/resume.
func (h *handler) ResumeSandbox(ctx context.Context, req gen.ResumeSandboxRequestObject) (gen.ResumeSandboxResponseObject, error) {
	sb, err := h.visible(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	if sb.State == sandboxd.StateRunning {
		return nil, errs.New(errs.Conflict, "Sandbox %q is already running", sb.ID)
	}
	sb, _, err = h.connect(ctx, sb.ID, deref(req.Body), defaultLegacyTimeout)
	if err != nil {
		return nil, err
	}
	return gen.ResumeSandbox201JSONResponse{SandboxJSONResponse: gen.SandboxJSONResponse(h.encode(sb))}, nil
}

// ConnectSandbox implements POST /sandboxes/{sandboxID}/connect.
func (h *handler) ConnectSandbox(ctx context.Context, req gen.ConnectSandboxRequestObject) (gen.ConnectSandboxResponseObject, error) {
	sb, resumed, err := h.connect(ctx, req.SandboxID, gen.ConnectOptions{Timeout: &req.Body.Timeout, Memory: req.Body.Memory}, 0)
	if err != nil {
		return nil, err
	}
	if resumed {
		return gen.ConnectSandbox201JSONResponse(h.encode(sb)), nil
	}
	return gen.ConnectSandbox200JSONResponse{SandboxJSONResponse: gen.SandboxJSONResponse(h.encode(sb))}, nil
}

// ConnectSandboxOptional implements POST /v2/sandboxes/{sandboxID}/connect.
func (h *handler) ConnectSandboxOptional(ctx context.Context, req gen.ConnectSandboxOptionalRequestObject) (gen.ConnectSandboxOptionalResponseObject, error) {
	sb, resumed, err := h.connect(ctx, req.SandboxID, deref(req.Body), defaultTimeout)
	if err != nil {
		return nil, err
	}
	if resumed {
		return gen.ConnectSandboxOptional201JSONResponse(h.encode(sb)), nil
	}
	return gen.ConnectSandboxOptional200JSONResponse{SandboxJSONResponse: gen.SandboxJSONResponse(h.encode(sb))}, nil
}

// connect resumes the sandbox if it is paused; a running one is only ever kept longer. A resumed one counts as running again, so it needs
// one of its team's places.
func (h *handler) connect(ctx context.Context, rawID string, asked gen.ConnectOptions, unasked time.Duration) (sandboxd.Sandbox, bool, error) {
	sb, err := h.visible(ctx, rawID)
	if err != nil {
		return sb, false, err
	}
	opts := sandboxd.ConnectOptions{Timeout: unasked, EnvdToken: deref(h.envdToken(sb)), DropMemory: isFalse(asked.Memory)}
	if asked.Timeout != nil {
		if err := h.checkMaxTimeout(*asked.Timeout); err != nil {
			return sb, false, err
		}
		opts.Timeout = max(time.Second, time.Duration(*asked.Timeout)*time.Second) // 0 asks for no more time, which is no mistake here
	}
	if sb.State == sandboxd.StatePaused {
		_, release, err := h.admit(ctx, sb.Team, 1)
		if err != nil {
			return sb, false, err
		}
		defer release()
	}
	connected, resumed, err := h.sandboxes.Connect(ctx, sb.ID, opts)
	return connected, resumed, unseen(sb.ID, err)
}

// UpdateSandboxNetwork implements PUT /sandboxes/{sandboxID}/network.
func (h *handler) UpdateSandboxNetwork(ctx context.Context, req gen.UpdateSandboxNetworkRequestObject) (gen.UpdateSandboxNetworkResponseObject, error) {
	sb, err := h.visible(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	if err := refuseUnsupportedEgress(req.Body.EgressProxy, req.Body.Rules); err != nil {
		return nil, err
	}
	network := sandboxd.Network{
		AllowInternetAccess: req.Body.AllowInternetAccess,
		AllowOut:            req.Body.AllowOut,
		DenyOut:             req.Body.DenyOut,
	}
	if err := h.sandboxes.UpdateNetwork(ctx, sb.ID, network); err != nil {
		return nil, unseen(sb.ID, err)
	}
	return gen.UpdateSandboxNetwork204Response{}, nil
}

// GetSandboxMetrics implements GET /sandboxes/{sandboxID}/metrics.
func (h *handler) GetSandboxMetrics(ctx context.Context, req gen.GetSandboxMetricsRequestObject) (gen.GetSandboxMetricsResponseObject, error) {
	sb, err := h.visible(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	if start, end := req.Params.Start, req.Params.End; start != nil && end != nil && *start > *end {
		return nil, errs.New(errs.Invalid, "validation error: start is after end")
	}
	samples, err := h.sandboxes.Metrics(ctx, sb.ID)
	if err != nil {
		return nil, unseen(sb.ID, err)
	}
	answer := make(gen.GetSandboxMetrics200JSONResponse, 0, len(samples))
	for _, sample := range samples {
		at := sample.Time.Unix()
		if req.Params.Start != nil && at < *req.Params.Start || req.Params.End != nil && at > *req.Params.End {
			continue
		}
		answer = append(answer, encodeMetric(sample))
	}
	return answer, nil
}

func encodeMetric(m sandboxd.Metrics) gen.SandboxMetric {
	return gen.SandboxMetric{
		Timestamp:     m.Time.UTC(),
		TimestampUnix: m.Time.Unix(),
		CPUCount:      int32(m.CPUCount),
		CPUUsedPct:    m.CPUUsedPct,
		MemUsed:       int64(m.MemUsed),
		MemTotal:      int64(m.MemTotal),
		MemCache:      int64(m.MemCache),
		DiskUsed:      int64(m.DiskUsed),
		DiskTotal:     int64(m.DiskTotal),
	}
}

// GetSandboxesMetrics implements GET /sandboxes/metrics.
func (h *handler) GetSandboxesMetrics(ctx context.Context, req gen.GetSandboxesMetricsRequestObject) (gen.GetSandboxesMetricsResponseObject, error) {
	raw := strings.Split(req.Params.SandboxIds, ",")
	if len(raw) > maxIDs {
		return nil, errs.New(errs.Invalid, "validation error: at most %d sandbox_ids", maxIDs)
	}
	metrics := gen.GetSandboxesMetrics200JSONResponse{Sandboxes: make(map[string]gen.SandboxMetric)}
	elsewhere := false
	for _, rawID := range raw {
		if _, err := parseID(rawID); err != nil {
			return nil, err
		}
		sb, err := h.visible(ctx, rawID)
		if err != nil {
			elsewhere = true
			continue
		}
		samples, err := h.sandboxes.Metrics(ctx, sb.ID)
		if err != nil || len(samples) == 0 {
			continue // it has just begun or is just ending: there is nothing to tell about it
		}
		metrics.Sandboxes[sb.ID] = encodeMetric(samples[len(samples)-1])
	}
	if !elsewhere {
		return metrics, nil
	}
	_, err := h.askAll(ctx, callOf(ctx).uri, func(other answer) error {
		var part gen.GetSandboxesMetrics200JSONResponse
		if err := json.Unmarshal(other.body, &part); err != nil {
			return fmt.Errorf("decode metrics: %w", err)
		}
		maps.Copy(metrics.Sandboxes, part.Sandboxes)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return metrics, nil
}
