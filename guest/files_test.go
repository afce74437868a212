package guest

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"maps"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// do makes a request without the help of the transport: it neither asks for gzip nor unpacks it.
func (s *sandbox) do(t *testing.T, method, path string, header map[string]string, body io.Reader) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, s.url+path, body)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	res, err := (&http.Transport{DisableCompression: true, DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(raw)
}

func query(path string) string { return "/files?path=" + url.QueryEscape(path) }

func TestDownload(t *testing.T) {
	s := startAgent(t)
	text := strings.Repeat("0123456789", 1000)
	writeTest(t, filepath.Join(s.home, "a b.txt"), text)
	writeTest(t, filepath.Join(s.home, "empty"), "")
	if err := syscall.Mkfifo(filepath.Join(s.home, "pipe"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a b.txt", filepath.Join(s.home, "link")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path string
		header     map[string]string
		status     int
		body       string // or part of it for an error
		want       map[string]string
	}{
		{"plain", query("a b.txt"), nil, 200, text, map[string]string{
			"Content-Length": "10000", "Vary": "Accept-Encoding", "Content-Disposition": `inline; filename="a b.txt"`, "Content-Encoding": ""}},
		{"home", query("~/link"), nil, 200, text, nil},
		{"absolute", query(filepath.Join(s.home, "a b.txt")), nil, 200, text, nil},
		{"range", query("a b.txt"), map[string]string{"Range": "bytes=5-9", "Accept-Encoding": "gzip"}, 206, "56789", map[string]string{
			"Content-Range": "bytes 5-9/10000", "Content-Encoding": ""}},
		{"bad range", query("a b.txt"), map[string]string{"Range": "bytes=20000-"}, 416, "", nil},
		{"not modified", query("a b.txt"), map[string]string{"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}, 304, "", nil},
		{"empty with gzip", query("empty"), map[string]string{"Accept-Encoding": "gzip"}, 200, "", map[string]string{
			"Content-Length": "0", "Content-Encoding": ""}},
		{"nothing acceptable", query("a b.txt"), map[string]string{"Accept-Encoding": "identity;q=0, br"}, 406, `"code":406`, nil},
		{"absent", query("nope"), nil, 404, `path '` + s.home + `/nope' does not exist`, nil},
		{"below a file", query("a b.txt/x"), nil, 404, `does not exist`, nil},
		{"directory", query("."), nil, 400, `path '` + s.home + `' is a directory`, nil},
		{"no path is the home", "/files", nil, 400, `is a directory`, nil},
		{"fifo does not hang", query("pipe"), nil, 400, `is not a regular file`, nil},
		{"device", query("/dev/zero"), nil, 400, `is not a regular file`, nil},
		{"nul", query("a\x00b"), nil, 400, `NUL`, nil},
		{"other home", query("~root/x"), nil, 400, `home directory`, nil},
		{"unknown user", query("x") + "&username=ghost", nil, 401, `error looking up user 'ghost'`, nil},
		{"procfs has size 0", query("/proc/self/status"), nil, 200, "Name:", nil},
	} {
		res, body := s.do(t, "GET", c.path, c.header, nil)
		if res.StatusCode != c.status || !strings.Contains(body, c.body) {
			t.Errorf("%s: %d %.200q, want %d %.200q", c.name, res.StatusCode, body, c.status, c.body)
		}
		for k, v := range c.want {
			if got := res.Header.Get(k); got != v {
				t.Errorf("%s: %s = %q, want %q", c.name, k, got, v)
			}
		}
	}
	res, body := s.do(t, "GET", query("a b.txt"), map[string]string{"Accept-Encoding": "gzip, deflate"}, nil)
	zip, err := gzip.NewReader(strings.NewReader(body))
	if err != nil || res.Header.Get("Content-Encoding") != "gzip" || res.Header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Fatalf("gzip: %v, %v", res.Header, err)
	}
	if got, err := io.ReadAll(zip); err != nil || string(got) != text {
		t.Errorf("gzip content: %d bytes, %v", len(got), err)
	}
	writeTest(t, filepath.Join(s.home, "a\n\"ü"), "odd")
	res, _ = s.do(t, "GET", query("a\n\"ü"), nil, nil)
	if got, want := res.Header.Get("Content-Disposition"), "inline; filename*=utf-8''a%0A%22%C3%BC"; got != want {
		t.Errorf("Content-Disposition = %q, want %q", got, want)
	}
	if res, body := s.do(t, "HEAD", query("a b.txt"), nil, nil); res.StatusCode != 200 || res.ContentLength != 10000 || body != "" {
		t.Errorf("HEAD: %d, length %d", res.StatusCode, res.ContentLength)
	}
}

// A signed URL is for one user. Whoever holds it cannot become another by a header that the signature does not cover.
func TestSignedURLBindsTheUser(t *testing.T) {
	s := startAgent(t)
	mustInit(t, s, InitRequest{AccessToken: "secret"})
	path := query("mine") + "&signature=" + url.QueryEscape(Signature("mine", "write", "", "secret", 0))
	header := map[string]string{"Content-Type": "application/octet-stream", "Authorization": basic("root")}
	if res, body := s.do(t, "POST", path, header, strings.NewReader("x")); res.StatusCode != 200 || !strings.Contains(body, s.home+"/mine") {
		t.Errorf("%d %s, want a file in the home of the default user", res.StatusCode, body)
	}
}

func form(t *testing.T, parts ...[3]string) (contentType string, body io.Reader) {
	t.Helper()
	var buf bytes.Buffer
	w := multipart.NewWriter(&buf)
	for _, p := range parts {
		h := textproto.MIMEHeader{"Content-Disposition": {`form-data; name="` + p[0] + `"; filename="` + p[1] + `"`}}
		part, err := w.CreatePart(h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := part.Write([]byte(p[2])); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	return w.FormDataContentType(), &buf
}

func zipped(text string) io.Reader {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	_, _ = w.Write([]byte(text))
	w.Close()
	return &buf
}

func TestUpload(t *testing.T) {
	s := startAgent(t)
	octets := map[string]string{"Content-Type": "application/octet-stream"}
	with := func(more ...string) map[string]string {
		h := maps.Clone(octets)
		for i := 0; i < len(more); i += 2 {
			h[more[i]] = more[i+1]
		}
		return h
	}
	type result struct {
		path   string
		header map[string]string
		body   io.Reader
		status int
		want   string
		file   string // relative to home; its content must be "content"
	}
	check := func(name string, c result) {
		t.Helper()
		res, body := s.do(t, "POST", c.path, c.header, c.body)
		if res.StatusCode != c.status || !strings.Contains(body, c.want) {
			t.Errorf("%s: %d %s, want %d %s", name, res.StatusCode, body, c.status, c.want)
		}
		if c.file == "" {
			return
		}
		path := filepath.Join(s.home, c.file)
		if got, err := os.ReadFile(path); err != nil || string(got) != "content" {
			t.Errorf("%s: %s = %q, %v", name, path, got, err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if uid := info.Sys().(*syscall.Stat_t).Uid; os.Getuid() == 0 && uid != testUID {
			t.Errorf("%s: owner %d", name, uid)
		}
	}
	content := func() io.Reader { return strings.NewReader("content") }
	check("octets", result{query("o"), octets, content(), 200,
		`[{"path":"` + s.home + `/o","name":"o","type":"file"}]`, "o"})
	check("chunked, with parents", result{query("x/y/z"), octets, io.MultiReader(content()), 200, `"name":"z"`, "x/y/z"})
	check("gzip", result{query("g"), with("Content-Encoding", "gzip"), zipped("content"), 200, `"name":"g"`, "g"})
	check("no gzip at all", result{query("bad"), with("Content-Encoding", "gzip"), content(), 400, "error decompressing body", ""})
	check("unknown coding", result{query("bad"), with("Content-Encoding", "br"), content(), 400, "unsupported content encoding: br", ""})
	check("no path", result{"/files", octets, content(), 400, "path query parameter is required for raw body upload", ""})
	check("directory", result{query("x"), octets, content(), 400, "path is a directory: " + s.home + "/x", ""})
	check("a file as parent", result{query("o/p"), octets, content(), 400, "error ensuring directories", ""})
	check("unknown user", result{query("p") + "&username=ghost", octets, content(), 401, "error looking up user 'ghost'", ""})
	check("content type", result{query("p"), map[string]string{"Content-Type": "text/plain"}, content(), 400,
		"unsupported content type: text/plain, expected multipart/form-data or application/octet-stream", ""})
	check("no content type", result{query("p"), nil, content(), 400, "unsupported content type: ,", ""})
	check("no boundary", result{query("p"), map[string]string{"Content-Type": "multipart/form-data"}, content(), 400, "unsupported content type", ""})
	check("full disk", result{query("/dev/full"), octets, content(), 507, "not enough disk space available", ""})
	check("metadata in another alphabet", result{query("p"), with("X-Metadata-K", "\xe4"), content(), 400, "metadata value of 'k'", ""})
	check("metadata with a huge key", result{query("p"), with("X-Metadata-"+strings.Repeat("k", 300), "v"), content(), 400, "metadata key", ""})
	if _, err := os.Stat(filepath.Join(s.home, "bad")); err == nil {
		t.Error("a refused upload left a file")
	}

	multi := func(name, path string, status int, want string, parts ...[3]string) {
		t.Helper()
		kind, body := form(t, parts...)
		check(name, result{path, map[string]string{"Content-Type": kind}, body, status, want, ""})
	}
	multi("one part, path in the query", query("q/one.txt"), 200, `"path":"`+s.home+`/q/one.txt"`, [3]string{"file", "one.txt", "content"})
	multi("filenames are full paths", "/files", 200, `"path":"`+s.home+`/m/b"`,
		[3]string{"file", s.home + "/m/a", "1"}, [3]string{"other", "ignored", "2"}, [3]string{"file", "m/b", "3"})
	multi("nothing in it", "/files", 200, "[]", [3]string{"other", "ignored", "2"})
	multi("the same target twice", "/files", 400, "you cannot upload multiple files to the same path '"+s.home+"/m/c'",
		[3]string{"file", "m/c", "1"}, [3]string{"file", s.home + "/m/./c", "2"})
	multi("no name", "/files", 400, "no filename", [3]string{"file", "", "1"})
	check("cut short", result{query("m/d"), map[string]string{"Content-Type": "multipart/form-data; boundary=b"},
		strings.NewReader("--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"d\"\r\n\r\nhalf"), 400, "error reading body", ""})
	if _, err := os.Stat(filepath.Join(s.home, "m/d")); err == nil {
		t.Error("half a file was kept")
	}
}

func TestUploadKeepsWhatIsNotItsToChange(t *testing.T) {
	s := startAgent(t)
	path := filepath.Join(s.home, "script")
	writeTest(t, path, "old and longer")
	if err := os.Chmod(path, 0o750); err != nil {
		t.Fatal(err)
	}
	before, _ := os.Stat(path)
	if res, body := s.do(t, "POST", query("script"), map[string]string{"Content-Type": "application/octet-stream"}, strings.NewReader("new")); res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, body)
	}
	after, _ := os.Stat(path)
	if !os.SameFile(before, after) || after.Mode() != before.Mode() || after.Sys().(*syscall.Stat_t).Uid != before.Sys().(*syscall.Stat_t).Uid {
		t.Errorf("inode, mode or owner changed: %v, %v", before, after)
	}
	if got, _ := os.ReadFile(path); string(got) != "new" {
		t.Errorf("content = %q", got)
	}
}

func TestMetadata(t *testing.T) {
	s := startAgent(t)
	put := func(header map[string]string) string {
		t.Helper()
		h := map[string]string{"Content-Type": "application/octet-stream"}
		maps.Copy(h, header)
		res, body := s.do(t, "POST", query("f"), h, strings.NewReader("x"))
		if res.StatusCode == 400 && strings.Contains(body, "stores no metadata") {
			t.Skip("the temporary directory's filesystem has no user attributes; point TMPDIR at ext4, xfs, btrfs or a recent tmpfs")
		}
		var done []written
		if err := json.Unmarshal([]byte(body), &done); err != nil || len(done) != 1 {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
		return body
	}
	if body := put(map[string]string{"X-Metadata-Author": "me & you", "X-Metadata-k2": ""}); !strings.Contains(body, `"metadata":{"author":"me \u0026 you","k2":""}`) {
		t.Errorf("answer = %s", body)
	}
	if got := readMetadata(filepath.Join(s.home, "f")); !maps.Equal(got, map[string]string{"author": "me & you", "k2": ""}) {
		t.Errorf("stored = %v", got)
	}
	// New content does not keep what was said of the old.
	put(map[string]string{"X-Metadata-K3": "v"})
	if got := readMetadata(filepath.Join(s.home, "f")); !maps.Equal(got, map[string]string{"k3": "v"}) {
		t.Errorf("stored after the second upload = %v", got)
	}
}

func TestCompose(t *testing.T) {
	s := startAgent(t)
	check := func(body string, status int, want string) {
		t.Helper()
		res, got := s.do(t, "POST", "/files/compose", map[string]string{"Content-Type": "application/json"}, strings.NewReader(body))
		if res.StatusCode != status || !strings.Contains(got, want) {
			t.Errorf("compose %s = %d %s, want %d %s", body, res.StatusCode, got, status, want)
		}
	}
	for _, name := range []string{"1", "2", "3"} {
		writeTest(t, filepath.Join(s.home, name), strings.Repeat(name, 3))
	}
	check(`{"source_paths":["1","~/2"],"destination":"1"}`, 400, "is also a source")
	check(`{"source_paths":["1","4"],"destination":"out"}`, 404, "does not exist")
	check(`{"source_paths":["1"]}`, 400, "destination is required")
	check(`{"destination":"out"}`, 400, "source_paths must not be empty")
	check(`{"source_paths":["1"],"destination":"out","username":"ghost"}`, 401, "ghost")
	check(`{`, 400, "error parsing body")
	check(`[[[[`, 400, "error parsing body")
	check(`{"source_paths":["3","1","2"],"destination":"deep/out"}`, 200, `{"path":"`+s.home+`/deep/out","name":"out","type":"file"}`)
	if got, _ := os.ReadFile(filepath.Join(s.home, "deep/out")); string(got) != "333111222" {
		t.Errorf("composed = %q", got)
	}
	if _, err := os.Stat(filepath.Join(s.home, "1")); err == nil {
		t.Error("a source is still there")
	}
}

// Whatever path an SDK puts into a part's filename by the rules of browsers comes out as it was.
func FuzzPartNames(f *testing.F) {
	for _, seed := range []string{"/home/user/a.txt", "a b;c=d", "ünï/cödé", "../../x", `q"uote`, "per%cent", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		raw := `form-data; name="file"; filename="` + path + `"`
		name, filename := partNames(raw)
		if strings.ContainsAny(path, "\"\\\r\n") {
			return // escaped by clients, so never in a header as such; only must not panic
		}
		if name != "file" || filename != path {
			t.Errorf("partNames(%q) = %q, %q", raw, name, filename)
		}
	})
}
