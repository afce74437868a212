// Command guestd is the agent inside a sandbox.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/sluice-edge/sluice/guest"
)

func main() {
	if err := guest.Main(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "guestd:", err)
		os.Exit(1)
	}
}
