//go:build !race

package auth

import "testing"

func TestAllocations(t *testing.T) {
	ring, _, key, r := newRing(t, KeyringOptions{TTL: 1 << 62})
	wantPrincipal(t, ring, key, r)
	token := []byte(NewTokenKey(key).Traffic(NewNonce()))
	hash := HashToken(token)
	bad := []byte("no key at all")
	for what, call := range map[string]func(){
		"HashToken":              func() { HashToken(token) },
		"TokenMatches":           func() { TokenMatches(hash, token) },
		"HashKey":                func() { HashKey(key) },
		"Authorize, remembered":  func() { ring.Authorize(t.Context(), key) }, // counted, not judged
		"Authorize, no key form": func() { ring.Authorize(t.Context(), bad) }, // counted, not judged
	} {
		if got := testing.AllocsPerRun(100, call); got != 0 {
			t.Errorf("%s allocates %v times, want 0", what, got)
		}
	}
}
