package api

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd"
)

const (
	// pageSize is the length of a page when the client does not say; openapi.yaml has the most that it may ask for.
	pageSize = 100
	// legacyPageSize bounds the list that has no pages. Its clients take it for the whole, so it is far above what they have running.
	legacyPageSize = 1000
)

// query is what a list is asked for. Every node applies it to its own sandboxes; because a cursor is a place in the one order of
// all sandboxes, the pages of several nodes merge into a page of the whole.
type query struct {
	team            string
	metadata        map[string]string
	running, paused bool
	startedAfter    time.Time // zero: whenever
	template        string    // empty: any
	asc             bool
	after           *cursor // nil: from the beginning
	limit           int
}

// matches leaves states aside, for X-Total-Running counts whatever states were asked for.
func (q *query) matches(sb sandboxd.Sandbox) bool {
	if sb.Team != q.team || !isShown(sb) || !sb.StartedAt.After(q.startedAfter) {
		return false
	}
	if q.template != "" && q.template != sb.Template && q.template != sb.Alias {
		return false
	}
	for key, value := range q.metadata {
		if got, ok := sb.Metadata[key]; !ok || got != value {
			return false
		}
	}
	return true
}

// page cuts out of items what follows the cursor and fits the limit.
func (q *query) page(items []gen.ListedSandbox) (page []gen.ListedSandbox, more bool) {
	return cut(items, cursorOf, q.asc, q.after, q.limit)
}

// cut sorts items by their place in the order of all, and keeps those after the cursor, if there is one, up to the limit.
func cut[T any](items []T, place func(T) cursor, asc bool, after *cursor, limit int) (page []T, more bool) {
	compare := func(a, b cursor) int {
		order := cmp.Or(a.at.Compare(b.at), cmp.Compare(a.id, b.id))
		if asc {
			return order
		}
		return -order
	}
	slices.SortFunc(items, func(a, b T) int { return compare(place(a), place(b)) })
	if after != nil {
		items = slices.DeleteFunc(items, func(item T) bool { return compare(place(item), *after) <= 0 })
	}
	if len(items) > limit {
		return slices.Clip(items[:limit]), true
	}
	return items, false
}

// local applies q to the sandboxes of this node.
func (h *handler) local(q *query) (page []gen.ListedSandbox, more bool, totalRunning int) {
	items := []gen.ListedSandbox{}
	for _, sb := range h.sandboxes.List() {
		if !q.matches(sb) {
			continue
		}
		state := shownState(sb)
		if state == gen.Running {
			totalRunning++
		}
		if state == gen.Running && !q.running || state == gen.Paused && !q.paused {
			continue
		}
		items = append(items, gen.ListedSandbox{
			TemplateID:  sb.Template,
			SandboxID:   sb.ID,
			ClientID:    clientID,
			Alias:       optional(sb.Alias),
			StartedAt:   sb.StartedAt.UTC(),
			EndAt:       sb.EndAt.UTC(),
			CPUCount:    int32(sb.CPUs),
			MemoryMB:    int32(sb.MemoryMiB),
			DiskSizeMB:  int32(sb.DiskMiB),
			Metadata:    sb.Metadata,
			State:       state,
			EnvdVersion: envdVersion,
		})
	}
	page, more = q.page(items)
	return page, more, totalRunning
}

// listed is a page of the whole cluster. It is the answer to both lists, in place of the generated ones: those would hold the
// page once more, as JSON, for as long as the client does not read.
type listed struct {
	items        []gen.ListedSandbox
	next         string // empty on the last page
	totalRunning int
	missing      int // nodes that did not answer
}

func (h *handler) list(ctx context.Context, q *query) (*listed, error) {
	page, more, total := h.local(q)
	missing, err := h.askAll(ctx, callOf(ctx).uri, func(other answer) error {
		var part []gen.ListedSandbox
		if err := json.Unmarshal(other.body, &part); err != nil {
			return fmt.Errorf("decode list: %w", err)
		}
		var cut bool
		page, cut = q.page(append(page, part...))
		more = more || cut || other.header.Get("X-Next-Token") != ""
		if n, err := strconv.Atoi(other.header.Get("X-Total-Running")); err == nil {
			total += n
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err) // nobody is there to read it
	}
	l := &listed{items: page, totalRunning: total, missing: missing}
	if more && len(page) > 0 {
		last := cursorOf(page[len(page)-1])
		last.asc = q.asc
		l.next = last.String()
	}
	return l, nil
}

// VisitListSandboxesResponse implements gen.ListSandboxesResponseObject.
func (l *listed) VisitListSandboxesResponse(w http.ResponseWriter) error { return l.write(w) }

// VisitListSandboxesPagedResponse implements gen.ListSandboxesPagedResponseObject.
func (l *listed) VisitListSandboxesPagedResponse(w http.ResponseWriter) error { return l.write(w) }

// write sends one sandbox at a time. A client that went away, or does not read until the server's deadline, gets a reset.
func (l *listed) write(w http.ResponseWriter) error {
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("X-Total-Running", strconv.Itoa(l.totalRunning))
	if l.next != "" {
		header.Set("X-Next-Token", l.next)
	}
	if l.missing > 0 {
		header.Set("Sluice-Incomplete", strconv.Itoa(l.missing))
	}
	w.WriteHeader(http.StatusOK)
	if err := encodeItems(w, l.items); err != nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}

// encodeItems holds no more than one item as JSON.
func encodeItems(w io.Writer, items []gen.ListedSandbox) error {
	if _, err := io.WriteString(w, "["); err != nil {
		return err
	}
	encoder := newEncoder(w)
	for i := range items {
		if i > 0 {
			if _, err := io.WriteString(w, ","); err != nil {
				return err
			}
		}
		if err := encoder.Encode(&items[i]); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, "]\n")
	return err
}

// newEncoder writes JSON for programs, in which `<` may stay what it is.
func newEncoder(w io.Writer) *json.Encoder {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	return encoder
}

// ListSandboxes implements GET /sandboxes.
func (h *handler) ListSandboxes(ctx context.Context, req gen.ListSandboxesRequestObject) (gen.ListSandboxesResponseObject, error) {
	metadata, err := parseMetadata(deref(req.Params.Metadata))
	if err != nil {
		return nil, err
	}
	return h.list(ctx, &query{team: callOf(ctx).principal.Team, metadata: metadata, running: true, limit: legacyPageSize})
}

// ListSandboxesPaged implements GET /v2/sandboxes.
func (h *handler) ListSandboxesPaged(ctx context.Context, req gen.ListSandboxesPagedRequestObject) (gen.ListSandboxesPagedResponseObject, error) {
	q, err := parseQuery(req.Params)
	if err != nil {
		return nil, err
	}
	q.team = callOf(ctx).principal.Team
	return h.list(ctx, q)
}

func parseQuery(params gen.ListSandboxesPagedParams) (*query, error) {
	q := &query{limit: pageSize, template: deref(params.Template), startedAfter: deref(params.StartedAfter)}
	if params.Limit != nil {
		q.limit = int(*params.Limit)
	}
	var err error
	if q.metadata, err = parseMetadata(deref(params.Metadata)); err != nil {
		return nil, err
	}
	if q.running, q.paused, err = parseStates(deref(params.State)); err != nil {
		return nil, err
	}
	q.asc = params.Order != nil && *params.Order == gen.Asc
	if token := deref(params.NextToken); token != "" {
		after, err := parseCursor(token)
		if err != nil {
			return nil, err
		}
		if params.Order != nil && after.asc != q.asc {
			return nil, errInvalidCursor // it belongs to a list in the other direction
		}
		q.after, q.asc = &after, after.asc
	}
	return q, nil
}

func deref[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}

func parseStates(s string) (running, paused bool, err error) {
	if s == "" {
		return true, true, nil
	}
	for state := range strings.SplitSeq(s, ",") {
		switch gen.SandboxState(state) {
		case gen.Running:
			running = true
		case gen.Paused:
			paused = true
		default:
			return false, false, errs.New(errs.Invalid, "validation error: state %q is neither running nor paused", clip(state))
		}
	}
	return running, paused, nil
}

// parseMetadata takes off the layers that SDKs put on, after the query's own: the whole once, then every key and value.
func parseMetadata(s string) (map[string]string, error) {
	if s == "" {
		return nil, nil
	}
	whole, err := url.QueryUnescape(s)
	if err != nil {
		return nil, invalidMetadata(err)
	}
	metadata := make(map[string]string)
	for pair := range strings.SplitSeq(whole, "&") {
		if pair == "" {
			continue
		}
		rawKey, rawValue, _ := strings.Cut(pair, "=")
		key, err := url.QueryUnescape(rawKey)
		if err != nil {
			return nil, invalidMetadata(err)
		}
		value, err := url.QueryUnescape(rawValue)
		if err != nil {
			return nil, invalidMetadata(err)
		}
		if earlier, ok := metadata[key]; ok && earlier != value {
			return nil, errs.New(errs.Invalid, "Invalid metadata filter: %q has two values, which no sandbox can have", clip(key))
		}
		metadata[key] = value
	}
	return metadata, nil
}

func invalidMetadata(err error) error {
	return errs.New(errs.Invalid, "Invalid metadata filter: %s", clip(err.Error()))
}

// cursor is a place in the order of sandboxes: that of the last one on a page.
type cursor struct {
	at  time.Time
	id  string
	asc bool
}

var errInvalidCursor = errs.New(errs.Invalid, "Invalid next token")

func cursorOf(item gen.ListedSandbox) cursor { return cursor{at: item.StartedAt, id: item.SandboxID} }

// String is the X-Next-Token.
func (c cursor) String() string {
	text := c.at.UTC().Format(time.RFC3339Nano) + "__" + c.id
	if c.asc {
		text += "__asc"
	}
	return base64.URLEncoding.EncodeToString([]byte(text))
}

// parseCursor accepts only what String writes, with or without its padding.
func parseCursor(token string) (cursor, error) {
	text, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(token, "="))
	if err != nil {
		return cursor{}, errInvalidCursor
	}
	parts := strings.Split(string(text), "__")
	if len(parts) != 2 && (len(parts) != 3 || parts[2] != "asc") || !isID(parts[1]) {
		return cursor{}, errInvalidCursor
	}
	at, err := time.Parse(time.RFC3339Nano, parts[0])
	if err != nil {
		return cursor{}, errInvalidCursor
	}
	c := cursor{at: at.UTC(), id: parts[1], asc: len(parts) == 3}
	if strings.TrimRight(c.String(), "=") != strings.TrimRight(token, "=") {
		return cursor{}, errInvalidCursor
	}
	return c, nil
}
