package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// MinClusterKey is the shortest cluster key accepted, in bytes.
const MinClusterKey = 32

// ReadClusterKey reads the secret that edges and nodes share. White space at the ends does not count, so that the file may be
// made with an editor or by base64.
func ReadClusterKey(file string) ([]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("-cluster-key-file: %w", err)
	}
	key := bytes.TrimSpace(data)
	if len(key) < MinClusterKey {
		return nil, fmt.Errorf("-cluster-key-file %s holds %d bytes, want %d or more: head -c 32 /dev/urandom | base64 > %s", file, len(key), MinClusterKey, file)
	}
	return key, nil
}

const (
	// redisPoolSize is fixed: edges mostly read from memory, and a size by CPU count exhausts Redis on large hosts.
	redisPoolSize = 32
	// redisTimeout bounds one dial, read or write. A Redis that accepts and says nothing must look like one that is down
	// before a client's patience ends.
	redisTimeout = time.Second
)

// redisSilence drops what go-redis would print on standard error by itself: every failure also comes back as an error, and is
// logged where it is understood.
type redisSilence struct{}

// Printf implements go-redis's logger.
func (redisSilence) Printf(context.Context, string, ...any) {}

// OpenRedis makes a client for a redis:// or rediss:// URL: of one server, of a Sentinel group when the URL has ?master_name=,
// or of a cluster when it has ?addr= (further nodes). Nothing is dialled yet: a Redis that is down at start is like one that
// goes down later.
func OpenRedis(rawURL string) (redis.UniversalClient, error) {
	redis.SetLogger(redisSilence{})
	client, err := parseRedis(rawURL)
	if err != nil {
		return nil, fmt.Errorf("-redis: %w", withoutURL(err))
	}
	return client, nil
}

func parseRedis(rawURL string) (redis.UniversalClient, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, err
	}
	switch query := u.Query(); {
	case query.Has("master_name"):
		opts, err := redis.ParseFailoverURL(rawURL)
		if err != nil {
			return nil, err
		}
		opts.PoolSize, opts.ContextTimeoutEnabled = redisPoolSize, true
		opts.DialTimeout, opts.ReadTimeout, opts.WriteTimeout = redisTimeout, redisTimeout, redisTimeout
		return redis.NewFailoverClient(opts), nil
	case query.Has("addr"):
		opts, err := redis.ParseClusterURL(rawURL)
		if err != nil {
			return nil, err
		}
		opts.PoolSize, opts.ContextTimeoutEnabled = redisPoolSize, true
		opts.DialTimeout, opts.ReadTimeout, opts.WriteTimeout = redisTimeout, redisTimeout, redisTimeout
		return redis.NewClusterClient(opts), nil
	}
	opts, err := redis.ParseURL(rawURL)
	if err != nil {
		return nil, err
	}
	opts.PoolSize, opts.ContextTimeoutEnabled = redisPoolSize, true
	opts.DialTimeout, opts.ReadTimeout, opts.WriteTimeout = redisTimeout, redisTimeout, redisTimeout
	return redis.NewClient(opts), nil
}

// withoutURL keeps what is wrong with a URL and drops the URL itself, which may hold a password.
func withoutURL(err error) error {
	if parse, ok := errors.AsType[*url.Error](err); ok {
		return parse.Err
	}
	return err
}

// Listen opens a TCP listener and says in one line which flag named an address that cannot be had.
func Listen(flagName, addr string) (net.Listener, error) {
	if addr == "" {
		return nil, fmt.Errorf("%s is empty: give an address such as 127.0.0.1:8080", flagName)
	}
	ln, err := net.Listen("tcp", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s %s is taken by another program: stop it, or give another address", flagName, addr)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flagName, err)
	}
	return ln, nil
}

// Fields are what a daemon says of itself when it starts.
func Fields(version string, domains []string) []zap.Field {
	return []zap.Field{zap.String("version", version), zap.Strings("domains", domains)}
}
