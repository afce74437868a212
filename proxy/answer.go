package proxy

import "bytes"

// answerHead is an answer's head, parsed in place in the exchange's buffer.
type answerHead struct {
	fields

	raw    []byte // from the status line to the empty line
	line   []byte // the status line with its CRLF
	status int
	http10 bool
}

// parse reads a whole head. Whether there is a body depends on the request too: noBody says that it was a HEAD.
func (a *answerHead) parse(b []byte, noBody bool) error {
	start := bytes.IndexByte(b, '\n') + 1
	if start < 2 || b[start-2] != '\r' {
		return malformed("line does not end in CRLF")
	}
	version, code, reason, ok := splitWords(b[:start])
	if !ok || len(code) != 3 || !allIn(reason, &valueTable) {
		return malformed("invalid status line")
	}
	switch string(version) {
	case "HTTP/1.1":
		a.http10 = false
	case "HTTP/1.0":
		a.http10 = true
	default:
		return malformed("unsupported HTTP version")
	}
	status, ok := parseLength(code)
	if !ok || status < 100 || status > 999 {
		return malformed("invalid status code")
	}
	if err := a.fields.parse(b[start:]); err != nil {
		return err
	}
	a.raw, a.line, a.status = b, b[:start], int(status)
	if a.http10 && a.has(fieldTransferEncoding) {
		return malformed("Transfer-Encoding in HTTP/1.0")
	}
	if (status < 200 || status == 204) && (a.framing == framingChunked || a.length > 0) {
		a.close = true // such an answer has no body, but who announces one may send one: where the next begins is not known
	}
	switch {
	case noBody, status < 200, status == 204, status == 304:
		a.framing = framingNone // whatever Content-Length says: it speaks of the answer to a GET
	case a.framing == framingNone:
		a.framing = framingClose
	case a.framing == framingLength && a.length == 0:
		a.framing = framingNone
	}
	return nil
}

// persistent tells whether the sandbox keeps its connection open after this answer.
func (a *answerHead) persistent() bool {
	if a.framing == framingClose {
		return false
	}
	if a.http10 {
		return a.keepAlive && !a.close
	}
	return !a.close
}

// misframed tells whether a line speaks of a body where there is none by RFC 9112, 6.1 and RFC 9110, 8.6. We know that; a
// proxy in front of us may wait for it. In a 304, as in the answer to a HEAD, Content-Length speaks of another answer.
func (a *answerHead) misframed(f field) bool {
	switch {
	case a.status < 200, a.status == 204:
		return f == fieldContentLength || f == fieldTransferEncoding
	case a.status == 304:
		return f == fieldTransferEncoding
	}
	return false
}

// answerRewrite is what changes in an answer.
type answerRewrite struct {
	mask     []byte // the Host that the sandbox saw; empty: nothing was masked
	host     []byte // the Host that the client sent
	tls      bool
	close    bool // tell the client that the connection ends with this answer
	keep     bool // tell an HTTP/1.0 client that it does not
	protocol bool // an upgrade was agreed: Upgrade passes
}

// untouched tells whether the head may pass byte for byte.
func (a *answerHead) untouched(rw *answerRewrite) bool {
	if a.http10 || rw.close || rw.keep || rw.protocol ||
		a.has(fieldConnection) || a.has(fieldHopByHop) || a.has(fieldUpgrade) || a.has(fieldTE) {
		return false
	}
	for _, f := range [...]field{fieldContentLength, fieldTransferEncoding} {
		if a.has(f) && a.misframed(f) {
			return false
		}
	}
	return len(rw.mask) == 0 || !a.has(fieldLocation) && !a.has(fieldSetCookie) && !a.has(fieldAllowOrigin)
}

// appendAnswer writes the head that goes to the client.
func (a *answerHead) appendAnswer(dst []byte, rw *answerRewrite) []byte {
	dst = append(dst, "HTTP/1.1"...) // a proxy says its own version
	dst = append(dst, a.line[len("HTTP/1.1"):]...)
	for i := range a.lines {
		l := &a.lines[i]
		switch l.field {
		case fieldOther:
			if a.isListed(l) {
				continue
			}
		case fieldConnection, fieldHopByHop, fieldTE:
			continue
		case fieldContentLength, fieldTransferEncoding:
			if a.misframed(l.field) {
				continue
			}
		case fieldUpgrade:
			// An offer (RFC 9110, 7.8) may be one that we would not carry, and an agreement is said below. Only a 426 is
			// nothing without it.
			if a.status != 426 {
				continue
			}
		case fieldLocation, fieldAllowOrigin:
			if from, to, ok := authorityOf(l.value); ok && len(rw.mask) > 0 && sameFold(l.value[from:to], rw.mask) {
				dst = append(dst, l.name...)
				dst = append(dst, ':', ' ')
				if from > len("//") {
					dst = append(dst, scheme(rw.tls)...)
					dst = append(dst, ':')
				}
				dst = append(dst, '/', '/')
				dst = append(dst, rw.host...)
				dst = append(dst, l.value[to:]...)
				dst = append(dst, '\r', '\n')
				continue
			}
		case fieldSetCookie:
			if len(rw.mask) > 0 {
				dst = append(dst, l.name...)
				dst = append(dst, ':', ' ')
				dst = appendCookie(dst, l.value, hostOnly(rw.mask), hostOnly(rw.host))
				dst = append(dst, '\r', '\n')
				continue
			}
		}
		dst = append(dst, l.raw...)
	}
	switch {
	case rw.protocol:
		dst = append(dst, "Connection: Upgrade\r\n"...)
		if protocol := a.get(fieldUpgrade); protocol != nil {
			dst = append(dst, "Upgrade: "...)
			dst = append(dst, protocol...)
			dst = append(dst, '\r', '\n')
		}
	case rw.close:
		dst = append(dst, "Connection: close\r\n"...)
	case rw.keep:
		dst = append(dst, "Connection: keep-alive\r\n"...)
	}
	return append(dst, '\r', '\n')
}

// appendCookie writes a cookie with host in each Domain attribute that says mask. A browser takes the last of them, with or
// without a dot before it and white space around it (RFC 6265, 5.2).
func appendCookie(dst, cookie, mask, host []byte) []byte {
	for first := true; ; first = false {
		attribute, end := cookie, bytes.IndexByte(cookie, ';')
		if end >= 0 {
			attribute = cookie[:end]
		}
		equals := bytes.IndexByte(attribute, '=')
		domain := bytes.TrimPrefix(trimSpace(attribute[equals+1:]), []byte{'.'})
		if !first && equals >= 0 && equalFold(trimSpace(attribute[:equals]), "domain") && sameFold(hostOnly(domain), mask) {
			from := equals + 1 + bytes.Index(attribute[equals+1:], domain)
			dst = append(dst, attribute[:from]...)
			dst = append(dst, host...)
			dst = append(dst, attribute[from+len(domain):]...)
		} else {
			dst = append(dst, attribute...)
		}
		if end < 0 {
			return dst
		}
		dst = append(dst, ';')
		cookie = cookie[end+1:]
	}
}

// hostOnly cuts the port from an authority.
func hostOnly(authority []byte) []byte {
	i := bytes.LastIndexByte(authority, ':')
	if i < 0 || bytes.IndexByte(authority[i:], ']') >= 0 {
		return authority
	}
	return authority[:i]
}
