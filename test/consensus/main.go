package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// plan is what is measured, how long and how often.
type plan struct {
	short          bool
	warm, length   time.Duration
	rounds         int
	sizes          []int
	proposers      []int
	curve          []int // more numbers of proposers, ours alone, for the curve of batch size and latency
	hashicorp      bool
	delay          time.Duration // round trip of part wan
	wanProposers   []int
	groups         int
	idle           time.Duration
	stalledRounds  int
	stalledLong    time.Duration
	probeFlushes   int
	probeEchoes    int
	probeEchoesWAN int
}

func planOf(short bool) plan {
	if short {
		return plan{short: true, warm: time.Second, length: 2 * time.Second, rounds: 5, sizes: []int{128}, proposers: []int{1, 1024},
			stalledRounds: 5, stalledLong: 10 * time.Second, probeFlushes: 500, probeEchoes: 500}
	}
	return plan{warm: time.Second, length: 3 * time.Second, rounds: 5, sizes: []int{128, 1024}, proposers: []int{1, 16, 256, 1024},
		curve: []int{4, 64, 4096}, hashicorp: true, delay: 25 * time.Millisecond, wanProposers: []int{1, 16, 256, 1024, 4096},
		groups: 1000, idle: 20 * time.Second, stalledRounds: 5, stalledLong: 20 * time.Second,
		probeFlushes: 1000, probeEchoes: 1000, probeEchoesWAN: 60}
}

// bench is one run.
type bench struct {
	plan
	dir     string // everything of the run lies in it
	report  report
	only    *regexp.Regexp
	profile string // of part groups; empty: none
}

func main() {
	if config, ok := os.LookupEnv(nodeEnv); ok {
		if err := runNode(config); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "consensus:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	only := flag.String("only", ".", "run the parts whose name matches: local, wan, groups, stalled, slowlink, logs")
	one := flag.String("one", "", "instead of all: one load on one contender (quorate, etcd, hashicorp)")
	proposers := flag.Int("proposers", 1024, "of -one")
	size := flag.Int("bytes", 128, "of a payload of -one")
	delay := flag.Duration("delay", 0, "round trip of -one")
	length := flag.Duration("length", 3*time.Second, "of -one")
	profile := flag.String("profile", "", "of -one, and of groups at rest: write profiles of all replicas to files whose names begin so")
	flag.Parse()
	b := &bench{plan: planOf(os.Getenv("SHORT") == "1")}
	if b.only, err = regexp.Compile(*only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if b.dir, err = os.MkdirTemp("/tmp", "quorate-consensus-"); err != nil {
		return err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "what the replicas wrote is kept in", b.dir)
			return
		}
		os.RemoveAll(b.dir)
	}()
	if b.profile = *profile; b.profile != "" {
		if b.profile, err = filepath.Abs(b.profile); err != nil {
			return err
		}
	}
	if *one != "" {
		return b.one(ctx, *one, *proposers, *size, *delay, *length)
	}

	began := time.Now()
	b.report.machine = fmt.Sprintf("%d CPUs, %s, load average at the start %s; five processes a contender (one binary, started anew for each replica), GOMAXPROCS %d in each",
		runtime.NumCPU(), runtime.Version(), loadAverage(), runtime.GOMAXPROCS(0))
	var errs []error
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"local", b.local}, {"wan", b.wan}, {"groups", b.thousand}, {"stalled", b.stalledFollower}, {"slowlink", b.slowLink}, {"logs", b.logs},
	} {
		if !b.only.MatchString(part.name) || ctx.Err() != nil {
			continue
		}
		partBegan := time.Now()
		if err := part.run(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", part.name, err))
		}
		progress("%s took %v", part.name, time.Since(partBegan).Round(time.Second))
	}
	b.report.note("Load average at the end %s; the run took %v.", loadAverage(), time.Since(began).Round(time.Second))
	b.report.write(os.Stdout)
	return errors.Join(append(errs, ctx.Err())...)
}

// one is for looking at one thing.
func (b *bench) one(ctx context.Context, contender string, proposers, size int, delay, length time.Duration) (err error) {
	c, err := startCluster(b.dir, contender, delay/2, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	t, err := c.measure(ctx, proposers, size, time.Second, length, b.profile)
	if err != nil {
		return err
	}
	r := report{costs: []cost{{contender: contender, place: place(delay), size: size, proposers: proposers, turns: []turn{t}}}}
	r.write(os.Stdout)
	fmt.Printf("CPU of the leader %.1f s per million entries, its memory %d MiB, longest operation %v\n",
		t.leader.CPU.Seconds()/float64(t.Operations)*1e6, t.leader.RSSBytes>>20, t.Max)
	return nil
}

// progress tells on standard error what is going on.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format("15:04:05")}, args...)...)
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}
