// Package auth says who may pass: the traffic tokens that guard a private sandbox's public URL, and the API keys of the REST
// API. It holds secrets only as SHA-256 hashes and compares them in constant time; what it cannot avoid holding, the key that
// tokens are derived from, does not print. proxy asks TokenMatches, api mints tokens and asks the Keyring, `sluice key` writes
// the KeyStore.
//
// It decides nothing about routes, and it knows no HTTP: callers find the credential and map the error's code to a status.
//
// # Keys in Redis
//
//	sluice:key:<SHA-256 in hex>   one JSON value per API key, see KeyRecord
//	sluice:keys                   hash: public id -> SHA-256 in hex; the index behind Keys and DeleteKey
package auth

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
)

// TokenHash is the SHA-256 of a token. In a route the zero value means that there is no token; no token has that hash.
type TokenHash = [32]byte

// HashToken hashes a token as it is presented.
func HashToken(token []byte) TokenHash { return sha256.Sum256(token) }

// maxToken bounds what is hashed for a stranger; a token has 64 bytes.
const maxToken = 256

// TokenMatches compares in constant time and does not allocate. An empty token matches nothing, nor does anything match the zero
// hash: whether a sandbox is public is the route's to say, not the result of a comparison.
func TokenMatches(h TokenHash, presented []byte) bool {
	if len(presented) == 0 || len(presented) > maxToken {
		return false
	}
	sum := sha256.Sum256(presented)
	return subtle.ConstantTimeCompare(h[:], sum[:]) == 1 && h != TokenHash{}
}

// NonceSize is the length of a sandbox's nonce.
const NonceSize = 16

// NewNonce returns the random number from which one sandbox's tokens are derived. It is no secret without the TokenKey. A new nonce
// is a new pair of tokens.
func NewNonce() [NonceSize]byte {
	var nonce [NonceSize]byte
	rand.Read(nonce[:]) // never fails: it ends the program instead
	return nonce
}

// TokenKey derives tokens from nonces. It comes from the cluster key, so that every node gives the same answer.
type TokenKey struct {
	key func() []byte // a function, because fmt looks through every other type when it prints the struct around it
}

// NewTokenKey derives the key. Being derived for this purpose alone, it tells nothing about the cluster key, which also signs links.
func NewTokenKey(clusterKey []byte) TokenKey {
	derived, err := hkdf.Key(sha256.New, clusterKey, nil, "sluice sandbox tokens v1", sha256.Size)
	if err != nil {
		panic("BUG: " + err.Error()) // only for an impossible length
	}
	return TokenKey{key: func() []byte { return derived }}
}

// Traffic is the token that a private sandbox's visitors present: 64 hex digits, random by its nonce. It can be told again for
// as long as the nonce is kept, though nothing stores it; see docs/decisions/0001-tokens-derived-from-a-stored-nonce.md.
func (k TokenKey) Traffic(nonce [NonceSize]byte) string { return k.derive("traffic", nonce) }

// Envd is the token that SDKs present to the agent in the sandbox.
func (k TokenKey) Envd(nonce [NonceSize]byte) string { return k.derive("envd", nonce) }

func (k TokenKey) derive(purpose string, nonce [NonceSize]byte) string {
	mac := hmac.New(sha256.New, k.key())
	mac.Write([]byte(purpose)) // the nonce has a fixed length, so no two pairs give the same bytes
	mac.Write(nonce[:])
	return hex.EncodeToString(mac.Sum(nil))
}

// Format keeps the key out of logs, whatever the verb.
func (k TokenKey) Format(s fmt.State, _ rune) { fmt.Fprint(s, "TokenKey(hidden)") }
