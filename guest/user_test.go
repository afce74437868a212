package guest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWithUser(t *testing.T) {
	check := func(name, passwd, group, wantPasswd, wantGroup string, wantID uint32) {
		t.Helper()
		p, g, id := withUser(passwd, group, "/bin/sh")
		if p != wantPasswd || g != wantGroup || id != wantID {
			t.Errorf("%s: withUser = %q, %q, %d\nwant %q, %q, %d", name, p, g, id, wantPasswd, wantGroup, wantID)
		}
	}
	const root = "root:x:0:0:root:/root:/bin/bash\n"
	check("plain", root, "root:x:0:\nsudo:x:27:\n",
		root+"user:x:1000:1000::/home/user:/bin/sh\n", "root:x:0:\nsudo:x:27:user\nuser:x:1000:\n", 1000)
	check("has one", root+"user:x:1001:1001::/home/user:/bin/zsh\n", "sudo:x:27:\n", root+"user:x:1001:1001::/home/user:/bin/zsh\n", "sudo:x:27:\n", 0)
	check("nothing at all", "", "",
		"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n", "root:x:0:\nuser:x:1000:\n", 1000)
	check("the id is taken", root+"node:x:1000:1000::/home/node:/bin/bash\n", "node:x:1000:\nother:x:1001:\nwheel:x:10:node\n",
		root+"node:x:1000:1000::/home/node:/bin/bash\nuser:x:1002:1002::/home/user:/bin/sh\n",
		"node:x:1000:\nother:x:1001:\nwheel:x:10:node,user\nuser:x:1002:\n", 1002)
	check("a group of that name", root, "user:x:100:\n", root+"user:x:1000:100::/home/user:/bin/sh\n", "user:x:100:\n", 1000)
	check("no line end", strings.TrimSpace(root), "sudo:x:27:ann",
		root+"user:x:1000:1000::/home/user:/bin/sh\n", "sudo:x:27:ann,user\nuser:x:1000:\n", 1000)
}

// Whatever an image has in its files, the account is found afterwards, has an id of its own, and everybody else is who they were.
func FuzzWithUser(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/bash\n", "root:x:0:\nsudo:x:27:\n")
	f.Add("a:x:1000:1000::/:\nuser:x\n", "user:x:z:\nwheel:x:10")
	f.Add("user:x:4294967295:0::/:\r\n", ":::\n\n")
	f.Fuzz(func(t *testing.T, passwd, group string) {
		if len(passwd)+len(group) > 1<<16 {
			t.Skip("longer than any list of accounts that is read")
		}
		etc := t.TempDir()
		newPasswd, newGroup, id := withUser(passwd, group, "/bin/sh")
		if id == 0 && (newPasswd != passwd || newGroup != group) {
			t.Errorf("nothing to add, and yet it changes %q to %q, %q to %q", passwd, newPasswd, group, newGroup)
		}
		if err := errors.Join(os.WriteFile(filepath.Join(etc, "passwd"), []byte(newPasswd), 0o600),
			os.WriteFile(filepath.Join(etc, "group"), []byte(newGroup), 0o600)); err != nil {
			t.Fatal(err)
		}
		u, err := accounts{etc}.lookup(sandboxUser)
		if err != nil {
			t.Fatalf("after withUser(%q, %q): %v in %q", passwd, group, err, newPasswd)
		}
		if id != 0 && (u.UID != id || u.UID < sandboxUID) {
			t.Errorf("withUser(%q, %q) makes %+v, says %d", passwd, group, u, id)
		}
		if id != 0 && !strings.HasPrefix(newPasswd, strings.TrimSpace(passwd)) && strings.TrimSpace(passwd) == passwd {
			t.Errorf("withUser(%q) = %q: others are gone", passwd, newPasswd)
		}
		if _, _, again := withUser(newPasswd, newGroup, "/bin/sh"); again != 0 {
			t.Errorf("withUser(%q, %q) adds it twice", passwd, group)
		}
	})
}

func TestEnsureUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give files away: run the tests as root")
	}
	root := t.TempDir()
	put := func(name, content string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	put("etc/passwd", "root:x:0:0::/root:/bin/sh\n")
	put("etc/group", "sudo:x:27:\n")
	put("etc/shadow", "root:*:1:::::")
	put("etc/skel/.bashrc", "skeleton")
	put("etc/skel/.profile", "skeleton")
	put("etc/sudoers.d/README", "")
	put("home/user/.profile", "own")
	put("bin/bash", "")
	for range 2 {
		if err := ensureUser(root); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/bash\n", "etc/group": "sudo:x:27:user\nuser:x:1000:\n",
		"etc/shadow": "root:*:1:::::\nuser:!*:19000:0:99999:7:::\n", "etc/sudoers.d/sluice-user": "user ALL=(ALL:ALL) NOPASSWD:ALL\n",
		"home/user/.bashrc": "skeleton", "home/user/.profile": "own",
	} {
		if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(got) != want {
			t.Errorf("%s = %q, %v, want %q", name, got, err, want)
		}
	}
	if info, err := os.Stat(filepath.Join(root, "etc/sudoers.d/sluice-user")); err != nil || info.Mode() != 0o440 {
		t.Errorf("the mode of the rules is %v, %v: sudo would refuse them", info.Mode(), err)
	}
}

func TestReplaceFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "resolv.conf")
	if err := os.Symlink("/nowhere/stub", path); err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"first", "second"} {
		if err := replaceFile(path, []byte(content), 0o444); err != nil {
			t.Fatal(err)
		}
		info, err := os.Lstat(path)
		if err != nil || info.Mode() != 0o444 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != content {
			t.Errorf("%q, %v, want %q", got, err, content)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left are %v, %v", left, err)
	}
	if err := replaceFile(filepath.Join(dir, "no", "where"), nil, 0o644); err == nil {
		t.Error("a file in no directory is written")
	}
}
