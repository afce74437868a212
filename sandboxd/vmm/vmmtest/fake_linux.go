package vmmtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sluice-edge/sluice/sandboxd/vmm"

	"golang.org/x/sys/unix"
)

// Fault is how a call goes wrong.
type Fault string

// The faults.
const (
	Slow     Fault = "slow"      // does it, later
	Hang     Fault = "hang"      // never answers
	Refuse   Fault = "refuse"    // does nothing and says so
	Die      Fault = "die"       // ends before doing it
	DieAfter Fault = "die-after" // does it and ends before answering
	Garbage  Fault = "garbage"   // does it and answers what is not JSON
	Half     Fault = "half"      // does it and breaks off in its answer
	Huge     Fault = "huge"      // does it and answers without end
)

// Faults is the content of a fake kernel: the fake reads it anew at every call, through the file that the Spec names, so a test can
// change it while the fake runs.
type Faults struct {
	Calls map[string]Fault `json:"calls,omitempty"` // by name: "vm.boot"
	Old   bool             `json:"old,omitempty"`   // answers 500 to everything that it refuses, as before v53
}

// WriteKernel writes a kernel for the fake.
func WriteKernel(path string, f Faults) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	// In place: a VM has the file itself bound into its tree, not its name.
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = file.WriteAt(append(b, '\n'), 0)
	return errors.Join(err, file.Truncate(int64(len(b)+1)), file.Close())
}

// Fake is a hypervisor without a processor.
type Fake struct {
	root  string // what its paths are below; "/" for a process in its own tree
	exit  func(code int, last string)
	extra Guest

	mu      sync.Mutex // guards the fields below
	state   vmm.State  // empty when there is no VM
	config  vmm.VMConfig
	taps    []*os.File
	guest   *guest
	serial  *os.File
	vsock   net.Listener
	running sync.Cond // on mu: state has changed
	stop    chan struct{}
}

func runFake(socket string, g *Guest) int {
	number, ok := strings.CutPrefix(socket, "fd=")
	fd, err := strconv.Atoi(number)
	if !ok || err != nil {
		fmt.Fprintf(os.Stderr, "Error parsing --api-socket: %q\n", socket)
		return 1
	}
	l, err := net.FileListener(os.NewFile(uintptr(fd), "api"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if _, err := os.OpenFile("/dev/urandom", os.O_RDONLY, 0); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	f := NewFake("/", func(code int, last string) {
		if last != "" {
			fmt.Fprintln(os.Stderr, last)
		}
		os.Exit(code)
	})
	if g != nil {
		f.extra = *g
	}
	_ = f.Serve(context.Background(), l.(*net.UnixListener))
	return 0
}

// NewFake makes one that finds its files below root. exit is called where the program would end; it may return.
func NewFake(root string, exit func(code int, last string)) *Fake {
	f := &Fake{root: root, exit: exit, stop: make(chan struct{})}
	f.running.L = &f.mu
	return f
}

type connKey struct{}

// Serve answers calls until ctx ends.
func (f *Fake) Serve(ctx context.Context, l *net.UnixListener) error {
	s := &http.Server{
		Handler:           http.HandlerFunc(f.call),
		ReadHeaderTimeout: time.Minute,
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()
	return s.Serve(rightsListener{l})
}

// rightsListener's connections keep the descriptors that come with their bytes.
type rightsListener struct{ *net.UnixListener }

func (l rightsListener) Accept() (net.Conn, error) {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	return &rightsConn{UnixConn: c}, nil
}

type rightsConn struct {
	*net.UnixConn
	mu    sync.Mutex // guards files
	files []*os.File
}

func (c *rightsConn) Read(b []byte) (int, error) {
	oob := make([]byte, 256)
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if oobn > 0 {
		c.keep(oob[:oobn])
	}
	if n == 0 && err == nil && len(b) > 0 {
		return 0, io.EOF
	}
	return n, err
}

func (c *rightsConn) keep(oob []byte) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			c.files = append(c.files, os.NewFile(uintptr(fd), "passed"))
		}
	}
}

func (c *rightsConn) take() []*os.File {
	c.mu.Lock()
	defer c.mu.Unlock()
	files := c.files
	c.files = nil
	return files
}

func (f *Fake) faults() Faults {
	var faults Faults
	b, err := os.ReadFile(filepath.Join(f.root, "kernel"))
	if err == nil {
		_ = json.Unmarshal(b, &faults)
	}
	return faults
}

func (f *Fake) call(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/api/v1/")
	faults := f.faults()
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return
	}
	var files []*os.File
	if c, ok := r.Context().Value(connKey{}).(*rightsConn); ok {
		files = c.take()
	}
	fault := faults.Calls[name]
	switch fault {
	case Slow:
		time.Sleep(100 * time.Millisecond) // the fault itself, not a wait for anything
	case Hang:
		<-r.Context().Done()
		return
	case Refuse:
		refuse(w, http.StatusInternalServerError, "Internal Server Error", "Error from API", "The fake was told to refuse "+name)
		return
	case Die:
		f.exit(1, "thread 'vmm' panicked: the fake was told to die at "+name)
		panic(http.ErrAbortHandler)
	}
	answer, status, err := f.do(r.Method, name, body, files)
	switch fault {
	case DieAfter:
		f.exit(1, "thread 'vmm' panicked: the fake was told to die after "+name)
		panic(http.ErrAbortHandler)
	case Garbage:
		_, _ = io.WriteString(w, "\x00<html>not what you want</html>")
		return
	case Half:
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, `{"state":"Run`)
		panic(http.ErrAbortHandler)
	case Huge:
		for r.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
		return
	}
	if err != nil {
		if faults.Old && status != http.StatusBadRequest {
			status = http.StatusInternalServerError
		}
		refuse(w, status, http.StatusText(status), "Error from API", err.Error())
		return
	}
	if answer == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer)
}

func refuse(w http.ResponseWriter, status int, chain ...string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(chain)
}

var (
	errAbsent = errors.New("VM is not created")
	errState  = errors.New("invalid transition of the VM's state")
)

// do performs a call, strictly in the order in which the real one insists on.
func (f *Fake) do(method, name string, body []byte, files []*os.File) (answer any, status int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	get := slices.Contains([]string{"vmm.ping", "vm.info", "vm.counters"}, name)
	if get != (method == http.MethodGet) {
		return nil, http.StatusBadRequest, errors.New("wrong method")
	}
	needsBody := slices.Contains([]string{"vm.create", "vm.add-net", "vm.add-disk", "vm.remove-device", "vm.snapshot", "vm.restore", "vm.resize", "vm.resize-disk"}, name)
	if needsBody != (len(body) > 0) {
		return nil, http.StatusBadRequest, errors.New("a body where none belongs, or none where it does")
	}
	in := func(states ...vmm.State) error {
		switch {
		case f.state == "":
			status = http.StatusNotFound
			return errAbsent
		case !slices.Contains(states, f.state):
			status = http.StatusInternalServerError
			return errState
		}
		return nil
	}
	fail := func(err error) (any, int, error) {
		if status == 0 {
			status = http.StatusInternalServerError
		}
		return nil, status, err
	}
	switch name {
	case "vmm.ping":
		return vmm.Ping{Version: strings.TrimPrefix(FakeVersion, "v"), BuildVersion: FakeVersion, PID: int64(os.Getpid())}, 0, nil
	case "vmm.shutdown":
		go f.exit(0, "")
		return nil, 0, nil
	case "vm.create":
		if f.state != "" {
			return fail(errors.New("VM is already created"))
		}
		if err := json.Unmarshal(body, &f.config); err != nil {
			return nil, http.StatusBadRequest, err
		}
		if err := f.open(); err != nil {
			return fail(err)
		}
		f.guest = &guest{hw: &fakeHardware{f}}
		f.set(vmm.StateCreated)
	case "vm.add-net":
		if err := in(vmm.StateCreated); err != nil {
			return fail(err)
		}
		var n vmm.NetConfig
		if err := json.Unmarshal(body, &n); err != nil {
			return nil, http.StatusBadRequest, err
		}
		if len(files) != 1 {
			return fail(fmt.Errorf("%d descriptors for a network card", len(files)))
		}
		f.config.Net = append(f.config.Net, n)
		f.taps = append(f.taps, files...)
	case "vm.boot":
		if err := in(vmm.StateCreated); err != nil {
			return fail(err)
		}
		if _, err := os.Stat(f.path(f.config.Payload.Kernel)); err != nil {
			return fail(err)
		}
		f.set(vmm.StateRunning)
		f.start()
		go f.sayUp()
	case "vm.info":
		if f.state == "" {
			return nil, http.StatusNotFound, errAbsent
		}
		return vmm.Info{State: f.state, Config: f.config, MemoryActualSize: f.config.Memory.Size}, 0, nil
	case "vm.counters":
		if err := in(vmm.StateRunning, vmm.StatePaused); err != nil {
			return fail(err)
		}
		return vmm.Counters{"net0": {"rx_bytes": 0, "tx_bytes": 0}, "root": {"read_bytes": 0}}, 0, nil
	case "vm.pause":
		if err := in(vmm.StateRunning); err != nil {
			return fail(err)
		}
		f.set(vmm.StatePaused)
	case "vm.resume":
		if err := in(vmm.StatePaused); err != nil {
			return fail(err)
		}
		f.set(vmm.StateRunning)
	case "vm.snapshot":
		if err := in(vmm.StatePaused); err != nil {
			return fail(err)
		}
		var s struct {
			URL string `json:"destination_url"`
		}
		if err := json.Unmarshal(body, &s); err != nil {
			return nil, http.StatusBadRequest, err
		}
		if err := f.snapshot(f.path(strings.TrimPrefix(s.URL, "file://"))); err != nil {
			return fail(err)
		}
	case "vm.restore":
		if f.state != "" {
			return fail(errors.New("VM is already created"))
		}
		var r struct {
			URL    string `json:"source_url"`
			NetFDs []struct {
				ID  string `json:"id"`
				Num int    `json:"num_fds"`
			} `json:"net_fds"`
			Resume bool `json:"resume"`
		}
		if err := json.Unmarshal(body, &r); err != nil {
			return nil, http.StatusBadRequest, err
		}
		if len(r.NetFDs) != len(files) {
			return nil, http.StatusBadRequest, fmt.Errorf("%d descriptors for %d network cards", len(files), len(r.NetFDs))
		}
		if err := f.restore(f.path(strings.TrimPrefix(r.URL, "file://")), len(files)); err != nil {
			f.config, f.guest = vmm.VMConfig{}, nil
			return fail(err)
		}
		f.taps = files
		f.set(vmm.StatePaused)
		f.start()
		if r.Resume {
			f.set(vmm.StateRunning)
		}
	case "vm.shutdown", "vm.delete":
		if err := in(vmm.StateRunning, vmm.StatePaused, vmm.StateCreated, vmm.StateShutdown); err != nil {
			return fail(err)
		}
		f.set(vmm.StateShutdown)
		if name == "vm.delete" {
			f.set("")
			f.config = vmm.VMConfig{}
		}
	case "vm.power-button", "vm.resize", "vm.resize-disk", "vm.add-disk", "vm.remove-device":
		if err := in(vmm.StateRunning, vmm.StatePaused); err != nil {
			return fail(err)
		}
	default:
		return nil, http.StatusNotFound, fmt.Errorf("no call %q", name)
	}
	return nil, 0, nil
}

func (f *Fake) path(inside string) string { return filepath.Join(f.root, inside) }

func (f *Fake) set(s vmm.State) {
	f.state = s
	f.running.Broadcast()
}

// open makes what the real one makes when it learns its configuration.
func (f *Fake) open() error {
	for _, d := range f.config.Disks {
		if d.ImageType != "Raw" {
			return fmt.Errorf("disk %s: image type %q", d.ID, d.ImageType)
		}
		flag := os.O_RDWR
		if d.ReadOnly {
			flag = os.O_RDONLY
		}
		file, err := os.OpenFile(f.path(d.Path), flag, 0)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
		file.Close()
	}
	var err error
	if f.serial, err = os.OpenFile(f.path(f.config.Serial.File), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600); err != nil {
		return fmt.Errorf("serial: %w", err)
	}
	if f.config.Vsock != nil {
		if f.vsock, err = net.Listen("unix", f.path(f.config.Vsock.Socket)); err != nil {
			return fmt.Errorf("vsock: %w", err)
		}
	}
	return nil
}

func (f *Fake) start() {
	if f.vsock != nil {
		go f.serveVsock(f.vsock)
	}
}

// sayUp is the guest's first word, on its console and to the host.
func (f *Fake) sayUp() {
	f.guest.hw.say("READY")
	socket := f.path(f.config.Vsock.Socket)
	dial := func(port uint32) (net.Conn, error) { return net.Dial("unix", fmt.Sprintf("%s_%d", socket, port)) }
	if c, err := dial(UpPort); err == nil { // else nobody wants to know
		_, _ = io.WriteString(c, "up\n")
		c.Close()
	}
	if f.extra.Up != nil {
		f.extra.Up(dial)
	}
}

func (f *Fake) serveVsock(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			var port uint32
			var line []byte
			for b := make([]byte, 1); len(line) < 32; line = append(line, b[0]) {
				if _, err := io.ReadFull(c, b); err != nil {
					return
				}
				if b[0] == '\n' {
					break
				}
			}
			var serve func(net.Conn)
			if _, err := fmt.Sscanf(string(line), "CONNECT %d", &port); err != nil {
				return
			}
			if serve = f.extra.Serve[port]; serve == nil && port != GuestPort {
				return
			}
			var err error
			f.whileRunning(func() { _, err = io.WriteString(c, "OK 1073741824\n") })
			switch {
			case err != nil:
			case serve != nil:
				serve(pausedConn{c, f})
			default:
				f.guest.serve(c, f.whileRunning)
			}
		}()
	}
}

// pausedConn hands bytes to the guest, and takes its own, only while the VM runs.
type pausedConn struct {
	net.Conn
	f *Fake
}

func (c pausedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.f.whileRunning(func() {})
	return n, err
}

func (c pausedConn) Write(b []byte) (int, error) {
	c.f.whileRunning(func() {})
	return c.Conn.Write(b)
}

// whileRunning is a step of the guest's processor: it waits while the VM is paused.
func (f *Fake) whileRunning(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.state != vmm.StateRunning {
		f.running.Wait()
	}
	fn()
}

const (
	fakeConfig = "config.json"
	fakeState  = "state.json"
	fakeMemory = "memory-ranges"
	memoryAt   = 1 << 20 // where the guest lives in its memory
	extraAt    = 2 << 20 // and what Guest.Save returned: its length in twenty digits, and itself
)

func (f *Fake) snapshot(dir string) error {
	config, err := json.Marshal(f.config)
	if err != nil {
		return err
	}
	for name, content := range map[string][]byte{fakeConfig: config, fakeState: []byte("{}")} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return err
		}
	}
	m, err := os.OpenFile(filepath.Join(dir, fakeMemory), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer m.Close()
	if err := m.Truncate(f.config.Memory.Size); err != nil {
		return err
	}
	var extra []byte
	if f.extra.Save != nil {
		extra = f.extra.Save()
	}
	if int64(len(extra)) > f.config.Memory.Size-extraAt-20 {
		return errors.New("the guest's memory is full")
	}
	_, err = fmt.Fprintf(io.NewOffsetWriter(m, memoryAt), "%020d", f.guest.count)
	if err == nil {
		_, err = fmt.Fprintf(io.NewOffsetWriter(m, extraAt), "%020d%s", len(extra), extra)
	}
	return err
}

func (f *Fake) restore(dir string, taps int) error {
	b, err := os.ReadFile(filepath.Join(dir, fakeConfig))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &f.config); err != nil {
		return fmt.Errorf("read the snapshot's configuration: %w", err)
	}
	if b, err = os.ReadFile(filepath.Join(dir, fakeState)); err != nil || !json.Valid(b) {
		return fmt.Errorf("read the snapshot's state: %w", errors.Join(err, io.ErrUnexpectedEOF))
	}
	if taps != len(f.config.Net) {
		return fmt.Errorf("%d descriptors for %d network cards", taps, len(f.config.Net))
	}
	m, err := os.Open(filepath.Join(dir, fakeMemory))
	if err != nil {
		return err
	}
	defer m.Close()
	count, err := readNumber(m, memoryAt)
	if err != nil {
		return err
	}
	n, err := readNumber(m, extraAt)
	if err != nil {
		return err
	}
	if f.extra.Load != nil {
		extra := make([]byte, n)
		if _, err := m.ReadAt(extra, extraAt+20); err != nil {
			return fmt.Errorf("read the snapshot's memory: %w", err)
		}
		f.extra.Load(extra)
	}
	f.guest = &guest{hw: &fakeHardware{f}, count: count}
	return f.open()
}

func readNumber(m *os.File, at int64) (int64, error) {
	b := make([]byte, 20)
	if _, err := m.ReadAt(b, at); err != nil {
		return 0, fmt.Errorf("read the snapshot's memory: %w", err)
	}
	n, err := strconv.ParseInt(string(b), 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("read the snapshot's memory: %q is not a count", b)
	}
	return n, nil
}

type fakeHardware struct{ f *Fake }

func (h *fakeHardware) say(text string) { fmt.Fprintln(h.f.serial, text) }

func (h *fakeHardware) disk() (io.ReaderAt, error) {
	return os.Open(filepath.Join(h.f.root, "disk.img"))
}

func (h *fakeHardware) writeDisk(b []byte, off int64) error {
	d, err := os.OpenFile(filepath.Join(h.f.root, "disk.img"), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = d.WriteAt(b, off)
	return errors.Join(err, d.Close())
}

func (h *fakeHardware) mac() string {
	if len(h.f.config.Net) == 0 {
		return ""
	}
	return h.f.config.Net[0].MAC
}

func (h *fakeHardware) off() { h.f.exit(0, "") }

func (h *fakeHardware) crash() {
	h.say("Kernel panic - not syncing: the guest was told to crash")
	h.f.exit(0, "")
}
