package guest

import (
	"strconv"
	"strings"
)

// coding is how a body is encoded.
type coding uint8

const (
	codingNone coding = iota // nothing that the client accepts
	codingIdentity
	codingGzip
)

// chooseCoding reads Accept-Encoding (RFC 9110, 12.5.3). gzip wins wherever it is accepted and not ranked below identity: files travel
// through two proxies and a network, and SDKs ask for it.
func chooseCoding(accept string, present bool) coding {
	if !present {
		return codingIdentity
	}
	gzip, identity, star := -1.0, -1.0, -1.0
	for item := range strings.SplitSeq(accept, ",") {
		name, params, _ := strings.Cut(item, ";")
		q := quality(params)
		switch strings.ToLower(strings.TrimSpace(name)) {
		case "gzip", "x-gzip":
			gzip = q
		case "identity":
			identity = q
		case "*":
			star = q
		}
	}
	if gzip < 0 {
		gzip = max(star, 0)
	}
	switch {
	case identity >= 0:
	case star == 0:
		identity = 0
	default:
		// Acceptable unless excluded, but with no rank of its own.
		identity = 0.001
	}
	switch {
	case gzip > 0 && gzip >= identity:
		return codingGzip
	case identity > 0:
		return codingIdentity
	default:
		return codingNone
	}
}

// quality is the q of one item; one that makes no sense counts as refused.
func quality(params string) float64 {
	for param := range strings.SplitSeq(params, ";") {
		key, value, _ := strings.Cut(strings.TrimSpace(param), "=")
		if !strings.EqualFold(strings.TrimSpace(key), "q") {
			continue
		}
		q, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
		if err != nil || !(q >= 0 && q <= 1) {
			return 0
		}
		return q
	}
	return 1
}
