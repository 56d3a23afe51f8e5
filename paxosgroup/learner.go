package paxosgroup

import (
	"slices"
	"time"
)

// fetchState is the catching up on chosen entries that were missed.
type fetchState struct {
	known    Slot      // somebody has everything up to here as chosen
	from     ReplicaID // who
	until    Instant   // an answer is awaited until then; 0 if none is
	asked    ReplicaID
	served   ReplicaID   // the last one that had what was asked for
	tried    []ReplicaID // without success in this round
	missing  Slot        // what this and earlier rounds ask for
	askedAt  Instant
	below    bool // one of tried no longer holds what is missing: it is below its base
	doubtful bool // one of tried is there and has not answered
	rounds   int  // whole rounds that found only that
	image    bool // only an image helps, as of the last round
	bytesMax int  // of the next answer
}

// imageRounds is how many rounds in a row must find that only an image helps.
const imageRounds = 2

// An answer is as large as comes in about fetchTime: large enough that the round
// trip is not what counts, and not so large that a slow link is taken for long.
// The next is asked for when one is taken, so that the fetching replica sets the
// pace.
const (
	learnBytesMax   = 4 << 20
	fetchBytesMin   = 16 << 10
	fetchBytesFirst = 256 << 10
	fetchTime       = 200 * time.Millisecond
)

// pace adapts how much is asked for to how long an answer of size bytes took.
func (f *fetchState) pace(took time.Duration, size int) {
	if size < f.bytesMax/2 {
		return // that was all there is
	}
	fits := float64(f.bytesMax) * float64(fetchTime) / float64(max(took, time.Microsecond))
	f.bytesMax = int(min(max(fits, fetchBytesMin, float64(f.bytesMax)/4), learnBytesMax, 2*float64(f.bytesMax)))
}

// choose extends the chosen prefix by one slot.
func (r *Replica) choose(s Slot, e Entry) {
	invariant(s == r.chosen+1, "slot %d chosen after %d", s, r.chosen)
	if st := r.log.at(s); st != nil {
		if r.stage == proposing && st.ballot == r.ballot {
			invariant(sameValue(st.entry, e), "slot %d proposed at %v with another value than was chosen", s, r.ballot)
			r.lead.windowBytes -= len(st.entry.Payload)
			r.lead.tail.chosenBytes += len(st.entry.Payload)
		}
		r.drop(s)
	}
	r.chosen = s
	v := r.judge.Judge(e)
	if v == Void {
		r.void++
	}
	if e.Kind == KindOpening && r.stage == proposing && e.Term == r.ballot {
		r.openings++
		r.openingTook = r.now.Sub(r.candidacy.began)
		r.openingTotal += r.openingTook
	}
	r.pending.Delivered = append(r.pending.Delivered, Delivered{Slot: s, Entry: e, Verdict: v})
	if m, ok := r.membership.Next(e); ok {
		r.setMembership(m, s)
	}
}

// noteCommit takes in that the leader of b has every slot up to s as chosen.
func (r *Replica) noteCommit(b Ballot, s Slot) {
	if b.Less(r.commitAt) {
		return
	}
	if b != r.commitAt {
		r.commitAt, r.commit = b, 0
	}
	r.commit = max(r.commit, s)
	r.learnCommitted()
	r.learnOf(s, b.Replica)
}

// learnCommitted extends the chosen prefix by what was accepted from the leader
// that says it is chosen. What was accepted at another ballot may be another
// value, and is fetched.
func (r *Replica) learnCommitted() {
	if n := min(r.commit, r.maxAccepted); n > r.chosen {
		r.pending.Delivered = slices.Grow(r.pending.Delivered, int(min(n-r.chosen, Slot(r.log.count))))
	}
	for r.chosen < r.commit {
		st := r.log.at(r.chosen + 1)
		if st == nil || st.ballot != r.commitAt {
			return
		}
		r.beforeLearning(st.entry)
		r.choose(r.chosen+1, st.entry)
	}
}

// learnOf takes in that a peer has every slot up to s as chosen.
func (r *Replica) learnOf(s Slot, from ReplicaID) {
	if s > r.fetch.known {
		r.fetch.known, r.fetch.from = s, from
	}
	r.tickFetch()
}

func (r *Replica) tickFetch() {
	f := &r.fetch
	if f.missing != r.chosen+1 {
		f.missing, f.tried, f.below, f.doubtful, f.rounds, f.image = r.chosen+1, f.tried[:0], false, false, 0, false
	}
	if r.chosen >= f.known {
		f.until = 0
		return
	}
	if f.until != 0 {
		if r.now < f.until {
			return
		}
		if f.asked != 0 {
			if p := r.peer(f.asked); p != nil && p.lastHeard > f.askedAt {
				f.doubtful = true
			}
			f.tried = append(f.tried, f.asked)
			f.bytesMax /= 4 // perhaps it was too much
		}
	}
	to, ok := r.fetchPeer()
	if !ok { // a whole round without success
		r.endFetchRound()
		return
	}
	f.bytesMax = max(f.bytesMax, fetchBytesMin)
	f.asked, f.askedAt, f.until = to, r.now, r.now.Add(2*r.electionTimeout()+fetchTime)
	r.send(Message{Kind: MsgFetch, To: to, Slot: f.missing, Chosen: r.chosen, BytesMax: uint64(f.bytesMax)})
}

// endFetchRound asks for an image if that is all that helps: what is missing is
// below the base of a peer, every other one that is there has said that it
// cannot serve it, and all of it was so the last time. A round is followed by a
// rest, for by then every answer may be a quick one.
func (r *Replica) endFetchRound() {
	f := &r.fetch
	if f.below && !f.doubtful {
		f.rounds++
	} else {
		f.rounds = 0
	}
	f.image = f.rounds >= imageRounds
	f.tried, f.below, f.doubtful = f.tried[:0], false, false
	f.asked, f.until = 0, r.now.Add(r.electionTimeout())
	if !f.image {
		return
	}
	r.pending.Snapshot = true
	if r.stage == preparing && r.chosen < r.lead.promisedChosen {
		// It cannot have the prefix that it would lead from.
		r.failCandidacy()
	}
}

// couldNotServe takes in that the peer asked has not got what is missing.
func (r *Replica) couldNotServe(from ReplicaID, slot Slot, below bool) {
	f := &r.fetch
	if f.until == 0 || from != f.asked || slot != f.missing {
		return
	}
	f.below = f.below || below
	f.tried, f.asked, f.until = append(f.tried, from), 0, r.now
	r.tickFetch()
}

// fetchPeer returns whom to ask: who served before, then the leader, then who
// is known to have it, then everyone else.
func (r *Replica) fetchPeer() (ReplicaID, bool) {
	fresh := func(id ReplicaID) bool {
		return id != 0 && id != r.cfg.ID && !slices.Contains(r.fetch.tried, id)
	}
	if fresh(r.fetch.served) {
		return r.fetch.served, true
	}
	if fresh(r.leader.Replica) {
		return r.leader.Replica, true
	}
	if fresh(r.fetch.from) {
		return r.fetch.from, true
	}
	for _, p := range r.peers {
		if fresh(p.id) {
			return p.id, true
		}
	}
	return 0, false
}

func (r *Replica) onFetch(m Message) {
	if p := r.peer(m.From); p != nil {
		p.chosen = max(p.chosen, m.Chosen)
		r.noteCaughtUp(p)
	}
	if m.Slot == 0 {
		return
	}
	if m.Slot > r.storedChosen {
		if m.Slot > r.chosen { // else it is only not in Storage yet
			r.send(Message{Kind: MsgLearn, To: m.From, Slot: m.Slot, Chosen: r.chosen})
		}
		return
	}
	var entries []SlotEntry
	if m.Slot > r.base.Slot {
		var err error
		bytesMax := learnBytesMax
		if m.BytesMax > 0 && m.BytesMax < learnBytesMax {
			bytesMax = int(m.BytesMax)
		}
		entries, err = r.store.Chosen(m.Slot, r.storedChosen, bytesMax)
		if err != nil { // cut from the log, or unreadable: either way not to be had here
			entries = nil
		}
	}
	if len(entries) == 0 {
		r.send(Message{Kind: MsgNeedSnapshot, To: m.From, Slot: r.base.Slot, Chosen: r.chosen})
		return
	}
	r.send(Message{Kind: MsgLearn, To: m.From, Slot: m.Slot, Entries: entries, Chosen: r.chosen})
}

func (r *Replica) onLearn(m Message) {
	before := r.chosen
	for _, e := range m.Entries {
		if e.Slot != r.chosen+1 {
			continue
		}
		if r.deposedBy(e) {
			r.stepDown()
		}
		r.beforeLearning(e.Entry)
		r.persist(Record{Kind: RecordLearn, Slot: e.Slot, Entry: e.Entry})
		r.choose(e.Slot, e.Entry)
	}
	if r.chosen > before {
		if r.fetch.until != 0 && r.fetch.asked == m.From {
			size := 0
			for i := range m.Entries {
				size += len(m.Entries[i].Entry.Payload)
			}
			r.fetch.pace(r.now.Sub(r.fetch.askedAt), size)
		}
		r.fetch.until, r.fetch.served, r.fetch.tried = 0, m.From, r.fetch.tried[:0]
		r.learnCommitted()
		r.afterLearning(before)
	}
	if len(m.Entries) == 0 {
		r.couldNotServe(m.From, m.Slot, false)
	}
	r.learnOf(m.Chosen, m.From)
}

// beforeLearning ends a candidacy or leadership that is told of a new membership
// by others. It may have been chosen at a higher ballot than the own one; what
// this replica then proposed would be under a membership that ballots in between
// did not know of, and 0016-joint-consensus.md argues from that never being so.
// One that asks for promises afterwards gets them from somebody who has accepted
// the entry, hence at a higher ballot.
func (r *Replica) beforeLearning(e Entry) {
	if r.stage < preparing {
		return
	}
	if _, takes := r.membership.Next(e); takes {
		r.stepDown()
		r.electionAt = r.now.Add(r.random(r.electionTimeout() / 2))
	}
}

// deposedBy reports whether a chosen entry proves that a later leader was
// active. Going on, this one would announce slots as chosen in which followers
// hold its own, different entries.
func (r *Replica) deposedBy(e SlotEntry) bool {
	if r.stage != proposing {
		return false
	}
	if st := r.log.at(e.Slot); st != nil && st.ballot == r.ballot {
		return !sameValue(st.entry, e.Entry)
	}
	return r.lead.opened
}

func (r *Replica) onNeedSnapshot(m Message) {
	// One that holds nothing of it above its base cannot read its own log: it
	// says nothing of what was cut.
	r.couldNotServe(m.From, r.fetch.missing, m.Slot >= r.fetch.missing)
}
