package sandboxd

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/internal/tree"
)

const (
	recordVersion = 2 // 2 knows paused sandboxes, which an older node would remove
	recordFile    = "record.json"
	recordTemp    = "record.json.new"
)

// record is what the node must remember of a sandbox to take it up or to remove it after a crash.
type record struct {
	Version int             `json:"version"`
	Machine string          `json:"machine,omitempty"` // its name; absent in records of version 1
	Sandbox Sandbox         `json:"sandbox"`
	Slot    int             `json:"slot"` // NoSlot when it is paused
	Root    string          `json:"root,omitempty"`
	User    string          `json:"user,omitempty"` // whom its agent runs commands as
	Workdir string          `json:"workdir,omitempty"`
	Handle  json.RawMessage `json:"handle,omitempty"` // the machine's; absent until the guest has answered
	// Standing says that the guest may stand still, for a snapshot: whoever takes it up lets it go on.
	Standing bool `json:"standing,omitempty"`
}

// journal keeps one directory per sandbox with its record in it. The directory is made before anything else of the sandbox and
// removed after everything else, so whatever exists on the node is named by one.
type journal struct {
	dir     string
	reserve *reserve
}

func (j journal) path(id string) string { return filepath.Join(j.dir, id) }

// create makes the directory of a new sandbox with its first record. On an error nothing is left.
func (j journal) create(r record) error {
	dir := j.path(r.Sandbox.ID)
	if err := os.Mkdir(dir, 0o711); err != nil {
		return diskError(fmt.Errorf("make directory of sandbox: %w", err))
	}
	if err := j.note(r); err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	return nil
}

// note replaces the record in one step that outlives this process, and not the host. That is enough for a sandbox that was never saved: it
// does not outlive the host either. It leaves the reserve alone: a sandbox that is being created has no claim on it.
func (j journal) note(r record) error {
	return j.replace(r, func(path string, text []byte) error { return os.WriteFile(path, text, 0o600) })
}

// write replaces the record in one step: a crash of the host too leaves the old one or the new one, on disk and whole.
func (j journal) write(r record) error {
	if err := j.replace(r, writeSynced); err != nil {
		return err
	}
	return diskError(errors.Join(syncDir(j.path(r.Sandbox.ID)), syncDir(j.dir)))
}

func (j journal) replace(r record, write func(path string, text []byte) error) error {
	r.Version = recordVersion
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	dir := j.path(r.Sandbox.ID)
	temp := filepath.Join(dir, recordTemp)
	if err := write(temp, text); err != nil {
		return diskError(errors.Join(fmt.Errorf("write record: %w", err), ignoreAbsent(os.Remove(temp))))
	}
	if err := os.Rename(temp, filepath.Join(dir, recordFile)); err != nil {
		return diskError(fmt.Errorf("replace record: %w", err))
	}
	return nil
}

// remove deletes the directory, the record last: a crash in between leaves something that names the sandbox. It refuses while
// a file system is mounted below, because deleting would reach through it into what is not ours.
func (j journal) remove(id string) error {
	dir := j.path(id)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list directory of sandbox: %w", err)
	}
	if err := refuseMounted(dir); err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == recordFile {
			continue
		}
		if err := tree.Remove(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("remove directory of sandbox: %w", err)
		}
	}
	if err := tree.Remove(dir); err != nil {
		return fmt.Errorf("remove directory of sandbox: %w", err)
	}
	return nil
}

// load reads all records. Strangers are the directories without a record that can be read: the crash came before the first one
// was whole, or something else damaged it.
func (j journal) load() (records []record, strangers []string, err error) {
	entries, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("list records: %w", err)
	}
	for _, e := range entries {
		r, err := j.read(e.Name())
		switch {
		case err == nil:
			records = append(records, r)
		case errors.Is(err, errNewerRecord):
			return nil, nil, err
		default:
			strangers = append(strangers, e.Name())
		}
	}
	return records, strangers, nil
}

// errNewerRecord stops the start: removing what a newer version made, because we cannot read it, is not ours to decide.
var errNewerRecord = errors.New("record was written by a newer version of sluice")

func (j journal) read(id string) (record, error) {
	text, err := os.ReadFile(filepath.Join(j.path(id), recordFile))
	if err != nil {
		return record{}, fmt.Errorf("read record: %w", err)
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return record{}, fmt.Errorf("decode record of %q: %w", id, err)
	}
	if r.Version > recordVersion {
		return record{}, fmt.Errorf("%w: %q has version %d, known is %d", errNewerRecord, id, r.Version, recordVersion)
	}
	if r.Version < 1 || r.Sandbox.ID != id {
		return record{}, fmt.Errorf("record of %q is not one of ours", id)
	}
	return r, nil
}

// diskError gives a full disk its meaning; other errors pass.
func diskError(err error) error {
	if isFull(err) {
		return &errs.Error{Code: errs.Unavailable, Msg: "the disk of this node is full: the sandbox cannot be recorded", Err: err}
	}
	return err
}

func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Sync(); err != nil {
		return errors.Join(err, f.Close())
	}
	return f.Close()
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	if err := d.Sync(); err != nil {
		return errors.Join(fmt.Errorf("sync directory: %w", err), d.Close())
	}
	return d.Close()
}

// refuseMounted fails when a mount point lies in dir. Where there is no mountinfo there are no mounts of ours either.
func refuseMounted(dir string) error {
	f, err := os.Open("/proc/self/mountinfo")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	below := strings.TrimSuffix(dir, "/") + "/"
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(unescapeMount(fields[4])+"/", below) {
			return fmt.Errorf("remove directory of sandbox: %q is still mounted", fields[4])
		}
	}
	return lines.Err()
}

// unescapeMount undoes the octal escapes of mountinfo.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace

// lockDir takes the lock that keeps a second orchestrator out of dir, until the file is closed or the process dies.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock of state directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("another orchestrator uses the state directory %q: stop it, or give this one its own", dir)
		}
		return nil, fmt.Errorf("lock state directory %q: %w", dir, err)
	}
	return f, nil
}
