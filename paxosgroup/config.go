package paxosgroup

import (
	"errors"
	"fmt"
	"time"
)

// Config is what a replica is told once. Zero values take the default.
type Config struct {
	Group  GroupID
	ID     ReplicaID
	Region string

	HeartbeatInterval  time.Duration // default 100 ms
	TickInterval       time.Duration // at which Tick is called at least; default 10 ms
	ElectionTimeoutMin time.Duration // default 150 ms; longer where round trips are
	LeaseDuration      time.Duration // default 1.5 s, the same in every replica
	ClockDriftPPMMax   int64         // bound on a clock's rate error; default 1000, -1 means none

	WindowSlotsMax int // undecided slots a leader may have; default 8192
	WindowBytesMax int // and bytes of payload; default 16 MiB. A promise carries at most about twice that
	// What may be on its way to one follower, at most: the window adapts to the
	// link (flow.go). Default 4 × WindowSlotsMax and 2 × WindowBytesMax.
	FollowerSlotsMax int
	FollowerBytesMax int

	PreferredRegion    string // others wait a little longer at an election; may be empty
	HandBack           bool   // Status tells the leader when the preferred region could take over
	Seed               uint64 // of the replica's random numbers
	RestartedWithState bool   // it may have granted a lease it has forgotten
}

func (c *Config) fillDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.HeartbeatInterval, 100*time.Millisecond)
	def(&c.TickInterval, 10*time.Millisecond)
	def(&c.ElectionTimeoutMin, 150*time.Millisecond)
	def(&c.LeaseDuration, 1500*time.Millisecond)
	switch c.ClockDriftPPMMax {
	case 0:
		c.ClockDriftPPMMax = 1000
	case -1:
		c.ClockDriftPPMMax = 0
	}
	if c.WindowSlotsMax == 0 {
		c.WindowSlotsMax = 8192
	}
	if c.WindowBytesMax == 0 {
		c.WindowBytesMax = 16 << 20
	}
	if c.FollowerSlotsMax == 0 {
		c.FollowerSlotsMax = 4 * c.WindowSlotsMax
	}
	if c.FollowerBytesMax == 0 {
		c.FollowerBytesMax = 2 * c.WindowBytesMax
	}
}

func (c Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.ID == 0 {
		bad("id: must not be zero")
	}
	if c.HeartbeatInterval <= 0 || c.TickInterval <= 0 || c.ElectionTimeoutMin <= 0 {
		bad("heartbeat interval, tick interval and election timeout: must be positive")
	}
	if c.LeaseDuration < 3*c.HeartbeatInterval {
		bad("lease duration: %v is less than three heartbeats of %v", c.LeaseDuration, c.HeartbeatInterval)
	}
	if c.ClockDriftPPMMax < 0 || c.ClockDriftPPMMax > 100_000 {
		bad("clock drift: %d ppm is not within 0 to 100000", c.ClockDriftPPMMax)
	}
	if c.FollowerSlotsMax < 1 || c.FollowerBytesMax < 1 {
		bad("window of a follower: %d slots and %d bytes must be positive", c.FollowerSlotsMax, c.FollowerBytesMax)
	}
	if c.WindowSlotsMax < 1 || c.WindowBytesMax < 1 {
		bad("window: %d slots and %d bytes must be positive", c.WindowSlotsMax, c.WindowBytesMax)
	}
	return errors.Join(errs...)
}

// leaderLease is how long, from sending, a leader may rely on a grant that runs
// LeaseDuration from receipt on a clock that may be fast, while its own may be
// slow: D(1-r)/(1+r) is never less than D(1-2r).
func (c Config) leaderLease() time.Duration {
	return c.LeaseDuration - time.Duration(int64(c.LeaseDuration)/1_000_000*2*c.ClockDriftPPMMax) - 1
}

// leaseReserve is what is left of a lease when its holder does not rely on
// shared beats any more to renew it.
func (c Config) leaseReserve() time.Duration { return c.LeaseDuration / 3 }
