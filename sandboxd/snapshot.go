package sandboxd

import (
	"context"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Snapshot copies a running sandbox, memory and disk, while it stands still for a moment. Sandboxes can be made from the copy as from a
// template, by its ID or, if it has one, by its name; of several with the same name the newest counts.
func (m *Manager) Snapshot(ctx context.Context, id, name string) (Snapshot, error) {
	_, end, err := m.begin(ctx, id)
	if err != nil {
		return Snapshot{}, err
	}
	defer end()
	return Snapshot{}, m.cannotSave(id)
}

// Snapshots lists what sandboxes have been copied into, in no order.
func (m *Manager) Snapshots() []Snapshot { return nil }

// RemoveSnapshot forgets a snapshot. Its files stay as long as a sandbox that was made from it is there.
func (m *Manager) RemoveSnapshot(_ context.Context, id string) error {
	return errs.New(errs.NotFound, "Snapshot %q not found", clip(id))
}
