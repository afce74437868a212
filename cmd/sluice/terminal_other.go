//go:build !linux

package main

import (
	"context"
	"errors"
	"os"

	"github.com/sluice-edge/sluice/guest"
)

// terminal is the user's, while a program in a sandbox has it.
type terminal struct{}

func openTerminal(*os.File, bool) (*terminal, error) {
	return nil, errors.New("-t works on Linux only")
}

func (*terminal) restore() {}

func (*terminal) size() guest.WindowSize { return guest.WindowSize{} }

func (*terminal) sizes(context.Context) <-chan guest.WindowSize { return nil }
