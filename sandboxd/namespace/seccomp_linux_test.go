package namespace

import (
	"encoding/binary"
	"runtime"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

func TestSeccompGolden(t *testing.T) { golden(t, "seccomp-"+runtime.GOARCH, policyText(policy())) }

// vm runs the assembled program outside the kernel.
func vm(t testing.TB) func(nr, arch uint32, args ...uint64) uint32 {
	t.Helper()
	var raw []bpf.RawInstruction
	for _, f := range assemble(policy()) {
		raw = append(raw, bpf.RawInstruction{Op: f.Code, Jt: f.Jt, Jf: f.Jf, K: f.K})
	}
	prog, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("the program has instructions that nobody knows")
	}
	machine, err := bpf.NewVM(prog)
	if err != nil {
		t.Fatal(err)
	}
	return func(nr, arch uint32, args ...uint64) uint32 {
		var data [64]byte // struct seccomp_data, in the byte order of packets, which is the machine's here
		binary.BigEndian.PutUint32(data[offNr:], nr)
		binary.BigEndian.PutUint32(data[offArch:], arch)
		for i, a := range args {
			binary.BigEndian.PutUint32(data[offArgs+8*i:], uint32(a))
			binary.BigEndian.PutUint32(data[offArgs+8*i+4:], uint32(a>>32))
		}
		got, err := machine.Run(data[:])
		if err != nil {
			t.Fatal(err)
		}
		return uint32(got)
	}
}

func TestSeccompDecisions(t *testing.T) {
	run := vm(t)
	check := func(want uint32, nr uintptr, args ...uint64) {
		t.Helper()
		if got := run(uint32(nr), auditArch, args...); got != want {
			t.Errorf("call %d%v = %#x, want %#x", nr, args, got, want)
		}
	}
	eperm, enosys, eafnosupport := deny(unix.EPERM), deny(unix.ENOSYS), deny(unix.EAFNOSUPPORT)
	check(actAllow, unix.SYS_READ)
	check(actAllow, unix.SYS_EXECVE)
	check(actAllow, unix.SYS_PTRACE)
	check(eperm, unix.SYS_MOUNT)
	check(enosys, unix.SYS_CLONE3)
	check(enosys, lastKnownCall+1)
	check(actAllow, unix.SYS_CLONE, unix.CLONE_VM|unix.CLONE_THREAD)
	check(actAllow, unix.SYS_CLONE, uint64(unix.SIGCHLD))
	check(actAllow, unix.SYS_UNSHARE, unix.CLONE_FILES|unix.CLONE_FS)
	for _, flag := range []uint64{
		unix.CLONE_NEWNS, unix.CLONE_NEWCGROUP, unix.CLONE_NEWUTS, unix.CLONE_NEWIPC, unix.CLONE_NEWUSER, unix.CLONE_NEWPID, unix.CLONE_NEWNET,
	} {
		check(eperm, unix.SYS_CLONE, flag|uint64(unix.SIGCHLD))
		check(eperm, unix.SYS_UNSHARE, flag)
	}
	check(eperm, unix.SYS_UNSHARE, unix.CLONE_NEWTIME)
	check(actAllow, unix.SYS_IOCTL, 0, unix.TIOCGWINSZ)
	check(eperm, unix.SYS_IOCTL, 0, unix.TIOCSTI)
	check(eperm, unix.SYS_IOCTL, 0, 1<<32|unix.TIOCSTI) // the kernel looks at the low word only
	check(actAllow, unix.SYS_SOCKET, unix.AF_INET6, unix.SOCK_STREAM, 0)
	check(actAllow, unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
	check(eafnosupport, unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER)
	check(eafnosupport, unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	check(actAllow, unix.SYS_SOCKETPAIR, unix.AF_UNIX)
	check(eafnosupport, unix.SYS_SOCKETPAIR, unix.AF_INET)
	check(actAllow, unix.SYS_PERSONALITY, 0xffffffff)
	check(eperm, unix.SYS_PERSONALITY, 0x0040000)
	if got := run(uint32(unix.SYS_READ), 0x40000003); got != actKill {
		t.Errorf("a call of another architecture = %#x, want kill", got)
	}
	if runtime.GOARCH == "amd64" {
		check(actKill, 0x40000000)
	}
}

// Every rule decides its own call whatever comes before it in the program: a wrong jump would let a call through.
func TestSeccompEveryRule(t *testing.T) {
	run := vm(t)
	for _, r := range policy() {
		got := run(uint32(r.nr), auditArch, 0x7fffffff, 0x7fffffff, 0x7fffffff)
		want := r.action
		if len(r.when) > 0 && r.when[0][0].op == equals {
			want = actAllow
		}
		if got != want {
			t.Errorf("%s = %#x, want %#x", r.name, got, want)
		}
	}
}
