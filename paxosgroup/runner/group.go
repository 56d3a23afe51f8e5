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
	runner *Runner
	engine *EngineGroup
	id     paxosgroup.GroupID
	lease  time.Duration

	status atomic.Pointer[paxosgroup.Status]
	failed atomic.Pointer[error] // nil as long as it has not

	mu            sync.Mutex    // the engine group's guard too
	chosenMoved   chan struct{} // nil if nobody watches
	statusChanged chan struct{} // nil if nobody watches

	// Of who holds the engine.
	brief       paxosgroup.Brief // as published
	publishedAt paxosgroup.Instant
	stale       bool // progress was made since
}

// moved wakes who waits for chosen entries. Called with mu held.
func (g *Group) moved() {
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
	brief := g.engine.core.Brief()
	turned := brief != g.brief || g.engine.failure != nil && g.failed.Load() == nil
	if !turned && now.Sub(g.publishedAt) < statusAgeMax && g.status.Load() != nil {
		if !g.stale {
			g.stale = true
			g.runner.stale = append(g.runner.stale, g)
		}
		return
	}
	s := g.engine.core.Status()
	g.status.Store(&s)
	if g.engine.failure != nil {
		g.failed.Store(&g.engine.failure)
	}
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

// Failed returns a *FailedError if the group is stopped here, because its part of
// the log is lost; else nil. Status shows it as a follower then, and no news.
// StatusChanged tells.
func (g *Group) Failed() error {
	if err := g.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// StatusChanged returns a channel that is closed when the group fails, or when role, ballot, leader,
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
	return g.engine.history.last, g.chosenMoved
}

// NeedsSnapshot reports whether this replica is behind the bases of all peers,
// so that only an image helps. StatusChanged does not tell of it.
func (g *Group) NeedsSnapshot() bool { return g.engine.NeedsSnapshot() }

// Read returns consecutive chosen entries from slot from on with their verdicts:
// at least one, beyond it up to maxBytes of payload, and none if from is not
// chosen yet. It returns ErrCompacted if from is at or below the base. What it
// returns is shared and must not be changed.
func (g *Group) Read(from paxosgroup.Slot, maxBytes int) ([]paxosgroup.Delivered, error) {
	return g.engine.Read(from, maxBytes)
}

// BaseAt returns the base that an image of everything up to slot has.
func (g *Group) BaseAt(slot paxosgroup.Slot) (paxosgroup.Base, error) { return g.engine.BaseAt(slot) }

// SetElectable says whether the database could lead; see paxosgroup.
func (g *Group) SetElectable(ok bool) {
	g.runner.tell(func(paxosgroup.Instant) { g.engine.SetElectable(ok) })
}

// SetIncarnation sets what goes into openings.
func (g *Group) SetIncarnation(i paxosgroup.Incarnation) {
	g.runner.tell(func(paxosgroup.Instant) { g.engine.SetIncarnation(i) })
}

// SetApplied sets what peers are told is applied here. It costs a store.
func (g *Group) SetApplied(s paxosgroup.Slot) { g.engine.SetApplied(s) }

// Resign gives up leadership and lease.
func (g *Group) Resign() { g.runner.tell(g.engine.Resign) }

// Restart puts an image in place of everything at or below b.Slot and returns
// when that is recorded in order, though perhaps not flushed yet: whatever this
// replica says from now on is flushed behind it.
func (g *Group) Restart(ctx context.Context, b paxosgroup.Base) error {
	return g.runner.ask(ctx, func(now paxosgroup.Instant) error { return g.engine.Restart(now, b) })
}

// Truncate cuts the log at and below a chosen slot and returns when that is
// recorded in order, though perhaps not flushed yet; at or below the base it does
// nothing. Whoever reads an entry that is cut gets ErrCompacted, and a peer that
// fetches it is told to load an image.
func (g *Group) Truncate(ctx context.Context, slot paxosgroup.Slot) error {
	return g.runner.ask(ctx, func(now paxosgroup.Instant) error { return g.engine.Truncate(now, slot) })
}

// Transfer hands leadership to another voter and returns when it leads, or says
// why it does not.
func (g *Group) Transfer(ctx context.Context, to paxosgroup.ReplicaID) error {
	fail := func(err error) error {
		return fmt.Errorf("transfer leadership of group %d to replica %d: %w", g.id, to, err)
	}
	if err := g.runner.ask(ctx, func(now paxosgroup.Instant) error { return g.engine.Transfer(now, to) }); err != nil {
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

// couldLead reports whether a replica votes and has a database.
func couldLead(s paxosgroup.Status) bool {
	x, ok := s.Membership.Member(s.ID)
	return ok && x.Kind == paxosgroup.Voter
}

// ChangeMembership makes m the membership, whose epoch is set here, and returns
// when that is done: it is in force, enough of its voters have it on disk, and
// those it leaves out are not needed any more. Or it says why it is not: a change
// that was begun is then still finished by whoever leads, unless that is undone
// (see the core's ProposeMembership).
func (g *Group) ChangeMembership(ctx context.Context, m paxosgroup.Membership) error {
	fail := func(err error) error { return fmt.Errorf("change membership of group %d: %w", g.id, err) }
	var epoch uint64
	err := g.runner.ask(ctx, func(now paxosgroup.Instant) error {
		epoch = g.engine.core.Status().Membership.Epoch
		err := g.engine.ChangeMembership(now, m)
		g.publish(now) // that a change is on its way is to be seen below
		return err
	})
	if err != nil {
		return fail(err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 8*g.lease, errors.New("too few of the new voters have it yet; it goes on"))
	defer cancel()
	for {
		changed := g.StatusChanged()
		switch s := g.Status(); {
		case s.Role != paxosgroup.Leader && s.Membership.Epoch > epoch && !s.Membership.Joint() && !couldLead(s):
			return nil // a leader that is left out leads until the change is done
		case s.Role != paxosgroup.Leader:
			return fail(&NotLeaderError{Leader: s.Leader, Ballot: s.Ballot})
		case s.Change != paxosgroup.ChangeNone:
		case s.Membership.Epoch > epoch:
			return nil
		default:
			return fail(errors.New("the new voters did not answer in time, or have much to fetch"))
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fail(context.Cause(ctx))
		}
	}
}
