package auth_test

import (
	"context"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/routing/routingtest"
)

func TestMemoryKeys(t *testing.T) {
	testKeyStore(t, func(*testing.T) auth.KeyStore { return auth.NewMemoryKeys() })
}

func TestRedisKeys(t *testing.T) {
	server := routingtest.StartRedis(t)
	testKeyStore(t, func(t *testing.T) auth.KeyStore { return emptyKeys(t, server) })
}

func TestRedisKeysOnACluster(t *testing.T) {
	server := routingtest.StartCluster(t)
	testKeyStore(t, func(t *testing.T) auth.KeyStore { return emptyKeys(t, server) })
}

func emptyKeys(t *testing.T, server *routingtest.Redis) *auth.RedisKeys {
	t.Helper()
	client := server.Client(t)
	if err := client.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	return auth.NewRedisKeys(client)
}

// testKeyStore is the one suite that every KeyStore passes.
func testKeyStore(t *testing.T, newStore func(t *testing.T) auth.KeyStore) {
	t.Run("put, read, list, delete", func(t *testing.T) {
		s, ctx := newStore(t), t.Context()
		want(t, "Keys of an empty store", s)
		_, a := auth.NewKeyRecord("a", "red")
		_, b := auth.NewKeyRecord("b", "blue")
		a.ID, b.ID = "1", "2"
		for _, r := range []auth.KeyRecord{b, a} {
			if _, err := s.Key(ctx, r.Hash); errs.CodeOf(err) != errs.NotFound {
				t.Errorf("Key() before PutKey = %v, want not found", err)
			}
			if err := s.PutKey(ctx, r); err != nil {
				t.Fatal(err)
			}
			if got, err := s.Key(ctx, r.Hash); err != nil || !reflect.DeepEqual(got, r) {
				t.Errorf("Key() = %+v, %v, want %+v", got, err, r)
			}
		}
		want(t, "Keys", s, a, b)
		a.Name = "renamed"
		if err := s.PutKey(ctx, a); err != nil {
			t.Errorf("PutKey of the same key = %v", err)
		}
		thief := b
		thief.ID = a.ID
		if err := s.PutKey(ctx, thief); errs.CodeOf(err) != errs.Conflict {
			t.Errorf("PutKey with an id that is taken = %v, want conflict", err)
		}
		want(t, "Keys", s, a, b)
		if err := s.DeleteKey(ctx, a.ID); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Key(ctx, a.Hash); errs.CodeOf(err) != errs.NotFound {
			t.Errorf("Key() after DeleteKey = %v, want not found", err)
		}
		if err := s.DeleteKey(ctx, a.ID); errs.CodeOf(err) != errs.NotFound {
			t.Errorf("DeleteKey twice = %v, want not found", err)
		}
		want(t, "Keys", s, b)
	})
	t.Run("bad records are refused", func(t *testing.T) {
		s := newStore(t)
		_, good := auth.NewKeyRecord("", "team")
		for i, change := range []func(r *auth.KeyRecord){
			func(r *auth.KeyRecord) { r.ID = "" },
			func(r *auth.KeyRecord) { r.Team = "" },
			func(r *auth.KeyRecord) { r.Hash = auth.KeyHash{} },
			func(r *auth.KeyRecord) { r.Created = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
		} {
			r := good
			change(&r)
			if err := s.PutKey(t.Context(), r); errs.CodeOf(err) != errs.Invalid {
				t.Errorf("PutKey of bad record %d = %v, want invalid", i, err)
			}
		}
		want(t, "Keys", s)
	})
	t.Run("an ended context", func(t *testing.T) {
		s := newStore(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, r := auth.NewKeyRecord("", "team")
		_, keyErr := s.Key(ctx, r.Hash)
		_, keysErr := s.Keys(ctx)
		for what, err := range map[string]error{"PutKey": s.PutKey(ctx, r), "Key": keyErr, "Keys": keysErr, "DeleteKey": s.DeleteKey(ctx, r.ID)} {
			if errs.CodeOf(err) != errs.Unavailable {
				t.Errorf("%s = %v, want unavailable", what, err)
			}
		}
	})
}

func want(t *testing.T, what string, s auth.KeyStore, records ...auth.KeyRecord) {
	t.Helper()
	got, err := s.Keys(t.Context())
	if err != nil || fmt.Sprint(got) != fmt.Sprint(records) {
		t.Errorf("%s = %v, %v, want %v", what, got, err, records)
	}
}

// A Redis that is down is not a reason to take a key for invalid.
func TestRedisKeysUnavailable(t *testing.T) {
	server := routingtest.StartRedis(t)
	client := server.Client(t)
	s := auth.NewRedisKeys(client)
	key, r := auth.NewKeyRecord("", "team")
	if err := s.PutKey(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	server.Stop()
	ring := auth.NewKeyring(s, auth.KeyringOptions{LoadTimeout: 20 * time.Millisecond})
	if _, err := ring.Authorize(t.Context(), []byte(key)); errs.CodeOf(err) != errs.Unavailable {
		t.Errorf("Authorize with Redis down = %v, want unavailable", err)
	}
	server.Start()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		got, err := ring.Authorize(t.Context(), []byte(key))
		if err == nil && got == (auth.Principal{KeyID: r.ID, Team: "team"}) {
			return
		}
		if errs.CodeOf(err) != errs.Unavailable || time.Now().After(deadline) {
			t.Fatalf("Authorize after Redis came back = %v, %v", got, err)
		}
	}
}
