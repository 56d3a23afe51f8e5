package paxosgroup

import (
	"slices"
	"time"
)

// leadership is what phase 2 needs. It starts with phase 1 and ends with the
// ballot.
type leadership struct {
	promised       []ReplicaID
	promisedChosen Slot                   // highest chosen slot any of them knows
	recovered      map[Slot]AcceptedEntry // of phase 1, by highest ballot, not proposed yet
	recoveredMax   Slot
	phase1         bool // done in every configuration that may govern slot next

	next        Slot // to be proposed
	number      uint64
	opened      bool // the own opening is proposed
	incarnation Incarnation
	windowBytes int
	inheritedAt Slot    // of an undecided configuration entry of another leadership; 0 if none
	since       Instant // this leadership, or the membership in force
	lapsesAt    Instant // not before then, as last looked at
	heartbeatAt Instant // last one sent
	confirmAt   Instant // last one sent to all for the sake of reads
	noticeAt    Instant // when the chosen slot is to be made known; 0 if it is
	noticedAt   Instant
	noticed     Slot // is what is to be made known at noticeAt
	tail        tail
	hedgeAt     Instant // when held entries are to be sent; 0 if none are held

	change   *change // under way and not chosen yet
	revert   bool    // the joint configuration is to be left the way it was entered
	transfer *transfer
}

// peer is what this replica knows of another member.
type peer struct {
	id              ReplicaID
	index           int // of its bit in acks, as long as it is a peer
	chosen, applied Slot
	knows           Slot // chosen, as said after a flush: no crash makes it forget a membership up to there
	lastHeard       Instant
	movedAt         Instant // chosen or applied
	rtt             time.Duration

	// As a leader's follower, since this leadership began.
	leaseSentAt Instant // greatest of our sending times it answered with a grant
	toldAt      Instant // last heartbeat that asked for a grant
	shares      bool    // asked to let beats stand for heartbeats
	covering    covering
	preparedAt  Instant
	chosenSent  Slot
	acked       Slot // highest
	flow        flow
}

const (
	acceptBytesMax    = 1 << 20
	acceptSlotsMax    = 256
	noticeDelay       = 5 * time.Millisecond
	retransmitMin     = 50 * time.Millisecond
	retransmitUnknown = 300 * time.Millisecond
)

func (r *Replica) peer(id ReplicaID) *peer {
	for _, p := range r.peers {
		if p.id == id {
			return p
		}
	}
	return nil
}

// beginLeading starts phase 2: first what was inherited, then the opening.
func (r *Replica) beginLeading() {
	l := &r.lead
	l.since, l.next, l.tail, l.hedgeAt = r.now, r.chosen+1, tail{}, 0
	for _, a := range r.log.slots() { // the own promise
		if st := r.log.at(a); st.ballot.Less(r.ballot) {
			r.recover(AcceptedEntry{Slot: a, Ballot: st.ballot, Entry: st.entry})
		}
	}
	for _, p := range r.peers {
		p.toldAt, p.covering = 0, covering{}
		p.leaseSentAt, p.chosenSent, p.acked = 0, 0, r.chosen
		p.flow.begin(l.next)
	}
	r.heartbeat()
}

// pump proposes what is to be proposed before anything that a caller hands in:
// the inherited entries in their slots, no-ops in the gaps, then the opening.
// It stops at an inherited configuration entry until that is chosen and phase 1
// is done in the new configuration. (At one of its own, the leader has done that
// before: reconfigure.go.)
func (r *Replica) pump() {
	l := &r.lead
	for r.stage == proposing && l.phase1 && l.inheritedAt == 0 {
		if l.next <= r.chosen { // learned from others
			l.next, l.tail = r.chosen+1, tail{}
		}
		switch {
		case l.next <= l.recoveredMax:
			noop := Entry{Kind: KindNoOp, Term: r.ballot, Region: r.cfg.Region, Incarnation: r.incarnation}
			e := noop
			if a, ok := l.recovered[l.next]; ok {
				e = a.Entry
				delete(l.recovered, l.next)
			}
			if _, takes := r.membership.Next(e); takes {
				if l.opened {
					// A promise that came late tells of it. It is chosen nowhere: of
					// those whose promises this leadership opened with none had
					// anything here. And the lease in use was not counted under it,
					// as it is for one that this leader proposes itself.
					e = noop
				} else {
					l.inheritedAt = l.next
				}
			}
			r.propose(e)
		case !l.opened:
			r.role, l.opened, l.incarnation = Leader, true, r.incarnation
			r.candidacy.failures = 0
			r.noteTenure(r.ballot)
			r.propose(Entry{Kind: KindOpening, Term: r.ballot, Region: r.cfg.Region, Incarnation: r.incarnation})
		default:
			return
		}
	}
}

// propose starts phase 2 for the next slot.
func (r *Replica) propose(e Entry) {
	l := &r.lead
	s := l.next
	invariant(s > r.chosen, "slot %d proposed, chosen up to %d", s, r.chosen)
	r.mayPropose(s)
	l.next++
	l.windowBytes += len(e.Payload)
	r.put(s, r.ballot, &e)
	l.tail.add(SlotEntry{Slot: s, Entry: e})
	r.persist(Record{Kind: RecordAccept, Ballot: r.ballot, Slot: s, Entry: e})
	r.countWhenFlushed(r.ballot, s)
}

// Propose hands in the next data entry of this leader's term. ErrWindowFull
// asks to come again when something has been chosen.
func (r *Replica) Propose(now Instant, payload []byte) (term Ballot, number uint64, err error) {
	return r.ProposeOnce(now, 0, 0, payload)
}

// ProposeOnce is Propose for an entry that its session may have proposed before,
// here or elsewhere: of those with one sequence number, or a lower one than is
// effective already, at most one becomes effective. Session 0 is none.
func (r *Replica) ProposeOnce(now Instant, session, sequence uint64, payload []byte) (term Ballot, number uint64, err error) {
	r.clock(now)
	if r.role != Leader {
		return Ballot{}, 0, ErrNotLeader
	}
	l := &r.lead
	if l.transfer != nil || l.inheritedAt != 0 || !l.phase1 || l.next <= l.recoveredMax || l.next-r.chosen > Slot(r.cfg.WindowSlotsMax) ||
		l.windowBytes > 0 && l.windowBytes+len(payload) > r.cfg.WindowBytesMax {
		return Ballot{}, 0, ErrWindowFull
	}
	l.number++
	r.propose(Entry{
		Kind: KindData, Term: r.ballot, Number: l.number, Region: r.cfg.Region, Incarnation: l.incarnation,
		Session: session, Sequence: sequence, Payload: payload,
	})
	return r.ballot, l.number, nil
}

func (r *Replica) onAccepted(m Message) {
	p := r.peer(m.From)
	if p == nil {
		return
	}
	r.noteProgress(p, m.Chosen, max(p.applied, m.Applied))
	if r.stage != proposing || m.Ballot != r.ballot {
		return
	}
	for _, s := range m.Slots {
		if s >= r.lead.next {
			continue
		}
		r.noteAcked(p, s)
		if st := r.log.at(s); st != nil && st.ballot == r.ballot {
			st.acks |= 1 << p.index
		}
	}
	r.noteAnswer(p, m)
	r.advance()
	r.tryChange()
}

// noteProgress takes in what an answer tells that was sent after a flush.
func (r *Replica) noteProgress(p *peer, chosen, applied Slot) {
	p.knows = max(p.knows, chosen)
	if chosen > p.chosen || applied != p.applied {
		p.chosen, p.applied, p.movedAt = max(p.chosen, chosen), applied, r.now
	}
}

func (r *Replica) noteAcked(p *peer, s Slot) {
	p.acked = max(p.acked, s)
}

// advance extends the chosen prefix by every slot that a phase-2 quorum has
// accepted at this leader's ballot.
func (r *Replica) advance() {
	before := r.chosen
	for r.stage == proposing {
		st := r.log.at(r.chosen + 1)
		if st == nil || st.ballot != r.ballot {
			break
		}
		// In slot order, so that a slot is counted in the configuration that
		// the entries below it, now known, put in force.
		if !r.quorums.phase2(st.acks) {
			break
		}
		r.choose(r.chosen+1, st.entry)
	}
	if r.chosen > before {
		r.afterLearning(before)
	}
}

// afterLearning does what a chosen prefix allows that was as long as before and
// is longer now.
func (r *Replica) afterLearning(before Slot) {
	l := &r.lead
	if r.stage < preparing {
		return
	}
	if l.inheritedAt != 0 && r.chosen >= l.inheritedAt {
		l.inheritedAt = 0
		r.prepareNewcomers()
	}
	if r.stage == proposing && r.configAt > before {
		r.heartbeat() // the next step waits until they know
	}
	if r.stage == proposing {
		r.scheduleNotice()
	}
	if !r.membership.Votes(r.cfg.ID) && r.role != Leader {
		// Removed by another leadership (one that does it itself leaves when the
		// change is done). The others are to know before this one falls silent.
		r.lead.noticeAt, r.lead.noticed = r.now, r.chosen
		r.sendChosen()
		r.stepDown()
		return
	}
	r.checkPhase1()
}

// prepareNewcomers asks for the promises of members that have none to show.
func (r *Replica) prepareNewcomers() {
	for _, p := range r.peers {
		if !slices.Contains(r.lead.promised, p.id) {
			r.sendPrepare(p)
		}
	}
}

// scheduleNotice says when followers are to hear of the chosen slot: soon, so
// that an Accept which follows can carry it.
func (r *Replica) scheduleNotice() {
	l := &r.lead
	due := r.now.Add(hedgeDelay)
	switch {
	case r.changeState() != ChangeNone || l.transfer != nil:
		due = r.now // the next step waits until they know
	case r.chosen+1 < l.next:
		due = max(due, l.noticedAt.Add(noticeDelay))
	}
	told := true
	for _, p := range r.peers {
		told = told && p.chosenSent >= l.noticed
	}
	if told || l.noticeAt == 0 {
		l.noticeAt, l.noticed = due, r.chosen
	}
	l.noticeAt = min(l.noticeAt, due)
}

// sendChosen makes the chosen slot known to those who have not heard of it by
// an Accept.
func (r *Replica) sendChosen() {
	l := &r.lead
	if l.noticeAt == 0 || r.now < l.noticeAt {
		return
	}
	l.noticeAt, l.noticedAt = 0, r.now
	if r.changeState() != ChangeNone || l.transfer != nil {
		l.noticed = r.chosen
	}
	for _, p := range r.peers {
		// What was chosen since has its own time to be carried by an Accept. One
		// that cannot keep up hears it with the next heartbeat.
		if slots, _ := r.room(p); p.chosenSent < l.noticed && slots > 0 {
			p.chosenSent = r.chosen
			r.send(Message{Kind: MsgHeartbeat, To: p.id, Ballot: r.ballot, Chosen: r.chosen})
		}
	}
	if l.noticed < r.chosen {
		r.scheduleNotice()
	}
}

// heartbeat asks all for a grant.
func (r *Replica) heartbeat() {
	r.grant(r.ballot)
	for _, p := range r.peers {
		r.sendHeartbeat(p)
	}
}

func (r *Replica) sendHeartbeat(p *peer) {
	p.toldAt, r.lead.heartbeatAt = r.now, r.now
	p.chosenSent = max(p.chosenSent, r.chosen)
	m := Message{Kind: MsgHeartbeat, To: p.id, Ballot: r.ballot, Chosen: r.chosen, SentAt: r.now}
	r.share(p, &m)
	r.send(m)
}

// sendHeartbeats asks those for a grant whom it is time to ask.
func (r *Replica) sendHeartbeats() {
	leased := r.leaseUntil(&r.quorums) > r.now.Add(r.cfg.leaseReserve())
	for _, p := range r.peers {
		if due, ok := r.heartbeatDue(p, leased); ok && r.now >= due {
			r.sendHeartbeat(p)
		}
	}
}

func (r *Replica) tickLeader() {
	l := &r.lead
	r.sendHeartbeats()
	for _, p := range r.peers {
		r.tickFlow(p)
	}
	if !l.phase1 || l.change != nil && l.change.at == 0 {
		for _, p := range r.peers {
			if !slices.Contains(l.promised, p.id) && r.now >= p.preparedAt.Add(r.retransmitTimeout(p)) {
				r.sendPrepare(p)
			}
		}
	}
	r.tryChange()
	r.tickHandBack()
	r.tickTransfer()
}

// lapsed reports whether this leadership has been without a lease for as long
// as one lasts. It then ends: followers that hear a leader which does not hear
// them would honour its lease for ever.
func (r *Replica) lapsed() bool {
	l := &r.lead
	if r.now > l.lapsesAt { // grants come in between, so that it is later by now
		l.lapsesAt = max(r.leaseUntil(&r.quorums), l.since).Add(r.cfg.LeaseDuration)
	}
	return r.now > l.lapsesAt
}

// mayPropose asserts, for slots up to s, all that allows phase 1 to be skipped:
// no higher ballot was promised here, a phase-1 quorum of every configuration
// that may govern the slot promised this one for all slots, and the leadership
// has not outlived its lease by another one.
func (r *Replica) mayPropose(s Slot) {
	l := &r.lead
	invariant(r.promised == r.ballot, "proposing at %v with promise %v", r.ballot, r.promised)
	if s <= r.chosen {
		// Only told to those who were not sent it yet. It was chosen in another
		// configuration, perhaps, than is in force by now.
		return
	}
	promised := r.bits.set(l.promised)
	if c := l.change; c != nil && c.at != 0 && c.at < s {
		invariant(c.quorums.phase1(promised), "slot %d above the change at slot %d proposed at %v without its phase 1", s, c.at, r.ballot)
	}
	invariant(r.quorums.phase1(promised), "slot %d proposed at %v without phase 1 in epoch %d", s, r.ballot, r.membership.Epoch)
	invariant(!r.lapsed(), "slot %d proposed at %v, whose lease ended long ago", s, r.ballot)
}

func (r *Replica) retransmitTimeout(p *peer) time.Duration {
	if p.rtt == 0 {
		return retransmitUnknown
	}
	return min(2*p.rtt+retransmitMin, r.cfg.LeaseDuration)
}
