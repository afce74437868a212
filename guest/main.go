package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Main is the agent as a program: its control listener and its log level come from the environment, which its children do not see. Without
// a control listener nobody could ever give it a token, so it runs only where insecure names an address to serve clients on all the same.
// As the first process of a VM the program is not the agent, but starts it.
func Main(ctx context.Context, insecure string) error {
	log := newLog()
	if isVMInit() {
		runVM(log)
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// What the agent makes in the sandbox has the modes that a login shell would give it.
	syscall.Umask(0o022)
	control, err := ControlListener()
	if err != nil {
		return fmt.Errorf("take over control socket: %w", err)
	}
	state, err := stateRoot()
	if err != nil {
		return fmt.Errorf("take over state directory: %w", err)
	}
	opts := Options{Control: control, PID1: os.Getpid() == 1, State: state, Log: log}
	_, opts.Restarted = os.LookupEnv(restartedVariable)
	if state != nil && !opts.Restarted {
		opts.Serving = func() {
			if err := sayUp(); err != nil {
				log.Warn("the node does not hear", "error", err)
			}
		}
	}
	switch {
	case control == nil && insecure == "":
		return fmt.Errorf("%s names no control socket: guestd is started by the node, inside a sandbox", ControlFDVariable)
	case control != nil && insecure != "":
		control.Close()
		return errors.New("-insecure-listen is for an agent without a control socket")
	case insecure != "":
		opts.Insecure = true
		if opts.Listen, err = net.Listen("tcp", insecure); err != nil {
			return fmt.Errorf("listen for clients: %w", err)
		}
	}
	// Whatever else the launcher left open stops here. A kernel without close_range is older than any that this runs on.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close inherited descriptors on exec: %w", err)
	}
	return Run(ctx, opts)
}

func newLog() *slog.Logger {
	level := slog.LevelInfo
	if debug, _ := strconv.ParseBool(os.Getenv("SLUICE_GUEST_DEBUG")); debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}
