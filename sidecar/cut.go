package sidecar

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/jackc/pglogrepl"

	"quorate/paxosgroup"
	"quorate/replication/entry"
	"quorate/replication/replay"
	"quorate/sidecar/config"
)

// The log is cut by each region for itself, in two steps. Above log.keep_bytes it
// loses what nobody needs any more; above log.max_bytes also what regions that
// are behind or down would need, which are seeded anew then. Neither goes past
// what this region's own database has on disk: with a cut entry that database,
// and not the log, is the copy that counts.

const (
	// cutEvery is how often it is looked what could be cut.
	cutEvery = 2 * time.Second
	// imageHeldFor is how long at least after an image was shipped the log still
	// holds what its receiver goes on with. It has indexes to build, which takes
	// about as long as the shipping.
	imageHeldFor = 30 * time.Second
	// cutTo is what is left of a bound after a cut, so that not every look cuts.
	cutTo = 0.75
)

// needs are the bounds of a cut: the log is needed above each.
type needs struct {
	own    paxosgroup.Slot // for this region itself: never passed
	others paxosgroup.Slot // for other regions and the change feed
}

// cutAt returns up to where a log that begins after base, ends at last and takes
// size bytes is to be cut; base if it is not. Slots are taken to be alike in size.
func cutAt(base, last paxosgroup.Slot, size int64, cfg config.Log, n needs) paxosgroup.Slot {
	excess := func(bound config.ByteSize) paxosgroup.Slot {
		left := float64(bound) * cutTo
		if float64(size) <= left {
			return base
		}
		return base + paxosgroup.Slot(math.Ceil(float64(last-base)*(1-left/float64(size))))
	}
	to := base
	if size > int64(cfg.KeepBytes) {
		to = max(to, min(n.own, n.others, excess(cfg.KeepBytes)))
	}
	if size > int64(cfg.MaxBytes) {
		to = max(to, min(n.own, excess(cfg.MaxBytes)))
	}
	return to
}

// heldImage keeps the log above the slot of an image until its receiver had time
// to go on from there.
type heldImage struct {
	slot  paxosgroup.Slot
	until time.Time // zero: it is being shipped
}

// hold keeps the log above slot until the returned function was called, and a
// while longer.
func (s *shard) hold(slot paxosgroup.Slot) (release func()) {
	h, begun := &heldImage{slot: slot}, time.Now()
	s.mu.Lock()
	s.images = append(s.images, h)
	s.mu.Unlock()
	return func() {
		s.mu.Lock()
		h.until = time.Now().Add(max(imageHeldFor, time.Since(begun)))
		s.mu.Unlock()
	}
}

// heldBelow returns up to where no image holds the log. The caller holds mu.
func (s *shard) heldBelow(now time.Time) paxosgroup.Slot {
	s.images = slices.DeleteFunc(s.images, func(h *heldImage) bool { return !h.until.IsZero() && now.After(h.until) })
	lowest := paxosgroup.Slot(math.MaxUint64)
	for _, h := range s.images {
		lowest = min(lowest, h.slot)
	}
	return lowest
}

// neededByOthers returns up to where no other region needs this one's log, as
// far as is known: one that was never heard of needs all of it. A region with a
// database may have to go on from what it has on disk, a witness from what it
// knows to be chosen.
func (s *shard) neededByOthers(m paxosgroup.Membership, self paxosgroup.ReplicaID) paxosgroup.Slot {
	lowest := paxosgroup.Slot(math.MaxUint64)
	for _, member := range m.Members {
		if member.ID == self || member.Region == s.cfg.Region {
			continue
		}
		r := s.others.heard(member.Region)
		switch {
		case r.ReplicaID != member.ID:
			lowest = 0 // its successor, or nothing, was heard
		case member.Kind == paxosgroup.Witness:
			lowest = min(lowest, r.Chosen)
		default:
			lowest = min(lowest, r.Durable)
		}
	}
	if s.cfg.Feed.Enabled {
		lowest = min(lowest, s.feedNeeds())
	}
	return lowest
}

// feedNeeds returns up to where the change feed has been published: as this
// region's publisher says, or else as the leader's was heard to.
func (s *shard) feedNeeds() paxosgroup.Slot {
	next := s.feedNext()
	for _, r := range s.cfg.Regions {
		if r.Name != s.cfg.Region {
			next = max(next, s.others.heard(r.Name).FeedNext)
		}
	}
	return next - min(next, 1)
}

// feedNext returns below which slot this region's publisher has published
// everything; 0 if it does not publish.
func (s *shard) feedNext() paxosgroup.Slot {
	s.mu.Lock()
	p := s.publisher
	s.mu.Unlock()
	if p == nil {
		return 0
	}
	return paxosgroup.Slot(p.Status().Slot)
}

// trim counts what the database has on disk, and cuts the log, until ctx ends.
func (se *session) trim(ctx context.Context) error {
	tick := time.NewTicker(cutEvery)
	defer tick.Stop()
	var told string
	var redelivered entry.LSN // as of the look before: surely on the server's disk by now
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := se.makeDurable(ctx); err != nil {
			return endOf(ctx, fmt.Errorf("count what is on disk: %w", err))
		}
		var at *string
		err := se.position.QueryRow(ctx, "SELECT restart_lsn::text FROM pg_replication_slots WHERE slot_name = $1", se.incarnationName()).Scan(&at)
		if err != nil {
			return endOf(ctx, fmt.Errorf("read the replication slot's position: %w", err))
		}
		if redelivered > 0 {
			// That the log cannot be cut now harms nobody yet.
			if err := se.cutLog(ctx, redelivered); err != nil && ctx.Err() == nil && err.Error() != told {
				told = err.Error()
				se.log.Warn("the log could not be cut; it is tried again", "err", err)
			}
		}
		if at != nil {
			lsn, err := pglogrepl.ParseLSN(*at)
			if err != nil {
				return err
			}
			redelivered = max(redelivered, lsn)
		}
	}
}

// makeDurable has the origin's progress name what is applied, own entries and
// those that write nothing included, and notes how far it is on disk. Own entries
// came out of flushed WAL; that the server still has them is known once the
// session has looked for all that it should have.
func (se *session) makeDurable(ctx context.Context) error {
	se.mu.Lock()
	sure := !se.looking && (se.settled || !se.proposing.IsZero())
	applied, durable := se.applied, se.durable
	if se.divergent != "" {
		sure, applied = false, durable // its word counts for nothing
	}
	se.mu.Unlock()
	if applied > durable && sure && se.replay.Progress() < uint64(applied) {
		if err := se.lockApplying(ctx); err != nil {
			return err
		}
		se.mu.Lock()
		applied = se.applied
		se.mu.Unlock()
		var err error
		if uint64(applied) > se.replay.Applied() {
			err = se.replay.ForceProgress(ctx, []replay.Transaction{{Slot: uint64(applied)}})
		}
		se.unlockApplying()
		if err != nil {
			return err
		}
	}
	if applied == durable {
		return nil
	}
	flushed, err := se.replay.Flushed(ctx)
	if err != nil {
		return err
	}
	se.mu.Lock()
	// What is not whole is of no use to others: they need its first fragment, and
	// where that is is known only of what was learned.
	if se.divergent == "" {
		se.durable = max(se.durable, se.large.whole(min(paxosgroup.Slot(flushed), se.learned)))
	}
	se.mu.Unlock()
	return nil
}

// cutLog cuts the log if it is due. Below redelivered the server hands no commit
// over again.
func (se *session) cutLog(ctx context.Context, redelivered entry.LSN) error {
	st := se.group.Status()
	size := se.logBytes()
	if size <= int64(se.cfg.Log.KeepBytes) {
		return nil
	}
	n := needs{others: se.neededByOthers(st.Membership, st.ID)}
	se.mu.Lock()
	// Own commits that the server may hand over again are recognised by what the
	// log holds of them.
	n.own = min(se.durable, se.learned, se.heldBelow(time.Now()), se.own.through(redelivered))
	to := cutAt(st.Base, st.Chosen, size, se.cfg.Log, n)
	to = se.large.whole(to)
	if to <= st.Base {
		se.mu.Unlock()
		return nil
	}
	f := footing{Incarnation: se.incarnation, Slot: to, LastForeign: se.ground.LastForeign, EffectiveLSN: se.ground.EffectiveLSN, Redelivered: max(redelivered, se.ground.Redelivered)}
	for _, t := range se.foreign {
		if t.slot <= to {
			f.LastForeign = t.term
		}
	}
	if lsn, ok := se.own.lastAt(to); ok {
		f.EffectiveLSN = lsn
	}
	se.mu.Unlock()
	err := se.member.mark(func(id *identity) {
		id.Cut = true
		id.Footings = afterCut(id.Footings, st.Base, f)
	})
	if err != nil {
		return err
	}
	if err := se.group.Truncate(ctx, to); err != nil {
		return fmt.Errorf("cut the log at slot %d: %w", to, err)
	}
	se.mu.Lock()
	se.ground = f
	se.foreign = slices.DeleteFunc(se.foreign, func(t foreignTerm) bool { return t.slot <= to })
	se.large.forget(to)
	se.mu.Unlock()
	if to > n.others {
		se.log.Warn("the log was cut past regions that are behind or down: they will be seeded anew", "slot", to, "needed_above", n.others, "bytes", size)
	} else {
		se.log.Debug("the log was cut", "slot", to, "bytes", size)
	}
	return nil
}

// trimWitness cuts the log of a region without a database: up to where so many
// databases hold everything on disk that nothing rests on this log.
func (s *shard) trimWitness(ctx context.Context) error {
	if _, err := s.others.Status(ctx, true); err != nil { // hears how the others are
		return err
	}
	st := s.group.Status()
	size := s.logBytes()
	if size <= int64(s.cfg.Log.KeepBytes) {
		return nil
	}
	var durable []paxosgroup.Slot
	for _, member := range st.Membership.Members {
		if member.Kind != paxosgroup.Voter {
			continue
		}
		if r := s.others.heard(member.Region); r.ReplicaID == member.ID {
			durable = append(durable, r.Durable)
		}
	}
	slices.Sort(durable)
	slices.Reverse(durable)
	needed := holdersNeeded(st.Membership)
	if len(durable) < needed {
		return nil
	}
	n := needs{own: min(durable[needed-1], st.Chosen), others: s.neededByOthers(st.Membership, st.ID)}
	to := cutAt(st.Base, st.Chosen, size, s.cfg.Log, n)
	if to <= st.Base {
		return nil
	}
	if err := s.group.Truncate(ctx, to); err != nil {
		return fmt.Errorf("cut the log at slot %d: %w", to, err)
	}
	s.log.Debug("the log was cut", "slot", to, "bytes", size)
	return nil
}
