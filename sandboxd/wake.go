package sandboxd

import (
	"context"

	"github.com/sluice-edge/sluice/link"
)

// Wake resumes a paused sandbox because somebody wants to reach it, if it allows that, and returns when it runs. An error is always a
// *link.VerdictError. Afterwards it has another generation: who asked has to look for its route again. The edge has judged who asks
// before it dials.
func (m *Manager) Wake(_ context.Context, sandbox string, generation uint64) error {
	_, _, verdict := m.reachable(sandbox, generation)
	if verdict == link.Open {
		return nil
	}
	return &link.VerdictError{Verdict: verdict}
}
