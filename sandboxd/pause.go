package sandboxd

import (
	"context"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Pause answers that this node cannot, for a sandbox that exists. No machine here can save what runs.
func (m *Manager) Pause(ctx context.Context, id string, keepMemory bool) error {
	_, end, err := m.begin(ctx, id)
	if err != nil {
		return err
	}
	defer end()
	return m.cannotSave(id)
}

func (m *Manager) cannotSave(id string) error {
	return errs.New(errs.Invalid, "Sandbox %q cannot be paused: the %s machine of this node has no snapshots; keep it alive with a longer "+
		"timeout instead, or run the node with a machine that can pause", id, m.machine.Name())
}
