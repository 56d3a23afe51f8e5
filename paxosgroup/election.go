package paxosgroup

import (
	"slices"
	"time"
)

// candidacy is one attempt at leading, from pre-vote to the end of phase 1.
type candidacy struct {
	began     Instant // the pre-vote that led here, if there was one
	startedAt Instant
	until     Instant
	failures  int         // attempts since a leader was last heard of
	granted   []ReplicaID // pre-votes
	refused   []ReplicaID // pre-votes or promises
	released  Ballot      // handed over by this leadership
}

const (
	// appliedLeadMax is by how many slots a voter's database may be ahead of a
	// candidate's before it refuses the pre-vote, for a while: the one ahead
	// could open sooner.
	appliedLeadMax = 1000
	// appliedPatience is for how long after the last leader was heard of.
	appliedPatience = time.Second
	failuresMax     = 4 // doublings of the waiting time
	probeInterval   = 10 * time.Second
)

// electionTimeout is T: timeouts are uniform in [T, 2T]. It is not longer than a
// lease, for what was measured across a pause is no round trip, and is forgotten
// slowly between two that seldom speak. Four round trips that are a lease leave
// none to be renewed in time.
func (r *Replica) electionTimeout() time.Duration {
	t := 4*r.quorumRoundTrip() + r.cfg.HeartbeatInterval
	return max(r.cfg.ElectionTimeoutMin, min(t, r.cfg.LeaseDuration))
}

// quorumRoundTrip is the round trip to the farthest replica of the nearest
// phase-1 quorum, as far as measured.
func (r *Replica) quorumRoundTrip() time.Duration {
	var worst time.Duration
	for _, side := range r.quorums.sides[:r.quorums.n] {
		var rtts [membersMax]time.Duration
		n := 0
		for _, p := range r.peers {
			if p.rtt > 0 && side.voters&(1<<p.index) != 0 {
				rtts[n] = p.rtt
				n++
			}
		}
		slices.Sort(rtts[:n])
		if others := side.phase1 - 1; others > 0 && n > 0 {
			worst = max(worst, rtts[min(others, n)-1])
		}
	}
	return worst
}

func (r *Replica) random(d time.Duration) time.Duration {
	return time.Duration(r.rng.Int64N(int64(d) + 1))
}

// resetElection waits for a whole timeout from when a leader was heard of, and in any case until the lease that
// this replica honours has run out, after which every voter would start at
// once, were it not for chance.
func (r *Replica) resetElection(from Instant) {
	t := r.electionTimeout()
	r.electionAt = max(from.Add(t+r.random(t)), r.leaseHonouredUntil().Add(r.random(t)))
	r.deferToPreferred(t)
}

// deferToPreferred lets the preferred region go first, unless it is the one
// that was just lost.
func (r *Replica) deferToPreferred(t time.Duration) {
	p := r.cfg.PreferredRegion
	if p == "" || p == r.cfg.Region {
		return
	}
	for _, m := range r.membership.Members {
		if m.Region == p && m.Kind == Voter && m.ID != r.grantedTo.Replica {
			r.electionAt = r.electionAt.Add(t)
			return
		}
	}
}

func (r *Replica) canCampaign() bool {
	return r.membership.leads(r.cfg.ID) && r.electable && r.now >= r.restartUntil && !r.fetch.image
}

func (r *Replica) onElectionTimeout() {
	r.leader = Ballot{}
	if !r.canCampaign() || r.now < r.leaseHonouredUntil() {
		r.resetElection(r.now)
		return
	}
	r.startPreVote()
}

// nextBallot is above everything this replica has promised or heard of.
func (r *Replica) nextBallot() Ballot {
	return Ballot{Counter: max(r.highest.Counter, r.promised.Counter) + 1, Replica: r.cfg.ID}
}

func (r *Replica) beginCandidacy(s stage) {
	failures := r.candidacy.failures
	began := r.now
	if r.stage == asking {
		began = r.candidacy.began
	}
	r.role, r.stage, r.ballot, r.leader = Candidate, s, r.nextBallot(), Ballot{}
	r.candidacy = candidacy{began: began, startedAt: r.now, failures: failures}
	r.candidacy.until = r.now.Add(r.electionTimeout() << min(failures, failuresMax))
}

// startPreVote asks whether an election could be won before it disturbs
// anybody: only phase 1 raises promises.
func (r *Replica) startPreVote() {
	r.beginCandidacy(asking)
	r.candidacy.granted = append(r.candidacy.granted, r.cfg.ID)
	for _, p := range r.peers {
		if r.voters&(1<<p.index) != 0 {
			r.send(Message{Kind: MsgPreVote, To: p.id, Ballot: r.ballot, Chosen: r.chosen, Applied: r.applied, SentAt: r.now})
		}
	}
	r.checkPreVote()
}

func (r *Replica) checkPreVote() {
	switch {
	case r.quorums.phase1(r.bits.set(r.candidacy.granted)):
		r.startPrepare(Ballot{})
	case !r.quorums.phase1Without(r.bits.set(r.candidacy.refused)):
		r.failCandidacy()
	}
}

func add(ids []ReplicaID, id ReplicaID) []ReplicaID {
	if slices.Contains(ids, id) {
		return ids
	}
	return append(ids, id)
}

// failCandidacy waits and tries again, longer each time, so that candidates who
// keep each other from winning come apart.
func (r *Replica) failCandidacy() {
	failures := r.candidacy.failures + 1
	quick := r.candidacy.until > r.now // refused, not unheard
	r.stepDown()
	t := r.electionTimeout() << min(failures/2, failuresMax)
	if quick {
		r.electionAt = r.now.Add(t/3 + r.random(t))
	} else {
		r.electionAt = r.now.Add(r.random(t))
	}
	r.candidacy.failures = failures
}

func (r *Replica) tickCandidate() {
	if r.now >= r.candidacy.until || !r.canCampaign() {
		r.failCandidacy()
	}
}

// tickProbe measures the round trips that election timeouts are made of, by a
// pre-vote for a ballot that nobody needs to grant. A follower sends nothing
// else that is answered; beats measure for all groups.
func (r *Replica) tickProbe() {
	if r.now < r.probeAt || r.self < 0 || r.beats != nil {
		return
	}
	r.probeAt = r.now.Add(probeInterval/2 + r.random(probeInterval))
	for _, p := range r.peers {
		if r.voters&(1<<p.index) != 0 {
			r.send(Message{
				Kind: MsgPreVote, To: p.id, Ballot: Ballot{Counter: 1, Replica: r.cfg.ID},
				Chosen: r.chosen, Applied: r.applied, SentAt: r.now,
			})
		}
	}
}

func (r *Replica) onPreVote(m Message) {
	r.learnOf(m.Chosen, m.From)
	out := Message{Kind: MsgPreVoteReply, To: m.From, Chosen: r.chosen, Applied: r.applied, SentAt: m.SentAt}
	if out.Granted = !r.refusesPreVote(m); out.Granted {
		out.Ballot = m.Ballot
	} else {
		out.Ballot = r.promised
	}
	r.send(out)
}

func (r *Replica) refusesPreVote(m Message) bool {
	switch {
	case !r.promised.Less(m.Ballot), r.now < r.restartUntil, r.honoursLease(m):
		return true
	case r.now < r.quietUntil && r.quietFor != m.From: // a leader, or somebody about to be one, is alive
		return true
	case r.stranger(m):
		return true
	}
	// For a while only: whoever is ahead may be out of reach of the others.
	patient := r.now < max(r.leaderHeard, r.grantedUntil).Add(appliedPatience) && r.leaderHeard > 0
	return patient && r.canCampaign() && r.applied > m.Applied+appliedLeadMax
}

// stranger reports whether a candidate is no member, and does not know more than
// this replica: it was removed and has yet to learn of it. One that knows more
// may have been added, in either configuration of a change.
func (r *Replica) stranger(m Message) bool {
	_, member := r.membership.Member(m.From)
	return !member && m.Chosen <= r.chosen
}

// hush refuses pre-votes of all but id for a while.
func (r *Replica) hush(id ReplicaID, from Instant) {
	r.quietFor, r.quietUntil = id, max(r.now, from.Add(r.electionTimeout()))
}

func (r *Replica) onPreVoteReply(m Message) {
	r.measure(m)
	r.learnOf(m.Chosen, m.From)
	if r.stage != asking || m.SentAt != r.candidacy.startedAt {
		return
	}
	if !m.Granted {
		r.candidacy.refused = add(r.candidacy.refused, m.From)
	} else if m.Ballot == r.ballot {
		r.candidacy.granted = add(r.candidacy.granted, m.From)
	}
	r.checkPreVote()
}

// startPrepare begins phase 1 over all slots above the chosen prefix. The own
// promise goes to disk before anybody hears of the ballot: a candidate that
// forgot it could use the ballot twice.
func (r *Replica) startPrepare(released Ballot) {
	invariant(!released.IsZero() || r.leaseHonouredUntil() <= r.now, "ballot %v prepared within a lease granted to %v", r.nextBallot(), r.grantedTo)
	r.beginCandidacy(preparing)
	r.candidacy.released = released
	r.lead = leadership{recovered: make(map[Slot]AcceptedEntry)}
	b := r.ballot
	r.raisePromise(b)
	r.countWhenFlushed(b, 0)
	for _, p := range r.peers {
		r.sendPrepare(p)
	}
}

func (r *Replica) sendPrepare(p *peer) {
	p.preparedAt = r.now
	r.sendAfterSync(Message{
		Kind: MsgPrepare, To: p.id, Ballot: r.ballot, Slot: r.chosen + 1, Chosen: r.chosen, Applied: r.applied, SentAt: r.now,
		Transfer: !r.candidacy.released.IsZero(), Released: r.candidacy.released,
	})
}

func (r *Replica) onPromise(m Message) {
	r.measure(m)
	if r.stage < preparing || m.Ballot != r.ballot {
		return
	}
	if slices.Contains(r.lead.promised, m.From) {
		return
	}
	if r.stage == proposing && m.Chosen > r.chosen {
		// It does not report what it accepted in slots that are yet to be learned
		// here, and nobody but its sender may ever tell: a promise to count on would
		// stop this leader for as long as that one is away. Who promised before was
		// enough to begin; if this promise is needed too, it is asked for again.
		r.learnOf(m.Chosen, m.From)
		return
	}
	for _, a := range m.Accepted {
		r.recover(a)
	}
	r.recordPromise(m.From, m.Chosen)
	r.learnOf(m.Chosen, m.From)
	r.checkPhase1()
	r.tryChange()
}

// recordPromise counts a promise for all slots, now and later: whatever its
// sender accepts from now on is at this ballot or above.
func (r *Replica) recordPromise(from ReplicaID, chosen Slot) {
	r.lead.promised = add(r.lead.promised, from)
	r.lead.promisedChosen = max(r.lead.promisedChosen, chosen)
}

// recover keeps the entry of the highest ballot in each slot.
func (r *Replica) recover(a AcceptedEntry) {
	if a.Ballot == r.ballot { // its sender promised after it had accepted: a newcomer
		invariant(a.Slot < r.lead.next, "slot %d accepted at %v and never proposed", a.Slot, a.Ballot)
		return
	}
	invariant(a.Ballot.Less(r.ballot), "promise for %v reports slot %d accepted at %v", r.ballot, a.Slot, a.Ballot)
	if have, ok := r.lead.recovered[a.Slot]; a.Slot > r.chosen && (!ok || have.Ballot.Less(a.Ballot)) {
		r.lead.recovered[a.Slot] = a
		r.lead.recoveredMax = max(r.lead.recoveredMax, a.Slot)
	}
}

// checkPhase1 goes on to phase 2 when a phase-1 quorum of the membership that
// governs the next slot has promised and the chosen prefix is complete as far
// as any of them knows it: below that they do not report what they accepted.
func (r *Replica) checkPhase1() {
	if r.stage < preparing {
		return
	}
	r.lead.phase1 = r.quorums.phase1(r.bits.set(r.lead.promised)) && r.chosen >= r.lead.promisedChosen
	if !r.lead.phase1 {
		return
	}
	if r.stage == preparing {
		r.stage = proposing
		r.beginLeading()
	}
	r.pump()
}

func (r *Replica) onReject(m Message) {
	r.measure(m)
	r.learnOf(m.Chosen, m.From)
	switch {
	case r.stage < preparing:
	case r.ballot.Less(m.Ballot):
		r.stepDown()
	case r.stage == preparing && m.SentAt >= r.candidacy.startedAt:
		r.candidacy.refused = add(r.candidacy.refused, m.From)
		if !r.quorums.phase1Without(r.bits.set(r.candidacy.refused)) {
			r.failCandidacy()
		}
	}
}

// stepDown ends a candidacy or leadership. A lease that was in use is given
// back a little later, when nobody can still act on a Status of before.
func (r *Replica) stepDown() {
	for _, p := range r.peers {
		r.unshare(p)
	}
	if r.stage == proposing {
		r.released, r.releasedAsOf = r.ballot, r.chosen
		r.releaseAt = r.now.Add(2 * r.cfg.TickInterval)
	}
	r.role, r.stage, r.ballot = Follower, idle, Ballot{}
	wanted := r.lead.change != nil
	r.lead, r.candidacy = leadership{}, candidacy{}
	r.settled = false
	if wanted {
		r.connect()
	}
	r.rerouteReads()
	r.resetElection(r.now)
}

// measure keeps a moving average of the round trip that an echo tells. It falls
// faster than it rises, because a pause makes one echo late and none early.
func (r *Replica) measure(m Message) {
	p := r.peer(m.From)
	if p == nil || m.SentAt <= 0 || m.SentAt > r.now {
		return
	}
	p.rtt = averageRoundTrip(p.rtt, r.now.Sub(m.SentAt))
}

func averageRoundTrip(before, now time.Duration) time.Duration {
	now = max(now, 1)
	switch {
	case before == 0:
		return now
	case now < before:
		return before - (before-now)/2
	}
	return before + (now-before)/8
}
