package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/guest/gen/process"
)

const (
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	pipeChunk = 32 << 10
	ptyChunk  = 16 << 10

	// drainTime is how long output is still awaited after the process has ended, for helpers that write a last line. A daemon that keeps
	// the pipe open holds up the end no longer than this; what it writes later is read and dropped, so that it does not get SIGPIPE.
	drainTime = time.Second
	// drainBytes bounds what is read after drainTime: as much as a pipe can hold.
	drainBytes = 1 << 20

	// killWait is how long a kill waits for its effect, so that whoever is told of it finds the pid gone. Only a process stuck in the kernel
	// takes longer.
	killWait = 2 * time.Second

	// endKept is how long the result of a process is kept for a client that connects late, and maxEnded for how many at once.
	endKept  = 30 * time.Second
	maxEnded = 1024
)

var (
	errNoStdin    = errors.New("stdin not enabled or closed")
	errHasPTY     = errors.New("process has a PTY: its input is written to the PTY, not to stdin")
	errNoPTY      = errors.New("tty not assigned to process")
	errEnding     = errors.New("the sandbox is ending")
	errCloseOfPTY = errors.New("cannot close stdin of a process with a PTY, send Ctrl+D (0x04) instead")
)

// running is a process from its start until endKept after its end.
type running struct {
	pid    uint32
	tag    *string
	config *process.ProcessConfig
	out    *fanout

	cmd  *exec.Cmd
	tty  *os.File      // master side; nil without PTY
	turn chan struct{} // holds a token: one writer at a time, and a waiting one can give up
	in   *os.File      // write end of stdin; nil without
	shut bool          // in is closed; guarded by turn

	dead chan struct{} // closed when the process is reaped

	mu       sync.Mutex
	reaped   bool // the pid may mean another process from here on
	timedOut bool
	timer    *time.Timer // kills at the deadline of Start; nil without

	end *process.ProcessEvent_EndEvent // written before out.done is closed
}

// processes are the running ones and those that ended a moment ago.
type processes struct {
	log   *slog.Logger
	score *oomScore // fixed before Run; nil to leave it alone

	// forking is held to fork and to enter the child in owned; the reaper of orphans holds it to look and reap. So it never takes a child
	// from under its owner.
	forking sync.Mutex
	owned   map[int]struct{}

	mu     sync.Mutex
	byPID  map[uint32]*running
	ended  []*running            // oldest first
	pipes  map[*os.File]struct{} // that a pump reads
	closed bool

	work sync.WaitGroup // everything that serves a process
}

func newProcesses(log *slog.Logger) *processes {
	return &processes{log: log, owned: map[int]struct{}{}, byPID: map[uint32]*running{}, pipes: map[*os.File]struct{}{}}
}

// startSpec is all that a process is started with.
type startSpec struct {
	config   *process.ProcessConfig
	tag      *string
	size     *pty.Winsize // nil without PTY
	stdin    bool
	merged   bool // stderr goes where stdout goes, so that both stay in order
	dir      string
	env      []string
	login    *syscall.Credential // nil to stay who the agent is
	deadline time.Time           // zero for none
}

// start runs a process and subscribes to its output before there can be any.
func (ps *processes) start(spec startSpec) (*running, *reader, error) {
	if !ps.open() {
		return nil, nil, errEnding
	}
	defer ps.work.Done()
	path, err := lookPath(spec.config.GetCmd(), spec.dir, spec.env)
	if err != nil {
		return nil, nil, err
	}
	p := &running{
		tag: spec.tag, config: spec.config, out: newFanout(), turn: make(chan struct{}, 1), dead: make(chan struct{}),
		cmd: &exec.Cmd{
			Path: path,
			Args: append([]string{spec.config.GetCmd()}, spec.config.GetArgs()...),
			Env:  spec.env,
			Dir:  spec.dir,
			// A session of its own: the terminal is its own to control, and a kill reaches what it started.
			SysProcAttr: &syscall.SysProcAttr{Setsid: true, Credential: spec.login},
		},
	}
	p.turn <- struct{}{}
	var ours, theirs files
	defer theirs.close()
	pumps, err := p.plumb(spec, &ours, &theirs)
	if err == nil {
		err = ps.fork(p)
	}
	if err != nil {
		ours.close()
		return nil, nil, err
	}
	r := p.out.subscribe()
	ps.enter(p, pumps)
	if !spec.deadline.IsZero() {
		p.mu.Lock()
		p.timer = time.AfterFunc(time.Until(spec.deadline), p.expire)
		p.mu.Unlock()
	}
	for _, pump := range pumps {
		go ps.carry(pump, p.out)
	}
	go ps.attend(p, pumps)
	return p, r, nil
}

// open counts one more piece of work, unless the agent is ending.
func (ps *processes) open() bool {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.closed {
		return false
	}
	ps.work.Add(1)
	return true
}

// files are descriptors that are closed together.
type files []*os.File

func (fs *files) add(f *os.File) *os.File {
	*fs = append(*fs, f)
	return f
}

func (fs *files) close() {
	for _, f := range *fs {
		f.Close()
	}
}

// pump is one stream of output on its way to the readers.
type pump struct {
	from  *os.File
	chunk int
	event func([]byte) *process.ProcessEvent_DataEvent
	ended chan struct{} // closed when everything was published
	grace chan struct{} // closed when the process is gone: what is there is read, what may come is awaited until limit
	limit time.Time     // written before grace is closed
}

func newPump(from *os.File, chunk int, event func([]byte) *process.ProcessEvent_DataEvent) *pump {
	return &pump{from: from, chunk: chunk, event: event, ended: make(chan struct{}), grace: make(chan struct{})}
}

// plumb connects the three standard streams: pipes, or a PTY for all.
func (p *running) plumb(spec startSpec, ours, theirs *files) ([]*pump, error) {
	if spec.size != nil {
		master, slave, err := openPTY(spec)
		if err != nil {
			return nil, fmt.Errorf("open pty: %w", err)
		}
		p.tty = ours.add(master)
		theirs.add(slave)
		p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = slave, slave, slave
		p.cmd.SysProcAttr.Setctty = true // of descriptor 0
		return []*pump{newPump(master, ptyChunk, func(b []byte) *process.ProcessEvent_DataEvent {
			return &process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Pty{Pty: b}}
		})}, nil
	}
	if spec.stdin {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("open stdin: %w", err)
		}
		p.cmd.Stdin, p.in = theirs.add(r), ours.add(w)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("open stdout: %w", err)
	}
	p.cmd.Stdout = theirs.add(outW)
	ours.add(outR)
	stdout := newPump(outR, pipeChunk, func(b []byte) *process.ProcessEvent_DataEvent {
		return &process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stdout{Stdout: b}}
	})
	if spec.merged {
		p.cmd.Stderr = outW
		return []*pump{stdout}, nil
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("open stderr: %w", err)
	}
	p.cmd.Stderr = theirs.add(errW)
	ours.add(errR)
	return []*pump{
		stdout,
		newPump(errR, pipeChunk, func(b []byte) *process.ProcessEvent_DataEvent {
			return &process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stderr{Stderr: b}}
		}),
	}, nil
}

// openPTY opens a pair whose master side honours deadlines and whose slave belongs to the user, who may want to open it again by name.
func openPTY(spec startSpec) (master, slave *os.File, err error) {
	blocking, slave, err := pty.Open()
	if err != nil {
		return nil, nil, err
	}
	defer blocking.Close()
	if spec.login != nil {
		u := account{UID: spec.login.Uid, GID: spec.login.Gid}
		err = own(func() error { return slave.Chown(int(u.UID), int(u.GID)) }, u)
	}
	if err == nil {
		err = pty.Setsize(slave, spec.size)
	}
	fd := -1
	if err == nil {
		// The library has put its descriptor into blocking mode for good; a non-blocking duplicate goes to the poller.
		fd, err = unix.FcntlInt(blocking.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		slave.Close()
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, nil, err
	}
	return os.NewFile(uintptr(fd), "ptmx"), slave, nil
}

func (ps *processes) fork(p *running) error {
	ps.forking.Lock()
	defer ps.forking.Unlock()
	defer ps.score.lend()()
	if err := p.cmd.Start(); err != nil {
		return err
	}
	ps.owned[p.cmd.Process.Pid] = struct{}{}
	p.pid = uint32(p.cmd.Process.Pid)
	return nil
}

// enter makes p known. When the agent is ending, p ends with it.
func (ps *processes) enter(p *running, pumps []*pump) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.byPID[p.pid] = p // may replace one that ended and had the same pid
	for _, pump := range pumps {
		ps.pipes[pump.from] = struct{}{}
	}
	ps.work.Add(1 + len(pumps))
	if ps.closed {
		p.kill()
		for _, pump := range pumps {
			pump.from.Close()
		}
	}
}

// carry runs a pump for as long as anybody in the sandbox holds the other end.
func (ps *processes) carry(p *pump, out *fanout) {
	defer ps.work.Done()
	p.run(out)
	ps.mu.Lock()
	defer ps.mu.Unlock()
	delete(ps.pipes, p.from)
}

// attend is a process's life after its start.
func (ps *processes) attend(p *running, pumps []*pump) {
	defer ps.work.Done()
	// Seen first and reaped under the lock: until then the pid cannot mean another process, so no signal hits a stranger.
	for errors.Is(unix.Waitid(unix.P_PID, int(p.pid), nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
	}
	p.mu.Lock()
	err := p.cmd.Wait()
	p.reaped = true
	if p.timer != nil {
		p.timer.Stop()
	}
	p.mu.Unlock()
	close(p.dead)
	ps.forking.Lock()
	delete(ps.owned, int(p.pid))
	ps.forking.Unlock()

	limit := time.Now().Add(drainTime)
	for _, pump := range pumps {
		pump.limit = limit
		close(pump.grace)
		_ = pump.from.SetReadDeadline(limit) // wakes a read that would wait longer
	}
	for _, pump := range pumps {
		<-pump.ended
	}
	if p.in != nil {
		p.in.Close() // under a writer, if there is one: it gets an error
	}
	state := p.cmd.ProcessState
	p.end = &process.ProcessEvent_EndEvent{ExitCode: int32(state.ExitCode()), Exited: state.Exited(), Status: state.String()}
	if err != nil {
		text := err.Error()
		p.end.Error = &text
	}
	p.out.close()
	ps.retire(p)
	ps.log.Debug("process ended", "pid", p.pid, "status", p.end.Status)
}

// run publishes until the stream ends, or until the process is gone and nothing more is there. Then it publishes no more, but reads on.
func (p *pump) run(out *fanout) {
	buf := make([]byte, p.chunk)
	var late int
	for {
		n, err := p.from.Read(buf)
		if n > 0 {
			out.publish(p.event(slices.Clone(buf[:n])))
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			break // EOF, or EIO from a PTY whose last slave is closed
		}
		select {
		case <-p.grace:
		default:
			continue
		}
		// The reader may be slow: what is in the pipe is still read after the limit, only nothing is awaited then.
		now := time.Now()
		if now.Before(p.limit) {
			_ = p.from.SetReadDeadline(p.limit)
			continue
		}
		if late += n; n == 0 || late > drainBytes {
			break
		}
		_ = p.from.SetReadDeadline(now.Add(10 * time.Millisecond))
	}
	close(p.ended)
	_ = p.from.SetReadDeadline(time.Time{})
	_, _ = io.Copy(io.Discard, struct{ io.Reader }{p.from}) // ends when the last holder of the other end does
	p.from.Close()
}

// retire keeps p for late clients, for a while.
func (ps *processes) retire(p *running) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.ended = append(ps.ended, p)
	if len(ps.ended) > maxEnded {
		ps.forgetLocked(ps.ended[0])
	}
	time.AfterFunc(endKept, func() {
		ps.mu.Lock()
		defer ps.mu.Unlock()
		ps.forgetLocked(p)
	})
}

func (ps *processes) forgetLocked(p *running) {
	ps.ended = slices.DeleteFunc(ps.ended, func(e *running) bool { return e == p })
	if ps.byPID[p.pid] == p {
		delete(ps.byPID, p.pid)
	}
}

// live are the running processes in the order of their pids.
func (ps *processes) live() []*running {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	live := []*running{}
	for _, p := range ps.byPID {
		if !p.isDead() {
			live = append(live, p)
		}
	}
	slices.SortFunc(live, func(a, b *running) int { return cmp.Compare(a.pid, b.pid) })
	return live
}

// find is the process that a selector means. By tag a running one is preferred to one that ended.
func (ps *processes) find(s *process.ProcessSelector) (*running, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	switch by := s.GetSelector().(type) {
	case *process.ProcessSelector_Pid:
		if p, ok := ps.byPID[by.Pid]; ok {
			return p, nil
		}
		return nil, fmt.Errorf("process with pid %d not found", by.Pid)
	case *process.ProcessSelector_Tag:
		var found *running
		for _, p := range ps.byPID {
			if p.tag != nil && *p.tag == by.Tag && (found == nil || !p.isDead()) {
				found = p
			}
		}
		if found != nil {
			return found, nil
		}
		return nil, fmt.Errorf("process with tag %s not found", by.Tag)
	default:
		return nil, errNoSelector
	}
}

var errNoSelector = errors.New("process selector names neither pid nor tag")

// isDead says whether the process is gone. Its end may be told a little later, when its output is.
func (p *running) isDead() bool {
	select {
	case <-p.dead:
		return true
	default:
		return false
	}
}

// signal reaches the process alone, as with E2B, except for SIGKILL, which cannot be passed on by who receives it: that one goes to the group.
// It returns os.ErrProcessDone when there is nobody left.
func (p *running) signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return os.ErrProcessDone
	}
	if s == syscall.SIGKILL {
		_ = syscall.Kill(-int(p.pid), s) // fails only for a process that has not come to setsid or has left its group
	}
	return p.cmd.Process.Signal(s)
}

func (p *running) kill() { _ = p.signal(syscall.SIGKILL) } // already dead is fine

// awaitDeath waits for a kill to take effect, for a while.
func (p *running) awaitDeath(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, killWait)
	defer cancel()
	select {
	case <-p.dead:
	case <-ctx.Done():
	}
}

// expire is the deadline of Start.
func (p *running) expire() {
	p.mu.Lock()
	p.timedOut = !p.reaped
	p.mu.Unlock()
	p.kill()
}

func (p *running) expired() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.timedOut
}

// killAll ends every process, and takes no more. It returns when nothing is left that serves one.
func (ps *processes) killAll() {
	ps.mu.Lock()
	ps.closed = true
	all := make([]*running, 0, len(ps.byPID))
	for _, p := range ps.byPID {
		all = append(all, p)
	}
	pipes := make([]*os.File, 0, len(ps.pipes))
	for f := range ps.pipes {
		pipes = append(pipes, f)
	}
	ps.mu.Unlock()
	for _, p := range all {
		p.kill()
	}
	for _, f := range pipes {
		f.Close()
	}
	ps.work.Wait()
}

// write sends input and waits for the process to take it, as long as ctx lives.
func (p *running) write(ctx context.Context, data []byte, toPTY bool) error {
	switch {
	case toPTY && p.tty == nil:
		return errNoPTY
	case !toPTY && p.tty != nil:
		return errHasPTY
	}
	select {
	case <-p.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { p.turn <- struct{}{} }()
	to := p.tty
	if to == nil {
		to = p.in
	}
	if to == nil || p.shut {
		return errNoStdin
	}
	stop := context.AfterFunc(ctx, func() { _ = to.SetWriteDeadline(time.Unix(1, 0)) })
	_, err := to.Write(data)
	if !stop() {
		_ = to.SetWriteDeadline(time.Time{})
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return cmp.Or(ctx.Err(), errNoStdin)
	case errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.EIO), errors.Is(err, os.ErrClosed):
		return errNoStdin
	default:
		return err
	}
}

// closeStdin tells the process that no more input comes. Closing twice is no error.
func (p *running) closeStdin(ctx context.Context) error {
	if p.tty != nil {
		return errCloseOfPTY
	}
	select {
	case <-p.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { p.turn <- struct{}{} }()
	if p.in == nil || p.shut {
		return nil
	}
	p.shut = true
	return p.in.Close()
}

// resize changes the PTY's size, and the process gets SIGWINCH.
func (p *running) resize(size *pty.Winsize) error {
	if p.tty == nil {
		return errNoPTY
	}
	raw, err := p.tty.SyscallConn()
	if err != nil {
		return err
	}
	ws := &unix.Winsize{Row: size.Rows, Col: size.Cols}
	if cerr := raw.Control(func(fd uintptr) { err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, ws) }); cerr != nil {
		return cerr
	}
	return err
}

// lookPath finds a command by the PATH that the process will have, not by the agent's.
func lookPath(cmd, dir string, env []string) (string, error) {
	if cmd == "" {
		return "", errors.New("no command")
	}
	if strings.IndexByte(cmd, 0) >= 0 {
		return "", errors.New("command contains a NUL byte")
	}
	if strings.Contains(cmd, "/") {
		return cmd, nil // the kernel resolves it against dir
	}
	path := defaultPath
	for _, e := range env {
		if value, ok := strings.CutPrefix(e, "PATH="); ok {
			path = value
		}
	}
	for _, place := range filepath.SplitList(path) {
		candidate := filepath.Join(place, cmd)
		if !filepath.IsAbs(candidate) {
			candidate = filepath.Join(dir, candidate)
		}
		if info, err := os.Stat(candidate); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 {
			return candidate, nil
		}
	}
	return "", fmt.Errorf("%q: %w", cmd, exec.ErrNotFound)
}

// environment is what a process of u sees: the basics, over them what init gave, over that what the request gives.
func environment(u account, layers ...map[string]string) ([]string, error) {
	all := map[string]string{"PATH": defaultPath, "HOME": u.Home, "USER": u.Name, "LOGNAME": u.Name}
	for _, layer := range layers {
		for key, value := range layer {
			if key == "" || strings.ContainsAny(key, "=\x00") || strings.IndexByte(value, 0) >= 0 {
				return nil, fmt.Errorf("invalid environment variable %q", key)
			}
			all[key] = value
		}
	}
	env := make([]string, 0, len(all))
	for key, value := range all {
		env = append(env, key+"="+value)
	}
	slices.Sort(env)
	return env, nil
}

// login is the credential to become u. nil means that the agent is u already. In a sandbox of a single user there is nobody else to become.
func (a *agent) login(u account) (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		if int(u.UID) == os.Geteuid() {
			return nil, nil
		}
		return nil, fmt.Errorf("cannot run as user '%s': the sandbox runs as uid %d only", u.Name, os.Geteuid())
	}
	if !mapped("/proc/self/uid_map", u.UID) || !mapped("/proc/self/gid_map", u.GID) {
		return nil, fmt.Errorf("cannot run as user '%s': the sandbox has no uid %d", u.Name, u.UID)
	}
	if denied, err := os.ReadFile("/proc/self/setgroups"); err == nil && strings.TrimSpace(string(denied)) == "deny" {
		if u.UID == 0 && int(u.GID) == os.Getegid() {
			return nil, nil
		}
		return &syscall.Credential{Uid: u.UID, Gid: u.GID, NoSetGroups: true}, nil
	}
	groups, err := a.accounts.groupsOf(u)
	if err != nil {
		return nil, err
	}
	groups = slices.DeleteFunc(groups, func(gid uint32) bool { return !mapped("/proc/self/gid_map", gid) })
	return &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: groups}, nil
}

// mapped says whether the user namespace has id. Without the file there is no user namespace, and all ids are there.
func mapped(file string, id uint32) bool {
	raw, err := os.ReadFile(file)
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(raw)) {
		var first, outside, count uint64
		if n, _ := fmt.Sscan(line, &first, &outside, &count); n == 3 && uint64(id) >= first && uint64(id) < first+count {
			return true
		}
	}
	return false
}
