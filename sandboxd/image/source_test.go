package image

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/sluice-edge/sluice/internal/errs"
)

// testImage is made by the library that the whole world uses, two gzip layers.
func testImage(t testing.TB, architecture string) v1.Image {
	t.Helper()
	img := empty.Image
	for _, raw := range [][]byte{
		tarOf(t, file{name: "bin/sh", body: "shell", mode: 0o755}, file{name: "etc/gone", body: "x"}),
		tarOf(t, file{name: "etc/.wh.gone"}, file{name: "etc/arch", body: architecture}),
	} {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", architecture
	file.Config = v1.Config{User: "1000:1000", WorkingDir: "/srv", Env: []string{"A=1"}, Entrypoint: []string{"/bin/sh"}, Cmd: []string{"-c", "x"},
		ExposedPorts: map[string]struct{}{"8000/tcp": {}, "80": {}, "53/udp": {}, "x": {}, "0": {}, "70000/tcp": {}}}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	return img
}

var wantedFiles = []string{"bin/ 755", "bin/sh 755 shell", "etc/ 755", "etc/arch 644 " + runtime.GOARCH}

// mustHold opens a source and compares what is in it.
func mustHold(t *testing.T, from string) {
	t.Helper()
	src, err := openSource(t.Context(), from, t.TempDir(), Limits{}, nil)
	if err != nil {
		t.Fatalf("open %s: %v", from, err)
	}
	defer src.Close()
	s := mustSpool(t)
	f, err := flatten(t.Context(), src, s, Limits{}, func(Step) {})
	if err != nil {
		t.Fatalf("flatten %s: %v", from, err)
	}
	if got := list(t, f.tree, s); !slices.Equal(got, wantedFiles) {
		t.Errorf("%s has %q, want %q", from, got, wantedFiles)
	}
	if src.dir != "" {
		return
	}
	want := Config{User: "1000:1000", Workdir: "/srv", Env: []string{"A=1"}, Entrypoint: []string{"/bin/sh"}, Cmd: []string{"-c", "x"}, Ports: []uint16{80, 8000}}
	if got := fmt.Sprintf("%+v", src.config); got != fmt.Sprintf("%+v", want) {
		t.Errorf("%s has the configuration %s, want %+v", from, got, want)
	}
	if !strings.HasPrefix(src.digest, "sha256:") {
		t.Errorf("%s has the digest %q", from, src.digest)
	}
}

func mustRefuse(t *testing.T, from string, code errs.Code, why string) {
	t.Helper()
	src, err := openSource(t.Context(), from, t.TempDir(), Limits{}, nil)
	if err == nil {
		src.Close()
	}
	if err == nil || errs.CodeOf(err) != code || !strings.Contains(err.Error(), why) {
		t.Errorf("open %s = %v, want %s and %q", from, err, code, why)
	}
}

func other() string {
	if runtime.GOARCH == "arm64" {
		return "amd64"
	}
	return "arm64"
}

func TestLayoutSource(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, dir, errs.NotFound, "no image for linux/"+runtime.GOARCH)
	img := testImage(t, runtime.GOARCH)
	if err := p.AppendImage(img, layout.WithAnnotations(map[string]string{refAnnotation: "one"}), layout.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH})); err != nil {
		t.Fatal(err)
	}
	mustHold(t, dir)
	mustHold(t, "oci:"+dir)
	// An image of another platform beside it is not in the way.
	if err := p.AppendImage(testImage(t, other()), layout.WithPlatform(v1.Platform{OS: "linux", Architecture: other()})); err != nil {
		t.Fatal(err)
	}
	mustHold(t, dir)
	// Another one of this platform is; it has to be named.
	both := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}},
		mutate.IndexAddendum{Add: testImage(t, other()), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: other()}}})
	if err := p.AppendIndex(both, layout.WithAnnotations(map[string]string{refAnnotation: "many"})); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, dir, errs.Invalid, `"many"`)
	mustHold(t, dir+"#many")
	mustHold(t, "oci:"+dir+"#one")
	mustRefuse(t, dir+"#none", errs.NotFound, `"none"`)

	// A blob that was changed, and one that is not there.
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[1].Digest()
	if err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(dir, "blobs", "sha256", digest.Hex)
	if err := os.WriteFile(blob, gzipped(t, tarOf(t, file{name: "evil"})), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, why := range []string{"has the digest", "lacks"} {
		src, err := openSource(t.Context(), dir+"#one", t.TempDir(), Limits{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, err = flatten(t.Context(), src, mustSpool(t), Limits{}, func(Step) {})
		src.Close()
		if errs.CodeOf(err) != errs.Invalid || !strings.Contains(err.Error(), why) || !strings.Contains(err.Error(), "layer 2") {
			t.Errorf("changed blob: %v, want %q", err, why)
		}
		_ = os.Remove(blob)
	}
	manifest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "blobs", "sha256", manifest.Hex), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, dir+"#one", errs.Invalid, "digest")
}

func TestArchiveSource(t *testing.T) {
	img := testImage(t, runtime.GOARCH)
	tag, err := name.NewTag("test.example/a:1")
	if err != nil {
		t.Fatal(err)
	}
	tag2, err := name.NewTag("test.example/b:2")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	one := filepath.Join(dir, "one.tar")
	if err := tarball.WriteToFile(one, tag, img); err != nil {
		t.Fatal(err)
	}
	mustHold(t, one)
	mustHold(t, "docker-archive:"+one+"#test.example/a:1")
	packed := filepath.Join(dir, "one.tar.gz")
	if err := os.WriteFile(packed, gzipped(t, mustRead(t, one)), 0o600); err != nil {
		t.Fatal(err)
	}
	mustHold(t, packed)
	two := filepath.Join(dir, "two.tar")
	if err := tarball.MultiWriteToFile(two, map[name.Tag]v1.Image{tag: img, tag2: testImage(t, other())}); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, two, errs.Invalid, "test.example/b:2")
	mustHold(t, two+"#test.example/a:1")
	mustRefuse(t, two+"#test.example/b:2", errs.Invalid, "the image is for "+other())

	// An OCI layout as an archive.
	layoutDir := filepath.Join(dir, "layout")
	p, err := layout.Write(layoutDir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.AddFS(os.DirFS(layoutDir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	oci := filepath.Join(dir, "oci.tar")
	if err := os.WriteFile(oci, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	mustHold(t, oci)
}

func TestBadArchives(t *testing.T) {
	good := dockerArchive(t, [][]byte{tarOf(t, file{name: "a"})})
	var named []file
	for i := range 80 {
		named = append(named, file{name: fmt.Sprintf("%d", i) + strings.Repeat("n", 1<<20-100)})
	}
	circle := []file{{name: "manifest.json", body: `[{"Config":"c","Layers":[]}]`}, {name: "c", kind: tar.TypeSymlink, link: "d"}, {name: "d", kind: tar.TypeSymlink, link: "c"}}
	for name, tt := range map[string]struct {
		raw []byte
		why string
	}{
		"empty":          {nil, "empty"},
		"no tar":         {bytes.Repeat([]byte("hello "), 500), "not a tar archive"},
		"cut":            {good[:len(good)/2], ""},
		"no image":       {tarOf(t, file{name: "a"}), "neither manifest.json nor index.json"},
		"no json":        {tarOf(t, file{name: "manifest.json", body: "<html>"}), "not what it should be"},
		"no images":      {tarOf(t, file{name: "manifest.json", body: "[]"}), "has 0 images"},
		"no config":      {tarOf(t, file{name: "manifest.json", body: `[{"Config":"../../etc/passwd","Layers":[]}]`}), "lacks"},
		"links":          {tarOf(t, circle...), "circles"},
		"layers missing": {tarOf(t, file{name: "manifest.json", body: `[{"Config":"c","Layers":["a"]}]`}, file{name: "c", body: "{}"}), "1 layers, the configuration 0"},
		"twice":          {tarOf(t, file{name: "a"}, file{name: "a"}), "twice"},
		"bad gzip":       {gzipped(t, good)[:100], "decompress"},
		"long names":     {gzipped(t, tarOf(t, named...)), "names in the archive"},
		"large document": {tarOf(t, file{name: "manifest.json", body: strings.Repeat(" ", maxDocument+1)}), "larger than"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "archive")
			if err := os.WriteFile(path, tt.raw, 0o600); err != nil {
				t.Fatal(err)
			}
			mustRefuse(t, path, errs.Invalid, tt.why)
		})
	}
}

// TestConfigsThatNoProgramCanHave: they would be in the manifest of a template, which could be built and then never be used.
func TestConfigsThatNoProgramCanHave(t *testing.T) {
	ports := map[string]struct{}{}
	for i := range 65535 {
		ports[fmt.Sprint(i+1)], ports[fmt.Sprintf("%d/tcp", i+1)] = struct{}{}, struct{}{}
	}
	for name, tt := range map[string]struct {
		config v1.Config
		why    string
	}{
		"environment":   {v1.Config{Env: []string{"A=" + strings.Repeat("a", maxConfig)}}, "environment"},
		"many commands": {v1.Config{Cmd: make([]string, 1_000_000)}, "commands"},
		"NUL in a user": {v1.Config{User: "root\x00"}, "NUL"},
		"ports":         {v1.Config{ExposedPorts: ports}, "65535 ports"},
	} {
		if _, err := configOf(&v1.ConfigFile{Config: tt.config}); errs.CodeOf(err) != errs.Invalid || !strings.Contains(fmt.Sprint(err), tt.why) {
			t.Errorf("%s: %v, want it refused for its %s", name, err, tt.why)
		}
	}
}

// FuzzArchive: whatever an archive says, it is refused as invalid or every layer of it is a part of the archive.
func FuzzArchive(f *testing.F) {
	f.Add(dockerArchive(f, [][]byte{tarOf(f, file{name: "a", body: "1"}), tarOf(f, file{name: ".wh.a"})}))
	f.Add(tarOf(f, file{name: "manifest.json", body: `[{"Config":"c","Layers":["l"]}]`}, file{name: "c", body: `{"rootfs":{"diff_ids":["` + digestOf(nil) + `"]}}`},
		file{name: "x/l", body: "layer"}, file{name: "l", kind: tar.TypeSymlink, link: "x/l"}))
	f.Add(tarOf(f, file{name: "index.json", body: `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + digestOf(nil) + `"}]}`}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		dir := t.TempDir()
		path := filepath.Join(dir, "archive")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		src, err := openArchive(t.Context(), path, "", dir, Limits{Bytes: 1 << 20})
		if err != nil {
			if code := errs.CodeOf(err); code != errs.Invalid && code != errs.NotFound {
				t.Fatalf("trouble that is not the archive's: %v", err)
			}
			return
		}
		defer src.Close()
		for _, l := range src.layers {
			r, err := l.open(t.Context())
			if err != nil {
				continue
			}
			if n, err := io.Copy(io.Discard, r); err == nil && n > 1<<20+int64(len(raw)) {
				t.Fatalf("a layer of %d bytes", n)
			}
			r.Close()
		}
	})
}

func TestReferenceSource(t *testing.T) {
	store := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	private := true
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); private && (user != "me" || password != "secret") {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		store.ServeHTTP(w, r)
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	ref, err := name.ParseReference(host + "/team/app:v1")
	if err != nil {
		t.Fatal(err)
	}
	private = false
	both := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: testImage(t, other()), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: other()}}},
		mutate.IndexAddendum{Add: testImage(t, runtime.GOARCH), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}})
	if err := remote.WriteIndex(ref, both); err != nil {
		t.Fatal(err)
	}
	private = true
	config := t.TempDir()
	t.Setenv("DOCKER_CONFIG", config)
	t.Setenv("HOME", config)
	t.Setenv("XDG_RUNTIME_DIR", config)
	mustRefuse(t, ref.String(), errs.Denied, "log in")
	auth := base64.StdEncoding.EncodeToString([]byte("me:secret"))
	if err := os.WriteFile(filepath.Join(config, "config.json"), []byte(`{"auths":{"`+host+`":{"auth":"`+auth+`"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	mustHold(t, ref.String())
	mustHold(t, "docker://"+ref.String())
	mustRefuse(t, host+"/team/none:v1", errs.NotFound, "no such image")
	mustRefuse(t, "docker://UPPER/x", errs.Invalid, "image reference")
	private = false
	img := testImage(t, runtime.GOARCH)
	huge, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{-1, 1 << 40} { // the first is "unknown" to the library, which then reads for ever
		huge.Config.Size = size
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, server.URL+"/v2/team/app/manifests/huge", strings.NewReader(mustJSON(t, huge)))
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Content-Type", string(huge.MediaType))
		resp, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		mustRefuse(t, host+"/team/app:huge", errs.Invalid, "configuration has")
	}
	server.Close()
	mustRefuse(t, ref.String(), errs.Unavailable, "cannot be asked")
}

func TestDirectorySource(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"bin", "etc"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for path, mode := range map[string]fs.FileMode{"bin/sh": 0o755, "etc/arch": 0o644} {
		body := "shell"
		if path == "etc/arch" {
			body = runtime.GOARCH
		}
		if err := os.WriteFile(filepath.Join(dir, path), []byte(body), mode); err != nil {
			t.Fatal(err)
		}
	}
	mustHold(t, dir)
	mustHold(t, "dir:"+dir)

	// Links, and what does not belong in an image.
	for _, err := range []error{
		os.Link(filepath.Join(dir, "bin/sh"), filepath.Join(dir, "bin/bash")),
		os.Symlink("/etc/shadow", filepath.Join(dir, "bin/link")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s := mustSpool(t)
	f, err := flatten(t.Context(), &source{dir: dir}, s, Limits{}, func(Step) {})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"bin/ 755", "bin/bash 755 shell", "bin/link -> /etc/shadow", "bin/sh 755 shell =1", "etc/ 755", "etc/arch 644 " + runtime.GOARCH}
	if got := list(t, f.tree, s); !slices.Equal(got, want) {
		t.Errorf("directory = %q, want %q", got, want)
	}
	if _, err := flatten(t.Context(), &source{dir: dir}, s, Limits{Entries: 3}, func(Step) {}); errs.CodeOf(err) != errs.Invalid {
		t.Errorf("more entries than allowed: %v", err)
	}
	if _, err := flatten(t.Context(), &source{dir: dir}, s, Limits{Bytes: 3}, func(Step) {}); errs.CodeOf(err) != errs.Invalid {
		t.Errorf("more bytes than allowed: %v", err)
	}
}

func TestSourcesThatAreNot(t *testing.T) {
	for from, code := range map[string]errs.Code{
		"": errs.Invalid, "oci:": errs.Invalid, "docker://": errs.Invalid, "/no/such/thing": errs.NotFound, "./nothing.tar": errs.NotFound,
		"oci:/no/such/thing": errs.NotFound, "dir:/no/such/thing": errs.NotFound, "docker-archive:/no/such": errs.NotFound, "two words": errs.Invalid,
	} {
		mustRefuse(t, from, code, "")
	}
	mustRefuse(t, "docker-archive:"+t.TempDir(), errs.Invalid, "it is a directory")
}
