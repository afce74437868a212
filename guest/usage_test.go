package guest

import (
	"testing"
	"time"
)

func TestParseCPULine(t *testing.T) {
	check := func(stat string, want time.Duration, ok bool) {
		t.Helper()
		if got, gotOK := parseCPULine([]byte(stat)); got != want || gotOK != ok {
			t.Errorf("parseCPULine(%q) = %v, %v, want %v", stat, got, gotOK, want)
		}
	}
	check("cpu  100 20 30 4000 500 6 7 8 9 10\ncpu0 1 2\n", 1710*time.Millisecond, true)
	check("cpu 1 2 3\n", 0, false)
	check("cpu a b c d e f g h\n", 0, false)
	check("", 0, false)
}

func TestCPUShareStaysInRange(t *testing.T) {
	var u usage
	now := time.Now()
	if pct := u.cpu(now, 2); pct != 0 {
		t.Errorf("first sample = %v", pct)
	}
	if pct := u.cpu(now.Add(time.Millisecond), 2); pct != 0 {
		t.Errorf("too soon = %v", pct)
	}
	if pct := u.cpu(now.Add(time.Second), 2); pct < 0 || pct > 100 {
		t.Errorf("share = %v", pct)
	}
}
