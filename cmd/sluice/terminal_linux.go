package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/guest"
)

// terminal is the user's, while a program in a sandbox has it.
type terminal struct {
	fd     int
	before *unix.Termios // nil: left as it was
}

// openTerminal takes the terminal that f is. Raw, every key goes to the program, Ctrl-C among them: its own terminal knows what they mean.
func openTerminal(f *os.File, raw bool) (*terminal, error) {
	t := &terminal{fd: int(f.Fd())}
	before, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return nil, errors.New("-t wants its input to be a terminal: leave it out in scripts")
	}
	if err != nil {
		return nil, fmt.Errorf("look at the terminal: %w", err)
	}
	if !raw {
		return t, nil
	}
	now := *before // what cfmakeraw of the C library does
	now.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	now.Oflag &^= unix.OPOST
	now.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	now.Cflag &^= unix.CSIZE | unix.PARENB
	now.Cflag |= unix.CS8
	now.Cc[unix.VMIN], now.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(t.fd, unix.TCSETS, &now); err != nil {
		return nil, fmt.Errorf("make the terminal raw: %w", err)
	}
	t.before = before
	return t, nil
}

// restore gives the terminal back as it was.
func (t *terminal) restore() {
	if t.before != nil {
		_ = unix.IoctlSetTermios(t.fd, unix.TCSETS, t.before) // it is gone, or it works
	}
}

// size is that of an old terminal when there is none to ask.
func (t *terminal) size() guest.WindowSize {
	size, err := unix.IoctlGetWinsize(t.fd, unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 || size.Row == 0 {
		return guest.WindowSize{Cols: 80, Rows: 24}
	}
	return guest.WindowSize{Cols: size.Col, Rows: size.Row}
}

// sizes tells of every change until ctx ends.
func (t *terminal) sizes(ctx context.Context) <-chan guest.WindowSize {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, unix.SIGWINCH)
	sizes := make(chan guest.WindowSize)
	go func() {
		defer signal.Stop(changed)
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			select {
			case <-ctx.Done():
				return
			case sizes <- t.size():
			}
		}
	}()
	return sizes
}
