package namespace

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/sluice-edge/sluice/sandboxd/cgroup"
)

// A Plan says everything that the two stages will do, before anything is done. It is pure data: printed for golden files,
// and handed to the stages as JSON.
type Plan struct {
	ID       string
	Dir      string // Spec.Dir
	NetNS    string
	Rootless bool
	UIDBase  uint32
	Hostname string
	Cgroups  []string // joined before the sandbox's first program runs
	Nofile   uint64
	DataMiB  int // RLIMIT_DATA when no memory cgroup exists, else zero
	Nproc    int // RLIMIT_NPROC when no pids cgroup exists, else zero
	Quotas   []Quota

	Workspace Op   // the tmpfs on which the root is put together; it becomes the working directory
	Setup     []Op // stage one, or stage two when rootless; paths are relative to the workspace
	Inside    []Op // stage two, in the sandbox's own mount namespace
	Env       []string
}

// A Quota is a file of /proc/sys/user in the sandbox's user namespace.
type Quota struct {
	Name string
	Max  int
}

// Op is one step on file systems.
type Op struct {
	Do       Do
	Src      string   `json:",omitempty"`
	Dst      string   `json:",omitempty"`
	FS       string   `json:",omitempty"`
	Flags    []string `json:",omitempty"`
	Data     string   `json:",omitempty"`
	Mode     uint32   `json:",omitempty"`
	UID      uint32   `json:",omitempty"` // on the host
	GID      uint32   `json:",omitempty"`
	Dev      uint64   `json:",omitempty"`
	Optional bool     `json:",omitempty"` // a Dst that does not exist is no error
}

// Do is the verb of an Op.
type Do string

// The verbs.
const (
	DoMkdir    Do = "mkdir"
	DoTouch    Do = "touch"
	DoMount    Do = "mount"
	DoBind     Do = "bind"     // one mount, not what is mounted below it
	DoRbind    Do = "rbind"    // with everything below: all that a user namespace may bind
	DoIdmap    Do = "idmap"    // bind whose owners are shifted into the sandbox's range
	DoNode     Do = "node"     // character device
	DoSymlink  Do = "symlink"  // Dst -> Src
	DoMask     Do = "mask"     // hide a file under /dev/null, a directory under an empty read-only tmpfs
	DoReadonly Do = "readonly" // bind onto itself, read-only
	DoPivot    Do = "pivot"    // Dst becomes the root, the old one is gone
)

// String is one line of the golden file.
func (o Op) String() string {
	var b strings.Builder
	b.WriteString(string(o.Do))
	for _, s := range []string{o.FS, o.Src} {
		if s != "" {
			b.WriteString(" " + s)
		}
	}
	if o.Src != "" {
		b.WriteString(" ->")
	}
	fmt.Fprintf(&b, " %s", o.Dst)
	if o.Dev != 0 {
		fmt.Fprintf(&b, " dev=%d:%d", o.Dev>>8, o.Dev&0xff)
	}
	if o.Mode != 0 {
		fmt.Fprintf(&b, " mode=%04o", o.Mode)
	}
	if o.UID != 0 || o.GID != 0 {
		fmt.Fprintf(&b, " owner=%d:%d", o.UID, o.GID)
	}
	if len(o.Flags) > 0 {
		b.WriteString(" " + strings.Join(o.Flags, ","))
	}
	if o.Data != "" {
		b.WriteString(" [" + o.Data + "]")
	}
	if o.Optional {
		b.WriteString(" if it exists")
	}
	return b.String()
}

// String is the plan as text.
func (p Plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "sandbox %s hostname %s\n", p.ID, p.Hostname)
	if p.Rootless {
		fmt.Fprintf(&b, "rootless: uid %d inside is the caller; own network namespace\n", userID)
	} else {
		fmt.Fprintf(&b, "ids 0-%d -> %d-%d\nnetns %s\n", idCount-1, p.UIDBase, p.UIDBase+idCount-1, p.NetNS)
	}
	for _, c := range p.Cgroups {
		fmt.Fprintf(&b, "cgroup %s\n", c)
	}
	fmt.Fprintf(&b, "rlimit nofile=%d core=0", p.Nofile)
	if p.DataMiB > 0 {
		fmt.Fprintf(&b, " data=%dMiB", p.DataMiB)
	}
	if p.Nproc > 0 {
		fmt.Fprintf(&b, " nproc=%d", p.Nproc)
	}
	fmt.Fprintf(&b, "\nworkspace: %s\n", p.Workspace)
	for _, q := range p.Quotas {
		fmt.Fprintf(&b, "quota %s=%d\n", q.Name, q.Max)
	}
	for _, o := range p.Setup {
		fmt.Fprintf(&b, "setup: %s\n", o)
	}
	for _, o := range p.Inside {
		fmt.Fprintf(&b, "inside: %s\n", o)
	}
	for _, e := range p.Env {
		fmt.Fprintf(&b, "env: %s\n", e)
	}
	return b.String()
}

// view is what the planner must know of the host: found once, by New.
type view struct {
	dir      string   // template root, or the view made from the host
	programs []string // the host's /usr, and /bin and the like where they are no links into it; none with a template
	over     string   // what lies above each of programs, under the same path
	idmap    bool     // lower layers can be shifted to the sandbox's ids
}

// layerName is how a directory of programs is called in the workspace.
func layerName(dir string) string { return strings.ReplaceAll(strings.TrimPrefix(dir, "/"), "/", "_") }

// tmpfsMiB bounds a file system in memory to so many sixteenths of the sandbox's, or of 2 GiB when that has no limit. All
// of them together must stay below it: what is in them cannot be freed by killing anybody.
func tmpfsMiB(l Limits, sixteenths int) int {
	total := l.MemoryMiB
	if total == 0 {
		total = 2048
	}
	return max(total*sixteenths/16, 1) // 0 would be no limit
}

const rootPath = "root" // where the new root is put together, below the workspace

// The order is that of /proc/<pid>/mountinfo inside. Files are hidden because they tell about the host or its other
// tenants, or are known ways to hurt it; trees are read-only because root inside is uid 0 of a user namespace for them too.
var (
	maskedProc = []string{
		"acpi", "asound", "buddyinfo", "bus", "cmdline", "config.gz", "consoles", "diskstats", "dma", "interrupts", "iomem",
		"ioports", "kallsyms", "kcore", "keys", "key-users", "kmsg", "kpagecgroup", "kpagecount", "kpageflags", "latency_stats",
		"locks", "mdstat", "modules", "mtrr", "pagetypeinfo", "partitions", "sched_debug", "scsi", "slabinfo", "softirqs", "swaps",
		"sysrq-trigger", "timer_list", "timer_stats", "vmallocinfo",
	}
	readonlyProc = []string{"fs", "irq", "sys", "driver", "tty"}
)

type deviceNode struct {
	name         string
	major, minor uint64
}

var devices = []deviceNode{
	{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0},
}

// noNamespaces says a second time what the seccomp filter says: nobody inside makes another namespace.
var noNamespaces = []Quota{
	{"max_user_namespaces", 0}, {"max_mnt_namespaces", 0}, {"max_pid_namespaces", 0}, {"max_uts_namespaces", 0},
	{"max_ipc_namespaces", 0}, {"max_net_namespaces", 0}, {"max_cgroup_namespaces", 0}, {"max_time_namespaces", 0},
}

// rootlessQuotas is what each sandbox may take of the quotas of the user who runs the node, where it has no id of its own
// on the host to count them by. The host gives that user 128 inotify instances.
var rootlessQuotas = []Quota{
	{"max_inotify_instances", 16}, {"max_inotify_watches", 8192}, {"max_fanotify_groups", 0}, {"max_fanotify_marks", 0},
}

// compile is the whole layout of a sandbox, as data.
func compile(cfg Config, spec Spec, v view, cg cgroup.Plan) Plan {
	p := Plan{
		ID: spec.ID, Dir: spec.Dir, NetNS: spec.NetNS, Rootless: cfg.Rootless, UIDBase: spec.UIDBase, Hostname: spec.hostname(),
		Cgroups: cg.Dirs,
		Nofile:  1 << 20,
		Env: []string{
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"SHELL=/bin/bash", "LANG=C.UTF-8", "SLUICE_CONTROL_FD=3",
		},
	}
	if cfg.Rootless {
		p.Env = append(p.Env, "HOME=/home/user", "USER=user", "LOGNAME=user")
	} else {
		p.Env = append(p.Env, "HOME=/root", "USER=root", "LOGNAME=root")
	}
	p.Quotas = slices.Clone(noNamespaces)
	if cfg.Rootless {
		p.Quotas = append(p.Quotas, rootlessQuotas...)
	}
	owner := func(inside uint32) uint32 {
		if cfg.Rootless {
			return 0
		}
		return spec.UIDBase + inside
	}
	if cfg.Rootless {
		p.UIDBase = 0
	}
	if !cg.Has("memory") {
		p.DataMiB = spec.Limits.MemoryMiB
	}
	if !cg.Has("pids") {
		p.Nproc = spec.Limits.Processes()
	}
	p.Workspace = Op{
		Do: DoMount, FS: "tmpfs", Src: "workspace", Dst: path.Join(spec.Dir, stageName),
		Flags: []string{"nosuid", "nodev"}, Data: "size=1m,mode=0755",
	}

	add := func(ops ...Op) { p.Setup = append(p.Setup, ops...) }
	dir := func(dst string) Op { return Op{Do: DoMkdir, Dst: dst, Mode: 0o755} }
	sealed := []string{"nosuid", "nodev"}
	lower := func(src, dst string) {
		op := Op{Do: DoBind, Src: src, Dst: dst, Flags: []string{"ro", "nosuid", "nodev"}}
		switch {
		case cfg.Rootless:
			// Below a tree that a user namespace binds nothing may be uncovered, so it comes whole; the overlay reads only.
			op.Do, op.Flags = DoRbind, nil
		case v.idmap:
			op.Do = DoIdmap
		}
		add(dir(dst), op)
	}
	overlay := func(dst, name string, layers ...string) {
		data := fmt.Sprintf("lowerdir=%s,upperdir=rw/%s,workdir=rw/%s.work", strings.Join(layers, ":"), name, name)
		if cfg.Rootless {
			data += ",userxattr"
		}
		add(Op{Do: DoMount, FS: "overlay", Src: "overlay", Dst: dst, Flags: sealed, Data: data})
	}

	// Layers are bound into the workspace under neutral names, because an overlay shows the paths that it was given to
	// everybody inside. Upper and work directory must lie on one mount.
	add(dir("rw"), Op{Do: bindVerb(cfg.Rootless), Src: path.Join(spec.Dir, rwName), Dst: "rw"})
	add(Op{Do: DoTouch, Dst: "guestd"}, Op{Do: DoBind, Src: cfg.GuestdPath, Dst: "guestd", Flags: []string{"ro", "nosuid", "nodev"}})
	lower(v.dir, "image")
	add(dir(rootPath))
	overlay(rootPath, "root", "image")
	for _, d := range v.programs {
		name := layerName(d)
		lower(v.over+d, "over_"+name)
		lower(d, name)
		overlay(rootPath+d, name, "over_"+name, name)
	}

	tmpfs := func(dst string, sizeMiB int, mode uint32, flags ...string) {
		data := fmt.Sprintf("size=%dm,mode=%04o", sizeMiB, mode)
		if !cfg.Rootless {
			data += fmt.Sprintf(",uid=%d,gid=%d", owner(0), owner(0))
		}
		add(Op{Do: DoMount, FS: "tmpfs", Src: "tmpfs", Dst: rootPath + dst, Flags: flags, Data: data})
	}
	tmpfs("/tmp", tmpfsMiB(spec.Limits, 6), 0o1777, "nosuid", "nodev")
	tmpfs("/run", tmpfsMiB(spec.Limits, 1), 0o755, "nosuid", "nodev")
	add(Op{Do: DoMkdir, Dst: rootPath + "/run/lock", Mode: 0o1777, UID: owner(0), GID: owner(0)})
	tmpfs("/dev", 1, 0o755, "nosuid", "noexec")
	for _, d := range devices {
		dst := rootPath + "/dev/" + d.name
		if cfg.Rootless { // no user namespace may make a device node, but it may show one of the host's
			add(Op{Do: DoTouch, Dst: dst}, Op{Do: DoBind, Src: "/dev/" + d.name, Dst: dst})
			continue
		}
		add(Op{Do: DoNode, Dst: dst, Dev: d.major<<8 | d.minor, Mode: 0o666, UID: owner(0), GID: owner(0)})
	}
	add(dir(rootPath+"/dev/pts"), dir(rootPath+"/dev/shm"))
	ptsGroup := ""
	if !cfg.Rootless {
		ptsGroup = fmt.Sprintf(",gid=%d", owner(5))
	}
	add(Op{
		Do: DoMount, FS: "devpts", Src: "devpts", Dst: rootPath + "/dev/pts", Flags: []string{"nosuid", "noexec"},
		Data: "newinstance,ptmxmode=0666,mode=0620,max=1024" + ptsGroup,
	})
	tmpfs("/dev/shm", tmpfsMiB(spec.Limits, 4), 0o1777, "nosuid", "nodev", "noexec")
	for _, l := range [][2]string{
		{"pts/ptmx", "ptmx"}, {"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
		{"/proc/self/fd/2", "stderr"},
	} {
		add(Op{Do: DoSymlink, Src: l[0], Dst: rootPath + "/dev/" + l[1]})
	}

	// A new proc may be mounted by a user namespace only while another one is fully visible: before the pivot.
	p.Inside = append(p.Inside,
		Op{Do: DoRbind, Src: rootPath, Dst: rootPath}, // the copy is ours, so it may become the root
		Op{Do: DoMount, FS: "proc", Src: "proc", Dst: rootPath + "/proc", Flags: []string{"nosuid", "nodev", "noexec"}})
	for _, f := range slices.Sorted(slices.Values(maskedProc)) {
		p.Inside = append(p.Inside, Op{Do: DoMask, Dst: rootPath + "/proc/" + f, Optional: true})
	}
	for _, f := range readonlyProc {
		p.Inside = append(p.Inside, Op{Do: DoReadonly, Dst: rootPath + "/proc/" + f, Optional: true})
	}
	p.Inside = append(p.Inside, Op{Do: DoPivot, Dst: rootPath})
	return p
}

// bindVerb: inside a user namespace only whole trees may be bound.
func bindVerb(rootless bool) Do {
	if rootless {
		return DoRbind
	}
	return DoBind
}
