package routingtest

import "syscall"

// dieWithParent takes the server along when the test binary is killed, such as by its time-out.
func dieWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
