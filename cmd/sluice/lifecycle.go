package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"time"
)

// outcome is what became of one sandbox.
type outcome struct {
	SandboxID string `json:"sandboxID"`
	State     string `json:"state"`
	note      string // for people
}

// change is a command that does the same to each sandbox that it is given.
type change struct {
	name  string
	flags func(fs *flag.FlagSet) // its own; may be nil
	each  func(ctx context.Context, c *client, id string) (outcome, error)
}

func (ch change) run(ctx context.Context, args []string, con console) error {
	var server serverConfig
	fs := flag.NewFlagSet("sluice "+ch.name, flag.ContinueOnError)
	asJSON := fs.Bool("json", false, "print one JSON object for each sandbox")
	if ch.flags != nil {
		ch.flags(fs)
	}
	ids, err := server.parse(fs, "ID…", args, len(args), con)
	if err != nil {
		return err
	}
	if len(ids) == 0 {
		return fmt.Errorf("%s: which sandbox? Give its id, or several (`sluice ls` shows them)", fs.Name())
	}
	client, err := server.client()
	if err != nil {
		return err
	}
	var failed []error
	for _, id := range ids { // one after the other: the first failure of many must be readable
		result, err := ch.each(ctx, client, id)
		if err == nil {
			err = result.print(con.out, *asJSON)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("%s %s: %w", ch.name, plain(id), err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(failed...)
}

func (o outcome) print(out io.Writer, asJSON bool) error {
	if asJSON {
		return printJSONLine(out, o)
	}
	_, err := fmt.Fprintf(out, "%s %s%s\n", plain(o.SandboxID), plain(o.State), o.note)
	return err
}

// runPause saves what runs and ends it; `sluice resume` and, where the sandbox says so, traffic bring it back.
func runPause(ctx context.Context, args []string, con console) error {
	var memory bool
	return change{
		name: "pause",
		flags: func(fs *flag.FlagSet) {
			fs.BoolVar(&memory, "memory", true, "keep memory and processes; -memory=false keeps the files only")
		},
		each: func(ctx context.Context, c *client, id string) (outcome, error) {
			_, err := c.call(ctx, http.MethodPost, sandboxPath(id, "/pause"), map[string]any{"memory": memory}, nil)
			return outcome{SandboxID: id, State: "paused"}, err
		},
	}.run(ctx, args, con)
}

// runResume brings paused sandboxes back, and keeps running ones for longer.
func runResume(ctx context.Context, args []string, con console) error {
	var memory bool
	var timeout time.Duration
	return change{
		name: "resume",
		flags: func(fs *flag.FlagSet) {
			fs.BoolVar(&memory, "memory", true, "go on where it stopped; -memory=false boots from the files, whatever was kept")
			fs.DurationVar(&timeout, "timeout", 5*time.Minute, "how long it runs from now at least")
		},
		each: func(ctx context.Context, c *client, id string) (outcome, error) {
			if timeout < time.Second {
				return outcome{}, fmt.Errorf("-timeout %v is less than a second", timeout)
			}
			body := map[string]any{"timeout": int64(timeout / time.Second), "memory": memory}
			got, err := c.call(ctx, http.MethodPost, "/v2"+sandboxPath(id, "/connect"), body, nil)
			if err != nil {
				return outcome{}, err
			}
			result := outcome{SandboxID: id, State: "running"}
			if got.status == http.StatusOK {
				result.note = " (it was not paused)"
			}
			return result, nil
		},
	}.run(ctx, args, con)
}

// runKill ends sandboxes, running or paused, and removes all that is left of them.
func runKill(ctx context.Context, args []string, con console) error {
	return change{
		name: "kill",
		each: func(ctx context.Context, c *client, id string) (outcome, error) {
			_, err := c.call(ctx, http.MethodDelete, sandboxPath(id, ""), nil, nil)
			return outcome{SandboxID: id, State: "killed"}, err
		},
	}.run(ctx, args, con)
}
