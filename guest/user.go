package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// sandboxUser is who SDKs act as when they name nobody.
const (
	sandboxUser = "user"
	sandboxUID  = 1000
)

// ensureUser gives the file system at root the account that SDKs count on, unless its image has one, with the rights to become root
// where there is sudo.
func ensureUser(root string) error {
	at := func(elem ...string) string { return filepath.Join(append([]string{root}, elem...)...) }
	passwd, err := readOptional(at("etc", "passwd"))
	if err != nil {
		return err
	}
	group, err := readOptional(at("etc", "group"))
	if err != nil {
		return err
	}
	shell := "/bin/sh"
	if _, err := os.Stat(at("bin", "bash")); err == nil {
		shell = "/bin/bash"
	}
	newPasswd, newGroup, id := withUser(passwd, group, shell)
	if id == 0 {
		return nil
	}
	home := at("home", sandboxUser)
	if err := makeHome(home, at("etc", "skel"), int(id)); err != nil {
		return fmt.Errorf("make home: %w", err)
	}
	if shadow, err := readOptional(at("etc", "shadow")); err == nil && shadow != "" {
		// No password opens it.
		if err := replaceFile(at("etc", "shadow"), []byte(closeLine(shadow)+sandboxUser+":!*:19000:0:99999:7:::\n"), 0o640); err != nil {
			return err
		}
	}
	if info, err := os.Stat(at("etc", "sudoers.d")); err == nil && info.IsDir() {
		if err := replaceFile(at("etc", "sudoers.d", "sluice-user"), []byte(sandboxUser+" ALL=(ALL:ALL) NOPASSWD:ALL\n"), 0o440); err != nil {
			return err
		}
	}
	if err := replaceFile(at("etc", "group"), []byte(newGroup), 0o644); err != nil {
		return err
	}
	// The last step: with it the account is there, and whatever came before is not done again.
	return replaceFile(at("etc", "passwd"), []byte(newPasswd), 0o644)
}

// withUser adds the account to the files, with a group of its own and as a member of sudo. id is zero when there is nothing to add. An
// image without any account gets root too.
func withUser(passwd, group, shell string) (newPasswd, newGroup string, id uint32) {
	taken := map[uint32]bool{}
	for line := range strings.Lines(passwd) {
		u, ok := parseUser(strings.Split(strings.TrimSpace(line), ":"))
		if ok && u.Name == sandboxUser {
			return passwd, group, 0
		}
		taken[u.UID] = taken[u.UID] || ok
	}
	if strings.TrimSpace(passwd) == "" {
		passwd = "root:x:0:0:root:/root:" + shell + "\n"
	}
	if strings.TrimSpace(group) == "" {
		group = "root:x:0:\n"
	}
	var lines []string
	ownGroup := false
	for line := range strings.Lines(group) {
		line = strings.TrimRight(line, "\r\n")
		fields := strings.Split(line, ":")
		gid, ok := parseID(field(fields, 2))
		switch {
		case fields[0] == sandboxUser && ok:
			ownGroup, id = true, gid
		case ok && len(fields) == 4 && (fields[0] == "sudo" || fields[0] == "wheel"):
			if fields[3] != "" {
				line += ","
			}
			line += sandboxUser
		}
		if ok && fields[0] != sandboxUser {
			taken[gid] = true
		}
		lines = append(lines, line)
	}
	gid := id
	for id = sandboxUID; taken[id]; {
		id++
	}
	number := strconv.FormatUint(uint64(id), 10)
	groupNumber := number
	if ownGroup {
		groupNumber = strconv.FormatUint(uint64(gid), 10)
	} else {
		lines = append(lines, sandboxUser+":x:"+number+":")
	}
	newPasswd = closeLine(passwd) + sandboxUser + ":x:" + number + ":" + groupNumber + "::/home/" + sandboxUser + ":" + shell + "\n"
	return newPasswd, strings.Join(lines, "\n") + "\n", id
}

func field(fields []string, i int) string {
	if i < len(fields) {
		return fields[i]
	}
	return ""
}

// closeLine ends a file's last line, which a line can then follow.
func closeLine(text string) string {
	if text != "" && !strings.HasSuffix(text, "\n") {
		return text + "\n"
	}
	return text
}

// makeHome makes a home directory from the image's skeleton. One that is there is given to the user, with what is in it.
func makeHome(home, skel string, id int) error {
	if err := os.MkdirAll(home, 0o755); err != nil {
		return err
	}
	items, err := os.ReadDir(skel)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, item := range items {
		target := filepath.Join(home, item.Name())
		if _, err := os.Lstat(target); err == nil || !item.Type().IsRegular() {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(skel, item.Name()))
		if err != nil {
			return err
		}
		if err := os.WriteFile(target, raw, 0o644); err != nil {
			return err
		}
	}
	return filepath.WalkDir(home, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, id, id)
	})
}

func readOptional(path string) (string, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(raw), err
}

// replaceFile puts a file in place in one step, whatever was there: it is never to be seen half-written, and a link is replaced and not followed.
// On a disk that is full to the last block it writes into the file that is there.
func replaceFile(path string, content []byte, mode os.FileMode) error {
	temp := path + ".sluice-new"
	err := os.WriteFile(temp, content, mode)
	if err == nil {
		err = os.Chmod(temp, mode) // whatever the umask, and whatever was left there
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err == nil {
		return nil
	}
	_ = os.Remove(temp)
	if info, serr := os.Lstat(path); serr != nil || !info.Mode().IsRegular() || os.WriteFile(path, content, mode) != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
