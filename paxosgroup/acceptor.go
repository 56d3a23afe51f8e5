package paxosgroup

import "slices"

// raisePromise promises b, which ends any candidacy or leadership of this
// replica at a lower ballot. (Lamport, "Paxos Made Simple", section 2.2.)
func (r *Replica) raisePromise(b Ballot) {
	invariant(!b.Less(r.promised), "promise would fall from %v to %v", r.promised, b)
	if b == r.promised {
		return
	}
	if r.stage != idle && b != r.ballot && (r.stage == asking || r.ballot.Less(b)) {
		r.stepDown()
	}
	r.unregister() // of the leadership promised before
	r.promised = b
	if r.highest.Less(b) {
		r.highest = b
	}
	r.persist(Record{Kind: RecordPromise, Ballot: b})
}

func (r *Replica) onPrepare(m Message) {
	// An equal ballot is the same proposer, whose first Promise was lost or
	// whose new configuration this replica joins: answer, it is on disk.
	repeated := m.Ballot == r.promised
	if m.Ballot.Less(r.promised) || !repeated && (r.now < r.restartUntil || r.honoursLease(m)) || r.stranger(m) {
		r.reject(m)
		return
	}
	r.raisePromise(m.Ballot)
	r.hush(m.From, r.now)
	if r.leader != m.Ballot {
		r.leader = Ballot{}
	}
	r.resetElection(r.now)
	out := Message{Kind: MsgPromise, To: m.From, Ballot: m.Ballot, Chosen: r.chosen, Applied: r.applied, SentAt: m.SentAt}
	for _, s := range r.log.slots() {
		st := r.log.at(s)
		out.Accepted = append(out.Accepted, AcceptedEntry{Slot: s, Ballot: st.ballot, Entry: st.entry})
	}
	r.learnOf(m.Chosen, m.From)
	r.sendAfterSync(out)
}

func (r *Replica) reject(m Message) {
	r.send(Message{Kind: MsgReject, To: m.From, Ballot: r.promised, SentAt: m.SentAt, Chosen: r.chosen})
}

func (r *Replica) onAccept(m Message) {
	if m.Ballot.Less(r.promised) {
		r.reject(m)
		return
	}
	r.follow(m)
	acked := make([]Slot, 0, len(m.Entries))
	r.pending.Persist = slices.Grow(r.pending.Persist, len(m.Entries))
	for i := range m.Entries {
		if r.accept(m.Ballot, &m.Entries[i]) {
			acked = append(acked, m.Entries[i].Slot)
		}
	}
	r.noteCommit(m.Ballot, m.Chosen)
	r.acknowledge(m, acked)
}

const acceptWindows = 8 // of slots, above the chosen prefix

// accept takes an entry into its slot, and reports whether this replica may say
// that it has. A chosen slot holds the only value that any later ballot can
// propose, so the answer is yes without a look.
func (r *Replica) accept(b Ballot, e *SlotEntry) bool {
	if e.Slot <= r.chosen {
		return true
	}
	old := r.log.at(e.Slot)
	if old != nil && old.ballot == b {
		invariant(sameValue(old.entry, e.Entry), "slot %d has two values at ballot %v", e.Slot, b)
		return true
	}
	// A replica far behind would keep all the present in memory while it reads
	// up the past; beyond this it only learns. In slots that is far, or one over a
	// long link would never catch up with a busy leader. What it holds already, and the slot
	// that everything waits for, it takes whatever their size.
	if e.Slot > r.chosen+Slot(acceptWindows*r.cfg.WindowSlotsMax) || e.Slot > r.chosen+1 && old == nil && r.logBytes > 2*r.cfg.WindowBytesMax {
		return false
	}
	invariant(!b.Less(r.promised), "slot %d accepted at %v below promise %v", e.Slot, b, r.promised)
	r.put(e.Slot, b, &e.Entry)
	r.persist(Record{Kind: RecordAccept, Ballot: b, Slot: e.Slot, Entry: e.Entry})
	return true
}

// acknowledge answers when it is durable, also that nothing could be taken;
// answers that wait for one flush go as one.
func (r *Replica) acknowledge(m Message, acked []Slot) {
	for i := range r.pending.AfterSync {
		o := &r.pending.AfterSync[i]
		if o.Kind == MsgAccepted && o.To == m.From && o.Ballot == m.Ballot {
			o.Slots = append(o.Slots, acked...)
			o.Chosen, o.SentAt = r.chosen, max(o.SentAt, m.SentAt)
			o.Granted = o.Granted && len(acked) == len(m.Entries)
			return
		}
	}
	r.sendAfterSync(Message{
		Kind: MsgAccepted, To: m.From, Ballot: m.Ballot, Slots: acked, Chosen: r.chosen, Applied: r.applied,
		SentAt: m.SentAt, Granted: len(acked) == len(m.Entries),
	})
}

// follow takes note of a leader at or above the promised ballot.
func (r *Replica) follow(m Message) {
	if r.stage == asking {
		r.stepDown()
	}
	r.raisePromise(m.Ballot)
	r.heardLeader(m.Ballot, r.now)
	r.resetElection(r.now)
}

// heardLeader takes note that the leader of b, which is promised, was alive.
func (r *Replica) heardLeader(b Ballot, at Instant) {
	if r.stage == asking {
		// The leader is there after all. It is granted a lease next, and a
		// candidacy that went on would break it.
		r.stepDown()
	}
	r.noteTenure(b)
	r.leader, r.leaderHeard = b, max(r.leaderHeard, at)
	r.hush(b.Replica, at)
}
