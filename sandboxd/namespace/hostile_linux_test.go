package namespace

import (
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestHostileRoot is what root inside tries first. Every line must fail, for the reason that is given or for one before it.
func TestHostileRoot(t *testing.T) {
	m := testMachine(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("host secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	abstract := fmt.Sprintf("sluice-test-%d", os.Getpid())
	l, err := net.Listen("unix", "@"+abstract)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b := startBox(t, m)
	fence(t, b.spec.NetNS)

	const eperm, enosys = "operation not permitted", "function not implemented"
	sys := func(nr int, args ...any) []string {
		argv := []string{"self", "syscall", fmt.Sprint(nr)}
		for _, a := range args {
			argv = append(argv, fmt.Sprint(a))
		}
		return argv
	}
	sh := func(line string) []string { return []string{"/bin/bash", "-c", "exec 2>&1; " + line} }
	const usernsFlags = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
	for _, c := range []struct {
		name string
		argv []string
		want string // in the output
	}{
		{"read a host file", sh("cat " + secret), "No such file"},
		{"read it through pid 1's root", sh("cat /proc/1/root" + secret), "Permission denied"},
		{"read it through pid 1's directory", sh("cat /proc/1/cwd" + secret), "Permission denied"},
		{"climb out of the root", sh("cat /../../../.." + secret), "No such file"},
		{"chroot out", sh(`python3 -c "
import os
os.mkdir('/tmp/c'); fd = os.open('/', os.O_RDONLY); os.chroot('/tmp/c'); os.fchdir(fd)
for _ in range(20): os.chdir('..')
os.chroot('.')
print(open('` + secret + `').read())"`), "No such file"},
		{"open by handle", sys(unix.SYS_OPEN_BY_HANDLE_AT, unix.AT_FDCWD, "b:128", 0), eperm},
		{"see host processes", sh("ls -d /proc/[0-9]* | wc -l | awk '{print ($1 < 12) ? \"few\" : $1}'"), "few"},
		{"see the host's disks", sh("ls /dev/vda /dev/sda /dev/mem /dev/kmsg"), "No such file"},
		{"paths of the host in mountinfo", sh("grep -c -e " + b.spec.Dir + " -e " + m.cfg.StateDir + " -e " + m.cfg.GuestdPath + " /proc/self/mountinfo"), "0"},
		{"paths of the host in maps", sh("cat /proc/1/maps /proc/1/environ | grep -c -a -e " + b.spec.Dir + " -e " + filepath.Dir(m.cfg.GuestdPath)), "0"},
		{"write guestd", sh("echo x >/proc/1/exe"), "exe:"},
		{"write guestd's log", sh("echo x >/proc/1/fd/1"), "Permission denied"},

		{"mount", sys(unix.SYS_MOUNT, "s:none", "s:/mnt", "s:tmpfs", 0, 0), eperm},
		{"remount root", sys(unix.SYS_MOUNT, "s:none", "s:/", 0, unix.MS_REMOUNT, 0), eperm},
		{"umount proc's mask", sys(unix.SYS_UMOUNT2, "s:/proc/kcore", unix.MNT_DETACH), eperm},
		{"mount the new way", sys(unix.SYS_FSOPEN, "s:tmpfs", 0), eperm},
		{"copy a mount", sys(unix.SYS_OPEN_TREE, unix.AT_FDCWD, "s:/", unix.OPEN_TREE_CLONE), eperm},
		{"move a mount", sys(unix.SYS_MOVE_MOUNT, unix.AT_FDCWD, "s:/", unix.AT_FDCWD, "s:/mnt", 0), eperm},
		{"change a mount", sys(unix.SYS_MOUNT_SETATTR, unix.AT_FDCWD, "s:/", 0, "b:32", 32), eperm},
		{"pivot", sys(unix.SYS_PIVOT_ROOT, "s:/", "s:/mnt"), eperm},
		{"unshare user namespace", sys(unix.SYS_UNSHARE, usernsFlags), eperm},
		{"unshare network", sys(unix.SYS_UNSHARE, unix.CLONE_NEWNET), eperm},
		{"unshare time", sys(unix.SYS_UNSHARE, unix.CLONE_NEWTIME), eperm},
		{"clone user namespace", sys(unix.SYS_CLONE, usernsFlags, 0, 0, 0, 0), eperm},
		{"clone3", sys(unix.SYS_CLONE3, "b:88", 88), enosys},
		{"setns", sys(unix.SYS_SETNS, 0, 0), eperm},
		{"unshare(1) as user", []string{"/usr/bin/unshare", "-Ur", "id"}, "Operation not permitted"},
		{"load a module", sys(unix.SYS_INIT_MODULE, 0, 0, "s:"), eperm},
		{"load a module by file", sys(unix.SYS_FINIT_MODULE, 0, "s:", 0), eperm},
		{"kexec", sys(unix.SYS_KEXEC_LOAD, 0, 0, 0, 0), eperm},
		{"reboot", sys(unix.SYS_REBOOT, 0xfee1dead, 672274793, 0x1234567), eperm},
		{"bpf", sys(unix.SYS_BPF, 0, "b:128", 128), eperm},
		{"perf", sys(unix.SYS_PERF_EVENT_OPEN, "b:128", 0, -1, -1, 0), eperm},
		{"userfaultfd", sys(unix.SYS_USERFAULTFD, 0), eperm},
		{"io_uring", sys(unix.SYS_IO_URING_SETUP, 1, "b:120"), enosys},
		{"keyring", sys(unix.SYS_KEYCTL, 0, -3, 0), eperm},
		{"add a key", sys(unix.SYS_ADD_KEY, "s:user", "s:x", "s:y", 1, -3), eperm},
		{"clock", sys(unix.SYS_CLOCK_SETTIME, 0, "b:16"), eperm},
		{"swap", sys(unix.SYS_SWAPON, "s:/tmp/x", 0), eperm},
		{"host name", sys(unix.SYS_SETHOSTNAME, "s:evil", 4), eperm},
		{"kernel log", sys(unix.SYS_SYSLOG, 3, "b:64", 64), eperm},
		{"push to a terminal", sys(unix.SYS_IOCTL, 0, unix.TIOCSTI, "s:x"), eperm},
		{"fanotify", sys(unix.SYS_FANOTIFY_INIT, 0x200, 0), eperm},
		{"no randomisation", sys(unix.SYS_PERSONALITY, 0x0040000), eperm},
		{"a call of tomorrow", sys(lastKnownCall + 1), enosys},
		{"packet socket", sys(unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW, 0), "address family not supported"},
		{"crypto socket", sys(unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET, 0), "address family not supported"},
		{"vsock", sys(unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM, 0), "address family not supported"},
		{"netfilter socket", sys(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER), "address family not supported"},
		{"raw socket", sys(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP), eperm},
		{"device node", sys(unix.SYS_MKNODAT, unix.AT_FDCWD, "s:/tmp/vda", unix.S_IFBLK|0o666, 254<<8), eperm},
		{"memory device", sys(unix.SYS_MKNODAT, unix.AT_FDCWD, "s:/dev/mem", unix.S_IFCHR|0o666, 1<<8|1), eperm},

		{"kcore", sh("cat /proc/kcore | wc -c"), "0"},
		{"the host's hardware", sh("cat /proc/cmdline /proc/partitions /proc/diskstats /proc/iomem /proc/ioports /proc/swaps | wc -c"), "0"},
		{"keys", sh("cat /proc/keys /proc/kallsyms /proc/timer_list /proc/kmsg /proc/modules | wc -c"), "0"},
		{"sysrq", sh("echo h >/proc/sysrq-trigger; grep sysrq-trigger /proc/self/mountinfo | wc -l"), "1"},
		{"core pattern", sh("echo '|/tmp/x' >/proc/sys/kernel/core_pattern"), "Read-only file system"},
		{"host name by sysctl", sh("echo evil >/proc/sys/kernel/hostname"), "Read-only file system"},
		{"forwarding", sh("echo 1 >/proc/sys/net/ipv4/ip_forward"), "Read-only file system"},
		{"randomisation by sysctl", sh("echo 0 >/proc/sys/kernel/randomize_va_space"), "Read-only file system"},
		{"protection from the killer", sh("echo -1000 >/proc/self/oom_score_adj"), "Permission denied"},

		{"list rules", sh("nft list ruleset"), "Address family not supported"},
		{"flush rules", sh("nft flush ruleset"), "Address family not supported"},
		{"add an address", sh("ip addr add 10.99.0.9/24 dev lo"), "Operation not permitted"},
		{"add a route", sh("ip route add 10.98.0.0/16 dev lo"), "Operation not permitted"},
		{"take the link down", sh("ip link set lo down"), "Operation not permitted"},
		{"host's abstract socket", []string{"self", "abstract", abstract}, "connection refused"},

		{"trace pid 1", sys(unix.SYS_PTRACE, unix.PTRACE_SEIZE, 1, 0, 0), eperm},
		{"read pid 1's memory", sh("head -c 1 /proc/1/mem"), "Permission denied"},
		{"descriptors of pid 1", sh("readlink /proc/1/fd/* /proc/1/exe | wc -l"), "0\n"},
		{"take a descriptor of pid 1", sys(unix.SYS_PIDFD_GETFD, 0, 0, 0), eperm},
		{"kill the host's process", sh(fmt.Sprintf("kill -9 %d", os.Getpid())), "No such process"},
		{"kill pid 1", sh("kill -9 1; sleep 0.1; echo still here"), "still here"},
		{"set-user-id", sh("cp /usr/bin/id /tmp/id && chown root /tmp/id && chmod u+s /tmp/id && setpriv --reuid 1000 --regid 1000 --clear-groups /tmp/id -u"), "1000"},
		{"set-user-id su", sh("setpriv --reuid 1000 --regid 1000 --clear-groups su -c id root </dev/null"), "su:"},
		{"capabilities", sh("grep -e CapEff -e CapBnd -e CapPrm /proc/self/status | awk '{print $2}' | uniq"), "00000000000400fb\n"},
		{"no_new_privs", sh("grep -e NoNewPrivs -e '^Seccomp:' /proc/self/status | awk '{print $2}' | tr '\\n' ' '"), "1 2"},
		{"raise a limit", sh("ulimit -c unlimited"), "ot permitted"},
		{"cgroups", sh("ls /sys/fs/cgroup; mkdir /sys/fs/cgroup/x"), "No such file"},
		{"trusted attributes", sh("setfattr -n trusted.overlay.opaque -v y /etc || python3 -c \"import os; os.setxattr('/etc', 'trusted.overlay.opaque', b'y')\""), "Operation not permitted"},
		{"hidden part of usr", sh("ls -A /usr/local/etc | wc -l"), "0"},
		{"rootless escape by newuidmap", sh("echo '0 0 1' >/proc/self/uid_map"), "Operation not permitted"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := *b
			b.t = t
			r := b.run(0, c.argv...)
			if !strings.Contains(r.Out+r.Err, c.want) || strings.Contains(r.Out, "host secret") || r.Out == "ok\n" {
				t.Errorf("%q: %+v, want %q", c.argv, r, c.want)
			}
		})
	}
	// What the agent was left with, besides sockets and its own poller.
	kinds := map[string]int{}
	dir := fmt.Sprintf("/proc/%d/fd", b.p.Handle().PID)
	fds, err := os.ReadDir(dir)
	for _, fd := range fds {
		target, _ := os.Readlink(filepath.Join(dir, fd.Name()))
		if !strings.HasPrefix(target, "socket:") && !strings.HasPrefix(target, "anon_inode:") {
			kinds[target]++
		}
	}
	if want := map[string]int{"/dev/null": 1, "/memfd:guestd (deleted)": 2}; err != nil || !maps.Equal(kinds, want) {
		t.Errorf("descriptors of pid 1: %v, %v, want %v", kinds, err, want)
	}
	if got := rules(t, b.spec.NetNS); !strings.Contains(got, "fence") {
		t.Errorf("the rules of the network namespace after the attacks: %s", got)
	}
}

// fence puts a ruleset in the namespace, as egress does.
func fence(t *testing.T, netns string) {
	t.Helper()
	cmd := exec.Command("nsenter", "--net="+netns, "nft", "add table inet fence")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("needs nft (package nftables) and nsenter (package util-linux): %v: %s", err, out)
	}
}

func rules(t *testing.T, netns string) string {
	t.Helper()
	out, err := exec.Command("nsenter", "--net="+netns, "nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatalf("list rules: %v: %s", err, out)
	}
	return string(out)
}

// The kernel counts inotify instances and the like for the owner of a user namespace. When that was the host's root, one
// sandbox could take them all, from the host and from every other.
func TestKernelQuotasAreNotShared(t *testing.T) {
	m := testMachine(t)
	greedy, neighbour := startBox(t, m), startBox(t, m)
	const take = "import ctypes, os\nlibc = ctypes.CDLL(None)\nn = 0\nwhile n < 4096 and libc.inotify_init() >= 0: n += 1\nprint(n)\n"
	hold := take + "open('/tmp/reached', 'w').write(str(n))\nimport time\ntime.sleep(600)"
	go func() { _, _ = greedy.tryRun(1000, "python3", "-c", hold) }()
	if n := greedy.sh("until [ -s /tmp/reached ]; do sleep 0.05; done; cat /tmp/reached"); n == "4096" || n == "0" {
		t.Fatalf("one sandbox holds %s inotify instances, want the host's limit", n)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Errorf("the host after that: %v", err)
	}
	unix.Close(fd)
	if r := neighbour.run(1000, "python3", "-c", take); r.Out == "0\n" || r.Code != 0 {
		t.Errorf("another sandbox after that: %+v", r)
	}
	if out := neighbour.sh("cat /proc/sys/user/max_user_namespaces /proc/sys/user/max_net_namespaces"); out != "0\n0" {
		t.Errorf("namespaces that may be made inside: %q", out)
	}
}

// A fork bomb ends at its own limit, and the sandbox can be destroyed while it burns.
func TestForkBombIsContained(t *testing.T) {
	m := testMachine(t)
	if !m.cgroups.Plan("x", Limits{}).Has("pids") {
		t.Skipf("this host gives no pids cgroup: %v", m.Limitations())
	}
	b := startBox(t, m)
	neighbour := startBox(t, m)
	go func() { _, _ = b.tryRun(0, "/bin/bash", "-c", "f() { f | f & }; f; sleep 60") }()
	for range 5 {
		if out := neighbour.sh("echo alive"); out != "alive" {
			t.Errorf("neighbour: %q", out)
		}
	}
}

// Destroy with what a hostile sandbox left, under ids of its own.
func TestDestroyOfADeepTree(t *testing.T) {
	b := startBox(t, testMachine(t))
	r := b.run(1000, "python3", "-c", `
import os
os.chdir('/home/user')
for _ in range(3000):
    os.mkdir('d'); os.chdir('d')
print('ok')`)
	if r.Out != "ok\n" {
		t.Fatalf("%+v", r)
	}
}
