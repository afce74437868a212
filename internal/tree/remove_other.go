//go:build !linux

package tree

import "os"

// Remove is os.RemoveAll: no sandbox has filled dir.
func Remove(dir string) error { return os.RemoveAll(dir) }
