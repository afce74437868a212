package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/guest"
)

// exitCode is an error that says no more than how a program in a sandbox has ended.
type exitCode int

func (e exitCode) Error() string { return "exit status " + strconv.Itoa(int(e)) }

// execConfig is what `sluice exec` can be told.
type execConfig struct {
	server          serverConfig
	sandboxURL      string
	input, terminal bool
	user, dir       string
	env             envFlag
	id              string
	command         []string
}

// envFlag collects NAME=VALUE flags.
type envFlag map[string]string

// String implements flag.Value.
func (e envFlag) String() string { return "" }

// Set implements flag.Value.
func (e envFlag) Set(s string) error {
	name, value, ok := strings.Cut(s, "=")
	if !ok || name == "" {
		return errors.New("want NAME=VALUE")
	}
	e[name] = value
	return nil
}

func parseExecConfig(args []string, con console) (*execConfig, error) {
	c := execConfig{env: envFlag{}}
	fs := flag.NewFlagSet("sluice exec", flag.ContinueOnError)
	var both bool
	fs.BoolVar(&c.input, "i", false, "give the program this command's input")
	fs.BoolVar(&c.terminal, "t", false, "give the program a terminal")
	fs.BoolVar(&both, "it", false, "-i and -t, for a shell")
	fs.BoolVar(&both, "ti", false, "the same")
	fs.StringVar(&c.user, "user", "", "`name` of who the program runs as; the sandbox's default when empty")
	fs.StringVar(&c.dir, "workdir", "", "`directory` that the program starts in; the user's home when empty")
	fs.Var(c.env, "env", "`NAME=VALUE` for the program's environment; may be repeated")
	fs.StringVar(&c.sandboxURL, "sandbox-url", "", "`URL` of an edge that routes by header; E2B_SANDBOX_URL when empty, or else the sandbox's own name")
	words, err := c.server.parse(fs, "ID [--] COMMAND [ARG…]", args, 1, con)
	if err != nil {
		return nil, err
	}
	if len(words) == 0 {
		return nil, errors.New("sluice exec: which sandbox? Give its id and a command (`sluice ls` shows them)")
	}
	c.id, c.command = words[0], words[1:]
	if len(c.command) == 0 {
		return nil, fmt.Errorf("sluice exec: say what to run: sluice exec -it %s -- bash", c.id)
	}
	c.sandboxURL = cmp.Or(c.sandboxURL, con.getenv("E2B_SANDBOX_URL"))
	c.input, c.terminal = c.input || both, c.terminal || both
	return &c, nil
}

// runExec runs a program in a sandbox, and ends as it ends.
func runExec(ctx context.Context, args []string, con console) error {
	cfg, err := parseExecConfig(args, con)
	if err != nil {
		return err
	}
	client, err := cfg.server.client()
	if err != nil {
		return err
	}
	shell, address, err := cfg.shell(ctx, client)
	if err != nil {
		return err
	}
	command := guest.Command{Args: cfg.command, Env: cfg.env, Dir: cfg.dir, Stdout: con.out, Stderr: con.err}
	if cfg.input {
		command.Stdin = con.in
	}
	// What ends this command is passed on to the program, which decides: so the run outlives ctx, until somebody insists.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	if cfg.terminal {
		tty, err := openTerminal(con.in, cfg.input)
		if err != nil {
			return err
		}
		defer tty.restore()
		command.Terminal, command.Resized = new(tty.size()), tty.sizes(ctx)
		if _, ok := cfg.env["TERM"]; !ok {
			cfg.env["TERM"] = cmp.Or(con.getenv("TERM"), "xterm-256color")
		}
	}
	command.Signals = passSignals(ctx, cancel)
	code, err := shell.Run(ctx, command)
	if guest.Unreachable(err) {
		return fmt.Errorf("%w (is sandbox %s still running, and is %s the way to it? see E2B_SANDBOX_URL)", err, plain(cfg.id), plain(address))
	}
	if err != nil {
		return err
	}
	if code != 0 {
		return exitCode(code)
	}
	return nil
}

// shell finds the way to a running sandbox, and tells its address for messages.
func (c *execConfig) shell(ctx context.Context, client *client) (shell *guest.Shell, address string, err error) {
	var sb gen.SandboxDetail
	if _, err := client.call(ctx, http.MethodGet, sandboxPath(c.id, ""), nil, &sb); err != nil {
		return nil, "", err
	}
	if sb.State != gen.Running {
		return nil, "", fmt.Errorf("sandbox %s is %s: `sluice resume %s` brings it back", plain(sb.SandboxID), plain(string(sb.State)), plain(sb.SandboxID))
	}
	opts := guest.ShellOptions{URL: c.sandboxURL, Sandbox: sb.SandboxID, User: c.user, Transport: client.http.Transport}
	if opts.URL == "" {
		var domain string
		if sb.Domain != nil {
			domain = *sb.Domain
		}
		if domain = cmp.Or(domain, c.server.domain); domain == "" {
			return nil, "", errors.New("the server does not say where its edge is: set E2B_SANDBOX_URL or give -sandbox-url")
		}
		opts.URL = fmt.Sprintf("https://%d-%s.%s", guest.Port, sb.SandboxID, domain)
	}
	if sb.EnvdAccessToken != nil {
		opts.Token = *sb.EnvdAccessToken
	}
	return guest.NewShell(opts), opts.URL, nil
}

// passSignals gives the program what this command is told: first to end, and when told again, to be killed. The third time it is left alone,
// for then it cannot be reached.
func passSignals(ctx context.Context, giveUp func()) <-chan syscall.Signal {
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	pass := make(chan syscall.Signal)
	go func() {
		defer signal.Stop(told)
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, 0} {
			select {
			case <-told:
			case <-ctx.Done():
				return
			}
			if sig == 0 {
				giveUp()
				return
			}
			select {
			case pass <- sig:
			case <-ctx.Done():
				return
			}
		}
	}()
	return pass
}
