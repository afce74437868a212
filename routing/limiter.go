package routing

import (
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// limiter bounds how many absent names one client may ask the store about: a token bucket per client, kept as the time at
// which it is full again (GCRA). The number of clients is bounded; one that is forgotten starts with a full bucket.
type limiter struct {
	interval time.Duration // between two tokens
	burst    time.Duration // as time: interval times the size of the bucket

	mu      sync.Mutex // guards the field below
	clients *simplelru.LRU[netip.Addr, time.Duration]
}

func newLimiter(perSecond float64, burst, clients int) *limiter {
	interval := time.Duration(float64(time.Second) / perSecond)
	return &limiter{interval: interval, burst: interval * time.Duration(burst), clients: newLRU[netip.Addr, time.Duration](clients)}
}

// take takes a token at now, counted from the Table's start, and tells whether there was one.
func (l *limiter) take(client netip.Addr, now time.Duration) bool {
	client = subscriber(client)
	l.mu.Lock()
	defer l.mu.Unlock()
	full, _ := l.clients.Get(client)
	full = max(full, now) + l.interval
	if full-now > l.burst {
		return false
	}
	l.clients.Add(client, full)
	return true
}

// giveBack returns a token that was taken for a name which turned out to exist.
func (l *limiter) giveBack(client netip.Addr) {
	client = subscriber(client)
	l.mu.Lock()
	defer l.mu.Unlock()
	if full, ok := l.clients.Peek(client); ok {
		l.clients.Add(client, full-l.interval)
	}
}

// subscriber is the unit that is limited: an IPv4 address, or the /64 that one IPv6 subscriber has to himself.
func subscriber(client netip.Addr) netip.Addr {
	client = client.Unmap()
	if !client.Is6() {
		return client
	}
	return netip.PrefixFrom(client.WithZone(""), 64).Masked().Addr()
}

func newLRU[K comparable, V any](size int) *simplelru.LRU[K, V] {
	cache, err := simplelru.NewLRU[K, V](max(size, 1), nil)
	if err != nil {
		panic("BUG: " + err.Error()) // only for a size below one
	}
	return cache
}
