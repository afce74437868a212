package guest

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestHostsWith(t *testing.T) {
	check := func(hosts, want string) {
		t.Helper()
		if got := hostsWith(hosts, "vm"); got != want {
			t.Errorf("hostsWith(%q) = %q, want %q", hosts, got, want)
		}
	}
	check("", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tvm\n")
	check("127.0.0.1 localhost\n127.0.1.1 old older\n10.0.0.1 db", "127.0.0.1 localhost\n10.0.0.1 db\n127.0.1.1\tvm\n")
	check("# 127.0.1.1 kept\n127.0.0.1\tlocalhost\n", "# 127.0.1.1 kept\n127.0.0.1\tlocalhost\n127.0.1.1\tvm\n")
}

// Every line of others stays, and doing it twice is doing it once.
func FuzzHostsWith(f *testing.F) {
	f.Add("127.0.0.1 localhost\n127.0.1.1 old\n", "vm")
	f.Add("\x00\r\n::1", "a")
	f.Fuzz(func(t *testing.T, hosts, name string) {
		if name == "" || strings.ContainsAny(name, "\n \t\x00") || strings.Join(strings.Fields(name), "") != name {
			t.Skip("refused before")
		}
		once := hostsWith(hosts, name)
		if again := hostsWith(once, name); again != once {
			t.Errorf("hostsWith twice: %q, then %q", once, again)
		}
		for line := range strings.Lines(hosts) {
			if fields := strings.Fields(line); len(fields) > 0 && fields[0] != nameAddress && !strings.Contains(once, strings.TrimRight(line, "\n")) {
				t.Errorf("hostsWith(%q) = %q: %q is lost", hosts, once, line)
			}
		}
		if !strings.HasSuffix(once, nameAddress+"\t"+name+"\n") {
			t.Errorf("hostsWith(%q, %q) = %q", hosts, name, once)
		}
	})
}

// Ids are random UUIDs by their marks, differ by purpose and by seed, and do not show the seed.
func TestIDOf(t *testing.T) {
	seed := bytes.Repeat([]byte{7}, 64)
	a, b, c := idOf(seed, "machine-id"), idOf(seed, "boot_id"), idOf(bytes.Repeat([]byte{8}, 64), "machine-id")
	if a == b || a == c || a != idOf(seed, "machine-id") {
		t.Errorf("ids are %x, %x, %x", a, b, c)
	}
	for _, id := range [][16]byte{a, b, c} {
		if id[6]>>4 != 4 || id[8]>>6 != 2 {
			t.Errorf("%x is no random UUID", id)
		}
	}
	etc := t.TempDir()
	if err := writeMachineID(etc, a); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(etc, "machine-id")); err != nil || string(got) != hex.EncodeToString(a[:])+"\n" {
		t.Errorf("machine-id = %q, %v", got, err)
	}
}

func TestCheckMachine(t *testing.T) {
	check := func(req initRequest, want string) {
		t.Helper()
		if err := req.checkMachine(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("checkMachine(%+v) = %v, want %q", req, err, want)
		}
	}
	check(initRequest{}, "")
	check(initRequest{MAC: "02:53:4c:00:00:02", Resolvers: []string{"10.0.0.1", "::1"}, Hostname: "a.b"}, "")
	check(initRequest{MAC: "03:53:4c:00:00:02"}, "one Ethernet card")
	check(initRequest{MAC: "02:53:4c:00:00:02:03:04"}, "one Ethernet card")
	check(initRequest{Resolvers: []string{"10.0.0.1\nsearch evil"}}, "not an address")
	check(initRequest{Hostname: "a\nb"}, "hostname")
	check(initRequest{Hostname: strings.Repeat("a", 65)}, "hostname")
}
