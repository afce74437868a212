package proxy

// field is a header name that means something to the edge; every other name is fieldOther and passes as it is.
type field uint8

const (
	fieldOther field = iota

	// Framing and the connection itself: each hop says its own.
	fieldConnection
	fieldContentLength
	fieldExpect
	fieldHopByHop // Keep-Alive, Proxy-*, HTTP2-Settings
	fieldHost
	fieldTE
	fieldTransferEncoding
	fieldUpgrade

	// What only the edge may say to a sandbox, or what the sandbox must not see.
	fieldForwarded // who came, by whom and how; Proxy, which is HTTP_PROXY to CGI; Sluice-*, in which our own parts speak to each other
	fieldAlias     // another spelling of a name that means something: see fieldOf
	fieldSandboxID
	fieldSandboxPort
	fieldTrafficToken
	fieldEnvdToken

	// What a mask changes.
	fieldOrigin
	fieldReferer
	fieldLocation
	fieldSetCookie
	fieldAllowOrigin

	// What tells a person's browser from a program.
	fieldAccept
	fieldRequestedWith
	fieldSecFetchMode
	fieldUserAgent

	fieldCount
)

// fieldOf names a header. It compares without regard to case and allocates nothing.
//
// CGI, WSGI and PHP hand names to applications with '_' in the place of '-', and some of every other sign: there
// X_Forwarded_For is X-Forwarded-For. What would become a name that means something to us is an alias, and not that name.
func fieldOf(name []byte) field {
	if allIn(name, &plainTable) {
		return plainField(name)
	}
	var folded [32]byte // longer than any name; a prefix may be the beginning of more
	n := copy(folded[:], name)
	for i, ch := range folded[:n] {
		if !plainTable[ch] {
			folded[i] = '-'
		}
	}
	if plainField(folded[:n]) != fieldOther {
		return fieldAlias
	}
	return fieldOther
}

// plainField names a header of letters, digits and '-'.
//
// Of the headers that name a client's address it knows those that common frameworks believe by default. Each proxy invents
// one; X-Forwarded-For is the one that a sandbox can rely on.
func plainField(name []byte) field {
	switch len(name) {
	case 2:
		if equalFold(name, "te") {
			return fieldTE
		}
	case 4:
		if equalFold(name, "host") {
			return fieldHost
		}
	case 5:
		if equalFold(name, "proxy") {
			return fieldForwarded
		}
	case 6:
		switch {
		case equalFold(name, "accept"):
			return fieldAccept
		case equalFold(name, "expect"):
			return fieldExpect
		case equalFold(name, "origin"):
			return fieldOrigin
		}
	case 7:
		switch {
		case equalFold(name, "upgrade"):
			return fieldUpgrade
		case equalFold(name, "referer"):
			return fieldReferer
		}
	case 8:
		if equalFold(name, "location") {
			return fieldLocation
		}
	case 9:
		switch {
		case equalFold(name, "forwarded"), equalFold(name, "x-real-ip"):
			return fieldForwarded
		}
	case 10:
		switch {
		case equalFold(name, "connection"):
			return fieldConnection
		case equalFold(name, "keep-alive"):
			return fieldHopByHop
		case equalFold(name, "user-agent"):
			return fieldUserAgent
		case equalFold(name, "set-cookie"):
			return fieldSetCookie
		}
	case 11:
		switch {
		case equalFold(name, "x-forwarded"), equalFold(name, "x-client-ip"):
			return fieldForwarded
		}
	case 13:
		if equalFold(name, "forwarded-for") {
			return fieldForwarded
		}
	case 14:
		switch {
		case equalFold(name, "true-client-ip"):
			return fieldForwarded
		case equalFold(name, "content-length"):
			return fieldContentLength
		case equalFold(name, "sec-fetch-mode"):
			return fieldSecFetchMode
		case equalFold(name, "e2b-sandbox-id"):
			return fieldSandboxID
		case equalFold(name, "x-access-token"):
			return fieldEnvdToken
		case equalFold(name, "http2-settings"):
			return fieldHopByHop
		}
	case 16:
		switch {
		case equalFold(name, "cf-connecting-ip"), equalFold(name, "fastly-client-ip"):
			return fieldForwarded
		case equalFold(name, "e2b-sandbox-port"):
			return fieldSandboxPort
		case equalFold(name, "x-requested-with"):
			return fieldRequestedWith
		}
	case 17:
		if equalFold(name, "transfer-encoding") {
			return fieldTransferEncoding
		}
	case 19:
		if equalFold(name, "x-cluster-client-ip") {
			return fieldForwarded
		}
	case 24:
		if equalFold(name, "e2b-traffic-access-token") {
			return fieldTrafficToken
		}
	case 27:
		if equalFold(name, "access-control-allow-origin") {
			return fieldAllowOrigin
		}
	}
	if hasPrefixFold(name, "x-forwarded-") || hasPrefixFold(name, "sluice-") {
		return fieldForwarded
	}
	if hasPrefixFold(name, "proxy-") {
		return fieldHopByHop
	}
	return fieldOther
}

// equalFold compares b with lower, which is in lower case and ASCII.
func equalFold(b []byte, lower string) bool {
	return len(b) == len(lower) && hasPrefixFold(b, lower)
}

func hasPrefixFold(b []byte, lower string) bool {
	if len(b) < len(lower) {
		return false
	}
	for i := range len(lower) {
		if lowerTable[b[i]] != lower[i] {
			return false
		}
	}
	return true
}

// sameFold compares two names or hosts without regard to case.
func sameFold(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if lowerTable[a[i]] != lowerTable[b[i]] {
			return false
		}
	}
	return true
}

func containsFold(b []byte, lower string) bool {
	for i := 0; i+len(lower) <= len(b); i++ {
		if hasPrefixFold(b[i:], lower) {
			return true
		}
	}
	return false
}

// nextElement cuts the first element from a comma-separated list.
func nextElement(list []byte) (element, rest []byte) {
	for i, ch := range list {
		if ch == ',' {
			return trimSpace(list[:i]), list[i+1:]
		}
	}
	return trimSpace(list), nil
}

func trimSpace(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}

// The bytes that RFC 9110 allows: in a token (5.6.2), in a field value (5.5), in a request target. A target may carry bytes
// above 0x7f, which no RFC allows and which curl and others send: they are forwarded byte for byte like the rest of it. It has no
// fragment (RFC 9112, 3.2): a '#' is where one server's path ends and another's goes on.
var (
	lowerTable  [256]byte
	tokenTable  [256]bool
	plainTable  [256]bool // of names that every server reads in the same way
	valueTable  [256]bool
	targetTable [256]bool
	hostTable   [256]bool // of names, IPv4 and IPv6 literals and ports; no user, no list, no escapes
)

func init() {
	for i := range 256 {
		ch := byte(i)
		lowerTable[i] = ch
		if ch >= 'A' && ch <= 'Z' {
			lowerTable[i] = ch + 'a' - 'A'
		}
		valueTable[i] = ch == '\t' || ch >= ' ' && ch != 0x7f
		targetTable[i] = ch > ' ' && ch != 0x7f && ch != '#'
		tokenTable[i] = ch >= '0' && ch <= '9' || ch >= 'a' && ch <= 'z' || ch >= 'A' && ch <= 'Z'
	}
	hostTable, plainTable = tokenTable, tokenTable
	plainTable['-'] = true
	for _, ch := range []byte(".-_:[]") {
		hostTable[ch] = true
	}
	for _, ch := range []byte("!#$%&'*+-.^_`|~") {
		tokenTable[ch] = true
	}
}

func allIn(b []byte, table *[256]bool) bool {
	for _, ch := range b {
		if !table[ch] {
			return false
		}
	}
	return true
}
