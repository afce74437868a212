package sdk

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/sluice-edge/sluice/internal/lab"
	"github.com/sluice-edge/sluice/internal/testkit"
	"github.com/sluice-edge/sluice/sandboxd/image"
)

// TestMain ends the nested host with the tests.
func TestMain(m *testing.M) {
	code := m.Run()
	lab.CloseNested()
	os.Exit(code)
}

// patience is how much more time everything gets where the processor is emulated.
const patience = 10

// vmHost is where a node with virtual machines runs, and where it finds what the test has made for it.
type vmHost struct {
	programs  string // directory of sluice and guestd
	state     string
	base, web string // images: a docker archive and an OCI layout
	kernel    string
}

// nestedHost is the one in the nested host, with the ports that it serves there.
var nestedHost = vmHost{
	programs: "/sluice/bin", state: lab.NestedDisk + "/state", base: lab.NestedDisk + "/base.tar", web: lab.NestedDisk + "/web", kernel: "/sluice/kernel",
}

const (
	hostVariable = "SLUICE_TEST_VM_HOST" // set for TestVMHost
	hostReady    = "vm host serves with key "

	hostHTTP    = "127.0.0.1:8080"
	hostHTTPS   = "127.0.0.1:8443"
	hostMetrics = "127.0.0.1:9400"
	hostEnd     = "127.0.0.1:8081" // a connection to it ends the test there
)

// build is the command that makes a template: the SDKs' default one, or that of program j.
func (h vmHost) build(name string) []string {
	from := []string{"-from", "docker-archive:" + h.base, "-alias", "code-interpreter-v1", "-memory", "256"}
	if name == "web" {
		from = []string{"-from", "oci:" + h.web, "-start-cmd", "/app/web", "-memory", "128"}
	}
	return append([]string{filepath.Join(h.programs, "sluice"), "template", "build", name, "-cpu", "1", "-kernel", h.kernel, "-state-dir", h.state}, from...)
}

// serve makes the base template and starts `sluice dev` in a laboratory. It returns the API key.
func (h vmHost) serve(t *testing.T, l *lab.Lab) (key string) {
	t.Helper()
	l.Name("*."+domain, netip.MustParseAddr("127.0.0.1"))
	began := time.Now()
	h.run(t, h.build("base"))
	t.Logf("the base template took %v", time.Since(began).Round(time.Second))
	dev := l.Host.Daemon(t, nil, filepath.Join(h.programs, "sluice"), "dev", "-machine", "vm", "-domain", domain,
		"-http", "127.0.0.1:80", "-https", "127.0.0.1:443", "-state-dir", h.state, "-network-name", l.Prefix(), "-debug-listen", "127.0.0.1:9400", "-log-level", "info")
	dev.Await(t, "the API key", lab.Value(&key, "export E2B_API_KEY="))
	return key
}

// run runs a command beside the laboratory, as for another node of the same machine.
func (h vmHost) run(t *testing.T, args []string) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	out := &logWriter{t: t, name: "build"}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
}

// nothingGotOut is what every laboratory in which sandboxes ran must confirm.
func nothingGotOut(t *testing.T, l *lab.Lab) {
	t.Helper()
	for _, trap := range lab.Traps {
		if hits := l.Hits(trap); len(hits) > 0 {
			t.Errorf("a sandbox reached %s: %v", trap, hits)
		}
	}
	if n := l.Strangers(); n > 0 {
		t.Errorf("%d packets of sandboxes left the node with an address that is not its", n)
	}
}

// vmPrograms are what runs against virtual machines: what runs against namespaces, and what only they can do.
func vmPrograms(t *testing.T) []language {
	all := languages(t)
	all[0].programs = append(all[0].programs, "h_pause", "i_wake", "j_image", "k_fork")
	all[1].programs = append(all[1].programs, "h_pause", "i_wake", "k_fork")
	return all
}

// TestVM runs the programs against `sluice dev -machine vm`. Where this machine's KVM cannot run guests, that is in a nested host, with a
// laboratory of its own around it: programs meet the same internet, while they themselves run out here.
func TestVM(t *testing.T) {
	if _, err := lab.FindVMM(); err != nil {
		t.Skip("VM tests need it: " + err.Error())
	}
	base := debianImage(t) // before the laboratory, which has no way out
	web := webImage(t, base)
	programs := filepath.Dir(testkit.Program(t, "sluice"))
	testkit.Program(t, "guestd") // beside it
	if !lab.NativeKVM() {
		runNested(t, vmHost{programs: programs, base: base, web: web})
		return
	}
	l := lab.New(t)
	kernel, err := lab.FindKernel()
	if err != nil {
		t.Skip(err)
	}
	h := vmHost{programs: programs, state: t.TempDir(), base: base, web: web, kernel: kernel.Root}
	key := h.serve(t, l)
	h.run(t, h.build("web")) // the node runs, and sees it at once
	runVMPrograms(t, l, clientEnv(key, filepath.Join(h.state, "ca", "ca.pem")), 1)
	nothingGotOut(t, l)
}

// runNested takes what there is here into the nested host, has TestVMHost serve in there, and runs the programs.
func runNested(t *testing.T, here vmHost) {
	n := lab.NewNested(t)
	l := lab.New(t)
	l.Name("*."+domain, netip.MustParseAddr("127.0.0.1"))
	files := map[string]string{nestedHost.base: here.base}
	err := filepath.WalkDir(here.web, func(file string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files[nestedHost.web+strings.TrimPrefix(file, here.web)] = file
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	host, key := serveNested(t, n, "TestVMHost", here.programs, nil, files)
	for port, inside := range map[string]string{"80": hostHTTP, "443": hostHTTPS, "9400": hostMetrics} {
		forward(t, n, l, "127.0.0.1:"+port, inside)
	}
	build := nestedHost.build("web") // the node runs, and sees it at once
	out, code, err := n.Run(t.Context(), lab.Command{Args: build})
	t.Logf("%s: %s", strings.Join(build, " "), out)
	if err != nil || code != 0 {
		t.Fatalf("build the image of the test: status %d, %v", code, err)
	}

	runVMPrograms(t, l, clientEnv(key, nestedCA(t, n, nestedHost.state)), patience)
	endNested(t, n, host)
}

// serveNested takes the programs and files into the nested host, which are keyed by where they go, and has a test of this binary serve
// there. It returns that, and the API key that it names.
func serveNested(t *testing.T, n *lab.Nested, name, dir string, programs, files map[string]string) (host *lab.NestedDaemon, key string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience*time.Minute)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const test = "/sluice/sdk/test"
	programs = maps.Clone(programs)
	if programs == nil {
		programs = make(map[string]string)
	}
	programs[test] = self
	for _, p := range []string{"sluice", "guestd"} {
		programs[path.Join(nestedHost.programs, p)] = filepath.Join(dir, p)
	}
	for dst, src := range programs {
		if err := n.PutProgram(ctx, src, dst); err != nil {
			t.Fatalf("take %s into the nested host: %v", src, err)
		}
	}
	for dst, src := range files {
		if err := n.Put(ctx, src, dst); err != nil {
			t.Fatalf("take %s into the nested host: %v", src, err)
		}
	}
	host = n.Daemon(t, "host", lab.Command{
		Args: []string{test, "-test.run", "^" + name + "$", "-test.v", "-test.timeout", "2h"}, Env: []string{hostVariable + "=1"}, Dir: path.Dir(test),
	})
	host.Await(t, "the node in it", patience*time.Minute, lab.Value(&key, hostReady))
	return host, key
}

// forward has an address of a laboratory's host stand for one in the nested host.
func forward(t *testing.T, n *lab.Nested, l *lab.Lab, addr, inside string) {
	t.Helper()
	ln, err := l.Host.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	n.Forward(t, ln, inside)
}

// nestedCA returns a file with the development CA that has a directory in the nested host.
func nestedCA(t *testing.T, n *lab.Nested, state string) (file string) {
	t.Helper()
	ca, err := n.Get(t.Context(), state+"/ca/ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, ca, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// endNested tells the test that serves in the nested host that it is over, and waits for its verdict.
func endNested(t *testing.T, n *lab.Nested, host *lab.NestedDaemon) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience*time.Minute)
	defer cancel()
	c, err := n.Dial(ctx, hostEnd)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := host.Wait(ctx); err != nil {
		t.Errorf("the end of the host: %v; its log is above", err)
	}
}

func runVMPrograms(t *testing.T, l *lab.Lab, env []string, slower int) {
	t.Helper()
	env = append(env, fmt.Sprintf("LAB_PATIENCE=%d", slower), "LAB_METRICS=http://127.0.0.1:9400/metrics")
	for _, lang := range vmPrograms(t) {
		lang.time = time.Duration(slower) * programTime
		for _, program := range lang.programs {
			t.Run(lang.name+"/"+program, func(t *testing.T) {
				if lang.missing != "" {
					t.Skip(lang.missing)
				}
				runProgram(t, l, lang, program, env, nil)
			})
		}
	}
}

// TestVMHost is TestVM's other half, in the nested host: it serves until somebody says that it is over.
func TestVMHost(t *testing.T) {
	l := newHostLab(t)
	key := nestedHost.serve(t, l)
	relayAll(t, l, map[string]string{hostHTTP: "127.0.0.1:80", hostHTTPS: "127.0.0.1:443", hostMetrics: "127.0.0.1:9400"})
	over, err := net.Listen("tcp", hostEnd)
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	fmt.Println("\n" + hostReady + key)
	c, err := over.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	nothingGotOut(t, l)
	nestedHost.interruptBuild(t)
}

// newHostLab returns the laboratory of a test that runs in the nested host for one out here. Elsewhere it skips.
func newHostLab(t *testing.T) *lab.Lab {
	t.Helper()
	if os.Getenv(hostVariable) == "" {
		t.Skip("runs in the nested host only, for a test outside")
	}
	return lab.New(t)
}

// relayAll passes connections to addresses of this machine on to those of a laboratory's host.
func relayAll(t *testing.T, l *lab.Lab, addrs map[string]string) {
	t.Helper()
	for at, to := range addrs {
		ln, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		r := &relay{ln: ln, dial: func(ctx context.Context) (net.Conn, error) { return l.Host.Dial(ctx, "tcp", to) }}
		t.Cleanup(r.start())
	}
}

// TestVMCluster runs program g against nodes with virtual machines, as TestVM does the others.
func TestVMCluster(t *testing.T) {
	if _, err := lab.FindVMM(); err != nil {
		t.Skip("VM tests need it: " + err.Error())
	}
	js, server := clusterNeeds(t)
	base := debianImage(t)
	programs := clusterPrograms(t)
	if lab.NativeKVM() {
		c := &cluster{lab: lab.New(t), programs: programs, redisServer: server, machine: "vm", dir: t.TempDir(), slower: 1}
		kernel, err := lab.FindKernel()
		if err != nil {
			t.Skip(err)
		}
		key := vmHost{programs: programs, base: base, kernel: kernel.Root}.serveCluster(t, c)
		runProgram(t, c.lab, js, "g_cluster", clusterEnv(key, c.caFile(), 1), func(what string) { c.do(t, what) })
		nothingGotOut(t, c.lab)
		return
	}
	n := lab.NewNested(t)
	l := lab.New(t)
	l.Name("*."+domain, netip.MustParseAddr(clusterEdges[0]))
	host, key := serveNested(t, n, "TestVMClusterHost", programs, map[string]string{
		nestedRedis: server,
		path.Join(nestedHost.programs, "orchestrator"): filepath.Join(programs, "orchestrator"),
		path.Join(nestedHost.programs, "edge"):         filepath.Join(programs, "edge"),
	}, map[string]string{nestedHost.base: base})
	for i, inside := range hostEdges {
		forward(t, n, l, clusterEdges[i]+":443", inside)
	}
	js.time = patience * programTime
	runProgram(t, l, js, "g_cluster", clusterEnv(key, nestedCA(t, n, nestedCluster), patience), func(what string) { askNested(t, n, what) })
	endNested(t, n, host)
}

const (
	nestedCluster = lab.NestedDisk + "/cluster"
	nestedRedis   = "/sluice/bin/redis-server"
)

// hostEdges are where the nested host serves clusterEdges.
var hostEdges = []string{hostHTTP, hostHTTPS}

// serveCluster starts the cluster and returns an API key. The first node gets its base template from the command; the second makes the
// default one by itself when it starts.
func (h vmHost) serveCluster(t *testing.T, c *cluster) (key string) {
	t.Helper()
	h.state = c.stateDir(clusterNodes[0])
	h.run(t, h.build("base"))
	c.flags = map[string][]string{clusterNodes[1]: {"-default-template", "docker-archive:" + h.base, "-kernel", h.kernel}}
	return c.start(t)
}

// askNested has TestVMClusterHost do something and waits until it is done.
func askNested(t *testing.T, n *lab.Nested, what string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience*startTime)
	defer cancel()
	c, err := n.Dial(ctx, hostEnd)
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	fmt.Fprintln(c, what)
	if answer, err := bufio.NewReader(c).ReadString('\n'); answer != "done\n" {
		t.Errorf("the nested host was asked to %s: %q, %v", what, answer, err)
	}
}

// TestVMClusterHost is TestVMCluster's other half, in the nested host.
func TestVMClusterHost(t *testing.T) {
	l := newHostLab(t)
	c := &cluster{lab: l, programs: nestedHost.programs, redisServer: nestedRedis, machine: "vm", dir: nestedCluster, slower: patience}
	key := nestedHost.serveCluster(t, c)
	relays := make(map[string]string)
	for i, at := range hostEdges {
		relays[at] = clusterEdges[i] + ":443"
	}
	relayAll(t, l, relays)
	asked, err := net.Listen("tcp", hostEnd)
	if err != nil {
		t.Fatal(err)
	}
	defer asked.Close()
	fmt.Println("\n" + hostReady + key)
	c.serveRequests(t, asked)
	nothingGotOut(t, l)
}

// interruptBuild ends a build with Ctrl-C while its machine runs: nothing of it may stay.
func (h vmHost) interruptBuild(t *testing.T) {
	t.Helper()
	args := append(h.build("web"), "-start-cmd", "sleep 1000", "-ready-cmd", "false")
	args[3] = "never"
	cmd := exec.Command(args[0], args[1:]...)
	said, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var last string
	for s := bufio.NewScanner(said); s.Scan(); {
		last = s.Text()
		t.Logf("build: %s", last)
		if strings.Contains(last, "waiting until it is ready") {
			if err := cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(last, "interrupted") {
		t.Errorf("an interrupted build = %v and says %q", err, last)
	}
	for _, dir := range []string{"baking", "templates/never", "templates/.building"} {
		if left, err := os.ReadDir(filepath.Join(h.state, dir)); len(left) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("an interrupted build leaves %v in %s (%v)", left, dir, err)
		}
	}
	if left, err := filepath.Glob("/run/netns/slb-*"); err != nil || len(left) > 0 {
		t.Errorf("an interrupted build leaves %q, %v", left, err)
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range processes {
		if line, err := os.ReadFile(file); err == nil && bytes.HasPrefix(line, []byte("sluice-vm-bake")) {
			t.Errorf("an interrupted build leaves the process %q", line)
		}
	}
}

// relay passes connections on, both ways.
type relay struct {
	ln      net.Listener
	dial    func(ctx context.Context) (net.Conn, error)
	running sync.WaitGroup
}

// start returns what ends it.
func (r *relay) start() (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	r.running.Go(func() {
		for {
			c, err := r.ln.Accept()
			if err != nil {
				return // closed
			}
			r.running.Go(func() { r.serve(ctx, c.(*net.TCPConn)) })
		}
	})
	return func() {
		cancel()
		r.ln.Close()
		r.running.Wait()
	}
}

func (r *relay) serve(ctx context.Context, c *net.TCPConn) {
	defer c.Close()
	up, err := r.dial(ctx)
	if err != nil {
		_ = c.SetLinger(0)
		return
	}
	defer up.Close()
	stop := context.AfterFunc(ctx, func() { c.Close(); up.Close() })
	defer stop()
	var back sync.WaitGroup
	back.Go(func() { passOn(c, up.(*net.TCPConn)) })
	passOn(up.(*net.TCPConn), c)
	back.Wait()
}

// passOn copies one direction. Its end is passed on; an error ends both.
func passOn(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		for _, c := range []*net.TCPConn{to, from} {
			_ = c.SetLinger(0)
			_ = c.Close()
		}
		return
	}
	_ = to.CloseWrite()
}

// testDebian is the root of the base template here: what the programs use, and little else, because an emulated processor reads it.
var testDebian = image.Debian{Suite: "bookworm", Packages: []string{
	"bash", "ca-certificates", "curl", "iproute2", "procps", "python-is-python3", "python3", "sudo",
}}

// debianImage returns a docker archive of testDebian. It is made once, and kept in .build/ under a name that follows from what is in it.
func debianImage(t *testing.T) string {
	t.Helper()
	recipe := sha256.Sum256(fmt.Append(nil, "1", testDebian))
	dir, err := filepath.Abs("../../.build/images")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close() // releases it
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatalf("lock %s: %v", dir, err)
	}
	file := filepath.Join(dir, "debian-"+hex.EncodeToString(recipe[:6])+".tar")
	if exists(file) {
		return file
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		t.Skip("no mmdebstrap for the template of the VM tests: apt-get install mmdebstrap, or make test")
	}
	temp := t.TempDir()
	root, err := os.Create(filepath.Join(temp, "root.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	sum := sha256.New()
	if err := testDebian.WriteTar(t.Context(), io.MultiWriter(root, sum), temp, func(note string) { t.Log(note) }); err != nil {
		t.Fatal(err)
	}
	size, err := root.Seek(0, io.SeekCurrent)
	if err == nil {
		_, err = root.Seek(0, io.SeekStart)
	}
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`{"os":"linux","architecture":"amd64","config":{},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, sum.Sum(nil))
	out, err := os.CreateTemp(dir, "new-")
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(out)
	for _, f := range []struct {
		name string
		size int64
		body io.Reader
	}{
		{"layer.tar", size, root},
		{"config.json", int64(len(config)), strings.NewReader(config)},
		{"manifest.json", int64(len(dockerManifest)), strings.NewReader(dockerManifest)},
	} {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: f.size}))
		if err == nil {
			_, err = io.Copy(w, f.body)
		}
	}
	if err = errors.Join(err, w.Close(), out.Close()); err == nil {
		err = os.Rename(out.Name(), file)
	}
	if err != nil {
		t.Fatal(errors.Join(err, os.Remove(out.Name())))
	}
	return file
}

const dockerManifest = `[{"Config":"config.json","RepoTags":["debian:test"],"Layers":["layer.tar"]}]`

// webImage makes an OCI layout of program j's image: a shell taken from Debian's root, the web server, and a second layer that hides and
// replaces.
func webImage(t *testing.T, base string) (dir string) {
	t.Helper()
	root := readLayer(t, base, map[string]bool{ // enough for a shell
		"bin": true, "lib": true, "lib64": true, "usr": true, "usr/bin": true, "usr/lib": true, "usr/lib64": true, "usr/bin/bash": true, "usr/bin/sh": true, "usr/bin/dash": true,
		"usr/lib/x86_64-linux-gnu": true, "usr/lib/x86_64-linux-gnu/libc.so.6": true, "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2": true,
		"usr/lib64/ld-linux-x86-64.so.2": true, "usr/lib/x86_64-linux-gnu/libtinfo.so.6": true, "usr/lib/x86_64-linux-gnu/libtinfo.so.6.4": true,
		"tmp": true, "root": true, "home": true, "etc": true,
	})
	program := filepath.Join(t.TempDir(), "web")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./testdata/web")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the web server: %v\n%s", err, out)
	}
	server, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	first := tarLayer(t, root, []tarFile{
		{name: "etc/passwd", body: "root:x:0:0:root:/root:/bin/sh\nweb:x:1234:1234::/app:/bin/sh\n"}, {name: "etc/group", body: "root:x:0:\nweb:x:1234:\n"},
		{name: "app/", uid: 1234}, {name: "app/web", body: string(server), mode: 0o755}, {name: "app/hidden", body: "x"}, {name: "app/dir/", uid: 1234}, {name: "app/dir/old", body: "x"},
	})
	second := tarLayer(t, nil, []tarFile{
		{name: "app/.wh.hidden"}, {name: "app/dir/", uid: 1234}, {name: "app/dir/.wh..wh..opq"}, {name: "app/dir/new", body: "x"}, {name: "app/link", hard: "app/dir/new"},
	})
	img, err := mutate.AppendLayers(empty.Image, first, second)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config = v1.Config{
		User: "web", WorkingDir: "/app", Env: []string{"GREETING=hello from the image"}, ExposedPorts: map[string]struct{}{"8000/tcp": {}}, Cmd: []string{"/app/web"},
	}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(t.TempDir(), "web")
	index, err := layout.Write(dir, empty.Index)
	if err == nil {
		err = index.AppendImage(img)
	}
	if err != nil {
		t.Fatalf("write OCI layout: %v", err)
	}
	return dir
}

// readLayer takes some entries out of the only layer of a docker archive.
func readLayer(t *testing.T, archive string, wanted map[string]bool) []byte {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	outer := tar.NewReader(f)
	if hdr, err := outer.Next(); err != nil || hdr.Name != "layer.tar" {
		t.Fatalf("%s does not begin with its layer: %v", archive, err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	found := 0
	for r := tar.NewReader(outer); ; {
		hdr, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil && wanted[strings.Trim(path.Clean("/"+hdr.Name), "/")] {
			found++
			if err = w.WriteHeader(hdr); err == nil {
				_, err = io.Copy(w, r)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 15 {
		t.Fatalf("only %d files for a shell in %s", found, archive)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tarFile is an entry of a layer; a name that ends with a slash is a directory's.
type tarFile struct {
	name, body, hard string
	mode             int64
	uid              int
}

// tarLayer makes a layer of an unfinished archive and more entries.
func tarLayer(t *testing.T, begin []byte, files []tarFile) v1.Layer {
	t.Helper()
	b := bytes.NewBuffer(begin)
	w := tar.NewWriter(b)
	for _, f := range files {
		hdr := &tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: f.mode, Uid: f.uid, Gid: f.uid, Size: int64(len(f.body)), ModTime: time.Unix(1_700_000_000, 0)}
		switch {
		case f.hard != "":
			hdr.Typeflag, hdr.Linkname = tar.TypeLink, f.hard
		case strings.HasSuffix(f.name, "/"):
			hdr.Typeflag, hdr.Mode = tar.TypeDir, 0o755
		case f.mode == 0:
			hdr.Mode = 0o644
		}
		if err := w.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return layer
}
