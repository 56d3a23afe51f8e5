package main

import (
	"context"
	"os"
	"strconv"
	"strings"
	"time"

	"quorate/deploy/sandbox/postgres"
)

// idle tells how much CPU each contender uses while nobody writes: what it takes
// from the other's turns.
func (b *bench) idle(ctx context.Context, place string, ours *quorateCluster, peer *quorumCommit) error {
	for _, each := range []contender{ours, peer} {
		if err := each.settle(ctx); err != nil {
			return err
		}
	}
	var oursPIDs, peerPIDs []int
	for _, r := range ours.Status(ctx).Regions {
		oursPIDs = append(oursPIDs, r.SidecarPID, r.PostgresPID)
	}
	for _, s := range peer.servers() {
		if pid, ok := s.Running(); ok {
			peerPIDs = append(peerPIDs, pid)
		}
	}
	const span = 2 * time.Second
	oursBefore, peerBefore := cpuTime(oursPIDs), cpuTime(peerPIDs)
	sleep(ctx, span)
	share := func(d time.Duration) float64 { return 100 * d.Seconds() / span.Seconds() }
	b.report.note("%s: CPU used while idle, in percent of one: quorate %.1f, peer %.1f", place, share(cpuTime(oursPIDs)-oursBefore), share(cpuTime(peerPIDs)-peerBefore))
	return nil
}

// cpuTime sums what processes and their children have used, in the kernel's
// ticks of 10 ms.
func cpuTime(pids []int) time.Duration {
	var ticks int64
	for _, pid := range pids {
		for _, p := range append([]int{pid}, postgres.Children(pid)...) {
			stat, err := os.ReadFile("/proc/" + strconv.Itoa(p) + "/stat")
			if err != nil {
				continue // ended meanwhile
			}
			// The name, in brackets, may hold spaces; user and system time are
			// the twelfth and thirteenth field after it.
			fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
			for _, f := range fields[11:13] {
				n, err := strconv.ParseInt(f, 10, 64)
				if err == nil {
					ticks += n
				}
			}
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}
