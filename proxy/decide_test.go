package proxy

import (
	"net/url"
	"path"
	"slices"
	"testing"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/routing"
)

func TestDecide(t *testing.T) {
	token := []byte(testToken)
	public := routing.Route{State: routing.Running, Mask: "m:${PORT}"}
	secret := routing.Route{State: routing.Running, Mask: "m", TokenHash: auth.HashToken(token)}
	paused, pausedPublic := secret, public
	paused.State, pausedPublic.State = routing.Paused, routing.Paused
	paused.AutoResume = true
	pausedAgent := paused // whose agent asks for a token
	pausedAgent.EnvdHash = auth.HashToken(token[:32])
	stays := pausedAgent
	stays.AutoResume = false
	envd := func(n int, t []byte) facts { return facts{target: []byte("/health"), envdTokens: n, envdToken: t} }
	tests := []struct {
		name  string
		route routing.Route
		port  uint16
		facts facts
		want  decision
	}{
		{"public", public, 80, facts{}, decision{mask: "m:${PORT}"}},
		{"public with a token that nobody asked for", public, 80, facts{tokens: 1, token: token}, decision{mask: "m:${PORT}"}},
		{"no token", secret, 80, facts{}, decision{reason: ReasonTokenMissing}},
		{"wrong token", secret, 80, facts{tokens: 1, token: token[1:]}, decision{reason: ReasonTokenInvalid}},
		{"empty token", secret, 80, facts{tokens: 1, token: []byte{}}, decision{reason: ReasonTokenInvalid}},
		{"right token", secret, 80, facts{tokens: 1, token: token}, decision{mask: "m"}},
		{"right token twice", secret, 80, facts{tokens: 2, token: token}, decision{reason: ReasonTokenInvalid}},
		{"envd needs none and has no mask", secret, envdPort, facts{target: []byte("/health")}, decision{}},
		{"control path", secret, envdPort, facts{target: []byte("/init")}, decision{reason: ReasonControlPath}},
		{"control path on another port", public, 80, facts{target: []byte("/init")}, decision{mask: "m:${PORT}"}},
		{"paused, no token", paused, 80, facts{}, decision{reason: ReasonTokenMissing}},
		{"paused, wrong token", paused, 80, facts{tokens: 1, token: token[1:]}, decision{reason: ReasonTokenInvalid}},
		{"paused, right token twice", paused, 80, facts{tokens: 2, token: token}, decision{reason: ReasonTokenInvalid}},
		{"paused, the agent's token", pausedAgent, 80, facts{envdTokens: 1, envdToken: token[:32]}, decision{reason: ReasonTokenMissing}},
		{"paused", paused, 80, facts{tokens: 1, token: token}, decision{mask: "m", wake: true}},
		{"paused and public", pausedPublic, 80, facts{}, decision{reason: ReasonPaused}},
		{"paused, envd without a token of its own", paused, envdPort, envd(0, nil), decision{wake: true}},
		{"paused, envd, no token", pausedAgent, envdPort, envd(0, nil), decision{reason: ReasonResumeDenied}},
		{"paused, envd, empty token", pausedAgent, envdPort, envd(1, []byte{}), decision{reason: ReasonResumeDenied}},
		{"paused, envd, wrong token", pausedAgent, envdPort, envd(1, token), decision{reason: ReasonResumeDenied}},
		{"paused, envd, right token", pausedAgent, envdPort, envd(1, token[:32]), decision{wake: true}},
		{"paused, envd, right token twice", pausedAgent, envdPort, envd(2, token[:32]), decision{reason: ReasonResumeDenied}},
		{"paused, envd, the traffic token", pausedAgent, envdPort, facts{target: []byte("/health"), tokens: 1, token: token},
			decision{reason: ReasonResumeDenied}},
		{"paused, control path", pausedAgent, envdPort, facts{target: []byte("/init"), envdTokens: 1, envdToken: token[:32]},
			decision{reason: ReasonControlPath}},
		{"paused for good", stays, 80, facts{tokens: 1, token: token}, decision{reason: ReasonPaused}},
		{"paused for good, envd", stays, envdPort, envd(1, token[:32]), decision{reason: ReasonPaused}},
		{"running, the agent judges by itself", func() routing.Route { r := pausedAgent; r.State = routing.Running; return r }(), envdPort,
			envd(1, token), decision{}},
	}
	for _, tt := range tests {
		if got := decide(&tt.route, tt.port, &tt.facts); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestControlPaths(t *testing.T) {
	check := func(target string, want bool) {
		t.Helper()
		if got := isControlPath([]byte(target)); got != want {
			t.Errorf("isControlPath(%q) = %v, want %v", target, got, want)
		}
	}
	for _, name := range controlPaths {
		check("/"+name, true)
		check("/"+name+"?a=b", true)
		check("/"+name+"/", true)
		check("/x"+name, false)
		check("/"+name+"x", false)
		check("/x/"+name, false)
		check("/"+name+"/x", false)
	}
	for _, target := range []string{
		"//init", "/./init", "/a/../init", "/a/b/../../init", "/../init", "/../../init//.", "/init/.", "/init/x/..", "/x#/../init",
		"/%69nit", "/%69%6e%69%74", "/%2e/init", "/%2E%2e/init", "/a%2f..%2finit", "/%2finit", "/init%2f", "/%2569nit", "/x/%252e%252e/init",
	} {
		check(target, true)
	}
	for _, target := range []string{"/", "", "*", "/INIT", "/health", "/files?path=/init", "/a/init", "/init%00", "/init#a", "/%zzinit", "/in%20it"} {
		check(target, false)
	}
}

// controlPathByStdlib is how a Go server would find a control path.
func controlPathByStdlib(target string) bool {
	u, err := url.ParseRequestURI(target)
	if err != nil {
		return false
	}
	for _, p := range []string{u.Path, u.EscapedPath()} {
		if clean := path.Clean("/" + p); slices.Contains(controlPaths[:], clean[1:]) {
			return true
		}
	}
	return false
}
