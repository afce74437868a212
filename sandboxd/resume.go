package sandboxd

import "context"

// Connect returns a sandbox that will live for at least the given time from now; resumed tells that it had to be resumed.
func (m *Manager) Connect(ctx context.Context, id string, opts ConnectOptions) (sb Sandbox, resumed bool, err error) {
	if err := m.checkTimeout(opts.Timeout); err != nil {
		return Sandbox{}, false, err
	}
	sb, err = m.moveEnd(ctx, id, extendTo(opts.Timeout))
	return sb, false, err
}
