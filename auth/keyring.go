package auth

import (
	"context"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Principal is who a key stands for. Both parts may be logged.
type Principal struct {
	KeyID string
	Team  string
}

// KeyringOptions may be left zero.
type KeyringOptions struct {
	// TTL is how long a key is taken for valid without asking the store again, and so how long a deleted one still
	// works; zero means 10s.
	TTL time.Duration
	// UnknownTTL is how long a key that the store does not have is refused without asking again; zero means 1s, as somebody
	// may be creating it.
	UnknownTTL time.Duration
	// MaxKeys bounds the valid keys remembered, and apart from them the unknown ones; zero means 4096 each.
	MaxKeys int
	// LoadTimeout is how long a request waits for the store; zero means 2s.
	LoadTimeout time.Duration
	// MaxLoads bounds the reads in flight of keys that were not valid when last read, so that invented ones cannot load the store
	// without limit; zero means 64. A key that was valid is read whatever they do: of those there are MaxKeys at most.
	MaxLoads int
}

// Keyring answers whose key this is, from memory where it can. Answers of the store are remembered, its failures never.
type Keyring struct {
	// Fixed after NewKeyring.
	store KeyStore
	opts  KeyringOptions
	loads chan struct{} // a slot per read in flight of a stranger's key

	mu      sync.Mutex                         // guards the fields below; never held while the store is asked
	known   *simplelru.LRU[KeyHash, knownKey]  // valid when last read, also those whose time is over
	unknown *simplelru.LRU[KeyHash, time.Time] // refused until then
	flights map[KeyHash]*keyFlight
}

type knownKey struct {
	principal Principal
	until     time.Time
}

// keyFlight is one read of the store that any number of requests wait for.
type keyFlight struct {
	stranger bool // it holds a slot of loads

	// Written before done is closed.
	principal Principal
	err       error
	done      chan struct{}
}

var (
	errDenied   = errs.New(errs.Denied, "Invalid API key")
	errKeysBusy = errs.New(errs.Unavailable, "the key store does not keep up")
	errKeysSlow = errs.New(errs.Unavailable, "the key store does not answer")
)

// NewKeyring returns an empty keyring. It starts nothing.
func NewKeyring(store KeyStore, opts KeyringOptions) *Keyring {
	setDefault(&opts.TTL, 10*time.Second)
	setDefault(&opts.UnknownTTL, time.Second)
	setDefault(&opts.MaxKeys, 4096)
	setDefault(&opts.LoadTimeout, 2*time.Second)
	setDefault(&opts.MaxLoads, 64)
	return &Keyring{
		store:   store,
		opts:    opts,
		loads:   make(chan struct{}, opts.MaxLoads),
		known:   newLRU[KeyHash, knownKey](opts.MaxKeys),
		unknown: newLRU[KeyHash, time.Time](opts.MaxKeys),
		flights: make(map[KeyHash]*keyFlight),
	}
}

func setDefault[T comparable](field *T, value T) {
	if *field == *new(T) {
		*field = value
	}
}

func newLRU[K comparable, V any](size int) *simplelru.LRU[K, V] {
	cache, err := simplelru.NewLRU[K, V](max(size, 1), nil)
	if err != nil {
		panic("BUG: " + err.Error()) // only for a size below one
	}
	return cache
}

// Authorize answers whose key this is; a key that is remembered costs a hash and no allocation. Errors: Denied for what is no
// key, without asking the store when it has not even the form of one; Unavailable when the store does not answer; the
// context's when that ended.
func (k *Keyring) Authorize(ctx context.Context, key []byte) (Principal, error) {
	hash, ok := HashKey(key)
	if !ok {
		return Principal{}, errDenied
	}
	now := time.Now()
	k.mu.Lock()
	if have, ok := k.known.Get(hash); ok && now.Before(have.until) {
		k.mu.Unlock()
		return have.principal, nil
	}
	if until, ok := k.unknown.Get(hash); ok && now.Before(until) {
		k.mu.Unlock()
		return Principal{}, errDenied
	}
	f := k.flyLocked(ctx, hash)
	k.mu.Unlock()
	if f == nil {
		return Principal{}, errKeysBusy
	}
	timeout := time.NewTimer(k.opts.LoadTimeout)
	defer timeout.Stop()
	select {
	case <-f.done:
		return f.principal, f.err
	case <-timeout.C:
		return Principal{}, errKeysSlow
	case <-ctx.Done():
		return Principal{}, ctx.Err()
	}
}

// flyLocked returns the read in flight for a key, or starts one. Nil means that too many strangers' keys are being read.
func (k *Keyring) flyLocked(ctx context.Context, hash KeyHash) *keyFlight {
	if f := k.flights[hash]; f != nil {
		return f
	}
	f := &keyFlight{stranger: !k.known.Contains(hash), done: make(chan struct{})}
	if f.stranger {
		select {
		case k.loads <- struct{}{}:
		default:
			return nil
		}
	}
	k.flights[hash] = f
	go k.load(context.WithoutCancel(ctx), hash, f) // it serves all who wait, so it does not end with the first
	return f
}

// load reads one key. Its answer counts from when the read was sent off: a key deleted later may be served until then plus TTL.
func (k *Keyring) load(ctx context.Context, hash KeyHash, f *keyFlight) {
	ctx, cancel := context.WithTimeout(ctx, k.opts.LoadTimeout)
	defer cancel()
	defer func() {
		if f.stranger {
			<-k.loads
		}
	}()
	defer close(f.done)
	sent := time.Now()
	record, err := k.store.Key(ctx, hash)

	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.flights, hash)
	switch {
	case err == nil:
		f.principal = Principal{KeyID: record.ID, Team: record.Team}
		k.known.Add(hash, knownKey{principal: f.principal, until: sent.Add(k.opts.TTL)})
		k.unknown.Remove(hash)
	case errs.CodeOf(err) == errs.NotFound:
		f.err = errDenied
		k.known.Remove(hash)
		k.unknown.Add(hash, sent.Add(k.opts.UnknownTTL))
	default:
		f.err = err
	}
}
