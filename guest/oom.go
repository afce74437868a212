package guest

import (
	"log/slog"
	"os"
	"strings"
)

// victimScore is what the kernel adds to the memory of a process, in thousandths of all there is, when it looks for one to kill: any process of
// a user is killed before the agent, with which the whole sandbox would end. Raising it needs no privilege.
const victimScore = "500"

// oomScore is the agent's own score. It is opened early: an agent that may not be traced may not open it any more.
type oomScore struct {
	file *os.File
	own  string
}

// openOOMScore is nil when there is none to be had: then a process that takes all memory may end the sandbox, and nothing worse.
func openOOMScore(log *slog.Logger) *oomScore {
	f, err := os.OpenFile("/proc/self/oom_score_adj", os.O_RDWR, 0)
	if err != nil {
		log.Warn("no oom score", "error", err)
		return nil
	}
	var text [16]byte
	n, err := f.ReadAt(text[:], 0)
	if n == 0 {
		log.Warn("no oom score", "error", err)
		f.Close()
		return nil
	}
	return &oomScore{file: f, own: strings.TrimSpace(string(text[:n]))}
}

// lend makes what is forked until the returned function is called a victim. The agent is one too for that long, because a score given to the
// child afterwards would miss what the child has forked by then.
func (s *oomScore) lend() (giveBack func()) {
	if s == nil {
		return func() {}
	}
	set := func(score string) { _, _ = s.file.WriteAt([]byte(score), 0) } // at worst nobody is preferred
	set(victimScore)
	return func() { set(s.own) }
}
