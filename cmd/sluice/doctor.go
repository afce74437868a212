package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/internal/daemon"
	"github.com/sluice-edge/sluice/sandboxd/vmm"
)

// runDoctor is `sluice doctor`: what a node would find on this machine if it started with the same flags. It fails where that node would.
func runDoctor(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("sluice doctor", flag.ContinueOnError)
	var machine daemon.MachineOptions
	machine.Flags(fs)
	state := fs.String("state-dir", defaultStateDir(os.Getenv), "`directory` of the node; the orchestrator's is /var/lib/sluice")
	if err := config.Parse(fs, args, os.Getenv, os.Stdout); err != nil {
		return err
	}
	return printDiagnosis(os.Stdout, daemon.Diagnose(ctx, machine, *state))
}

// printDiagnosis writes a line for each finding, a remedy under each that is not well, and what it all means.
func printDiagnosis(out io.Writer, d daemon.Diagnosis) error {
	var b strings.Builder
	for _, f := range d.Findings {
		fmt.Fprintf(&b, "%-9s%s: %s\n", mark(f), f.What, f.Detail)
		if !f.OK {
			fmt.Fprintf(&b, "%9s-> %s\n", "", f.Remedy)
		}
	}
	for _, l := range d.Limitations {
		fmt.Fprintf(&b, "%-9s%s\n", "limited", l)
	}
	if d.Why != "" {
		fmt.Fprintf(&b, "\n%s\n", d.Why)
	}
	if _, err := io.WriteString(out, b.String()); err != nil {
		return err
	}
	switch {
	case d.Err == nil:
		return nil
	case slices.ContainsFunc(d.Findings, func(f vmm.Finding) bool { return f.Fatal && !f.OK }):
		return errors.New("a node cannot run here: see what is missing above")
	}
	return d.Err
}

func mark(f vmm.Finding) string {
	switch {
	case f.OK:
		return "ok"
	case f.Fatal:
		return "missing"
	}
	return "warning"
}
