package proxy

// maxChunkLine bounds the line before a chunk: a size and extensions that nobody but a few signing schemes uses.
// maxTrailer bounds the whole trailer section.
const (
	maxChunkLine = 512
	maxTrailer   = 8 << 10
)

// chunkScanner follows a chunked body without changing it, so that its bytes can pass as they are while we know where it
// ends and that no other parser can see another end. RFC 9112, 7.1, without the leniencies: no white space around the size,
// no bare LF anywhere, no trailer that speaks of framing, routing or credentials.
type chunkScanner struct {
	state chunkState
	left  int64 // of the chunk's data
	size  int   // digits of the size line, then bytes of the line or the trailer section
	name  [32]byte
	named int
}

type chunkState uint8

const (
	chunkSize      chunkState = iota // the digits
	chunkExtension                   // from the ';' to the CR
	chunkSizeLF
	chunkData
	chunkDataCR
	chunkDataLF
	trailerStart // at the beginning of a trailer line
	trailerName
	trailerValue
	trailerLF
	trailerEndLF
	chunkDone
)

// reset makes it ready for a new body.
func (s *chunkScanner) reset() { *s = chunkScanner{} }

func (s *chunkScanner) done() bool { return s.state == chunkDone }

// scan reads p up to the end of the body and returns how many bytes belong to it.
func (s *chunkScanner) scan(p []byte) (int, error) {
	for i := 0; i < len(p); {
		ch := p[i]
		switch s.state {
		case chunkSize:
			digit := hexTable[ch]
			switch {
			case digit < 16:
				if s.size++; s.size > 15 {
					return i, malformed("chunk size is too large")
				}
				s.left = s.left<<4 | int64(digit)
			case s.size == 0:
				return i, malformed("invalid chunk size")
			case ch == ';':
				s.state = chunkExtension
			case ch == '\r':
				s.state = chunkSizeLF
			default:
				return i, malformed("invalid chunk size")
			}
		case chunkExtension:
			if s.size++; s.size > maxChunkLine {
				return i, malformed("chunk extension is too long")
			}
			if ch == '\r' {
				s.state = chunkSizeLF
			} else if !valueTable[ch] {
				return i, malformed("invalid chunk extension")
			}
		case chunkSizeLF:
			if ch != '\n' {
				return i, malformed("invalid end of a chunk size")
			}
			s.size = 0
			s.state = chunkData
			if s.left == 0 {
				s.state = trailerStart
			}
		case chunkData:
			n := min(s.left, int64(len(p)-i))
			s.left -= n
			i += int(n)
			if s.left == 0 {
				s.state = chunkDataCR
			}
			continue
		case chunkDataCR:
			if ch != '\r' {
				return i, malformed("invalid end of a chunk")
			}
			s.state = chunkDataLF
		case chunkDataLF:
			if ch != '\n' {
				return i, malformed("invalid end of a chunk")
			}
			s.state = chunkSize
		case trailerStart:
			if ch == '\r' {
				s.state = trailerEndLF
				break
			}
			s.state, s.named = trailerName, 0
			continue
		case trailerName:
			if err := s.scanTrailerName(ch); err != nil {
				return i, err
			}
		case trailerValue:
			if ch == '\r' {
				s.state = trailerLF
			} else if !valueTable[ch] {
				return i, malformed("invalid trailer")
			}
		case trailerLF:
			if ch != '\n' {
				return i, malformed("invalid trailer")
			}
			s.state = trailerStart
		case trailerEndLF:
			if ch != '\n' {
				return i, malformed("invalid end of a body")
			}
			s.state = chunkDone
			return i + 1, nil
		case chunkDone:
			return i, nil
		}
		if s.state >= trailerStart {
			if s.size++; s.size > maxTrailer {
				return i, malformed("trailer section is too long")
			}
		}
		i++
	}
	return len(p), nil
}

func (s *chunkScanner) scanTrailerName(ch byte) error {
	if ch == ':' {
		if s.named == 0 || s.named <= len(s.name) && !trailerAllowed(s.name[:s.named]) {
			return malformed("forbidden trailer")
		}
		s.state = trailerValue
		return nil
	}
	if !tokenTable[ch] {
		return malformed("invalid trailer")
	}
	if s.named < len(s.name) {
		s.name[s.named] = ch
	}
	s.named++
	return nil
}

// trailerAllowed refuses what a receiver that merges trailers into the header would be misled by (RFC 9110, 6.5.1).
func trailerAllowed(name []byte) bool {
	switch fieldOf(name) {
	case fieldOther, fieldAccept, fieldUserAgent, fieldLocation, fieldOrigin, fieldReferer:
	default:
		return false
	}
	for _, forbidden := range [...]string{
		"authorization", "cookie", "content-encoding", "content-type", "content-range", "trailer", "range", "max-forwards",
	} {
		if equalFold(name, forbidden) {
			return false
		}
	}
	return true
}

var hexTable [256]byte

func init() {
	for i := range hexTable {
		hexTable[i] = 16
	}
	for i := range byte(10) {
		hexTable['0'+i] = i
	}
	for i := range byte(6) {
		hexTable['a'+i], hexTable['A'+i] = 10+i, 10+i
	}
}
