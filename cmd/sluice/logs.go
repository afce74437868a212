package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
)

const (
	// maxLogLines is the most that the API gives at once.
	maxLogLines = 1000
	// followEvery is how often -f looks for more.
	followEvery = time.Second
)

// runLogs shows what the console and the agent of a sandbox have said.
func runLogs(ctx context.Context, args []string, con console) error {
	var server serverConfig
	fs := flag.NewFlagSet("sluice logs", flag.ContinueOnError)
	follow := fs.Bool("f", false, "go on with what comes, until Ctrl-C or the end of the sandbox")
	lines := fs.Int("n", maxLogLines, "show the last `lines` of what there is, at most 1000")
	asJSON := fs.Bool("json", false, "print one JSON object per line of the log")
	words, err := server.parse(fs, "ID", args, len(args), con)
	if err != nil {
		return err
	}
	id, err := oneID(fs, words)
	if err != nil {
		return err
	}
	if *lines < 0 || *lines > maxLogLines {
		return fmt.Errorf("sluice logs: -n %d is not from 0 to %d", *lines, maxLogLines)
	}
	client, err := server.client()
	if err != nil {
		return err
	}
	show := func(entries []gen.SandboxLogEntry) error {
		for _, e := range entries {
			if err := printLogEntry(con.out, e, *asJSON); err != nil {
				return err
			}
		}
		return nil
	}
	seen, err := client.lastLog(ctx, id)
	if err != nil {
		return err
	}
	if err := show(seen[max(0, len(seen)-*lines):]); err != nil || !*follow {
		return err
	}
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil // Ctrl-C is how it is meant to end
		case <-tick.C:
		}
		now, err := client.lastLog(ctx, id)
		switch {
		case ctx.Err() != nil:
			return nil
		case isStatus(err, http.StatusNotFound):
			fmt.Fprintf(con.err, "sluice: sandbox %s is gone\n", plain(id))
			return nil
		case isPassing(err):
			fmt.Fprintf(con.err, "sluice: %v; still trying\n", err)
			continue
		case err != nil:
			return err
		}
		if err := show(now[overlap(seen, now):]); err != nil {
			return err
		}
		seen = now
	}
}

// lastLog is the end of a sandbox's log, oldest line first.
func (c *client) lastLog(ctx context.Context, id string) ([]gen.SandboxLogEntry, error) {
	var answer struct{ Logs []gen.SandboxLogEntry }
	path := "/v2" + sandboxPath(id, "/logs?direction=backward&limit="+strconv.Itoa(maxLogLines))
	if _, err := c.call(ctx, http.MethodGet, path, nil, &answer); err != nil {
		return nil, err
	}
	slices.Reverse(answer.Logs)
	return answer.Logs, nil
}

// isPassing tells whether the next try may succeed.
func isPassing(err error) bool {
	r, ok := errors.AsType[*refusal](err)
	return err != nil && (!ok || r.status == http.StatusTooManyRequests || r.status >= 500)
}

// overlap is how many lines at the beginning of now have been seen: both are ends of one log, of which the beginning gets lost. Lines are
// compared and not their times, for most have none of their own.
func overlap(seen, now []gen.SandboxLogEntry) int {
	for n := min(len(seen), len(now)); n > 0; n-- {
		if slices.EqualFunc(seen[len(seen)-n:], now[:n], sameLine) {
			return n
		}
	}
	return 0
}

func sameLine(a, b gen.SandboxLogEntry) bool {
	return a.Message == b.Message && a.Level == b.Level && maps.Equal(a.Fields, b.Fields)
}

// printLogEntry writes the agent's lines with their time, and those of the console as they are: theirs is a guess.
func printLogEntry(out io.Writer, e gen.SandboxLogEntry, asJSON bool) error {
	if asJSON {
		return printJSONLine(out, e)
	}
	if e.Fields["logger"] != "agent" {
		_, err := fmt.Fprintln(out, plain(e.Message))
		return err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %-5s %s", e.Timestamp.UTC().Format(time.RFC3339), strings.ToUpper(string(e.Level)), e.Message)
	for _, key := range slices.Sorted(maps.Keys(e.Fields)) {
		if key != "logger" {
			fmt.Fprintf(&b, " %s=%s", key, e.Fields[key])
		}
	}
	_, err := fmt.Fprintln(out, plain(b.String()))
	return err
}
