package guest

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

const (
	tokenHeader  = "X-Access-Token"
	unauthorized = "unauthorized access, please provide a valid access token or method signing if supported"
)

// The operations that a file URL can be signed for.
const (
	signRead  = "read"
	signWrite = "write"
)

// The reasons why a file request is refused, in the words that SDK users know.
var (
	errTokenMismatch    = errors.New("access token present in header but does not match")
	errNoSignature      = errors.New("missing signature query parameter")
	errBadSignature     = errors.New("invalid signature")
	errExpiredSignature = errors.New("signature is already expired")
)

// requireToken guards everything but the health probe, preflights and files, which may be signed instead and check for themselves.
func (a *agent) requireToken(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/health" || r.URL.Path == "/files" {
			next.ServeHTTP(w, r)
			return
		}
		if token := a.settings.get().token; token != "" && !sameSecret(token, r.Header.Get(tokenHeader)) {
			writeError(w, http.StatusUnauthorized, unauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// Signature is what the query parameter of that name must be for a signed file URL. An expiry of zero means that the URL does not expire.
func Signature(path, operation, user, token string, expiry int64) string {
	text := path + ":" + operation + ":" + user + ":" + token
	if expiry != 0 {
		text += ":" + strconv.FormatInt(expiry, 10)
	}
	sum := sha256.Sum256([]byte(text))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// checkFileAccess lets pass whoever holds the token or a signature for this path, user and operation.
func checkFileAccess(token, header, operation string, query url.Values, now time.Time) error {
	if token == "" {
		return nil
	}
	if header != "" {
		if !sameSecret(token, header) {
			return errTokenMismatch
		}
		return nil
	}
	signature := query.Get("signature")
	if signature == "" {
		return errNoSignature
	}
	var expiry int64
	if text := query.Get("signature_expiration"); text != "" {
		var err error
		// Zero would be read as "never expires" below, and was certainly not signed as such.
		if expiry, err = strconv.ParseInt(text, 10, 64); err != nil || expiry <= 0 {
			return errBadSignature
		}
	}
	if !sameSecret(Signature(query.Get("path"), operation, query.Get("username"), token, expiry), signature) {
		return errBadSignature
	}
	if expiry != 0 && expiry < now.Unix() {
		return errExpiredSignature
	}
	return nil
}
