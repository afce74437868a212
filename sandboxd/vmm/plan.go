package vmm

import (
	"fmt"
	"path"
	"path/filepath"
	"strings"
)

// A Plan says everything that Start will do, before anything is done. It is pure data, printed for golden files.
type Plan struct {
	Name    string // argv[0]
	NetNS   string
	Cgroups []string
	UID     uint32
	Own     []Own // directories and files of the host, made before the tree
	Tree    Op    // the tmpfs on which the tree is put together; it becomes the working directory
	Ops     []Op  // paths are relative to the tree
	Argv    []string
}

// Own is a path of the host that gets an owner and a mode; Dir is made if it is missing.
type Own struct {
	Path string
	Dir  bool
	UID  uint32
	Mode uint32
}

// String is one line of the golden file.
func (o Own) String() string {
	kind := "file"
	if o.Dir {
		kind = "dir"
	}
	return fmt.Sprintf("%s %s owner=%d mode=%04o", kind, o.Path, o.UID, o.Mode)
}

// Op is one step on file systems.
type Op struct {
	Do    Do
	Src   string
	Dst   string
	Flags []string
	Data  string
	Mode  uint32
	UID   uint32
	Major uint32
	Minor uint32
}

// Do is the verb of an Op.
type Do string

// The verbs.
const (
	DoMkdir   Do = "mkdir"
	DoTouch   Do = "touch"
	DoTmpfs   Do = "tmpfs"
	DoBind    Do = "bind"
	DoNode    Do = "node"    // character device
	DoReadall Do = "readall" // the tree itself becomes read-only
	DoPivot   Do = "pivot"   // the tree becomes the root, the old one is gone
)

// String is one line of the golden file.
func (o Op) String() string {
	var b strings.Builder
	b.WriteString(string(o.Do))
	if o.Src != "" {
		b.WriteString(" " + o.Src + " ->")
	}
	if o.Dst != "" {
		b.WriteString(" " + o.Dst)
	}
	if o.Do == DoNode {
		fmt.Fprintf(&b, " dev=%d:%d", o.Major, o.Minor)
	}
	if o.Mode != 0 {
		fmt.Fprintf(&b, " mode=%04o", o.Mode)
	}
	if o.UID != 0 {
		fmt.Fprintf(&b, " owner=%d", o.UID)
	}
	if len(o.Flags) > 0 {
		b.WriteString(" " + strings.Join(o.Flags, ","))
	}
	if o.Data != "" {
		b.WriteString(" [" + o.Data + "]")
	}
	return b.String()
}

// String is the plan as text.
func (p Plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "process %s uid %d\nnetns %s\n", p.Name, p.UID, p.NetNS)
	for _, c := range p.Cgroups {
		fmt.Fprintf(&b, "cgroup %s\n", c)
	}
	for _, o := range p.Own {
		fmt.Fprintf(&b, "own: %s\n", o)
	}
	fmt.Fprintf(&b, "tree: %s\n", p.Tree)
	for _, o := range p.Ops {
		fmt.Fprintf(&b, "tree: %s\n", o)
	}
	fmt.Fprintf(&b, "exec: %s\n", strings.Join(p.Argv, " "))
	return b.String()
}

// machine is what the planner must know of the host, found once, by New.
type machine struct {
	binary    string
	libraries []string // of the binary, with its loader; none when it is static
	userfault uint32   // minor number of /dev/userfaultfd; zero when there is none
}

const (
	miscMajor = 10
	kvmMinor  = 232
	apiFD     = 3
)

// compile is the whole layout of a VM's process, as data.
func compile(m machine, s Spec) Plan {
	p := Plan{Name: s.processName(), NetNS: s.NetNS, Cgroups: s.Cgroups, UID: s.UID}
	p.Own = []Own{
		{Path: s.Dir, Dir: true, Mode: 0o700},
		{Path: filepath.Join(s.Dir, treeName), Dir: true, Mode: 0o700},
		{Path: s.runDir(), Dir: true, UID: s.UID, Mode: 0o700},
		{Path: s.outDir(), Dir: true, UID: s.UID, Mode: 0o700},
	}
	if s.Disk != "" {
		p.Own = append(p.Own, Own{Path: s.Disk, UID: s.UID, Mode: 0o600})
	}
	p.Tree = Op{Do: DoTmpfs, Dst: filepath.Join(s.Dir, treeName), Flags: []string{"nosuid", "noexec"}, Data: "size=64k,nr_inodes=64,mode=0755"}

	made := map[string]bool{".": true}
	var mkdir func(dir string)
	mkdir = func(dir string) {
		if !made[dir] {
			made[dir] = true
			mkdir(path.Dir(dir))
			p.Ops = append(p.Ops, Op{Do: DoMkdir, Dst: dir, Mode: 0o755})
		}
	}
	file := func(src, dst string, flags ...string) {
		dst = strings.TrimPrefix(dst, "/")
		mkdir(path.Dir(dst))
		p.Ops = append(p.Ops, Op{Do: DoTouch, Dst: dst}, Op{Do: DoBind, Src: src, Dst: dst, Flags: append([]string{"nosuid", "nodev"}, flags...)})
	}
	dir := func(src, dst string, flags ...string) {
		dst = strings.TrimPrefix(dst, "/")
		mkdir(dst)
		p.Ops = append(p.Ops, Op{Do: DoBind, Src: src, Dst: dst, Flags: append([]string{"nosuid", "nodev", "noexec"}, flags...)})
	}
	node := func(name string, major, minor, mode, uid uint32) {
		mkdir("dev")
		p.Ops = append(p.Ops, Op{Do: DoNode, Dst: "dev/" + name, Major: major, Minor: minor, Mode: mode, UID: uid})
	}

	file(m.binary, insideBinary, "ro")
	for _, l := range m.libraries {
		file(l, l, "ro")
	}
	node("null", 1, 3, 0o666, 0)
	node("urandom", 1, 9, 0o444, 0)
	node("kvm", miscMajor, kvmMinor, 0o600, s.UID)
	if m.userfault != 0 {
		node("userfaultfd", miscMajor, m.userfault, 0o600, s.UID)
	}
	for _, f := range [][2]string{{s.Kernel, insideKernel}, {s.Initramfs, insideInitramfs}, {s.Root, insideRoot}} {
		if f[0] != "" {
			file(f[0], f[1], "noexec", "ro")
		}
	}
	if s.Disk != "" {
		file(s.Disk, insideDisk, "noexec")
	}
	dir(s.runDir(), insideRun)
	dir(s.outDir(), insideOut)
	mkdir(strings.TrimPrefix(insideSnapshot, "/"))
	if s.Snapshot != "" {
		dir(s.Snapshot, insideSnapshot, "ro")
	}
	p.Ops = append(p.Ops, Op{Do: DoReadall}, Op{Do: DoPivot})

	p.Argv = []string{p.Name, "--api-socket", fmt.Sprintf("fd=%d", apiFD), "--seccomp", "true"}
	return p
}
