package proxy

import (
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"strconv"
)

// fault is how a request ends without the whole answer of a sandbox.
type fault struct {
	reason Reason
	text   string // what the client reads instead of the reason's own message; empty: that one
	err    error  // for the log
}

func (f *fault) Error() string {
	if f.err == nil {
		return f.reason.String()
	}
	return f.reason.String() + ": " + f.err.Error()
}

func (f *fault) Unwrap() error { return f.err }

// errorBody is the contract's JSON (4.7). The order of the fields is the contract's too.
type errorBody struct {
	SandboxID       string `json:"sandboxId,omitempty"`
	Message         string `json:"message"`
	Path            string `json:"path,omitempty"`
	Port            uint16 `json:"port,omitempty"`
	Code            int    `json:"code"`
	ConnectionLimit int    `json:"connectionLimit,omitempty"`
}

// subject is what a refusal may speak of.
type subject struct {
	sandbox string
	port    uint16
	path    string
	limit   int
	html    bool // a person's browser asks
	head    bool // the method was HEAD: no body
	close   bool // the connection ends with this answer
	keep    bool // an HTTP/1.0 client is told that it does not
}

// appendRefusal writes the whole answer for a fault. There is no CORS header on it: like E2B, the edge leaves that to apps.
func appendRefusal(dst []byte, f *fault, s *subject) []byte {
	r := &refusals[f.reason]
	message := r.message
	if f.text != "" {
		message = f.text
	}
	if r.limit {
		message = fmt.Sprintf(message, s.limit)
	}
	contentType, body := "text/plain; charset=utf-8", []byte(message)
	if r.format == formatBody {
		e := errorBody{Message: message, Code: r.status}
		switch {
		case !r.anonymous:
			e.SandboxID = s.sandbox
		case f.reason == ReasonControlPath:
			e.Path = s.path
		}
		if r.port {
			e.Port = s.port
		}
		if r.limit {
			e.ConnectionLimit = s.limit
		}
		if s.html && r.title != "" {
			contentType, body = "text/html; charset=utf-8", errorPage(r.title, &e)
		} else {
			contentType, body = "application/json; charset=utf-8", errorJSON(&e)
		}
	}
	dst = append(dst, "HTTP/1.1 "...)
	dst = strconv.AppendInt(dst, int64(r.status), 10)
	dst = append(dst, ' ')
	dst = append(dst, http.StatusText(r.status)...)
	dst = append(dst, "\r\nContent-Type: "...)
	dst = append(dst, contentType...)
	dst = append(dst, "\r\nContent-Length: "...)
	dst = strconv.AppendInt(dst, int64(len(body)), 10)
	dst = append(dst, "\r\nCache-Control: no-store\r\n"...) // a 404 may be cached without it
	if r.retryAfter != "" {
		dst = append(dst, "Retry-After: "...)
		dst = append(dst, r.retryAfter...)
		dst = append(dst, '\r', '\n')
	}
	switch {
	case s.close:
		dst = append(dst, "Connection: close\r\n"...)
	case s.keep:
		dst = append(dst, "Connection: keep-alive\r\n"...)
	}
	dst = append(dst, '\r', '\n')
	if s.head {
		return dst
	}
	return append(dst, body...)
}

func errorJSON(e *errorBody) []byte {
	body, err := json.Marshal(e)
	if err != nil {
		panic("BUG: encode error body: " + err.Error())
	}
	return body
}

// errorPage is what a person sees. It loads nothing, runs nothing, and everything in it that came from outside is escaped.
func errorPage(title string, e *errorBody) []byte {
	detail := ""
	if e.SandboxID != "" {
		detail += "<dt>Sandbox</dt><dd>" + html.EscapeString(e.SandboxID) + "</dd>"
	}
	if e.Port != 0 {
		detail += "<dt>Port</dt><dd>" + strconv.Itoa(int(e.Port)) + "</dd>"
	}
	if e.Path != "" {
		detail += "<dt>Path</dt><dd>" + html.EscapeString(e.Path) + "</dd>"
	}
	if detail != "" {
		detail = "<dl>" + detail + "</dl>\n"
	}
	return fmt.Appendf(nil, pageTemplate, html.EscapeString(title), e.Code, html.EscapeString(title), html.EscapeString(e.Message), detail)
}

const pageTemplate = `<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<title>%s</title>
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto 0;padding:0 1.5rem;color:#1c2733;background:#f7f8fa}
h1{font-size:1.5rem;margin:0 0 .5rem}
small{color:#66788a;letter-spacing:.08em}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1rem;margin-top:1.5rem;font-family:ui-monospace,monospace}
dt{color:#66788a}
dd{margin:0;overflow-wrap:anywhere}
@media (prefers-color-scheme:dark){body{color:#dde4ea;background:#14191f}}
</style>
</head>
<body>
<small>%d</small>
<h1>%s</h1>
<p>%s</p>
%s</body>
</html>`

// wantsPage tells a person's browser from a program by the contract's rule (4.7).
func (h *requestHead) wantsPage() bool {
	agent := h.get(fieldUserAgent)
	if agent == nil {
		return false
	}
	browser := false
	for _, name := range [...]string{"mozilla", "chrome", "safari", "firefox", "edge", "opera", "msie"} {
		if containsFold(agent, name) {
			browser = true
			break
		}
	}
	if !browser {
		return false
	}
	if accept := h.get(fieldAccept); containsFold(accept, "application/json") && !containsFold(accept, "text/html") {
		return false
	}
	mode := h.get(fieldSecFetchMode)
	for _, script := range [...]string{"cors", "no-cors", "same-origin", "websocket"} {
		if equalFold(mode, script) {
			return false
		}
	}
	return !h.has(fieldRequestedWith) || equalFold(mode, "navigate")
}
