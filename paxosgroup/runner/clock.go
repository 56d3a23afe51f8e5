package runner

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"quorate/paxosgroup"
)

// BootTime reads CLOCK_BOOTTIME.
func BootTime() paxosgroup.Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		// Every kernel since 2.6.39 has it, and no lease can be kept without.
		panic(fmt.Sprintf("runner: read CLOCK_BOOTTIME: %v", err))
	}
	return paxosgroup.Instant(ts.Nano())
}

// wallAheadMax is by how much the wall clock may gain on the boot clock between
// two looks before time is held to have been missed.
const wallAheadMax = 500 * time.Millisecond

// missedTime compares the boot clock with the wall clock.
type missedTime struct {
	wall time.Time
	boot paxosgroup.Instant
}

// look reports by how much the wall clock gained on the boot clock since the
// last look, or zero if by no more than setting it in small steps does.
func (m *missedTime) look(wall time.Time, boot paxosgroup.Instant) time.Duration {
	wall = wall.Round(0) // without the monotonic reading, which is what is doubted
	before := *m
	*m = missedTime{wall: wall, boot: boot}
	if before.wall.IsZero() {
		return 0
	}
	if ahead := wall.Sub(before.wall) - boot.Sub(before.boot); ahead > wallAheadMax {
		return ahead
	}
	return 0
}
