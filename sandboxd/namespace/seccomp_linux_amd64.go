package namespace

import "golang.org/x/sys/unix"

const (
	auditArch     = unix.AUDIT_ARCH_X86_64
	cloneFlagsArg = 0
	x32Bit        = 0x40000000
)

// archPrologue kills the x32 calls: the same architecture to the kernel, but other numbers, which no rule would match.
// Number -1 is a call that a tracer told the kernel to skip.
var archPrologue = []unix.SockFilter{
	jump(unix.BPF_JGE, x32Bit, 0, 2),
	jump(unix.BPF_JEQ, 0xffffffff, 1, 0),
	stmt(ret, actKill),
}

var archCalls = map[uint32][]namedCall{
	deny(unix.EPERM): {
		{"iopl", unix.SYS_IOPL}, {"ioperm", unix.SYS_IOPERM}, {"kexec_file_load", unix.SYS_KEXEC_FILE_LOAD},
	},
	deny(unix.ENOSYS): {
		{"uselib", unix.SYS_USELIB}, {"ustat", unix.SYS_USTAT}, {"sysfs", unix.SYS_SYSFS}, {"_sysctl", unix.SYS__SYSCTL},
		{"modify_ldt", unix.SYS_MODIFY_LDT},
	},
}
