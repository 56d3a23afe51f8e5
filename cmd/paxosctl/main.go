// Command paxosctl is the operator's tool: it shows and steers a cluster, and
// runs one on this machine as a sandbox (`paxosctl dev`).
//
// It holds flags and wiring. What a command prints with -o json has stable
// field names; its exit codes are those of exitCodesHelp.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := newRootCommand().ExecuteContext(ctx)
	if err != nil && !errors.Is(err, errSilent) {
		fmt.Fprintf(os.Stderr, "paxosctl: %v\n", err)
	}
	stop()
	os.Exit(exitCode(err))
}

// errSilent ends the process with an error that has been told already.
var errSilent = errors.New("told already")

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "paxosctl",
		Short:         "Show and steer a Quorate cluster, or run one on this machine",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().String("dir", defaultSandboxDir, "`directory` of a sandbox")
	var a addressing
	root.AddCommand(
		statusCommand(&a),
		leaderCommand(&a),
		memberCommand(&a),
		logCommand(&a),
		versionCommand(&a),
		devCommand(),
	)
	return root
}
