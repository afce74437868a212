// Command guestd is the agent inside a sandbox. The node starts it there and hands it a control socket, or boots a VM with it as the first
// process; anywhere else it would be a shell for everybody, so it refuses to run.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/sluice-edge/sluice/guest"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guestd:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("guestd", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintf(flags.Output(), "guestd is Sluice's agent inside a sandbox. The node starts it there, with a control socket in %s.\n",
			guest.ControlFDVariable)
		flags.PrintDefaults()
	}
	insecure := flags.String("insecure-listen", "",
		"serve clients on this `address` without a node and without a token: whoever reaches it is this user; for tests and development")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return nil
	case err != nil:
		return err
	case flags.NArg() > 0:
		return fmt.Errorf("unknown argument %q", flags.Arg(0))
	}
	return guest.Main(ctx, *insecure)
}
