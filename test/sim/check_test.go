package sim

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/runner"
)

// groupCheck watches one group from outside. It shares nothing with the code it
// watches but types.
type groupCheck struct {
	w  *world
	id paxosgroup.GroupID

	log        []paxosgroup.Delivered // log[s-1] is slot s, as first handed out
	membership paxosgroup.Membership  // governs slot len(log)+1
	order      *primaryOrder
	votes      map[paxosgroup.Slot][]*ballotVotes // of slots that nobody was handed yet, and some below
	configs    map[paxosgroup.Slot]bool           // slots of votes in which somebody accepted a change
	kv         *store

	proposed     map[string]bool // payloads, by anybody
	effective    map[string]bool // of these
	acknowledged []operationID   // as effective
	confirmed    []string        // payloads that their proposer was told are effective

	void, terms, changes         int
	contested, overruled, probes int // see coverage
	offeredAt                    time.Duration
}

// ballotVotes is the value of a slot at a ballot, and who has flushed it.
type ballotVotes struct {
	ballot paxosgroup.Ballot
	entry  paxosgroup.Entry
	by     map[paxosgroup.ReplicaID]bool
	chosen bool // a quorum has, whether anybody knows or not
}

func newGroupCheck(w *world, id paxosgroup.GroupID, first paxosgroup.Membership) *groupCheck {
	return &groupCheck{
		w: w, id: id, membership: first, order: newPrimaryOrder(), votes: map[paxosgroup.Slot][]*ballotVotes{}, configs: map[paxosgroup.Slot]bool{},
		kv: newStore(), proposed: map[string]bool{}, effective: map[string]bool{},
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
	if lease > h.clock() {
		c.leaseRead(h, g)
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
		c.effective[string(d.Entry.Payload)] = true
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
	for _, b := range c.votes[d.Slot] {
		if sameEntry(b.entry, d.Entry) && isPhase2Quorum(c.membership, b.by) {
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
			h.view(c.id).hold(r.Slot, r.Ballot)
			c.accepted(h, r.Slot, r.Ballot, r.Entry)
		}
	}
}

func (c *groupCheck) accepted(h *host, s paxosgroup.Slot, ballot paxosgroup.Ballot, e paxosgroup.Entry) {
	if int(s) <= len(c.log) {
		return
	}
	i := slices.IndexFunc(c.votes[s], func(b *ballotVotes) bool { return b.ballot == ballot })
	if i < 0 {
		i = len(c.votes[s])
		c.votes[s] = append(c.votes[s], &ballotVotes{ballot: ballot, entry: e, by: map[paxosgroup.ReplicaID]bool{}})
		if e.Kind == paxosgroup.KindConfig {
			c.configs[s] = true
		}
	}
	b := c.votes[s][i]
	if !sameEntry(b.entry, e) {
		c.fail("slot %d at ballot %v: host %d accepted another entry than was accepted before", s, ballot, h.id)
	}
	b.by[h.id] = true
	c.decide(s, b)
	if len(c.votes) > 256 { // what is handed out needs no proof any more
		for old := range c.votes {
			if int(old) <= len(c.log) {
				delete(c.votes, old)
				delete(c.configs, old)
			}
		}
	}
}

// decide holds that what a quorum has flushed at one ballot is all that may ever
// be accepted at higher ones, even if nobody has been told. (Lamport, "Paxos Made
// Simple", section 2.2, P2b.)
func (c *groupCheck) decide(s paxosgroup.Slot, b *ballotVotes) {
	if !b.chosen && c.governed(s) && isPhase2Quorum(c.membership, b.by) {
		b.chosen = true
	}
	others := c.votes[s]
	if len(others) < 2 {
		return
	}
	for _, o := range others {
		low, high := o, b
		if b.ballot.Less(o.ballot) {
			low, high = b, o
		}
		if low.chosen && !sameEntry(low.entry, high.entry) {
			c.fail("slot %d: %v term %v number %d is chosen at ballot %v, and %v term %v number %d accepted at ballot %v", s,
				low.entry.Kind, low.entry.Term, low.entry.Number, low.ballot, high.entry.Kind, high.entry.Term, high.entry.Number, high.ballot)
		}
		if !sameEntry(low.entry, high.entry) {
			c.contested++
			if high.chosen {
				c.overruled++
			}
		}
	}
}

// governed reports whether the membership that is known here governs the slot:
// nobody has accepted a change between.
func (c *groupCheck) governed(s paxosgroup.Slot) bool {
	for at := range c.configs {
		if int(at) > len(c.log) && at < s {
			return false
		}
	}
	return true
}

// leaseRead asks for the slot of a read, which must be at or above all that
// anybody was handed.
func (c *groupCheck) leaseRead(h *host, g *runner.EngineGroup) {
	slot, ok := g.LeaseRead(h.clock())
	if !ok || c.w.leaseUnsafe {
		return
	}
	c.probes++
	if int(slot) < len(c.log) {
		c.fail("host %d would read by its lease at slot %d, and slot %d was handed out", h.id, slot, len(c.log))
	}
}

// readIndex asks a host for the slot of a read, without reading.
func (c *groupCheck) readIndex(h *host) {
	floor := len(c.log)
	h.turn(func(now paxosgroup.Instant) {
		g := h.group(c.id)
		_ = g.ReadIndex(now, func(slot paxosgroup.Slot, err error) { c.readSlot(h, slot, floor, err) }) // or it is busy
	})
}

func (c *groupCheck) readSlot(h *host, slot paxosgroup.Slot, floor int, err error) {
	if err != nil || c.w.leaseUnsafe {
		return
	}
	c.probes++
	if int(slot) < floor {
		c.fail("a read at host %d is to be served at slot %d, and slot %d was handed out before it was asked for", h.id, slot, floor)
	}
}

// hold keeps what was accepted and flushed, as long as it is not long chosen.
func (v *view) hold(s paxosgroup.Slot, ballot paxosgroup.Ballot) {
	if v.held == nil {
		v.held = map[paxosgroup.Slot]paxosgroup.Ballot{}
	}
	if v.held[s].Less(ballot) {
		v.held[s] = ballot
	}
	if len(v.held) > 512 {
		for old := range v.held {
			if old+256 < v.delivered {
				delete(v.held, old)
			}
		}
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
	c.remembers(h, st)
	// What was written and not flushed may have been kept.
	for _, a := range st.Accepted {
		c.accepted(h, a.Slot, a.Ballot, a.Entry)
	}
}

// remembers wants what a host has flushed found again.
func (c *groupCheck) remembers(h *host, st paxosgroup.Restored) {
	have := make(map[paxosgroup.Slot]paxosgroup.Ballot, len(st.Accepted))
	for _, a := range st.Accepted {
		have[a.Slot] = a.Ballot
	}
	v := h.view(c.id)
	for s, ballot := range v.held {
		if s <= st.Chosen {
			delete(v.held, s)
		} else if at, ok := have[s]; !ok || at.Less(ballot) {
			c.fail("host %d restarts without what it flushed at ballot %v in a slot above %d", h.id, ballot, st.Chosen)
		}
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
