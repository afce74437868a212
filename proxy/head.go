package proxy

import (
	"bytes"
)

// Heads are read strictly: what two parsers could read in two ways is refused, never repaired. One parser of lines serves
// requests and answers, because a sandbox is as hostile as a client.

// malformed is an error in what the other side sent. Its text is shown to a client whose request it is.
type malformed string

func (m malformed) Error() string { return string(m) }

// maxLines bounds the header lines of a head; browsers send about 30.
const maxLines = 200

// line is one header line, as it is on the wire. The slices alias the head's bytes and die with them.
type line struct {
	raw   []byte // with its CRLF
	name  []byte
	value []byte // without the white space around it
	field field
}

// framing says where a body ends.
type framing uint8

const (
	framingNone framing = iota
	framingLength
	framingChunked
	framingClose // answers only: it ends with the connection
)

// fields is what requests and answers have in common.
type fields struct {
	lines []line // reused from head to head
	first [fieldCount]uint8
	twice [fieldCount]bool

	framing framing
	length  int64 // with framingLength

	// From Connection.
	close, keepAlive, upgrade bool
	listed                    bool // it names headers of the hop besides the well-known ones
}

// get returns the value of the first line with the name f, and nil when there is none.
func (h *fields) get(f field) []byte {
	if i := h.first[f]; i != 0 {
		return h.lines[i-1].value
	}
	return nil
}

func (h *fields) has(f field) bool { return h.first[f] != 0 }

// headEnd finds the empty line that ends a head. It looks at b[from:] only and returns the end, or 0 and where to look
// next time. A line that ends in a bare LF is refused at once: a peer that ends its lines so would wait for our answer
// while we wait for the end of its head.
func headEnd(b []byte, from int) (end, next int, err error) {
	for {
		i := bytes.IndexByte(b[from:], '\n')
		if i < 0 {
			return 0, from, nil
		}
		if i == 0 || b[from+i-1] != '\r' {
			return 0, from, malformed("line does not end in CRLF")
		}
		if i == 1 {
			return from + 2, from + 2, nil
		}
		from += i + 1
	}
}

// parse reads header lines up to the empty line that ends b.
func (h *fields) parse(b []byte) error {
	h.lines = h.lines[:0]
	h.first = [fieldCount]uint8{}
	h.twice = [fieldCount]bool{}
	h.framing, h.length = framingNone, 0
	h.close, h.keepAlive, h.upgrade, h.listed = false, false, false, false
	for {
		end := bytes.IndexByte(b, '\n') + 1
		if end < 2 || b[end-2] != '\r' {
			return malformed("line does not end in CRLF")
		}
		if end == 2 {
			return h.frame()
		}
		l, err := parseLine(b[:end])
		if err != nil {
			return err
		}
		if len(h.lines) == maxLines {
			return malformed("too many header lines")
		}
		h.lines = append(h.lines, l)
		if l.field != fieldOther {
			if h.first[l.field] == 0 {
				h.first[l.field] = uint8(len(h.lines)) // #nosec G115 -- maxLines
			} else {
				h.twice[l.field] = true
			}
			if l.field == fieldConnection {
				h.parseConnection(l.value)
			}
		}
		b = b[end:]
	}
}

// parseLine reads one header line, whose CRLF is part of raw.
func parseLine(raw []byte) (line, error) {
	colon := bytes.IndexByte(raw, ':')
	if colon <= 0 || !allIn(raw[:colon], &tokenTable) { // white space before the colon, and folded lines, end here
		return line{}, malformed("invalid header name")
	}
	value := trimSpace(raw[colon+1 : len(raw)-2])
	if !allIn(value, &valueTable) {
		return line{}, malformed("invalid header value")
	}
	return line{raw: raw, name: raw[:colon], value: value, field: fieldOf(raw[:colon])}, nil
}

func (h *fields) parseConnection(list []byte) {
	for list != nil {
		var option []byte
		option, list = nextElement(list)
		switch {
		case len(option) == 0:
		case equalFold(option, "close"):
			h.close = true
		case equalFold(option, "keep-alive"):
			h.keepAlive = true
		case equalFold(option, "upgrade"):
			h.upgrade = true
		default:
			h.listed = true
		}
	}
}

// frame reads the length of the body from Content-Length and Transfer-Encoding.
func (h *fields) frame() error {
	if h.has(fieldTransferEncoding) {
		if h.has(fieldContentLength) {
			return malformed("both Content-Length and Transfer-Encoding")
		}
		if h.twice[fieldTransferEncoding] || !equalFold(h.get(fieldTransferEncoding), "chunked") {
			return malformed("unsupported Transfer-Encoding")
		}
		h.framing = framingChunked
		return nil
	}
	if !h.has(fieldContentLength) {
		return nil
	}
	if h.twice[fieldContentLength] {
		return malformed("more than one Content-Length")
	}
	n, ok := parseLength(h.get(fieldContentLength))
	if !ok {
		return malformed("invalid Content-Length")
	}
	h.framing, h.length = framingLength, n
	return nil
}

// parseLength reads a decimal number of at most 18 digits: more than an exabyte is a mistake or an attack on arithmetic.
func parseLength(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	var n int64
	for _, ch := range b {
		if ch < '0' || ch > '9' {
			return 0, false
		}
		n = n*10 + int64(ch-'0')
	}
	return n, true
}

// isListed tells whether Connection names this header, which then belongs to the hop. What has a meaning to the edge cannot
// be taken away in this manner: Connection: Content-Length would change where the body ends.
func (h *fields) isListed(l *line) bool {
	if !h.listed || l.field != fieldOther {
		return false
	}
	for i := range h.lines {
		if h.lines[i].field != fieldConnection {
			continue
		}
		for list := h.lines[i].value; list != nil; {
			var option []byte
			option, list = nextElement(list)
			if sameFold(option, l.name) {
				return true
			}
		}
	}
	return false
}

// splitWords cuts a start line, whose CRLF is part of it, at its first two spaces. The third word may hold spaces.
func splitWords(startLine []byte) (first, second, third []byte, ok bool) {
	b := startLine[:len(startLine)-2]
	i := bytes.IndexByte(b, ' ')
	if i < 0 {
		return nil, nil, nil, false
	}
	first, b = b[:i], b[i+1:]
	j := bytes.IndexByte(b, ' ')
	if j < 0 {
		return first, b, nil, true
	}
	return first, b[:j], b[j+1:], true
}
