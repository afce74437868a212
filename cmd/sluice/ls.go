package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
)

// lsConfig is what `sluice ls` can be told.
type lsConfig struct {
	server   serverConfig
	json     bool
	quiet    bool
	states   string
	template string
	metadata []string
}

func parseLsConfig(args []string, con console) (*lsConfig, error) {
	var c lsConfig
	fs := flag.NewFlagSet("sluice ls", flag.ContinueOnError)
	fs.BoolVar(&c.json, "json", false, "print what the API says, as one JSON array")
	fs.BoolVar(&c.quiet, "q", false, "print ids only")
	fs.StringVar(&c.states, "state", "", "only those in these `states`: running, paused (default both)")
	fs.StringVar(&c.template, "template", "", "only those of this `template`, by id or alias")
	fs.Func("metadata", "only those with this `key=value`; may be repeated", func(pair string) error {
		if !strings.Contains(pair, "=") {
			return errors.New("want key=value")
		}
		c.metadata = append(c.metadata, pair)
		return nil
	})
	words, err := c.server.parse(fs, "", args, 0, con)
	if err == nil && len(words) > 0 {
		err = fmt.Errorf("sluice ls: %q is no flag (see sluice ls -h)", words[0])
	}
	return &c, err
}

// query is the list's query string without a cursor.
func (c *lsConfig) query() url.Values {
	q := url.Values{}
	if c.states != "" {
		q.Set("state", c.states)
	}
	if c.template != "" {
		q.Set("template", c.template)
	}
	var pairs []string
	for _, pair := range c.metadata {
		key, value, _ := strings.Cut(pair, "=")
		pairs = append(pairs, url.QueryEscape(key)+"="+url.QueryEscape(value))
	}
	if len(pairs) > 0 {
		q.Set("metadata", url.QueryEscape(strings.Join(pairs, "&"))) // the API takes off one layer more than a query has
	}
	return q
}

// runLs lists the sandboxes of the key's team on all nodes.
func runLs(ctx context.Context, args []string, con console) error {
	cfg, err := parseLsConfig(args, con)
	if err != nil {
		return err
	}
	client, err := cfg.server.client()
	if err != nil {
		return err
	}
	query := cfg.query()
	items := []json.RawMessage{}
	silent := ""
	for {
		var page []json.RawMessage
		got, err := client.call(ctx, http.MethodGet, "/v2/sandboxes?"+query.Encode(), nil, &page)
		if err != nil {
			return err
		}
		items = append(items, page...)
		if n := got.header.Get("Sluice-Incomplete"); n != "" {
			silent = plain(n)
		}
		next := got.header.Get("X-Next-Token")
		if next == "" {
			break
		}
		query.Set("nextToken", next)
	}
	if silent != "" {
		fmt.Fprintf(con.err, "sluice: %s nodes do not answer: their sandboxes are missing\n", silent)
	}
	if cfg.json {
		return printJSON(con.out, items)
	}
	sandboxes := make([]gen.ListedSandbox, len(items))
	for i, item := range items {
		if err := json.Unmarshal(item, &sandboxes[i]); err != nil {
			return fmt.Errorf("decode a sandbox: %w", err)
		}
	}
	if cfg.quiet {
		for _, sb := range sandboxes {
			fmt.Fprintln(con.out, plain(sb.SandboxID))
		}
		return nil
	}
	return printSandboxes(con.out, sandboxes, time.Now())
}

func printSandboxes(out io.Writer, sandboxes []gen.ListedSandbox, now time.Time) error {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "ID\tTEMPLATE\tSTATE\tCPUS\tMEMORY\tDISK\tSTARTED\tENDS")
	for _, sb := range sandboxes {
		fmt.Fprintf(table, "%s\t%s\t%s\t%d\t%s\t%s\t%s ago\t%s\n", cell(sb.SandboxID), templateCell(sb.Alias, sb.TemplateID), cell(string(sb.State)),
			sb.CPUCount, sizeCell(sb.MemoryMB), sizeCell(sb.DiskSizeMB), rough(now.Sub(sb.StartedAt)), endCell(sb.State, sb.EndAt, now))
	}
	return table.Flush()
}

// templateCell is the name that a template was asked for by, or else its id.
func templateCell(alias *string, id string) string {
	if alias != nil && *alias != "" {
		return cell(*alias)
	}
	return cell(id)
}

// endCell is when a running sandbox ends; a paused one has no end.
func endCell(state gen.SandboxState, end, now time.Time) string {
	switch left := end.Sub(now); {
	case state != gen.Running || end.IsZero():
		return "-"
	case left <= 0:
		return "now"
	default:
		return "in " + rough(left)
	}
}

// rough is a time for people: as two units where the smaller still means something.
func rough(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
	}
}

func sizeCell(n int32) string {
	if n >= 1024 && n%1024 == 0 {
		return fmt.Sprintf("%d GiB", n/1024)
	}
	return fmt.Sprintf("%d MiB", n)
}
