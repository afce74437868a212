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

	mu        sync.Mutex
	now       values
	hostname  string    // these are of the last init that was applied
	lifecycle string    //
	stamp     time.Time //
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

// late says whether an init is older than the last one, as a retry can be. Those of another lifecycle are not compared: they may come from
// another node, whose clock is not that of the node where the memory was saved.
func late(req initRequest, now savedSettings) bool {
	return req.LifecycleID == now.Lifecycle && !req.Timestamp.IsZero() && req.Timestamp.Before(now.Stamp)
}

// apply takes an init that is not late.
func (s *settings) apply(req initRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stamp, s.lifecycle = req.Timestamp, req.LifecycleID
	s.now.ready = true
	if req.EnvVars != nil {
		env := map[string]string{}
		if req.MergeEnv {
			maps.Copy(env, s.now.env)
		}
		maps.Copy(env, *req.EnvVars)
		s.now.env = env
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
	if req.Hostname != "" {
		s.hostname = req.Hostname
	}
}

// saved is all of it in the form in which it is kept.
func (s *settings) saved() savedSettings {
	s.mu.Lock()
	defer s.mu.Unlock()
	return savedSettings{
		Ready: s.now.ready, Env: s.now.env, Token: s.now.token, User: s.now.user, Workdir: s.now.workdir,
		Hostname: s.hostname, Lifecycle: s.lifecycle, Stamp: s.stamp,
	}
}

// restore is the way back.
func (s *settings) restore(from savedSettings) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = values{ready: from.Ready, env: from.Env, token: from.Token, user: from.User, workdir: from.Workdir}
	s.hostname, s.lifecycle, s.stamp = from.Hostname, from.Lifecycle, from.Stamp
}

// actor resolves the user that a request acts as; an empty name means the default.
func (a *agent) actor(name string) (account, error) {
	if name != "" {
		return a.accounts.lookup(name)
	}
	for _, name := range []string{a.settings.get().user, a.settings.fallbackUser} {
		if name != "" {
			return a.accounts.find(name)
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
