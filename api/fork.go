package api

import (
	"context"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/sandboxd"
)

// ForkSandbox implements POST /sandboxes/{sandboxID}/fork. Each copy succeeds or fails by itself; an error of the whole call means that
// none was tried.
func (h *handler) ForkSandbox(ctx context.Context, req gen.ForkSandboxRequestObject) (gen.ForkSandboxResponseObject, error) {
	sb, err := h.visible(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	count, timeout := 1, defaultLegacyTimeout
	if req.Body != nil && req.Body.Count != nil {
		count = int(*req.Body.Count)
	}
	if req.Body != nil && req.Body.Timeout != nil {
		if timeout, err = h.checkTimeout(*req.Body.Timeout); err != nil {
			return nil, err
		}
	}
	if err := h.checkPaused(sb.Team); err != nil {
		return nil, err
	}
	granted, release, err := h.admit(ctx, sb.Team, count)
	if err != nil {
		return nil, err
	}
	defer release()
	specs := make([]sandboxd.ForkSpec, granted)
	for i := range specs {
		specs[i].Timeout = timeout
		specs[i].Nonce, specs[i].TokenHash, specs[i].EnvdToken = h.credentials(isSecured(sb), sb.Network.AllowPublicTraffic)
	}
	results, err := h.sandboxes.Fork(ctx, sb.ID, specs)
	if err != nil {
		return nil, unseen(sb.ID, err)
	}
	answer := make(gen.ForkSandbox201JSONResponse, 0, count)
	for _, result := range results {
		if result.Err != nil {
			answer = append(answer, h.failedFork(ctx, createFailure(ctx, result.Err)))
			continue
		}
		answer = append(answer, gen.ForkResult{Sandbox: new(h.encode(result.Sandbox))})
	}
	for range count - granted {
		answer = append(answer, h.failedFork(ctx, h.teams.full()))
	}
	return answer, nil
}

func (h *handler) failedFork(ctx context.Context, err error) gen.ForkResult {
	f := failureOf(err)
	h.logFailure(ctx, f, err)
	return gen.ForkResult{Error: new(f.body())}
}
