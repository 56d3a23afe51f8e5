package runner

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"quorate/paxosgroup"
)

// Group is one group as its users see it. Its methods may be called from any
// goroutine.
type Group struct {
	runner  *Runner
	id      paxosgroup.GroupID
	storage paxosgroup.Storage
	lease   time.Duration

	status  atomic.Pointer[paxosgroup.Status]
	applied atomic.Uint64
	// unflushed counts the Readies whose records are with the log and not
	// flushed. While there are any, every AfterSync goes by way of the log.
	unflushed atomic.Int64
	needImage atomic.Bool

	mu            sync.Mutex
	recent        recent
	history       history
	chosenMoved   chan struct{} // nil if nobody watches
	statusChanged chan struct{} // nil if nobody watches

	// The loop's own.
	core        *paxosgroup.Replica
	dirty       bool
	deadline    paxosgroup.Instant
	brief       paxosgroup.Brief // as published
	publishedAt paxosgroup.Instant
	stale       bool        // progress was made since
	waiting     []*proposal // oldest first
}

func (r *Runner) newGroup(gc GroupConfig) (*Group, error) {
	id := gc.Core.Group
	fail := func(err error) (*Group, error) { return nil, fmt.Errorf("runner: group %d: %w", id, err) }
	restored, known := r.cfg.Restored[id]
	if known {
		gc.Core.RestartedWithState = true
	} else if len(gc.Bootstrap.Members) > 0 {
		if err := gc.Bootstrap.Validate(); err != nil {
			return fail(err)
		}
		restored.Base.Membership = gc.Bootstrap
		// Kept, so that a restart starts from the same. Whatever this replica
		// promises later is flushed behind it.
		base := restored.Base
		g := &Group{id: id}
		r.cfg.Log.Append(id, []paxosgroup.Record{{Kind: paxosgroup.RecordBase, Base: &base}}, func(err error) {
			if err != nil {
				r.durable(flushed{group: g}, err)
			}
		})
	}
	if gc.RecentBytesMax == 0 {
		gc.RecentBytesMax = recentBytesDefault
	}
	if gc.RecentEntriesMax == 0 {
		gc.RecentEntriesMax = recentEntriesDefault
	}
	g := &Group{
		runner:  r,
		id:      id,
		storage: r.cfg.Log.Group(id),
		lease:   gc.Core.LeaseDuration,
		recent:  recent{bytesMax: gc.RecentBytesMax, entriesMax: gc.RecentEntriesMax},
		history: newHistory(restored.Base),
	}
	if g.lease == 0 {
		g.lease = 1500 * time.Millisecond
	}
	core, err := paxosgroup.New(gc.Core, restored, g.storage, r.cfg.Clock())
	if err != nil {
		return fail(err)
	}
	g.core = core
	g.deadline = core.NextDeadline()
	if err := g.rebuild(core.Status()); err != nil {
		return fail(err)
	}
	g.publish(r.cfg.Clock())
	return g, nil
}

// rebuild judges the log once more, for the history.
func (g *Group) rebuild(s paxosgroup.Status) error {
	const chunkBytes = 4 << 20
	for g.history.last < s.Chosen {
		entries, err := g.storage.Chosen(g.history.last+1, s.Chosen, chunkBytes)
		if err != nil {
			return fmt.Errorf("judge the log: %w", err)
		}
		if len(entries) == 0 {
			return fmt.Errorf("judge the log: slot %d is missing", g.history.last+1)
		}
		for _, e := range entries {
			v := g.history.add(e.Entry)
			g.recent.add(paxosgroup.Delivered{Slot: e.Slot, Entry: e.Entry, Verdict: v})
		}
	}
	if g.history.judge != s.Judge {
		panic(fmt.Sprintf("runner: group %d: the history judges %+v where the core judges %+v at slot %d", g.id, g.history.judge, s.Judge, s.Chosen))
	}
	return nil
}

// settle takes what proposals there is room for and pays what the core owes.
func (g *Group) settle(now paxosgroup.Instant) {
	g.core.SetApplied(paxosgroup.Slot(g.applied.Load()))
	for {
		g.propose(now)
		rd, ok := g.core.Ready()
		if !ok {
			break
		}
		g.pay(rd)
	}
	g.publish(now)
	g.deadline = g.core.NextDeadline()
	if g.stale {
		g.deadline = min(g.deadline, g.publishedAt.Add(statusAgeMax))
	}
}

// pay does what a Ready asks for.
func (g *Group) pay(rd paxosgroup.Ready) {
	r := g.runner
	if len(rd.Send) > 0 {
		r.cfg.Transport.Send(g.id, rd.Send)
	}
	flush := false
	for _, rec := range rd.Persist {
		flush = flush || rec.NeedsFlush()
		if rec.Kind == paxosgroup.RecordBase {
			g.restarted(*rec.Base)
		}
	}
	switch {
	case flush || len(rd.AfterSync) > 0 && g.unflushed.Load() > 0:
		if flush {
			r.stats.batches.Add(1)
		}
		g.unflushed.Add(1)
		stepped, appended := r.loop.stepped, time.Time{}
		if r.cfg.Accepted != nil {
			appended = time.Now()
		}
		r.cfg.Log.Append(g.id, rd.Persist, func(err error) {
			if err == nil && r.cfg.Accepted != nil {
				defer g.tellAccepted(rd.Persist, stepped, appended, time.Now())
			}
			if err == nil && len(rd.AfterSync) > 0 {
				// From here, not from the loop: a leader waits for it.
				r.cfg.Transport.Send(g.id, rd.AfterSync)
			}
			if err == nil {
				// After a failure it stays: nothing may leave that rests on it.
				g.unflushed.Add(-1)
			}
			if err != nil || flush {
				r.durable(flushed{group: g, seq: rd.Seq}, err)
			}
		})
	default:
		if len(rd.Persist) > 0 {
			r.cfg.Log.Append(g.id, rd.Persist, func(err error) {
				if err != nil {
					r.durable(flushed{group: g, seq: rd.Seq}, err)
				}
			})
		}
		if len(rd.AfterSync) > 0 {
			r.cfg.Transport.Send(g.id, rd.AfterSync)
		}
	}
	if len(rd.Delivered) > 0 {
		g.deliver(rd.Delivered)
	}
	if rd.Snapshot {
		g.needImage.Store(true)
	}
}

func (g *Group) tellAccepted(recs []paxosgroup.Record, stepped, appended, durable time.Time) {
	for _, rec := range recs {
		if rec.Kind == paxosgroup.RecordAccept {
			g.runner.cfg.Accepted(g.id, paxosgroup.SlotEntry{Slot: rec.Slot, Entry: rec.Entry}, stepped, appended, durable)
		}
	}
}

// deliver makes chosen entries readable.
func (g *Group) deliver(entries []paxosgroup.Delivered) {
	g.runner.stats.delivered.Add(uint64(len(entries)))
	g.needImage.Store(false)
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, d := range entries {
		if d.Slot != g.history.last+1 {
			panic(fmt.Sprintf("runner: group %d: slot %d delivered after %d", g.id, d.Slot, g.history.last))
		}
		if v := g.history.add(d.Entry); v != d.Verdict {
			panic(fmt.Sprintf("runner: group %d: slot %d delivered with verdict %d, judged %d", g.id, d.Slot, d.Verdict, v))
		}
		g.recent.add(d)
	}
	if g.chosenMoved != nil {
		close(g.chosenMoved)
		g.chosenMoved = nil
	}
}

// restarted forgets what an image has replaced.
func (g *Group) restarted(b paxosgroup.Base) {
	g.needImage.Store(false)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.recent.reset()
	g.history = newHistory(b)
	if g.chosenMoved != nil {
		close(g.chosenMoved)
		g.chosenMoved = nil
	}
}

// statusAgeMax bounds how far the progress that Status shows may lag behind.
const statusAgeMax = 5 * time.Millisecond

// publish makes the core's status visible: at once what others watch for,
// progress only now and then, since a Status has to be made anew each time.
func (g *Group) publish(now paxosgroup.Instant) {
	brief := g.core.Brief()
	turned := brief != g.brief
	if !turned && now.Sub(g.publishedAt) < statusAgeMax && g.status.Load() != nil {
		g.stale = true
		return
	}
	s := g.core.Status()
	g.status.Store(&s)
	g.brief, g.publishedAt, g.stale = brief, now, false
	if !turned {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.statusChanged != nil {
		close(g.statusChanged)
		g.statusChanged = nil
	}
}

// Status returns a snapshot of the replica. What StatusChanged tells of is of
// now, the rest at most 5 ms old. It costs a load. What it points to is shared and must not be changed.
func (g *Group) Status() paxosgroup.Status { return *g.status.Load() }

// StatusChanged returns a channel that is closed when role, ballot, leader,
// membership, base or term of the judge change next, or a lease comes or goes.
// Take it before looking at Status.
func (g *Group) StatusChanged() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.statusChanged == nil {
		g.statusChanged = make(chan struct{})
	}
	return g.statusChanged
}

// Chosen returns the highest slot up to which everything is chosen and can be
// read, and a channel that is closed when it has moved.
func (g *Group) Chosen() (paxosgroup.Slot, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.chosenMoved == nil {
		g.chosenMoved = make(chan struct{})
	}
	return g.history.last, g.chosenMoved
}

// NeedsSnapshot reports whether this replica is behind the bases of all peers,
// so that only an image helps. StatusChanged does not tell of it.
func (g *Group) NeedsSnapshot() bool { return g.needImage.Load() }

// Read returns consecutive chosen entries from slot from on with their verdicts:
// at least one, beyond it up to maxBytes of payload, and none if from is not
// chosen yet. It returns ErrCompacted if from is at or below the base. Payloads
// are shared and must not be changed.
func (g *Group) Read(from paxosgroup.Slot, maxBytes int) ([]paxosgroup.Delivered, error) {
	g.mu.Lock()
	base, last, first := g.history.base.Slot, g.history.last, g.recent.first()
	if from > base && from <= last && first != 0 && from >= first {
		defer g.mu.Unlock()
		return g.recent.read(from, maxBytes), nil
	}
	g.mu.Unlock()
	if from <= base {
		return nil, fmt.Errorf("read slot %d of group %d above base %d: %w", from, g.id, base, ErrCompacted)
	}
	if from > last {
		return nil, nil
	}
	to := last
	if first != 0 {
		to = first - 1
	}
	entries, err := g.storage.Chosen(from, to, maxBytes)

	g.mu.Lock()
	defer g.mu.Unlock()
	if base := g.history.base.Slot; from <= base {
		return nil, fmt.Errorf("read slot %d of group %d above base %d: %w", from, g.id, base, ErrCompacted)
	}
	if err != nil {
		return nil, fmt.Errorf("read group %d: %w", g.id, err)
	}
	if len(entries) == 0 {
		return nil, fmt.Errorf("read group %d: slot %d is chosen up to %d and not in the log", g.id, from, last)
	}
	delivered := make([]paxosgroup.Delivered, len(entries))
	for i, e := range entries {
		delivered[i] = paxosgroup.Delivered{Slot: e.Slot, Entry: e.Entry, Verdict: g.history.verdict(e.Slot)}
	}
	return delivered, nil
}

// BaseAt returns the base that an image of everything up to slot has.
func (g *Group) BaseAt(slot paxosgroup.Slot) (paxosgroup.Base, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if slot < g.history.base.Slot {
		return paxosgroup.Base{}, fmt.Errorf("base of group %d at slot %d: %w", g.id, slot, ErrCompacted)
	}
	if slot > g.history.last {
		return paxosgroup.Base{}, fmt.Errorf("base of group %d at slot %d: chosen only up to %d", g.id, slot, g.history.last)
	}
	return g.history.at(slot), nil
}

// SetElectable says whether the database could lead; see paxosgroup.
func (g *Group) SetElectable(ok bool) {
	g.runner.tell(g, func(paxosgroup.Instant) { g.core.SetElectable(ok) })
}

// SetIncarnation sets what goes into openings.
func (g *Group) SetIncarnation(i paxosgroup.Incarnation) {
	g.runner.tell(g, func(paxosgroup.Instant) { g.core.SetIncarnation(i) })
}

// SetApplied sets what peers are told is applied here. It costs a store.
func (g *Group) SetApplied(s paxosgroup.Slot) { g.applied.Store(uint64(s)) }

// Resign gives up leadership and lease.
func (g *Group) Resign() {
	g.runner.tell(g, func(now paxosgroup.Instant) { g.core.Resign(now) })
}

// Restart puts an image in place of everything at or below b.Slot and returns
// when that is recorded in order, though perhaps not flushed yet: whatever this
// replica says from now on is flushed behind it.
func (g *Group) Restart(ctx context.Context, b paxosgroup.Base) error {
	if err := b.Membership.Validate(); err != nil {
		return fmt.Errorf("restart group %d at slot %d: %w", g.id, b.Slot, err)
	}
	return g.runner.ask(ctx, g, func(now paxosgroup.Instant) error {
		g.core.Restart(now, b)
		return nil
	})
}

// Transfer hands leadership to another voter and returns when it leads, or says
// why it does not.
func (g *Group) Transfer(ctx context.Context, to paxosgroup.ReplicaID) error {
	fail := func(err error) error {
		return fmt.Errorf("transfer leadership of group %d to replica %d: %w", g.id, to, err)
	}
	if err := g.runner.ask(ctx, g, func(now paxosgroup.Instant) error { return g.notLeader(g.core.Transfer(now, to)) }); err != nil {
		return fail(err)
	}
	// The core gives up after two leases, an election takes its own time.
	ctx, cancel := context.WithTimeout(ctx, 4*g.lease)
	defer cancel()
	deadline := g.runner.cfg.Clock().Add(2*g.lease + g.lease/4)
	for {
		changed := g.StatusChanged()
		s := g.Status()
		switch {
		case s.Leader == to && s.Role != paxosgroup.Leader:
			return nil
		case s.Role == paxosgroup.Leader && g.runner.cfg.Clock() > deadline:
			return fail(errors.New("it did not catch up in time, leadership stays here"))
		case s.Role != paxosgroup.Leader && s.Leader != 0 && s.Leader != s.ID:
			return fail(fmt.Errorf("replica %d was elected", s.Leader))
		}
		select {
		case <-changed:
		case <-time.After(g.lease / 4):
		case <-ctx.Done():
			return fail(context.Cause(ctx))
		}
	}
}

// ChangeMembership proposes m, whose epoch is set here, and returns when it is
// in force, or says why it is not.
func (g *Group) ChangeMembership(ctx context.Context, m paxosgroup.Membership) error {
	fail := func(err error) error { return fmt.Errorf("change membership of group %d: %w", g.id, err) }
	var epoch uint64
	err := g.runner.ask(ctx, g, func(now paxosgroup.Instant) error {
		epoch = g.core.Status().Membership.Epoch
		return g.notLeader(g.core.ProposeMembership(now, m))
	})
	if err != nil {
		return fail(err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 4*g.lease, errors.New("the new voters did not answer in time, or have yet to"))
	defer cancel()
	for {
		changed := g.StatusChanged()
		switch s := g.Status(); {
		case s.Membership.Epoch > epoch:
			return nil
		case s.Role != paxosgroup.Leader:
			return fail(&NotLeaderError{Leader: s.Leader, Ballot: s.Ballot})
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fail(context.Cause(ctx))
		}
	}
}

// notLeader says who leads where a core says only that it does not.
func (g *Group) notLeader(err error) error {
	if !errors.Is(err, paxosgroup.ErrNotLeader) {
		return err
	}
	s := g.core.Status()
	return &NotLeaderError{Leader: s.Leader, Ballot: s.Ballot}
}
