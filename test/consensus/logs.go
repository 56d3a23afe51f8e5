package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftwal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metadb"
	"github.com/hashicorp/raft-wal/metrics"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"quorate/paxosgroup"
	"quorate/paxosgroup/slotlog"
)

// durableLog is a log by itself: entries are appended to one group of it, and
// each call ends when they are flushed. Every entry is what its consensus would
// write for it, and what is known to be committed goes with the next batch.
type durableLog interface {
	append(payloads [][]byte) error
	flushes() (uint64, error) // since it was opened
	close() error
}

type logContender struct {
	name string
	open func(dir string) (durableLog, error)
	// reopen opens a log that holds entries, as a restart would, and closes it.
	reopen func(dir string) error
	// code are the packages that make it up, without what they would share with
	// any other (compression, protobuf, metrics).
	code []string
}

var logContenders = []logContender{
	{"quorate", openSlotLog, reopenSlotLog, []string{"quorate/paxosgroup/slotlog"}},
	{"etcd", openEtcdLog, reopenEtcdLog, []string{
		"go.etcd.io/etcd/server/v3/storage/wal", "go.etcd.io/etcd/server/v3/storage/wal/walpb",
		"go.etcd.io/etcd/client/pkg/v3/fileutil", "go.etcd.io/etcd/pkg/v3/ioutil", "go.etcd.io/etcd/pkg/v3/crc"}},
	{"hashicorp", openRaftWAL, reopenRaftWAL, []string{
		"github.com/hashicorp/raft-wal", "github.com/hashicorp/raft-wal/fs", "github.com/hashicorp/raft-wal/segment",
		"github.com/hashicorp/raft-wal/metadb", "github.com/hashicorp/raft-wal/types", "go.etcd.io/bbolt", "go.etcd.io/bbolt/internal/common"}},
}

// slotLog is ours.
type slotLog struct {
	log  *slotlog.Log
	slot paxosgroup.Slot
	done chan error
}

func openSlotLog(dir string) (durableLog, error) {
	l, _, err := slotlog.Open(slotlog.Config{Dir: dir})
	return &slotLog{log: l, done: make(chan error, 1)}, err
}

var slotLogBallot = paxosgroup.Ballot{Counter: 1, Replica: 1}

func (l *slotLog) append(payloads [][]byte) error {
	l.appendTo(1, payloads, func(err error) { l.done <- err })
	return <-l.done
}

func (l *slotLog) appendTo(g paxosgroup.GroupID, payloads [][]byte, durable func(error)) {
	records := make([]paxosgroup.Record, 0, len(payloads)+1)
	if l.slot > 0 {
		records = append(records, paxosgroup.Record{Kind: paxosgroup.RecordChosen, Slot: l.slot})
	}
	for _, p := range payloads {
		l.slot++
		records = append(records, paxosgroup.Record{Kind: paxosgroup.RecordAccept, Slot: l.slot, Ballot: slotLogBallot, Entry: paxosgroup.Entry{
			Kind: paxosgroup.KindData, Term: slotLogBallot, Number: uint64(l.slot), Region: "r1", Incarnation: 1, Payload: p,
		}})
	}
	l.log.Append(g, records, durable)
}

func (l *slotLog) flushes() (uint64, error) { return l.log.Stats().Flushes, nil }
func (l *slotLog) close() error             { return l.log.Close() }

func reopenSlotLog(dir string) error {
	l, _, err := slotlog.Open(slotlog.Config{Dir: dir})
	if err != nil {
		return err
	}
	return l.Close()
}

// etcdLog is etcd's.
type etcdLog struct {
	wal    *wal.WAL
	index  uint64
	before uint64 // flushes of the process before it was opened
}

func openEtcdLog(dir string) (durableLog, error) {
	w, err := wal.Create(zap.NewNop(), dir, []byte("bench"))
	if err != nil {
		return nil, err
	}
	l := &etcdLog{wal: w}
	l.before, err = etcdFlushes()
	return l, err
}

func (l *etcdLog) append(payloads [][]byte) error {
	entries := make([]raftpb.Entry, len(payloads))
	state := raftpb.HardState{Term: 1, Vote: 1, Commit: l.index}
	for i, p := range payloads {
		l.index++
		entries[i] = raftpb.Entry{Term: 1, Index: l.index, Data: p}
	}
	return l.wal.Save(state, entries)
}

func (l *etcdLog) flushes() (uint64, error) {
	n, err := etcdFlushes()
	return n - l.before, err
}

func (l *etcdLog) close() error { return l.wal.Close() }

// etcdFlushes are those of all its logs in this process.
func etcdFlushes() (uint64, error) {
	families, err := prometheus.DefaultGatherer.Gather()
	for _, f := range families {
		if f.GetName() == "etcd_disk_wal_fsync_duration_seconds" {
			return f.GetMetric()[0].GetHistogram().GetSampleCount(), err
		}
	}
	return 0, errors.Join(err, errors.New("etcd's WAL counts no flushes"))
}

func reopenEtcdLog(dir string) error {
	w, err := wal.Open(zap.NewNop(), dir, walpb.Snapshot{})
	if err != nil {
		return err
	}
	_, _, _, err = w.ReadAll()
	return errors.Join(err, w.Close())
}

// raftWAL is hashicorp's.
type raftWAL struct {
	wal     *raftwal.WAL
	meta    *metadb.BoltMetaDB
	metrics *metrics.AtomicCollector
	index   uint64
}

func openRaftWAL(dir string) (durableLog, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	l := &raftWAL{meta: new(metadb.BoltMetaDB), metrics: metrics.NewAtomicCollector(raftwal.MetricDefinitions)}
	var err error
	l.wal, err = raftwal.Open(dir, raftwal.WithMetaStore(l.meta), raftwal.WithMetricsCollector(l.metrics), raftwal.WithLogger(hclog.NewNullLogger()))
	return l, err
}

func (l *raftWAL) append(payloads [][]byte) error {
	logs := make([]*raft.Log, len(payloads))
	for i, p := range payloads {
		l.index++
		logs[i] = &raft.Log{Index: l.index, Term: 1, Type: raft.LogCommand, Data: p}
	}
	return l.wal.StoreLogs(logs)
}

func (l *raftWAL) flushes() (uint64, error) {
	s := l.metrics.Summary().Counters
	return s["log_appends"] + s["stable_sets"], nil
}

// close closes the database of its metadata, too, which Close leaves open: with
// its lock held, the directory could not be opened again.
func (l *raftWAL) close() error { return errors.Join(l.wal.Close(), l.meta.Close()) }

// reopenRaftWAL opens the log and reads all of it: opening alone looks at the last
// segment only, and says nothing about whether the others can be read.
func reopenRaftWAL(dir string) error {
	opened, err := openRaftWAL(dir)
	if err != nil {
		return err
	}
	l := opened.(*raftWAL)
	first, err := l.wal.FirstIndex()
	last, lastErr := l.wal.LastIndex()
	err = errors.Join(err, lastErr)
	for i := first; i <= last && err == nil; i++ {
		var entry raft.Log
		err = l.wal.GetLog(i, &entry)
	}
	return errors.Join(err, l.close())
}

// logFigures is what one log came to with one size of batch and payload.
type logFigures struct {
	contender   string
	size, batch int
	turns       []logTurn
}

type logTurn struct {
	p50, p99         float64 // µs
	flushes, written float64 // a batch; bytes a payload byte
}

func (f *logFigures) of(of func(logTurn) float64) float64 {
	var all []float64
	for _, t := range f.turns {
		all = append(all, of(t))
	}
	return median(all)
}

// logs compares the logs alone, without consensus above them.
func (b *bench) logs(ctx context.Context) error {
	rounds, batches, recovery := 6, 400, int64(256<<20)
	if b.short {
		if b.only.MatchString("local") {
			return nil // the short run is to be short; -only logs asks for it
		}
		rounds, batches, recovery = 3, 100, 64<<20
	}
	var all []*logFigures
	for _, size := range []int{128, 1024} {
		for _, batch := range []int{1, 16, 256} {
			figures, err := b.logBatches(ctx, size, batch, rounds, batches)
			if err != nil {
				return err
			}
			all = append(all, figures...)
			ours, etcd := figures[0], figures[1]
			name := fmt.Sprintf("log_%s_%d", sizeName(size), batch)
			for _, m := range []struct {
				name, unit string
				of         func(logTurn) float64
			}{
				{"_p50", "us", func(t logTurn) float64 { return t.p50 }},
				{"_written", "bytes_a_payload_byte", func(t logTurn) float64 { return t.written }},
			} {
				b.report.add(figure{name: name + m.name, quorate: ours.of(m.of), peer: etcd.of(m.of), unit: m.unit, peerIs: "etcd's WAL"})
			}
		}
	}
	b.report.logs = all
	if err := b.logGroups(ctx, rounds, batches); err != nil {
		return err
	}
	if err := b.logRecovery(ctx, recovery); err != nil {
		return err
	}
	b.logCode(ctx)
	return nil
}

// logBatches lets the logs take turns, each with a log of its own for the whole
// of it: A B C, C B A, …
func (b *bench) logBatches(ctx context.Context, size, batch, rounds, batches int) (_ []*logFigures, err error) {
	payloads := make([][]byte, batch)
	for i := range payloads {
		payloads[i] = bytes.Repeat([]byte{byte('a' + i%26)}, size)
	}
	var figures []*logFigures
	var open []durableLog
	dir := filepath.Join(b.dir, fmt.Sprintf("logs-%d-%d", size, batch))
	defer func() {
		for _, l := range open {
			err = errors.Join(err, l.close())
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	for _, c := range logContenders {
		l, err := c.open(filepath.Join(dir, c.name))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
		open = append(open, l)
		figures = append(figures, &logFigures{contender: c.name, size: size, batch: batch})
		for range 10 { // the first ones allocate and name files
			if err := l.append(payloads); err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
		}
	}
	for round := range rounds {
		for i := range open {
			if round%2 == 1 {
				i = len(open) - 1 - i
			}
			t, err := measureLog(ctx, open[i], payloads, batches)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", figures[i].contender, err)
			}
			figures[i].turns = append(figures[i].turns, t)
		}
	}
	progress("logs, %d bytes, batches of %d: done", size, batch)
	return figures, nil
}

func measureLog(ctx context.Context, l durableLog, payloads [][]byte, batches int) (t logTurn, err error) {
	written, err := writtenBytes()
	if err != nil {
		return t, err
	}
	flushes, err := l.flushes()
	if err != nil {
		return t, err
	}
	took := make([]float64, 0, batches)
	for range batches {
		began := time.Now()
		if err := l.append(payloads); err != nil {
			return t, err
		}
		took = append(took, micros(time.Since(began)))
		if ctx.Err() != nil {
			return t, ctx.Err()
		}
	}
	slices.Sort(took)
	writtenAfter, err := writtenBytes()
	if err != nil {
		return t, err
	}
	flushesAfter, err := l.flushes()
	n := float64(batches)
	return logTurn{
		p50: took[len(took)/2], p99: took[len(took)*99/100], flushes: float64(flushesAfter-flushes) / n,
		written: float64(writtenAfter-written) / n / float64(len(payloads)*len(payloads[0])),
	}, err
}

// writtenBytes is what this process has sent towards the disk, in whole pages of
// the cache; what the file system adds for itself is not in it.
func writtenBytes() (uint64, error) {
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "write_bytes: "); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 10, 64)
		}
	}
	return 0, errors.New("/proc/self/io tells no write_bytes")
}

// logGroupCount is how many groups write at once in logGroups.
const logGroupCount = 100

// logGroups has many groups write an entry each at the same time: in one log of
// ours, in a log for each of etcd's.
func (b *bench) logGroups(ctx context.Context, rounds, batches int) (err error) {
	dir := filepath.Join(b.dir, "logs-groups")
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	payload := [][]byte{bytes.Repeat([]byte("x"), 128)}
	log, _, err := slotlog.Open(slotlog.Config{Dir: filepath.Join(dir, "quorate")})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	ours := make([]*slotLog, logGroupCount)
	theirs := make([]durableLog, logGroupCount)
	for i := range logGroupCount {
		ours[i] = &slotLog{log: log}
		if theirs[i], err = openEtcdLog(filepath.Join(dir, fmt.Sprintf("etcd-%d", i))); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, theirs[i].close()) }()
	}
	once := func(start func(i int, durable func(error))) (time.Duration, error) {
		began := time.Now()
		results := make(chan error, logGroupCount)
		for i := range logGroupCount {
			start(i, func(err error) { results <- err })
		}
		var errs []error
		for range logGroupCount {
			errs = append(errs, <-results)
		}
		return time.Since(began), errors.Join(errs...)
	}
	var quorate, etcd []float64
	flushes := log.Stats().Flushes
	times := max(1, batches/20)
	for range rounds {
		for range times {
			took, err := once(func(i int, durable func(error)) { ours[i].appendTo(paxosgroup.GroupID(i+1), payload, durable) })
			if err != nil {
				return err
			}
			quorate = append(quorate, micros(took))
		}
		for range times {
			var writers sync.WaitGroup
			took, err := once(func(i int, durable func(error)) { writers.Go(func() { durable(theirs[i].append(payload)) }) })
			writers.Wait()
			if err != nil {
				return err
			}
			etcd = append(etcd, micros(took))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	b.report.add(figure{name: fmt.Sprintf("log_%d_groups", logGroupCount), quorate: median(quorate), peer: median(etcd), unit: "us",
		peerIs: "etcd's WAL, one for each group; an entry of 128 B in every group at once, p50 until all are flushed"})
	b.report.note("Logs, %d groups that write at once: %.1f flushes of ours together.", logGroupCount, float64(log.Stats().Flushes-flushes)/float64(len(quorate)))
	return nil
}

// logRecovery measures a restart on a log that holds so many bytes of payload, in
// entries of 1 KiB.
func (b *bench) logRecovery(ctx context.Context, size int64) (err error) {
	dir := filepath.Join(b.dir, "logs-recovery")
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	payloads := make([][]byte, 1024)
	for i := range payloads {
		payloads[i] = bytes.Repeat([]byte{byte(i)}, 1024)
	}
	for _, c := range logContenders {
		l, err := c.open(filepath.Join(dir, c.name))
		if err != nil {
			return err
		}
		for range size / (1 << 20) {
			if err := l.append(payloads); err != nil {
				return errors.Join(err, l.close())
			}
		}
		if err := l.close(); err != nil {
			return err
		}
	}
	took := make([][]float64, len(logContenders))
	for range 3 {
		for i, c := range logContenders {
			began := time.Now()
			if err := c.reopen(filepath.Join(dir, c.name)); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			took[i] = append(took[i], time.Since(began).Seconds()/float64(size)*(1<<30))
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
	b.report.add(figure{name: "log_recovery", quorate: median(took[0]), peer: median(took[1]), unit: "s_a_GiB", peerIs: "etcd's WAL, opened and read; from the page cache, 1 KiB entries"})
	b.report.add(figure{name: "log_recovery_hashicorp", quorate: median(took[0]), peer: median(took[2]), unit: "s_a_GiB", peerIs: "raft-wal, opened and read"})
	return nil
}

// logCode counts lines of Go that are not generated and not tests.
func (b *bench) logCode(ctx context.Context) {
	generated := regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)
	lines := make([]int, len(logContenders))
	for i, c := range logContenders {
		out, err := exec.CommandContext(ctx, "go", append([]string{"list", "-json=Dir,GoFiles"}, c.code...)...).Output()
		decoder := json.NewDecoder(bytes.NewReader(out))
		for err == nil && decoder.More() {
			var p struct {
				Dir     string
				GoFiles []string
			}
			if err = decoder.Decode(&p); err != nil {
				break
			}
			for _, name := range p.GoFiles {
				var text []byte
				if text, err = os.ReadFile(filepath.Join(p.Dir, name)); err == nil && !generated.Match(text) {
					lines[i] += bytes.Count(text, []byte("\n"))
				}
			}
		}
		if err != nil {
			b.report.note("Logs: lines of code are not counted: go list: %v (run it in test/consensus).", err)
			return
		}
	}
	b.report.add(figure{name: "log_code", quorate: float64(lines[0]), peer: float64(lines[1]), unit: "lines", peerIs: "etcd's WAL with the packages it is made of; comments included, tests and generated code not"})
	b.report.add(figure{name: "log_code_hashicorp", quorate: float64(lines[0]), peer: float64(lines[2]), unit: "lines", peerIs: "raft-wal with bbolt, which it keeps its metadata in"})
}

func (r *report) writeLogs(w io.Writer) {
	if len(r.logs) == 0 {
		return
	}
	fmt.Fprintln(w, "The logs alone, one group, one writer that waits for each flush; bytes written are whole pages, by /proc/self/io.")
	fmt.Fprintln(w)
	fmt.Fprintln(w, "| bytes | batch | log | p50 us | p99 us | flushes a batch | written a payload byte |\n|---|---|---|---|---|---|---|")
	for _, f := range r.logs {
		fmt.Fprintf(w, "| %d | %d | %s | %s | %s | %s | %s |\n", f.size, f.batch, f.contender,
			number(f.of(func(t logTurn) float64 { return t.p50 })), number(f.of(func(t logTurn) float64 { return t.p99 })),
			number(f.of(func(t logTurn) float64 { return t.flushes })), number(f.of(func(t logTurn) float64 { return t.written })))
	}
	fmt.Fprintln(w)
}
