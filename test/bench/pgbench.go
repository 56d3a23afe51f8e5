package main

import (
	"bufio"
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

//go:embed insert.sql
var insertScript string

// insertTable is what insert.sql writes to. Its key is random, so that no
// sequence is in play.
const insertTable = "CREATE TABLE bench_insert (id bigint PRIMARY KEY, payload text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp())"

// The workloads.
const (
	insert = "insert"
	tpcb   = "tpcb"
)

// pgbenchRun is what one turn measured.
type pgbenchRun struct {
	perSecond float64 // transactions, connecting left out
	latencies []time.Duration
	cpu       string // by commit, of the contender's processes
}

var (
	tpsLine    = regexp.MustCompile(`(?m)^tps = ([0-9.]+) \(without initial connection time\)`)
	failedLine = regexp.MustCompile(`(?m)^number of failed transactions: ([0-9]+)`)
)

// pgbench runs a workload for some seconds and returns what it logged of every
// transaction.
func (b *bench) pgbench(ctx context.Context, dsn, workload string, clients, seconds int) (pgbenchRun, error) {
	dir, err := os.MkdirTemp(b.dir, "pgbench-")
	if err != nil {
		return pgbenchRun{}, err
	}
	defer os.RemoveAll(dir)
	args := []string{"-n", "-M", "prepared", "-c", strconv.Itoa(clients), "-j", strconv.Itoa(min(clients, 2)), "-T", strconv.Itoa(seconds), "-l", "--log-prefix", filepath.Join(dir, "log")}
	switch workload {
	case insert:
		script := filepath.Join(dir, "insert.sql")
		if err := os.WriteFile(script, []byte(insertScript), 0o644); err != nil {
			return pgbenchRun{}, err
		}
		args = append(args, "-f", script)
	case tpcb:
		args = append(args, "-b", "tpcb-like")
	}
	// A commit that is never acknowledged must not hold the run for ever.
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds)*time.Second+time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(b.pgBin, "pgbench"), append(args, dsn)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return pgbenchRun{}, fmt.Errorf("pgbench %s, %d clients: %w\n%s", workload, clients, err, out)
	}
	m := tpsLine.FindSubmatch(out)
	if m == nil {
		return pgbenchRun{}, fmt.Errorf("pgbench %s, %d clients, told no rate:\n%s", workload, clients, out)
	}
	if f := failedLine.FindSubmatch(out); f != nil && string(f[1]) != "0" {
		return pgbenchRun{}, fmt.Errorf("pgbench %s, %d clients: %s transactions failed\n%s", workload, clients, f[1], out)
	}
	var r pgbenchRun
	if r.perSecond, err = strconv.ParseFloat(string(m[1]), 64); err != nil {
		return pgbenchRun{}, err
	}
	logs, err := filepath.Glob(filepath.Join(dir, "log.*"))
	if err != nil {
		return pgbenchRun{}, err
	}
	for _, name := range logs {
		if err := r.readLog(name); err != nil {
			return pgbenchRun{}, err
		}
	}
	if len(r.latencies) == 0 {
		return pgbenchRun{}, fmt.Errorf("pgbench %s, %d clients, logged no transaction", workload, clients)
	}
	return r, nil
}

// readLog adds the latencies of a per-transaction log: its third field, in µs.
func (r *pgbenchRun) readLog(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 3 {
			return fmt.Errorf("%s: line %q", name, lines.Text())
		}
		us, err := strconv.ParseInt(fields[2], 10, 64)
		if err != nil {
			return fmt.Errorf("%s: line %q: %w", name, lines.Text(), err)
		}
		r.latencies = append(r.latencies, time.Duration(us)*time.Microsecond)
	}
	return lines.Err()
}

// initTPCB makes pgbench's tables.
func (b *bench) initTPCB(ctx context.Context, dsn string, scale int) error {
	cmd := exec.CommandContext(ctx, filepath.Join(b.pgBin, "pgbench"), "-i", "-I", "dtgvp", "-q", "-s", strconv.Itoa(scale), dsn)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("pgbench -i -s %d: %w\n%s", scale, err, out)
	}
	return nil
}
