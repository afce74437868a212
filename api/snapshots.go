package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
)

// CreateSnapshot implements POST /sandboxes/{sandboxID}/snapshots.
func (h *handler) CreateSnapshot(ctx context.Context, req gen.CreateSnapshotRequestObject) (gen.CreateSnapshotResponseObject, error) {
	sb, err := h.visible(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	var name string
	if req.Body != nil {
		name = deref(req.Body.Name)
		if isFalse(req.Body.Memory) { // a copy with memory instead would start what the caller wants started anew
			return nil, errs.New(errs.Invalid, "memory=false is not supported by this server: a snapshot has the memory too")
		}
	}
	if name != "" && h.hasTemplate(name) {
		return nil, errs.New(errs.Invalid, "%q is the name of a template: a create would never find the snapshot by it", clip(name))
	}
	snapshot, err := h.sandboxes.Snapshot(ctx, sb.ID, name)
	if err != nil {
		return nil, unseen(sb.ID, err)
	}
	return gen.CreateSnapshot201JSONResponse(encodeSnapshot(snapshot)), nil
}

func encodeSnapshot(s sandboxd.Snapshot) gen.SnapshotInfo {
	info := gen.SnapshotInfo{SnapshotID: s.ID, Names: []string{}, SandboxID: s.SandboxID, CreatedAt: s.Created.UTC()}
	if s.Name != "" {
		info.Names = append(info.Names, s.Name)
	}
	return info
}

// plainName is a reference as snapshots and templates are compared by: in lower case, without the tag that every name has.
func plainName(reference string) string {
	return strings.TrimSuffix(strings.ToLower(reference), ":default")
}

// newestSnapshot finds a snapshot of this node as a create by the same reference would.
func (h *handler) newestSnapshot(team, reference string) (newest sandboxd.Snapshot, ok bool) {
	name := plainName(reference)
	for _, s := range h.sandboxes.Snapshots() {
		if s.Team != team || s.ID != name && plainName(s.Name) != name {
			continue
		}
		if !ok || s.Created.After(newest.Created) {
			newest, ok = s, true
		}
	}
	return newest, ok
}

// placeOfSnapshot is where it stands in the list of all.
func placeOfSnapshot(info gen.SnapshotInfo) cursor {
	return cursor{at: info.CreatedAt, id: info.SnapshotID}
}

// ListSnapshots implements GET /snapshots.
func (h *handler) ListSnapshots(ctx context.Context, req gen.ListSnapshotsRequestObject) (gen.ListSnapshotsResponseObject, error) {
	limit, name, source := pageSize, plainName(deref(req.Params.Name)), ""
	if req.Params.Limit != nil {
		limit = int(*req.Params.Limit)
	}
	if id := deref(req.Params.SandboxID); id != "" {
		var err error
		if source, err = parseID(id); err != nil {
			return nil, err
		}
	}
	var after *cursor
	if token := deref(req.Params.NextToken); token != "" {
		c, err := parseCursor(token)
		if err != nil || c.asc {
			return nil, errInvalidCursor
		}
		after = &c
	}
	items := []gen.SnapshotInfo{}
	for _, s := range h.sandboxes.Snapshots() {
		if s.Team != callOf(ctx).principal.Team || source != "" && s.SandboxID != source || name != "" && s.ID != name && plainName(s.Name) != name {
			continue
		}
		items = append(items, encodeSnapshot(s))
	}
	page, more := cut(items, placeOfSnapshot, false, after, limit)
	missing, err := h.askAll(ctx, callOf(ctx).uri, func(other answer) error {
		var part []gen.SnapshotInfo
		if err := json.Unmarshal(other.body, &part); err != nil {
			return fmt.Errorf("decode snapshots: %w", err)
		}
		var left bool
		page, left = cut(append(page, part...), placeOfSnapshot, false, after, limit)
		more = more || left || other.header.Get("X-Next-Token") != ""
		return nil
	})
	if err != nil {
		return nil, err
	}
	answer := gen.ListSnapshots200JSONResponse{Body: page, Headers: gen.ListSnapshots200ResponseHeaders{SluiceIncomplete: optional(missing)}}
	if more && len(page) > 0 {
		answer.Headers.XNextToken = new(placeOfSnapshot(page[len(page)-1]).String())
	}
	return answer, nil
}

// locateSnapshot returns the node that has the newest snapshot of the caller's team by this reference, or nil when this node is the one
// to answer, be it with "not found". Whether there is one must not be guessed: where a node that could have it does not answer, nor does this.
func (h *handler) locateSnapshot(ctx context.Context, reference string) (*routing.Node, error) {
	node, err := h.findSnapshot(ctx, reference)
	if node != nil && node.ID == h.cluster.self {
		return nil, err
	}
	return node, err
}

// snapshotFor returns the node that has what a new sandbox shall be made from, when that is a snapshot; nil leaves the choice open.
func (h *handler) snapshotFor(ctx context.Context, body []byte) (*routing.Node, error) {
	var asked struct {
		TemplateID string `json:"templateID"`
	}
	if err := json.Unmarshal(body, &asked); err != nil {
		return nil, nil //nolint:nilerr // what is wrong with it is the operation's to say
	}
	return h.findSnapshot(ctx, asked.TemplateID)
}

func (h *handler) findSnapshot(ctx context.Context, reference string) (*routing.Node, error) {
	if h.hasTemplate(reference) || !isReference(reference) {
		return nil, nil
	}
	team := callOf(ctx).principal.Team
	self := &routing.Node{ID: h.cluster.self}
	newest, found := h.newestSnapshot(team, reference)
	if found && newest.ID == plainName(reference) {
		return self, nil // an id is unique
	}
	release, err := h.lists.acquire(ctx, team)
	if err != nil {
		return nil, err
	}
	defer release()
	var holder *routing.Node
	if found {
		holder = self
	}
	missing, err := h.askAll(ctx, "/snapshots?limit=1&name="+url.QueryEscape(reference), func(other answer) error {
		var part []gen.SnapshotInfo
		if err := json.Unmarshal(other.body, &part); err != nil {
			return fmt.Errorf("decode snapshots: %w", err)
		}
		for _, info := range part {
			if holder == nil || info.CreatedAt.After(newest.Created) {
				holder, newest.Created = other.node, info.CreatedAt
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if holder == nil && missing > 0 {
		return nil, errs.New(errs.Unavailable, "Whether there is a snapshot %q is not known now: %d nodes do not answer", clip(reference), missing)
	}
	return holder, nil
}

// isReference tells whether a template or snapshot can have this name, so that others need not be asked about it.
func isReference(s string) bool {
	return s != "" && len(s) <= 256 && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !slices.Contains([]rune("-_./:"), r)
	})
}
