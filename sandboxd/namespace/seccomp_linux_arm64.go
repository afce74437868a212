package namespace

import "golang.org/x/sys/unix"

const (
	auditArch     = unix.AUDIT_ARCH_AARCH64
	cloneFlagsArg = 0
)

var archPrologue []unix.SockFilter

var archCalls = map[uint32][]namedCall{
	deny(unix.EPERM): {{"kexec_file_load", unix.SYS_KEXEC_FILE_LOAD}},
}
