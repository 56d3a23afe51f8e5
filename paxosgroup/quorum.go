package paxosgroup

import (
	"math/bits"
	"slices"
)

// quorums is a membership's quorums as words. A replica's bit in them is its
// index in bitTable, and stays the same through changes of membership.
type quorums struct {
	sides [2]side
	n     int // 1, or 2 while joint
}

// side is one configuration: phase 1 needs phase1 of voters, phase 2 phase2.
type side struct {
	voters         uint64
	phase1, phase2 int
}

// phase1 reports whether set is a phase-1 quorum of every configuration.
func (q *quorums) phase1(set uint64) bool {
	for _, s := range q.sides[:q.n] {
		if bits.OnesCount64(set&s.voters) < s.phase1 {
			return false
		}
	}
	return q.n > 0
}

// phase2 reports whether set is a phase-2 quorum of every configuration.
func (q *quorums) phase2(set uint64) bool {
	for _, s := range q.sides[:q.n] {
		if bits.OnesCount64(set&s.voters) < s.phase2 {
			return false
		}
	}
	return q.n > 0
}

// phase1Without reports whether a phase-1 quorum is left among those not in
// refused.
func (q *quorums) phase1Without(refused uint64) bool { return q.phase1(^refused) }

func (q *quorums) voters() uint64 {
	var all uint64
	for _, s := range q.sides[:q.n] {
		all |= s.voters
	}
	return all
}

// bitTable gives replicas their bits: this one has bit 0, the others one each
// for as long as they are peers. Acknowledgements so survive a change of
// membership, with more than one configuration's slots in the pipeline.
type bitTable struct {
	ids [membersMax]ReplicaID // zero is free
}

func (t *bitTable) bit(id ReplicaID) (int, bool) {
	for i, x := range t.ids {
		if x == id && id != 0 {
			return i, true
		}
	}
	return 0, false
}

// set returns the bits of those of ids that have one.
func (t *bitTable) set(ids []ReplicaID) uint64 {
	var set uint64
	for _, id := range ids {
		if i, ok := t.bit(id); ok {
			set |= 1 << i
		}
	}
	return set
}

// take returns id's bit, a free one if it has none yet.
func (t *bitTable) take(id ReplicaID) (i int, fresh bool) {
	if i, ok := t.bit(id); ok {
		return i, false
	}
	i = slices.Index(t.ids[:], 0)
	invariant(i >= 0, "more than %d replicas are members at once", membersMax)
	t.ids[i] = id
	return i, true
}

// quorumsOf returns m's quorums. Every voter of it is this replica or a peer.
func (r *Replica) quorumsOf(m Membership) quorums {
	var q quorums
	var sides [2]Configuration
	sides, q.n = m.sides()
	if len(m.Members) == 0 {
		q.n = 0 // yet to be seeded: no set is a quorum
	}
	for i, c := range sides[:q.n] {
		s := &q.sides[i]
		s.phase1, s.phase2 = c.Quorums()
		for _, x := range c.Members {
			if x.Kind.votes() {
				bit, ok := r.bits.bit(x.ID)
				invariant(ok, "voter %d has no bit", x.ID)
				s.voters |= 1 << bit
			}
		}
	}
	return q
}

// setMembership puts m in force from slot chosen+1 on; the entry that says so,
// or the base, is at slot at.
func (r *Replica) setMembership(m Membership, at Slot) {
	var retiring []Member
	if r.membership.Joint() && !m.Joint() {
		// Those left out are told, and served, until the change has spread.
		for _, x := range r.membership.All() {
			if _, ok := m.Member(x.ID); !ok && x.ID != r.cfg.ID {
				retiring = append(retiring, x)
			}
		}
	}
	r.membership, r.configAt, r.retiring = m, at, retiring
	r.settled = false
	if r.stage == proposing {
		// Its voters are given the time of one lease to grant it.
		r.lead.since, r.lead.lapsesAt, r.lead.revert = r.now, 0, false
		if c := r.lead.change; c != nil && c.at == at {
			r.lead.change = nil
		}
	}
	r.connect()
}

// connect makes peers of all that this replica talks with: the members, those
// that a change has just left out, and those that one it leads is to add.
func (r *Replica) connect() {
	r.contacts = r.membership.All()
	join := func(xs []Member) {
		for _, x := range xs {
			if !slices.ContainsFunc(r.contacts, func(y Member) bool { return x.ID == y.ID }) {
				r.contacts = append(slices.Clip(r.contacts), x)
			}
		}
	}
	join(r.retiring)
	if c := r.lead.change; c != nil {
		join(c.to.All())
	}
	old := r.peers
	r.peers = make([]*peer, 0, len(r.contacts))
	kept := bitTable{}
	kept.ids[0] = r.cfg.ID
	for _, x := range r.contacts {
		if i, ok := r.bits.bit(x.ID); ok {
			kept.ids[i] = x.ID
		}
	}
	r.bits = kept
	r.self = -1
	for _, x := range r.contacts {
		if x.ID == r.cfg.ID {
			r.self = 0
			continue
		}
		p := &peer{id: x.ID}
		if k := slices.IndexFunc(old, func(p *peer) bool { return p.id == x.ID }); k >= 0 {
			p = old[k]
		}
		var fresh bool
		if p.index, fresh = r.bits.take(x.ID); fresh {
			for i := range r.log.places { // the bit may have been another's
				r.log.places[i].acks &^= 1 << p.index
			}
		}
		r.peers = append(r.peers, p)
		if r.beats != nil {
			r.beats.link(p.id)
		}
	}
	for _, p := range old {
		if !slices.Contains(r.peers, p) {
			r.unshare(p)
		}
	}
	slices.SortFunc(r.peers, func(a, b *peer) int { return int(int64(a.id) - int64(b.id)) })
	r.quorums = r.quorumsOf(r.membership)
	r.voters = r.quorums.voters()
}
