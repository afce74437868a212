package run

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestGroupFirstReturnStopsTheOthers(t *testing.T) {
	boom := errors.New("boom")
	stopped := make(chan struct{})
	var g Group
	g.Add("waiter", func(ctx context.Context) error {
		<-ctx.Done()
		close(stopped)
		return ctx.Err()
	})
	g.Add("failer", func(context.Context) error { return boom })
	err := g.Run(t.Context())
	if !errors.Is(err, boom) || !strings.HasPrefix(err.Error(), "failer: ") {
		t.Fatalf("Run() = %v, want the failing actor's error with its name", err)
	}
	select {
	case <-stopped:
	default:
		t.Fatal("Run returned before the other actor was done")
	}
}

func TestGroupCancelIsACleanStop(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var g Group
	g.Add("waiter", func(ctx context.Context) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	})
	if err := g.Run(ctx); err != nil {
		t.Fatalf("Run() = %v, want nil after a cancel from outside", err)
	}
}

func TestGroupReportsAFailureDuringStop(t *testing.T) {
	bad := errors.New("could not flush")
	ctx, cancel := context.WithCancel(t.Context())
	var g Group
	g.Add("flusher", func(ctx context.Context) error {
		cancel()
		<-ctx.Done()
		return bad
	})
	if err := g.Run(ctx); !errors.Is(err, bad) {
		t.Fatalf("Run() = %v, want %v", err, bad)
	}
}
