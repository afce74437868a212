package link

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Out of descriptors for pipes, bytes still move.
func TestRelayWithoutPipes(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	c := f.dial(t)
	mustEcho(t, c, "before")

	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	for len(idlePipes) > 0 {
		(<-idlePipes).close()
	}
	none := unix.Rlimit{Cur: 3, Max: limit.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	}()
	if _, err := acquirePipe(); err == nil {
		t.Fatal("there are descriptors left: the test tests nothing")
	}
	done := make(chan error, 1)
	text := strings.Repeat("long ", 1<<19)
	go func() { _, err := c.Write([]byte(text)); done <- err }()
	got := make([]byte, len(text))
	for n := 0; n < len(got); {
		m, err := c.Read(got[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += m
	}
	if err := <-done; err != nil || string(got) != text {
		t.Errorf("the echo differs, or %v", err)
	}
}

// An idle connection holds no pipe: a node has tens of thousands of them.
func TestIdleConnectionHoldsNoPipe(t *testing.T) {
	f := start(t, echo, ServerOptions{})
	c := f.dial(t)
	long := strings.Repeat("long ", 1<<18)
	go func() { _, _ = c.Write([]byte(long)) }()
	for n, buf := 0, make([]byte, len(long)); n < len(long); {
		m, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		n += m
	}
	eventually(t, "both pipes are back", func() bool { return len(idlePipes) >= 1 && runs("link.splice", "waitRead") })
}
