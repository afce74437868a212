// Command guesttool is the only program of the test's VM beside the agent: its shell, which knows the few words that the test says.
package main

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) != 3 || os.Args[1] != "-c" {
		fail(fmt.Errorf("started as %q", os.Args))
	}
	words := strings.Fields(os.Args[2])
	verb, ok := verbs[words[0]]
	if !ok {
		fail(fmt.Errorf("unknown word %q", words[0]))
	}
	if err := verb(append(words[1:], "", "")); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(9)
}

var verbs = map[string]func(args []string) error{
	"cat": func(args []string) error {
		raw, err := os.ReadFile(args[0])
		_, _ = os.Stdout.Write(raw)
		return err
	},
	"write": func(args []string) error { return os.WriteFile(args[0], []byte(args[1]+"\n"), 0o644) },
	"mode": func(args []string) error {
		info, err := os.Stat(args[0])
		if err == nil {
			st := info.Sys().(*syscall.Stat_t)
			fmt.Println(info.Mode(), st.Uid, st.Gid)
		}
		return err
	},
	// rename needs a directory of the template to be renamed, which an overlay does not do by itself.
	"rename": func(args []string) error { return os.Rename(args[0], args[1]) },
	"env":    func(args []string) error { fmt.Println(os.Getenv(args[0])); return nil },
	"exit": func(args []string) error {
		code, err := strconv.Atoi(args[0])
		if err == nil {
			fmt.Fprintln(os.Stderr, "leaving")
			os.Exit(code)
		}
		return err
	},
	"id": func([]string) error {
		groups, err := os.Getgroups()
		dir, derr := os.Getwd()
		fmt.Println(os.Getuid(), os.Getgid(), groups, dir)
		return errors.Join(err, derr)
	},
	"sleep": func([]string) error { time.Sleep(time.Hour); return nil },
	"many": func([]string) error {
		for i := range 5000 {
			fmt.Printf("line %d\n", i)
		}
		return nil
	},
	// count goes on where it was in a file, which may be in memory.
	"count": func(args []string) error {
		raw, _ := os.ReadFile(args[0])
		n, _ := strconv.Atoi(string(raw))
		fmt.Println(n + 1)
		return os.WriteFile(args[0], []byte(strconv.Itoa(n+1)), 0o644)
	},
	"now": func([]string) error { fmt.Println(time.Now().Unix()); return nil },
	"random": func([]string) error {
		var b [16]byte
		_, err := rand.Read(b[:])
		fmt.Println(hex.EncodeToString(b[:]))
		return err
	},
	"tlskey": func([]string) error {
		key, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err == nil {
			fmt.Println(hex.EncodeToString(key.PublicKey().Bytes()))
		}
		return err
	},
	"frame": func(args []string) error { return frame(args[0]) },
	// reach says how an attempt to connect ends.
	"reach": func(args []string) error {
		conn, err := net.DialTimeout("tcp", args[0], 20*time.Second)
		if err == nil {
			conn.Close()
		}
		fmt.Println(err)
		return nil
	},
	// Hogs: of memory, disk, processes and the processor.
	"eat": func([]string) error {
		for all := [][]byte{}; ; {
			piece := make([]byte, 1<<20)
			for i := 0; i < len(piece); i += 4096 {
				piece[i] = 1
			}
			all = append(all, piece)
		}
	},
	"fill": func(args []string) error {
		f, err := os.Create(args[0])
		for piece := make([]byte, 1<<20); err == nil; {
			_, err = f.Write(piece)
		}
		return err
	},
	"bomb": func([]string) error {
		for range 2 {
			_, _ = os.StartProcess("/bin/sh", []string{"/bin/sh", "-c", "bomb"}, &os.ProcAttr{})
		}
		time.Sleep(time.Minute)
		return nil
	},
	"spin": func([]string) error {
		for range 8 {
			go func() {
				for { //nolint:revive // that is all it does
				}
			}()
		}
		time.Sleep(time.Minute)
		return nil
	},
	"limit": func([]string) error {
		var l syscall.Rlimit
		err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l)
		fmt.Println(l.Max)
		return err
	},
	"agent": func([]string) error { fmt.Println(agent()); return nil },
	"kill":  func([]string) error { return syscall.Kill(agent(), syscall.SIGKILL) },
	"term":  func([]string) error { return syscall.Kill(1, syscall.SIGTERM) },
	"hold":  func(args []string) error { return hold(args[0], args[1]) },
	"serve": func(args []string) error { return serve(args[0]) },
	"await": func(args []string) error { return await(args[0], args[1]) },
}

// agent is the process that the machine's first one has started under that name.
func agent() int {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range all {
		if raw, err := os.ReadFile(path); err == nil && string(raw) == "guestd\x00" {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			return pid
		}
	}
	return 0
}

// hold keeps a connection open and writes into a file how it fares.
func hold(address, file string) error {
	conn, err := net.DialTimeout("tcp", address, 20*time.Second)
	if err != nil {
		return err
	}
	if err := os.WriteFile(file, []byte("held"), 0o644); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return os.WriteFile(file, []byte("ended:"+fmt.Sprint(err)), 0o644)
}

// serve reads every connection to its end, and only then answers with what it has read.
func serve(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			raw, err := io.ReadAll(conn)
			fmt.Fprintf(conn, "%s %v", raw, err)
		}()
	}
}

// await waits until a file begins as it should, and prints it.
func await(file, prefix string) error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		raw, err := os.ReadFile(file)
		if err == nil && strings.HasPrefix(string(raw), prefix) {
			fmt.Print(string(raw))
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %q, %w", file, raw, err)
		}
	}
}

// frame sends a frame as it is, which takes root.
func frame(text string) error {
	raw, err := hex.DecodeString(text)
	if err != nil {
		return err
	}
	dev, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	fd, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_RAW, 0)
	if err != nil {
		return err
	}
	return syscall.Sendto(fd, raw, 0, &syscall.SockaddrLinklayer{Ifindex: dev.Index})
}
