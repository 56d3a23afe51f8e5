package sim

import (
	"bytes"
	"fmt"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/runner"
)

type vote struct {
	slot   paxosgroup.Slot
	ballot paxosgroup.Ballot
}

// groupCheck watches one group from outside. It shares nothing with the code it
// watches but types.
type groupCheck struct {
	w  *world
	id paxosgroup.GroupID

	log        []paxosgroup.Delivered // log[s-1] is slot s, as first handed out
	membership paxosgroup.Membership  // governs slot len(log)+1
	order      *primaryOrder
	votes      map[vote]*ballotVotes
	votesFrom  paxosgroup.Slot // there are none below
	kv         *store

	proposed     map[string]bool // payloads, by anybody
	acknowledged []operationID   // as effective

	void, terms, changes int
	offeredAt            time.Duration
}

// ballotVotes is the value of a slot at a ballot, and who has flushed it.
type ballotVotes struct {
	entry paxosgroup.Entry
	by    map[paxosgroup.ReplicaID]bool
}

func newGroupCheck(w *world, id paxosgroup.GroupID, first paxosgroup.Membership) *groupCheck {
	return &groupCheck{
		w: w, id: id, membership: first, order: newPrimaryOrder(), votes: map[vote]*ballotVotes{}, votesFrom: 1, kv: newStore(), proposed: map[string]bool{},
	}
}

func (c *groupCheck) fail(format string, args ...any) {
	c.w.fail("group %d: "+format, append([]any{c.id}, args...)...)
}

func sameEntry(a, b paxosgroup.Entry) bool {
	return a.Kind == b.Kind && a.Term == b.Term && a.Number == b.Number && a.Region == b.Region &&
		a.Incarnation == b.Incarnation && a.Session == b.Session && a.Sequence == b.Sequence && bytes.Equal(a.Payload, b.Payload)
}

// observe looks at what a host's process shows of the group after it did something.
func (c *groupCheck) observe(h *host, g *runner.EngineGroup, v *view) {
	moved := g.Chosen() > v.delivered
	for g.Chosen() > v.delivered {
		ds, err := g.Read(v.delivered+1, 1<<20)
		if err != nil || len(ds) == 0 {
			c.fail("host %d cannot read slot %d, chosen up to %d: %v", h.id, v.delivered+1, g.Chosen(), err)
			return
		}
		c.delivered(h, v, ds)
	}
	lease := g.LeaseUntil()
	if before := v.leaseUntil; lease != before {
		v.leaseUntil = lease
		c.lease(h)
		if before == 0 { // whoever has just come to power is asked at once
			life := h.life
			c.w.after(0, func() {
				if h.life == life {
					c.ask(h)
				}
			})
		}
	}
	if v.looks++; v.looks%32 == 0 {
		c.status(h, g, v)
	}
	if g.NeedsSnapshot() {
		c.seed(h, v)
	}
	if moved {
		c.w.applied(h, c)
	}
}

func (c *groupCheck) delivered(h *host, v *view, ds []paxosgroup.Delivered) {
	for _, d := range ds {
		if d.Slot != v.delivered+1 {
			c.fail("host %d is handed slot %d after %d", h.id, d.Slot, v.delivered)
			return
		}
		v.delivered = d.Slot
		switch at := int(d.Slot) - 1; {
		case at < len(c.log):
			if have := c.log[at]; !sameEntry(have.Entry, d.Entry) || have.Verdict != d.Verdict {
				c.fail("slot %d: host %d is handed %s, before it was %s", d.Slot, h.id, show(d), show(have))
			}
		case at == len(c.log):
			c.first(h, d)
		default:
			c.fail("host %d is handed slot %d, nobody was handed %d", h.id, d.Slot, len(c.log)+1)
		}
	}
}

// first takes in a slot that nobody was handed before.
func (c *groupCheck) first(h *host, d paxosgroup.Delivered) {
	if !c.durable(d) {
		c.fail("slot %d: %s is handed to host %d, but no quorum has flushed it", d.Slot, show(d), h.id)
	}
	c.w.note(3, uint64(c.id), uint64(d.Slot), d.Entry.Term.Counter, d.Entry.Number, uint64(d.Verdict))
	c.log = append(c.log, d)
	if err := c.order.next(d); err != nil {
		c.fail("slot %d: %w", d.Slot, err)
	}
	if d.Verdict == paxosgroup.Void {
		c.void++
	}
	switch {
	case d.Entry.Kind == paxosgroup.KindOpening && d.Verdict == paxosgroup.Effective:
		c.terms++
	case d.Entry.Kind == paxosgroup.KindData && d.Verdict == paxosgroup.Effective:
		c.kv.apply(d)
	case d.Entry.Kind == paxosgroup.KindConfig:
		if m, err := paxosgroup.DecodeMembership(d.Entry.Payload); err == nil && m.Epoch == c.membership.Epoch+1 {
			c.membership = m
			c.changes++
		}
	}
}

// durable looks for a ballot at which a quorum of the slot's membership has
// flushed the entry.
func (c *groupCheck) durable(d paxosgroup.Delivered) bool {
	for v, b := range c.votes {
		if v.slot == d.Slot && sameEntry(b.entry, d.Entry) && isPhase2Quorum(c.membership, b.by) {
			return true
		}
	}
	return false
}

// isPhase2Quorum counts for itself: of each configuration, as many of those that
// vote as it asks for, or more than half.
func isPhase2Quorum(m paxosgroup.Membership, by map[paxosgroup.ReplicaID]bool) bool {
	enough := func(members []paxosgroup.Member, want int) bool {
		yes, all := 0, 0
		for _, x := range members {
			if x.Kind == paxosgroup.Learner {
				continue
			}
			all++
			if by[x.ID] {
				yes++
			}
		}
		if want == 0 {
			want = all/2 + 1
		}
		return yes >= want
	}
	if !enough(m.Members, m.Phase2) {
		return false
	}
	return m.Outgoing == nil || enough(m.Outgoing.Members, m.Outgoing.Phase2)
}

// flushed takes in what is on a host's disk.
func (c *groupCheck) flushed(h *host, recs []paxosgroup.Record) {
	for _, r := range recs {
		if r.Kind == paxosgroup.RecordAccept {
			c.accepted(h, r.Slot, r.Ballot, r.Entry)
		}
	}
}

func (c *groupCheck) accepted(h *host, s paxosgroup.Slot, ballot paxosgroup.Ballot, e paxosgroup.Entry) {
	if int(s) <= len(c.log) {
		return
	}
	v := vote{s, ballot}
	b := c.votes[v]
	if b == nil {
		b = &ballotVotes{entry: e, by: map[paxosgroup.ReplicaID]bool{}}
		c.votes[v] = b
	} else if !sameEntry(b.entry, e) {
		c.fail("slot %d at ballot %v: host %d accepted another entry than was accepted before", s, ballot, h.id)
	}
	b.by[h.id] = true
	if len(c.votes) > 256 && int(c.votesFrom)+64 < len(c.log) { // what is handed out needs no proof any more
		for old := range c.votes {
			if int(old.slot) <= len(c.log) {
				delete(c.votes, old)
			}
		}
		c.votesFrom = paxosgroup.Slot(len(c.log) + 1)
	}
}

// sent keeps what a message says its sender will never forget.
func (c *groupCheck) sent(h *host, m paxosgroup.Message) {
	switch m.Kind {
	case paxosgroup.MsgPromise, paxosgroup.MsgAccepted, paxosgroup.MsgPrepare:
		if v := h.view(c.id); v.vouched.Less(m.Ballot) {
			v.vouched = m.Ballot
		}
	}
}

func (c *groupCheck) restarted(h *host, st paxosgroup.Restored) {
	v := h.view(c.id)
	if st.Promised.Less(v.vouched) {
		c.fail("host %d restarts with promise %v, but has sent what rests on %v", h.id, st.Promised, v.vouched)
	}
	v.promised = st.Promised
	// What was written and not flushed may have been kept.
	for _, a := range st.Accepted {
		c.accepted(h, a.Slot, a.Ballot, a.Entry)
	}
}

// status looks at what takes longer to come by.
func (c *groupCheck) status(h *host, g *runner.EngineGroup, v *view) {
	s := g.Status()
	if s.Promised.Less(v.promised) {
		c.fail("promise of host %d falls from %v to %v", h.id, v.promised, s.Promised)
	}
	v.promised = s.Promised
	if s.Role != paxosgroup.Leader {
		return
	}
	if to := s.HandBackDue; to != 0 { // as the sidecar does
		life := h.life
		c.w.after(0, func() {
			if h.life == life && h.up() {
				h.turn(func(now paxosgroup.Instant) { g.Transfer(now, to) }) // refused: asked again
			}
		})
	}
	if s.LastSlot > s.Chosen+8*windowSlots {
		c.fail("leader %d has proposed up to slot %d, chosen up to %d", h.id, s.LastSlot, s.Chosen)
	}
	for _, p := range s.Peers {
		if p.InFlight > 8*windowSlots {
			c.fail("leader %d has %d slots on their way to %d", h.id, p.InFlight, p.ID)
		}
	}
	if q := h.log.Stats().Queued; q > 4<<20 {
		c.fail("%d bytes wait for the disk of host %d", q, h.id)
	}
}

// lease is called when what h believes of its lease has changed: nobody else may
// believe, by its own clock, that it has one, not even one that is paused: it
// will look at that clock when it wakes.
func (c *groupCheck) lease(h *host) {
	if c.w.leaseUnsafe || h.view(c.id).leaseUntil <= h.clock() {
		return
	}
	for _, o := range c.w.hosts {
		if o != h && o.engine != nil && o.view(c.id).leaseUntil > o.clock() {
			c.fail("hosts %d and %d both hold the lease at %v", h.id, o.id, c.w.now)
		}
	}
}

// seed gives a replica that fell behind every log an image of another's state.
func (c *groupCheck) seed(h *host, v *view) {
	var from *host
	for _, o := range c.w.hosts {
		if o != h && o.up() && o.view(c.id).delivered > v.delivered && (from == nil || o.view(c.id).delivered > from.view(c.id).delivered) {
			from = o
		}
	}
	if from == nil {
		return
	}
	base, err := from.group(c.id).BaseAt(from.view(c.id).delivered)
	if err != nil {
		c.fail("host %d has no base at slot %d: %v", from.id, from.view(c.id).delivered, err)
		return
	}
	life := h.life
	c.w.after(50*time.Millisecond, func() {
		if h.life != life || !h.up() || base.Slot <= v.delivered {
			return
		}
		h.turn(func(now paxosgroup.Instant) {
			g := h.group(c.id)
			if err := g.Restart(now, base); err != nil {
				c.fail("host %d cannot be seeded: %v", h.id, err)
				return
			}
			if base.Slot > g.Chosen() {
				// The history follows when the engine settles.
				v.delivered = base.Slot
			}
			c.w.seeded++
		})
	})
}

// primaryOrder checks what regions would make of a log with its verdicts.
type primaryOrder struct {
	offers map[paxosgroup.Ballot][][]byte
	term   paxosgroup.Ballot
	closed map[paxosgroup.Ballot]bool
	done   int // effective entries of term
}

func newPrimaryOrder() *primaryOrder {
	return &primaryOrder{offers: map[paxosgroup.Ballot][][]byte{}, closed: map[paxosgroup.Ballot]bool{}}
}

// offer takes in what a leader was handed and took, and the number it gave it.
func (p *primaryOrder) offer(term paxosgroup.Ballot, number uint64, payload []byte) error {
	if int(number) != len(p.offers[term])+1 {
		return fmt.Errorf("term %v: number %d offered after %d", term, number, len(p.offers[term]))
	}
	p.offers[term] = append(p.offers[term], payload)
	return nil
}

func (p *primaryOrder) next(d paxosgroup.Delivered) error {
	e := d.Entry
	if e.Kind == paxosgroup.KindData && e.Term == p.term && d.Verdict == paxosgroup.Void && int(e.Number) == p.done+1 {
		// A retry of what is effective already takes its number all the same.
		p.done++
		return nil
	}
	if d.Verdict != paxosgroup.Effective {
		return nil
	}
	switch e.Kind {
	case paxosgroup.KindNoOp:
		return fmt.Errorf("a no-op is effective")
	case paxosgroup.KindOpening:
		if p.closed[e.Term] || e.Term == p.term {
			return fmt.Errorf("term %v opens a second time", e.Term)
		}
		p.closed[p.term] = true
		p.term, p.done = e.Term, 0
	case paxosgroup.KindData:
		switch offers := p.offers[e.Term]; {
		case e.Term != p.term:
			return fmt.Errorf("an entry of term %v is effective in term %v", e.Term, p.term)
		case p.done >= len(offers) || !bytes.Equal(offers[p.done], e.Payload):
			return fmt.Errorf("effective entry %d of term %v is not what its leader offered as such", p.done+1, e.Term)
		}
		p.done++
	}
	return nil
}

func show(d paxosgroup.Delivered) string {
	return fmt.Sprintf("%v term %v number %d (verdict %d, %.20q)", d.Entry.Kind, d.Entry.Term, d.Entry.Number, d.Verdict, d.Entry.Payload)
}
