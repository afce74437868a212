package auth

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/redis/go-redis/v9"

	"github.com/sluice-edge/sluice/internal/errs"
)

const (
	redisKeyPrefix = "sluice:key:"
	redisKeysIndex = "sluice:keys"
)

// RedisKeys is a KeyStore in Redis: one server, a Sentinel group or a Cluster. The client's owner closes it.
type RedisKeys struct {
	client redis.UniversalClient
}

// NewRedisKeys returns a store on that client. It does not dial.
func NewRedisKeys(client redis.UniversalClient) *RedisKeys { return &RedisKeys{client: client} }

// PutKey implements KeyStore. The index comes first: a key that works is always one that can be listed and deleted.
func (s *RedisKeys) PutKey(ctx context.Context, r KeyRecord) error {
	value, err := json.Marshal(r)
	if err != nil {
		if coded, ok := errors.AsType[*errs.Error](err); ok {
			return coded
		}
		return fmt.Errorf("encode key %q: %w", r.ID, err)
	}
	hash := hex.EncodeToString(r.Hash[:])
	added, err := s.client.HSetNX(ctx, redisKeysIndex, r.ID, hash).Result()
	if err != nil {
		return unavailable("index key", err)
	}
	if !added {
		switch have, err := s.client.HGet(ctx, redisKeysIndex, r.ID).Result(); {
		case err != nil:
			return unavailable("read key index", err)
		case have != hash:
			return errKeyExists(r.ID)
		}
	}
	if err := s.client.Set(ctx, redisKeyPrefix+hash, value, 0).Err(); err != nil {
		return unavailable("put key", err)
	}
	return nil
}

// Key implements KeyStore.
func (s *RedisKeys) Key(ctx context.Context, hash KeyHash) (KeyRecord, error) {
	value, err := s.client.Get(ctx, redisKeyPrefix+hex.EncodeToString(hash[:])).Bytes()
	if errors.Is(err, redis.Nil) {
		return KeyRecord{}, errNoKey
	}
	if err != nil {
		return KeyRecord{}, unavailable("read key", err)
	}
	return decodeKey(value, hash)
}

// decodeKey refuses a record that was stored under another key's hash.
func decodeKey(value []byte, hash KeyHash) (KeyRecord, error) {
	var r KeyRecord
	err := json.Unmarshal(value, &r)
	if err == nil && r.Hash != hash {
		err = errors.New("the record is of another key")
	}
	if err != nil {
		return KeyRecord{}, fmt.Errorf("decode key record: %w", err)
	}
	return r, nil
}

// Keys implements KeyStore.
func (s *RedisKeys) Keys(ctx context.Context) ([]KeyRecord, error) {
	index, err := s.client.HGetAll(ctx, redisKeysIndex).Result()
	if err != nil {
		return nil, unavailable("list keys", err)
	}
	records := make([]KeyRecord, 0, len(index))
	for id, hash := range index {
		value, err := s.client.Get(ctx, redisKeyPrefix+hash).Bytes()
		if errors.Is(err, redis.Nil) {
			continue // between the two steps of PutKey or DeleteKey
		}
		if err != nil {
			return nil, unavailable("list keys", err)
		}
		var r KeyRecord
		if err := json.Unmarshal(value, &r); err != nil {
			return nil, fmt.Errorf("decode record of key %q: %w", id, err)
		}
		records = append(records, r)
	}
	sortRecords(records)
	return records, nil
}

// DeleteKey implements KeyStore. The record goes first; when the second step fails, deleting again completes it.
func (s *RedisKeys) DeleteKey(ctx context.Context, id string) error {
	hash, err := s.client.HGet(ctx, redisKeysIndex, id).Result()
	if errors.Is(err, redis.Nil) {
		return errNoKeyID(id)
	}
	if err != nil {
		return unavailable("read key index", err)
	}
	if err := s.client.Del(ctx, redisKeyPrefix+hash).Err(); err != nil {
		return unavailable("delete key", err)
	}
	if err := s.client.HDel(ctx, redisKeysIndex, id).Err(); err != nil {
		return unavailable("unindex key", err)
	}
	return nil
}
