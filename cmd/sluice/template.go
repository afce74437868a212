package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/internal/daemon"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/internal/obs"
	"github.com/sluice-edge/sluice/sandboxd/image"
)

// runTemplate is `sluice template build|ls|rm`. Templates are files of a node: the commands work on its state directory, whether it
// runs or not.
func runTemplate(ctx context.Context, args []string) error {
	const verbs = "build, ls or rm"
	if len(args) == 0 {
		return fmt.Errorf("template: say what to do: %s", verbs)
	}
	verb, args := args[0], args[1:]
	switch verb {
	case "build":
		return runTemplateBuild(ctx, args, os.Stdout, os.Stderr)
	case "ls":
		return runTemplateList(args, os.Stdout)
	case "rm":
		return runTemplateRemove(args, os.Stdout)
	case "-h", "-help", "--help":
		fmt.Printf("usage: sluice template VERB [NAME] [flags]   (VERB is %s; sluice template VERB -h lists the flags)\n", verbs)
		return config.ErrHelp
	}
	return fmt.Errorf("template: no verb %q, want %s", verb, verbs)
}

// parseNamed reads a name, which may stand before or after flags.
func parseNamed(fs *flag.FlagSet, args []string) (name string, err error) {
	config.Usage(fs, "NAME [flags]")
	words, err := config.ParseWords(fs, args, 1, os.Getenv, os.Stdout)
	switch {
	case err != nil:
		return "", err
	case len(words) == 0:
		return "", fmt.Errorf("%s: the name of the template is missing (see %s -h)", fs.Name(), fs.Name())
	case len(words) > 1:
		return "", fmt.Errorf("%s: %q is too much: one template at a time", fs.Name(), words[1])
	}
	if _, err := image.ParseName(words[0]); err != nil {
		return "", err
	}
	return words[0], nil
}

func stateDirFlag(fs *flag.FlagSet) *string {
	return fs.String("state-dir", defaultStateDir(os.Getenv), "`directory` of the node that has the templates; the orchestrator's is /var/lib/sluice")
}

// existingTemplates opens the store of a state directory that is there. Who looks into a wrong one is to hear of it, and not to make it.
func existingTemplates(stateDir string) (*image.Store, error) {
	if _, err := os.Stat(stateDir); err != nil {
		return nil, fmt.Errorf("-state-dir: %w (a node makes it, or sluice template build; the orchestrator's is /var/lib/sluice)", err)
	}
	return daemon.OpenTemplates(stateDir)
}

// environment is a flag that may be repeated, KEY=value each time.
type environment map[string]string

// String implements flag.Value.
func (e environment) String() string { return "" }

// Set implements flag.Value.
func (e environment) Set(text string) error {
	key, value, ok := strings.Cut(text, "=")
	if !ok || key == "" {
		return errors.New("want KEY=value")
	}
	e[key] = value
	return nil
}

// templateBuild is what `sluice template build` can be told.
type templateBuild struct {
	machine  daemon.MachineOptions
	image    image.Options
	stateDir string
	logLevel string
}

func parseTemplateBuild(args []string) (*templateBuild, error) {
	var b templateBuild
	fs := flag.NewFlagSet("sluice template build", flag.ContinueOnError)
	fs.StringVar(&b.image.From, "from", "", "`image` to build from: oci:DIR[#NAME], docker-archive:FILE[#NAME], docker://REFERENCE, dir:DIR,\n"+
		"mmdebstrap:SUITE[#PACKAGE,...], or any of the first four without the word before the colon")
	fs.StringVar(&b.image.StartCmd, "start-cmd", "", "`command` that runs in every sandbox from the start; the image's own entry point is not run by itself")
	fs.StringVar(&b.image.ReadyCmd, "ready-cmd", "", "`command` that succeeds when the start command is ready; empty waits until somebody listens on each port that the\n"+
		"image exposes, or, when it exposes none, one second")
	fs.IntVar(&b.image.CPUs, "cpu", 0, "processors of a sandbox (default 2)")
	fs.IntVar(&b.image.MemoryMiB, "memory", 0, "memory of a sandbox in `MiB` (default 512)")
	fs.IntVar(&b.image.DiskMiB, "disk", 0, "writable disk of a sandbox in `MiB` (default 1024)")
	mbits := fs.Int64("net-mbit", 0, "bandwidth of a sandbox in `Mbit/s`, each way (default 1000)")
	fs.Int64Var(&b.image.Rates.NetPackets, "net-packets", 0, "packets per second of a sandbox, each way (default 200000)")
	mibs := fs.Int64("disk-rate", 0, "`MiB/s` of each of a sandbox's disks (default 400)")
	fs.Int64Var(&b.image.Rates.DiskOps, "disk-ops", 0, "operations per second of each of a sandbox's disks (default 40000)")
	fs.StringVar(&b.image.User, "user", "", "`user` of commands; empty is the image's")
	fs.StringVar(&b.image.Workdir, "workdir", "", "`directory` of commands; empty is the image's")
	env := environment{}
	fs.Var(env, "env", "`KEY=value` for every command, on top of the image's; may be repeated")
	aliases := config.List{}
	fs.Var(&aliases, "alias", "further `names` of the template")
	b.machine.BuildFlags(fs)
	state := stateDirFlag(fs)
	fs.StringVar(&b.logLevel, "log-level", "warn", "debug, info, warn or error")
	name, err := parseNamed(fs, args)
	if err != nil {
		return nil, err
	}
	if b.image.From == "" {
		return nil, errors.New("sluice template build: -from is missing: name an image, such as -from docker://debian:bookworm, or -from dir:DIR")
	}
	if *state == "" {
		return nil, errors.New("-state-dir is empty: give a directory")
	}
	const most = 1 << 30 // before they are multiplied
	if *mbits > most || *mibs > most {
		return nil, fmt.Errorf("-net-mbit %d, -disk-rate %d: at most %d", *mbits, *mibs, most)
	}
	b.image.Rates.NetBytes, b.image.Rates.DiskBytes = *mbits*1_000_000/8, *mibs<<20
	b.image.Name, b.image.Env, b.image.Aliases, b.stateDir = name, env, aliases, *state
	return &b, nil
}

func runTemplateBuild(ctx context.Context, args []string, out io.Writer, terminal *os.File) error {
	b, err := parseTemplateBuild(args)
	if err != nil {
		return err
	}
	log, err := obs.NewLogger("console", b.logLevel)
	if err != nil {
		return err
	}
	shown := newProgress(terminal, b.image.Name)
	start := time.Now()
	t, err := daemon.BuildTemplate(ctx, b.machine, b.stateDir, b.image, log, shown.report)
	shown.end()
	if ctx.Err() != nil {
		return fmt.Errorf("interrupted: nothing of template %s is left", b.image.Name)
	}
	if err != nil {
		return err
	}
	used, err := t.Usage()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s is ready: %s on disk, built in %v\n", templateName(t), mebibytes(used), time.Since(start).Round(time.Second))
	return err
}

// templateName is the shortest way to write a template's name.
func templateName(t image.Template) string {
	if t.Tag == image.DefaultTag {
		return t.Name
	}
	return t.Name + ":" + t.Tag
}

func mebibytes(n int64) string { return strconv.FormatInt((n+1<<20-1)>>20, 10) + " MiB" }

// templateRow is a template as `sluice template ls -json` prints it.
type templateRow struct {
	Name      string    `json:"name"`
	Aliases   []string  `json:"aliases,omitempty"`
	Build     string    `json:"build,omitempty"`
	Created   time.Time `json:"created,omitzero"`
	Source    string    `json:"source,omitempty"`
	CPUs      int       `json:"cpus,omitempty"`
	MemoryMiB int       `json:"memoryMiB,omitempty"`
	DiskMiB   int       `json:"diskMiB,omitempty"`
	Bytes     int64     `json:"bytes"`
	Damaged   bool      `json:"damaged,omitempty"` // it must be built again
}

// runTemplateList prints the templates of a state directory. Damaged ones are listed too, and are an error after it.
func runTemplateList(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("sluice template ls", flag.ContinueOnError)
	state := stateDirFlag(fs)
	asJSON := fs.Bool("json", false, "print JSON for programs")
	if err := config.Parse(fs, args, os.Getenv, os.Stdout); err != nil {
		return err
	}
	store, err := existingTemplates(*state)
	if err != nil {
		return err
	}
	all, damaged := store.List()
	rows := make([]templateRow, 0, len(all)) // not nil: an empty list is [] in JSON
	for _, t := range all {
		used, err := t.Usage()
		if err != nil {
			continue // it was removed just now
		}
		rows = append(rows, templateRow{
			Name: templateName(t), Aliases: t.Aliases, Build: t.Build, Created: t.Created, Source: t.Source,
			CPUs: t.CPUs, MemoryMiB: t.MemoryMiB, DiskMiB: t.DiskMiB, Bytes: used, Damaged: t.Build == "",
		})
	}
	if *asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return errors.Join(enc.Encode(rows), damaged)
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "NAME\tALIASES\tCREATED\tCPUS\tMEMORY\tDISK\tON DISK\tSOURCE")
	for _, r := range rows {
		if r.Damaged {
			fmt.Fprintf(table, "%s\t\t\t\t\t\t%s\tdamaged\n", r.Name, mebibytes(r.Bytes))
			continue
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%d\t%d MiB\t%d MiB\t%s\t%s\n", r.Name, strings.Join(r.Aliases, ","), r.Created.Format(time.RFC3339),
			r.CPUs, r.MemoryMiB, r.DiskMiB, mebibytes(r.Bytes), strings.Map(printable, r.Source))
	}
	return errors.Join(table.Flush(), damaged)
}

func runTemplateRemove(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("sluice template rm", flag.ContinueOnError)
	state := stateDirFlag(fs)
	name, err := parseNamed(fs, args)
	if err != nil {
		return err
	}
	store, err := existingTemplates(*state)
	if err != nil {
		return err
	}
	err = store.Remove(name)
	if errs.CodeOf(err) == errs.NotFound {
		if t, aliasErr := store.Get(name); aliasErr == nil {
			return fmt.Errorf("%s is another name of template %s: remove that", name, templateName(t))
		}
		return fmt.Errorf("%w in %s: sluice template ls lists them, -state-dir names another node's", err, *state)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s is removed; its sandboxes go on\n", name)
	return err
}
