package namespace

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/internal/pidfd"
	"github.com/sluice-edge/sluice/internal/tree"
	"github.com/sluice-edge/sluice/sandboxd/cgroup"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// answerTimeout bounds the whole start for callers whose context has no end of its own: it takes tens of milliseconds,
// and a guest that has not answered after so long will not.
const answerTimeout = 20 * time.Second

// Machine starts sandboxes on this host.
type Machine struct {
	// Fixed after New.
	cfg     Config
	cgroups cgroup.Host
	limits  []string
	log     *zap.Logger
	shifts  bool              // owners of the image can be shifted to a sandbox's ids
	step    func(name string) // tests look in, and die, between the steps

	mu   sync.Mutex // guards view
	view *view      // of the host; made at the first start that needs it
}

// New finds out what the host can do. It starts nothing and leaves nothing but the shared view in StateDir.
func New(cfg Config) (*Machine, error) {
	if os.Geteuid() != 0 {
		cfg.Rootless = true
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.Ready == nil {
		cfg.Ready = answersHTTP
	}
	if !filepath.IsAbs(cfg.StateDir) {
		return nil, errs.New(errs.Invalid, "the state directory %q is not an absolute path", cfg.StateDir)
	}
	var err error
	if cfg.GuestdPath, err = filepath.Abs(cfg.GuestdPath); err != nil {
		return nil, fmt.Errorf("find guestd: %w", err)
	}
	st, err := os.Stat(cfg.GuestdPath)
	if err != nil {
		return nil, fmt.Errorf("find guestd: %w", err)
	}
	if !st.Mode().IsRegular() || st.Mode()&0o005 != 0o005 {
		return nil, errs.New(errs.Invalid, "guestd at %q is not a file that everybody may read and execute", cfg.GuestdPath)
	}
	if err := os.MkdirAll(cfg.StateDir, 0o755); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	m := &Machine{cfg: cfg, log: cfg.Log.Named("namespace"), step: func(string) {}}
	m.limits = append(m.limits,
		"namespaces share the host's kernel: not a security boundary against hostile code",
		"the disk that a sandbox may fill is not limited")
	if cfg.Rootless {
		if err := probeRootless(); err != nil {
			return nil, &errs.Error{
				Code: errs.Unavailable, Err: err,
				Msg: "this host forbids user namespaces to users without privilege: run as root, or allow them " +
					"(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns, kernel.unprivileged_userns_clone)",
			}
		}
		m.limits = append(m.limits, "without root egress is off: a sandbox has no way out of its own network, and is reached through guestd; `root` inside has no power")
	}
	var why []string
	m.cgroups, why = cgroup.Probe()
	m.limits = append(m.limits, m.cgroups.Limitations(why, map[string]string{
		"memory": "memory is limited for each process, not for the sandbox",
		"pids":   "processes are limited for each user, not for the sandbox",
		"cpu":    "cpu is not limited",
	})...)
	if !cfg.Rootless {
		probed := cfg.TemplateDir
		if probed == "" {
			probed = "/usr"
		}
		if err := probeIdmap(probed); err != nil {
			m.limits = append(m.limits, fmt.Sprintf("owners of %s cannot be shifted (%v): files of the image belong to nobody inside", probed, err))
		} else {
			m.shifts = true
		}
	}
	return m, nil
}

// Limitations is what this machine cannot enforce on this host, in words for an operator.
func (m *Machine) Limitations() []string { return slices.Clone(m.limits) }

// probeIdmap tries the real thing on a detached mount.
func probeIdmap(dir string) error {
	ids := []syscall.SysProcIDMap{{HostID: idCount, Size: idCount}}
	return withUserNamespace(&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}, func(userns int) error {
		fd, err := cloneIdmapped(dir, userns)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	})
}

// probeRootless tries what distributions switch off for users without privilege.
func probeRootless() error {
	attr := &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: userID, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: userID, HostID: os.Getegid(), Size: 1}},
		AmbientCaps: []uintptr{unix.CAP_SYS_ADMIN},
	}
	return withUserNamespace(attr, func(int) error { return nil })
}

// withUserNamespace lends the user namespace of a process that is made for it.
func withUserNamespace(attr *syscall.SysProcAttr, use func(fd int) error) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{probeName}
	cmd.Env = []string{}
	cmd.SysProcAttr = attr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed is how it ends
	}()
	defer stdin.Close()
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return use(fd)
}

// viewFor is the image that the spec asks for.
func (m *Machine) viewFor(spec Spec) (view, error) {
	template := spec.Template
	if template == "" {
		template = m.cfg.TemplateDir
	}
	if template != "" {
		st, err := os.Stat(template)
		if err != nil {
			return view{}, fmt.Errorf("find template: %w", err)
		}
		if !st.IsDir() {
			return view{}, errs.New(errs.Invalid, "the template is not a directory")
		}
		return view{dir: template, idmap: m.shifts}, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.view == nil {
		v, err := buildView(m.cfg.StateDir, m.cfg.Rootless)
		if err != nil {
			return view{}, err
		}
		v.idmap = m.shifts
		m.view = &v
	}
	return *m.view, nil
}

// Start makes the sandbox and returns when its agent answers. The sandbox then runs, but dies with this process until
// Commit. On error nothing is left.
func (m *Machine) Start(ctx context.Context, spec Spec) (_ *Process, err error) {
	if err := spec.validate(m.cfg.Rootless); err != nil {
		return nil, err
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	v, err := m.viewFor(spec)
	if err != nil {
		return nil, err
	}
	cg := m.cgroups.Plan(spec.cgroupName(), spec.Limits)
	plan := compile(m.cfg, spec, v, cg)
	if err := claim(spec); err != nil {
		return nil, err
	}

	defer func() {
		if err == nil {
			return
		}
		// Destroy finds everything by the spec, whole or half made, so it is all the undo there is to do.
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTimeout)
		defer cancel()
		if derr := m.Destroy(undo, spec); derr != nil {
			err = errors.Join(err, fmt.Errorf("undo: %w", derr))
		}
	}()
	if err := m.makeDirs(spec, v); err != nil {
		return nil, err
	}
	m.step("dirs")
	if err := os.WriteFile(filepath.Join(spec.Dir, cgroupsName), []byte(strings.Join(cg.Dirs, "\n")), 0o600); err != nil {
		return nil, fmt.Errorf("note cgroups: %w", err)
	}
	if err := cg.Make(); err != nil {
		return nil, err
	}
	m.step("cgroups")
	control, err := listenControl(spec.controlSocket())
	if err != nil {
		return nil, err
	}
	defer control.Close()
	m.step("listening")
	p, err := m.launch(ctx, spec, plan, control)
	if err != nil {
		return nil, err
	}
	m.step("executed")
	if err := m.awaitAnswer(ctx, p); err != nil {
		return nil, errors.Join(err, p.Kill(ctx))
	}
	m.step("answered")
	m.log.Debug("sandbox started", zap.String("sandbox", spec.ID), zap.Duration("took", time.Since(began)))
	return p, nil
}

// claim makes the first directory, which only one Start can: the undo of a second one would destroy the first one's sandbox.
func claim(spec Spec) error {
	if err := os.MkdirAll(spec.Dir, 0o700); err != nil {
		return fmt.Errorf("make sandbox directory: %w", err)
	}
	// Below it lie files that the sandbox has made executable, or set-user-id, for all: for all inside.
	if err := os.Chmod(spec.Dir, 0o700); err != nil {
		return fmt.Errorf("close sandbox directory: %w", err)
	}
	err := os.Mkdir(filepath.Join(spec.Dir, rwName), 0o700)
	if errors.Is(err, fs.ErrExist) {
		return &errs.Error{Code: errs.Conflict, Msg: "the sandbox exists", Err: err}
	}
	if err != nil {
		return fmt.Errorf("make sandbox directory: %w", err)
	}
	return nil
}

// makeDirs writes the sandbox's top layer and the places for its mounts.
func (m *Machine) makeDirs(spec Spec, v view) error {
	rw := filepath.Join(spec.Dir, rwName)
	im, err := privateFiles(spec, v.dir, m.cfg.Rootless)
	if err != nil {
		return err
	}
	// The workspace's mount point, and for every overlay an upper and a work directory.
	dirs := []string{filepath.Join(spec.Dir, stageName), filepath.Join(rw, "root.work")}
	owned := []string{filepath.Join(rw, "root")}
	for _, d := range v.programs {
		dirs = append(dirs, filepath.Join(rw, layerName(d)+".work"))
		owned = append(owned, filepath.Join(rw, layerName(d)))
	}
	for _, d := range dirs {
		if err := os.Mkdir(d, 0o700); err != nil {
			return fmt.Errorf("make sandbox directory: %w", err)
		}
	}
	for _, d := range owned { // the sandbox's own roots, seen inside with this mode
		if err := os.Mkdir(d, 0o755); err != nil {
			return fmt.Errorf("make sandbox directory: %w", err)
		}
	}
	for _, name := range im.names() {
		if err := im[name].write(filepath.Join(rw, "root", name), m.cfg.Rootless); err != nil {
			return fmt.Errorf("write sandbox's files: %w", err)
		}
	}
	if m.cfg.Rootless {
		return nil
	}
	for _, d := range owned {
		if err := chownTree(d, filepath.Join(rw, "root", "home", "user"), spec.UIDBase); err != nil {
			return fmt.Errorf("give sandbox its files: %w", err)
		}
	}
	return nil
}

func chownTree(dir, home string, base uint32) error {
	return filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		id := int(base)
		if name == home || strings.HasPrefix(name, home+"/") {
			id += userID
		}
		return os.Lchown(name, id, id)
	})
}

// listenControl makes the socket here, because guestd has no path to it. Only the listening descriptor goes inside.
func listenControl(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on control socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	return l.File()
}

// launch runs the stages, up to the execution of guestd.
func (m *Machine) launch(ctx context.Context, spec Spec, plan Plan, control *os.File) (_ *Process, err error) {
	log, said, err := openLog()
	if err != nil {
		return nil, err
	}
	defer log.Close()
	defer func() {
		if err != nil {
			said.Close()
		}
	}()
	planRead, planWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer planRead.Close()
	defer planWrite.Close()
	statusRead, statusWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer statusRead.Close()
	defer statusWrite.Close()
	commitRead, commitWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer commitRead.Close()

	stage := exec.Command("/proc/self/exe")
	stage.Args = []string{stageOneName}
	stage.Env = []string{}
	stage.Dir = "/"
	stage.Stdin, stage.Stdout, stage.Stderr = planRead, log, log
	stage.ExtraFiles = []*os.File{control, statusWrite, commitRead} // 3, 4, 5
	stage.SysProcAttr = &syscall.SysProcAttr{Setsid: true}          // Ctrl-C is for the daemon alone
	if err := stage.Start(); err != nil {
		commitWrite.Close()
		return nil, fmt.Errorf("execute stage one: %w", err)
	}
	go m.collect(stage, spec.ID)
	statusWrite.Close()
	m.step("stage one")
	p, err := m.follow(ctx, spec, plan, planWrite, statusRead, held{commit: commitWrite, log: said})
	if err != nil {
		commitWrite.Close() // the watchdog kills what there is
	}
	return p, err
}

// collect waits for stage one, which ends at Commit or with the sandbox.
func (m *Machine) collect(stage *exec.Cmd, id string) {
	if err := stage.Wait(); err != nil {
		m.log.Debug("stage one ended", zap.String("sandbox", id), zap.Error(err))
	}
}

// follow hands stage one the plan and reads what the stages report. The end of the report without an error means that
// guestd was executed.
func (m *Machine) follow(ctx context.Context, spec Spec, plan Plan, planWrite, statusRead *os.File, held held) (p *Process, err error) {
	deadline, _ := ctx.Deadline()
	if err := errors.Join(statusRead.SetReadDeadline(deadline), planWrite.SetWriteDeadline(deadline)); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = statusRead.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := json.NewEncoder(planWrite).Encode(plan); err != nil {
		return nil, fmt.Errorf("send plan: %w", err)
	}
	planWrite.Close()
	defer func() {
		if err != nil && p != nil {
			err = errors.Join(err, p.Kill(context.WithoutCancel(ctx)))
			p = nil
		}
	}()
	lines := bufio.NewScanner(statusRead)
	for lines.Scan() {
		var s status
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			return p, fmt.Errorf("read status of start: %w", err)
		}
		if s.Error != "" {
			return p, fmt.Errorf("start sandbox: %s", s.Error)
		}
		if s.PID != 0 {
			if p, err = m.watchChild(s.PID, spec, plan, held); err != nil {
				return nil, err
			}
		}
		m.step(s.Step)
	}
	if err := lines.Err(); err != nil {
		return p, fmt.Errorf("read status of start: %w", errors.Join(err, context.Cause(ctx)))
	}
	if p == nil {
		return nil, errors.New("stage one ended without a word")
	}
	return p, nil
}

func (m *Machine) watchChild(pid int, spec Spec, plan Plan, held held) (*Process, error) {
	start, err := pidfd.StartTime(pid)
	if err != nil {
		return nil, fmt.Errorf("find sandbox's process: %w", err)
	}
	if err := os.WriteFile(filepath.Join(spec.Dir, pidName), fmt.Appendf(nil, "%d %d", pid, start), 0o600); err != nil {
		return nil, fmt.Errorf("note sandbox's process: %w", err)
	}
	process, err := pidfd.Open(pid, start)
	if err != nil {
		return nil, fmt.Errorf("open sandbox's process: %w", err)
	}
	h := Handle{PID: pid, StartTime: start, ControlSocket: spec.controlSocket(), CgroupPaths: plan.Cgroups}
	return newProcess(h, process, held), nil
}

func (m *Machine) awaitAnswer(ctx context.Context, p *Process) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-p.Done():
			cancel(p.Err())
		case <-stop:
		}
	}()
	if err := m.cfg.Ready(ctx, p.handle.ControlSocket); err != nil {
		return fmt.Errorf("wait for guestd: %w", errors.Join(err, context.Cause(ctx)))
	}
	return nil
}

// answersHTTP asks once: the socket listens since before guestd existed, so the question waits in the queue for it.
func answersHTTP(ctx context.Context, socket string) error {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://guest/health", nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 4<<10))
	return resp.Body.Close()
}

// Adopt takes over a sandbox that another daemon started and committed. NotFound means that it is gone; Destroy then
// removes what it left.
func (m *Machine) Adopt(ctx context.Context, spec Spec, h Handle) (*Process, error) {
	if err := spec.validate(m.cfg.Rootless); err != nil {
		return nil, err
	}
	process, err := pidfd.Open(h.PID, h.StartTime)
	if errors.Is(err, unix.ESRCH) {
		return nil, &errs.Error{Code: errs.NotFound, Msg: "the sandbox is gone", Err: err}
	}
	if err != nil {
		return nil, fmt.Errorf("open sandbox's process: %w", err)
	}
	// A record of another sandbox, or of a process that never became one, is not taken for this one.
	if !newSurvivors(spec, m.cfg.Rootless).owns(h.PID) {
		process.Close()
		return nil, errs.New(errs.NotFound, "the process on record is not this sandbox")
	}
	p := newProcess(h, process, held{})
	if err := m.awaitAnswer(ctx, p); err != nil {
		return nil, errors.Join(err, p.Release())
	}
	return p, nil
}

// Destroy removes the sandbox, whatever of it exists: its processes, cgroups and files. It needs no Process and no Handle,
// is idempotent, and works on what a crash left half made. Nothing that is not this sandbox's is touched.
func (m *Machine) Destroy(ctx context.Context, spec Spec) error {
	if err := spec.validate(m.cfg.Rootless); err != nil {
		return err
	}
	if err := m.killSurvivors(ctx, spec); err != nil {
		return err
	}
	return errors.Join(m.removeCgroups(ctx, spec), removeFiles(spec.Dir))
}

// removeCgroups also removes those that a daemon made which lived in another cgroup than we do.
func (m *Machine) removeCgroups(ctx context.Context, spec Spec) error {
	dirs := m.cgroups.Plan(spec.cgroupName(), spec.Limits).Dirs
	noted, err := os.ReadFile(filepath.Join(spec.Dir, cgroupsName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read note of cgroups: %w", err)
	}
	for _, d := range strings.Fields(string(noted)) {
		if filepath.Base(d) == spec.cgroupName() && !slices.Contains(dirs, d) {
			dirs = append(dirs, d)
		}
	}
	var all error
	for _, d := range dirs {
		all = errors.Join(all, cgroup.Remove(ctx, d))
	}
	return all
}

// killSurvivors repeats until a whole look at /proc finds none: a stage may have cloned while we looked.
func (m *Machine) killSurvivors(ctx context.Context, spec Spec) error {
	s := newSurvivors(spec, m.cfg.Rootless)
	for {
		pids, err := pidfd.All()
		if err != nil {
			return fmt.Errorf("list processes: %w", err)
		}
		found := 0
		for _, pid := range pids {
			if s.owns(pid) {
				found++
				pidfd.KillIf(pid, func() bool { return s.owns(pid) })
			}
		}
		if found == 0 {
			return nil
		}
		if err := sleep(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("wait for killed processes of %s: %w", strconv.Quote(spec.ID), err)
		}
	}
}

// removeFiles removes what we made in dir, and dir if nothing else is in it.
func removeFiles(dir string) error {
	var all error
	for _, name := range []string{rwName, stageName, controlName, pidName, cgroupsName} {
		all = errors.Join(all, tree.Remove(filepath.Join(dir, name)))
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		all = errors.Join(all, err)
	}
	return all
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
