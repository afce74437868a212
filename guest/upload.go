package guest

import (
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// uploadIdle is how long an upload may send nothing. A client's own stream may pause for long, but not for ever.
	uploadIdle = idleTimeout
	// maxComposeBody bounds the list of a compose.
	maxComposeBody = 1 << 20
)

// written is one entry of an upload's answer.
type written struct {
	Path     string            `json:"path"`
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// serveUpload is POST /files.
func (a *agent) serveUpload(w http.ResponseWriter, r *http.Request) {
	done, err := a.upload(w, r)
	if err != nil {
		a.answerFileError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, done)
}

func (a *agent) upload(w http.ResponseWriter, r *http.Request) ([]written, error) {
	u, err := a.fileActor(r, signWrite)
	if err != nil {
		return nil, err
	}
	metadata, err := parseMetadata(r.Header)
	if err != nil {
		return nil, err
	}
	body, err := decodeBody(&patientReader{body: r.Body, rc: http.NewResponseController(w)}, r.Header.Get("Content-Encoding"))
	if err != nil {
		return nil, err
	}
	given := r.Header.Get("Content-Type")
	kind, params, _ := mime.ParseMediaType(given)
	switch {
	case kind == "application/octet-stream":
		target := r.URL.Query().Get("path")
		if target == "" {
			return nil, refuse(http.StatusBadRequest, "path query parameter is required for raw body upload")
		}
		path, err := a.filePath(target, u)
		if err != nil {
			return nil, err
		}
		entry, err := writeFile(path, u, body, metadata)
		if err != nil {
			return nil, err
		}
		return []written{entry}, nil
	case kind == "multipart/form-data" && params["boundary"] != "":
		return a.uploadParts(multipart.NewReader(body, params["boundary"]), r.URL.Query().Get("path"), u, metadata)
	default:
		return nil, refuse(http.StatusBadRequest, "unsupported content type: %s, expected multipart/form-data or application/octet-stream", given)
	}
}

// uploadParts writes each part named "file". target is the path of the query; without it every part's filename is its own path.
func (a *agent) uploadParts(parts *multipart.Reader, target string, u account, metadata map[string]string) ([]written, error) {
	done := []written{}
	seen := map[string]bool{}
	for {
		part, err := parts.NextRawPart()
		if errors.Is(err, io.EOF) {
			return done, nil
		}
		if err != nil {
			return nil, refuse(http.StatusBadRequest, "error parsing multipart form: %v", err)
		}
		name, filename := partNames(part.Header.Get("Content-Disposition"))
		if name != "file" {
			continue
		}
		if target != "" {
			filename = target
		}
		if filename == "" {
			return nil, refuse(http.StatusBadRequest, "a file part has no filename, and there is no path query parameter")
		}
		path, err := a.filePath(filename, u)
		if err != nil {
			return nil, err
		}
		if seen[path] {
			return nil, refuse(http.StatusBadRequest,
				"you cannot upload multiple files to the same path '%s' in one upload request, only the first specified file was uploaded", path)
		}
		seen[path] = true
		entry, err := writeFile(path, u, sourceReader{part}, metadata)
		if err != nil {
			return nil, err
		}
		done = append(done, entry)
	}
}

// partNames reads a part's Content-Disposition. The filename is the full path: mime/multipart's own FileName cuts it down to its base.
func partNames(disposition string) (name, filename string) {
	kind, params, err := mime.ParseMediaType(disposition)
	if err != nil || kind != "form-data" {
		return "", ""
	}
	return params["name"], params["filename"]
}

// decodeBody undoes the request's Content-Encoding.
func decodeBody(body io.Reader, encoding string) (io.Reader, error) {
	switch strings.ToLower(strings.TrimSpace(encoding)) {
	case "", "identity":
		return body, nil
	case "gzip", "x-gzip":
		zip, err := gzip.NewReader(body)
		if err != nil {
			return nil, refuse(http.StatusBadRequest, "error decompressing body: %v", err)
		}
		return sourceReader{zip}, nil
	default:
		return nil, refuse(http.StatusBadRequest, "unsupported content encoding: %s, expected gzip", encoding)
	}
}

// sourceReader marks what went wrong on the client's side of a copy, so that it is not taken for a fault of the disk.
type sourceReader struct{ r io.Reader }

func (s sourceReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	var known *fileError
	if err != nil && !errors.Is(err, io.EOF) && !errors.As(err, &known) {
		err = refuse(http.StatusBadRequest, "error reading body: %v", err)
	}
	return n, err
}

// patientReader gives every read of a body its own time, because the whole has no limit.
type patientReader struct {
	body io.Reader
	rc   *http.ResponseController
	set  time.Time
}

func (p *patientReader) Read(buf []byte) (int, error) {
	if now := time.Now(); now.Sub(p.set) > time.Second {
		_ = p.rc.SetReadDeadline(now.Add(uploadIdle)) // unsupported by test recorders only
		p.set = now
	}
	n, err := sourceReader{p.body}.Read(buf)
	if err != nil {
		_ = p.rc.SetReadDeadline(time.Time{})
	}
	return n, err
}

// writeFile replaces the content of path, or makes it and its parents for u. It writes in place, because a rename over the file would lose its
// owner, its mode and the links to it.
func writeFile(path string, u account, body io.Reader, metadata map[string]string) (written, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return written{}, refuse(http.StatusBadRequest, "path is a directory: %s", path)
	}
	if err := makeDirs(filepath.Dir(path), u); err != nil {
		return written{}, diskError("error ensuring directories", err)
	}
	f, created, err := openForWrite(path, u)
	if err != nil {
		return written{}, err
	}
	_, err = io.Copy(f, body)
	if err == nil {
		err = replaceMetadata(f, metadata)
	}
	err = errors.Join(err, f.Close())
	if err != nil {
		if created {
			_ = os.Remove(path) // a part of a file that never was is worse than none
		}
		return written{}, diskError("error writing file", err)
	}
	return written{Path: path, Name: filepath.Base(path), Type: "file", Metadata: metadata}, nil
}

// openForWrite opens path empty, and says whether it made it. O_NONBLOCK: a pipe nobody reads must refuse, not wait.
func openForWrite(path string, u account) (f *os.File, created bool, err error) {
	const flags = os.O_WRONLY | os.O_TRUNC | syscall.O_NONBLOCK | syscall.O_NOCTTY
	f, err = os.OpenFile(path, flags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		created = true
		f, err = os.OpenFile(path, flags|os.O_CREATE, 0o666)
	}
	if err != nil {
		return nil, false, diskError("error opening file", err)
	}
	if created {
		// By descriptor: the name may be a link to something else by now.
		if err := own(func() error { return f.Chown(int(u.UID), int(u.GID)) }, u); err != nil {
			return nil, false, errors.Join(diskError("error changing owner", err), f.Close())
		}
	}
	return f, created, nil
}

// makeDirs makes what is missing of dir, for u.
func makeDirs(dir string, u account) error {
	info, err := os.Stat(dir)
	if err == nil {
		if !info.IsDir() {
			return fmt.Errorf("%s: %w", dir, syscall.ENOTDIR)
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if parent := filepath.Dir(dir); parent != dir {
		if err := makeDirs(parent, u); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	} else if err != nil {
		return nil // made by somebody else just now: not ours to give away
	}
	return own(func() error { return os.Lchown(dir, int(u.UID), int(u.GID)) }, u)
}

// own gives something new to u. Without the right to give away, which a sandbox of a single user lacks, it stays with the agent's own user.
func own(chown func() error, u account) error {
	if int(u.UID) == os.Geteuid() && int(u.GID) == os.Getegid() {
		return nil
	}
	err := chown()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) {
		return nil
	}
	return err
}

// serveCompose is POST /files/compose: it joins files into one and removes the pieces.
func (a *agent) serveCompose(w http.ResponseWriter, r *http.Request) {
	entry, err := a.compose(w, r)
	if err != nil {
		a.answerFileError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, entry)
}

func (a *agent) compose(w http.ResponseWriter, r *http.Request) (written, error) {
	var req struct {
		SourcePaths []string `json:"source_paths"`
		Destination string   `json:"destination"`
		Username    string   `json:"username"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxComposeBody)).Decode(&req); err != nil {
		return written{}, refuse(http.StatusBadRequest, "error parsing body: %v", err)
	}
	switch {
	case req.Destination == "":
		return written{}, refuse(http.StatusBadRequest, "destination is required")
	case len(req.SourcePaths) == 0:
		return written{}, refuse(http.StatusBadRequest, "source_paths must not be empty")
	}
	u, err := a.fileUser(req.Username)
	if err != nil {
		return written{}, err
	}
	target, err := a.filePath(req.Destination, u)
	if err != nil {
		return written{}, err
	}
	into, _ := os.Stat(target)
	sources := make([]string, 0, len(req.SourcePaths))
	for _, source := range req.SourcePaths {
		path, err := a.filePath(source, u)
		if err != nil {
			return written{}, err
		}
		f, info, err := openForRead(path)
		if err != nil {
			return written{}, err
		}
		f.Close()
		if path == target || into != nil && os.SameFile(info, into) {
			return written{}, refuse(http.StatusBadRequest, "destination '%s' is also a source", target)
		}
		sources = append(sources, path)
	}
	entry, err := writeFile(target, u, &concatenation{paths: sources}, nil)
	if err != nil {
		return written{}, err
	}
	for _, path := range sources {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return written{}, diskError("error removing source", err)
		}
	}
	return entry, nil
}

// concatenation reads files one after the other and has one open at a time.
type concatenation struct {
	paths []string
	now   *os.File
}

func (c *concatenation) Read(p []byte) (int, error) {
	for {
		if c.now == nil {
			if len(c.paths) == 0 {
				return 0, io.EOF
			}
			f, _, err := openForRead(c.paths[0])
			if err != nil {
				return 0, err
			}
			c.now, c.paths = f, c.paths[1:]
		}
		n, err := c.now.Read(p)
		if err != nil {
			c.now.Close()
			c.now = nil
			if errors.Is(err, io.EOF) {
				err = nil
			}
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}
