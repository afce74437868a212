package auth

import (
	"context"
	"slices"
	"strings"
	"sync"
)

// MemoryKeys is a KeyStore in this process: for `sluice dev`, and for tests.
type MemoryKeys struct {
	mu     sync.Mutex
	byHash map[KeyHash]KeyRecord
	byID   map[string]KeyHash
}

// NewMemoryKeys returns an empty store.
func NewMemoryKeys() *MemoryKeys {
	return &MemoryKeys{byHash: make(map[KeyHash]KeyRecord), byID: make(map[string]KeyHash)}
}

// PutKey implements KeyStore.
func (s *MemoryKeys) PutKey(ctx context.Context, r KeyRecord) error {
	if err := r.validate(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return unavailable("put key", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if hash, ok := s.byID[r.ID]; ok && hash != r.Hash {
		return errKeyExists(r.ID)
	}
	s.byID[r.ID], s.byHash[r.Hash] = r.Hash, r
	return nil
}

// Key implements KeyStore.
func (s *MemoryKeys) Key(ctx context.Context, hash KeyHash) (KeyRecord, error) {
	if err := ctx.Err(); err != nil {
		return KeyRecord{}, unavailable("read key", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.byHash[hash]
	if !ok {
		return KeyRecord{}, errNoKey
	}
	return r, nil
}

// Keys implements KeyStore.
func (s *MemoryKeys) Keys(ctx context.Context) ([]KeyRecord, error) {
	if err := ctx.Err(); err != nil {
		return nil, unavailable("list keys", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	records := make([]KeyRecord, 0, len(s.byHash))
	for _, r := range s.byHash {
		records = append(records, r)
	}
	sortRecords(records)
	return records, nil
}

// DeleteKey implements KeyStore.
func (s *MemoryKeys) DeleteKey(ctx context.Context, id string) error {
	if err := ctx.Err(); err != nil {
		return unavailable("delete key", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	hash, ok := s.byID[id]
	if !ok {
		return errNoKeyID(id)
	}
	delete(s.byHash, hash)
	delete(s.byID, id)
	return nil
}

func sortRecords(records []KeyRecord) {
	slices.SortFunc(records, func(a, b KeyRecord) int { return strings.Compare(a.ID, b.ID) })
}
