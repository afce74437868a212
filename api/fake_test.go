package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/getkin/kin-openapi/openapi3filter"
	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
)

// memory is Sandboxes without processes: what it keeps behaves as the manager's do, seen from here.
type memory struct {
	prefix string // of the ids it makes
	max    int

	mu       sync.Mutex
	boxes    map[string]sandboxd.Sandbox
	specs    map[string]sandboxd.CreateSpec
	made     int
	draining bool
	onCreate func(sandboxd.CreateSpec) error // before it is made

	snapshots  []sandboxd.Snapshot
	connects   []sandboxd.ConnectOptions // of every resume
	withMemory bool                      // of the last pause
	onFork     func(copy int) error      // before the copy is made
	logs       map[string]string
}

func newMemory(prefix string) *memory {
	return &memory{prefix: prefix, max: 1000, boxes: make(map[string]sandboxd.Sandbox), specs: make(map[string]sandboxd.CreateSpec),
		logs: make(map[string]string)}
}

func (m *memory) Create(_ context.Context, spec sandboxd.CreateSpec) (sandboxd.Sandbox, error) {
	if err := checkAddresses(spec.Network); err != nil {
		return sandboxd.Sandbox{}, err
	}
	template := "tmpl" + spec.Template
	if spec.Template != "base" && spec.Template != "code-interpreter-v1" {
		snapshot, ok := m.snapshot(spec.Team, spec.Template)
		if !ok {
			return sandboxd.Sandbox{}, errs.New(errs.NotFound, "Template %q not found", spec.Template)
		}
		template = snapshot.Template
	}
	if m.onCreate != nil {
		if err := m.onCreate(spec); err != nil {
			return sandboxd.Sandbox{}, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.boxes) >= m.max {
		return sandboxd.Sandbox{}, errs.New(errs.Exhausted, "this node is full")
	}
	m.made++
	now := time.Now().UTC().Truncate(time.Millisecond)
	sb := sandboxd.Sandbox{
		ID: fmt.Sprintf("%s%05d", m.prefix, m.made), Generation: uint64(m.made), State: sandboxd.StateRunning, Template: template,
		Alias: spec.Template, StartedAt: now, EndAt: now.Add(spec.Timeout), Timeout: spec.Timeout, CPUs: 2, MemoryMiB: 512, DiskMiB: 1024,
		Metadata: spec.Metadata, Network: spec.Network, Team: spec.Team, Nonce: spec.Nonce, TokenHash: spec.TokenHash,
		AutoPause: spec.AutoPause, AutoPauseMemory: spec.AutoPauseMemory, AutoResume: spec.AutoResume,
	}
	m.boxes[sb.ID], m.specs[sb.ID] = sb, spec
	return sb, nil
}

func (m *memory) Get(id string) (sandboxd.Sandbox, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	sb, ok := m.boxes[id]
	if !ok {
		return sb, errs.New(errs.NotFound, "no such sandbox")
	}
	return sb, nil
}

func (m *memory) List() []sandboxd.Sandbox {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.boxes))
}

// edit changes one sandbox that is not in transition.
func (m *memory) edit(id string, change func(*sandboxd.Sandbox) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	sb, ok := m.boxes[id]
	if !ok {
		return errs.New(errs.NotFound, "no such sandbox")
	}
	if sb.State == sandboxd.StatePausing {
		return errs.New(errs.Conflict, "Sandbox %q is being paused", id)
	}
	if err := change(&sb); err != nil {
		return err
	}
	m.boxes[id] = sb
	return nil
}

func (m *memory) Kill(_ context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.boxes[id]; !ok {
		return errs.New(errs.NotFound, "no such sandbox")
	}
	delete(m.boxes, id)
	return nil
}

func (m *memory) SetTimeout(_ context.Context, id string, d time.Duration) error {
	return m.edit(id, func(sb *sandboxd.Sandbox) error {
		sb.EndAt = time.Now().Add(d)
		return nil
	})
}

func (m *memory) Refresh(_ context.Context, id string, d time.Duration) error {
	return m.edit(id, func(sb *sandboxd.Sandbox) error {
		if end := time.Now().Add(d); end.After(sb.EndAt) {
			sb.EndAt = end
		}
		return nil
	})
}

func (m *memory) Connect(ctx context.Context, id string, opts sandboxd.ConnectOptions) (sandboxd.Sandbox, bool, error) {
	resumed := false
	err := m.edit(id, func(sb *sandboxd.Sandbox) error {
		resumed = sb.State == sandboxd.StatePaused
		if resumed {
			m.connects = append(m.connects, opts)
		}
		sb.State = sandboxd.StateRunning
		return nil
	})
	if err == nil {
		err = m.Refresh(ctx, id, opts.Timeout)
	}
	if err != nil {
		return sandboxd.Sandbox{}, false, err
	}
	sb, err := m.Get(id)
	return sb, resumed, err
}

// snapshot is the newest by this id or name.
func (m *memory) snapshot(team, reference string) (found sandboxd.Snapshot, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.snapshots {
		if s.Team == team && (s.ID == plainName(reference) || plainName(s.Name) == plainName(reference)) && !s.Created.Before(found.Created) {
			found, ok = s, true
		}
	}
	return found, ok
}

func (m *memory) Snapshot(_ context.Context, id, name string) (s sandboxd.Snapshot, err error) {
	err = m.edit(id, func(sb *sandboxd.Sandbox) error {
		if sb.State != sandboxd.StateRunning {
			return errs.New(errs.Conflict, "Sandbox %q is paused", id)
		}
		m.made++
		s = sandboxd.Snapshot{ID: fmt.Sprintf("snap%s%05d", m.prefix, m.made), Name: name, Team: sb.Team, SandboxID: id, Template: sb.Template,
			CPUs: sb.CPUs, MemoryMiB: sb.MemoryMiB, DiskMiB: sb.DiskMiB, Created: time.Now().UTC(), Bytes: 1 << 20}
		m.snapshots = append(m.snapshots, s)
		return nil
	})
	return s, err
}

func (m *memory) Snapshots() []sandboxd.Snapshot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.snapshots)
}

func (m *memory) RemoveSnapshot(_ context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	left := slices.DeleteFunc(slices.Clone(m.snapshots), func(s sandboxd.Snapshot) bool { return s.ID == id })
	if len(left) == len(m.snapshots) {
		return errs.New(errs.NotFound, "Snapshot %q not found", id)
	}
	m.snapshots = left
	return nil
}

func (m *memory) Fork(ctx context.Context, id string, specs []sandboxd.ForkSpec) ([]sandboxd.ForkResult, error) {
	sb, err := m.Get(id)
	if err != nil {
		return nil, err
	}
	if sb.State != sandboxd.StateRunning {
		return nil, errs.New(errs.Conflict, "Sandbox %q is paused", id)
	}
	results := make([]sandboxd.ForkResult, len(specs))
	for i, spec := range specs {
		if m.onFork != nil {
			if results[i].Err = m.onFork(i); results[i].Err != nil {
				continue
			}
		}
		results[i].Sandbox, results[i].Err = m.Create(ctx, sandboxd.CreateSpec{
			Template: sb.Alias, Timeout: spec.Timeout, Team: sb.Team, Metadata: sb.Metadata, Network: sb.Network,
			Nonce: spec.Nonce, TokenHash: spec.TokenHash, EnvdToken: spec.EnvdToken,
		})
	}
	return results, nil
}

func (m *memory) Log(_ context.Context, id string, max int64) ([]byte, error) {
	if _, err := m.Get(id); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	text := m.logs[id]
	return []byte(text[len(text)-min(len(text), int(max)):]), nil
}

func (m *memory) UpdateNetwork(_ context.Context, id string, network sandboxd.Network) error {
	if err := checkAddresses(network); err != nil {
		return err
	}
	return m.edit(id, func(sb *sandboxd.Sandbox) error {
		sb.Network.AllowInternetAccess, sb.Network.AllowOut, sb.Network.DenyOut = network.AllowInternetAccess, network.AllowOut, network.DenyOut
		return nil
	})
}

func (m *memory) Pause(_ context.Context, id string, keepMemory bool) error {
	return m.edit(id, func(sb *sandboxd.Sandbox) error {
		if sb.State == sandboxd.StatePaused {
			return errs.New(errs.Conflict, "Sandbox %q is paused", id)
		}
		sb.State, m.withMemory = sandboxd.StatePaused, keepMemory
		return nil
	})
}

func (m *memory) Metrics(_ context.Context, id string) ([]sandboxd.Metrics, error) {
	sb, err := m.Get(id)
	if err != nil {
		return nil, err
	}
	samples := make([]sandboxd.Metrics, 3)
	for i := range samples {
		samples[i] = sandboxd.Metrics{Time: time.Unix(int64(1000+5*i), 0), CPUCount: sb.CPUs, CPUUsedPct: 12.5, MemUsed: 1, MemTotal: 2, DiskUsed: 3, DiskTotal: 4}
	}
	return samples, nil
}

func (m *memory) Templates() []sandboxd.Template {
	return []sandboxd.Template{
		{ID: "tmplbase", Aliases: []string{"base"}, CPUs: 2, MemoryMiB: 512, DiskMiB: 1024},
		{ID: "tmplcode", Aliases: []string{"code-interpreter-v1"}, CPUs: 2, MemoryMiB: 512, DiskMiB: 1024},
	}
}

func (m *memory) Capacity() sandboxd.Capacity {
	m.mu.Lock()
	defer m.mu.Unlock()
	return sandboxd.Capacity{Sandboxes: len(m.boxes), MaxSandboxes: m.max, Machine: "memory", Draining: m.draining}
}

// set puts a sandbox into a state that the API alone does not lead to.
func (m *memory) set(id string, change func(*sandboxd.Sandbox)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	sb := m.boxes[id]
	change(&sb)
	sb.ID = id
	m.boxes[id] = sb
}

func checkAddresses(network sandboxd.Network) error {
	for _, s := range slices.Concat(network.DenyOut, network.AllowOut) {
		_, prefixErr := netip.ParsePrefix(s)
		if _, addrErr := netip.ParseAddr(s); prefixErr != nil && addrErr != nil {
			return errs.New(errs.Invalid, "invalid denied CIDR %s", s)
		}
	}
	return nil
}

// Keys of two teams.
var (
	keyA = "e2b_" + strings.Repeat("a", 40)
	keyB = "e2b_" + strings.Repeat("b", 40)
)

func newKeyring(t *testing.T) *auth.Keyring {
	t.Helper()
	store := auth.NewMemoryKeys()
	for team, key := range map[string]string{"team-a": keyA, "team-b": keyB} {
		hash, ok := auth.HashKey([]byte(key))
		if !ok {
			t.Fatalf("%q is no key", key)
		}
		if err := store.PutKey(t.Context(), auth.KeyRecord{ID: "key-of-" + team, Team: team, Hash: hash, Created: time.Unix(1, 0)}); err != nil {
			t.Fatal(err)
		}
	}
	return auth.NewKeyring(store, auth.KeyringOptions{})
}

// site is one API as a client sees it.
type site struct {
	t       *testing.T
	handler *handler
	boxes   *memory
	metrics *metrics.Set
}

func newSite(t *testing.T, change func(*Options)) *site {
	t.Helper()
	s := &site{t: t, boxes: newMemory("i"), metrics: metrics.NewSet()}
	opts := Options{
		Sandboxes: s.boxes, Keys: newKeyring(t), Tokens: auth.NewTokenKey([]byte(strings.Repeat("k", 32))), Domain: "sluice.localhost:8443",
		Metrics: s.metrics, Log: zap.NewNop(),
	}
	if change != nil {
		change(&opts)
		s.boxes = cmp.Or(asMemory(opts.Sandboxes), s.boxes)
	}
	h, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	s.handler = h.(*handler)
	return s
}

func asMemory(s Sandboxes) *memory { m, _ := s.(*memory); return m }

// reply is an answer, read whole.
type reply struct {
	*http.Response
	body []byte
}

// call makes a request with key A unless header says otherwise, and holds the answer against openapi.yaml and the contract's form
// of errors.
func (s *site) call(method, target, body string, header ...string) reply {
	s.t.Helper()
	var reader io.Reader
	if body != "" {
		reader = io.MultiReader(strings.NewReader(body)) // hides the length: SDKs send chunked
	}
	r := httptest.NewRequestWithContext(s.t.Context(), method, target, reader)
	r.Header.Set("X-API-Key", keyA)
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return s.serve(r)
}

func (s *site) serve(r *http.Request) reply {
	s.t.Helper()
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, r)
	got := reply{Response: w.Result(), body: w.Body.Bytes()}
	s.check(r, got)
	return got
}

func (s *site) check(r *http.Request, got reply) {
	s.t.Helper()
	if got.StatusCode >= 400 {
		var e struct {
			Code    *int
			Message string
		}
		if err := json.Unmarshal(got.body, &e); err != nil || e.Code == nil || *e.Code != got.StatusCode || e.Message == "" {
			s.t.Errorf("%s %s = %d %q, want a body with the code and a message", r.Method, r.URL, got.StatusCode, got.body)
		}
	}
	op := s.handler.operationOf(r)
	if op == nil || r.Method == http.MethodHead {
		return
	}
	input := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: r, Route: op.route},
		Status:                 got.StatusCode,
		Header:                 got.Header,
		Options:                &openapi3filter.Options{IncludeResponseStatus: true},
	}
	input.SetBodyBytes(got.body)
	if err := openapi3filter.ValidateResponse(s.t.Context(), input); err != nil {
		s.t.Errorf("%s %s = %d %q, which openapi.yaml does not allow: %v", r.Method, r.URL, got.StatusCode, got.body, err)
	}
}

// message returns the status and the message of an error.
func (r reply) message() string {
	var e struct{ Message string }
	_ = json.Unmarshal(r.body, &e)
	return fmt.Sprintf("%d %s", r.StatusCode, e.Message)
}

func mustDecode[T any](t *testing.T, r reply) T {
	t.Helper()
	var v T
	decoder := json.NewDecoder(bytes.NewReader(r.body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&v); err != nil {
		t.Fatalf("answer %d %q: %v", r.StatusCode, r.body, err)
	}
	return v
}

// catalogue is Nodes in memory.
type catalogue struct {
	mu     sync.Mutex
	nodes  []routing.Node
	routes map[string]string // sandbox -> node
	err    error
	asked  int
}

func (c *catalogue) Nodes(context.Context) ([]routing.Node, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.nodes), c.err
}

func (c *catalogue) Route(_ context.Context, sandbox string) (routing.Route, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	if c.err != nil {
		return routing.Route{}, c.err
	}
	node, ok := c.routes[sandbox]
	if !ok {
		return routing.Route{}, errs.New(errs.NotFound, "no route")
	}
	return routing.Route{Sandbox: sandbox, Node: node}, nil
}
