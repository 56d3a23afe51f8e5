package sidecar

import (
	"context"
	"time"

	"quorate/paxosgroup"
)

// How often it is looked whether the log has room, and how long after an attempt
// to hand leadership over that came to nothing the next waits: each keeps clients
// from writing for a moment.
const (
	roomInterval = 100 * time.Millisecond
	roomWait     = 10 * time.Second
	roomHandOver = 5 * time.Second
)

// leadElsewhere hands leadership over while this region's log has no room for its
// next file. What is left of the last one is for the commits that are under way:
// when it is full this replica gives leadership up at once and learns no more of
// what is chosen, so that a COMMIT that still waits here would wait until there is
// room. If no other region takes it, this one leads on for as long as it can.
func (s *shard) leadElsewhere(ctx context.Context) error {
	tick := time.NewTicker(roomInterval)
	defer tick.Stop()
	var next time.Time
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if _, low := s.logRoom(); !low || time.Now().Before(next) || s.group.Status().Role != paxosgroup.Leader {
			continue
		}
		attempt, cancel := context.WithTimeout(ctx, roomHandOver)
		given := s.transferToAny(attempt)
		cancel()
		if !given {
			next = time.Now().Add(roomWait)
		}
	}
}
