package paxosgroup

import "time"

// A read is linearizable if it sees every entry that anybody was told is chosen
// before the read was asked for. All such entries are at or below the leader's
// chosen slot, if that leader's opening is chosen and no other has led since
// (Ongaro, "Consensus: bridging theory and practice", 2014, section 6.4, for
// Raft):
//
//   - what was chosen at lower ballots is below the opening: phase 1 saw it;
//   - what was chosen at its own ballot is told to others by this leader alone,
//     once it has extended its own chosen prefix;
//   - nothing was chosen at a higher ballot, because no phase-1 quorum has
//     promised one. Either the lease vouches for that, or a quorum that answers a
//     heartbeat at this ballot which was sent after the read was asked for: had a
//     phase-1 quorum promised a higher ballot before, one of its members would
//     have to be in the answering one, and would have refused. So it takes a set
//     that meets every phase-1 quorum, which a phase-2 quorum does and a majority
//     may not (confirmedAt).
//
// While a configuration entry of this leader is undecided, quorums of what is in
// force and of what is to come are asked alike, as for the lease.

// read waits for its answer.
type read struct {
	id    uint64
	from  ReplicaID // who forwarded it; 0 if it was asked here
	echo  Instant   // SentAt of what forwarded it
	until Instant
	round Instant // a leader's: sending time of the heartbeat that is to confirm it; 0 if none yet
	slot  Slot    // with round

	// A follower's: by which request it was forwarded, and when. 0 if it was not.
	request   uint64
	requestAt Instant
}

// forwarding is the newest request to a leader.
type forwarding struct {
	id     uint64
	sentAt Instant
	to     ReplicaID
}

const (
	readsMax     = 4096 // that wait; more are refused at once
	readSpaceMin = time.Millisecond
	readRetryMin = 50 * time.Millisecond
)

// LeaseRead returns the slot up to which one must have applied to read all that
// is acknowledged by now, if this leader's lease vouches for it.
func (r *Replica) LeaseRead(now Instant) (Slot, bool) {
	r.clock(now)
	return r.leaseRead()
}

func (r *Replica) leaseRead() (Slot, bool) {
	if !r.openingChosen() || r.reportedLease() <= r.now {
		return 0, false
	}
	return r.chosen, true
}

// openingChosen reports whether this replica leads and all that was chosen
// before is known here.
func (r *Replica) openingChosen() bool { return r.role == Leader && r.judge.Term == r.ballot }

// ReadIndex asks for the slot up to which one must have applied to read all that
// is acknowledged by now. The answer comes in Ready.Reads under id: at once from
// a leader with a lease, else after a round trip to a quorum, which serves all
// that wait; at a follower from the leader. It says no if no leader could be
// confirmed within two lease durations, or if too many wait.
func (r *Replica) ReadIndex(now Instant, id uint64) {
	r.clock(now)
	if len(r.reads) >= readsMax {
		r.answerRead(read{id: id}, 0, false)
		return
	}
	r.reads = append(r.reads, read{id: id, until: r.now.Add(2 * r.cfg.LeaseDuration)})
	r.serveReads()
}

func (r *Replica) onReadIndex(m Message) {
	q := read{id: m.ID, from: m.From, echo: m.SentAt, until: r.now.Add(2 * r.cfg.LeaseDuration)}
	if r.stage != proposing || len(r.reads) >= readsMax {
		r.answerRead(q, 0, false)
		return
	}
	r.reads = append(r.reads, q)
	r.serveReads()
}

func (r *Replica) answerRead(q read, s Slot, ok bool) {
	if q.from == 0 {
		r.pending.Reads = append(r.pending.Reads, ReadResult{ID: q.id, Slot: s, OK: ok})
		return
	}
	r.send(Message{Kind: MsgReadIndexReply, To: q.from, ID: q.id, SentAt: q.echo, Slot: s, Granted: ok, Chosen: r.chosen})
}

// answerReads answers those that pick chooses and keeps the others.
func (r *Replica) answerReads(pick func(*read) (s Slot, ok, answered bool)) {
	n := 0
	for i := range r.reads {
		q := r.reads[i]
		if s, ok, answered := pick(&q); answered {
			r.answerRead(q, s, ok)
			continue
		}
		r.reads[n] = q
		n++
	}
	r.reads = r.reads[:n]
	if n == 0 {
		r.reads = nil // a group at rest keeps no room for them
	}
}

// serveReads answers what can be answered, and asks for what is missing.
func (r *Replica) serveReads() {
	if len(r.reads) == 0 {
		return
	}
	if r.openingChosen() {
		r.serveReadsAsLeader()
	} else if r.stage != proposing {
		r.forwardReads()
	}
	r.answerReads(func(q *read) (Slot, bool, bool) { return 0, false, r.now >= q.until })
}

func (r *Replica) serveReadsAsLeader() {
	if s, ok := r.leaseRead(); ok {
		r.answerReads(func(*read) (Slot, bool, bool) { return s, true, true })
		return
	}
	confirmed := r.confirmed()
	unasked := false
	r.answerReads(func(q *read) (Slot, bool, bool) {
		unasked = unasked || q.round == 0
		return q.slot, true, q.round != 0 && q.round <= confirmed
	})
	// A heartbeat of this very instant may have been sent before a read of it
	// was asked for.
	if !unasked || r.now < r.confirmDue() {
		return
	}
	r.heartbeat()
	r.lead.confirmAt = r.now
	for i := range r.reads {
		if q := &r.reads[i]; q.round == 0 {
			q.round, q.slot = r.now, r.chosen
		}
	}
	if r.confirmed() >= r.now { // alone
		r.answerReads(func(q *read) (Slot, bool, bool) { return q.slot, true, q.round != 0 })
	}
}

// confirmDue is when a heartbeat may be sent next to confirm what waits. Rounds
// overlap, a few within a round trip, so that a read which has just missed one
// does not wait for two.
func (r *Replica) confirmDue() Instant {
	last := r.lead.heartbeatAt
	if r.beats != nil {
		for _, p := range r.peers {
			last = max(last, r.beats.link(p.id).sentAt)
		}
	}
	return max(last+1, r.lead.confirmAt.Add(r.readSpace()))
}

// confirmed is confirmedAt for whatever may be in force.
func (r *Replica) confirmed() Instant {
	at := r.confirmedAt(&r.quorums)
	if c := r.lead.change; c != nil && c.at != 0 {
		at = min(at, r.confirmedAt(&c.quorums))
	}
	return at
}

func (r *Replica) readSpace() time.Duration { return max(readSpaceMin, r.quorumRoundTrip()/4) }

// forwardReads asks the leader, for all that have not been asked for and those
// whose answer is overdue.
func (r *Replica) forwardReads() {
	f := &r.forwarded
	to := r.leader.Replica
	if to == 0 || to == r.cfg.ID || r.now < f.sentAt.Add(r.readSpace()) {
		return
	}
	retry := readRetryMin
	if p := r.peer(to); p != nil {
		retry += 2 * p.rtt
	}
	overdue := f.id == 0 || f.to != to || r.now >= f.sentAt.Add(retry)
	asked := false
	for i := range r.reads {
		if q := &r.reads[i]; q.from == 0 && (q.request == 0 || overdue) {
			asked = true
		}
	}
	if !asked {
		return
	}
	// Number and instant tell it from all of earlier lives, whose answers may
	// come yet.
	*f = forwarding{id: r.rng.Uint64() | 1, sentAt: r.now, to: to}
	for i := range r.reads {
		if q := &r.reads[i]; q.from == 0 && (q.request == 0 || overdue) {
			q.request, q.requestAt = f.id, r.now
		}
	}
	r.send(Message{Kind: MsgReadIndex, To: to, ID: f.id, SentAt: r.now, Chosen: r.chosen})
}

// onReadIndexReply answers all reads that had been asked for here before the
// request was sent: its own and those of earlier requests.
func (r *Replica) onReadIndexReply(m Message) {
	r.learnOf(m.Chosen, m.From)
	last := -1
	for i := range r.reads {
		if q := &r.reads[i]; q.from == 0 && q.request == m.ID && q.requestAt == m.SentAt {
			last = i
		}
	}
	if last < 0 || !m.Granted || m.ID == 0 {
		return // one that does not lead is asked again when that has had time to show
	}
	i := 0
	r.answerReads(func(q *read) (Slot, bool, bool) {
		i++
		return m.Slot, true, i-1 <= last && q.from == 0
	})
}

// rerouteReads is for one that does not lead any more: what was asked here goes
// to its successor.
func (r *Replica) rerouteReads() {
	r.forwarded = forwarding{}
	r.answerReads(func(q *read) (Slot, bool, bool) {
		q.round, q.slot, q.request, q.requestAt = 0, 0, 0, 0
		return 0, false, q.from != 0
	})
}

// readsDeadline is when Tick can do something for reads.
func (r *Replica) readsDeadline() Instant {
	next := r.now.Add(r.cfg.TickInterval)
	for i := range r.reads {
		q := &r.reads[i]
		switch {
		case r.openingChosen() && q.round == 0:
			next = min(next, r.confirmDue())
		case !r.openingChosen() && q.from == 0 && q.request == 0 && !r.leader.IsZero():
			next = min(next, r.forwarded.sentAt.Add(r.readSpace()))
		}
	}
	return max(next, r.now+1)
}
