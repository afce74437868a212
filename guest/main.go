package guest

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Main is the agent as a program: its control listener and its log level come from the environment, which its children do not see.
func Main(ctx context.Context) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// What the agent makes in the sandbox has the modes that a login shell would give it.
	syscall.Umask(0o022)
	control, err := ControlListener()
	if err != nil {
		return fmt.Errorf("take over control socket: %w", err)
	}
	// Whatever else the launcher left open stops here. A kernel without close_range is older than any that this runs on.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close inherited descriptors on exec: %w", err)
	}
	level := slog.LevelInfo
	if debug, _ := strconv.ParseBool(os.Getenv("SLUICE_GUEST_DEBUG")); debug {
		level = slog.LevelDebug
	}
	return Run(ctx, Options{
		Control: control,
		PID1:    os.Getpid() == 1,
		Log:     slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})),
	})
}
