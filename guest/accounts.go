package guest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// maxAccountBytes bounds what is read of passwd and group: whoever is root in the sandbox writes them.
const maxAccountBytes = 4 << 20

var errNoUser = errors.New("no such user")

// account is one line of passwd.
type account struct {
	Name     string
	UID, GID uint32
	Home     string
}

// accounts reads users and groups from the files themselves, on every call: a sandbox adds users while it runs. os/user would answer the process's
// own user from a cache and from $HOME.
type accounts struct {
	etc string
}

func (a accounts) lookup(name string) (account, error) {
	all, err := a.users()
	if err != nil {
		return account{}, err
	}
	for _, u := range all {
		if u.Name == name {
			return u, nil
		}
	}
	return account{}, errNoUser
}

// find is lookup for names that an image may have written: a number is the account that has it, or one that nobody has described, as
// container runtimes read it. Clients name people.
func (a accounts) find(name string) (account, error) {
	u, err := a.lookup(name)
	uid, numeric := parseID(name)
	if !errors.Is(err, errNoUser) || !numeric {
		return u, err
	}
	all, err := a.users()
	if err != nil {
		return account{}, err
	}
	for _, u := range all {
		if u.UID == uid {
			return u, nil
		}
	}
	return account{Name: name, UID: uid, Home: "/"}, nil
}

func (a accounts) users() ([]account, error) {
	var all []account
	err := a.lines("passwd", func(fields []string) {
		if u, ok := parseUser(fields); ok {
			all = append(all, u)
		}
	})
	return all, err
}

// groupsOf are the groups of a process of u: its own first, then those that list it as a member.
func (a accounts) groupsOf(u account) ([]uint32, error) {
	groups := []uint32{u.GID}
	err := a.lines("group", func(fields []string) {
		if len(fields) < 4 || !slices.Contains(strings.Split(fields[3], ","), u.Name) {
			return
		}
		if gid, ok := parseID(fields[2]); ok && !slices.Contains(groups, gid) {
			groups = append(groups, gid)
		}
	})
	return groups, err
}

// names maps ids to names, for listings; the first line with an id wins, as in libc.
func (a accounts) names() (users, groups map[uint32]string) {
	users, groups = map[uint32]string{}, map[uint32]string{}
	put := func(m map[uint32]string, fields []string) {
		if len(fields) < 3 {
			return
		}
		id, ok := parseID(fields[2])
		if _, taken := m[id]; ok && !taken {
			m[id] = fields[0]
		}
	}
	// A missing file only means that ids are shown as numbers.
	_ = a.lines("passwd", func(fields []string) { put(users, fields) })
	_ = a.lines("group", func(fields []string) { put(groups, fields) })
	return users, groups
}

func (a accounts) lines(file string, each func(fields []string)) error {
	path := filepath.Join(a.etc, file)
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read accounts: %w", err)
	}
	defer f.Close()
	scan := bufio.NewScanner(io.LimitReader(f, maxAccountBytes))
	scan.Buffer(nil, maxAccountBytes)
	for scan.Scan() {
		line := strings.TrimSpace(scan.Text())
		if line == "" || line[0] == '#' || line[0] == '+' || line[0] == '-' {
			continue
		}
		each(strings.Split(line, ":"))
	}
	if err := scan.Err(); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

func parseUser(fields []string) (account, bool) {
	if len(fields) < 6 || fields[0] == "" {
		return account{}, false
	}
	uid, okU := parseID(fields[2])
	gid, okG := parseID(fields[3])
	if !okU || !okG {
		return account{}, false
	}
	home := fields[5]
	if !filepath.IsAbs(home) {
		home = "/"
	}
	return account{Name: fields[0], UID: uid, GID: gid, Home: filepath.Clean(home)}, true
}

// parseID refuses the id that chown and setuid read as "leave alone".
func parseID(s string) (uint32, bool) {
	id, err := strconv.ParseUint(s, 10, 32)
	return uint32(id), err == nil && uint32(id) != ^uint32(0)
}
