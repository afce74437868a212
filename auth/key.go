package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	keyPrefix = "e2b_" // what SDKs expect
	keyDigits = 40
)

// KeyHash is the SHA-256 of a whole API key. The key has 160 random bits, so a plain hash cannot be searched.
type KeyHash = [sha256.Size]byte

// NewAPIKey returns a new key: "e2b_" and 40 hex digits, the form that every SDK accepts.
func NewAPIKey() string {
	var random [keyDigits / 2]byte
	rand.Read(random[:]) // never fails: it ends the program instead
	return keyPrefix + hex.EncodeToString(random[:])
}

// HashKey hashes a key if it has the form of one; nothing else may reach a store.
func HashKey(key []byte) (KeyHash, bool) {
	if len(key) != len(keyPrefix)+keyDigits || string(key[:len(keyPrefix)]) != keyPrefix {
		return KeyHash{}, false
	}
	for _, c := range key[len(keyPrefix):] {
		if (c < '0' || '9' < c) && (c < 'a' || 'f' < c) {
			return KeyHash{}, false
		}
	}
	return sha256.Sum256(key), true
}

// KeyRecord is what is known about an API key. The key itself is known to its owner only.
type KeyRecord struct {
	ID      string // public, for logs and for deleting: 12 hex digits
	Name    string // what it is for
	Team    string // whose sandboxes it sees
	Created time.Time
	Hash    KeyHash
}

// NewKeyRecord makes a key and its record. The key is shown once and kept nowhere.
func NewKeyRecord(name, team string) (string, KeyRecord) {
	key := NewAPIKey()
	var id [6]byte
	rand.Read(id[:]) // never fails: it ends the program instead
	return key, KeyRecord{
		ID:      hex.EncodeToString(id[:]),
		Name:    name,
		Team:    team,
		Created: time.Now().UTC().Truncate(time.Second),
		Hash:    sha256.Sum256([]byte(key)),
	}
}

// keyVersion is the schema that this build writes, and the only one it reads.
const keyVersion = 1

type keyJSON struct {
	Version int       `json:"v"`
	ID      string    `json:"id"`
	Name    string    `json:"name,omitempty"`
	Team    string    `json:"team"`
	Created time.Time `json:"created"`
	Hash    string    `json:"hash"`
}

// MarshalJSON writes the stored form and refuses a record that UnmarshalJSON would not read.
func (r KeyRecord) MarshalJSON() ([]byte, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	return json.Marshal(keyJSON{keyVersion, r.ID, r.Name, r.Team, r.Created, hex.EncodeToString(r.Hash[:])})
}

// UnmarshalJSON reads the stored form. An unknown schema version is refused: it may say that the key is worth less.
func (r *KeyRecord) UnmarshalJSON(data []byte) error {
	var j keyJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	if j.Version != keyVersion {
		return fmt.Errorf("key schema version %d, want %d", j.Version, keyVersion)
	}
	read := KeyRecord{ID: j.ID, Name: j.Name, Team: j.Team, Created: j.Created}
	sum, err := hex.DecodeString(j.Hash)
	if err != nil || len(sum) != len(read.Hash) {
		return errors.New("key hash is not 64 hex digits")
	}
	copy(read.Hash[:], sum)
	if err := read.validate(); err != nil {
		return err
	}
	*r = read
	return nil
}

func (r *KeyRecord) validate() error {
	switch {
	case r.ID == "" || len(r.ID) > 64:
		return errs.New(errs.Invalid, "key id %q: want 1 to 64 characters", r.ID)
	case r.Team == "":
		return errs.New(errs.Invalid, "key %q without a team", r.ID)
	case r.Hash == KeyHash{}:
		return errs.New(errs.Invalid, "key %q without a hash", r.ID)
	case r.Created.Year() < 1 || r.Created.Year() > 9999:
		return errs.New(errs.Invalid, "key %q created in the year %d", r.ID, r.Created.Year())
	}
	return nil
}

// KeyStore keeps key records. Errors carry codes: NotFound for what is not there, Conflict for a second key of the same id,
// Invalid for a record that must not be stored, Unavailable for everything that prevented an answer.
type KeyStore interface {
	// PutKey adds a key; the same id with the same hash replaces the record.
	PutKey(ctx context.Context, r KeyRecord) error
	Key(ctx context.Context, hash KeyHash) (KeyRecord, error)
	Keys(ctx context.Context) ([]KeyRecord, error) // by id
	// DeleteKey takes the key's right away; keyrings notice within their TTL.
	DeleteKey(ctx context.Context, id string) error
}

var errNoKey = errs.New(errs.NotFound, "no such key")

func errNoKeyID(id string) error { return errs.New(errs.NotFound, "no key with id %q", id) }

func errKeyExists(id string) error {
	return errs.New(errs.Conflict, "another key has the id %q", id)
}

func unavailable(doing string, err error) error {
	return &errs.Error{Code: errs.Unavailable, Msg: "the key store does not answer", Err: fmt.Errorf("%s: %w", doing, err)}
}
