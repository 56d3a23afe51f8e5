package paxosgroup

// Status returns a snapshot of the replica. LeaseUntil is on the clock that
// Step and Tick are given; whoever relies on it must not use a Status older
// than Config.TickInterval.
func (r *Replica) Status() Status {
	r.absorb()
	s := Status{
		ID: r.cfg.ID, Role: r.role, Leader: r.leader.Replica, Ballot: r.highest, Promised: r.promised,
		Base: r.base.Slot, Chosen: r.chosen, Judge: r.judge.Clone(), Membership: r.membership, Void: r.void,
		Durability: r.membership.Durability(), Contacts: r.contacts, Change: r.changeState(),
		Openings: r.openings, OpeningTook: r.openingTook, OpeningTotal: r.openingTotal,
	}
	if r.role != Leader {
		return s
	}
	s.Leader, s.Ballot, s.LastSlot = r.cfg.ID, r.ballot, r.lead.next-1
	s.LeaseUntil = r.reportedLease()
	s.HandBackDue = r.handBackDue()
	for _, p := range r.peers {
		x := PeerStatus{ID: p.id, Chosen: p.chosen, Applied: p.applied, LastHeard: p.lastHeard, RoundTrip: p.rtt}
		p.flow.status(&r.cfg, &x)
		s.Peers = append(s.Peers, x)
	}
	return s
}

// Brief is what of a replica's Status moves seldom, and whoever watches the
// replica wants to know at once. Two are compared by ==.
type Brief struct {
	Role   Role
	Leader ReplicaID
	Ballot Ballot
	Term   Ballot // the judge's
	Base   Slot
	Epoch  uint64
	Leased bool
	Change Change

	HandBackDue ReplicaID
}

// Brief costs no allocation.
func (r *Replica) Brief() Brief {
	r.absorb()
	b := Brief{Role: r.role, Leader: r.leader.Replica, Ballot: r.highest, Term: r.judge.Term, Base: r.base.Slot, Epoch: r.membership.Epoch, Change: r.changeState()}
	if r.role == Leader {
		b.Leader, b.Ballot, b.Leased = r.cfg.ID, r.ballot, r.reportedLease() != 0
		b.HandBackDue = r.handBackDue()
	}
	return b
}

// LeaseUntil is Status().LeaseUntil; it costs no allocation.
func (r *Replica) LeaseUntil() Instant {
	r.absorb()
	if r.role != Leader {
		return 0
	}
	return r.reportedLease()
}

// ID returns the replica's.
func (r *Replica) ID() ReplicaID { return r.cfg.ID }

// Leading returns the ballot in which this replica leads, or none.
func (r *Replica) Leading() (Ballot, bool) {
	if r.role != Leader {
		return Ballot{}, false
	}
	return r.ballot, true
}

// NextDeadline returns when Tick has something to do. Ticking at
// Config.TickInterval is always enough; a replica at rest needs it less often.
func (r *Replica) NextDeadline() Instant {
	r.absorb()
	next := r.electionAt
	if r.self >= 0 && r.beats == nil {
		next = min(next, r.probeAt)
	}
	switch r.stage {
	case asking, preparing:
		next = r.candidacy.until
	case proposing:
		next = r.leaderDeadline()
		if r.lead.noticeAt != 0 {
			next = min(next, r.lead.noticeAt)
		}
		if r.lead.hedgeAt != 0 {
			next = min(next, r.lead.hedgeAt)
		}
		if r.lead.next > r.chosen+1 || r.lead.transfer != nil || r.changeState() != ChangeNone || !r.lead.phase1 {
			next = min(next, r.now.Add(r.cfg.TickInterval))
		}
	}
	if !r.released.IsZero() {
		next = min(next, r.releaseAt)
	}
	if len(r.reads) > 0 {
		next = min(next, r.readsDeadline())
	}
	if r.fetch.until != 0 {
		next = min(next, r.fetch.until)
	}
	return next
}

// leaderDeadline is when a leader at rest has something to do: a heartbeat, or a
// look at its lease when little of it is left, when it is over, and when
// leadership is.
func (r *Replica) leaderDeadline() Instant {
	until := r.leaseUntil(&r.quorums)
	next := max(until, r.lead.since).Add(r.cfg.LeaseDuration + 1)
	for _, at := range [2]Instant{until, until.Add(-r.cfg.leaseReserve())} {
		if until != 0 && at > r.now {
			next = at
		}
	}
	leased := until > r.now.Add(r.cfg.leaseReserve())
	for _, p := range r.peers {
		if due, ok := r.heartbeatDue(p, leased); ok {
			next = min(next, due)
		}
	}
	if at := r.handBackAt(); at > r.now {
		next = min(next, at)
	}
	return next
}
