package auth

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
)

func TestTokenMatches(t *testing.T) {
	key := NewTokenKey([]byte("cluster key"))
	token := key.Traffic(NewNonce())
	hash := HashToken([]byte(token))
	tests := []struct {
		what      string
		hash      TokenHash
		presented string
		want      bool
	}{
		{"the token", hash, token, true},
		{"nothing", hash, "", false},
		{"a prefix", hash, token[:63], false},
		{"one more byte", hash, token + "0", false},
		{"upper case", hash, strings.ToUpper(token), token == strings.ToUpper(token)},
		{"the hash itself", hash, hex.EncodeToString(hash[:]), false},
		{"nothing for a public sandbox", TokenHash{}, "", false},
		{"a token for a public sandbox", TokenHash{}, token, false},
		{"the empty token where its hash is stored", HashToken(nil), "", false},
		{"a megabyte", HashToken(bytes.Repeat([]byte("x"), 1<<20)), strings.Repeat("x", 1<<20), false},
	}
	for _, tt := range tests {
		if got := TokenMatches(tt.hash, []byte(tt.presented)); got != tt.want {
			t.Errorf("TokenMatches with %s = %v, want %v", tt.what, got, tt.want)
		}
	}
}

// TestTokensStayTheSame pins the derivation: a change would close every private sandbox to its holders at the next deployment.
func TestTokensStayTheSame(t *testing.T) {
	key := NewTokenKey([]byte("0123456789abcdef0123456789abcdef"))
	nonce := [NonceSize]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	const ( // computed by another implementation of HKDF and HMAC
		traffic = "052c3934c3f4386a7518840ab62c7654c0197a0b3e5848e7ebc55bf3271c507d"
		envd    = "fd029ab190690679608a4296d7f24353a33d7dec242872a8817e1f04f3f3f3bb"
	)
	if got := key.Traffic(nonce); got != traffic {
		t.Errorf("Traffic() = %s, want %s", got, traffic)
	}
	if got := key.Envd(nonce); got != envd {
		t.Errorf("Envd() = %s, want %s", got, envd)
	}
}

func TestTokensDiffer(t *testing.T) {
	a, b := NewTokenKey([]byte("a")), NewTokenKey([]byte("b"))
	seen := make(map[string]string)
	for _, nonce := range [][NonceSize]byte{NewNonce(), NewNonce(), {}} {
		for what, token := range map[string]string{
			"a traffic": a.Traffic(nonce), "a envd": a.Envd(nonce), "b traffic": b.Traffic(nonce), "b envd": b.Envd(nonce),
		} {
			what = fmt.Sprintf("%s %x", what, nonce)
			if len(token) != 64 {
				t.Errorf("%s has %d characters, want 64", what, len(token))
			}
			if other, ok := seen[token]; ok {
				t.Errorf("%s and %s are the same", what, other)
			}
			seen[token] = what
		}
	}
}

func TestTokenKeyDoesNotPrint(t *testing.T) {
	key := NewTokenKey([]byte("secret"))
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		text := fmt.Sprintf(format, key)
		exported := fmt.Sprintf(format, struct{ Key TokenKey }{key})
		inside := fmt.Sprintf(format, struct{ key TokenKey }{key})
		for _, shown := range []string{text, exported, inside} {
			if strings.Contains(shown, hex.EncodeToString(key.key()[:4])) || strings.Contains(shown, fmt.Sprint(key.key()[0], " ", key.key()[1])) {
				t.Errorf("Sprintf(%q) shows the key: %s", format, shown)
			}
		}
	}
}
