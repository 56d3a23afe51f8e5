package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"quorate/deploy/sandbox"
	"quorate/deploy/sandbox/postgres"
)

func devCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a whole cluster on this machine",
		Long: `Run regions r1, r2, … on this machine: for each a real PostgreSQL server and a
sidecar, as processes of their own, with relays between the regions that give
each connection the delay of real places and can be cut.

Everything lies in the directory given by --dir, by default ./.sandbox. As root
the servers run as user postgres; if that user cannot enter the directory, their
data lies under /var/tmp/quorate-….`,
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		devUpCommand(),
		devDownCommand(),
		devStatusCommand(),
		devDSNCommand(),
		devPsqlCommand(),
		devPartCommand("kill", "Kill a region's processes with SIGKILL",
			"Kill a region's PostgreSQL, with all its backends, and its sidecar with SIGKILL.\nReturns when they are gone.", true,
			func(ctx context.Context, c *sandbox.Client, region string, part sandbox.Part) error {
				return c.Kill(ctx, region, part)
			}),
		devRegionCommand("start", "Start whatever of a region does not run",
			"Start whatever of a region does not run. Returns when it answers; catching up\ngoes on after that. It is no error that all runs.",
			func(ctx context.Context, c *sandbox.Client, region string) error { return c.StartRegion(ctx, region) }),
		devPartCommand("pause", "Stop a region's sidecar, or its server, with SIGSTOP",
			"Stop a region's sidecar with SIGSTOP, or with --postgres the server and all its\nbackends. Returns when they stand still.", false,
			func(ctx context.Context, c *sandbox.Client, region string, part sandbox.Part) error {
				return c.Pause(ctx, region, part)
			}),
		devPartCommand("resume", "Let go on what pause stopped",
			"Let a region's sidecar go on after pause, or with --postgres its server.", false,
			func(ctx context.Context, c *sandbox.Client, region string, part sandbox.Part) error {
				return c.Resume(ctx, region, part)
			}),
		devPartitionCommand(),
		devHealCommand(),
		devRegionCommand("wipe", "Kill a region and destroy its data",
			"Kill a region and destroy the data of its server and of its sidecar. `start`\nbrings it back as a new replica.",
			func(ctx context.Context, c *sandbox.Client, region string) error { return c.Wipe(ctx, region) }),
	)
	return cmd
}

// sandboxDir returns --dir as an absolute path.
func sandboxDir(cmd *cobra.Command) (string, error) {
	return filepath.Abs(cmd.Flag("dir").Value.String())
}

func connect(cmd *cobra.Command) (*sandbox.Client, error) {
	dir, err := sandboxDir(cmd)
	if err != nil {
		return nil, err
	}
	return sandbox.Connect(dir)
}

func devUpCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start the sandbox, or go on with it",
		Long: `Start the sandbox and wait until a leader takes writes and every region has caught
up. Then it stays until Ctrl-C, which takes the sandbox down; with --detach it
returns, and the sandbox stays until ` + "`paxosctl dev down`" + `.

Data, ports and settings of an earlier run are kept; flags given change the
settings. If the sandbox runs already, that is said and nothing is done.

--wan global gives every connection between regions the round trip of real
places, from r1 in Frankfurt:
` + wanHelp(),
		Example: `  paxosctl dev up --wan global --detach
  paxosctl dev up --wan global --phase1 4 --phase2 2 --durability-regions 1
  paxosctl dev up --witness r5
  psql "$(paxosctl dev dsn r1)"
  paxosctl dev kill r1
  paxosctl dev down`,
		Args: usage(cobra.NoArgs),
	}
	f := cmd.Flags()
	regions := f.Int("regions", 5, "number of regions; fixed once made")
	wan := f.String("wan", sandbox.WANNone, "`delays` between regions: none or global")
	otlp := f.String("otlp", "", "OTLP/gRPC endpoint for traces, http://host:port")
	jaeger := f.Bool("jaeger", false, "run Jaeger, built if needed, and send traces there")
	feed := f.Bool("feed", false, "publish the change feed to NATS JetStream")
	witnesses := f.StringSlice("witness", nil, "`regions` that vote without a database, separated by commas; fixed once made")
	learners := f.StringSlice("learner", nil, "`regions` with a database and no vote; fixed once made")
	phase1 := f.Int("phase1", 0, "voters that must promise a leader; 0: a majority; fixed once made")
	phase2 := f.Int("phase2", 0, "voters that must have a commit on disk; 0: a majority; fixed once made")
	durability := f.Int("durability-regions", 0, "`losses` that kinds and quorums stand, where that is less than a minority of the voters")
	quorate := f.String("quorate", "", "`path` of the daemon; default $QUORATE_BIN, else beside paxosctl")
	detach := f.Bool("detach", false, "return when ready, and leave the sandbox running")
	supervise := f.Bool("supervise", false, "be the supervisor of a detached sandbox")
	_ = f.MarkHidden("supervise") // exists
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		dir, err := sandboxDir(cmd)
		if err != nil {
			return err
		}
		if *otlp != "" && *jaeger {
			return coded(exitUsage, "--otlp and --jaeger exclude each other: --jaeger sends the traces to the Jaeger it runs")
		}
		o := sandbox.Options{Dir: dir, QuorateBin: *quorate}
		o.Regions = ifGiven(cmd, "regions", regions)
		o.WAN = ifGiven(cmd, "wan", wan)
		o.OTLP = ifGiven(cmd, "otlp", otlp)
		o.Jaeger = ifGiven(cmd, "jaeger", jaeger)
		o.Feed = ifGiven(cmd, "feed", feed)
		o.Witnesses, o.Learners = *witnesses, *learners
		o.Phase1 = ifGiven(cmd, "phase1", phase1)
		o.Phase2 = ifGiven(cmd, "phase2", phase2)
		o.DurabilityRegions = ifGiven(cmd, "durability-regions", durability)
		if *supervise {
			return superviseSandbox(cmd.Context(), o, os.Stdout, func(*sandbox.Supervisor) error { return nil })
		}
		if c, err := sandbox.Connect(dir); err == nil {
			if err := o.CheckRunning(); err != nil {
				return err
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "the sandbox in %s runs already\n", dir)
			return showStatus(cmd, c)
		}
		if *detach {
			return upDetached(cmd, dir)
		}
		return superviseSandbox(cmd.Context(), o, cmd.ErrOrStderr(), func(s *sandbox.Supervisor) error {
			if err := s.AwaitReady(cmd.Context()); err != nil {
				return err
			}
			if err := printSandbox(cmd.OutOrStdout(), s.Status(cmd.Context())); err != nil {
				return err
			}
			fmt.Fprintln(cmd.ErrOrStderr(), "ready; Ctrl-C takes it down")
			return nil
		})
	}
	return cmd
}

// ifGiven returns the flag's value if the flag was given, else nil.
func ifGiven[T any](cmd *cobra.Command, flag string, value *T) *T {
	if cmd.Flags().Changed(flag) {
		return value
	}
	return nil
}

func wanHelp() string {
	var b strings.Builder
	for i := 1; i < sandbox.RegionsMax; i++ {
		fmt.Fprintf(&b, "  r%d %-10s %v\n", i+1, sandbox.Place(sandbox.WANGlobal, i), sandbox.RoundTrip(sandbox.WANGlobal, 0, i))
	}
	return strings.TrimRight(b.String(), "\n")
}

// superviseSandbox runs the sandbox in this process until ctx ends or somebody
// asks for its end. started is called when every process answers.
func superviseSandbox(ctx context.Context, o sandbox.Options, progress io.Writer, started func(*sandbox.Supervisor) error) error {
	o.Progress = func(line string) { fmt.Fprintln(progress, line) }
	s, err := sandbox.New(ctx, o)
	if err != nil {
		return err
	}
	err = s.Start(ctx)
	if err == nil {
		err = started(s)
	}
	if err == nil {
		select {
		case <-ctx.Done():
		case <-s.Done():
		}
	}
	downErr := s.Down()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil // asked for
	}
	return errors.Join(err, downErr)
}

// upDetached starts the supervisor as a process of its own, by the same command
// line, and returns when the sandbox is ready.
func upDetached(cmd *cobra.Command, dir string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	logFile := filepath.Join(dir, "supervisor.log")
	log, err := os.Create(logFile)
	if err != nil {
		return err
	}
	defer log.Close()
	// This process's arguments, as they are: the flags are its own.
	supervisor := exec.Command(self, append(slices.Clone(os.Args[1:]), "--supervise")...)
	supervisor.Stdout, supervisor.Stderr = log, log
	supervisor.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := supervisor.Start(); err != nil {
		return fmt.Errorf("start the supervisor: %w", err)
	}
	ended := make(chan struct{})
	go func() { // for as long as this process lives
		_ = supervisor.Wait() // its log tells why it ended
		close(ended)
	}()

	err = sandbox.AwaitDetached(cmd.Context(), dir, ended, logFile, func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), line) })
	if err != nil {
		// Nothing half-started stays behind.
		_ = supervisor.Process.Signal(syscall.SIGTERM)
		<-ended
		return err
	}
	c, err := sandbox.Connect(dir)
	if err != nil {
		return err
	}
	return showStatus(cmd, c)
}

func devDownCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Stop the sandbox; its data stays",
		Long:  "Stop every process of the sandbox. Its data stays, and `up` goes on with it.",
		Args:  usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := sandboxDir(cmd)
			if err != nil {
				return err
			}
			c, err := sandbox.Connect(dir)
			switch {
			case errors.Is(err, sandbox.ErrNotRunning):
				if err := sandbox.CleanUp(cmd.Context(), dir); err != nil {
					return err
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "the sandbox in %s does not run\n", dir)
				return nil
			case err != nil:
				return err
			}
			return c.Down(cmd.Context())
		},
	}
}

func devStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show every region's processes and addresses",
		Args:  usage(cobra.NoArgs),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := connect(cmd)
		if err != nil {
			return err
		}
		if *output == formatTable {
			return showStatus(cmd, c)
		}
		st, err := c.Status(cmd.Context())
		if err != nil {
			return err
		}
		return printJSON(cmd.OutOrStdout(), st)
	}
	return cmd
}

func showStatus(cmd *cobra.Command, c *sandbox.Client) error {
	st, err := c.Status(cmd.Context())
	if err != nil {
		return err
	}
	return printSandbox(cmd.OutOrStdout(), st)
}

func printSandbox(w io.Writer, st sandbox.Status) error {
	leader := "no leader"
	if st.Leader != "" {
		leader = "leader " + st.Leader
	}
	if _, err := fmt.Fprintf(w, "sandbox %s: %s, delays %s, supervisor %d\n", st.Dir, leader, st.WAN, st.SupervisorPID); err != nil {
		return err
	}
	if st.JaegerURL != "" {
		fmt.Fprintf(w, "Jaeger %s\n", st.JaegerURL)
	}
	fmt.Fprintln(w)
	rows := [][]string{{"REGION", "PLACE", "STATE", "WRITES", "APPLIED", "SIDECAR", "POSTGRES", "DSN"}}
	addresses := [][]string{{"REGION", "LISTENS AT", "NATS", "LOGS"}}
	for _, r := range st.Regions {
		state, writes := r.State, "no"
		if r.Partitioned {
			state += ", cut off"
		}
		if r.Writable {
			writes = "yes"
		}
		rows = append(rows, []string{r.Region, dash(r.Place), state, writes, strconv.FormatUint(r.Applied, 10), pid(r.SidecarPID), pid(r.PostgresPID), r.DSN})
		var listens []string
		for purpose, address := range r.Addresses {
			listens = append(listens, purpose+" "+strings.TrimPrefix(address, "127.0.0.1"))
		}
		slices.Sort(listens)
		addresses = append(addresses, []string{r.Region, strings.Join(listens, ", "), dash(r.NATSURL), r.LogDir})
	}
	if err := printTable(w, rows); err != nil {
		return err
	}
	fmt.Fprintln(w)
	return printTable(w, addresses)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func pid(n int) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(n)
}

func devDSNCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "dsn REGION",
		Short:   "Print the URL of a region's database",
		Long:    "Print a URL of a superuser to the replicated database, at the region's own server.",
		Example: `  psql "$(paxosctl dev dsn r2)"`,
		Args:    usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			dsn, err := dsnOf(cmd, args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), dsn)
			return err
		},
	}
}

func dsnOf(cmd *cobra.Command, region string) (string, error) {
	dir, err := sandboxDir(cmd)
	if err != nil {
		return "", err
	}
	d, err := sandbox.Load(dir)
	if err != nil {
		return "", err
	}
	r, err := d.Region(region)
	if err != nil {
		return "", coded(exitUsage, "%w", err)
	}
	return r.DSN(), nil
}

func devPsqlCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "psql REGION [ARGUMENT...]",
		Short: "Run psql in a region",
		Long:  "Run psql against a region's own server. What follows the region is for psql, but\nfor --dir.",
		Example: `  paxosctl dev psql r2
  paxosctl dev psql r2 -c 'SELECT * FROM quorate.status'`,
		Args: usage(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			rest, err := takeDir(cmd, args[1:])
			if err != nil {
				return err
			}
			dsn, err := dsnOf(cmd, args[0])
			if err != nil {
				return err
			}
			psql, err := exec.LookPath("psql")
			if bin, binErr := postgres.BinDir(); binErr == nil {
				psql, err = exec.LookPath(filepath.Join(bin, "psql"))
			}
			if err != nil {
				return fmt.Errorf("find psql: %w", err)
			}
			return syscall.Exec(psql, append([]string{"psql", "--dbname=" + dsn}, rest...), os.Environ())
		},
	}
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// takeDir takes --dir out of arguments that are another program's.
func takeDir(cmd *cobra.Command, args []string) ([]string, error) {
	var rest []string
	for i := 0; i < len(args); i++ {
		value, found := strings.CutPrefix(args[i], "--dir=")
		if args[i] == "--dir" {
			if i++; i == len(args) {
				return nil, coded(exitUsage, "--dir needs a directory")
			}
			value, found = args[i], true
		}
		if !found {
			rest = append(rest, args[i])
			continue
		}
		if err := cmd.Flag("dir").Value.Set(value); err != nil {
			return nil, err
		}
	}
	return rest, nil
}

// devRegionCommand is a command that does something to one region.
func devRegionCommand(name, short, long string, do func(context.Context, *sandbox.Client, string) error) *cobra.Command {
	return &cobra.Command{
		Use:   name + " REGION",
		Short: short,
		Long:  long,
		Args:  usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			return do(cmd.Context(), c, args[0])
		},
	}
}

// devPartCommand is one that may be about a part of the region only.
func devPartCommand(name, short, long string, sidecarFlag bool, do func(context.Context, *sandbox.Client, string, sandbox.Part) error) *cobra.Command {
	sidecar, server := false, false
	cmd := devRegionCommand(name, short, long, func(ctx context.Context, c *sandbox.Client, region string) error {
		part := sandbox.Both
		switch {
		case sidecar && server:
			return coded(exitUsage, "--sidecar and --postgres exclude each other: without a flag both are meant")
		case sidecar:
			part = sandbox.Sidecar
		case server:
			part = sandbox.Postgres
		}
		return do(ctx, c, region, part)
	})
	cmd.Flags().BoolVar(&server, "postgres", false, "PostgreSQL only")
	if sidecarFlag {
		cmd.Flags().BoolVar(&sidecar, "sidecar", false, "the sidecar only")
	}
	return cmd
}

func devPartitionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "partition REGION...",
		Short: "Cut regions off from all others",
		Long: `Cut regions off from all others, in both directions. Regions named together still
reach each other; later calls add. Nothing arrives any more when this returns.
Connections stay open and silent, as in a real partition.`,
		Args: usage(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			return c.Partition(cmd.Context(), args...)
		},
	}
}

func devHealCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "heal [REGION...]",
		Short: "Undo partitions, of the regions named or all",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			return c.Heal(cmd.Context(), args...)
		},
	}
}
