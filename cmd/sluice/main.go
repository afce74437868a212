// Command sluice is for people: `sluice dev` runs the whole system on one machine, `sluice template` makes what sandboxes are made
// from, `sluice doctor` says what a machine lacks, `sluice key` makes API keys, and `sluice bench` measures the edge against the backend
// behind it. `sluice ls` and its like are for operators: they speak the REST API, and exec that of the agent in a sandbox.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/internal/daemon"
)

var version = "dev" // set by the linker

// command is one word after `sluice`.
type command struct {
	name, summary string
	run           func(ctx context.Context, args []string) error
}

var commands = []command{
	{"dev", "run edge, node and store in one process on this machine", runDev},
	{"template", "build, list and remove what sandboxes are made from", runTemplate},
	{"doctor", "say what this machine lacks, and what to do about it", runDoctor},
	{"key", "create, list and remove API keys", runKey},
	{"ls", "list sandboxes", onConsole(runLs)},
	{"inspect", "show all about a sandbox", onConsole(runInspect)},
	{"logs", "show what the console and the agent of a sandbox have said", onConsole(runLogs)},
	{"exec", "run a program in a sandbox: sluice exec -it ID -- bash", onConsole(runExec)},
	{"pause", "save sandboxes and end their processes", onConsole(runPause)},
	{"resume", "bring paused sandboxes back", onConsole(runResume)},
	{"kill", "end sandboxes and remove them", onConsole(runKill)},
	{"bench", "load the edge and the backend behind it alike, and print both", runBench},
	{"version", "print the version", func(context.Context, []string) error { fmt.Println(version); return nil }},
}

func main() {
	daemon.MaybeSandboxInit()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := dispatch(ctx, os.Args[1:])
	if code, ok := errors.AsType[exitCode](err); ok {
		os.Exit(int(code))
	}
	if err != nil && !errors.Is(err, config.ErrHelp) {
		complain(os.Stderr, err)
		os.Exit(1)
	}
}

// complain prints an error. A part of it may come from an image, a registry, or the console of a guest.
func complain(out io.Writer, err error) {
	lines := strings.Split(err.Error(), "\n")
	for i, line := range lines {
		lines[i] = plain(strings.TrimSuffix(line, "\r")) // consoles end lines with both
	}
	fmt.Fprintln(out, "sluice:", strings.Join(lines, "\n"))
}

func dispatch(ctx context.Context, args []string) error {
	if len(args) == 0 {
		usage(os.Stderr)
		return errors.New("no command given")
	}
	for _, c := range commands {
		if c.name == args[0] {
			return c.run(ctx, args[1:])
		}
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		usage(os.Stdout)
		return nil
	case "-version", "--version":
		fmt.Println(version)
		return nil
	}
	usage(os.Stderr)
	return fmt.Errorf("no command %q", args[0])
}

func usage(out io.Writer) {
	fmt.Fprintln(out, "usage: sluice COMMAND [flags]   (sluice COMMAND -h lists the flags)")
	for _, c := range commands {
		fmt.Fprintf(out, "  %-8s %s\n", c.name, c.summary)
	}
}
