package paxosgroup

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// Errors that callers compare.
var (
	ErrNotLeader  = errors.New("not the leader")
	ErrWindowFull = errors.New("no room for proposals now")
	ErrMessage    = errors.New("bad message")
)

// stage is how far a candidacy or leadership has come.
type stage uint8

const (
	idle      stage = iota
	asking          // pre-vote
	preparing       // phase 1, and fetching the chosen prefix
	proposing       // phase 1 was done: phase 2 of inherited, then own entries
)

// ownRecord is a promise (slot 0) or acceptance by this very replica that
// counts once the Ready with number seq is flushed.
type ownRecord struct {
	seq    uint64
	ballot Ballot
	slot   Slot
	config bool // rather: this replica has the configuration entry at slot as chosen
}

// Replica is proposer, acceptor and learner of one group. It is a pure state
// machine and not safe for concurrent use.
type Replica struct {
	cfg   Config
	store Storage
	rng   *rand.Rand
	now   Instant

	// Acceptor.
	promised    Ballot
	log         slotRing // above chosen
	logBytes    int
	maxAccepted Slot

	// Learner.
	base       Base
	chosen     Slot
	judge      Judge
	membership Membership // governs slot chosen+1
	configAt   Slot       // of the entry that put it in force, or of the base
	quorums    quorums    // of membership
	voters     uint64     // in any configuration of it
	self       int        // bit of this replica: 0, or -1 if it is no member
	bits       bitTable
	retiring   []Member // left out by the last change, which has not spread yet
	contacts   []Member
	settled    bool // leader: a phase-2 quorum has configAt as chosen, on disk
	void       uint64

	openings     uint64 // own, chosen
	openingTook  time.Duration
	openingTotal time.Duration

	commit   Slot // the leader of commitAt has everything up to here as chosen
	commitAt Ballot
	fetch    fetchState

	// Lease as a grantor.
	grantedTo    Ballot
	grantedUntil Instant
	registered   registration
	beats        *Beats  // nil: heartbeats are this group's own
	absorbed     uint64  // of its changes
	restartUntil Instant // until when an earlier life may have granted one

	// Elections.
	role         Role
	stage        stage
	ballot       Ballot // candidate, leader: own
	highest      Ballot // seen anywhere
	leader       Ballot // of the leader heard of; zero if none
	leaderHeard  Instant
	quietUntil   Instant // refuse pre-votes but of quietFor
	quietFor     ReplicaID
	electionAt   Instant
	probeAt      Instant
	electable    bool
	incarnation  Incarnation
	applied      Slot
	released     Ballot // stepped down from, to be announced at releaseAt
	releaseAt    Instant
	releasedAsOf Slot
	candidacy    candidacy
	lead         leadership
	peers        []*peer // members but this one, by id
	reads        []read  // that wait, in order of asking
	forwarded    forwarding
	handBack     handBack

	// What is owed to the caller.
	seq            uint64
	pending        Ready
	spare          Ready // empty slices for the next one
	own            []ownRecord
	storedChosen   Slot // chosen as of the last Ready: what Storage can read back
	recordedChosen Slot
	configFlushed  Slot // this replica has the configuration of that slot as chosen, on disk
}

// New returns the replica that st was written by, or one without a past. Its
// clock starts at now.
func New(cfg Config, st Restored, store Storage, now Instant) (*Replica, error) {
	cfg.fillDefaults()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configure replica of group %d: %w", cfg.Group, err)
	}
	if st.Chosen < st.Base.Slot {
		st.Chosen = st.Base.Slot
	}
	r := &Replica{
		cfg: cfg, store: store, now: now,
		rng:      rand.New(rand.NewPCG(cfg.Seed, uint64(cfg.Group)<<32|uint64(cfg.ID))),
		promised: st.Promised,
		base:     st.Base, chosen: st.Base.Slot, judge: st.Base.Judge.Clone(),
		role: Follower, electable: true,
	}
	if err := r.adopt(st.Base.Membership); err != nil {
		return nil, fmt.Errorf("restore base at slot %d: %w", st.Base.Slot, err)
	}
	if j := st.Judged; j != nil && j.Slot == st.Chosen {
		r.chosen, r.judge = j.Slot, j.Judge.Clone()
		if j.Configured > st.Base.Slot {
			r.setMembership(j.Membership.normalized(), j.Configured)
		}
		r.configFlushed = r.configAt
	} else if err := r.refold(st.Chosen); err != nil {
		return nil, err
	}
	r.storedChosen, r.recordedChosen = r.chosen, r.chosen
	for _, a := range st.Accepted {
		if a.Slot <= r.chosen {
			continue
		}
		r.put(a.Slot, a.Ballot, &a.Entry)
		if r.promised.Less(a.Ballot) {
			r.promised = a.Ballot
		}
	}
	r.highest = r.promised
	if cfg.RestartedWithState || !st.Promised.IsZero() || st.Chosen > 0 || len(st.Accepted) > 0 {
		r.restartUntil = now.Add(cfg.LeaseDuration)
	}
	r.fetch.bytesMax = fetchBytesFirst
	r.probeAt = now.Add(r.random(cfg.ElectionTimeoutMin))
	r.resetElection(now)
	return r, nil
}

// adopt takes m for the initial membership. An empty one is that of a replica
// which has yet to be seeded: it learns, but never campaigns.
func (r *Replica) adopt(m Membership) error {
	m = m.normalized()
	if len(m.Members) > 0 {
		if err := m.Validate(); err != nil {
			return err
		}
	}
	r.setMembership(m, r.base.Slot)
	return nil
}

// refold brings judge and membership up to the chosen slot of a restart.
func (r *Replica) refold(to Slot) error {
	const chunkBytes = 4 << 20
	for r.chosen < to {
		entries, err := r.store.Chosen(r.chosen+1, to, chunkBytes)
		if err != nil {
			return fmt.Errorf("read back chosen slots from %d: %w", r.chosen+1, err)
		}
		if len(entries) == 0 {
			return fmt.Errorf("read back chosen slots from %d to %d: none stored", r.chosen+1, to)
		}
		for _, e := range entries {
			if e.Slot != r.chosen+1 {
				return fmt.Errorf("read back chosen slots: slot %d follows %d", e.Slot, r.chosen)
			}
			r.chosen = e.Slot
			r.judge.Judge(e.Entry)
			if m, ok := r.membership.Next(e.Entry); ok {
				r.setMembership(m, e.Slot)
			}
		}
	}
	r.configFlushed = r.configAt
	return nil
}

// Step takes in a message. An error means bad input, which changed nothing.
func (r *Replica) Step(now Instant, m Message) error {
	r.clock(now)
	if err := r.check(m); err != nil {
		return err
	}
	if p := r.peer(m.From); p != nil {
		p.lastHeard = r.now
	}
	preVote := m.Kind == MsgPreVote || m.Kind == MsgPreVoteReply && m.Granted // about a ballot nobody may ever use
	if !preVote && r.highest.Less(m.Ballot) {
		r.highest = m.Ballot
	}
	if !preVote && r.stage == proposing && r.ballot.Less(m.Ballot) && r.membership.Votes(m.From) {
		// Phase 1 is skipped only while no higher ballot is about. The sender
		// has promised this one or is about to, and would refuse the own.
		r.stepDown()
	}
	switch m.Kind {
	case MsgPreVote:
		r.onPreVote(m)
	case MsgPreVoteReply:
		r.onPreVoteReply(m)
	case MsgPrepare:
		r.onPrepare(m)
	case MsgPromise:
		r.onPromise(m)
	case MsgAccept:
		r.onAccept(m)
	case MsgAccepted:
		r.onAccepted(m)
	case MsgReject:
		r.onReject(m)
	case MsgHeartbeat:
		r.onHeartbeat(m)
	case MsgHeartbeatAck:
		r.onHeartbeatAck(m)
	case MsgFetch:
		r.onFetch(m)
	case MsgLearn:
		r.onLearn(m)
	case MsgTimeoutNow:
		r.onTimeoutNow(m)
	case MsgNeedSnapshot:
		r.onNeedSnapshot(m)
	case MsgReadIndex:
		r.onReadIndex(m)
	case MsgReadIndexReply:
		r.onReadIndexReply(m)
	}
	return nil
}

// check refuses what no replica sends.
func (r *Replica) check(m Message) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: kind %d from replica %d: "+format, append([]any{ErrMessage, m.Kind, m.From}, args...)...)
	}
	if m.From == 0 || m.From == r.cfg.ID || m.To != r.cfg.ID {
		return bad("addressed to replica %d, this is %d", m.To, r.cfg.ID)
	}
	switch m.Kind {
	case MsgPreVote, MsgPrepare, MsgAccept, MsgHeartbeat, MsgTimeoutNow:
		if m.Ballot.Counter == 0 || m.Ballot.Replica != m.From {
			return bad("ballot %v is not the sender's", m.Ballot)
		}
	case MsgPreVoteReply, MsgPromise, MsgAccepted, MsgReject, MsgHeartbeatAck, MsgFetch, MsgLearn, MsgNeedSnapshot, MsgReadIndex, MsgReadIndexReply:
	default:
		return bad("unknown")
	}
	var last Slot
	for _, e := range m.Entries {
		if e.Slot <= last || !e.Entry.Kind.valid() {
			return bad("slot %d after %d, entry %v", e.Slot, last, e.Entry.Kind)
		}
		last = e.Slot
	}
	last = 0
	for _, a := range m.Accepted {
		if a.Slot <= last || !a.Entry.Kind.valid() || a.Ballot.IsZero() {
			return bad("accepted slot %d after %d at ballot %v, entry %v", a.Slot, last, a.Ballot, a.Entry.Kind)
		}
		last = a.Slot
	}
	return nil
}

func (k EntryKind) valid() bool { return k >= KindNoOp && k <= KindConfig }

// Tick lets time pass.
func (r *Replica) Tick(now Instant) {
	r.clock(now)
	r.tickRelease()
	switch r.stage {
	case proposing:
		r.tickLeader()
	case asking, preparing:
		r.tickCandidate()
	default:
		r.tickProbe()
		if r.now >= r.electionAt {
			r.onElectionTimeout()
		}
	}
	r.tickFetch()
	r.serveReads()
}

// clock never lets time step back. It takes in what beats did since the last
// call before anything else happens; and whatever comes next, a leadership that
// has outlived its lease has no part in it.
func (r *Replica) clock(now Instant) {
	r.now = max(r.now, now)
	r.absorb()
	if r.stage != proposing {
		return
	}
	if r.lapsed() {
		r.stepDown()
	} else {
		r.grant(r.ballot)
	}
}

// Ready returns what has become due since the last call, or false if nothing.
// Its parts are the caller's to keep, or to be given back to Recycle; payload
// bytes are shared and never changed.
func (r *Replica) Ready() (Ready, bool) {
	if r.stage == proposing {
		r.sendAccepts()
		r.sendChosen()
	}
	if r.chosen > r.recordedChosen {
		rec := Record{Kind: RecordChosen, Slot: r.chosen}
		if r.configAt > r.recordedChosen {
			// That a change of membership is done rests on this knowledge: those
			// it leaves out go away, and with them what could prove it again.
			rec.Flush = true
			r.own = append(r.own, ownRecord{seq: r.seq + 1, slot: r.configAt, config: true})
		}
		r.recordedChosen = r.chosen
		r.pending.Persist = append(r.pending.Persist, rec)
	}
	p := &r.pending
	if len(p.Send) == 0 && len(p.Persist) == 0 && len(p.AfterSync) == 0 && len(p.Delivered) == 0 && len(p.Reads) == 0 && !p.Snapshot {
		return Ready{}, false
	}
	r.seq++
	rd := *p
	rd.Seq = r.seq
	r.pending, r.spare = r.spare, Ready{}
	r.storedChosen = r.chosen
	return rd, true
}

// Recycle takes back the slices of a Ready which nobody uses any more, to be
// filled again. Any of them may be left out, and it need not be called at all.
func (r *Replica) Recycle(rd Ready) {
	reuse(&r.pending.Send, &r.spare.Send, rd.Send)
	reuse(&r.pending.Persist, &r.spare.Persist, rd.Persist)
	reuse(&r.pending.AfterSync, &r.spare.AfterSync, rd.AfterSync)
	reuse(&r.pending.Delivered, &r.spare.Delivered, rd.Delivered)
}

// recycledMax bounds the elements that are kept of each: a thousand groups are
// not to keep what they once needed at the same time.
const recycledMax = 1024

// reuse puts used, emptied, where there is less room: in place of what is
// pending, unless that has begun, or of what is spare.
func reuse[T any](pending, spare *[]T, used []T) {
	if cap(used) == 0 || cap(used) > recycledMax {
		return
	}
	clear(used) // and what lies behind was never filled, or is clear
	switch used = used[:0]; {
	case len(*pending) == 0 && cap(*pending) < cap(used):
		*pending = used
	case cap(*spare) < cap(used):
		*spare = used
	}
}

// Persisted says that all Readies up to seq are flushed. Only now do this
// replica's own promise and acceptances count.
func (r *Replica) Persisted(now Instant, seq uint64) {
	r.clock(now)
	invariant(seq <= r.seq, "Ready %d persisted, %d were handed out", seq, r.seq)
	n := 0
	for ; n < len(r.own) && r.own[n].seq <= seq; n++ {
		o := r.own[n]
		if o.config {
			r.configFlushed = max(r.configFlushed, o.slot)
			continue
		}
		if o.ballot != r.ballot || r.stage < preparing {
			continue
		}
		if o.slot == 0 {
			r.recordPromise(r.cfg.ID, r.chosen)
			continue
		}
		if st := r.log.at(o.slot); st != nil && st.ballot == o.ballot && r.self >= 0 {
			st.acks |= 1 << r.self
		}
	}
	if n == 0 {
		return
	}
	r.own = slices.Delete(r.own, 0, n)
	switch r.stage {
	case preparing:
		r.checkPhase1()
	case proposing:
		r.advance()
		r.tryChange()
	}
}

// persist owes the caller a record; ownSlot says what of it counts for this
// replica as a proposer.
func (r *Replica) persist(rec Record) {
	r.pending.Persist = append(r.pending.Persist, rec)
}

func (r *Replica) countWhenFlushed(b Ballot, s Slot) {
	r.own = append(r.own, ownRecord{seq: r.seq + 1, ballot: b, slot: s})
}

func (r *Replica) send(m Message) {
	m.From = r.cfg.ID
	r.pending.Send = append(r.pending.Send, m)
}

func (r *Replica) sendAfterSync(m Message) {
	m.From = r.cfg.ID
	r.pending.AfterSync = append(r.pending.AfterSync, m)
}

// SetElectable says whether this replica's database could lead. One that could
// not never campaigns; it does not give up a leadership it has.
func (r *Replica) SetElectable(ok bool) { r.electable = ok }

// SetIncarnation sets what goes into openings from now on.
func (r *Replica) SetIncarnation(i Incarnation) { r.incarnation = i }

// SetApplied sets what pre-votes and heartbeat acknowledgements carry.
func (r *Replica) SetApplied(s Slot) { r.applied = s }

// Restart puts the image b in place of everything at or below its slot, after
// which the log starts there. A replica that has already learned that far keeps
// its log, which serves the image as well, and nothing changes.
func (r *Replica) Restart(now Instant, b Base) {
	r.clock(now)
	if b.Slot <= r.chosen {
		return
	}
	if r.stage != idle {
		r.stepDown()
	}
	r.pending.Delivered = nil // the image holds it
	b.Membership = b.Membership.normalized()
	for _, s := range r.log.slots() {
		if s <= b.Slot {
			r.drop(s)
		}
	}
	r.base, r.chosen, r.judge = b, b.Slot, b.Judge.Clone()
	r.setMembership(b.Membership, b.Slot)
	r.recordedChosen, r.configFlushed = r.chosen, b.Slot
	r.fetch = fetchState{known: r.fetch.known, from: r.fetch.from, bytesMax: r.fetch.bytesMax}
	r.persist(Record{Kind: RecordBase, Slot: b.Slot, Base: &b})
	// The promise and what is accepted above the image outlive the old log.
	if !r.promised.IsZero() {
		r.persist(Record{Kind: RecordPromise, Ballot: r.promised})
	}
	for _, s := range r.log.slots() {
		st := r.log.at(s)
		r.persist(Record{Kind: RecordAccept, Ballot: st.ballot, Slot: s, Entry: st.entry})
	}
	r.learnCommitted()
}

// Truncate makes the log start at b, which is what judge and membership were at
// its slot: the entries up to there are chosen, and are no longer needed here.
// Nothing else changes. A base that is not above the present one, or above the
// chosen prefix, changes nothing at all.
func (r *Replica) Truncate(now Instant, b Base) {
	r.clock(now)
	if b.Slot <= r.base.Slot || b.Slot > r.chosen {
		return
	}
	b.Membership = b.Membership.normalized()
	r.base = b
	r.persist(Record{Kind: RecordBase, Slot: b.Slot, Base: &b})
}

// put holds e as accepted at b in s.
func (r *Replica) put(s Slot, b Ballot, e *Entry) {
	st := r.log.put(s)
	r.logBytes += len(e.Payload) - len(st.entry.Payload)
	st.ballot, st.entry, st.acks = b, *e, 0
	r.maxAccepted = max(r.maxAccepted, s)
}

func (r *Replica) drop(s Slot) {
	if st := r.log.at(s); st != nil {
		r.logBytes -= len(st.entry.Payload)
		r.log.drop(s)
	}
}
