package main

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestBenchArguments(t *testing.T) {
	for flags, want := range map[string]string{
		"-scenario get,foo": `-scenario "foo" is none of get, token`,
		"-rate -1":          "-rate -1",
		"-rate NaN":         "-rate NaN",
		"-duration 0":       "-duration 0s",
		"-connections 0":    "-connections 0",
	} {
		_, err := parseBenchConfig(strings.Fields(flags), func(string) string { return "" })
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("bench %s = %v, want %s", flags, err, want)
		}
	}
}

// TestBenchEndsWithItsNode: a node that could not start, because another one runs, was waited for until somebody pressed Ctrl-C.
func TestBenchEndsWithItsNode(t *testing.T) {
	failed, measured := errors.New("another node runs"), errors.New("no answer")
	forever := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	if err := whileRunning(t.Context(), func(context.Context) error { return failed }, forever); err != failed {
		t.Errorf("bench of a node that cannot start = %v", err)
	}
	untilStopped := func(ctx context.Context) error { <-ctx.Done(); return nil }
	if err := whileRunning(t.Context(), untilStopped, func(context.Context) error { return measured }); !errors.Is(err, measured) {
		t.Errorf("bench that fails = %v", err)
	}
}
