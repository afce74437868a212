package guest

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// settings are what init told the agent about itself.
type settings struct {
	fallbackUser string // fixed before Run

	mu    sync.Mutex
	now   values
	stamp time.Time // of the last init that was applied
}

// values are replaced whole; the map is never written again.
type values struct {
	ready   bool // somebody has said who may come in
	env     map[string]string
	token   string
	user    string
	workdir string
}

func (s *settings) get() values {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// apply takes an init; false when it is older than the last one, as a retry can be, and changed nothing.
func (s *settings) apply(req initRequest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !req.Timestamp.IsZero() && req.Timestamp.Before(s.stamp) {
		return false
	}
	s.stamp = req.Timestamp
	s.now.ready = true
	if req.EnvVars != nil {
		s.now.env = maps.Clone(*req.EnvVars)
	}
	if req.AccessToken != nil {
		s.now.token = *req.AccessToken
	}
	if req.DefaultUser != nil {
		s.now.user = *req.DefaultUser
	}
	if req.DefaultWorkdir != nil {
		s.now.workdir = *req.DefaultWorkdir
	}
	return true
}

// actor resolves the user that a request acts as; an empty name means the default.
func (a *agent) actor(name string) (account, error) {
	if name != "" {
		return a.accounts.lookup(name)
	}
	for _, name := range []string{a.settings.get().user, a.settings.fallbackUser} {
		if name != "" {
			return a.accounts.lookup(name)
		}
	}
	u, err := a.accounts.lookup("user")
	if errors.Is(err, errNoUser) {
		return a.accounts.lookup("root")
	}
	return u, err
}

// resolve turns a path of a request into an absolute one. Relative paths and ~ count from the user's home; an empty one is the default
// working directory, or the home.
func (a *agent) resolve(path string, u account) (string, error) {
	if strings.IndexByte(path, 0) >= 0 {
		return "", errors.New("path contains a NUL byte")
	}
	if path == "" {
		if path = a.settings.get().workdir; path == "" {
			return u.Home, nil
		}
	}
	return expand(path, u.Home)
}

func expand(path, home string) (string, error) {
	if rest, ok := strings.CutPrefix(path, "~"); ok {
		if rest != "" && rest[0] != '/' {
			return "", fmt.Errorf("cannot expand the home directory of another user: %q", path)
		}
		return filepath.Join(home, rest), nil
	}
	if !filepath.IsAbs(path) {
		return filepath.Join(home, path), nil
	}
	return filepath.Clean(path), nil
}

// sameSecret compares digests, so that neither content nor length shows in the time it takes.
func sameSecret(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}
