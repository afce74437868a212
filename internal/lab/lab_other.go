//go:build !linux

package lab

import "testing"

// Lab exists on Linux only.
type Lab struct{}

// New skips the test: there are no network namespaces here.
func New(t testing.TB) *Lab {
	t.Helper()
	t.Skip("the network laboratory needs Linux and root")
	return nil
}

// InKVM skips the test.
func InKVM(t *testing.T) bool {
	t.Helper()
	t.Skip("VM tests need Linux")
	return false
}

// CloseNested does nothing: there is no nested host here.
func CloseNested() {}
