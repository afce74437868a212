package api

import (
	"math"
	"net/http"
	"strconv"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"
)

// limits bounds the calls of one key to one operation. An entry that was pushed out starts anew with a full burst, which is what a
// key that was silent for long has anyway.
type limits struct {
	rate    rate.Limit
	burst   int
	buckets *lru.Cache[bucketKey, *rate.Limiter]
}

type bucketKey struct{ keyID, operation string }

// maxBuckets is the number of (key, operation) pairs remembered, at some 200 bytes each.
const maxBuckets = 16384

// newLimits returns nil when there is no limit.
func newLimits(perSecond float64, burst int) (*limits, error) {
	if perSecond < 0 {
		return nil, nil
	}
	if perSecond == 0 {
		perSecond = 100
	}
	if burst <= 0 {
		burst = max(1, int(2*perSecond))
	}
	buckets, err := lru.New[bucketKey, *rate.Limiter](maxBuckets)
	if err != nil {
		return nil, err
	}
	return &limits{rate: rate.Limit(perSecond), burst: burst, buckets: buckets}, nil
}

// take takes one call out of the bucket and writes what is left into the header of the answer.
func (l *limits) take(header http.Header, keyID, operation string) error {
	if l == nil {
		return nil
	}
	key := bucketKey{keyID, operation}
	bucket, ok := l.buckets.Get(key)
	if !ok {
		bucket = rate.NewLimiter(l.rate, l.burst)
		if earlier, found, _ := l.buckets.PeekOrAdd(key, bucket); found {
			bucket = earlier
		}
	}
	now := time.Now()
	allowed := bucket.AllowN(now, 1)
	left := max(0, bucket.TokensAt(now))
	header.Set("RateLimit-Limit", strconv.Itoa(l.burst))
	header.Set("RateLimit-Remaining", strconv.Itoa(int(left)))
	header.Set("RateLimit-Reset", strconv.Itoa(int(math.Ceil((float64(l.burst)-left)/float64(l.rate)))))
	if allowed {
		return nil
	}
	return rateLimited(time.Duration((1 - left) / float64(l.rate) * float64(time.Second)))
}

func rateLimited(wait time.Duration) error {
	return &failure{status: http.StatusTooManyRequests, msg: "Rate limit exceeded", retryAfter: max(wait, time.Second)}
}
