package sidecar

import (
	"context"
	"fmt"
	"sync"
	"time"

	"quorate/paxosgroup"
	"quorate/sidecar/admin"
	"quorate/sidecar/config"
	"quorate/sidecar/sidecarpb"
)

// behindEvery is how often it is looked whether the others have cut their logs
// past what is missing here.
const behindEvery = 500 * time.Millisecond

// witness is the life of a region without a database: it votes and keeps the
// log, which the group does by itself. What is left to do is to go on from where
// the others' logs begin if they no longer hold what is missing here.
func (s *shard) witness(ctx context.Context) error {
	s.group.SetElectable(false)
	s.set(func() { s.state = admin.StateWitness })
	tick := time.NewTicker(behindEvery)
	defer tick.Stop()
	told := ""
	for looks := 0; ; looks++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if looks%int(cutEvery/behindEvery) == 0 {
			if err := s.trimWitness(ctx); err != nil && ctx.Err() == nil && err.Error() != told {
				told = err.Error()
				s.log.Warn("the log could not be cut; it is tried again", "err", err)
			}
		}
		if !s.group.NeedsSnapshot() {
			continue
		}
		base, err := witnessBase(ctx, s.cfg, s.others.peers, s.clusterID, s.group.Status().Chosen+1)
		if err != nil {
			s.set(func() { s.health = "the others no longer hold what is missing here: " + err.Error() })
			continue
		}
		if err := s.group.Restart(ctx, base); err != nil {
			return endOf(ctx, err)
		}
		s.set(func() { s.health = "" })
		s.log.Info("went on where the others' logs begin, having been behind them", "slot", base.Slot)
	}
}

// witnessBase returns where the log of a witness may begin, at a slot or above:
// where that of some region does, the lowest. Everything below is on disk in so many
// databases that nothing rests on this log.
func witnessBase(ctx context.Context, cfg *config.Config, peers *regionClients, clusterID uint64, from paxosgroup.Slot) (paxosgroup.Base, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var mu sync.Mutex
	var bases []paxosgroup.Base
	var durable []paxosgroup.Slot
	var asking sync.WaitGroup
	for _, r := range cfg.Regions {
		if r.Name == cfg.Region {
			continue
		}
		asking.Go(func() {
			c, err := peers.cluster(r.Name)
			if err != nil {
				return
			}
			reply, err := c.Region(ctx, &sidecarpb.RegionRequest{ClusterId: clusterID})
			if err != nil {
				return
			}
			began, err := c.Base(ctx, &sidecarpb.BaseRequest{ClusterId: clusterID})
			if err != nil {
				return
			}
			base, err := paxosgroup.DecodeBase(began.Base)
			if err != nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			bases = append(bases, base)
			if reply.Kind == memberKind(paxosgroup.Voter) {
				durable = append(durable, paxosgroup.Slot(reply.Durable))
			}
		})
	}
	asking.Wait()
	var best *paxosgroup.Base
	short := false
	for i := range bases {
		b := &bases[i]
		if b.Slot < from {
			continue
		}
		holding := 0
		for _, d := range durable {
			if d >= b.Slot {
				holding++
			}
		}
		if holding < holdersNeeded(b.Membership) && b.Slot > 0 {
			short = true
			continue
		}
		if best == nil || b.Slot < best.Slot {
			best = b
		}
	}
	switch {
	case best != nil:
		return *best, nil
	case short:
		return paxosgroup.Base{}, fmt.Errorf("too few of the regions that answer have on disk what the others' logs no longer hold")
	}
	return paxosgroup.Base{}, fmt.Errorf("no region tells where its log begins")
}

// holdersNeeded is in how many databases a slot must be on disk before the log
// of a witness may do without it: in a majority of them, and in one more than
// the regions whose loss is to lose nothing.
func holdersNeeded(m paxosgroup.Membership) int {
	return max(databasesOf(m)/2+1, durability(m)+1)
}
