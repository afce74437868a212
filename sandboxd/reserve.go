package sandboxd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	reserveSize = 1 << 20 // hundreds of records
	// journalRetry is how often records that could not be written are tried again, and a reserve that was given up is made anew.
	journalRetry = 2 * time.Second
)

// reserve is disk space that only the records of running sandboxes may use: tenants can fill the disk, and a deadline or a
// tighter fence must still get through. It is a file, given up when the disk is full and made again when it no longer is.
type reserve struct {
	path string

	mu   sync.Mutex
	held bool
}

// hold makes the file unless it is there. It is random, because some file systems keep nothing for zeros.
func (r *reserve) hold() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held {
		return nil
	}
	if st, err := os.Stat(r.path); err == nil && st.Size() == reserveSize { // of an earlier run
		r.held = true
		return nil
	}
	var disk syscall.Statfs_t
	if err := syscall.Statfs(filepath.Dir(r.path), &disk); err != nil {
		return fmt.Errorf("reserve disk space: %w", err)
	}
	if disk.Bavail*uint64(disk.Bsize) < 4*reserveSize { // trying would take the last of it from everybody for a moment
		return fmt.Errorf("reserve disk space: %w", syscall.ENOSPC)
	}
	data := make([]byte, reserveSize)
	rand.Read(data) // never fails
	if err := writeSynced(r.path, data); err != nil {
		return errors.Join(fmt.Errorf("reserve disk space: %w", err), ignoreAbsent(os.Remove(r.path)))
	}
	r.held = true
	return nil
}

// giveUp frees the space; false when there was none.
func (r *reserve) giveUp() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.held {
		return false
	}
	r.held = false
	err := os.Remove(r.path)
	return err == nil || errors.Is(err, fs.ErrNotExist)
}

// update replaces the record of a sandbox that exists, with the reserve if there is no other space.
func (j journal) update(rec record) error {
	err := j.write(rec)
	if isFull(err) && j.reserve.giveUp() {
		err = j.write(rec)
	}
	return err
}

// enforced answers a change that takes effect at once though its record could not be written: until the retry succeeds, a restart
// would bring back what the old record says.
func (m *Manager) enforced(l *life, err error) error {
	m.owe(l)
	l.log.Warn("change in force but not recorded, will be tried again", zap.Error(err))
	return &errs.Error{Code: errs.Unavailable, Err: err, Msg: "the change is in force, but the disk of this node did not take its record yet: " +
		"a restart of the node before it does would undo it"}
}

// owe notes that the record of a sandbox is not what it should be.
func (m *Manager) owe(l *life) {
	m.stats.recordFailed.Inc()
	m.mu.Lock()
	defer m.mu.Unlock()
	l.unrecorded = true
}

// keepJournal writes the records that are owed, and keeps the reserve.
func (m *Manager) keepJournal(ctx context.Context) error {
	tick := time.NewTicker(journalRetry)
	defer tick.Stop()
	lacking := false
	for {
		m.writeOwed()
		err := m.journal.reserve.hold()
		if err != nil && !lacking {
			m.log.Warn("no disk space reserved for records", zap.Error(err))
		}
		lacking = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// writeOwed tries the records that are owed. A sandbox that is busy is left for the next time.
func (m *Manager) writeOwed() {
	m.mu.RLock()
	var owed []*life
	for _, l := range m.lives {
		if l.unrecorded {
			owed = append(owed, l)
		}
	}
	m.mu.RUnlock()
	for _, l := range owed {
		if !l.tryTurn() {
			continue
		}
		if rec := m.record(l); (rec.Sandbox.State == StateRunning || rec.Sandbox.State == StatePaused) && m.journal.update(rec) == nil {
			m.mu.Lock()
			l.unrecorded = false
			m.mu.Unlock()
			l.log.Info("change recorded")
		}
		l.endTurn()
	}
}
