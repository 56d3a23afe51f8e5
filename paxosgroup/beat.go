package paxosgroup

import (
	"slices"
	"time"
)

// Beats is what the replicas of one process share, so that a thousand groups at
// rest cost as much as one: a heartbeat to each peer process in which any of
// them leads something, and its answer, stand for those of all groups. Like a
// Replica it is pure, not safe for concurrent use, and stepped by the same
// caller; Replica.Share hands it to the replicas.
//
// A leader asks a follower by an ordinary heartbeat to be registered. The
// follower answers with its life and a generation, which it keeps for each peer
// process. From then on every Beat that it receives from that process counts as
// a heartbeat of the registered leadership, and every BeatAck that names the
// same life and generation as a grant. Nothing is done per group for either: a
// replica takes in what happened meanwhile when it is next stepped (absorb).
// That is the same as having done so in time, for nothing else happened to it.
//
// Safety. What a leader may count is one statement: an ack that says (sentAt,
// life, generation) was made by a process that, at some moment after sentAt on
// the leader's clock, granted a lease from that moment to every leadership that
// was registered under (life, generation) then. It holds, from that moment or
// later, of every leadership L whose registration under (life, generation) was
// answered, before or after:
//
//   - Was L registered at that moment? Registrations of one generation only end
//     with the generation. Whatever ends one, a promise to another ballot, a
//     release, a hand-over, a leadership that ended at its leader, raises the
//     generation, so every later ack names another one. That costs all groups of
//     the two processes an ordinary heartbeat each, and nothing more.
//   - Or only later? Then what registered it was a heartbeat, which granted a
//     lease from its own receipt, later still.
//   - The grant rests on a flushed promise: the answer to the registration was
//     sent after the flush, and a promise that changes ends the registration.
//   - The leader counts from sentAt, the grantor from receipt, which is later,
//     as for any lease; pauses of either side only lengthen the grant.
//   - The statement never becomes false, so acks that come late, twice or out of
//     order do no harm. An ack to a beat of an earlier life of the leader names
//     that life and is not taken.
//   - A process that restarts has a new life and so knows no registration; like
//     every grantor it waits out what it may have granted.
//
// A grant is honoured whether or not the registration ended since: grantedAt
// answers for generations that are over too, and says too late rather than too
// early.
//
// A leadership that ends at its leader raises the generation of the leader's
// side, which beats carry; so a follower does not go on honouring it for the
// sake of others that the same process leads. A Beat or a registration of an
// older generation is passed over, whose like may have ended since.
//
// Beats also measure round trips, for all groups at once.
type Beats struct {
	id       ReplicaID
	life     uint64
	interval time.Duration
	now      Instant
	links    []*beatLink
	changes  uint64 // whenever a replica could have something to absorb
	wake     bool
}

// beatLink is what two processes have in common.
type beatLink struct {
	id ReplicaID

	// Our leaderships, granted by the peer.
	sharers    int     // how many asked to be registered and have not ended
	mine       uint64  // generation: one that had asked ended
	sentAt     Instant // of the last beat
	life       uint64  // of the peer, and
	generation uint64  // the generation it registers under, as last told
	asOf       Instant // sending time of what that was an answer to
	ackedAt    Instant // greatest sending time of a beat acked under them; 0 if none
	heardAt    Instant
	rtt        time.Duration

	// The peer's leaderships, granted by us.
	theirLife  uint64
	theirs     uint64  // its generation
	granting   uint64  // our generation
	receivedAt Instant // of the last beat under granting; 0 if none
	lastAt     Instant // of the last beat at all
	ended      [16]endedGeneration
}

type endedGeneration struct {
	generation uint64
	receivedAt Instant
}

const (
	beatProbeInterval    = 10 * time.Second // to a peer in which nothing is led
	beatGreetingInterval = time.Second      // to one that never answered
	appliedAskMax        = 10 * time.Second // between questions what a database that stands still has applied
)

// NewBeats returns the beats of the process that holds replicas id. life is a
// random number of that process, which no other life of it ever has; interval is
// that of heartbeats.
func NewBeats(id ReplicaID, life uint64, interval time.Duration) *Beats {
	invariant(life != 0 && id != 0 && interval > 0, "beats of replica %d: life %d, interval %v", id, life, interval)
	return &Beats{id: id, life: life, interval: interval}
}

// link returns that to a peer process, which from now on is beaten to.
func (b *Beats) link(id ReplicaID) *beatLink {
	i, found := slices.BinarySearchFunc(b.links, id, func(k *beatLink, id ReplicaID) int { return int(int64(k.id) - int64(id)) })
	if !found {
		b.links = slices.Insert(b.links, i, &beatLink{id: id, mine: 1, granting: 1})
	}
	return b.links[i]
}

// due is when a link is to be beaten to: with all others in which something is
// led, at one of the process's own points in time.
func (b *Beats) due(k *beatLink) Instant {
	switch {
	case k.sentAt == 0:
		return 0
	case k.sharers > 0:
		return b.point(k.sentAt).Add(b.interval)
	case k.heardAt == 0:
		return k.sentAt.Add(max(b.interval, beatGreetingInterval))
	}
	return k.sentAt.Add(beatProbeInterval)
}

// point is the last point in time not after at. Points lie an interval apart,
// and elsewhere in every process, lest all those of a machine wake at once.
func (b *Beats) point(at Instant) Instant {
	since := (at - Instant(b.life%uint64(b.interval))) % Instant(b.interval)
	if since < 0 {
		since += Instant(b.interval)
	}
	return at - since
}

// Gather returns when to tick a replica whose deadline is given: at the last
// beat before, if there is one after now. A deadline that beats put off is then
// seldom seen to come, and those that come near are looked at together. The
// caller need not, and any tick may be early.
func (b *Beats) Gather(now, deadline Instant) Instant {
	if at := b.point(deadline); at > now {
		return at
	}
	return deadline
}

// Tick returns the beats that are due, to be sent in group 0.
func (b *Beats) Tick(now Instant) (out []Message) {
	b.now = max(b.now, now)
	for _, k := range b.links {
		if b.due(k) <= b.now {
			k.sentAt = b.now
			out = append(out, Message{Kind: MsgBeat, From: b.id, To: k.id, SentAt: b.now, Life: b.life, Generation: k.mine})
		}
	}
	return out
}

// NextDeadline returns when Tick has something to do, or false if never.
func (b *Beats) NextDeadline() (Instant, bool) {
	var next Instant
	for i, k := range b.links {
		if due := b.due(k); i == 0 || due < next {
			next = due
		}
	}
	return next, len(b.links) > 0
}

// Woken reports whether, since it was last asked, anything happened that may
// have brought deadlines of replicas nearer: their NextDeadline is to be asked
// again.
func (b *Beats) Woken() bool {
	w := b.wake
	b.wake = false
	return w
}

// Step takes in a message of group 0 and returns what answers it. What no
// process sends is passed over.
func (b *Beats) Step(now Instant, m Message) (out []Message) {
	b.now = max(b.now, now)
	if m.From == 0 || m.From == b.id || m.To != b.id || m.Life == 0 {
		return nil
	}
	k := b.link(m.From)
	switch m.Kind {
	case MsgBeat:
		if !k.lead(m.Life, m.Generation) {
			return nil
		}
		b.changes++
		k.receivedAt, k.lastAt = b.now, b.now
		out = append(out, Message{
			Kind: MsgBeatAck, From: b.id, To: m.From, SentAt: m.SentAt, Life: b.life, Generation: k.granting, ID: m.Life,
		})
	case MsgBeatAck:
		if m.ID != b.life || m.SentAt <= 0 || m.SentAt > b.now {
			return nil
		}
		b.changes++
		if k.heardAt.Add(beatGreetingInterval) < b.now {
			b.wake = true // it is there again, and may be asked to register
		}
		k.heardAt = b.now
		k.rtt = averageRoundTrip(k.rtt, b.now.Sub(m.SentAt))
		if b.learn(k, m) {
			k.ackedAt = max(k.ackedAt, m.SentAt)
		}
	}
	return out
}

// learn takes in under what the peer registers, and reports whether the answer m
// is of what is known to be the newest.
func (b *Beats) learn(k *beatLink, m Message) bool {
	if m.Life != k.life || m.Generation != k.generation {
		if m.SentAt < k.asOf {
			return false
		}
		k.life, k.generation, k.ackedAt = m.Life, m.Generation, 0
		b.changes++
		b.wake = true
	}
	k.asOf = max(k.asOf, m.SentAt)
	return true
}

// lead takes in the peer's life and generation as a leader, and reports false if
// they are of the past.
func (k *beatLink) lead(life, generation uint64) bool {
	switch {
	case life != k.theirLife || generation > k.theirs:
		k.theirLife, k.theirs = life, generation
		k.endGeneration()
	case generation < k.theirs:
		return false
	}
	return true
}

// endGeneration ends every registration of the peer's leaderships.
func (k *beatLink) endGeneration() {
	k.ended[k.granting%uint64(len(k.ended))] = endedGeneration{k.granting, k.receivedAt}
	k.granting++
	k.receivedAt = 0
}

// register is a follower's answer to a leader that asks: under what generation.
func (b *Beats) register(from ReplicaID, life, generation uint64) (uint64, bool) {
	k := b.link(from)
	if !k.lead(life, generation) {
		return 0, false
	}
	return k.granting, true
}

// leave ends a registration, and with it its generation.
func (b *Beats) leave(with ReplicaID, generation uint64) {
	if k := b.link(with); k.granting == generation {
		k.endGeneration()
		b.changes++
	}
}

// grantedAt returns when the last beat came that granted a lease to what is, or
// was, registered under a generation, and whether it still is.
func (b *Beats) grantedAt(with ReplicaID, generation uint64) (at Instant, current bool) {
	k := b.link(with)
	if k.granting == generation {
		return k.receivedAt, true
	}
	if e := k.ended[generation%uint64(len(k.ended))]; e.generation == generation {
		return e.receivedAt, false
	}
	return k.lastAt, false
}

// registration is a follower's with its leader's process; with 0 means none.
type registration struct {
	with       ReplicaID
	generation uint64
	seen       Instant // the newest beat that was absorbed
}

// covering is what a follower answered when it registered a leadership of ours.
type covering struct{ life, generation uint64 }

// Share has beats stand for heartbeats of this replica. It is called once, before
// the replica is first stepped; all that share b are then stepped by one caller.
func (r *Replica) Share(b *Beats) {
	invariant(r.beats == nil && r.stage == idle && b.id == r.cfg.ID, "replica %d shares beats of process %d", r.cfg.ID, b.id)
	r.beats = b
	for _, p := range r.peers {
		b.link(p.id)
	}
}

// absorb takes in what beats have done since this replica was last stepped.
func (r *Replica) absorb() {
	b := r.beats
	if b == nil || r.absorbed == b.changes {
		return
	}
	r.absorbed = b.changes
	for _, p := range r.peers {
		k := b.link(p.id)
		if k.rtt > 0 {
			p.rtt = k.rtt
		}
		p.lastHeard = max(p.lastHeard, k.heardAt)
		if p.covering.life == 0 {
			continue
		}
		if p.covering.life != k.life || p.covering.generation != k.generation {
			p.covering = covering{}
		} else if r.stage == proposing {
			p.leaseSentAt = max(p.leaseSentAt, k.ackedAt)
		}
	}
	if r.registered.with == 0 {
		return
	}
	at, current := b.grantedAt(r.registered.with, r.registered.generation)
	if at > r.registered.seen {
		invariant(r.grantedTo == r.promised && r.grantedTo.Replica == r.registered.with, "registered with replica %d, lease granted to %v, promise %v",
			r.registered.with, r.grantedTo, r.promised)
		r.registered.seen = at
		r.heardLeader(r.grantedTo, at)
		r.grantedUntil = max(r.grantedUntil, at.Add(r.cfg.LeaseDuration))
		r.resetElection(at)
	}
	if !current {
		r.registered = registration{}
	}
}

// unregister ends the registration of a leadership that is over for this
// replica.
func (r *Replica) unregister() {
	if r.registered.with == 0 {
		return
	}
	r.beats.leave(r.registered.with, r.registered.generation)
	r.registered = registration{}
}

// share adds to a heartbeat that it asks for registration.
func (r *Replica) share(p *peer, m *Message) {
	b := r.beats
	if b == nil || !r.lead.opened || r.lead.transfer != nil {
		return
	}
	k := b.link(p.id)
	if !p.shares {
		p.shares = true
		k.sharers++
	}
	m.Shared, m.Life, m.Generation = true, b.life, k.mine
}

// unshare tells with the next beats that this leadership is over.
func (r *Replica) unshare(p *peer) {
	p.covering = covering{}
	if p.shares {
		p.shares = false
		k := r.beats.link(p.id)
		k.sharers--
		k.mine++
	}
}

// cover takes in a follower's answer to being asked for registration.
func (r *Replica) cover(p *peer, m Message) {
	b := r.beats
	if b == nil || !m.Shared || m.Life == 0 || !p.shares || !b.learn(b.link(p.id), m) {
		return
	}
	p.covering = covering{life: m.Life, generation: m.Generation}
}

// applies reports whether p has a database.
func (r *Replica) applies(p *peer) bool {
	m, _ := r.membership.Member(p.id)
	return m.Kind != Witness
}

// heartbeatDue returns when p is to be sent a heartbeat of this group's own:
// while beats stand for it, only if it has yet to say that it knows all that is
// chosen, and has applied it. One that is silent is asked less often, as long as
// the lease does not need it, and so is one whose database does not come on.
func (r *Replica) heartbeatDue(p *peer, leased bool) (due Instant, ok bool) {
	interval := r.cfg.HeartbeatInterval
	if r.beats != nil && leased && r.settled && r.lead.change == nil {
		covered := p.covering.life != 0
		switch {
		case covered && p.chosen < r.chosen:
		case covered && p.applied < r.chosen && r.applies(p):
			interval = max(interval, min(r.now.Sub(p.movedAt)/2, appliedAskMax))
		case covered:
			return 0, false
		case p.lastHeard.Add(time.Second) < r.now:
			interval = max(interval, r.cfg.LeaseDuration/2)
		}
	}
	return p.toldAt.Add(interval), true
}
