package api

import (
	"bytes"
	"context"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/sandboxd"
)

const (
	// maxLog is how much of a sandbox's log one call reads: as much as a machine keeps.
	maxLog = 512 << 10
	// maxLogLines bounds one answer.
	maxLogLines = 1000
)

// Who wrote a line: the value of the field "logger".
const (
	loggerAgent   = "agent"
	loggerConsole = "console"
)

// logLine is one line of what a sandbox has said. The sandbox chose all of it, its time included: it is fit to be shown, not to be believed.
type logLine struct {
	text  string // the whole line
	entry gen.SandboxLogEntry
}

// GetSandboxLogs implements GET /sandboxes/{sandboxID}/logs.
func (h *handler) GetSandboxLogs(ctx context.Context, req gen.GetSandboxLogsRequestObject) (gen.GetSandboxLogsResponseObject, error) {
	lines, err := h.logOf(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	q := logQuery{cursor: req.Params.Start, limit: maxLogLines}
	if req.Params.Limit != nil {
		q.limit = min(int(*req.Params.Limit), maxLogLines)
	}
	answer := gen.GetSandboxLogs200JSONResponse{Logs: []gen.SandboxLog{}, LogEntries: []gen.SandboxLogEntry{}}
	for _, line := range q.page(lines) {
		answer.Logs = append(answer.Logs, gen.SandboxLog{Timestamp: line.entry.Timestamp, Line: line.text})
		answer.LogEntries = append(answer.LogEntries, line.entry)
	}
	return answer, nil
}

// GetSandboxLogsPaged implements GET /v2/sandboxes/{sandboxID}/logs.
func (h *handler) GetSandboxLogsPaged(ctx context.Context, req gen.GetSandboxLogsPagedRequestObject) (gen.GetSandboxLogsPagedResponseObject, error) {
	lines, err := h.logOf(ctx, req.SandboxID)
	if err != nil {
		return nil, err
	}
	q := logQuery{cursor: req.Params.Cursor, limit: maxLogLines, level: deref(req.Params.Level), search: deref(req.Params.Search)}
	if req.Params.Limit != nil {
		q.limit = int(*req.Params.Limit)
	}
	q.backward = req.Params.Direction != nil && *req.Params.Direction == gen.LogsBackward
	answer := gen.GetSandboxLogsPaged200JSONResponse{Logs: []gen.SandboxLogEntry{}}
	for _, line := range q.page(lines) {
		answer.Logs = append(answer.Logs, line.entry)
	}
	return answer, nil
}

func (h *handler) logOf(ctx context.Context, rawID string) ([]logLine, error) {
	sb, err := h.visible(ctx, rawID)
	if err != nil {
		return nil, err
	}
	text, err := h.sandboxes.Log(ctx, sb.ID, maxLog)
	if err != nil {
		return nil, unseen(sb.ID, err)
	}
	if len(text) >= maxLog { // the first line may have lost its beginning
		_, text, _ = bytes.Cut(text, []byte("\n"))
	}
	if sb.State == sandboxd.StateRunning { // the last one may still be growing
		text = text[:bytes.LastIndexByte(text, '\n')+1]
	}
	return parseLog(text, sb.StartedAt), nil
}

// logQuery is what a log is asked for.
type logQuery struct {
	cursor   *int64 // Unix milliseconds; nil: from the beginning, or backward from the end
	limit    int
	backward bool
	level    gen.LogLevel // the lowest; empty: all
	search   string       // empty: all
}

var logLevels = []gen.LogLevel{gen.LogLevelDebug, gen.LogLevelInfo, gen.LogLevelWarn, gen.LogLevelError}

func (q *logQuery) matches(line logLine) bool {
	at := line.entry.Timestamp.UnixMilli()
	switch {
	case q.cursor != nil && !q.backward && at < *q.cursor, q.cursor != nil && q.backward && at > *q.cursor:
		return false
	case slices.Index(logLevels, line.entry.Level) < slices.Index(logLevels, q.level):
		return false
	default:
		return strings.Contains(line.entry.Message, q.search)
	}
}

// page returns what q asks for, in the order that it asks for.
func (q *logQuery) page(lines []logLine) []logLine {
	lines = slices.DeleteFunc(lines, func(line logLine) bool { return !q.matches(line) })
	if q.backward {
		slices.Reverse(lines)
	}
	return lines[:min(q.limit, len(lines))]
}

// parseLog makes entries of lines. The agent's have a time; others get that of the line before them, and those before all others the
// time of the first that has one. When none has, it is start.
func parseLog(text []byte, start time.Time) []logLine {
	var lines []logLine
	untimed := 0 // that many lines from the first have no time yet
	at := start.UTC()
	for raw := range bytes.Lines(text) {
		line := strings.TrimRight(string(raw), "\r\n")
		if line == "" {
			continue
		}
		entry, ok := parseAgentLine(line)
		if ok {
			at = entry.Timestamp
		} else {
			entry = gen.SandboxLogEntry{Message: printable(line), Level: gen.LogLevelInfo, Fields: map[string]string{"logger": loggerConsole}}
		}
		entry.Timestamp = at
		lines = append(lines, logLine{text: printable(line), entry: entry})
		if untimed == len(lines)-1 && !ok {
			untimed++
		}
	}
	if untimed < len(lines) {
		for i := range lines[:untimed] {
			lines[i].entry.Timestamp = lines[untimed].entry.Timestamp
		}
	}
	return lines
}

// maxLogFields bounds what is taken off one line.
const maxLogFields = 32

// parseAgentLine reads what slog's text handler writes: key=value pairs, quoted where they must be.
func parseAgentLine(line string) (gen.SandboxLogEntry, bool) {
	var none gen.SandboxLogEntry
	if !strings.HasPrefix(line, "time=") {
		return none, false
	}
	entry := gen.SandboxLogEntry{Fields: map[string]string{}}
	hasMessage := false
	for rest := line; rest != ""; {
		key, value, left, ok := cutPair(rest)
		if !ok || len(entry.Fields) >= maxLogFields {
			return none, false
		}
		rest = left
		switch key {
		case "time":
			at, err := time.Parse(time.RFC3339Nano, value)
			if err != nil {
				return none, false
			}
			entry.Timestamp = at.UTC()
		case "level":
			entry.Level, ok = levelOf(value)
			if !ok {
				return none, false
			}
		case "msg":
			entry.Message, hasMessage = printable(value), true
		default:
			entry.Fields[printable(key)] = printable(value)
		}
	}
	if entry.Timestamp.IsZero() || entry.Level == "" || !hasMessage || entry.Timestamp.Year() < 1 || entry.Timestamp.Year() > 9999 { // JSON has no other years
		return none, false
	}
	entry.Fields["logger"] = loggerAgent
	return entry, true
}

// cutPair takes the first key=value off a line, and the space after it.
func cutPair(line string) (key, value, rest string, ok bool) {
	if key, rest, ok = cutWord(line, "="); !ok || key == "" || !strings.HasPrefix(rest, "=") {
		return "", "", "", false
	}
	if value, rest, ok = cutWord(rest[1:], " "); !ok {
		return "", "", "", false
	}
	if rest != "" && rest[0] != ' ' {
		return "", "", "", false
	}
	return key, value, strings.TrimPrefix(rest, " "), true
}

// cutWord takes off a word, quoted or up to one of the characters in end.
func cutWord(s, end string) (word, rest string, ok bool) {
	if strings.HasPrefix(s, `"`) {
		quoted, err := strconv.QuotedPrefix(s)
		if err != nil {
			return "", "", false
		}
		word, err = strconv.Unquote(quoted)
		return word, s[len(quoted):], err == nil
	}
	i := strings.IndexAny(s, end)
	if i < 0 {
		i = len(s)
	}
	return s[:i], s[i:], true
}

func levelOf(text string) (gen.LogLevel, bool) {
	name, _, _ := strings.Cut(strings.ToLower(text), "+") // slog writes what lies between levels as INFO+2
	level := gen.LogLevel(name)
	return level, slices.Contains(logLevels, level)
}

// escapeSequences are what terminals obey: control sequences, strings such as a window's title, and the short ones.
var escapeSequences = regexp.MustCompile(`(?:\x1b\[|\x{9b})[0-?]*[ -/]*[@-~]?|(?:\x1b[\]PX^_]|[\x{9d}\x{90}\x{98}\x{9e}\x{9f}])[^\x07\x1b\x{9c}]*(?:\x07|\x1b\\|\x{9c})?|\x1b[ -/]*[0-~]?`)

// printable is what is left of a line when nothing in it can move a cursor, change a color or the direction of writing, or begin a new line.
func printable(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	s = escapeSequences.ReplaceAllString(s, "")
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return r
		case r == '\u2028' || r == '\u2029':
			return ' '
		case unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r):
			return -1
		default:
			return r
		}
	}, s)
}
