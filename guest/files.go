package guest

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// maxPseudoFile bounds what is read of a file whose size the kernel does not know (procfs, sysfs): it has to be held to be served.
const maxPseudoFile = 16 << 20

// fileError is an answer of the file endpoints.
type fileError struct {
	status  int
	message string
}

func (e *fileError) Error() string { return e.message }

func refuse(status int, format string, args ...any) error {
	return &fileError{status, fmt.Sprintf(format, args...)}
}

// diskError gives a failed write its meaning: no space is the caller's to know, most others are about the path.
func diskError(doing string, err error) error {
	var known *fileError
	switch {
	case errors.As(err, &known):
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return refuse(http.StatusInsufficientStorage, "not enough disk space available")
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.ELOOP),
		errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENXIO):
		return refuse(http.StatusBadRequest, "%s: %v", doing, err)
	case errors.Is(err, fs.ErrNotExist):
		return refuse(http.StatusNotFound, "%s: %v", doing, err)
	case errors.Is(err, fs.ErrPermission):
		return refuse(http.StatusForbidden, "%s: %v", doing, err)
	default:
		return refuse(http.StatusInternalServerError, "%s: %v", doing, err)
	}
}

func (a *agent) answerFileError(w http.ResponseWriter, err error) {
	known := &fileError{http.StatusInternalServerError, "internal error"}
	if !errors.As(err, &known) {
		a.log.Error("file request failed", "error", err)
	}
	writeError(w, known.status, known.message)
}

// fileActor checks a file request's right to operate and finds the user it acts as.
func (a *agent) fileActor(r *http.Request, operation string) (account, error) {
	query := r.URL.Query()
	if err := checkFileAccess(a.settings.get().token, r.Header.Get(tokenHeader), operation, query, time.Now()); err != nil {
		return account{}, refuse(http.StatusUnauthorized, "%s", err)
	}
	// Only the query names the user: a signature covers it, and a header beside a signed URL must not change who acts.
	return a.fileUser(query.Get("username"))
}

func (a *agent) fileUser(name string) (account, error) {
	u, err := a.actor(name)
	if err != nil {
		return account{}, refuse(http.StatusUnauthorized, "error looking up user '%s': %v", cmp.Or(name, a.settings.get().user), err)
	}
	return u, nil
}

func (a *agent) filePath(path string, u account) (string, error) {
	abs, err := a.resolve(path, u)
	if err != nil {
		return "", refuse(http.StatusBadRequest, "%s", err)
	}
	return abs, nil
}

// serveDownload is GET and HEAD /files.
func (a *agent) serveDownload(w http.ResponseWriter, r *http.Request) {
	if err := a.download(w, r); err != nil {
		a.answerFileError(w, err)
	}
}

// download serves one file. When it returns an error it has sent nothing yet.
func (a *agent) download(w http.ResponseWriter, r *http.Request) error {
	u, err := a.fileActor(r, signRead)
	if err != nil {
		return err
	}
	path, err := a.filePath(r.URL.Query().Get("path"), u)
	if err != nil {
		return err
	}
	f, info, err := openForRead(path)
	if err != nil {
		return err
	}
	defer f.Close()

	h := w.Header()
	h.Add("Vary", "Accept-Encoding")
	body, size, err := contents(f, info)
	if err != nil {
		return diskError("error reading file", err)
	}
	accept, present := r.Header["Accept-Encoding"]
	encoding := chooseCoding(strings.Join(accept, ","), present)
	// Ranges and validators are about the file's own bytes, and an empty body must keep its Content-Length of 0.
	if encoding == codingGzip && (size == 0 || isPartial(r.Header)) {
		encoding = codingIdentity
	}
	if encoding == codingNone {
		return refuse(http.StatusNotAcceptable, "no acceptable encoding: gzip and identity are available")
	}
	h.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}))
	if encoding == codingIdentity {
		http.ServeContent(w, r, filepath.Base(path), info.ModTime(), body)
		return nil
	}

	h.Set("Content-Encoding", "gzip")
	h.Set("Content-Type", cmp.Or(mime.TypeByExtension(filepath.Ext(path)), "application/octet-stream"))
	h.Set("Last-Modified", info.ModTime().UTC().Format(http.TimeFormat))
	if r.Method == http.MethodHead {
		return nil
	}
	// Speed over ratio: one sandbox's CPU feeds this.
	zip, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		panic("BUG: " + err.Error())
	}
	if _, err := io.Copy(zip, body); err != nil {
		// The answer has begun. Cut it, so that nobody takes the part for the whole.
		panic(http.ErrAbortHandler)
	}
	if err := zip.Close(); err != nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}

// openForRead opens a regular file and never waits, as opening a pipe without a writer would.
func openForRead(path string) (*os.File, fs.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return nil, nil, refuse(http.StatusNotFound, "path '%s' does not exist", path)
	case errors.Is(err, syscall.ENXIO):
		return nil, nil, refuse(http.StatusBadRequest, "path '%s' is not a regular file", path)
	case err != nil:
		return nil, nil, diskError("error opening file", err)
	}
	info, err := f.Stat()
	switch {
	case err != nil:
		err = diskError("error reading file", err)
	case info.IsDir():
		err = refuse(http.StatusBadRequest, "path '%s' is a directory", path)
	case !info.Mode().IsRegular():
		err = refuse(http.StatusBadRequest, "path '%s' is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// contents is what to serve of f. Files of procfs say that they are empty and are not: those are read first.
func contents(f *os.File, info fs.FileInfo) (io.ReadSeeker, int64, error) {
	if info.Size() > 0 {
		return f, info.Size(), nil
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxPseudoFile))
	if err != nil {
		return nil, 0, err
	}
	return bytes.NewReader(raw), int64(len(raw)), nil
}

func isPartial(h http.Header) bool {
	for _, name := range []string{"Range", "If-Range", "If-Modified-Since", "If-Unmodified-Since", "If-None-Match", "If-Match"} {
		if h.Get(name) != "" {
			return true
		}
	}
	return false
}
