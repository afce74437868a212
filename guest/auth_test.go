package guest

import (
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
)

const vectorToken = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0"

func TestSignatureVectors(t *testing.T) {
	check := func(expiry int64, want string) {
		t.Helper()
		if got := Signature("hello.txt", "read", "user", vectorToken, expiry); got != want {
			t.Errorf("Signature(expiry %d) = %s, want %s", expiry, got, want)
		}
	}
	check(0, "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E")
	check(1735689600, "v1_A0Bc5cjQ38VzxwNidSA95b0yxkjhtMKut4LMlJpD54c")
}

func TestFileAccess(t *testing.T) {
	now := time.Unix(1735689600, 0)
	good := Signature("hello.txt", "read", "user", vectorToken, 0)
	until := func(expiry int64) string { return Signature("hello.txt", "read", "user", vectorToken, expiry) }
	for _, c := range []struct {
		name, token, header, operation string
		query                          string
		want                           error
	}{
		{"no token, all open", "", "anything", "read", "", nil},
		{"header", vectorToken, vectorToken, "read", "", nil},
		{"header beats a bad signature", vectorToken, vectorToken, "read", "signature=x", nil},
		{"wrong header beats a good signature", vectorToken, "x", "read", "path=hello.txt&username=user&signature=" + url.QueryEscape(good), errTokenMismatch},
		{"nothing", vectorToken, "", "read", "path=hello.txt", errNoSignature},
		{"signed", vectorToken, "", "read", "path=hello.txt&username=user&signature=" + url.QueryEscape(good), nil},
		{"signed to read, used to write", vectorToken, "", "write", "path=hello.txt&username=user&signature=" + url.QueryEscape(good), errBadSignature},
		{"another path", vectorToken, "", "read", "path=hello.tx&username=user&signature=" + url.QueryEscape(good), errBadSignature},
		{"another user", vectorToken, "", "read", "path=hello.txt&signature=" + url.QueryEscape(good), errBadSignature},
		{"padded", vectorToken, "", "read", "path=hello.txt&username=user&signature=" + url.QueryEscape(good+"="), errBadSignature},
		{"not yet expired", vectorToken, "", "read", "path=hello.txt&username=user&signature_expiration=1735689600&signature=" +
			url.QueryEscape(until(1735689600)), nil},
		{"expired", vectorToken, "", "read", "path=hello.txt&username=user&signature_expiration=1735689599&signature=" +
			url.QueryEscape(until(1735689599)), errExpiredSignature},
		{"expired and wrong is wrong", vectorToken, "", "read", "path=hello.txt&username=user&signature_expiration=1&signature=x", errBadSignature},
		{"expiry added to an endless one", vectorToken, "", "read", "path=hello.txt&username=user&signature_expiration=0&signature=" +
			url.QueryEscape(good), errBadSignature},
		{"expiry no number", vectorToken, "", "read", "path=hello.txt&username=user&signature_expiration=1e99&signature=" +
			url.QueryEscape(good), errBadSignature},
		{"expiry taken away", vectorToken, "", "read", "path=hello.txt&username=user&signature=" + url.QueryEscape(until(1735689600)), errBadSignature},
	} {
		query, err := url.ParseQuery(c.query)
		if err != nil {
			t.Fatal(err)
		}
		if err := checkFileAccess(c.token, c.header, c.operation, query, now); !errors.Is(err, c.want) {
			t.Errorf("%s: checkFileAccess() = %v, want %v", c.name, err, c.want)
		}
	}
}

// Nobody gets in without the one signature that fits.
func FuzzFileAccess(f *testing.F) {
	f.Add("hello.txt", "user", "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E", "", false)
	f.Add("a:b", "c", "v1_", "9999999999", true)
	f.Fuzz(func(t *testing.T, path, user, signature, expiry string, write bool) {
		operation := map[bool]string{false: signRead, true: signWrite}[write]
		query := url.Values{"path": {path}, "username": {user}, "signature": {signature}, "signature_expiration": {expiry}}
		err := checkFileAccess(vectorToken, "", operation, query, time.Unix(1, 0))
		n, _ := strconv.ParseInt(expiry, 10, 64)
		if err == nil && signature != Signature(path, operation, user, vectorToken, n) {
			t.Errorf("%v passed", query)
		}
	})
}

func TestPublicPortAsksForTheToken(t *testing.T) {
	s := startAgent(t)
	mustInit(t, s, InitRequest{AccessToken: "secret"})
	check := func(method, path, token string, want int, body string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, s.url+path, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		if token != "" {
			req.Header.Set(tokenHeader, token)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		got, _ := io.ReadAll(res.Body)
		if res.StatusCode != want || !strings.Contains(string(got), body) {
			t.Errorf("%s %s with %q = %d %s, want %d %s", method, path, token, res.StatusCode, got, want, body)
		}
	}
	refused := `{"code":401,"message":"` + unauthorized + `"}`
	check("GET", "/health", "", 204, "")
	check("GET", "/metrics", "", 401, refused)
	check("GET", "/metrics", "Secret", 401, refused)
	check("GET", "/metrics", "secret", 200, `"cpu_count":`)
	check("GET", "/envs", "", 401, refused)
	check("GET", "/envs", "secret", 200, "{}")
	check("POST", "/process.Process/List", "", 401, refused)
	check("POST", "/process.Process/List", "secret", 200, "{}")
	check("POST", "/files/compose", "", 401, refused)
	check("GET", "/files?path=x", "", 401, `{"code":401,"message":"missing signature query parameter"}`)
	check("GET", "/files?path=x", "wrong", 401, errTokenMismatch.Error())
	check("GET", "/files?path=x", "secret", 404, "does not exist")
	check("GET", "/files?path=x&signature="+url.QueryEscape(Signature("x", "read", "", "secret", 0)), "", 404, "does not exist")
	check("POST", "/files?path=x", "", 401, errNoSignature.Error())
	check("GET", "/nowhere", "", 401, refused)
	check("GET", "/nowhere", "secret", 404, "")
	for _, path := range controlPaths {
		check("POST", path, "", 404, `"code":404`)
		check("POST", path, "secret", 404, `"code":404`)
	}
	check("POST", "//init", "secret", 404, "")
	check("POST", "/./init", "secret", 404, "")
}

func TestPreflight(t *testing.T) {
	s := startAgent(t)
	mustInit(t, s, InitRequest{AccessToken: "secret"})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodOptions, s.url+"/process.Process/Start", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Origin", "https://app.example")
	req.Header.Set("Access-Control-Request-Method", "POST")
	req.Header.Set("Access-Control-Request-Headers", "authorization,x-access-token")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	for name, want := range map[string]string{
		"Access-Control-Allow-Origin":  "*",
		"Access-Control-Allow-Methods": "HEAD, GET, POST, PUT, PATCH, DELETE",
		"Access-Control-Allow-Headers": "authorization,x-access-token",
		"Access-Control-Max-Age":       "7200",
	} {
		if got := res.Header.Get(name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	if res.StatusCode != http.StatusNoContent {
		t.Errorf("status = %d", res.StatusCode)
	}
}
