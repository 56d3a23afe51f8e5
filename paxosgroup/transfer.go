package paxosgroup

import "fmt"

// transfer is a leadership being handed over.
type transfer struct {
	to        ReplicaID
	notBefore Instant // when nobody can still act on a Status that showed the lease
	until     Instant
}

// Transfer hands leadership to a voter: no more proposals are taken, those on
// their way are drained, and when the successor holds the whole prefix this
// replica steps down and tells it to campaign at once. If that cannot be done
// within two lease durations, leadership goes on.
func (r *Replica) Transfer(now Instant, to ReplicaID) error {
	r.clock(now)
	if r.role != Leader {
		return ErrNotLeader
	}
	m, ok := r.membership.Incoming().Member(to)
	switch {
	case to == r.cfg.ID:
		return fmt.Errorf("transfer leadership: replica %d has it", to)
	case !ok || m.Kind != Voter:
		return fmt.Errorf("transfer leadership: replica %d is not a voter with a database", to)
	case r.lead.transfer != nil:
		return fmt.Errorf("transfer leadership: already on the way to replica %d", r.lead.transfer.to)
	}
	r.dropChange()
	if p := r.preferred(); p != nil && p.id == to {
		r.handBackFailed() // until it has led for a while
	}
	r.lead.transfer = &transfer{
		to: to, notBefore: r.now.Add(2 * r.cfg.TickInterval), until: r.now.Add(2 * r.cfg.LeaseDuration),
	}
	return nil
}

func (r *Replica) tickTransfer() {
	l := &r.lead
	t := l.transfer
	if t == nil {
		return
	}
	p := r.peer(t.to)
	if p == nil || r.now >= t.until {
		l.transfer = nil
		if r.settled && !r.membership.leads(r.cfg.ID) { // removed, or a witness now
			r.stepDown()
		}
		return
	}
	drained := r.chosen+1 == l.next
	if r.now < t.notBefore || !drained || max(p.acked, p.chosen) < r.chosen {
		return
	}
	// From here on the lease is given up: this leadership takes no more part in
	// anything, and only it could have renewed it.
	b, chosen := r.ballot, r.chosen
	r.stepDown()
	r.electionAt = r.now.Add(r.cfg.LeaseDuration)
	r.send(Message{Kind: MsgTimeoutNow, To: t.to, Ballot: b, Chosen: chosen, Slot: chosen})
}

// onTimeoutNow campaigns without asking first, and passes the lease of the
// leadership that sent it.
func (r *Replica) onTimeoutNow(m Message) {
	if m.Ballot.Less(r.promised) {
		return
	}
	r.noteCommit(m.Ballot, m.Chosen)
	if r.grantedTo == m.Ballot {
		r.unregister()
		r.grantedUntil = min(r.grantedUntil, r.now)
	}
	if r.stage < preparing && r.canCampaign() {
		r.startPrepare(m.Ballot)
	}
}

// Resign gives up leadership with no successor in mind, and the lease with it.
func (r *Replica) Resign(now Instant) {
	r.clock(now)
	if r.stage == idle {
		return
	}
	r.stepDown()
	r.electionAt = r.now.Add(r.cfg.LeaseDuration + r.random(r.electionTimeout()))
}
