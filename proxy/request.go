package proxy

import (
	"bytes"
	"net/netip"
	"strconv"
)

// requestHead is a request's head, parsed. Everything in it aliases the connection's buffer and dies with the request.
type requestHead struct {
	fields

	line   []byte // the request line with its CRLF
	method []byte
	target []byte // as sent; only an absolute-form has lost its scheme and authority
	http10 bool

	expectContinue bool
}

// parse reads a whole head, from the request line to the empty line.
func (h *requestHead) parse(b []byte) error {
	start := bytes.IndexByte(b, '\n') + 1
	if start < 2 || b[start-2] != '\r' {
		return malformed("line does not end in CRLF")
	}
	method, target, version, ok := splitWords(b[:start])
	if !ok || len(method) == 0 || !allIn(method, &tokenTable) || len(target) == 0 || !allIn(target, &targetTable) {
		return malformed("invalid request line")
	}
	switch string(version) {
	case "HTTP/1.1":
		h.http10 = false
	case "HTTP/1.0":
		h.http10 = true
	default:
		return malformed("unsupported HTTP version")
	}
	if err := h.fields.parse(b[start:]); err != nil {
		return err
	}
	h.line, h.method, h.target = b[:start], method, target
	return h.check()
}

// check holds the request against the rules that need more than one line.
func (h *requestHead) check() error {
	if !h.has(fieldHost) {
		return malformed("missing Host")
	}
	if h.twice[fieldHost] {
		return malformed("more than one Host")
	}
	if host := h.get(fieldHost); len(host) == 0 || !allIn(host, &hostTable) {
		return malformed("invalid Host")
	}
	if h.http10 && h.has(fieldTransferEncoding) {
		return malformed("Transfer-Encoding in HTTP/1.0")
	}
	h.expectContinue = false
	if h.has(fieldExpect) && !h.http10 { // RFC 9110, 10.1.1: a server ignores it in HTTP/1.0
		if !equalFold(h.get(fieldExpect), "100-continue") || h.twice[fieldExpect] {
			return errExpectation
		}
		h.expectContinue = h.framing != framingNone
	}
	return h.checkTarget()
}

const errExpectation = malformed("unsupported expectation")

// checkTarget allows the forms of RFC 9112, 3.2 that make sense here, and turns an absolute-form into an origin-form:
// its authority is that of Host, and once Host is masked it would contradict it.
func (h *requestHead) checkTarget() error {
	switch {
	case string(h.method) == "CONNECT":
		return malformed("CONNECT is not supported")
	case h.target[0] == '/':
		return nil
	case string(h.target) == "*":
		if string(h.method) != "OPTIONS" {
			return malformed("invalid request target")
		}
		return nil
	}
	rest := h.target
	switch {
	case hasPrefixFold(rest, "http://"):
		rest = rest[len("http://"):]
	case hasPrefixFold(rest, "https://"):
		rest = rest[len("https://"):]
	default:
		return malformed("invalid request target")
	}
	end := bytes.IndexAny(rest, "/?")
	if end < 0 {
		end = len(rest)
	}
	if !sameFold(rest[:end], h.get(fieldHost)) {
		return malformed("request target and Host differ")
	}
	if end == len(rest) || rest[end] != '/' {
		return malformed("absolute request target without a path")
	}
	h.target = rest[end:]
	return nil
}

// wantsUpgrade returns the protocol to switch to, and nil for an ordinary request. A switch to another HTTP would let the
// client send requests that nobody decides about, a request with a body is in no need of one, and of several protocols we
// would not know which: these are ordinary.
func (h *requestHead) wantsUpgrade() []byte {
	if !h.upgrade || h.http10 || h.framing == framingChunked || h.length > 0 || h.twice[fieldUpgrade] {
		return nil
	}
	protocol := h.get(fieldUpgrade)
	if len(protocol) == 0 || bytes.IndexByte(protocol, ',') >= 0 {
		return nil
	}
	for _, http := range [...]string{"h2", "http/", "tls/"} {
		if hasPrefixFold(protocol, http) {
			return nil
		}
	}
	return protocol
}

// persistent tells whether the client wants the connection to go on after the answer.
func (h *requestHead) persistent() bool {
	if h.http10 {
		return h.keepAlive && !h.close
	}
	return !h.close
}

// idempotent methods may be repeated when nobody knows whether the first try was served (RFC 9110, 9.2.2).
func (h *requestHead) idempotent() bool {
	switch string(h.method) {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE":
		return true
	}
	return false
}

// rewrite is what changes between the head that came and the one that goes.
type rewrite struct {
	client   netip.Addr
	tls      bool   // how the client came
	mask     string // Host for the sandbox; empty: the public one
	port     uint16 // what ${PORT} in the mask stands for
	envd     bool   // the request goes to envd, which needs its token
	trusted  bool   // it goes to our own API: no credential is taken out
	protocol []byte // of an upgrade, or nil
}

// appendRequest writes the head that goes to the sandbox. Lines keep their order, their bytes and the case of their names.
//
// X-Forwarded-For, -Host and -Proto are always set, and what a stranger said in them or in any spelling of them, in Forwarded,
// X-Real-Ip and the like goes: a sandbox can believe what it reads there.
func (h *requestHead) appendRequest(dst []byte, rw *rewrite) []byte {
	dst = append(dst, h.method...)
	dst = append(dst, ' ')
	dst = append(dst, h.target...)
	if h.http10 {
		dst = append(dst, " HTTP/1.0\r\n"...) // so that the answer is in a form that the client reads
	} else {
		dst = append(dst, " HTTP/1.1\r\n"...)
	}
	host := h.get(fieldHost)
	for i := range h.lines {
		l := &h.lines[i]
		switch l.field {
		case fieldOther:
			if h.isListed(l) {
				continue
			}
		case fieldConnection, fieldHopByHop, fieldUpgrade, fieldExpect, fieldForwarded, fieldAlias:
			continue
		case fieldSandboxID, fieldSandboxPort, fieldTrafficToken:
			if !rw.trusted {
				continue
			}
		case fieldEnvdToken:
			if !rw.envd && !rw.trusted {
				continue
			}
		case fieldTE:
			if !hasElement(l.value, "trailers") {
				continue
			}
			dst = append(dst, "TE: trailers\r\n"...)
			continue
		case fieldHost:
			if rw.mask != "" {
				dst = append(dst, "Host: "...)
				dst = appendMask(dst, rw.mask, rw.port)
				dst = append(dst, '\r', '\n')
				continue
			}
		case fieldOrigin, fieldReferer:
			if from, to, ok := authorityOf(l.value); ok && rw.mask != "" && sameFold(l.value[from:to], host) {
				dst = append(dst, l.name...)
				dst = append(dst, ':', ' ')
				dst = append(dst, l.value[:from]...)
				dst = appendMask(dst, rw.mask, rw.port)
				dst = append(dst, l.value[to:]...)
				dst = append(dst, '\r', '\n')
				continue
			}
		}
		dst = append(dst, l.raw...)
	}
	if rw.protocol != nil {
		dst = append(dst, "Connection: Upgrade\r\nUpgrade: "...)
		dst = append(dst, rw.protocol...)
		dst = append(dst, '\r', '\n')
	}
	dst = append(dst, "X-Forwarded-For: "...)
	dst = rw.client.AppendTo(dst)
	dst = append(dst, "\r\nX-Forwarded-Host: "...)
	dst = append(dst, host...)
	dst = append(dst, "\r\nX-Forwarded-Proto: "...)
	dst = append(dst, scheme(rw.tls)...)
	return append(dst, "\r\n\r\n"...)
}

func scheme(tls bool) string {
	if tls {
		return "https"
	}
	return "http"
}

func hasElement(list []byte, lower string) bool {
	for list != nil {
		var element []byte
		element, list = nextElement(list)
		if equalFold(element, lower) {
			return true
		}
	}
	return false
}

// appendMask writes a mask with the requested port in the place of ${PORT}.
func appendMask(dst []byte, mask string, port uint16) []byte {
	const placeholder = "${PORT}"
	for i := 0; i < len(mask); i++ {
		if len(mask)-i >= len(placeholder) && mask[i:i+len(placeholder)] == placeholder {
			dst = strconv.AppendUint(dst, uint64(port), 10)
			i += len(placeholder) - 1
			continue
		}
		dst = append(dst, mask[i])
	}
	return dst
}

// authorityOf finds host and port in an http, https or scheme-relative URL: url[from:to]. The Host of another scheme is not
// what a mask is about.
func authorityOf(url []byte) (from, to int, ok bool) {
	for _, start := range [...]string{"//", "http://", "https://"} {
		if hasPrefixFold(url, start) {
			from = len(start)
		}
	}
	if from == 0 {
		return 0, 0, false
	}
	to = len(url)
	if i := bytes.IndexAny(url[from:], "/?#"); i >= 0 {
		to = from + i
	}
	return from, to, to > from
}
