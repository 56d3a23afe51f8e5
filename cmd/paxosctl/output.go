package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The exit codes, the same for every command; see exitCodesHelp.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitNoLeader    = 3
	exitUnreachable = 4
	exitNotHeld     = 5
	exitDamaged     = 6
)

const exitCodesHelp = `Exit codes:
  0  done
  1  an error, told on stderr
  2  wrong usage
  3  no region leads at the moment
  4  no region's sidecar answers
  5  the log no longer holds the slot asked for
  6  the files of a log are damaged`

// codedError is an error that ends the process with a code of its own.
type codedError struct {
	code int
	err  error
}

func (e *codedError) Error() string { return e.err.Error() }
func (e *codedError) Unwrap() error { return e.err }

func coded(code int, format string, args ...any) error {
	return &codedError{code: code, err: fmt.Errorf(format, args...)}
}

// exitCode is the code with which the process ends after err.
func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	if c, ok := errors.AsType[*codedError](err); ok {
		return c.code
	}
	// What cobra itself finds wrong has no type of its own.
	for _, usage := range []string{"unknown command", "unknown flag", "unknown shorthand", "required flag", "invalid argument", "flag needs an argument", "accepts "} {
		if strings.HasPrefix(err.Error(), usage) {
			return exitUsage
		}
	}
	return exitError
}

// fromRPC gives an error of the administrative service its exit code and plain words.
func fromRPC(doing string, err error) error {
	s, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%s: %w", doing, err)
	}
	code := exitError
	switch s.Code() {
	case codes.Unavailable:
		code = exitUnreachable
	case codes.NotFound:
		code = exitNoLeader
	case codes.OutOfRange:
		code = exitNotHeld
	}
	return coded(code, "%s: %s", doing, s.Message())
}

// usage turns the errors of a command's arguments into exit code 2.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return &codedError{code: exitUsage, err: err}
		}
		return nil
	}
}

// format is how a command prints: table or json.
type format string

const (
	formatTable format = "table"
	formatJSON  format = "json"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "format" }

func (f *format) Set(s string) error {
	switch format(s) {
	case formatTable, formatJSON:
		*f = format(s)
		return nil
	}
	return fmt.Errorf("%q is neither table nor json", s)
}

// addOutputFlag gives cmd its -o.
func addOutputFlag(cmd *cobra.Command) *format {
	f := formatTable
	cmd.Flags().VarP(&f, "output", "o", "`format`: table or json")
	return &f
}

func printJSON(w io.Writer, v any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

// printTable aligns rows, the first of which is the heading.
func printTable(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		if _, err := fmt.Fprintln(t, strings.Join(row, "\t")); err != nil {
			return err
		}
	}
	return t.Flush()
}
