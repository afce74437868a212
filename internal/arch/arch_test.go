package arch

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/sluice-edge/sluice"

// row is one line of the table: which packages it is about, and what they may import from this module. Names are relative
// to the module; a trailing /... covers the subtree. internal/errs and internal/run, which know nothing of Sluice, are allowed
// everywhere but in guest and loadtest.
type row struct {
	packages []string
	may      []string
	text     string // printed when the row is broken
}

var table = []row{
	{[]string{"cmd/guestd"}, []string{"guest"}, "cmd/guestd may import only guest"},
	{[]string{"cmd/...", "internal/devstack", "internal/daemon"}, []string{"*"}, "cmd/*, internal/devstack and internal/daemon may import everything but cmd/*"},
	{[]string{"proxy"}, []string{"routing", "auth", "link"}, "proxy may import routing, auth, link"},
	{[]string{"api"}, []string{"api/...", "sandboxd", "auth", "routing"}, "api may import sandboxd, auth, routing (records only)"},
	{[]string{"sandboxd"}, []string{"sandboxd/...", "guest", "link", "internal/pidfd", "internal/tree"}, "sandboxd may import its own subpackages, guest, link, and the ways to processes and trees of files"},
	{[]string{"guest"}, []string{"guest/..."}, "guest may import nothing of this module but its own generated code"},
	{[]string{"loadtest"}, nil, "loadtest may import nothing of this module"},
	{[]string{"routing", "routing/routingtest"}, []string{"routing"}, "routing imports nothing sideways"},
	{[]string{"sandboxd/netdev", "sandboxd/egress"}, []string{"internal/netfilter"}, "sandboxd/netdev and sandboxd/egress import nothing sideways, and share the way to nftables"},
	{[]string{"sandboxd/namespace"}, []string{"sandboxd/cgroup", "internal/pidfd", "internal/tree"}, "sandboxd/namespace imports nothing sideways but cgroup, which both machines share, and the ways to processes and trees of files"},
	{[]string{"sandboxd/cgroup"}, []string{"internal/pidfd"}, "sandboxd/cgroup imports nothing sideways but internal/pidfd"},
	{[]string{"auth", "certs", "link", "sandboxd/image"}, nil, "routing, auth, certs, link, sandboxd/* import nothing sideways"},
	{[]string{"sandboxd/vmm", "sandboxd/vmm/vmmtest"}, []string{"sandboxd/vmm", "internal/pidfd", "internal/tree"}, "sandboxd/vmm imports nothing sideways but the ways to processes and trees of files"},
	{[]string{"api/..."}, nil, "generated code imports nothing of this module"},
	{[]string{"guest/..."}, []string{"guest/gen/..."}, "generated code imports only its like"},
	{[]string{"internal/errs", "internal/obs", "internal/run", "internal/config", "internal/testkit", "internal/arch", "internal/netfilter", "internal/pidfd", "internal/tree"}, nil, "these parts of internal stand alone"},
	{[]string{"internal/lab"}, []string{"internal/netfilter", "internal/pidfd"}, "internal/lab knows nothing of Sluice"},
}

// ground is what every package may stand on.
var ground = []string{"internal/errs", "internal/run"}

// libraries keep to their place: an import path prefix, and the packages that may use it.
var libraries = []struct {
	prefix string
	in     []string
}{
	{"github.com/valyala/fasthttp", []string{"proxy", "loadtest"}},
	{"github.com/redis/go-redis", []string{"routing", "routing/routingtest", "auth", "certs", "internal/daemon", "cmd/sluice"}},
	{"github.com/caddyserver/certmagic", []string{"certs"}},
	{"github.com/hashicorp/golang-lru", []string{"routing", "auth", "api"}},
	{"github.com/vishvananda/", []string{"sandboxd/netdev", "sandboxd/egress", "internal/lab"}},
	{"github.com/google/nftables", []string{"sandboxd/netdev", "sandboxd/egress", "internal/lab", "internal/netfilter"}},
	{"github.com/mdlayher/netlink", []string{"internal/netfilter"}},
	{"connectrpc.com/", []string{"guest", "guest/..."}},
}

// noZap lists who must not log through zap: guestd stays small, and errs is beneath everything.
var noZap = []string{"guest", "guest/...", "internal/errs", "cmd/guestd"}

func TestImportTable(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, file := range goFiles(t, root) {
		rel, err := filepath.Rel(root, file)
		if err != nil {
			t.Fatal(err)
		}
		isTest := strings.HasSuffix(file, "_test.go")
		pkg := filepath.ToSlash(filepath.Dir(rel))
		for _, imported := range imports(t, file) {
			seen++
			if complaint := check(pkg, imported, isTest); complaint != "" {
				t.Errorf("%s imports %s\n\t%s", rel, imported, complaint)
			}
		}
	}
	if seen < 50 {
		t.Fatalf("only %d imports were read: the walk is broken", seen)
	}
}

// TestTableCatches holds the checker itself to a few imports that must be refused and allowed.
func TestTableCatches(t *testing.T) {
	tests := []struct {
		pkg, imported string
		isTest, ok    bool
	}{
		{"proxy", module + "/sandboxd", false, false},
		{"proxy", module + "/routing", false, true},
		{"proxy", module + "/internal/errs", false, true},
		{"sandboxd/netdev", module + "/sandboxd/egress", false, false},
		{"sandboxd", module + "/routing", false, false},
		{"guest", module + "/internal/errs", false, false},
		{"cmd/guestd", module + "/sandboxd", false, false},
		{"cmd/edge", module + "/cmd/sluice", false, false},
		{"api", "github.com/valyala/fasthttp", false, false},
		{"auth", "github.com/redis/go-redis/v9", false, true},
		{"guest", "go.uber.org/zap", false, false},
		{"routing", "github.com/hashicorp/golang-lru/v2/expirable", false, false},
		{"nowhere", module + "/routing", false, false},
		{"sandboxd", module + "/internal/lab", true, true},
		{"sandboxd", module + "/internal/lab", false, false},
	}
	for _, tt := range tests {
		if got := check(tt.pkg, tt.imported, tt.isTest); (got == "") != tt.ok {
			t.Errorf("check(%s, %s, test=%v) = %q, want allowed %v", tt.pkg, tt.imported, tt.isTest, got, tt.ok)
		}
	}
}

// check returns why pkg must not import imported, or "".
func check(pkg, imported string, isTest bool) string {
	if strings.HasPrefix(imported, "github.com/hashicorp/golang-lru") && strings.HasSuffix(imported, "/expirable") {
		return "the expirable LRU is unsafe on a hot path: keep the deadline in the entry"
	}
	if imported == "go.uber.org/zap" && matches(noZap, pkg) {
		return "zap may appear anywhere but in guest and internal/errs"
	}
	for _, lib := range libraries {
		if strings.HasPrefix(imported, lib.prefix) && !isTest && !matches(lib.in, pkg) {
			return fmt.Sprintf("%s belongs in %s", lib.prefix, strings.Join(lib.in, ", "))
		}
	}
	inside, ours := strings.CutPrefix(imported, module+"/")
	if !ours {
		return ""
	}
	if inside == pkg || isTest && testMay(pkg, inside) {
		return ""
	}
	for _, r := range table {
		if !matches(r.packages, pkg) {
			continue
		}
		switch {
		case slices.Contains(r.may, "*"):
			if strings.HasPrefix(inside, "cmd/") {
				return r.text
			}
			return ""
		case matches(r.may, inside), matches(ground, inside) && pkg != "guest" && pkg != "loadtest":
			return ""
		}
		return r.text
	}
	return fmt.Sprintf("package %s has no row in the import table: add it, with its reason, or move the code", pkg)
}

// testMay says what tests may use beyond their package's row: the laboratory, the test kit, and the suite of the routing
// store, which starts real servers. Tests of whole systems live in test/ and in internal/devstack.
func testMay(pkg, inside string) bool {
	if strings.HasPrefix(pkg, "test/") {
		return !strings.HasPrefix(inside, "cmd/")
	}
	switch inside {
	case "internal/lab", "internal/testkit":
		return pkg != "guest" && pkg != "loadtest"
	case "routing/routingtest":
		return pkg == "routing" || pkg == "auth" || pkg == "proxy"
	case "sandboxd/netdev", "sandboxd/egress":
		return strings.HasPrefix(pkg, "sandboxd/") // real networks for tests of the fence
	case "sandboxd/vmm/vmmtest":
		return pkg == "sandboxd" || pkg == "sandboxd/vmm" // the fake hypervisor, and the suite that it and the real one pass
	case "guest":
		return pkg == "sandboxd/namespace" // the real agent in the real sandbox
	}
	return false
}

func matches(patterns []string, pkg string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		if tree, ok := strings.CutSuffix(p, "/..."); ok {
			return strings.HasPrefix(pkg, tree+"/")
		}
		return p == pkg
	})
}

func goFiles(t *testing.T, root string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() && path != root && (strings.HasPrefix(name, ".") || name == "testdata" || name == "node_modules" || name == "bin") {
			return filepath.SkipDir
		}
		if d.IsDir() && path != root {
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil {
				return filepath.SkipDir // a module of its own
			}
		}
		if !d.IsDir() && strings.HasSuffix(name, ".go") {
			files = append(files, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func imports(t *testing.T, file string) (paths []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	for _, spec := range f.Imports {
		path, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths
}
