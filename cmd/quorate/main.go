// Command quorate is the sidecar of one region's PostgreSQL server. It holds
// flags, signals and exit codes; the work is package sidecar's.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"quorate/sidecar/admin"
	"quorate/sidecar/config"
)

const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
	exitUnfit = 3
)

const exitCodesHelp = `Exit codes:
  0  done; run: ended as SIGTERM or SIGINT asked
  1  an error, told on stderr
  2  wrong usage, or faults in the configuration
  3  check: the server or the database cannot be used as it is`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal asks for an orderly end; after it they have their usual
	// effect, so that a second one ends the process at once.
	context.AfterFunc(ctx, stop)
	err := rootCommand().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "quorate: %v\n", err)
	}
	os.Exit(exitCode(err))
}

// usageError is a mistake in the command line or the configuration.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// errUnfit says that the server cannot be used as it is; what is wrong was told.
var errUnfit = errors.New("the server cannot be used as it is")

func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitUsage
	}
	if errors.Is(err, errUnfit) {
		return exitUnfit
	}
	// What cobra itself finds wrong with a command's name has no type.
	if strings.HasPrefix(err.Error(), "unknown command") {
		return exitUsage
	}
	return exitError
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "quorate",
		Short: "The sidecar that makes a COMMIT mean: a majority of regions has this transaction",
		Long: `The sidecar that stands beside one region's PostgreSQL server. A COMMIT there
returns when a majority of regions has the transaction on disk, and every other
region's database follows in the same order.

` + exitCodesHelp,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.AddCommand(runCommand(), checkCommand(), installCommand(), uninstallCommand(), versionCommand())
	return root
}

// command makes a command that takes a configuration file and nothing else.
func command(use, short, long, example string, run func(*cobra.Command, config.Config) error) *cobra.Command {
	cmd := &cobra.Command{Use: use + " --config FILE", Short: short, Long: long + "\n\n" + exitCodesHelp, Example: example, Args: noArgs}
	file := cmd.Flags().String("config", "", "the region's configuration `file`")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *file == "" {
			return &usageError{errors.New("--config is missing: which region's configuration?")}
		}
		cfg, err := config.Load(*file)
		if err != nil {
			return &usageError{fmt.Errorf("the configuration cannot be used:\n%w", err)}
		}
		return run(cmd, cfg)
	}
	return cmd
}

func noArgs(cmd *cobra.Command, args []string) error {
	if err := cobra.NoArgs(cmd, args); err != nil {
		return &usageError{err}
	}
	return nil
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print which build this is",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := admin.Build()
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "quorate %s, commit %s, %s\n", v.Version, v.Commit, v.GoVersion)
			return err
		},
	}
}
