package sandboxd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/internal/tree"
)

const (
	snapshotVersion = 1
	snapshotFile    = "snapshot.json"
	snapshotRoot    = "root" // what the machine wrote
	snapshotNew     = ".new-"
	// sweepInterval is how often the removal of a snapshot's files that failed is tried again.
	sweepInterval = 30 * time.Second
)

// Snapshot copies a running sandbox, memory and disk, while it stands still for a moment. Sandboxes can be made from the copy as from a
// template, by its ID or, if it has one, by its name; of several with the same name the newest counts. It goes on when ctx ends first.
func (m *Manager) Snapshot(ctx context.Context, id, name string) (Snapshot, error) {
	name, err := m.snapshotName(name)
	if err != nil {
		return Snapshot{}, err
	}
	l, end, err := m.begin(ctx, id)
	if err != nil {
		return Snapshot{}, err
	}
	s, ok := m.machine.(Suspender)
	if !ok {
		end()
		return Snapshot{}, m.cannotSave(id, "snapshotted", "")
	}
	taken := make(chan snapshotTaken, 1)
	go m.snapshotAsked(s, l, name, end, taken)
	select {
	case t := <-taken:
		return t.snapshot, t.err
	case <-ctx.Done():
		return Snapshot{}, &errs.Error{Code: errs.Unavailable, Msg: "the snapshot is still being taken", Err: ctx.Err()}
	}
}

type snapshotTaken struct {
	snapshot Snapshot
	err      error
}

// snapshotAsked has the turn, which end gives back.
func (m *Manager) snapshotAsked(s Suspender, l *life, name string, end func(), taken chan<- snapshotTaken) {
	r, err := m.snapshot(s, l, snapshotRecord{Snapshot: Snapshot{Name: name}})
	end()
	taken <- snapshotTaken{r.Snapshot, err}
}

// snapshotName judges a name, which may not hide a template's: whoever asks for that would get something else.
func (m *Manager) snapshotName(asked string) (string, error) {
	if asked == "" {
		return "", nil
	}
	name, tag, err := parseTemplate(asked)
	if err != nil {
		return "", err
	}
	if tag != "default" {
		return "", errs.New(errs.Invalid, "a snapshot's name has no tag: %q", clip(asked))
	}
	if isSnapshotID(name) { // whoever deletes that snapshot would delete this one
		return "", errs.New(errs.Invalid, "the name %q has the form of a snapshot's ID", name)
	}
	if _, _, err := m.findTemplate(name); err == nil {
		return "", errs.New(errs.Conflict, "the name %q belongs to a template", name)
	}
	return name, nil
}

// snapshot takes a snapshot, of which the caller says what it is for. The caller holds the turn of a running sandbox.
func (m *Manager) snapshot(s Suspender, l *life, r snapshotRecord) (snapshotRecord, error) {
	done, err := m.queue(l.ctx, m.saving, m.record(l).Sandbox.Team, "saved")
	if err != nil {
		return r, err
	}
	defer done()
	began := time.Now()
	rec := m.record(l)
	if !r.Removed { // else it is that of a fork, and gone with it
		giveBack, err := m.snapshots.reserve(rec.Sandbox.Team, m.opts.TeamSnapshots)
		if err != nil {
			return r, err
		}
		defer giveBack()
	}
	r.User, r.Workdir = rec.User, rec.Workdir
	r.Snapshot = Snapshot{
		ID:        newSnapshotID(),
		Name:      r.Name,
		Team:      rec.Sandbox.Team,
		SandboxID: l.id,
		Template:  rec.Sandbox.Template,
		CPUs:      rec.Sandbox.CPUs,
		MemoryMiB: rec.Sandbox.MemoryMiB,
		DiskMiB:   rec.Sandbox.DiskMiB,
		Created:   now(),
	}
	if err := m.copySandbox(s, l, rec, &r); err != nil {
		m.stats.snapshotFailed.Inc()
		if l.ctx.Err() != nil {
			return r, inTransition(l.id, StateKilling)
		}
		l.log.Warn("snapshot not taken", zap.Error(err))
		return r, saveError(err, "no snapshot of Sandbox %q was taken", l.id)
	}
	m.stats.snapshots.Inc()
	l.log.Info("snapshot taken", zap.String("snapshot", r.ID), zap.Int64("bytes", r.Bytes), zap.Duration("took", time.Since(began)))
	return r, nil
}

// copySandbox takes the steps of a snapshot in their order. The directory gets its name when all of it is there, so a crash leaves a whole
// one or one that the next start removes. While the guest may stand still the record says so: after a crash it is let go on.
func (m *Manager) copySandbox(s Suspender, l *life, rec record, r *snapshotRecord) error {
	reached := m.reporter(m.stats.snapshotPhase)
	dir, err := m.snapshots.begin(r.ID)
	if err != nil {
		return err
	}
	defer m.snapshots.abandon(dir) // nothing is left there of one that has its name
	standing := rec
	standing.Standing = true
	if err := m.journal.update(standing); err != nil {
		return err
	}
	reached(StepStanding)
	ctx, cancel := context.WithTimeout(l.ctx, suspendTime)
	defer cancel()
	copyErr := s.Snapshot(ctx, l.place, l.instance, filepath.Join(dir, snapshotRoot))
	if err := m.journal.update(rec); err != nil {
		m.owe(l)
	}
	if copyErr != nil {
		return fmt.Errorf("copy sandbox: %w", copyErr)
	}
	reached(StepCopied)
	if err := m.snapshots.finish(dir, r); err != nil {
		return err
	}
	reached(StepNamed)
	return nil
}

// Snapshots lists what sandboxes have been copied into, in no order.
func (m *Manager) Snapshots() []Snapshot { return m.snapshots.list() }

// RemoveSnapshot forgets a snapshot. Sandboxes that were made from it go on; its files stay until the creates that have found it are done.
func (m *Manager) RemoveSnapshot(ctx context.Context, id string) error {
	leave, err := m.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if err := m.snapshots.remove(id); err != nil {
		return err
	}
	m.log.Info("snapshot removed", zap.String("snapshot", id))
	return m.snapshots.sweep()
}

// endUse ends the use of a snapshot, which may have kept the files of one that is removed; "" is none.
func (m *Manager) endUse(id string) {
	if !m.snapshots.release(id) {
		return
	}
	if err := m.snapshots.sweep(); err != nil {
		m.stats.removeFailed.Inc()
		m.log.Warn("files of a removed snapshot are still there, will be tried again", zap.Error(err))
	}
}

// keepSnapshots removes the files of removed snapshots that could not be removed at once.
func (m *Manager) keepSnapshots(ctx context.Context) error {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		if err := m.snapshots.sweep(); err != nil {
			m.stats.removeFailed.Inc()
			m.log.Warn("files of removed snapshots are still there", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// snapshotRecord is what is on disk beside the machine's files.
type snapshotRecord struct {
	Version int `json:"version"`
	Snapshot
	User    string `json:"user"`
	Workdir string `json:"workdir,omitempty"`
	Removed bool   `json:"removed,omitempty"` // no create finds it; its files stay until those that have found it are done
}

func (r snapshotRecord) origin(s *snapshots, alias string) origin {
	return origin{alias: alias, snapshot: r.ID, Template: Template{
		ID: r.ID, Root: s.root(r.ID), CPUs: r.CPUs, MemoryMiB: r.MemoryMiB, DiskMiB: r.DiskMiB, User: r.User, Workdir: r.Workdir,
	}}
}

// snapshots keeps one directory per snapshot. The description in it is written last, and makes it one.
type snapshots struct {
	dir      string
	sweeping sync.Mutex // held over the removal of files

	mu      sync.Mutex // guards the fields below
	known   map[string]*snapshotEntry
	pending map[string]int // by team: being taken
}

type snapshotEntry struct {
	snapshotRecord
	users int // creates and forks that are under way
}

func newSnapshots(dir string) *snapshots {
	return &snapshots{dir: dir, known: make(map[string]*snapshotEntry), pending: make(map[string]int)}
}

func (s *snapshots) root(id string) string { return filepath.Join(s.dir, id, snapshotRoot) }

// load reads what is there and removes what a crash left half made.
func (s *snapshots) load(log *zap.Logger) error {
	if err := os.MkdirAll(s.dir, 0o711); err != nil {
		return fmt.Errorf("make directory of snapshots: %w", err)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		if strings.HasPrefix(e.Name(), snapshotNew) {
			log.Warn("snapshot that was never finished removed", zap.String("snapshot", strings.TrimPrefix(e.Name(), snapshotNew)))
			if err := tree.Remove(path); err != nil {
				return fmt.Errorf("remove half a snapshot: %w", err)
			}
			continue
		}
		record, err := readSnapshot(path)
		if errors.Is(err, errNewerRecord) {
			return err
		}
		if err != nil { // it was whole once, so it is not ours to throw away
			log.Error("snapshot not readable, ignored", zap.String("snapshot", e.Name()), zap.Error(err))
			continue
		}
		s.known[record.ID] = &snapshotEntry{snapshotRecord: record}
	}
	return nil
}

func readSnapshot(dir string) (snapshotRecord, error) {
	text, err := os.ReadFile(filepath.Join(dir, snapshotFile))
	if err != nil {
		return snapshotRecord{}, fmt.Errorf("read snapshot: %w", err)
	}
	var r snapshotRecord
	if err := json.Unmarshal(text, &r); err != nil {
		return snapshotRecord{}, fmt.Errorf("decode snapshot %q: %w", filepath.Base(dir), err)
	}
	if r.Version > snapshotVersion {
		return snapshotRecord{}, fmt.Errorf("%w: snapshot %q has version %d, known is %d", errNewerRecord, filepath.Base(dir), r.Version, snapshotVersion)
	}
	if r.Version < 1 || r.ID != filepath.Base(dir) {
		return snapshotRecord{}, fmt.Errorf("description of snapshot %q is not one of ours", filepath.Base(dir))
	}
	return r, nil
}

// reserve takes one of a team's places for a snapshot that is about to be taken, until giveBack: by then it is known, or was not taken.
func (s *snapshots) reserve(team string, most int) (giveBack func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pending[team]
	for _, e := range s.known {
		if e.Team == team && !e.Removed {
			n++
		}
	}
	if n >= most {
		return nil, errs.New(errs.Exhausted, "you have reached the maximum number of snapshots on this node (%d). Delete some, or ask the operator for more.", most)
	}
	s.pending[team]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.pending[team]--; s.pending[team] == 0 {
			delete(s.pending, team)
		}
	}, nil
}

// begin makes the directory of a new snapshot, with an empty root.
func (s *snapshots) begin(id string) (dir string, err error) {
	dir = filepath.Join(s.dir, snapshotNew+id)
	if err := os.MkdirAll(filepath.Join(dir, snapshotRoot), 0o711); err != nil {
		return "", fmt.Errorf("make directory of snapshot: %w", err)
	}
	return dir, nil
}

// abandon removes what begin made and finish did not take; what stays after a failure is removed by the next start.
func (s *snapshots) abandon(dir string) { _ = tree.Remove(dir) }

// finish gives a snapshot its description and its name. One that no create shall find is in use by the caller, who calls release.
func (s *snapshots) finish(dir string, r *snapshotRecord) error {
	bytes, err := diskUsage(dir)
	if err != nil {
		return fmt.Errorf("measure snapshot: %w", err)
	}
	r.Bytes = bytes
	if err := s.describe(dir, *r); err != nil {
		return err
	}
	if err := os.Rename(dir, filepath.Join(s.dir, r.ID)); err != nil {
		return fmt.Errorf("name snapshot: %w", err)
	}
	if err := syncDir(s.dir); err != nil {
		return errors.Join(err, os.Rename(filepath.Join(s.dir, r.ID), dir))
	}
	e := &snapshotEntry{snapshotRecord: *r}
	if r.Removed {
		e.users = 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known[r.ID] = e
	return nil
}

// describe writes the description, at once or not at all.
func (s *snapshots) describe(dir string, r snapshotRecord) error {
	r.Version = snapshotVersion
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return fmt.Errorf("encode snapshot: %w", err)
	}
	temp := filepath.Join(dir, snapshotFile+".new")
	if err := writeSynced(temp, text); err != nil {
		return errors.Join(err, ignoreAbsent(os.Remove(temp)))
	}
	if err := os.Rename(temp, filepath.Join(dir, snapshotFile)); err != nil {
		return fmt.Errorf("replace description of snapshot: %w", err)
	}
	return syncDir(dir)
}

// use finds a snapshot of a team by its ID or its name, and keeps its files until release.
func (s *snapshots) use(reference, team string) (from origin, ok bool) {
	name, tag, err := parseTemplate(reference)
	if err != nil || tag != "default" {
		return origin{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var found *snapshotEntry
	for _, e := range s.known {
		if e.Removed || e.Team != team || e.ID != name && e.Name != name {
			continue
		}
		if found == nil || e.Created.After(found.Created) {
			found = e
		}
	}
	if found == nil {
		return origin{}, false
	}
	found.users++
	return found.origin(s, name), true
}

// release ends a use. last tells that files may be left for sweep.
func (s *snapshots) release(id string) (last bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.known[id]
	if e == nil {
		return false
	}
	e.users--
	return e.users == 0 && e.Removed
}

func (s *snapshots) list() []Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Snapshot, 0, len(s.known))
	for _, e := range s.known {
		if !e.Removed {
			all = append(all, e.Snapshot)
		}
	}
	return all
}

// total counts the snapshots and their bytes, also of those that only sandboxes keep.
func (s *snapshots) total() (n int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.known {
		bytes += e.Bytes
	}
	return len(s.known), bytes
}

// remove makes a snapshot one that no create finds any more.
func (s *snapshots) remove(id string) error {
	s.mu.Lock()
	e, ok := s.known[id]
	if !ok || e.Removed {
		s.mu.Unlock()
		return errs.New(errs.NotFound, "Snapshot %q not found", clip(id))
	}
	e.Removed = true
	used, r := e.users > 0, e.snapshotRecord
	s.mu.Unlock()
	if !used {
		return nil // sweep is next
	}
	if err := s.describe(filepath.Join(s.dir, id), r); err != nil { // after a restart it would be there again
		s.mu.Lock()
		e.Removed = false
		s.mu.Unlock()
		return diskError(fmt.Errorf("remove snapshot: %w", err))
	}
	return nil
}

// sweep removes the files of the snapshots that are removed and that nobody uses. The name goes first: a crash leaves something that
// the next start knows for half a snapshot.
func (s *snapshots) sweep() error {
	s.sweeping.Lock()
	defer s.sweeping.Unlock()
	var failures []error
	for _, id := range s.unused() {
		temp := filepath.Join(s.dir, snapshotNew+id)
		err := ignoreAbsent(os.Rename(filepath.Join(s.dir, id), temp))
		if err == nil {
			err = tree.Remove(temp)
		}
		if err != nil {
			failures = append(failures, fmt.Errorf("remove files of snapshot %s: %w", id, err))
			continue
		}
		s.mu.Lock()
		delete(s.known, id)
		s.mu.Unlock()
	}
	return errors.Join(failures...)
}

func (s *snapshots) unused() (ids []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, e := range s.known {
		if e.Removed && e.users == 0 {
			ids = append(ids, id)
		}
	}
	return ids
}

// diskUsage is the disk space of a tree: of a sparse file only what is there.
func diskUsage(dir string) (bytes int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			bytes += st.Blocks * 512
		}
		return nil
	})
	return bytes, err
}

// newSnapshotID returns "snap" and 16 characters of [a-z0-9]: about 82 random bits, for something that only its own team finds.
func newSnapshotID() string { return randomID(snapshotPrefix, snapshotRandom) }

const (
	snapshotPrefix = "snap"
	snapshotRandom = 16
)

func isSnapshotID(name string) bool {
	rest, ok := strings.CutPrefix(name, snapshotPrefix)
	return ok && len(rest) == snapshotRandom && !strings.ContainsAny(rest, "-_./")
}
