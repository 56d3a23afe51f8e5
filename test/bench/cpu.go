package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"quorate/deploy/sandbox/postgres"
)

// cpu is the processor time that the parts of a contender have used so far.
type cpu map[string]time.Duration

// The parts.
const (
	leaderServer    = "leader's server"
	leaderSidecar   = "leader's sidecar"
	followerServer  = "followers' servers"
	followerSidecar = "followers' sidecars"
	relays          = "relays"
)

var cpuParts = []string{leaderServer, leaderSidecar, followerServer, followerSidecar, relays}

// perCommit tells what each part has used since before, by commit.
func (c cpu) perCommit(before cpu, commits int) string {
	var told []string
	var sum time.Duration
	for _, part := range cpuParts {
		used := c[part] - before[part]
		if used <= 0 {
			continue
		}
		sum += used
		told = append(told, fmt.Sprintf("%s %d", part, (used/time.Duration(commits)).Microseconds()))
	}
	return fmt.Sprintf("%d µs (%s)", (sum / time.Duration(commits)).Microseconds(), strings.Join(told, ", "))
}

func (c *quorateCluster) cpu(ctx context.Context) cpu {
	used := cpu{relays: ownTime()}
	for _, r := range c.Status(ctx).Regions {
		if r.Region == first {
			used[leaderServer] += cpuTime(r.PostgresPID)
			used[leaderSidecar] += cpuTime(r.SidecarPID)
		} else {
			used[followerServer] += cpuTime(r.PostgresPID)
			used[followerSidecar] += cpuTime(r.SidecarPID)
		}
	}
	return used
}

func (q *quorumCommit) cpu(context.Context) cpu {
	used := cpu{relays: ownTime()}
	for i, s := range q.servers() {
		pid, ok := s.Running()
		if !ok {
			continue
		}
		if i == 0 {
			used[leaderServer] += cpuTime(pid)
		} else {
			used[followerServer] += cpuTime(pid)
		}
	}
	return used
}

// idle tells how much CPU each contender uses while nobody writes: what it takes
// from the other's turns.
func (b *bench) idle(ctx context.Context, place string, both []contender) error {
	for _, each := range both {
		if err := each.settle(ctx); err != nil {
			return err
		}
	}
	const span = 2 * time.Second
	var before []cpu
	for _, each := range both {
		before = append(before, each.cpu(ctx))
	}
	sleep(ctx, span)
	var told []string
	for i, each := range both {
		after := each.cpu(ctx)
		var used time.Duration
		for part, t := range after {
			if part != relays { // of both together
				used += t - before[i][part]
			}
		}
		told = append(told, fmt.Sprintf("%s %.1f %%", each.name(), 100*used.Seconds()/span.Seconds()))
	}
	b.report.note("%s: of one CPU, used while nobody writes: %s", place, strings.Join(told, ", "))
	return ctx.Err()
}

// cpuTime sums what a process has used, what its children have, and what those
// had that have ended.
func cpuTime(pid int) time.Duration {
	ticks := statTicks(pid, 11, 12, 13, 14)
	for _, child := range postgres.Children(pid) {
		ticks += statTicks(child, 11, 12)
	}
	return time.Duration(ticks) * 10 * time.Millisecond // the kernel's USER_HZ is 100 on every platform of Go
}

// statTicks sums fields of /proc/PID/stat, counted from 0 after the name: user
// and system time are 11 and 12, those of children waited for 13 and 14.
func statTicks(pid int, which ...int) int64 {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0 // ended meanwhile
	}
	stat := string(b)
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:]) // the name may hold spaces
	var ticks int64
	for i, f := range fields {
		if n, err := strconv.ParseInt(f, 10, 64); err == nil && slices.Contains(which, i) {
			ticks += n
		}
	}
	return ticks
}

// ownTime is what this process has used, without its children: the relays.
func ownTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
