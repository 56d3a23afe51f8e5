package runner

import (
	"container/heap"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"quorate/paxosgroup"
)

// EngineGroup is one group of an Engine, and like it not safe for concurrent
// use, but for Read, Chosen, BaseAt, NeedsSnapshot and SetApplied.
type EngineGroup struct {
	engine  *Engine
	shell   *Group // nil without a Runner
	id      paxosgroup.GroupID
	storage paxosgroup.Storage
	lease   time.Duration
	beat    time.Duration // between heartbeats
	core    *paxosgroup.Replica

	dirty     bool
	deadline  paxosgroup.Instant
	heapIndex int

	// unflushed counts the Readies whose records are with the log and not
	// flushed. While there are any, every AfterSync goes by way of the log.
	unflushed int
	failure   error // a *FailedError: of the part of the log; nothing is taken or paid from then on
	full      bool  // the disk that the group is on
	electable bool  // as far as the database goes
	proposals proposals
	reads     map[uint64]func(paxosgroup.Slot, error) // that wait; nil if none do
	readID    uint64

	applied   atomic.Uint64
	needImage atomic.Bool

	guard   sync.Locker // readers may be elsewhere
	recent  recent
	history history
}

// newGroup restores a group. It touches nothing that the engine's other groups
// use, but the log.
func (e *Engine) newGroup(now paxosgroup.Instant, gc GroupConfig, guard sync.Locker) (*EngineGroup, error) {
	id := gc.Core.Group
	fail := func(err error) (*EngineGroup, error) { return nil, fmt.Errorf("runner: group %d: %w", id, err) }
	if gc.RecentBytesMax == 0 {
		gc.RecentBytesMax = recentBytesDefault
	}
	if gc.RecentEntriesMax == 0 {
		gc.RecentEntriesMax = recentEntriesDefault
	}
	if gc.WaitingMax == 0 {
		gc.WaitingMax = waitingDefault
	}
	var lost error
	if e.divided != nil {
		lost = e.divided.Place(id)
	}
	restored, known := e.cfg.Restored[id]
	if lost != nil {
		// What is here in its place knows nothing, is asked nothing and says nothing.
		restored, known, gc.Bootstrap = paxosgroup.Restored{}, false, paxosgroup.Membership{}
	}
	bootstraps := !known && len(gc.Bootstrap.Members) > 0
	if known {
		gc.Core.RestartedWithState = true
	} else if bootstraps {
		if err := gc.Bootstrap.Validate(); err != nil {
			return fail(err)
		}
		restored.Base.Membership = gc.Bootstrap
	}
	g := &EngineGroup{
		engine:    e,
		electable: true,
		id:        id,
		storage:   e.cfg.Log.Group(id),
		lease:     gc.Core.LeaseDuration,
		beat:      gc.Core.HeartbeatInterval,
		guard:     guard,
		proposals: proposals{max: gc.WaitingMax},
		recent:    recent{bytesMax: gc.RecentBytesMax, entriesMax: gc.RecentEntriesMax},
		history:   newHistory(restored.Base),
	}
	if g.lease == 0 {
		g.lease = 1500 * time.Millisecond
	}
	if g.beat == 0 {
		g.beat = 100 * time.Millisecond
	}
	core, err := paxosgroup.New(gc.Core, restored, g.storage, now)
	if err != nil {
		return fail(err)
	}
	g.core = core
	if lost != nil {
		e.cfg.Logger.Error("a group cannot be run", "group", id, "err", lost)
		g.failure, g.deadline = &FailedError{id, lost}, never
		return g, nil
	}
	g.deadline = core.NextDeadline()
	if err := g.rebuild(core.Status()); err != nil {
		return fail(err)
	}
	if bootstraps {
		// Kept, so that a restart starts from the same. Whatever this replica
		// promises later is flushed behind it.
		base := restored.Base
		e.withLog.Add(1)
		e.cfg.Log.Append(id, []paxosgroup.Record{{Kind: paxosgroup.RecordBase, Base: &base}}, func(err error) {
			e.durable(done{group: g, err: err})
		})
	}
	return g, nil
}

// rebuild judges the log once more, for the history.
func (g *EngineGroup) rebuild(s paxosgroup.Status) error {
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
			g.recent.add(&paxosgroup.Delivered{Slot: e.Slot, Entry: e.Entry, Verdict: v})
		}
	}
	if !g.history.judge.Equal(s.Judge) {
		panic(fmt.Sprintf("runner: group %d: the history judges %+v where the core judges %+v at slot %d", g.id, g.history.judge, s.Judge, s.Chosen))
	}
	return nil
}

// FailedError says that a group is stopped on this replica, because what it has
// to keep is not kept: it takes no messages and sends none until a restart. Other
// groups go on. It is a paxosgroup.ErrNotLeader, for another replica may lead.
type FailedError struct {
	Group paxosgroup.GroupID
	Err   error // of the log
}

func (e *FailedError) Error() string {
	return fmt.Sprintf("group %d is stopped on this replica until it is restarted: %v", e.Group, e.Err)
}

func (e *FailedError) Unwrap() []error { return []error{e.Err, paxosgroup.ErrNotLeader} }

// fail stops the group for good, and answers everyone who waits.
func (g *EngineGroup) fail(now paxosgroup.Instant, err error) {
	if g.failure != nil {
		return
	}
	e := g.engine
	e.cfg.Logger.Error("a group stops: its log has", "group", g.id, "err", err)
	g.failure = &FailedError{g.id, err}
	// For its Status and its heartbeats, which others share. What this has the core
	// say is never asked for.
	g.core.Resign(now)
	g.failProposals(g.failure)
	g.failReads(g.failure)
	g.deadline = never
	if e.groups[g.id] != g {
		return // it has yet to be admitted
	}
	e.failed = true
	heap.Fix(&e.due, g.heapIndex)
	if e.settled != nil {
		e.settled(g)
	}
}

// Failed returns a *FailedError if the group is stopped, else nil.
func (g *EngineGroup) Failed() error { return g.failure }

// ID returns the group's.
func (g *EngineGroup) ID() paxosgroup.GroupID { return g.id }

// Status returns a snapshot of the replica.
func (g *EngineGroup) Status() paxosgroup.Status { return g.core.Status() }

// settle takes what proposals there is room for and pays what the core owes.
func (g *EngineGroup) settle(now paxosgroup.Instant) {
	e := g.engine
	if g.failure != nil {
		return // shown already
	}
	g.core.SetApplied(paxosgroup.Slot(g.applied.Load()))
	for {
		g.offer(now)
		rd, ok := g.core.Ready()
		if !ok {
			break
		}
		g.pay(rd)
	}
	g.giveUpWaiting()
	g.deadline = e.gather(now, g.core.NextDeadline())
	if g.gathers(now) {
		g.deadline = min(g.deadline, g.proposals.heldUntil)
	}
	heap.Fix(&e.due, g.heapIndex)
	if e.settled != nil {
		e.settled(g)
	}
}

// pay does what a Ready asks for.
func (g *EngineGroup) pay(rd paxosgroup.Ready) {
	e := g.engine
	if len(rd.Send) > 0 {
		e.cfg.Transport.Send(g.id, rd.Send)
	}
	flush, accepted := false, 0
	for i := range rd.Persist {
		rec := &rd.Persist[i]
		flush = flush || rec.NeedsFlush()
		switch rec.Kind {
		case paxosgroup.RecordAccept:
			accepted++
		case paxosgroup.RecordBase:
			g.restarted(*rec.Base)
		}
	}
	e.stats.batch(accepted)
	d := done{group: g, seq: rd.Seq, counts: flush}
	after := rd.AfterSync
	switch {
	case flush || len(after) > 0 && g.unflushed > 0:
		if flush {
			e.stats.Batches++
		}
		d.after, d.ticket = after, true
		rd.AfterSync = nil // until they are sent
		g.unflushed++
		g.append(rd.Persist, d)
	default:
		if len(rd.Persist) > 0 {
			g.append(rd.Persist, d)
		}
		if len(after) > 0 {
			e.cfg.Transport.Send(g.id, after)
		}
	}
	if len(rd.Delivered) > 0 {
		g.deliver(rd.Delivered)
	}
	if rd.Snapshot {
		g.needImage.Store(true)
	}
	for _, q := range rd.Reads {
		g.answerRead(q)
	}
	g.core.Recycle(rd)
}

func (g *EngineGroup) append(recs []paxosgroup.Record, d done) {
	e := g.engine
	e.withLog.Add(1)
	e.cfg.Log.Append(g.id, recs, func(err error) {
		d.err = err
		e.durable(d)
	})
}

// deliver makes chosen entries readable.
func (g *EngineGroup) deliver(entries []paxosgroup.Delivered) {
	g.engine.stats.Delivered += uint64(len(entries))
	g.needImage.Store(false)
	g.guard.Lock()
	for i := range entries {
		d := &entries[i]
		if d.Slot != g.history.last+1 {
			panic(fmt.Sprintf("runner: group %d: slot %d delivered after %d", g.id, d.Slot, g.history.last))
		}
		if v := g.history.add(d.Entry); v != d.Verdict {
			panic(fmt.Sprintf("runner: group %d: slot %d delivered with verdict %d, judged %d", g.id, d.Slot, d.Verdict, v))
		}
		g.recent.add(d)
		if w := &g.proposals; w.inFlight.n > 0 && d.Entry.Kind == paxosgroup.KindData && d.Entry.Term == w.term {
			g.arrived(d)
		}
	}
	if g.engine.moved != nil {
		g.engine.moved(g)
	}
	g.guard.Unlock()
	g.proposals.tell()
}

// restarted forgets what an image has replaced, or what was cut.
func (g *EngineGroup) restarted(b paxosgroup.Base) {
	g.guard.Lock()
	defer g.guard.Unlock()
	if b.Slot <= g.history.last && b.Slot >= g.history.base.Slot {
		g.history.cut(b)
		g.recent.cut(b.Slot)
		return
	}
	g.needImage.Store(false)
	g.recent.reset()
	g.history = newHistory(b)
	if g.engine.moved != nil {
		g.engine.moved(g)
	}
}

// Chosen returns the highest slot up to which everything is chosen and can be
// read.
func (g *EngineGroup) Chosen() paxosgroup.Slot {
	g.guard.Lock()
	defer g.guard.Unlock()
	return g.history.last
}

// NeedsSnapshot reports whether this replica is behind the bases of all peers,
// so that only an image helps.
func (g *EngineGroup) NeedsSnapshot() bool { return g.needImage.Load() }

// Read returns consecutive chosen entries from slot from on with their verdicts:
// at least one, beyond it up to maxBytes of payload, and none if from is not
// chosen yet. It returns ErrCompacted if from is at or below the base. What it
// returns is shared and must not be changed.
func (g *EngineGroup) Read(from paxosgroup.Slot, maxBytes int) ([]paxosgroup.Delivered, error) {
	g.guard.Lock()
	base, last, first := g.history.base.Slot, g.history.last, g.recent.first()
	if from > base && from <= last && first != 0 && from >= first {
		defer g.guard.Unlock()
		return g.recent.read(from, maxBytes), nil
	}
	g.guard.Unlock()
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

	g.guard.Lock()
	defer g.guard.Unlock()
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

// BaseAt returns the base that an image of everything up to slot has. It may
// have to read the log.
func (g *EngineGroup) BaseAt(slot paxosgroup.Slot) (paxosgroup.Base, error) {
	g.guard.Lock()
	base, last := g.history.base.Slot, g.history.last
	if slot < base || slot > last {
		g.guard.Unlock()
		if slot < base {
			return paxosgroup.Base{}, fmt.Errorf("base of group %d at slot %d: %w", g.id, slot, ErrCompacted)
		}
		return paxosgroup.Base{}, fmt.Errorf("base of group %d at slot %d: chosen only up to %d", g.id, slot, last)
	}
	b, from, to := g.history.at(slot)
	g.guard.Unlock()
	for from < to {
		entries, err := g.Read(from+1, 1<<20)
		if err != nil {
			return paxosgroup.Base{}, fmt.Errorf("base of group %d at slot %d: %w", g.id, slot, err)
		}
		for _, d := range entries {
			if d.Slot <= to && d.Entry.Kind == paxosgroup.KindData && d.Verdict == paxosgroup.Effective {
				b.Judge.Replay(d.Entry)
			}
			from = d.Slot
		}
	}
	return b, nil
}

// SetElectable says whether the database could lead; see paxosgroup.
func (g *EngineGroup) SetElectable(ok bool) {
	g.electable = ok
	g.core.SetElectable(ok && !g.full)
	g.engine.touch(g)
}

// SetIncarnation sets what goes into openings.
func (g *EngineGroup) SetIncarnation(i paxosgroup.Incarnation) { g.core.SetIncarnation(i) }

// SetApplied sets what peers are told is applied here. It costs a store.
func (g *EngineGroup) SetApplied(s paxosgroup.Slot) { g.applied.Store(uint64(s)) }

// Resign gives up leadership and lease.
func (g *EngineGroup) Resign(now paxosgroup.Instant) {
	g.core.Resign(now)
	g.engine.touch(g)
}

// Restart puts an image in place of everything at or below b.Slot. That it is
// recorded is not flushed yet: whatever this replica says from now on is flushed
// behind it.
func (g *EngineGroup) Restart(now paxosgroup.Instant, b paxosgroup.Base) error {
	if err := b.Membership.Validate(); err != nil {
		return fmt.Errorf("restart group %d at slot %d: %w", g.id, b.Slot, err)
	}
	if g.failure != nil {
		return g.failure
	}
	g.core.Restart(now, b)
	g.engine.touch(g)
	return nil
}

// Truncate cuts the log at and below a chosen slot; below the base it does
// nothing. The entries are not readable from then on.
func (g *EngineGroup) Truncate(now paxosgroup.Instant, slot paxosgroup.Slot) error {
	if g.failure != nil {
		return g.failure
	}
	if slot <= g.core.Status().Base {
		return nil
	}
	b, err := g.BaseAt(slot)
	if err != nil {
		return err
	}
	g.core.Truncate(now, b)
	g.engine.touch(g)
	return nil
}

// Transfer begins to hand leadership to another voter; Status tells whether it
// leads, or has not taken over.
func (g *EngineGroup) Transfer(now paxosgroup.Instant, to paxosgroup.ReplicaID) error {
	if g.failure != nil {
		return g.failure
	}
	err := g.core.Transfer(now, to)
	g.engine.touch(g)
	return g.notLeader(err)
}

// ChangeMembership begins a change to m, whose epoch is set here; Status shows
// when it is in force.
func (g *EngineGroup) ChangeMembership(now paxosgroup.Instant, m paxosgroup.Membership) error {
	if g.failure != nil {
		return g.failure
	}
	err := g.core.ProposeMembership(now, m)
	g.engine.touch(g)
	return g.notLeader(err)
}

// notLeader says who leads where a core says only that it does not.
func (g *EngineGroup) notLeader(err error) error {
	if !errors.Is(err, paxosgroup.ErrNotLeader) {
		return err
	}
	b := g.core.Brief()
	return &NotLeaderError{Leader: b.Leader, Ballot: b.Ballot}
}

// Brief is Replica.Brief, which costs no allocation.
func (g *EngineGroup) Brief() paxosgroup.Brief { return g.core.Brief() }

// LeaseUntil is Status().LeaseUntil, without the cost of a Status.
func (g *EngineGroup) LeaseUntil() paxosgroup.Instant { return g.core.LeaseUntil() }

// LeaseRead is Replica.LeaseRead.
func (g *EngineGroup) LeaseRead(now paxosgroup.Instant) (paxosgroup.Slot, bool) {
	return g.core.LeaseRead(now)
}
