package netfilter

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// enterScratch moves the test's thread, for good, into a network namespace of its own.
func enterScratch(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root: run the tests with sudo")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("no network namespace can be made here: %v", err)
	}
}

// TestLargeTransaction: a transaction of many messages, more than default buffers hold, arrives whole, and so does the dump of
// what it made.
func TestLargeTransaction(t *testing.T) {
	enterScratch(t)
	conn, err := NewConn()
	if err != nil {
		t.Fatal(err)
	}
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "large"})
	set := &nftables.Set{Table: table, Name: "numbers", KeyType: nftables.TypeIPAddr}
	const elements, chains = 20000, 3000
	var keys []nftables.SetElement
	for i := range elements {
		keys = append(keys, nftables.SetElement{Key: binary.BigEndian.AppendUint32(nil, uint32(i))})
	}
	if err := conn.AddSet(set, nil); err != nil {
		t.Fatal(err)
	}
	for ; len(keys) > 0; keys = keys[1000:] {
		if err := conn.SetAddElements(set, keys[:1000]); err != nil {
			t.Fatal(err)
		}
	}
	for range chains {
		conn.AddChain(&nftables.Chain{Table: table, Name: "again"})
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	if got, err := conn.GetSetElements(set); err != nil || len(got) != elements {
		t.Errorf("the set holds %d elements, %v, want %d", len(got), err, elements)
	}
}

// TestRefusalIsAnError: what the kernel says no to comes back as its error, nothing of the transaction is done, and the connection
// works afterwards.
func TestRefusalIsAnError(t *testing.T) {
	enterScratch(t)
	conn, err := NewConn()
	if err != nil {
		t.Fatal(err)
	}
	made := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "made"})
	absent := &nftables.Table{Family: nftables.TableFamilyINet, Name: "absent"}
	for range 500 {
		conn.AddChain(&nftables.Chain{Table: absent, Name: "nowhere"})
	}
	if err := conn.Flush(); !errors.Is(err, unix.ENOENT) {
		t.Errorf("Flush of chains without their table = %v, want ENOENT", err)
	}
	if tables, err := conn.ListTables(); err != nil || len(tables) != 0 {
		t.Errorf("after a refused transaction there are %d tables, %v, want none", len(tables), err)
	}
	if _, err := conn.GetNamedObjects(absent); err != nil && !errors.Is(err, unix.ENOENT) {
		t.Errorf("objects of no table: %v", err)
	}
	conn.AddTable(made)
	if err := conn.Flush(); err != nil {
		t.Error(err)
	}
	if tables, err := conn.ListTables(); err != nil || len(tables) != 1 {
		t.Errorf("there are %d tables, %v, want one", len(tables), err)
	}
}

// TestCannotAsk: when there is no socket to be had the library gets that error, instead of asking for ever.
func TestCannotAsk(t *testing.T) {
	enterScratch(t)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	conn, err := NewConn()
	if err != nil {
		t.Fatal(err)
	}
	conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "never"})
	none := limit
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	flushed := conn.Flush()
	_, listed := conn.ListTables()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(flushed, unix.EMFILE) || !errors.Is(listed, unix.EMFILE) {
		t.Errorf("without descriptors Flush = %v and ListTables = %v, want EMFILE", flushed, listed)
	}
}
