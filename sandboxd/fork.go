package sandboxd

import "context"

// Fork makes copies of a running sandbox, which goes on. Each copy has the memory and the disk of the source at one moment, and its
// metadata, network, lifecycle and team; a failure of one is in its result.
func (m *Manager) Fork(ctx context.Context, id string, _ []ForkSpec) ([]ForkResult, error) {
	_, end, err := m.begin(ctx, id)
	if err != nil {
		return nil, err
	}
	defer end()
	return nil, m.cannotSave(id)
}
