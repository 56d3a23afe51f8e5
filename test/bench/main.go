package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"quorate/deploy/sandbox"
	"quorate/deploy/sandbox/postgres"
)

// plan is how long and how often things are measured.
type plan struct {
	short           bool
	latencyRounds   int
	latencySeconds  int
	loadRounds      int
	loadSeconds     int
	scaleTPCB       int
	clientsTPCB     []int // with several clients; none: not measured
	kills           int
	transfers       int
	seedScale       int // of pgbench: 1 is about 16 MB
	seedRounds      int
	fencePairs      int
	fenceSeconds    int
	fenceScale      int
	probeFlushes    int
	probeRoundTrips int
	scalingClients  []int
}

func planOf(short bool) plan {
	if short {
		return plan{short: true, latencyRounds: 2, latencySeconds: 2, loadRounds: 2, loadSeconds: 2, scaleTPCB: 1,
			kills: 3, transfers: 2, seedScale: 13, seedRounds: 1, fencePairs: 5, fenceSeconds: 2, fenceScale: 5,
			probeFlushes: 300, probeRoundTrips: 20, scalingClients: []int{1, 8, 32, 64}}
	}
	return plan{latencyRounds: 4, latencySeconds: 15, loadRounds: 4, loadSeconds: 10, scaleTPCB: 10, clientsTPCB: []int{1, 8, 32, 64},
		kills: 10, transfers: 5, seedScale: 67, seedRounds: 3, fencePairs: 16, fenceSeconds: 5, fenceScale: 20,
		probeFlushes: 3000, probeRoundTrips: 100, scalingClients: []int{1, 8, 32, 64}}
}

// bench is one run.
type bench struct {
	plan
	dir     string // everything of the run lies in it
	bin     string // holds the commands measured
	pgBin   string
	report  report
	verbose bool
	only    *regexp.Regexp
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	only := flag.String("only", ".", "run the parts whose name matches: local, wan, flexible, seed, fence")
	bin := flag.String("bin", "bin", "directory of quorate and paxosctl")
	verbose := flag.Bool("v", false, "tell what the sandbox does")
	flag.Parse()
	b := &bench{plan: planOf(os.Getenv("SHORT") == "1"), verbose: *verbose}
	if b.only, err = regexp.Compile(*only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if b.bin, err = filepath.Abs(*bin); err != nil {
		return err
	}
	for _, name := range []string{"quorate", "paxosctl"} {
		if _, err := os.Stat(filepath.Join(b.bin, name)); err != nil {
			return fmt.Errorf("%w: build first (make build)", err)
		}
	}
	if b.pgBin, err = postgres.BinDir(); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("/tmp", "quorate-bench-"); err != nil {
		return err
	}
	if err := os.Chmod(b.dir, 0o755); err != nil { // user postgres has to enter it
		return err
	}
	defer func() {
		if err != nil {
			fmt.Fprintln(os.Stderr, "logs are kept in", b.dir)
			return
		}
		os.RemoveAll(b.dir)
	}()

	began := time.Now()
	b.report.machine = machine(ctx, b.pgBin)
	var errs []error
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"local", func(ctx context.Context) error { return b.commits(ctx, sandbox.WANNone) }},
		{"wan", func(ctx context.Context) error { return b.commits(ctx, sandbox.WANGlobal) }},
		{"flexible", b.flexible},
		{"seed", b.seed},
		{"fence", b.fence},
	} {
		if !b.only.MatchString(part.name) || ctx.Err() != nil {
			continue
		}
		partBegan := time.Now()
		if err := part.run(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", part.name, err))
		}
		b.progress("%s took %v", part.name, time.Since(partBegan).Round(time.Second))
	}
	b.report.note("load average at the end %s; the run took %v", loadAverage(), time.Since(began).Round(time.Second))
	b.report.write(os.Stdout)
	return errors.Join(append(errs, ctx.Err())...)
}

// progress tells on standard error what is going on.
func (b *bench) progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format("15:04:05")}, args...)...)
}

// machine says on what this runs.
func machine(ctx context.Context, pgBin string) string {
	version, _ := exec.CommandContext(ctx, filepath.Join(pgBin, "postgres"), "--version").Output()
	return fmt.Sprintf("%d CPUs, %s, %s, load average at the start %s", runtime.NumCPU(), strings.TrimSpace(string(version)), runtime.Version(), loadAverage())
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}
