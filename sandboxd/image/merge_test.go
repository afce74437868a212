package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/errs"
)

// list is a tree as text: a line per name, with what the tests care about.
func list(t testing.TB, tr *tree, s *spool) []string {
	t.Helper()
	ids := map[*inode]int{}
	var lines []string
	var visit func(path string, i *inode)
	visit = func(path string, i *inode) {
		for _, name := range i.names() {
			e := i.children[name]
			full := path + name
			line := fmt.Sprintf("%s %o", full, e.mode&0o7777)
			switch {
			case e.isDir():
				line = fmt.Sprintf("%s/ %o", full, e.mode&0o7777)
			case e.isSymlink():
				line = full + " -> " + e.target
			case e.isRegular():
				r, err := s.content(e.offset, e.size)
				if err != nil {
					t.Fatal(err)
				}
				raw, err := io.ReadAll(r)
				if err != nil {
					t.Fatal(err)
				}
				line += " " + string(raw)
			}
			if id, ok := ids[e.inode]; ok {
				line += fmt.Sprintf(" =%d", id)
			}
			ids[e.inode] = len(ids)
			lines = append(lines, line)
			if e.isDir() {
				visit(full+"/", e.inode)
			}
		}
	}
	visit("", tr.root.inode)
	return lines
}

func TestMerge(t *testing.T) {
	dir := func(name string) file { return file{name: name, kind: tar.TypeDir} }
	text := func(name, body string) file { return file{name: name, body: body} }
	link := func(name, to string) file { return file{name: name, kind: tar.TypeSymlink, link: to} }
	hard := func(name, to string) file { return file{name: name, kind: tar.TypeLink, link: to} }
	for _, tt := range []struct {
		name   string
		layers [][]file
		want   []string
	}{
		{"a file replaces", [][]file{{text("a", "1")}, {text("./a", "2")}}, []string{"a 644 2"}},
		{"whiteout", [][]file{{text("a", "1"), text("b", "1")}, {text(".wh.a", "")}}, []string{"b 644 1"}},
		{"whiteout of a directory", [][]file{{text("d/x", "1"), text("d/y/z", "1")}, {text(".wh.d", "")}}, nil},
		{"whiteout of nothing", [][]file{{text("a", "1")}, {text(".wh.b", ""), text("c/d/.wh.e", "")}}, []string{"a 644 1"}},
		{"whiteout hides lower layers only", [][]file{{text("a", "1")}, {text("a", "2"), text(".wh.a", "")}}, []string{"a 644 2"}},
		{"in either order", [][]file{{text("a", "1")}, {text(".wh.a", ""), text("a", "2")}}, []string{"a 644 2"}},
		{"a directory made anew", [][]file{{text("d/old", "1")}, {text("d/new", "2"), text(".wh.d", "")}}, []string{"d/ 755", "d/new 644 2"}},
		{"made anew without its own entry", [][]file{{{name: "d", kind: tar.TypeDir, mode: 0o700}, text("d/old", "1")}, {text("d/new", "2"), text(".wh.d", "")}},
			[]string{"d/ 755", "d/new 644 2"}},
		{"opaque first", [][]file{{text("d/old", "1"), text("d/e/f", "1")}, {text("d/.wh..wh..opq", ""), text("d/new", "2")}}, []string{"d/ 755", "d/new 644 2"}},
		{"opaque last", [][]file{{text("d/old", "1"), text("d/e/f", "1")}, {text("d/new", "2"), text("d/.wh..wh..opq", "")}}, []string{"d/ 755", "d/new 644 2"}},
		{"opaque keeps the directory", [][]file{{{name: "d", kind: tar.TypeDir, mode: 0o700}, text("d/x", "1")}, {text("d/.wh..wh..opq", "")}}, []string{"d/ 700"}},
		{"opaque root", [][]file{{text("a", "1")}, {text(".wh..wh..opq", ""), text("b", "2")}}, []string{"b 644 2"}},
		{"aufs housekeeping", [][]file{{text(".wh..wh.plnk/1.2", "x"), dir(".wh..wh.orph"), text("a", "1")}}, []string{"a 644 1"}},
		{"a directory keeps what is in it", [][]file{{text("d/a", "1")}, {{name: "d/", kind: tar.TypeDir, mode: 0o711}}}, []string{"d/ 711", "d/a 644 1"}},
		{"a directory over a file", [][]file{{text("d", "1")}, {dir("d")}}, []string{"d/ 755"}},
		{"a file over a directory", [][]file{{text("d/a/b", "1")}, {text("d", "2")}}, []string{"d 644 2"}},
		{"a directory over a symlink", [][]file{{dir("usr/bin"), link("bin", "usr/bin")}, {dir("bin"), text("bin/x", "2")}},
			[]string{"bin/ 755", "bin/x 644 2", "usr/ 755", "usr/bin/ 755"}},
		{"through a symlink", [][]file{{dir("usr/bin"), link("bin", "usr/bin")}, {text("bin/x", "2")}},
			[]string{"bin -> usr/bin", "usr/ 755", "usr/bin/ 755", "usr/bin/x 644 2"}},
		{"through an absolute symlink", [][]file{{dir("run"), link("var/run", "/run")}, {text("var/run/x", "2")}},
			[]string{"run/ 755", "run/x 644 2", "var/ 755", "var/run -> /run"}},
		{"through a symlink that climbs", [][]file{{dir("a/b"), dir("c"), link("a/b/l", "../../c")}, {text("a/b/l/x", "2")}},
			[]string{"a/ 755", "a/b/ 755", "a/b/l -> ../../c", "c/ 755", "c/x 644 2"}},
		{"whiteout through a symlink", [][]file{{text("usr/bin/x", "1"), link("bin", "usr/bin")}, {text("bin/.wh.x", "")}},
			[]string{"bin -> usr/bin", "usr/ 755", "usr/bin/ 755"}},
		{"symlinks may say anything", [][]file{{link("l", "../../../../etc/shadow"), link("m", "/")}}, []string{"l -> ../../../../etc/shadow", "m -> /"}},
		{"hard links", [][]file{{text("a", "1"), hard("b", "a"), hard("./d/c", "./a")}}, []string{"a 644 1", "b 644 1 =0", "d/ 755", "d/c 644 1 =1"}},
		{"a hard link into a lower layer", [][]file{{text("a", "1")}, {hard("b", "a")}}, []string{"a 644 1", "b 644 1 =0"}},
		{"its target replaced", [][]file{{text("a", "1"), hard("b", "a")}, {text("a", "2")}}, []string{"a 644 2", "b 644 1"}},
		{"its target hidden", [][]file{{text("a", "1"), hard("b", "a")}, {text(".wh.a", "")}}, []string{"b 644 1"}},
		{"a hard link over the directory of its target", [][]file{{text("d/a", "1")}, {hard("d", "d/a")}}, []string{"d 644 1"}},
		{"a hard link to a symlink", [][]file{{link("l", "x"), hard("m", "l")}}, []string{"l -> x", "m -> x =0"}},
		{"directories twice", [][]file{{dir("d"), dir("./d/"), dir("./"), dir("./")}}, []string{"d/ 755"}},
		{"devices are the guest's own", [][]file{{{name: "dev/sda", kind: tar.TypeBlock, major: 8}, {name: "dev/tty", kind: tar.TypeChar, major: 5}}}, nil},
		{"odd names", [][]file{{text("...", "1"), text(" ", "2"), text("-rf", "3"), text("a\nb", "4"), text("\xff\xfe", "5")}},
			[]string{"  644 2", "-rf 644 3", "... 644 1", "a\nb 644 4", "\xff\xfe 644 5"}},
		{"an empty layer", [][]file{{}, {text("a", "1")}, {}}, []string{"a 644 1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := mustSpool(t)
			var raw [][]byte
			for _, l := range tt.layers {
				raw = append(raw, tarOf(t, l...))
			}
			tr := mustMerge(t, s, raw...)
			if got := list(t, tr, s); !slices.Equal(got, tt.want) {
				t.Errorf("got\n  %q\nwant\n  %q", got, tt.want)
			}
		})
	}
}

func TestMergeRefuses(t *testing.T) {
	text := func(name string) file { return file{name: name, body: "x"} }
	good := tarOf(t, text("good"))
	bomb := tarOf(t, file{name: "zeros", body: strings.Repeat("\x00", 8<<20)})
	many := make([]file, 600)
	for i := range many {
		many[i] = file{name: fmt.Sprintf("f%d", i)}
	}
	deep := strings.Repeat("d/", 2040) + "x"
	var attributes, targets []file
	for i := range 100 {
		attributes = append(attributes, file{name: fmt.Sprintf("a%d", i), xattrs: map[string]string{"user.a": strings.Repeat("v", 30_000)}})
		targets = append(targets, file{name: fmt.Sprintf("t%d", i), kind: tar.TypeSymlink, link: strings.Repeat("t", 4000)})
	}
	for name, tt := range map[string]struct {
		raw   []byte
		entry string // named in the error
		why   string // part of the error
	}{
		"dot dot":                 {tarOf(t, text("ok"), text("a/../../etc/passwd")), "a/../../etc/passwd", `".."`},
		"absolute":                {tarOf(t, text("/etc/passwd")), "/etc/passwd", "absolute"},
		"symlink out of the root": {tarOf(t, file{name: "l", kind: tar.TypeSymlink, link: "../../etc"}, text("l/passwd")), "l/passwd", "out of the root"},
		"symlink loop": {tarOf(t, file{name: "a", kind: tar.TypeSymlink, link: "b"}, file{name: "b", kind: tar.TypeSymlink, link: "a"},
			text("a/x")), "a/x", "too many symlinks"},
		"a file as directory":      {tarOf(t, text("f"), text("f/x")), "f/x", "not a directory"},
		"a file twice":             {tarOf(t, text("f"), text("./f")), "./f", "twice"},
		"a file over a directory":  {tarOf(t, file{name: "f", kind: tar.TypeDir}, text("f")), "f", "twice"},
		"hard link to nothing":     {tarOf(t, file{name: "h", kind: tar.TypeLink, link: "nothing"}), "h", "does not exist"},
		"hard link out":            {tarOf(t, file{name: "h", kind: tar.TypeLink, link: "../x"}), "h", `".."`},
		"hard link to itself":      {tarOf(t, text("h"), file{name: "h", kind: tar.TypeLink, link: "h"}), "h", "itself"},
		"hard link to a directory": {tarOf(t, file{name: "d", kind: tar.TypeDir}, file{name: "h", kind: tar.TypeLink, link: "d"}), "h", "directory"},
		"whiteout of no name":      {tarOf(t, text("d/.wh.")), "d/.wh.", "names nothing"},
		"whiteout of dot dot":      {tarOf(t, text("d/.wh...")), "d/.wh...", "names nothing"},
		"whiteout as directory":    {tarOf(t, text(".wh.d/x")), ".wh.d/x", "not a directory"},
		"overlay whiteout":         {tarOf(t, file{name: "gone", kind: tar.TypeChar}), "gone", "overlayfs"},
		"root as file":             {tarOf(t, text(".")), ".", "root"},
		"long name":                {tarOf(t, text(strings.Repeat("n", 256))), "nnn", "longer than 255"},
		"long path":                {tarOf(t, text(strings.Repeat("n/", 2100)+"x")), "n/n/", "longer than 4096"},
		"deep path":                {tarOf(t, file{name: "d", kind: tar.TypeSymlink, link: strings.Repeat("d/", 100)}, text(deep)), "d/d", "too many symlinks"},
		"large attribute":          {tarOf(t, file{name: "a", xattrs: map[string]string{"user.a": strings.Repeat("v", 70_000)}}), "a", "attributes of more than"},
		"odd attribute":            {tarOf(t, file{name: "a", xattrs: map[string]string{"user.": "v"}}), "a", "no usable name"},
		"more entries":             {tarOf(t, many...), "f499", "more than 500"},
		"attributes without end":   {gzipped(t, tarOf(t, attributes...)), "a", "names, targets and attributes"},
		"targets without end":      {gzipped(t, tarOf(t, targets...)), "t", "names, targets and attributes"},
		"more bytes":               {gzipped(t, bomb), "zeros", "may have"},
		"not a tar":                {[]byte(strings.Repeat("this is not a tar archive. ", 100)), "", "not a tar archive"},
		"cut tar":                  {tarOf(t, text("a"), file{name: "b", body: strings.Repeat("b", 5000)})[:3000], "b", "cut off"},
		"cut gzip":                 {gzipped(t, bomb)[:2000], "zeros", ""},
		"bad gzip":                 {append([]byte{0x1f, 0x8b, 8, 0}, make([]byte, 600)...), "", "layer 2"},
		"bad zstd":                 {append([]byte{0x28, 0xb5, 0x2f, 0xfd}, bytes.Repeat([]byte{0xff}, 600)...), "", "layer 2"},
	} {
		t.Run(name, func(t *testing.T) {
			limits := Limits{Entries: 500, Bytes: 4 << 20, Names: 200 << 10}
			_, err := merge(t, mustSpool(t), limits, good, tt.raw)
			if err == nil || errs.CodeOf(err) != errs.Invalid {
				t.Fatalf("merge = %v, want an invalid layer", err)
			}
			for _, part := range []string{"layer 2", tt.entry, tt.why} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
		})
	}
}

// TestBombsLeaveRoomOnTheDisk: an image may unfold into more than a node has left, on which all its sandboxes are.
func TestBombsLeaveRoomOnTheDisk(t *testing.T) {
	s := mustSpool(t)
	left := int64(keepFree + 40<<20)
	s.room = func() (int64, error) { return left - s.written, nil }
	src := &source{layers: []layer{layerOf(gzipped(t, tarOf(t, file{name: "zeros", body: strings.Repeat("\x00", 100<<20)})))}}
	_, err := flatten(t.Context(), src, s, Limits{}, func(Step) {})
	if errs.CodeOf(err) != errs.Exhausted || s.written > 80<<20 {
		t.Errorf("flatten = %v with %d bytes written, want no disk space", err, s.written)
	}
	s = mustSpool(t)
	tr := mustMerge(t, s, tarOf(t, file{name: "a", body: strings.Repeat("a", 30<<20)}))
	s.room = func() (int64, error) { return keepFree + 20<<20, nil }
	path := filepath.Join(t.TempDir(), "root")
	if err := writeRoot(path, tr, s); errs.CodeOf(err) != errs.Exhausted {
		t.Errorf("writeRoot = %v, want no disk space", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("stat = %v, want nothing there", err)
	}
}

// TestOpaqueAgainAndAgain: each cost a look at everything in the directory, so that a layer of ten megabytes took hours.
func TestOpaqueAgainAndAgain(t *testing.T) {
	dir := file{name: "d", kind: tar.TypeDir}
	var lower, upper []file
	for i := range 1000 {
		lower = append(lower, file{name: fmt.Sprintf("d/e/old%d", i), body: "1"})
	}
	for i := range 1000 {
		upper = append(upper, file{name: "d/.wh..wh..opq"}, dir, file{name: fmt.Sprintf("d/e/new%d", i), body: "2"}, file{name: ".wh.d"}, file{name: "d/.wh.e"})
	}
	s := mustSpool(t)
	f, err := merge(t, s, Limits{}, tarOf(t, lower...), tarOf(t, upper...), tarOf(t, file{name: "d/.wh..wh..opq"}, dir, file{name: "d/last", body: "3"}))
	if err != nil {
		t.Fatal(err)
	}
	if got := list(t, f.tree, s); !slices.Equal(got, []string{"d/ 755", "d/last 644 3"}) || f.tree.entries != 2 {
		t.Errorf("%d entries: %q", f.tree.entries, got)
	}
	// What it costs: nothing is looked at that was there when it was asked for last.
	tr := newTree(10)
	tr.layer = 1
	for _, name := range []string{"a", "b"} {
		if err := tr.put([]string{"d", name}, &inode{mode: unix.S_IFREG}); err != nil {
			t.Fatal(err)
		}
	}
	if err := tr.opaque([]string{"d"}); err != nil {
		t.Fatal(err)
	}
	d := tr.root.children["d"]
	d.children["a"].layer = 0 // as nothing can be after the first time
	if err := errors.Join(tr.opaque([]string{"d"}), tr.whiteout([]string{"d"}), tr.opaque(nil)); err != nil || len(d.children) != 2 {
		t.Errorf("asked for again, it left %d files, %v", len(d.children), err)
	}
}

// TestClearingOnceIsEnough: whatever layers say, a tree that forgets what it has cleared already ends up the same.
func TestClearingOnceIsEnough(t *testing.T) {
	var forget func(i *inode)
	forget = func(i *inode) {
		i.cleared = 0
		for _, e := range i.children {
			forget(e.inode)
		}
	}
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 0))
		remembers, forgets := newTree(1000), newTree(1000)
		var did []string
		for step := range 60 {
			path := make([]string, 1+random.IntN(3))
			for i := range path {
				path[i] = string(rune('a' + random.IntN(3)))
			}
			what := random.IntN(6)
			did = append(did, fmt.Sprintf("%d %v", what, path))
			var errs [2]error
			for i, tr := range []*tree{remembers, forgets} {
				tr.layer = step / 20
				switch what {
				case 0, 1:
					errs[i] = tr.put(path, &inode{mode: unix.S_IFREG, mtime: int64(step)})
				case 2, 3:
					errs[i] = tr.put(path, &inode{mode: unix.S_IFDIR, children: map[string]*entry{}, mtime: int64(step)})
				case 4:
					errs[i] = tr.opaque(path)
				case 5:
					errs[i] = tr.whiteout(path)
				}
			}
			forget(forgets.root.inode)
			if got, want := dump(remembers.root.inode), dump(forgets.root.inode); got != want || fmt.Sprint(errs[0]) != fmt.Sprint(errs[1]) || remembers.entries != forgets.entries {
				t.Fatalf("after %q\n  %s, %v\nwant\n  %s, %v", did, got, errs[0], want, errs[1])
			}
		}
	}
}

// dump is a tree as text, with the times that tell its files apart.
func dump(i *inode) string {
	text := fmt.Sprint(i.mtime)
	for _, name := range i.names() {
		text += " " + name + "{" + dump(i.children[name].inode) + "}"
	}
	return text
}

// TestSymlinksThatTakeForEver: forty of 4 KiB make sixty thousand steps of one path, and a layer can have a million of those.
func TestSymlinksThatTakeForEver(t *testing.T) {
	files := []file{{name: "a", kind: tar.TypeDir}, {name: "l39", kind: tar.TypeDir}}
	for i := range 39 {
		files = append(files, file{name: fmt.Sprintf("l%d", i), kind: tar.TypeSymlink, link: strings.Repeat("a/../", 800) + fmt.Sprintf("l%d", i+1)})
	}
	for i := range 10 {
		files = append(files, file{name: fmt.Sprintf("l0/f%d", i)})
	}
	f := newFlattener(mustSpool(t), Limits{})
	f.tree.steps = 500_000
	err := f.apply(t.Context(), 0, layerOf(tarOf(t, files...)), nil)
	if errs.CodeOf(err) != errs.Invalid || !strings.Contains(fmt.Sprint(err), "too long to follow") {
		t.Errorf("apply = %v, want the layer refused", err)
	}
}

// TestSparseBomb: an archive of a kilobyte may claim a file of terabytes.
func TestSparseBomb(t *testing.T) {
	const huge = "1099511627776"
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "x", Typeflag: tar.TypeReg, Format: tar.FormatPAX, Size: 512, Mode: 0o644, PAXRecords: map[string]string{"SLUICE.a": "1"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(append([]byte("1\n0\n0\n"), make([]byte, 506)...)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// archive/tar refuses to write GNU's records, so they are put where others were: the records are padded to a block anyway.
	raw := b.Bytes()
	records := ""
	for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=x", "GNU.sparse.realsize=" + huge} {
		n := len(kv) + 3
		if len(fmt.Sprint(n))+1+len(kv)+1 != n {
			n++
		}
		records += fmt.Sprintf("%d %s\n", n, kv)
	}
	hdr := raw[:512]
	copy(hdr[124:136], fmt.Sprintf("%011o\x00", len(records)))
	sum := 0
	copy(hdr[148:156], "        ")
	for _, c := range hdr {
		sum += int(c)
	}
	copy(hdr[148:156], fmt.Sprintf("%06o\x00 ", sum))
	copy(raw[512:1024], records+strings.Repeat("\x00", 512-len(records)))
	_, err := merge(t, mustSpool(t), Limits{}, raw)
	if errs.CodeOf(err) != errs.Invalid || !strings.Contains(err.Error(), "may have") {
		t.Errorf("merge = %v", err)
	}
}

func TestDigestsAreChecked(t *testing.T) {
	plain := tarOf(t, file{name: "a", body: "1"})
	packed := gzipped(t, plain)
	for _, tt := range []struct {
		digest, diffID string
		ok             bool
	}{
		{digestOf(packed), digestOf(plain), true},
		{"", "", true},
		{digestOf(plain), digestOf(plain), false},
		{digestOf(packed), digestOf(packed), false},
	} {
		l := layerOf(packed)
		l.digest, l.diffID = tt.digest, tt.diffID
		_, err := flatten(t.Context(), &source{layers: []layer{l}}, mustSpool(t), Limits{}, func(Step) {})
		if (err == nil) != tt.ok {
			t.Errorf("digest %s, content %s: %v", tt.digest, tt.diffID, err)
		}
	}
}

func TestMergeEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	src := &source{layers: []layer{layerOf(tarOf(t, file{name: "a"}))}}
	if _, err := flatten(ctx, src, mustSpool(t), Limits{}, func(Step) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("flatten = %v", err)
	}
}

func TestXattrsThatStay(t *testing.T) {
	s := mustSpool(t)
	tr := mustMerge(t, s, tarOf(t, file{name: "a", xattrs: map[string]string{
		"user.z": "1", "user.a": "\x00\xff", "security.capability": "c", "trusted.mine": "t", "security.selinux": "label",
		"trusted.overlay.opaque": "y", "user.overlay.whiteout": "y", "system.nfs4_acl": "n", "com.apple.quarantine": "q",
	}}))
	want := []xattr{{"security.capability", "c"}, {"trusted.mine", "t"}, {"user.a", "\x00\xff"}, {"user.z", "1"}}
	if got := tr.root.children["a"].xattrs; !slices.Equal(got, want) {
		t.Errorf("attributes %q, want %q", got, want)
	}
}

// FuzzMerge: whatever a layer says, what comes of it is refused or is a tree of proper names that can be written as an image, the same
// one each time.
func FuzzMerge(f *testing.F) {
	for _, raw := range everything(f) {
		if len(raw) < 1<<20 {
			f.Add(raw)
		}
	}
	f.Add(tarOf(f, file{name: "d/x", body: "1"}, file{name: "l", kind: tar.TypeSymlink, link: "d"}, file{name: "l/h", kind: tar.TypeLink, link: "l/x"}))
	f.Add(tarOf(f, file{name: "d/.wh.x"}, file{name: "d/.wh..wh..opq"}, file{name: "p", kind: tar.TypeFifo}))
	lower := tarOf(f, file{name: "d/x", body: "lower"}, file{name: "l", kind: tar.TypeSymlink, link: "/d"}, file{name: "e/f/g", body: "deep"})
	f.Fuzz(func(t *testing.T, raw []byte) {
		images := make([][]byte, 2)
		for n := range images {
			s := mustSpool(t)
			fl, err := merge(t, s, Limits{Entries: 2000, Bytes: 1 << 20}, lower, raw)
			if err != nil {
				if errs.CodeOf(err) != errs.Invalid {
					t.Fatalf("trouble that is not the layer's: %v", err)
				}
				return
			}
			count := 0
			var visit func(i *inode)
			visit = func(i *inode) {
				for name, e := range i.children {
					count++
					if name == "" || name == "." || name == ".." || len(name) > maxName || strings.ContainsAny(name, "/\x00") {
						t.Fatalf("a file is named %q", name)
					}
					if strings.HasPrefix(name, whiteoutPrefix) {
						t.Fatalf("whiteout %q became a file", name)
					}
					if kind := e.mode & unix.S_IFMT; kind == unix.S_IFCHR || kind == unix.S_IFBLK {
						t.Fatalf("device %q in the tree", name)
					}
					if e.isDir() {
						visit(e.inode)
					}
				}
			}
			visit(fl.tree.root.inode)
			if count != fl.tree.entries {
				t.Fatalf("%d names, the tree counts %d", count, fl.tree.entries)
			}
			images[n] = mustRead(t, rootImage(t, fl.tree, s))
		}
		if !bytes.Equal(images[0], images[1]) {
			t.Fatal("the same layers gave two images")
		}
	})
}
