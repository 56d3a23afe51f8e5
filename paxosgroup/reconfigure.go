package paxosgroup

import (
	"fmt"
	"slices"
)

// change is a membership to be proposed by this leader, or proposed and not
// chosen yet.
type change struct {
	to      Membership
	quorums quorums // of to
	until   Instant // dropped if not proposed by then
	floor   Instant // the lease that was reported when all but that was ready; 0 before
	at      Slot    // where it was proposed; 0 if it was not
}

// ProposeMembership starts a change to m, whose Epoch it sets: members added,
// removed, replaced, given another kind, several at once and the leader among
// them, and quorums of other sizes.
//
// A change that touches no quorum is one entry. Any other is two, and the leader
// proposes the second by itself: a joint membership, under which the old and the
// new configuration must both agree, and then the new one alone. (Ongaro,
// "Consensus: Bridging Theory and Practice", 2014, section 4.3, for a log that
// is accepted in order; docs/decisions/0016-joint-consensus.md for this one.)
//
// Before the first entry is proposed the new voters must have promised, granted
// the lease, and come near enough to accept what is proposed next: else the
// change is dropped after two lease durations and nothing has happened. A new
// voter that has much to fetch had better be added as a learner before.
// From then on the change is finished by whoever leads. While Status shows
// ChangeJoint, proposing the old configuration again takes it back.
//
// Proposals go on meanwhile. When Status shows ChangeNone and a new epoch, all
// is done, and those left out may be switched off. ErrWindowFull says that
// another change is on its way, or leadership is being handed over.
func (r *Replica) ProposeMembership(now Instant, m Membership) error {
	r.clock(now)
	l := &r.lead
	fail := func(err error) error { return fmt.Errorf("change membership: %w", err) }
	m.Outgoing = nil
	m = m.normalized()
	switch {
	case r.role != Leader:
		return ErrNotLeader
	case l.transfer != nil || l.change != nil || !l.phase1 || l.next <= l.recoveredMax || r.judge.Term != r.ballot:
		return fail(ErrWindowFull)
	case r.membership.Joint():
		switch {
		case m.Incoming().same(*r.membership.Outgoing):
			l.revert = true
		case m.Incoming().same(r.membership.Incoming()):
			l.revert = false
		default:
			return fail(ErrWindowFull)
		}
		r.tryChange()
		return nil
	case !r.settled:
		return fail(ErrWindowFull)
	}
	old := r.membership
	m.Epoch = old.Epoch + 1
	if !m.Incoming().sameVotes(old.Incoming()) {
		out := old.Incoming()
		m.Outgoing = &out
	}
	if err := m.Validate(); err != nil {
		return fail(err)
	}
	if m.NextID < old.NextID {
		return fail(fmt.Errorf("%w: next id: %d is below %d", ErrMembership, m.NextID, old.NextID))
	}
	for _, x := range m.Members {
		if _, known := old.Member(x.ID); !known && x.ID < old.NextID {
			return fail(fmt.Errorf("%w: member %d: the id was used before", ErrMembership, x.ID))
		}
	}
	l.change = &change{to: m, until: r.now.Add(2 * r.cfg.LeaseDuration)}
	r.connect() // to newcomers
	l.change.quorums = r.quorumsOf(m)
	for _, p := range r.peers {
		if !slices.Contains(l.promised, p.id) {
			r.sendPrepare(p)
		}
	}
	r.heartbeat()
	r.tryChange()
	return nil
}

// tryChange takes the next step of a change of membership, if it may be taken.
func (r *Replica) tryChange() {
	l := &r.lead
	if r.role != Leader || l.transfer != nil || !l.phase1 || l.next <= l.recoveredMax {
		return
	}
	r.settle()
	switch c := l.change; {
	case c != nil && c.at != 0: // undecided
	case c != nil && r.mayEnter(c):
		r.proposeChange(c)
	case c != nil && r.now >= c.until:
		r.dropChange()
	case c == nil && r.membership.Joint():
		to := r.membership
		to.Epoch++
		if l.revert {
			to.Members, to.Phase1, to.Phase2 = to.Outgoing.Members, to.Outgoing.Phase1, to.Outgoing.Phase2
		}
		to.Outgoing = nil
		if next := (&change{to: to, quorums: r.quorumsOf(to)}); r.mayLeave(next) {
			r.proposeChange(next)
		}
	}
}

// mayEnter reports whether a change may begin.
//
//   - A phase-1 quorum of it has promised: whether the entry is chosen or not, and
//     whether the slots above it are governed by what is in force or by what is
//     to come, they are proposed with the promises that they need. So the
//     pipeline need not stop.
//   - So many of its voters have come near that what is proposed next can be
//     accepted: the group would stand still till then.
//   - Its voters grant the lease for as long as anybody was told that it holds:
//     from now on only what both grant is told, and when the outgoing voters'
//     grants no longer keep others from leading, the incoming ones' do. (The far
//     ones' grants are always older than the near ones': so what is told is held
//     back until they have caught up with it.)
func (r *Replica) mayEnter(c *change) bool {
	until := r.leaseUntil(&c.quorums)
	if until <= r.now || !c.quorums.phase1(r.bits.set(r.lead.promised)) ||
		!c.quorums.phase2(r.knowing(r.chosen-min(r.chosen, Slot(r.cfg.WindowSlotsMax)))) {
		return false
	}
	if c.floor == 0 {
		c.floor = max(r.reportedLease(), r.now)
	}
	return until >= c.floor
}

// mayLeave reports whether a joint membership may be left for one of its sides.
// A phase-1 quorum of both, which this leader holds, is one of that side. Enough
// of it have the joint membership as chosen, and so all that the other side
// alone was asked about, that no election among them can miss it.
func (r *Replica) mayLeave(c *change) bool {
	return c.quorums.phase1(r.bits.set(r.lead.promised)) && c.quorums.phase2(r.knowing(r.configAt))
}

// knowing returns the replicas that are known to have everything up to slot s
// as chosen, and keep that knowledge over a crash.
func (r *Replica) knowing(s Slot) uint64 {
	var set uint64
	if r.self >= 0 && r.configFlushed >= min(s, r.configAt) && r.chosen >= s {
		set |= 1 << r.self
	}
	for _, p := range r.peers {
		if p.knows >= s {
			set |= 1 << p.index
		}
	}
	return set
}

func (r *Replica) proposeChange(c *change) {
	l := &r.lead
	l.change = c
	e := Entry{Kind: KindConfig, Term: r.ballot, Region: r.cfg.Region, Incarnation: l.incarnation, Payload: EncodeMembership(c.to)}
	_, takes := r.membership.Next(e)
	invariant(takes, "a change from %+v to %+v would not take", r.membership, c.to)
	s := l.next
	r.propose(e)
	c.at = s
	// What was on its way to the newcomers before they were peers is sent again
	// when it is due (retransmit); they need not know of it to accept this.
}

// dropChange gives up a change of which nothing has been proposed.
func (r *Replica) dropChange() {
	if c := r.lead.change; c != nil && c.at == 0 {
		r.lead.change = nil
		r.connect()
	}
}

// settle notices that a change is done: a phase-2 quorum of the configuration
// has it as chosen, and keeps that over a crash, so that every phase-1 quorum of
// it will find it, and nobody else is needed to. Till then those it left out are
// told and served, and a leader among them, or one that it made a witness, leads.
func (r *Replica) settle() {
	if r.settled || r.membership.Joint() || !r.quorums.phase2(r.knowing(r.configAt)) {
		return
	}
	r.settled = true
	if len(r.retiring) > 0 {
		r.retiring = nil
		r.connect()
	}
	if !r.membership.leads(r.cfg.ID) {
		r.leave()
	}
}

// leave hands the leadership of a replica that was removed, or has no database
// any more, to the voter that has most.
func (r *Replica) leave() {
	var to *peer
	for _, p := range r.peers {
		x, _ := r.membership.Member(p.id)
		near := r.now < p.lastHeard.Add(r.cfg.LeaseDuration)
		if x.Kind == Voter && near && (to == nil || max(p.acked, p.chosen) > max(to.acked, to.chosen)) {
			to = p
		}
	}
	if to == nil {
		r.stepDown()
		return
	}
	r.lead.transfer = &transfer{to: to.id, notBefore: r.now.Add(2 * r.cfg.TickInterval), until: r.now.Add(2 * r.cfg.LeaseDuration)}
}

// changeState is what Status tells of a change.
func (r *Replica) changeState() Change {
	switch {
	case r.membership.Joint():
		return ChangeJoint
	case r.role != Leader:
		return ChangeNone
	case r.lead.change != nil:
		return ChangeWaiting
	case !r.settled:
		return ChangeSpreading
	}
	return ChangeNone
}
