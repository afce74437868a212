package sandboxd

import (
	"context"
	"fmt"
)

// Log returns the end of what the console of a running or paused sandbox and its agent have said, at most max bytes. The sandbox chose
// every byte of it.
func (m *Manager) Log(_ context.Context, id string, max int64) ([]byte, error) {
	m.mu.RLock()
	l, err := m.shown(id)
	var place Place
	if err == nil {
		place = l.place
	}
	m.mu.RUnlock()
	if err != nil {
		return nil, err
	}
	text, err := m.machine.Log(place, max)
	if err != nil {
		if _, gone := m.Get(id); gone != nil {
			return nil, gone
		}
		return nil, fmt.Errorf("read log of sandbox: %w", err)
	}
	return text, nil
}
