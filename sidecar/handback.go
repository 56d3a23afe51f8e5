package sidecar

import (
	"context"
	"time"
)

// After an attempt to hand leadership back that came to nothing, the next waits
// this long, and twice as long each time.
const (
	handBackWaitMin = 15 * time.Second
	handBackWaitMax = 15 * time.Minute
)

// handBack hands leadership to the preferred region when consensus finds that
// due. It is a planned transfer like one that an operator asks for, since the
// fence has to close and what is under way to become effective first; consensus
// alone would leave commits behind that were not chosen.
func (s *shard) handBack(ctx context.Context) error {
	wait := handBackWaitMin
	for {
		changed := s.group.StatusChanged()
		if s.group.Status().HandBackDue == 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-changed:
			}
			continue
		}
		pause, err := s.transfer(ctx, s.cfg.PreferredLeader)
		if err == nil {
			s.log.Info("leadership was handed back", "region", s.cfg.PreferredLeader, "pause", pause)
			wait = handBackWaitMin
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.log.Warn("leadership could not be handed back", "region", s.cfg.PreferredLeader, "err", err, "again_after", wait)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait = min(2*wait, handBackWaitMax)
	}
}
