// Agent is the smallest thing that passes for guestd in tests: it answers /health, runs programs, and makes the system
// calls that it is asked to.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

type request struct {
	Argv []string
	UID  int
}

type reply struct {
	Out  string
	Code int
	Err  string
}

func main() {
	if len(os.Args) > 1 {
		os.Exit(act(os.Args[1], os.Args[2:]))
	}
	// As guestd does.
	if _, _, errno := syscall.Syscall6(syscall.SYS_PRCTL, syscall.PR_SET_DUMPABLE, 0, 0, 0, 0, 0); errno != 0 {
		panic(errno)
	}
	fd, err := strconv.Atoi(os.Getenv("SLUICE_CONTROL_FD"))
	if err != nil {
		panic(err)
	}
	f := os.NewFile(uintptr(fd), "control")
	l, err := net.FileListener(f)
	if err != nil {
		panic(err)
	}
	f.Close()
	http.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	http.HandleFunc("/run", run)
	fmt.Println("agent listens")
	panic(http.Serve(l, nil))
}

func run(w http.ResponseWriter, r *http.Request) {
	var req request
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if req.Argv[0] == "self" {
		req.Argv[0] = "/proc/self/exe"
	}
	cmd := exec.CommandContext(r.Context(), req.Argv[0], req.Argv[1:]...)
	cmd.Dir = "/"
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if req.UID != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(req.UID), Gid: uint32(req.UID)}}
	}
	var rep reply
	err := cmd.Run()
	rep.Out = out.String()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		rep.Code = exit.ExitCode()
		if rep.Code < 0 {
			rep.Err = exit.String()
		}
	case err != nil:
		rep.Code, rep.Err = -1, err.Error()
	}
	_ = json.NewEncoder(w).Encode(rep)
}

// act does one thing and prints what came of it.
func act(what string, args []string) int {
	runtime.LockOSThread()
	switch what {
	case "syscall": // numbers, or strings after "s:", or b:<size> for an empty buffer
		var a [7]uintptr
		var keep [][]byte
		for i, s := range args {
			switch {
			case strings.HasPrefix(s, "s:"):
				b := append([]byte(s[2:]), 0)
				keep = append(keep, b)
				a[i] = uintptr(unsafe.Pointer(&b[0]))
			case strings.HasPrefix(s, "b:"):
				n, _ := strconv.Atoi(s[2:])
				b := make([]byte, n)
				keep = append(keep, b)
				a[i] = uintptr(unsafe.Pointer(&b[0]))
			default:
				n, err := strconv.ParseInt(s, 0, 64)
				if err != nil {
					fmt.Println(err)
					return 2
				}
				a[i] = uintptr(n)
			}
		}
		_, _, errno := syscall.Syscall6(a[0], a[1], a[2], a[3], a[4], a[5], a[6])
		runtime.KeepAlive(keep)
		if errno == 0 {
			fmt.Println("ok")
			return 0
		}
		fmt.Println(errno.Error())
	case "hog": // touch so many MiB
		n, _ := strconv.Atoi(args[0])
		var all [][]byte
		for range n {
			b := make([]byte, 1<<20)
			for j := 0; j < len(b); j += 4096 {
				b[j] = 1
			}
			all = append(all, b)
		}
		fmt.Println("held", len(all))
	case "abstract": // connect to an abstract socket
		c, err := net.Dial("unix", "@"+args[0])
		if err != nil {
			fmt.Println(err)
			return 1
		}
		c.Close()
		fmt.Println("ok")
	}
	return 0
}
