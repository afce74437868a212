package sandboxd

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd/image"
)

func TestTemplates(t *testing.T) {
	set := newTemplates([]Template{
		{ID: "base", MemoryMiB: 2048},
		{ID: "rki5dems9wqfm4r03t7g", Aliases: []string{"node", "acme/node"}, CPUs: 4},
	}, builtinTemplates)
	check := func(reference, wantID, wantAlias string) {
		t.Helper()
		tmpl, alias, err := set.find(reference)
		if err != nil || tmpl.ID != wantID || alias != wantAlias {
			t.Errorf("find(%q) = %q, %q, %v, want %q, %q", reference, tmpl.ID, alias, err, wantID, wantAlias)
		}
	}
	fails := func(reference string, code errs.Code) {
		t.Helper()
		if _, _, err := set.find(reference); err == nil || errs.CodeOf(err) != code {
			t.Errorf("find(%q) = %v, want %v", reference, err, code)
		}
	}
	check("base", "base", "base")
	check("BASE:default", "base", "base")
	check("code-interpreter-v1", "code-interpreter-v1", "code-interpreter-v1")
	check("rki5dems9wqfm4r03t7g", "rki5dems9wqfm4r03t7g", "rki5dems9wqfm4r03t7g")
	check("Node", "rki5dems9wqfm4r03t7g", "node")
	check("Acme/Node:Default", "rki5dems9wqfm4r03t7g", "acme/node")
	fails("nobody/node", errs.NotFound)
	fails("node:v2", errs.NotFound)
	for _, bad := range []string{"", ":", "/", "a/", "/a", "a:", "a/b/c", "a:b:c", "../a", "a b", "a\x00", "ä", strings.Repeat("a", 300)} {
		fails(bad, errs.Invalid)
	}
	if tmpl, _, _ := set.find("base"); tmpl.MemoryMiB != 2048 || tmpl.CPUs != 2 || len(set.list) != 3 {
		t.Errorf("base = %+v of %d templates, want the caller's own in place of the builtin", tmpl, len(set.list))
	}
}

// FuzzParseTemplate: what is accepted is made of safe parts, is its own reference, and is what a store of templates takes for a name: a snapshot
// that could be given another name would never be found by it.
func FuzzParseTemplate(f *testing.F) {
	long := strings.Repeat("n", 128)
	for _, s := range []string{"base", "a/b:c", "A", "../x", "a::b", ".a", "a/.b", long, long + "n", long + "/" + long[1:], "b:" + long + "n", "/", "a/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, reference string) {
		name, tag, err := parseTemplate(reference)
		if n, storeErr := image.ParseName(reference); (err == nil) != (storeErr == nil) || err == nil && (n.Base() != name || n.Tag != tag) {
			t.Errorf("parseTemplate(%q) = %q, %q, %v, and for a store %v, %v", reference, name, tag, err, n, storeErr)
		}
		if err != nil || len(reference) > 240 { // with its tag written out it may be too long
			return
		}
		if strings.ContainsAny(name, " \\\x00:") || strings.Contains(name, "/.") || strings.Count(name, "/") > 1 || strings.HasPrefix(name, ".") {
			t.Errorf("parseTemplate(%q) = %q", reference, name)
		}
		if name2, tag2, err := parseTemplate(name + ":" + tag); err != nil || name2 != name || tag2 != tag {
			t.Errorf("parseTemplate(%q) = %q, %q, %v, want %q, %q", name+":"+tag, name2, tag2, err, name, tag)
		}
	})
}

func TestNewID(t *testing.T) {
	seen := make(map[string]bool)
	for range 1000 {
		id := newID()
		if len(id) != 21 || id[0] != 'i' || strings.Trim(id, "abcdefghijklmnopqrstuvwxyz0123456789") != "" || seen[id] {
			t.Fatalf("newID() = %q", id)
		}
		seen[id] = true
	}
}

// templateMachine is a machine with templates of its own.
type templateMachine struct {
	Machine
	made map[string]Template
}

func (m templateMachine) Template(reference string) (Template, error) {
	tmpl, ok := m.made[reference]
	if !ok {
		return Template{}, errs.New(errs.NotFound, "template '%s' not found", reference)
	}
	return tmpl, nil
}

func (m templateMachine) Templates() ([]Template, error) {
	return slices.Collect(maps.Values(m.made)), nil
}

// TestTemplatesOfTheMachine: one that is made while the node runs is there at once; there are none that the machine does not have.
func TestTemplatesOfTheMachine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		machine := templateMachine{fakeMachine{n.host, 50}, make(map[string]Template)}
		m, err := New(Options{StateDir: n.dir, Machine: machine, Publisher: n.cat, Templates: []Template{{ID: "ours"}}})
		if err != nil {
			t.Fatal(err)
		}
		n.m = m
		n.run()
		<-m.Ready()
		_, err = n.createFrom("base", "t1")
		wantError(t, "Create before it is made", err, errs.NotFound, "template 'base' not found")
		machine.made["base"] = Template{ID: "tmplbase", Aliases: []string{"base"}, CPUs: 4, User: "node", Workdir: "/app"}
		machine.made["base:v2"] = Template{ID: "tmplbase2"}
		sb, err := n.createFrom("Base", "t1")
		if err != nil || sb.Template != "tmplbase" || sb.Alias != "base" || sb.CPUs != 4 || sb.MemoryMiB != 512 {
			t.Errorf("Create() = %+v, %v", sb, err)
		}
		if init := n.host.look(sb.ID).init; init.DefaultUser != "node" || init.DefaultWorkdir != "/app" || !init.MergeEnv {
			t.Errorf("guest was told %+v", init)
		}
		if sb, err := n.createFrom("base:v2", "t1"); err != nil || sb.Template != "tmplbase2" {
			t.Errorf("Create() of a tag = %+v, %v", sb, err)
		}
		if sb, err := n.createFrom("ours", "t1"); err != nil || sb.Template != "ours" {
			t.Errorf("Create() = %+v, %v", sb, err)
		}
		if got := m.Templates(); len(got) != 3 {
			t.Errorf("Templates() = %+v, want three", got)
		}
	})
}
