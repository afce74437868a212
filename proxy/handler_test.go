package proxy

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/routing"
)

func TestRequestHeadOnTheWire(t *testing.T) {
	e := startEdge(t)
	b := echoHead(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: b.addr})
	e.sandbox(t, routing.Route{Sandbox: "masked", Mask: "localhost:${PORT}"}, map[uint16]string{3000: b.addr, envdPort: b.addr})

	const forwarded = "X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Host: %s\r\nX-Forwarded-Proto: http\r\n\r\n"
	tests := []struct{ name, host, request, want string }{
		{
			"names keep their case and order, values their bytes", "3000-isv.sluice.test",
			"GET /%40a(b)//c?a=1;b=2&c=%zz&d=4 HTTP/1.1\r\nx-oDD-case: 1\r\ncookie: a=b\r\nHost: 3000-isv.sluice.test\r\n" +
				"UsEr-AgEnT: t\r\nCookie: c=d\r\nX-Utf: \xc3\xa9\r\n",
			"GET /%40a(b)//c?a=1;b=2&c=%zz&d=4 HTTP/1.1\r\nx-oDD-case: 1\r\ncookie: a=b\r\nHost: 3000-isv.sluice.test\r\n" +
				"UsEr-AgEnT: t\r\nCookie: c=d\r\nX-Utf: \xc3\xa9\r\n",
		},
		{
			"hop-by-hop headers and what Connection names go", "3000-isv.sluice.test",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nConnection: keep-alive, X-Hop, Host\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n" +
				"Proxy-Authorization: x\r\nTE: gzip, trailers\r\nTrailer: X-T\r\nX-Stays: 1\r\n",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nTE: trailers\r\nTrailer: X-T\r\nX-Stays: 1\r\n",
		},
		{
			"our credentials and a stranger's claims go", "3000-isv.sluice.test",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nE2b-Traffic-Access-Token: x\r\nE2B-SANDBOX-ID: other\r\n" +
				"e2b-sandbox-port: 1\r\nX-Access-Token: envd\r\nX-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Port: 1\r\n" +
				"Forwarded: for=6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\nsluice-Forwarded-By: x\r\nAuthorization: stays\r\n",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nAuthorization: stays\r\n",
		},
		{
			"a stranger's claims go in other spellings, and under other proxies' names", "3000-isv.sluice.test",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nX_Forwarded_For: 6.6.6.6\r\nX-Forwarded_For: 6.6.6.6\r\nx.forwarded.proto: https\r\n" +
				"X_Real_IP: 6.6.6.6\r\nE2B_Traffic_Access_Token: x\r\nX_Access_Token: x\r\nContent_Length: 9\r\nSluice_Client: x\r\n" +
				"X_Forwarded_" + strings.Repeat("x", 40) + ": 6\r\nProxy: http://evil\r\nTrue-Client-IP: 6.6.6.6\r\nX-Client-IP: 6.6.6.6\r\n" +
				"CF-Connecting-IP: 6.6.6.6\r\nFastly-Client-IP: 6.6.6.6\r\nX-Cluster-Client-IP: 6.6.6.6\r\nX-Forwarded: 6.6.6.6\r\n" +
				"Forwarded-For: 6.6.6.6\r\nlang_version: 3.12\r\nsdk_runtime: x\r\nX_Forward: stays\r\nProxied: stays\r\n",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nlang_version: 3.12\r\nsdk_runtime: x\r\nX_Forward: stays\r\nProxied: stays\r\n",
		},
		{
			"a mask changes Host, Origin and Referer", "3000-masked.sluice.test:8080",
			"GET / HTTP/1.1\r\nHost: 3000-masked.sluice.test:8080\r\nOrigin: http://3000-MASKED.sluice.test:8080\r\n" +
				"Referer: http://3000-masked.sluice.test:8080/a?b\r\n",
			"GET / HTTP/1.1\r\nHost: localhost:3000\r\nOrigin: http://localhost:3000\r\nReferer: http://localhost:3000/a?b\r\n",
		},
		{
			"a mask leaves other origins alone", "3000-masked.sluice.test",
			"GET / HTTP/1.1\r\nHost: 3000-masked.sluice.test\r\nOrigin: http://8080-masked.sluice.test\r\nReferer: junk\r\n",
			"GET / HTTP/1.1\r\nHost: localhost:3000\r\nOrigin: http://8080-masked.sluice.test\r\nReferer: junk\r\n",
		},
		{
			"envd gets its token and no mask", "49983-masked.sluice.test",
			"GET /health HTTP/1.1\r\nHost: 49983-masked.sluice.test\r\nX-Access-Token: envd\r\n",
			"GET /health HTTP/1.1\r\nHost: 49983-masked.sluice.test\r\nX-Access-Token: envd\r\n",
		},
		{
			"routing headers route where the host does not", "127.0.0.1:1234",
			"GET / HTTP/1.1\r\nHost: 127.0.0.1:1234\r\nE2b-Sandbox-Id: isv\r\nE2b-Sandbox-Port: 3000\r\n",
			"GET / HTTP/1.1\r\nHost: 127.0.0.1:1234\r\n",
		},
		{
			"an absolute-form becomes an origin-form", "3000-isv.sluice.test",
			"GET http://3000-isv.sluice.test/a%2Fb?c HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n",
			"GET /a%2Fb?c HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n",
		},
		{
			"OPTIONS *", "3000-isv.sluice.test",
			"OPTIONS * HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n",
			"OPTIONS * HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n",
		},
		{
			"no switch to another HTTP", "3000-isv.sluice.test",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n",
		},
		{
			"nor under its other name", "3000-isv.sluice.test",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nConnection: Upgrade\r\nUpgrade: H2\r\n",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n",
		},
		{
			"no switch to one of several protocols", "3000-isv.sluice.test",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\nConnection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
			"GET / HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n",
		},
		{
			"no tunnel to envd", "49983-masked.sluice.test",
			"GET / HTTP/1.1\r\nHost: 49983-masked.sluice.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n",
			"GET / HTTP/1.1\r\nHost: 49983-masked.sluice.test\r\n",
		},
		{
			"an old client's answer is in its form", "3000-isv.sluice.test",
			"GET / HTTP/1.0\r\nHost: 3000-isv.sluice.test\r\nConnection: keep-alive\r\n",
			"GET / HTTP/1.0\r\nHost: 3000-isv.sluice.test\r\n",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := e.connect(t)
			for range 2 { // and again on the kept connection
				c.write(tt.request + "\r\n")
				_, body := c.response("GET")
				if want := tt.want + fmt.Sprintf(forwarded, tt.host); body != want {
					t.Fatalf("the sandbox got\n%q, want\n%q", body, want)
				}
			}
		})
	}
}

// Every answer of the edge itself, as bytes.
func TestRefusals(t *testing.T) {
	e := startEdge(t)
	b := echoHead(t)
	e.sandbox(t, routing.Route{Sandbox: "isv"}, map[uint16]string{3000: b.addr, envdPort: b.addr})
	e.sandbox(t, private("secret"), map[uint16]string{3000: b.addr, envdPort: b.addr})
	paused := private("paused")
	paused.State = routing.Paused
	e.sandbox(t, paused, nil)

	const (
		json = "application/json; charset=utf-8"
		text = "text/plain; charset=utf-8"
		miss = `{"sandboxId":"secret","message":"Sandbox is secured with traffic access token. Token header 'e2b-traffic-access-token' is missing","code":403}`
		bad  = `{"sandboxId":"secret","message":"Sandbox is secured with traffic access token. Provided token in header 'e2b-traffic-access-token' is invalid","code":403}`
	)
	control := func(path string) string {
		return `{"message":"This endpoint is reserved for the E2B control plane and is not reachable through the sandbox URL","path":"` + path + `","code":404}`
	}
	tests := []struct {
		host, target, headers string
		status                int
		contentType, body     string
	}{
		{"3000-nobody.sluice.test", "/", "", 502, json, `{"sandboxId":"nobody","message":"The sandbox was not found","code":502}`},
		{"9-isv.sluice.test", "/", "", 502, json, `{"sandboxId":"isv","message":"The sandbox is running but port is not open","port":9,"code":502}`},
		{"3000-secret.sluice.test", "/", "", 403, json, miss},
		{"3000-secret.sluice.test", "/", "e2b-traffic-access-token: no\r\n", 403, json, bad},
		{"3000-secret.sluice.test", "/", "e2b-traffic-access-token:\r\n", 403, json, bad},
		{"3000-secret.sluice.test", "/", "e2b-traffic-access-token: " + testToken + "\r\nE2B-Traffic-Access-Token: " + testToken + "\r\n", 403, json, bad},
		{"3000-secret.sluice.test", "/?e2b-traffic-access-token=" + testToken, "", 403, json, miss},
		{"3000-paused.sluice.test", "/", "", 403, json, strings.ReplaceAll(miss, "secret", "paused")},
		{"3000-paused.sluice.test", "/", "e2b-traffic-access-token: " + testToken + "\r\n", 502, json, `{"sandboxId":"paused","message":"The sandbox was not found","code":502}`},
		{"49983-isv.sluice.test", "/init", "", 404, json, control("/init")},
		{"49983-secret.sluice.test", "/freeze?x=1", "", 404, json, control("/freeze")},
		{"49983-isv.sluice.test", "//x/..//%69nit", "", 404, json, control("//x/..//%69nit")},
		{"49983-nobody.sluice.test", "/init", "", 502, json, `{"sandboxId":"nobody","message":"The sandbox was not found","code":502}`},
		{"sluice.test", "/", "", 400, text, "Invalid host"},
		{"x-isv.sluice.test", "/", "", 400, text, "Invalid sandbox port"},
		{"0-isv.sluice.test", "/", "", 400, text, "Invalid sandbox port"},
		{"3000-i_v.sluice.test", "/", "", 400, text, "Invalid sandbox ID"},
		{"3000-isv.other.test", "/", "", 400, text, "Invalid host"},
		{"localhost", "/", "", 400, text, "Invalid host"},
		{"localhost", "/", "E2b-Sandbox-Id: isv\r\n", 400, text, "missing header"},
		{"localhost", "/", "E2b-Sandbox-Id: isv\r\nE2b-Sandbox-Id: isv\r\nE2b-Sandbox-Port: 3000\r\n", 400, text, "Malformed request: more than one routing header"},
	}
	for _, tt := range tests {
		t.Run(tt.host+tt.target, func(t *testing.T) {
			before := b.heads.Load()
			c := e.connect(t)
			for range 2 { // the connection goes on
				c.write("GET " + tt.target + " HTTP/1.1\r\nHost: " + tt.host + "\r\n" + tt.headers + "\r\n")
				resp, body := c.response("GET")
				if resp.StatusCode != tt.status || resp.Header.Get("Content-Type") != tt.contentType || body != tt.body {
					t.Errorf("got %d %s %s\nwant %d %s %s", resp.StatusCode, resp.Header.Get("Content-Type"), body, tt.status, tt.contentType, tt.body)
				}
			}
			if b.heads.Load() != before {
				t.Error("the sandbox saw the request")
			}
		})
	}

	t.Run("what passes", func(t *testing.T) {
		for _, request := range []string{
			"GET / HTTP/1.1\r\nHost: 3000-secret.sluice.test\r\ne2b-traffic-access-token: " + testToken + "\r\n\r\n",
			"GET /init HTTP/1.1\r\nHost: 3000-isv.sluice.test\r\n\r\n",
			"GET /health HTTP/1.1\r\nHost: 49983-secret.sluice.test\r\n\r\n",
			"GET /initial HTTP/1.1\r\nHost: 49983-isv.sluice.test\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: 3000-ISV-legacy.SLUICE.test:99\r\n\r\n",
		} {
			c := e.connect(t)
			c.write(request)
			if resp, body := c.response("GET"); resp.StatusCode != 200 {
				t.Errorf("%q: %d %s", request, resp.StatusCode, body)
			}
		}
	})
}
