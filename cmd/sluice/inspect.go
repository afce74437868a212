package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sluice-edge/sluice/api/gen"
)

// secretFields are not shown: what inspect prints ends up in tickets.
var secretFields = []string{"envdAccessToken", "trafficAccessToken"}

// runInspect shows all about one sandbox.
func runInspect(ctx context.Context, args []string, con console) error {
	var server serverConfig
	fs := flag.NewFlagSet("sluice inspect", flag.ContinueOnError)
	asJSON := fs.Bool("json", false, "print what the API says but for the tokens, as one JSON object")
	words, err := server.parse(fs, "ID", args, len(args), con)
	if err != nil {
		return err
	}
	id, err := oneID(fs, words)
	if err != nil {
		return err
	}
	client, err := server.client()
	if err != nil {
		return err
	}
	var fields map[string]json.RawMessage
	if _, err := client.call(ctx, http.MethodGet, sandboxPath(id, ""), nil, &fields); err != nil {
		return err
	}
	for _, name := range secretFields {
		delete(fields, name)
	}
	if *asJSON {
		return printJSON(con.out, fields)
	}
	raw, err := json.Marshal(fields)
	if err != nil {
		return err
	}
	var sb gen.SandboxDetail
	if err := json.Unmarshal(raw, &sb); err != nil {
		return fmt.Errorf("decode sandbox: %w", err)
	}
	var samples []gen.SandboxMetric
	if sb.State == gen.Running {
		if _, err := client.call(ctx, http.MethodGet, sandboxPath(id, "/metrics"), nil, &samples); err != nil {
			fmt.Fprintf(con.err, "sluice: what it uses is not known: %v\n", err)
		}
	}
	return printSandbox(con.out, sb, samples, time.Now())
}

func printSandbox(out io.Writer, sb gen.SandboxDetail, samples []gen.SandboxMetric, now time.Time) error {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(table, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	row("id", "%s", cell(sb.SandboxID))
	row("state", "%s", cell(string(sb.State)))
	if sb.Alias != nil && *sb.Alias != sb.TemplateID {
		row("template", "%s (%s)", cell(sb.TemplateID), cell(*sb.Alias))
	} else {
		row("template", "%s", cell(sb.TemplateID))
	}
	row("started", "%s, %s ago", sb.StartedAt.UTC().Format(time.RFC3339), rough(now.Sub(sb.StartedAt)))
	if sb.State == gen.Running {
		row("ends", "%s, %s", sb.EndAt.UTC().Format(time.RFC3339), endCell(sb.State, sb.EndAt, now))
	}
	if l := sb.Lifecycle; l != nil {
		wake := ""
		if l.AutoResume {
			wake = ", resumed by traffic"
		}
		row("at its end", "%s%s", cell(string(l.OnTimeout)), wake)
	}
	row("size", "%d CPUs, %s memory, %s disk", sb.CPUCount, sizeCell(sb.MemoryMB), sizeCell(sb.DiskSizeMB))
	if len(samples) > 0 {
		last := samples[len(samples)-1]
		row("uses", "%.0f%% CPU, %s memory, %s disk", last.CPUUsedPct, sizeCell(int32(last.MemUsed>>20)), sizeCell(int32(last.DiskUsed>>20)))
	}
	if sb.Domain != nil {
		row("ports", "<port>-%s.%s", cell(sb.SandboxID), cell(*sb.Domain))
	}
	if n := sb.Network; n != nil {
		access := "public"
		if n.AllowPublicTraffic != nil && !*n.AllowPublicTraffic {
			access = "with its traffic token only"
		}
		row("ingress", "%s", access)
		if n.MaskRequestHost != nil {
			row("mask", "%s", cell(*n.MaskRequestHost))
		}
		row("egress", "%s", egressCell(sb))
	}
	for _, key := range slices.Sorted(maps.Keys(sb.Metadata)) {
		row("metadata", "%s=%s", plain(key), plain(sb.Metadata[key]))
	}
	return table.Flush()
}

// egressCell says what the sandbox may reach, in the order in which the rules are tried.
func egressCell(sb gen.SandboxDetail) string {
	deny := sb.Network.DenyOut
	if sb.AllowInternetAccess != nil && !*sb.AllowInternetAccess {
		deny = []string{"0.0.0.0/0"}
	}
	if len(deny) == 0 {
		return "everything"
	}
	if len(sb.Network.AllowOut) == 0 {
		return "all but " + plain(strings.Join(deny, ", "))
	}
	return plain(strings.Join(sb.Network.AllowOut, ", ")) + "; else all but " + plain(strings.Join(deny, ", "))
}
