package guest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestAccounts(t *testing.T) {
	etc := t.TempDir()
	writeTest(t, filepath.Join(etc, "passwd"), strings.Join([]string{
		"# comment", "", "root:x:0:0:root:/root:/bin/bash", "short:x:1", "bad:x:y:1::/:", "+::::::", "minus:x:4294967295:1::/:",
		"ann:x:1000:1000:Ann,,,:/home/ann/:/bin/sh", "ann:x:7:7::/second:/bin/sh", "rel:x:1001:1001::home:", "twin:x:1000:5::/:",
	}, "\n"))
	writeTest(t, filepath.Join(etc, "group"), "root:x:0:\nann:x:1000:ann\nwheel:x:10:bob,ann\nbad:x:z:ann\nnone:x:11:annie\n")
	a := accounts{etc}
	check := func(name string, want account, wantErr bool) {
		t.Helper()
		got, err := a.lookup(name)
		if got != want || (err != nil) != wantErr {
			t.Errorf("lookup(%q) = %+v, %v, want %+v", name, got, err, want)
		}
	}
	check("root", account{"root", 0, 0, "/root"}, false)
	check("ann", account{"ann", 1000, 1000, "/home/ann"}, false)
	check("rel", account{"rel", 1001, 1001, "/"}, false)
	for _, name := range []string{"short", "bad", "minus", "", "+", "Ann", "ann:x"} {
		check(name, account{}, true)
	}
	find := func(name string, want account, wantErr bool) {
		t.Helper()
		got, err := a.find(name)
		if got != want || (err != nil) != wantErr {
			t.Errorf("find(%q) = %+v, %v, want %+v", name, got, err, want)
		}
	}
	find("ann", account{"ann", 1000, 1000, "/home/ann"}, false)
	find("1000", account{"ann", 1000, 1000, "/home/ann"}, false)
	find("1234", account{"1234", 1234, 0, "/"}, false)
	for _, name := range []string{"bob", "", "-1", "4294967295", "1000:1000"} {
		find(name, account{}, true)
	}
	groups, err := a.groupsOf(account{Name: "ann", GID: 1000})
	if err != nil || !slices.Equal(groups, []uint32{1000, 10}) {
		t.Errorf("groupsOf(ann) = %v, %v", groups, err)
	}
	users, groupNames := a.names()
	if users[1000] != "ann" || groupNames[10] != "wheel" {
		t.Errorf("names() = %v, %v", users, groupNames)
	}
}

func FuzzAccounts(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/bash\n", "root")
	f.Add("a:b:c\n::::::\n", "")
	f.Add("u:x:4294967295:0::/:\n", "u")
	f.Fuzz(func(t *testing.T, passwd, name string) {
		etc := t.TempDir()
		if err := os.WriteFile(filepath.Join(etc, "passwd"), []byte(passwd), 0o600); err != nil {
			t.Fatal(err)
		}
		u, err := accounts{etc}.lookup(name)
		if err != nil {
			return
		}
		if u.Name != name || name == "" || u.UID == ^uint32(0) || u.GID == ^uint32(0) || !filepath.IsAbs(u.Home) {
			t.Errorf("lookup(%q) = %+v", name, u)
		}
	})
}
