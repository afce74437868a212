package guest

import (
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

func openState(t *testing.T) *os.Root {
	t.Helper()
	dir, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return dir
}

// TestSettingsOverRestarts: an agent that follows another knows what that one was told, and one that follows a boot knows it too but lets
// nobody in.
func TestSettingsOverRestarts(t *testing.T) {
	dir := openState(t)
	if s, err := loadSettings(dir); err != nil || !reflect.DeepEqual(s, savedSettings{}) {
		t.Errorf("loadSettings of nothing = %+v, %v", s, err)
	}
	want := savedSettings{
		Ready: true, Env: map[string]string{"A": "1"}, Token: "secret", User: "user", Workdir: "/srv", Hostname: "one", Lifecycle: "one-1",
		Stamp: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	}
	for range 2 {
		if err := saveSettings(dir, want); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := loadSettings(dir); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("loadSettings = %+v, %v, want %+v", got, err, want)
	}
	if info, err := dir.Stat(settingsName); err != nil || info.Mode() != 0o600 {
		t.Errorf("the settings' mode is %v, %v", info.Mode(), err)
	}
	next := func(restarted bool) savedSettings {
		return newAgent(Options{State: dir, Restarted: restarted}).settings.saved()
	}
	if got := next(true); !reflect.DeepEqual(got, want) {
		t.Errorf("after a restart: %+v, want %+v", got, want)
	}
	want.Ready = false
	for _, restarted := range []bool{false, true} { // nobody has been let in since the boot, so the next one does not either
		if got := next(restarted); !reflect.DeepEqual(got, want) {
			t.Errorf("after a boot, restarted %v: %+v, want %+v", restarted, got, want)
		}
	}
	for _, bad := range []string{"", "{", "[]", `{"env":{"A=B":""}}`, `{"ready":1}`, strings.Repeat(" ", maxSettings)} {
		if err := dir.WriteFile(settingsName, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if s, err := loadSettings(dir); err == nil {
			t.Errorf("loadSettings of %.20q = %+v", bad, s)
		}
		if got := next(true); !reflect.DeepEqual(got, savedSettings{}) {
			t.Errorf("an agent with settings %.20q has %+v", bad, got)
		}
	}
}

func TestLateInit(t *testing.T) {
	now := time.Now()
	check := func(name string, req initRequest, want bool) {
		t.Helper()
		if got := late(req, savedSettings{Lifecycle: "one-1", Stamp: now}); got != want {
			t.Errorf("late(%s) = %v, want %v", name, got, want)
		}
	}
	check("retry", initRequest{LifecycleID: "one-1", Timestamp: now}, false)
	check("older", initRequest{LifecycleID: "one-1", Timestamp: now.Add(-1)}, true)
	check("newer", initRequest{LifecycleID: "one-1", Timestamp: now.Add(1)}, false)
	check("without a time", initRequest{LifecycleID: "one-1"}, false)
	// The memory may come from a node whose clock is ahead: the sandbox must not stay somebody else's.
	check("another lifecycle, older", initRequest{LifecycleID: "two-1", Timestamp: now.Add(-time.Hour)}, false)
}

func TestMergeEnv(t *testing.T) {
	s := startAgent(t)
	check := func(req InitRequest, want string) {
		t.Helper()
		mustInit(t, s, req)
		if _, body := s.do(t, "GET", "/envs", nil, nil); body != want {
			t.Errorf("after %+v: %s, want %s", req, body, want)
		}
	}
	check(InitRequest{EnvVars: map[string]string{"A": "1", "B": "1"}}, `{"A":"1","B":"1"}`)
	check(InitRequest{EnvVars: map[string]string{"B": "2", "C": "2"}, MergeEnv: true}, `{"A":"1","B":"2","C":"2"}`)
	check(InitRequest{MergeEnv: true}, `{"A":"1","B":"2","C":"2"}`)
	check(InitRequest{EnvVars: map[string]string{"D": "3"}}, `{"D":"3"}`)
	check(InitRequest{}, `{}`)
}

// A namespace has no clock, no disk and no connections of its own.
func TestMachineCallsInANamespace(t *testing.T) {
	s := startAgent(t)
	if err := s.node.Resume(t.Context(), ResumeRequest{}); err == nil || !strings.Contains(err.Error(), "status 404") {
		t.Errorf("Resume = %v", err)
	}
	if err := s.node.Sync(t.Context()); err == nil || !strings.Contains(err.Error(), "status 404") {
		t.Errorf("Sync = %v", err)
	}
	if err := s.node.call(t.Context(), callTime, "POST", "/clock", clockRequest{Timestamp: time.Unix(1, 0)}, 204, nil); err != nil {
		t.Errorf("clock = %v", err)
	}
	// What is for a VM says nothing to a namespace, however wrong it is.
	mustInit(t, s, InitRequest{MAC: "none", Resolvers: []string{"none"}})
}
