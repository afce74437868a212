package guest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"golang.org/x/sys/unix"
)

// takeUp makes the agent of a VM know what an earlier one was told. After a boot it still waits for an init: whoever boots a disk says who
// may come in.
func (a *agent) takeUp(restarted bool) {
	s, err := loadSettings(a.state)
	if err != nil {
		// A disk that was torn away at the wrong moment, or somebody's hand: the next init says all that matters.
		a.log.Warn("settings lost", "error", err)
		return
	}
	if !restarted && s.Ready {
		s.Ready = false
		a.save(s)
	}
	a.settings.restore(s)
}

func (a *agent) save(s savedSettings) {
	if err := saveSettings(a.state, s); err != nil {
		a.log.Warn("settings not saved", "error", err)
	}
}

// setClock follows the node's clock. A machine that was restored is behind by the length of its sleep.
func (a *agent) setClock(now time.Time) {
	if now.IsZero() || time.Since(now).Abs() < clockSlack {
		return
	}
	tv := unix.NsecToTimeval(now.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		a.log.Debug("clock not set", "error", err)
	}
}

// serveClock is POST /clock. A namespace has the host's clock, and nothing happens there.
func (a *agent) serveClock(w http.ResponseWriter, r *http.Request) {
	var req clockRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxInitBody)).Decode(&req); err != nil {
		writeError(w, http.StatusBadRequest, "error parsing body: "+err.Error())
		return
	}
	if a.state != nil {
		a.setClock(req.Timestamp)
	}
	w.WriteHeader(http.StatusNoContent)
}

// serveResume is POST /resume: time has passed. The clock comes first, because what programs do when their connections end is often to look at
// it. Nothing of this is worth ending a sandbox for, which the node would do if it were told that its resume had failed.
func (a *agent) serveResume(w http.ResponseWriter, r *http.Request) {
	if a.state == nil {
		serveNotFound(w, r)
		return
	}
	var req resumeRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxInitBody)).Decode(&req); err != nil {
		writeError(w, http.StatusBadRequest, "error parsing body: "+err.Error())
		return
	}
	a.setClock(req.Timestamp)
	if len(req.Entropy) > 0 {
		if err := reseed(req.Entropy); err != nil {
			a.log.Error("no fresh entropy", "error", err)
		}
	}
	count := 0
	if !req.KeepConnections {
		count = a.forgetConnections()
	}
	a.log.Info("resumed", "lifecycle", req.LifecycleID, "connections", count)
	w.WriteHeader(http.StatusNoContent)
}

// forgetConnections ends those that memory brought along. What cannot be ended hangs until its program has enough of it.
func (a *agent) forgetConnections() int {
	count, err := resetConnections()
	if err != nil {
		a.log.Error("connections not reset", "error", err)
	}
	return count
}

// serveSync is POST /sync: what was written is on the disk when it answers.
func (a *agent) serveSync(w http.ResponseWriter, r *http.Request) {
	if a.state == nil {
		serveNotFound(w, r)
		return
	}
	if err := a.syncDisk(); err != nil {
		a.failControl(w, "sync", err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (a *agent) syncDisk() error {
	dir, err := a.state.Open(".")
	if err != nil {
		return fmt.Errorf("open disk: %w", err)
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("sync disk: %w", err)
	}
	return nil
}

// failControl answers a call of the node that went wrong in here.
func (a *agent) failControl(w http.ResponseWriter, call string, err error) {
	a.log.Error("call of the node failed", "call", call, "error", err)
	writeError(w, http.StatusInternalServerError, err.Error())
}
