//go:build !linux

package routingtest

import "syscall"

func dieWithParent() *syscall.SysProcAttr { return nil }
