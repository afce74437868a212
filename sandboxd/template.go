package sandboxd

import (
	"cmp"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Template is what a sandbox is made from, and the size it gets.
type Template struct {
	ID        string   // what a client sees as templateID, lower case
	Aliases   []string // further names: lower case, without tag, with "namespace/" where the name belongs to one
	Root      string   // the machine's name for the root filesystem; "" is the one that the machine was set up with
	CPUs      int      // zero means 2
	MemoryMiB int      // zero means 512
	DiskMiB   int      // zero means 1024

	User    string // whom the agent runs commands as; "" means user
	Workdir string // where it runs them; "" leaves it to the agent
}

// builtinTemplates are what the two SDK packages ask for. They share one root until templates can be built.
var builtinTemplates = []Template{{ID: "base"}, {ID: "code-interpreter-v1"}}

// templates finds a template by any of its names.
type templates struct {
	list   []Template
	byName map[string]Template
}

func newTemplates(more, builtin []Template) templates {
	t := templates{byName: make(map[string]Template)}
	for _, tmpl := range more {
		t.list = append(t.list, tmpl.withDefaults())
	}
	for _, tmpl := range builtin {
		if !slices.ContainsFunc(more, func(other Template) bool { return other.ID == tmpl.ID }) {
			t.list = append(t.list, tmpl.withDefaults())
		}
	}
	slices.SortFunc(t.list, func(a, b Template) int { return cmp.Compare(a.ID, b.ID) })
	for _, tmpl := range t.list {
		for _, alias := range tmpl.Aliases {
			t.byName[alias] = tmpl
		}
	}
	for _, tmpl := range t.list {
		t.byName[tmpl.ID] = tmpl // an ID wins over another's alias
	}
	return t
}

func (t Template) withDefaults() Template {
	t.CPUs = cmp.Or(t.CPUs, 2)
	t.MemoryMiB = cmp.Or(t.MemoryMiB, 512)
	t.DiskMiB = cmp.Or(t.DiskMiB, 1024)
	return t
}

// find resolves [namespace/]alias[:tag] as a client wrote it, and returns the alias it was found by.
func (t templates) find(reference string) (tmpl Template, alias string, err error) {
	name, tag, err := parseTemplate(reference)
	if err != nil {
		return Template{}, "", err
	}
	tmpl, ok := t.byName[name]
	if !ok || tag != "default" {
		return Template{}, "", errs.New(errs.NotFound, "template '%s' not found", strings.ToLower(reference))
	}
	return tmpl, name, nil
}

// findTemplate resolves a reference among the node's templates and then, where there are any, the machine's.
func (m *Manager) findTemplate(reference string) (tmpl Template, alias string, err error) {
	tmpl, alias, err = m.templates.find(reference)
	more, ok := m.machine.(Templates)
	if !ok || errs.CodeOf(err) != errs.NotFound {
		return tmpl, alias, err
	}
	name, _, err := parseTemplate(reference)
	if err != nil {
		return Template{}, "", err
	}
	tmpl, err = more.Template(strings.ToLower(reference))
	if err != nil {
		return Template{}, "", err
	}
	return tmpl.withDefaults(), name, nil
}

// Templates lists what sandboxes can be made from, besides snapshots.
func (m *Manager) Templates() []Template {
	more, ok := m.machine.(Templates)
	if !ok {
		return m.templates.list
	}
	all := slices.Clone(m.templates.list)
	found, err := more.Templates()
	if err != nil {
		m.log.Warn("templates of the machine not listed", zap.Error(err))
	}
	for _, tmpl := range found {
		if _, ok := m.templates.byName[tmpl.ID]; !ok { // a create would get ours
			all = append(all, tmpl.withDefaults())
		}
	}
	return all
}

// The lengths that a template's name can have in a store: a snapshot of a longer one could never be asked for.
const (
	maxNamePart = 128
	maxName     = 200 // of both parts
)

// parseTemplate splits a template reference into its name, with the namespace if there is one, and its tag, which is "default"
// when not given.
func parseTemplate(reference string) (name, tag string, err error) {
	invalid := errs.New(errs.Invalid, "invalid template reference %q: want [namespace/]alias[:tag] of letters, digits, '-', '_' and '.'",
		clip(reference))
	if len(reference) > 256 {
		return "", "", invalid
	}
	name, tag, tagged := strings.Cut(strings.ToLower(reference), ":")
	if !tagged {
		tag = "default"
	}
	namespace, alias, spaced := strings.Cut(name, "/")
	if !spaced {
		namespace, alias = "none", name
	}
	for _, part := range []string{namespace, alias, tag} {
		if part == "" || len(part) > maxNamePart || part[0] == '.' || strings.ContainsFunc(part, notInName) {
			return "", "", invalid
		}
	}
	if len(name) > maxName {
		return "", "", invalid
	}
	return name, tag, nil
}

func notInName(r rune) bool {
	return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_' && r != '.'
}

// clip shortens what came from outside for a message.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
