package sandboxd

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"

	"github.com/sluice-edge/sluice/guest"
	"github.com/sluice-edge/sluice/sandboxd/vmm/vmmtest"
)

// fakeAgent is what answers on the control port of a VM without a processor. It runs in the process of vmmtest's fake hypervisor, and its
// memory is part of that one's snapshots. To exec it is a shell with three commands: next counts in memory, write and read go to the disk.
type fakeAgent struct {
	mu    sync.Mutex
	state fakeAgentState
}

type fakeAgentState struct {
	Count   int
	Inits   int
	Resumes int
	Env     map[string]string
	MAC     string
}

func (a *fakeAgent) guest() *vmmtest.Guest {
	return &vmmtest.Guest{
		Serve: map[uint32]func(net.Conn){guest.ControlPort: a.serve},
		Save: func() []byte {
			a.mu.Lock()
			defer a.mu.Unlock()
			text, err := json.Marshal(a.state)
			if err != nil {
				panic(err)
			}
			return text
		},
		Load: func(text []byte) {
			a.mu.Lock()
			defer a.mu.Unlock()
			if err := json.Unmarshal(text, &a.state); err != nil {
				panic(err)
			}
		},
	}
}

// serve answers one connection, which is what a client makes for each call.
func (a *fakeAgent) serve(c net.Conn) {
	r := bufio.NewReader(c)
	first, err := r.Peek(1)
	if err != nil {
		return
	}
	if first[0] == 0 { // a dial, to a port on which nobody listens
		_, _ = io.ReadFull(r, make([]byte, 3))
		_, _ = c.Write([]byte{'r'})
		return
	}
	req, err := http.ReadRequest(r)
	if err != nil {
		return
	}
	status, answer := a.call(req)
	text, err := json.Marshal(answer)
	if err != nil {
		panic(err)
	}
	if status == http.StatusNoContent {
		text = nil
	}
	fmt.Fprintf(c, "HTTP/1.1 %d x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", status, len(text), text)
}

func (a *fakeAgent) call(req *http.Request) (status int, answer any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch req.URL.Path {
	case "/health", "/sync", "/clock":
	case "/init":
		var init struct {
			EnvVars  map[string]string
			MergeEnv bool
			MAC      string
			Entropy  []byte
		}
		if err := json.NewDecoder(req.Body).Decode(&init); err != nil || len(init.Entropy) < 32 {
			return http.StatusBadRequest, fmt.Sprint(err)
		}
		if !init.MergeEnv || a.state.Env == nil {
			a.state.Env = map[string]string{}
		}
		for key, value := range init.EnvVars {
			a.state.Env[key] = value
		}
		a.state.Inits++
		a.state.MAC = init.MAC
	case "/resume":
		a.state.Resumes++
	case "/metrics":
		return http.StatusOK, guest.Metrics{CPUCount: 1}
	case "/exec":
		var ask struct{ Cmd string }
		if err := json.NewDecoder(req.Body).Decode(&ask); err != nil {
			return http.StatusBadRequest, err.Error()
		}
		output, err := a.shell(ask.Cmd)
		if err != nil {
			return http.StatusOK, guest.ExecResult{ExitCode: 1, Output: err.Error()}
		}
		return http.StatusOK, guest.ExecResult{PID: 2, Output: output}
	default:
		return http.StatusNotFound, "not found"
	}
	return http.StatusNoContent, nil
}

func (a *fakeAgent) shell(line string) (string, error) {
	const disk = "/disk.img"
	verb, arg, _ := strings.Cut(line, " ")
	switch verb {
	case "next":
		a.state.Count++
		return fmt.Sprint(a.state.Count), nil
	case "state":
		text, err := json.Marshal(a.state)
		return string(text), err
	case "write":
		f, err := os.OpenFile(disk, os.O_WRONLY, 0)
		if err != nil {
			return "", err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte(arg+"\x00"), 1<<20)
		return "", err
	case "read":
		f, err := os.Open(disk)
		if err != nil {
			return "", err
		}
		defer f.Close()
		b := make([]byte, 256)
		if _, err := f.ReadAt(b, 1<<20); err != nil {
			return "", err
		}
		text, _, _ := strings.Cut(string(b), "\x00")
		return text, nil
	}
	return "", fmt.Errorf("no command %q", verb)
}
