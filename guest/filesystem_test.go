package guest

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	"github.com/sluice-edge/sluice/guest/gen/filesystem"
)

func TestStat(t *testing.T) {
	s := startAgent(t)
	writeTest(t, filepath.Join(s.home, "f"), "12345")
	if err := os.Symlink("f", filepath.Join(s.home, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(s.home, "broken")); err != nil {
		t.Fatal(err)
	}
	stat := func(path string) (*filesystem.EntryInfo, error) {
		res, err := s.files.Stat(t.Context(), connect.NewRequest(&filesystem.StatRequest{Path: path}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetEntry(), nil
	}
	e, err := stat("f")
	if err != nil {
		t.Fatal(err)
	}
	if e.GetName() != "f" || e.GetPath() != s.home+"/f" || e.GetSize() != 5 || e.GetMode() != 0o644 || e.GetPermissions() != "-rw-r--r--" ||
		e.GetType() != filesystem.FileType_FILE_TYPE_FILE || e.SymlinkTarget != nil || e.GetModifiedTime() == nil || e.GetOwner() != "root" {
		t.Errorf("Stat(f) = %v", e)
	}
	if e, err = stat("~/link"); err != nil || e.GetType() != filesystem.FileType_FILE_TYPE_FILE || filepath.Base(e.GetSymlinkTarget()) != "f" {
		t.Errorf("Stat(link) = %v, %v", e, err)
	}
	if e, err = stat("broken"); err != nil || e.GetType() != filesystem.FileType_FILE_TYPE_UNSPECIFIED || e.GetSymlinkTarget() == "" {
		t.Errorf("Stat(broken) = %v, %v", e, err)
	}
	if e, err = stat(""); err != nil || e.GetPath() != s.home || e.GetType() != filesystem.FileType_FILE_TYPE_DIRECTORY {
		t.Errorf("Stat of nothing = %v, %v", e, err)
	}
	_, err = stat("nope")
	wantCode(t, err, connect.CodeNotFound)
	_, err = stat("a\x00b")
	wantCode(t, err, connect.CodeInvalidArgument)
	_, err = stat(strings.Repeat("x", 300))
	wantCode(t, err, connect.CodeInvalidArgument)
	req := connect.NewRequest(&filesystem.StatRequest{Path: "f"})
	req.Header().Set("Authorization", "Basic "+"Z2hvc3Q6") // ghost:
	_, err = s.files.Stat(t.Context(), req)
	wantCode(t, err, connect.CodeUnauthenticated)
	if err == nil || !strings.Contains(err.Error(), "invalid username: 'ghost'") {
		t.Errorf("error = %v", err)
	}
	req.Header().Set("Authorization", "Basic !!!")
	_, err = s.files.Stat(t.Context(), req)
	wantCode(t, err, connect.CodeUnauthenticated)
}

func TestNamesThatAreNotUTF8DoNotBreakListings(t *testing.T) {
	s := startAgent(t)
	writeTest(t, filepath.Join(s.home, "a\xffb"), "")
	res, err := s.files.ListDir(t.Context(), connect.NewRequest(&filesystem.ListDirRequest{Path: "~"}))
	if err != nil || len(res.Msg.GetEntries()) != 1 || res.Msg.GetEntries()[0].GetName() != "a\uFFFDb" {
		t.Errorf("ListDir = %v, %v", res, err)
	}
}

func TestListMakeMoveRemove(t *testing.T) {
	s := startAgent(t)
	list := func(path string, depth uint32) ([]string, error) {
		res, err := s.files.ListDir(t.Context(), connect.NewRequest(&filesystem.ListDirRequest{Path: path, Depth: depth}))
		if err != nil {
			return nil, err
		}
		paths := []string{}
		for _, e := range res.Msg.GetEntries() {
			paths = append(paths, strings.TrimPrefix(e.GetPath(), s.home+"/"))
		}
		return paths, nil
	}
	wantList := func(path string, depth uint32, want ...string) {
		t.Helper()
		if got, err := list(path, depth); err != nil || !slices.Equal(got, want) {
			t.Errorf("ListDir(%q, %d) = %q, %v, want %q", path, depth, got, err, want)
		}
	}
	mkdir := func(path string) error {
		_, err := s.files.MakeDir(t.Context(), connect.NewRequest(&filesystem.MakeDirRequest{Path: path}))
		return err
	}
	move := func(from, to string) error {
		_, err := s.files.Move(t.Context(), connect.NewRequest(&filesystem.MoveRequest{Source: from, Destination: to}))
		return err
	}
	remove := func(path string) error {
		_, err := s.files.Remove(t.Context(), connect.NewRequest(&filesystem.RemoveRequest{Path: path}))
		return err
	}
	wantList("~", 0)
	if err := mkdir("d/e/f"); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(s.home, "d/e"))
	if err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("parent: %v, %v", info, err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; os.Getuid() == 0 && uid != testUID {
		t.Errorf("parent belongs to %d", uid)
	}
	err = mkdir("d/e")
	wantCode(t, err, connect.CodeAlreadyExists)
	if err == nil || !strings.Contains(err.Error(), "directory already exists: "+s.home+"/d/e") {
		t.Errorf("error = %v", err)
	}
	writeTest(t, filepath.Join(s.home, "d/file"), "x")
	wantCode(t, mkdir("d/file"), connect.CodeInvalidArgument)
	wantCode(t, mkdir("d/file/x"), connect.CodeInvalidArgument)
	wantList("~", 0, "d")
	wantList("d", 1, "d/e", "d/file")
	wantList("~", 3, "d", "d/e", "d/e/f", "d/file")
	if err := os.Symlink("d", filepath.Join(s.home, "link")); err != nil {
		t.Fatal(err)
	}
	wantList("link", 5, "link/e", "link/e/f", "link/file")
	wantList("~", 2, "d", "d/e", "d/file", "link")
	_, err = list("d/file", 1)
	wantCode(t, err, connect.CodeInvalidArgument)
	_, err = list("nope", 1)
	wantCode(t, err, connect.CodeNotFound)

	if err := move("d/file", "new/place"); err != nil {
		t.Errorf("Move = %v", err)
	}
	wantList("new", 1, "new/place")
	wantCode(t, move("nope", "x"), connect.CodeNotFound)
	wantCode(t, move("d", "d/e/inside"), connect.CodeInvalidArgument)

	for _, path := range []string{"d", "d", "nope/nope"} {
		if err := remove(path); err != nil {
			t.Errorf("Remove(%q) = %v", path, err)
		}
	}
	wantCode(t, remove("/"), connect.CodeInvalidArgument)
	wantCode(t, remove("/.."), connect.CodeInvalidArgument)
	wantList("~", 1, "link", "new")
}

func TestCopyTree(t *testing.T) {
	dir := t.TempDir()
	from := filepath.Join(dir, "from")
	if err := os.MkdirAll(filepath.Join(from, "sub"), 0o750); err != nil {
		t.Fatal(err)
	}
	writeTest(t, filepath.Join(from, "sub/f"), "content")
	if err := os.Chmod(filepath.Join(from, "sub/f"), 0o4751); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("sub/f", filepath.Join(from, "link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(from, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(dir, "to")
	if err := copyTree(from, to); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "sub", "sub/f", "link", "pipe"} {
		a, _ := os.Lstat(filepath.Join(from, name))
		b, err := os.Lstat(filepath.Join(to, name))
		if err != nil || a.Mode() != b.Mode() || a.Mode()&os.ModeSymlink == 0 && !a.ModTime().Equal(b.ModTime()) {
			t.Errorf("%q: %v, %v, want %v", name, b, err, a)
		}
	}
	if items, _ := os.ReadDir(dir); len(items) != 2 {
		t.Errorf("left behind: %v", items)
	}
	if err := copyTree(from, filepath.Join(from, "sub/inside")); err == nil {
		t.Error("copied into itself")
	}
}

func TestWatchDir(t *testing.T) {
	s := startAgent(t)
	if err := os.Mkdir(filepath.Join(s.home, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := s.files.WatchDir(ctx, connect.NewRequest(&filesystem.WatchDirRequest{Path: "~", Recursive: true, IncludeEntry: true}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if !stream.Receive() || stream.Msg().GetStart() == nil {
		t.Fatalf("first event = %v, %v", stream.Msg(), stream.Err())
	}
	// next skips to the event, so that a kernel's extra ones do not matter.
	next := func(kind filesystem.EventType, name string) *filesystem.FilesystemEvent {
		t.Helper()
		for stream.Receive() {
			if e := stream.Msg().GetFilesystem(); e.GetType() == kind && e.GetName() == name {
				return e
			}
		}
		t.Fatalf("no %v of %q: %v", kind, name, stream.Err())
		return nil
	}
	writeTest(t, filepath.Join(s.home, "d/f"), "x")
	if e := next(filesystem.EventType_EVENT_TYPE_CREATE, "d/f"); e.GetEntry().GetPath() != s.home+"/d/f" {
		t.Errorf("entry = %v", e)
	}
	next(filesystem.EventType_EVENT_TYPE_WRITE, "d/f")
	if err := os.Rename(filepath.Join(s.home, "d/f"), filepath.Join(s.home, "d/g")); err != nil {
		t.Fatal(err)
	}
	next(filesystem.EventType_EVENT_TYPE_RENAME, "d/f")
	next(filesystem.EventType_EVENT_TYPE_CREATE, "d/g")
	// However fast a tree appears, everything in it is reported, and later changes there too.
	if err := os.MkdirAll(filepath.Join(s.home, "n/e/w"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeTest(t, filepath.Join(s.home, "n/e/w/f"), "x")
	next(filesystem.EventType_EVENT_TYPE_CREATE, "n/e/w/f")
	next(filesystem.EventType_EVENT_TYPE_WRITE, "n/e/w/f")
	if err := os.Remove(filepath.Join(s.home, "n/e/w/f")); err != nil {
		t.Fatal(err)
	}
	next(filesystem.EventType_EVENT_TYPE_REMOVE, "n/e/w/f")
	cancel()
	for stream.Receive() {
	}
	wantCode(t, stream.Err(), connect.CodeCanceled)
}

func TestWatchRefusals(t *testing.T) {
	s := startAgent(t)
	writeTest(t, filepath.Join(s.home, "f"), "x")
	watch := func(path string) error {
		_, err := s.files.CreateWatcher(t.Context(), connect.NewRequest(&filesystem.CreateWatcherRequest{Path: path}))
		return err
	}
	wantCode(t, watch("nope"), connect.CodeNotFound)
	wantCode(t, watch("f"), connect.CodeInvalidArgument)
	_, err := s.files.GetWatcherEvents(t.Context(), connect.NewRequest(&filesystem.GetWatcherEventsRequest{WatcherId: "x"}))
	wantCode(t, err, connect.CodeNotFound)
	_, err = s.files.RemoveWatcher(t.Context(), connect.NewRequest(&filesystem.RemoveWatcherRequest{WatcherId: "x"}))
	wantCode(t, err, connect.CodeNotFound)
}

func TestPollingWatcher(t *testing.T) {
	s := startAgent(t)
	res, err := s.files.CreateWatcher(t.Context(), connect.NewRequest(&filesystem.CreateWatcherRequest{Path: "~"}))
	if err != nil {
		t.Fatal(err)
	}
	id := res.Msg.GetWatcherId()
	var got []string
	poll := func() error {
		res, err := s.files.GetWatcherEvents(t.Context(), connect.NewRequest(&filesystem.GetWatcherEventsRequest{WatcherId: id}))
		if err != nil {
			return err
		}
		for _, e := range res.Msg.GetEvents() {
			got = append(got, e.GetType().String()+" "+e.GetName())
		}
		return nil
	}
	if err := poll(); err != nil || len(got) != 0 {
		t.Errorf("before anything: %v, %v", got, err)
	}
	writeTest(t, filepath.Join(s.home, "f"), "x")
	eventually(t, "the write is seen", func() bool {
		return poll() == nil && slices.Contains(got, "EVENT_TYPE_CREATE f") && slices.Contains(got, "EVENT_TYPE_WRITE f")
	})
	if _, err := s.files.RemoveWatcher(t.Context(), connect.NewRequest(&filesystem.RemoveWatcherRequest{WatcherId: id})); err != nil {
		t.Fatal(err)
	}
	wantCode(t, poll(), connect.CodeNotFound)
}

func TestPollingWatcherIsBounded(t *testing.T) {
	w := &watcher{}
	for range maxQueued {
		w.events = append(w.events, &filesystem.FilesystemEvent{})
	}
	w.err = connect.NewError(connect.CodeDataLoss, errOverflow)
	if events, err := w.poll(); len(events) != maxQueued || err != nil {
		t.Errorf("first poll = %d events, %v", len(events), err)
	}
	_, err := w.poll()
	wantCode(t, err, connect.CodeDataLoss)
	if _, err := w.poll(); err != nil {
		t.Errorf("third poll = %v", err)
	}
}
