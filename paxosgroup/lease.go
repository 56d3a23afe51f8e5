package paxosgroup

import "slices"

// honoursLease reports whether a lease stands in the way of a Prepare or
// PreVote. A lease does not bind its own holder, who has stopped using it when
// it campaigns, nor a successor that proves the holder gave it up: the proof
// names the leadership, since one of its sender's older hand-overs may be still
// on its way when a new lease is in force.
//
// Gray and Cheriton, "Leases" (SOSP 1989): the grantor counts from receipt on
// its own clock, the holder from sending on its own, less the drift of both.
func (r *Replica) honoursLease(m Message) bool {
	if r.now >= r.grantedUntil || r.grantedTo.Replica == m.From {
		return false
	}
	return !(m.Transfer && m.Released == r.grantedTo)
}

// leaseHonouredUntil is when this replica may itself campaign.
func (r *Replica) leaseHonouredUntil() Instant {
	if r.grantedTo.Replica == r.cfg.ID {
		return r.restartUntil
	}
	return max(r.grantedUntil, r.restartUntil)
}

func (r *Replica) grant(b Ballot) {
	r.grantedTo = b
	r.grantedUntil = max(r.grantedUntil, r.now.Add(r.cfg.LeaseDuration))
}

func (r *Replica) onHeartbeat(m Message) {
	if m.Transfer {
		r.onRelease(m)
		return
	}
	if m.Ballot.Less(r.promised) {
		r.reject(m)
		return
	}
	r.follow(m)
	if m.SentAt != 0 {
		r.grant(m.Ballot)
		r.resetElection(r.now)
	}
	r.noteCommit(m.Ballot, m.Chosen)
	if m.SentAt == 0 {
		return
	}
	out := Message{
		Kind: MsgHeartbeatAck, To: m.From, Ballot: m.Ballot, Chosen: r.chosen, Applied: r.applied,
		SentAt: m.SentAt, Granted: true,
	}
	if b := r.beats; b != nil && m.Shared && m.Life != 0 {
		if generation, ok := b.register(m.From, m.Life, m.Generation); ok {
			r.registered = registration{with: m.From, generation: generation, seen: r.now}
			out.Shared, out.Life, out.Generation = true, b.life, generation
		}
	}
	// After a flush, for a restart must not find a promise below a leader
	// that counts on this grant.
	r.sendAfterSync(out)
}

// onRelease forgets the lease of a leadership that is over.
func (r *Replica) onRelease(m Message) {
	if r.grantedTo == m.Ballot {
		r.unregister() // or other groups' beats would grant it anew
	}
	if r.grantedTo == m.Ballot && r.now < r.grantedUntil {
		r.grantedUntil = r.now
		if r.leader == m.Ballot || r.leader.IsZero() {
			r.leader, r.quietUntil = Ballot{}, 0
			t := r.electionTimeout()
			r.electionAt = r.now.Add(r.random(t))
			r.deferToPreferred(t)
		}
	}
	if !m.Ballot.Less(r.promised) {
		r.noteCommit(m.Ballot, m.Chosen)
	}
}

func (r *Replica) onHeartbeatAck(m Message) {
	r.measure(m)
	p := r.peer(m.From)
	if p == nil {
		return
	}
	r.noteProgress(p, m.Chosen, m.Applied)
	if r.stage != proposing || m.Ballot != r.ballot || !m.Granted {
		return
	}
	p.leaseSentAt = max(p.leaseSentAt, m.SentAt)
	r.cover(p, m)
	r.noteAcked(p, min(m.Chosen, r.lead.next-1))
	r.noteCaughtUp(p)
	r.tryChange()
	r.serveReads()
}

// leaseUntil is until when this leader may rely on its lease under q. Zero if
// there is none.
func (r *Replica) leaseUntil(q *quorums) Instant {
	at := r.confirmedAt(q)
	if at == 0 {
		return 0
	}
	return at.Add(r.cfg.leaderLease())
}

// confirmedAt is the latest instant such that a quorum has answered a heartbeat
// sent then or later, at this leader's ballot and with a grant: a phase-2 quorum
// of every configuration of q, because that meets every phase-1 quorum. The
// leader's own acceptor answers, and grants, at every moment. Zero if there is
// none.
func (r *Replica) confirmedAt(q *quorums) Instant {
	confirmed := Instant(0)
	for i, side := range q.sides[:q.n] {
		var sent [membersMax]Instant
		n := 0
		if side.voters&1 != 0 { // this replica's bit
			sent[n] = r.now
			n++
		}
		for _, p := range r.peers {
			if side.voters&(1<<p.index) != 0 {
				sent[n] = p.leaseSentAt
				n++
			}
		}
		slices.Sort(sent[:n])
		if n < side.phase2 || sent[n-side.phase2] == 0 {
			return 0
		}
		if at := sent[n-side.phase2]; i == 0 || at < confirmed {
			confirmed = at
		}
	}
	return confirmed
}

// reportedLease is what Status shows: nothing before the leader has opened its
// term or once it is about to hand over, and once a change of membership is about to
// be proposed only what holds whether it is made or not.
func (r *Replica) reportedLease() Instant {
	if !r.lead.opened || r.lead.transfer != nil {
		return 0
	}
	until := r.leaseUntil(&r.quorums)
	if c := r.lead.change; c != nil && c.floor != 0 {
		until = min(until, max(c.floor, r.leaseUntil(&c.quorums)))
	}
	if until <= r.now {
		return 0
	}
	return until
}

// tickRelease tells the others that the lease of an ended leadership is free.
func (r *Replica) tickRelease() {
	if r.released.IsZero() || r.now < r.releaseAt {
		return
	}
	b := r.released
	r.released = Ballot{}
	if r.grantedTo == b {
		r.grantedUntil = min(r.grantedUntil, r.now)
	}
	for _, p := range r.peers {
		r.send(Message{Kind: MsgHeartbeat, To: p.id, Ballot: b, Chosen: r.releasedAsOf, Transfer: true})
	}
}
