package namespace

import (
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The seccomp policy is a deny list: user code is arbitrary, and an allow list would break some program every week. It
// takes away what can make or enter namespaces and mounts, what reaches into the kernel's less tended corners, and every
// socket family that a web program does not need. ENOSYS instead of EPERM where programs know how to do without.
//
// We assemble it ourselves: go-seccomp-bpf would be a dependency for these two hundred lines, and it has no way to say
// "every number above the ones we know does not exist".

type callRule struct {
	name   string
	nr     uintptr
	action uint32
	unless []argCase // the first case that holds is let through
	when   []argCase // if any: the action applies only where one of them holds
}

// argCase holds when all its tests do.
type argCase []argTest

// argTest is on the low word of an argument: every argument that we test is an int in the kernel.
type argTest struct {
	arg  int
	op   testOp
	bits uint32
}

type testOp uint8

const (
	equals testOp = iota
	anyBit
)

const (
	actAllow = unix.SECCOMP_RET_ALLOW
	actKill  = unix.SECCOMP_RET_KILL_PROCESS
)

func deny(errno unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(errno) }

type namedCall struct {
	name string
	nr   uintptr
}

// newNamespace is every flag of clone that asks for a namespace. CLONE_NEWTIME is the exit signal's bits there; only
// unshare and setns know it.
const newNamespace = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
	unix.CLONE_NEWPID | unix.CLONE_NEWNET

// lastKnownCall is the newest system call that this policy was written with. Newer ones do not exist for the sandbox until
// somebody has read what they do.
const lastKnownCall = unix.SYS_FILE_SETATTR

func policy() []callRule {
	var rules []callRule
	all := func(action uint32, calls ...namedCall) {
		for _, c := range append(calls, archCalls[action]...) {
			rules = append(rules, callRule{name: c.name, nr: c.nr, action: action})
		}
	}
	all(deny(unix.EPERM),
		// Mounts and namespaces.
		namedCall{"mount", unix.SYS_MOUNT}, namedCall{"umount2", unix.SYS_UMOUNT2}, namedCall{"pivot_root", unix.SYS_PIVOT_ROOT},
		namedCall{"fsopen", unix.SYS_FSOPEN}, namedCall{"fsconfig", unix.SYS_FSCONFIG}, namedCall{"fsmount", unix.SYS_FSMOUNT},
		namedCall{"fspick", unix.SYS_FSPICK}, namedCall{"move_mount", unix.SYS_MOVE_MOUNT}, namedCall{"open_tree", unix.SYS_OPEN_TREE},
		namedCall{"open_tree_attr", unix.SYS_OPEN_TREE_ATTR}, namedCall{"mount_setattr", unix.SYS_MOUNT_SETATTR},
		namedCall{"setns", unix.SYS_SETNS}, namedCall{"sethostname", unix.SYS_SETHOSTNAME},
		namedCall{"setdomainname", unix.SYS_SETDOMAINNAME}, namedCall{"quotactl", unix.SYS_QUOTACTL},
		namedCall{"quotactl_fd", unix.SYS_QUOTACTL_FD}, namedCall{"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT},
		// The machine as a whole.
		namedCall{"reboot", unix.SYS_REBOOT}, namedCall{"swapon", unix.SYS_SWAPON}, namedCall{"swapoff", unix.SYS_SWAPOFF},
		namedCall{"init_module", unix.SYS_INIT_MODULE}, namedCall{"finit_module", unix.SYS_FINIT_MODULE},
		namedCall{"delete_module", unix.SYS_DELETE_MODULE}, namedCall{"kexec_load", unix.SYS_KEXEC_LOAD},
		namedCall{"acct", unix.SYS_ACCT}, namedCall{"settimeofday", unix.SYS_SETTIMEOFDAY},
		namedCall{"clock_settime", unix.SYS_CLOCK_SETTIME}, namedCall{"syslog", unix.SYS_SYSLOG}, namedCall{"vhangup", unix.SYS_VHANGUP},
		// Keyrings are not of any namespace, and share quotas with every user of the same id.
		namedCall{"add_key", unix.SYS_ADD_KEY}, namedCall{"request_key", unix.SYS_REQUEST_KEY}, namedCall{"keyctl", unix.SYS_KEYCTL},
		// Whatever another process has open is its own.
		namedCall{"pidfd_getfd", unix.SYS_PIDFD_GETFD},
		// Large attack surface, little use here.
		namedCall{"bpf", unix.SYS_BPF}, namedCall{"perf_event_open", unix.SYS_PERF_EVENT_OPEN},
		namedCall{"userfaultfd", unix.SYS_USERFAULTFD}, namedCall{"lookup_dcookie", unix.SYS_LOOKUP_DCOOKIE},
		namedCall{"nfsservctl", unix.SYS_NFSSERVCTL}, namedCall{"fanotify_init", unix.SYS_FANOTIFY_INIT})
	all(deny(unix.ENOSYS),
		// Its flags are behind a pointer, where no filter can look; libc falls back to clone.
		namedCall{"clone3", unix.SYS_CLONE3},
		namedCall{"io_uring_setup", unix.SYS_IO_URING_SETUP}, namedCall{"io_uring_enter", unix.SYS_IO_URING_ENTER},
		namedCall{"io_uring_register", unix.SYS_IO_URING_REGISTER},
		namedCall{"statmount", unix.SYS_STATMOUNT}, namedCall{"listmount", unix.SYS_LISTMOUNT})
	flags := func(bits uint32) []argCase { return []argCase{{{cloneFlagsArg, anyBit, bits}}} }
	is := func(arg int, values ...uint32) (cases []argCase) {
		for _, v := range values {
			cases = append(cases, argCase{{arg, equals, v}})
		}
		return cases
	}
	rules = append(rules,
		callRule{name: "clone", nr: unix.SYS_CLONE, action: deny(unix.EPERM), when: flags(newNamespace)},
		callRule{name: "unshare", nr: unix.SYS_UNSHARE, action: deny(unix.EPERM), when: flags(newNamespace | unix.CLONE_NEWTIME)},
		// Both put bytes or code into the terminal of whoever shares it.
		callRule{name: "ioctl", nr: unix.SYS_IOCTL, action: deny(unix.EPERM), when: is(1, unix.TIOCSTI, unix.TIOCLINUX)},
		callRule{name: "socket", nr: unix.SYS_SOCKET, action: deny(unix.EAFNOSUPPORT), unless: append(
			is(0, unix.AF_UNIX, unix.AF_INET, unix.AF_INET6),
			// Names and addresses of interfaces; every other protocol of netlink configures something.
			argCase{{0, equals, unix.AF_NETLINK}, {2, equals, unix.NETLINK_ROUTE}})},
		callRule{name: "socketpair", nr: unix.SYS_SOCKETPAIR, action: deny(unix.EAFNOSUPPORT), unless: is(0, unix.AF_UNIX)},
		// As Linux, as 32-bit Linux, as 2.6, and "tell me"; the others switch protections off.
		callRule{name: "personality", nr: unix.SYS_PERSONALITY, action: deny(unix.EPERM),
			unless: is(0, 0, 0x8, 0x20000, 0x20008, 0xffffffff)})
	return rules
}

func actionName(a uint32) string {
	if a&unix.SECCOMP_RET_ACTION_FULL == unix.SECCOMP_RET_ERRNO {
		return unix.ErrnoName(unix.Errno(a & unix.SECCOMP_RET_DATA))
	}
	return map[uint32]string{actAllow: "allow", actKill: "kill"}[a]
}

func casesText(cases []argCase) string {
	var or []string
	for _, c := range cases {
		var and []string
		for _, t := range c {
			form := "arg%d = %#x"
			if t.op == anyBit {
				form = "arg%d & %#x"
			}
			and = append(and, fmt.Sprintf(form, t.arg, t.bits))
		}
		or = append(or, strings.Join(and, " and "))
	}
	return strings.Join(or, " or ")
}

// policyText is the golden form.
func policyText(rules []callRule) string {
	var lines []string
	for _, r := range rules {
		line := fmt.Sprintf("%-18s %s", r.name, actionName(r.action))
		if len(r.when) > 0 {
			line += " when " + casesText(r.when)
		}
		if len(r.unless) > 0 {
			line += " unless " + casesText(r.unless)
		}
		lines = append(lines, line+"\n")
	}
	slices.Sort(lines)
	return "another architecture kill\nnewer than known    ENOSYS\n" + strings.Join(lines, "") + "everything else     allow\n"
}

// Offsets in struct seccomp_data.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

func stmt(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }

func jump(code uint16, k uint32, yes, no int) unix.SockFilter {
	if yes > 255 || no > 255 {
		panic("BUG: seccomp jump is too long")
	}
	return unix.SockFilter{Code: unix.BPF_JMP | code | unix.BPF_K, Jt: uint8(yes), Jf: uint8(no), K: k}
}

const (
	load = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	ret  = unix.BPF_RET | unix.BPF_K
)

// assemble turns rules into the kernel's classic BPF. A rule's block always ends in a return, so a block never falls into
// the next one with an argument in the register instead of the number.
func assemble(rules []callRule) []unix.SockFilter {
	prog := []unix.SockFilter{
		stmt(load, offArch),
		jump(unix.BPF_JEQ, auditArch, 1, 0),
		stmt(ret, actKill),
		stmt(load, offNr),
	}
	prog = append(prog, archPrologue...)
	prog = append(prog,
		jump(unix.BPF_JGT, lastKnownCall, 0, 1),
		stmt(ret, deny(unix.ENOSYS)))
	for _, r := range rules {
		block := r.assemble()
		prog = append(prog, jump(unix.BPF_JEQ, uint32(r.nr), 0, len(block)))
		prog = append(prog, block...)
	}
	return append(prog, stmt(ret, actAllow))
}

func (r callRule) assemble() []unix.SockFilter {
	cases, hit, miss := r.unless, uint32(actAllow), r.action
	if len(r.when) > 0 {
		cases, hit, miss = r.when, r.action, actAllow
	}
	var block []unix.SockFilter
	for _, c := range cases {
		for i, t := range c {
			left := 2*(len(c)-1-i) + 1 // instructions of this case after the test: it is not this case, skip them
			op := uint16(unix.BPF_JEQ)
			if t.op == anyBit {
				op = unix.BPF_JSET
			}
			block = append(block, stmt(load, offArgs+8*uint32(t.arg)), jump(op, t.bits, 0, left))
		}
		block = append(block, stmt(ret, hit))
	}
	return append(block, stmt(ret, miss))
}

// confine installs the filter on the calling thread. It wants no_new_privs or CAP_SYS_ADMIN.
func confine(prog []unix.SockFilter) error {
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return fmt.Errorf("install seccomp filter: %w", errno)
	}
	return nil
}
