package daemon

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReadClusterKeyRefusesAShortOne(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cluster.key")
	for content, want := range map[string]string{
		strings.Repeat("k", 31) + "\n\n":      "holds 31 bytes",
		"  " + strings.Repeat("k", 32) + "\n": "",
	} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		key, err := ReadClusterKey(file)
		if want == "" && (err != nil || len(key) != 32) {
			t.Errorf("ReadClusterKey() = %d bytes, %v, want 32", len(key), err)
		}
		if want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("ReadClusterKey() = %v, want %q in it", err, want)
		}
	}
}

func TestOpenRedisNeverShowsThePassword(t *testing.T) {
	for _, bad := range []string{"http://u:hunter2@h", "redis://u:hunter2@h:port", "redis://u:hunter2@h/\x7f", "redis://u:hunter2@h?addr=x&dial_timeout=z"} {
		_, err := OpenRedis(bad)
		if err == nil || strings.Contains(err.Error(), "hunter2") || !strings.Contains(err.Error(), "-redis") {
			t.Errorf("OpenRedis(%q) = %v, want an error with the flag and without the password", bad, err)
		}
	}
	for _, good := range []string{"redis://h:1", "rediss://u:p@h:1/2", "redis://s1:26379?master_name=m&addr=s2:26379", "redis://h1:1?addr=h2:2"} {
		client, err := OpenRedis(good)
		if err != nil {
			t.Errorf("OpenRedis(%q) = %v", good, err)
			continue
		}
		client.Close()
	}
}

func TestListenSaysThatAPortIsTaken(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, err = Listen("-http", ln.Addr().String())
	if err == nil || !strings.Contains(err.Error(), "-http "+ln.Addr().String()+" is taken") || strings.Contains(err.Error(), "\n") {
		t.Errorf("Listen() = %v, want one line with flag and address", err)
	}
}
