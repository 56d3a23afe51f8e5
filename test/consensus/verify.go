package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// verifyFlushes has strace, where it is to be had, count the flushes of every
// process of a contender beside the contender's own counters.
func (b *bench) verifyFlushes(ctx context.Context, c *cluster) {
	path, err := exec.LookPath("strace")
	if err != nil {
		b.report.note("strace is not here: the flushes of %s are its own count.", c.contender)
		return
	}
	const proposers, size = 16, 128
	if _, err := c.leader.do(command{Do: "load", Proposers: proposers, Bytes: size}); err != nil {
		b.report.note("Flushes of %s were not verified: %v.", c.contender, err)
		return
	}
	counted := func() (n uint64) {
		for _, p := range c.running() {
			if a, err := p.do(command{Do: "counters"}); err == nil {
				n += a.Counters.Flushes
			}
		}
		return n
	}
	var tracing sync.WaitGroup
	var mu sync.Mutex
	seen := uint64(0)
	before := counted()
	for _, p := range c.running() {
		tracing.Go(func() {
			out := filepath.Join(p.dir, "strace")
			cmd := exec.Command(path, "-f", "-qq", "-c", "-U", "name,calls", "-e", "trace=fdatasync,fsync", "-o", out, "-p", strconv.Itoa(p.cmd.Process.Pid))
			if cmd.Start() != nil {
				return
			}
			pause(ctx, 2*time.Second)
			_ = cmd.Process.Signal(os.Interrupt) // it then writes its table
			_ = cmd.Wait()
			table, err := os.ReadFile(out)
			if err != nil {
				return
			}
			mu.Lock()
			seen += callsIn(table)
			mu.Unlock()
		})
	}
	tracing.Wait()
	after := counted()
	a, err := c.leader.do(command{Do: "finish"})
	if err != nil || a.Load.Failed > 0 {
		b.report.note("Flushes of %s were not verified: %v.", c.contender, err)
		return
	}
	b.report.note("%s: strace saw %d fdatasync and fsync in about 2 s of 16 proposers, five processes together, while its own counters rose by %d.", c.contender, seen, after-before)
	if seen == 0 {
		b.report.note("THAT MEANS THAT %s DOES NOT FLUSH, or that strace was not allowed to look.", strings.ToUpper(c.contender))
	}
}

// callsIn sums the calls of a table of strace -c -U name,calls.
func callsIn(table []byte) (n uint64) {
	for line := range bytes.Lines(table) {
		fields := strings.Fields(string(line))
		if len(fields) == 2 && (fields[0] == "fdatasync" || fields[0] == "fsync") {
			calls, _ := strconv.ParseUint(fields[1], 10, 64)
			n += calls
		}
	}
	return n
}
