package api

import (
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/sandboxd"
)

const someLog = "[    0.5] kernel: hello\r\n" +
	"\x1b[31mred\x1b[0m \x1b]0;title\x07plain\x00\r\n" +
	"\n" +
	`time=2026-11-29T12:00:01.000Z level=DEBUG msg="process started" pid=7 cmd="sh -c \"x\""` + "\n" +
	`time=2026-11-29T12:00:02.500+01:00 level=WARN msg=late` + "\n" +
	"out of band\n" +
	`time=2026-11-29T12:00:03Z level=ERROR+1 msg="a\x1b[2Jb" error=` + "\n" +
	`time=yesterday level=INFO msg=x` + "\n" +
	"still being writ"

func TestLogs(t *testing.T) {
	s := newSite(t, nil)
	s.boxes.set("ix", func(sb *sandboxd.Sandbox) {
		sb.State, sb.Team, sb.StartedAt = sandboxd.StateRunning, "team-a", time.Unix(5, 0)
	})
	type paged struct{ Logs []gen.SandboxLogEntry }
	if got := mustDecode[paged](t, s.call("GET", "/v2/sandboxes/ix/logs", "")); got.Logs == nil || len(got.Logs) != 0 {
		t.Errorf("logs of a silent sandbox = %v, want none", got.Logs)
	}
	s.boxes.logs["ix"] = someLog
	all := mustDecode[paged](t, s.call("GET", "/v2/sandboxes/ix/logs", "")).Logs
	var text []string
	for _, e := range all {
		text = append(text, fmt.Sprintf("%s %s %s %v", e.Timestamp.Format("15:04:05.0"), e.Level, e.Message, e.Fields))
	}
	want := []string{
		"12:00:01.0 info [    0.5] kernel: hello map[logger:console]",
		"12:00:01.0 info red plain map[logger:console]",
		`12:00:01.0 debug process started map[cmd:sh -c "x" logger:agent pid:7]`,
		"11:00:02.5 warn late map[logger:agent]",
		"11:00:02.5 info out of band map[logger:console]",
		"12:00:03.0 error ab map[error: logger:agent]",
		"12:00:03.0 info time=yesterday level=INFO msg=x map[logger:console]",
	}
	if !slices.Equal(text, want) {
		t.Errorf("logs =\n%s\nwant\n%s", strings.Join(text, "\n"), strings.Join(want, "\n"))
	}
	late := time.Date(2026, 11, 29, 12, 0, 3, 0, time.UTC).UnixMilli()
	for _, test := range []struct {
		query string
		want  []int // of all
	}{
		{"?limit=2", []int{0, 1}},
		{"?limit=0", []int{}},
		{"?limit=2&direction=backward", []int{6, 5}},
		{"?limit=2&direction=forward", []int{0, 1}},
		{fmt.Sprintf("?cursor=%d", late), []int{5, 6}},
		{fmt.Sprintf("?direction=backward&cursor=%d", late-1), []int{4, 3, 2, 1, 0}},
		{"?level=warn", []int{3, 5}},
		{"?level=debug&search=s", []int{2, 6}},
		{"?search=LATE", []int{}},
	} {
		got := mustDecode[paged](t, s.call("GET", "/v2/sandboxes/ix/logs"+test.query, "")).Logs
		var expected []string
		for _, i := range test.want {
			expected = append(expected, all[i].Message)
		}
		if !slices.EqualFunc(got, expected, func(e gen.SandboxLogEntry, message string) bool { return e.Message == message }) {
			t.Errorf("logs%s = %+v, want the messages %q", test.query, got, expected)
		}
	}
	old := mustDecode[struct {
		Logs       []gen.SandboxLog
		LogEntries []gen.SandboxLogEntry
	}](t, s.call("GET", fmt.Sprintf("/sandboxes/ix/logs?start=%d&limit=5000", late), ""))
	if len(old.Logs) != 2 || len(old.LogEntries) != 2 || old.Logs[0].Line != `time=2026-11-29T12:00:03Z level=ERROR+1 msg="a\x1b[2Jb" error=` || old.LogEntries[0].Message != "ab" {
		t.Errorf("v1 logs = %+v", old)
	}
	// What a paused sandbox said last will not grow any more.
	s.boxes.set("ix", func(sb *sandboxd.Sandbox) { sb.State = sandboxd.StatePaused })
	if got := mustDecode[paged](t, s.call("GET", "/v2/sandboxes/ix/logs?direction=backward&limit=1", "")).Logs; got[0].Message != "still being writ" {
		t.Errorf("last line of a paused sandbox = %+v", got)
	}
}

// TestLogsAreBounded: a sandbox can say as much as it likes.
func TestLogsAreBounded(t *testing.T) {
	s := newSite(t, nil)
	s.boxes.set("ix", func(sb *sandboxd.Sandbox) { sb.State, sb.Team = sandboxd.StateRunning, "team-a" })
	s.boxes.logs["ix"] = strings.Repeat("0123456789\n", maxLog/5)
	for _, path := range []string{"/sandboxes/ix/logs?limit=1000000", "/v2/sandboxes/ix/logs"} {
		got := s.call("GET", path, "")
		if n := strings.Count(string(got.body), `"message"`); n != maxLogLines || strings.Contains(string(got.body), `"message":"123`) {
			t.Errorf("GET %s has %d lines, want %d whole ones", path, n, maxLogLines)
		}
	}
	s.boxes.logs["ix"] = strings.Repeat("x", 2*maxLog) + "\nlast\n"
	if got := s.call("GET", "/v2/sandboxes/ix/logs", ""); len(got.body) > 200 || !strings.Contains(string(got.body), `"last"`) {
		t.Errorf("after a line without end: %d bytes", len(got.body))
	}
}

func TestLogSearchIsEncodedAsSent(t *testing.T) {
	s := newSite(t, nil)
	s.boxes.set("ix", func(sb *sandboxd.Sandbox) { sb.State, sb.Team = sandboxd.StatePaused, "team-a" })
	s.boxes.logs["ix"] = "a&b=ü\nother"
	got := s.call("GET", "/v2/sandboxes/ix/logs?search="+url.QueryEscape("&b=ü"), "")
	if !strings.Contains(string(got.body), `a\u0026b=ü`) || strings.Contains(string(got.body), "other") {
		t.Errorf("search = %s", got.body)
	}
}

// FuzzParseLog: whatever a sandbox writes is shown as harmless text, in JSON that every client reads.
func FuzzParseLog(f *testing.F) {
	for _, seed := range []string{someLog, "", "\n\n", "time=", `time="" level=INFO msg=`, "\x1b", "\x1b]52;c;aGk=\x07", "\u009b1m", "\x1bP\x1b\\x", "time=0001-01-01T00:00:00Z level=INFO msg=a",
		"time=9999-12-31T23:59:59-14:00 level=INFO msg=a", `time=2026-01-01T00:00:00Z level=INFO msg="\u202e"`, "a\u2028b\u202ec\xffd"} {
		f.Add([]byte(seed))
	}
	start := time.Unix(1000, 0)
	f.Fuzz(func(t *testing.T, text []byte) {
		lines := parseLog(text, start)
		if len(lines) > strings.Count(string(text), "\n")+1 {
			t.Errorf("%d lines of %q", len(lines), text)
		}
		for _, line := range lines {
			shown := []string{line.text, line.entry.Message}
			for key, value := range line.entry.Fields {
				shown = append(shown, key, value)
			}
			for _, s := range shown {
				if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return r != '\t' && unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) }) {
					t.Errorf("%q is shown as %q", text, s)
				}
			}
			if !slices.Contains(logLevels, line.entry.Level) {
				t.Errorf("%q has level %q", text, line.entry.Level)
			}
		}
		raw, err := json.Marshal(entriesOf(lines))
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		var back []gen.SandboxLogEntry
		if err := json.Unmarshal(raw, &back); err != nil || len(back) != len(lines) {
			t.Errorf("%q does not survive JSON: %v", text, err)
		}
	})
}

func entriesOf(lines []logLine) (entries []gen.SandboxLogEntry) {
	for _, line := range lines {
		entries = append(entries, line.entry)
	}
	return entries
}
