package api

import (
	"context"
	"slices"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/internal/errs"
)

// ListTemplates implements GET /templates.
func (h *handler) ListTemplates(context.Context, gen.ListTemplatesRequestObject) (gen.ListTemplatesResponseObject, error) {
	templates := h.sandboxes.Templates()
	answer := make(gen.ListTemplates200JSONResponse, 0, len(templates))
	for _, t := range templates {
		names := append([]string{}, t.Aliases...)
		answer = append(answer, gen.Template{
			TemplateID:  t.ID,
			Aliases:     names,
			Names:       names,
			CPUCount:    int32(t.CPUs),
			MemoryMB:    int32(t.MemoryMiB),
			DiskSizeMB:  int32(t.DiskMiB),
			Public:      true,
			BuildStatus: gen.Ready,
			EnvdVersion: envdVersion,
		})
	}
	return answer, nil
}

// DeleteTemplate implements DELETE /templates/{templateID}, which is how SDKs delete a snapshot.
func (h *handler) DeleteTemplate(ctx context.Context, req gen.DeleteTemplateRequestObject) (gen.DeleteTemplateResponseObject, error) {
	if h.hasTemplate(req.TemplateID) {
		return nil, errs.New(errs.Denied, "Template %q belongs to the operator of this server and cannot be deleted", clip(req.TemplateID))
	}
	snapshot, ok := h.newestSnapshot(callOf(ctx).principal.Team, req.TemplateID)
	if !ok {
		return nil, errs.New(errs.NotFound, "Template %q not found", clip(req.TemplateID))
	}
	if err := h.sandboxes.RemoveSnapshot(ctx, snapshot.ID); err != nil {
		return nil, err
	}
	return gen.DeleteTemplate204Response{}, nil
}

// hasTemplate tells whether a create here would find a template by this reference: templates come before snapshots.
func (h *handler) hasTemplate(reference string) bool {
	name := plainName(reference)
	for _, t := range h.sandboxes.Templates() {
		if t.ID == name || slices.Contains(t.Aliases, name) {
			return true
		}
	}
	return false
}
