package sim

import (
	"bytes"
	"fmt"

	"quorate/paxosgroup"
)

type vote struct {
	slot   paxosgroup.Slot
	ballot paxosgroup.Ballot
}

// checker watches from outside. It keeps the first fault it finds.
type checker struct {
	err error

	log        []paxosgroup.Delivered // log[s-1] is slot s, as first handed out
	bases      []paxosgroup.Base      // bases[s] is the state after slot s
	membership paxosgroup.Membership  // governs slot len(log)+1
	order      *primaryOrder
	votes      map[vote]map[paxosgroup.ReplicaID]paxosgroup.Entry

	void, terms, seeded, changes int
}

func newChecker() *checker {
	return &checker{order: newPrimaryOrder(), votes: map[vote]map[paxosgroup.ReplicaID]paxosgroup.Entry{}}
}

func (c *checker) fail(format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf(format, args...)
	}
}

func sameEntry(a, b paxosgroup.Entry) bool {
	return a.Kind == b.Kind && a.Term == b.Term && a.Number == b.Number && a.Region == b.Region &&
		a.Incarnation == b.Incarnation && bytes.Equal(a.Payload, b.Payload)
}

func (c *checker) baseAt(s paxosgroup.Slot) paxosgroup.Base {
	return c.bases[s]
}

func (c *checker) delivered(n *node, ds []paxosgroup.Delivered) {
	for _, d := range ds {
		if d.Slot != n.delivered+1 {
			c.fail("replica %d is handed slot %d after %d", n.id, d.Slot, n.delivered)
		}
		n.delivered = d.Slot
		switch at := int(d.Slot) - 1; {
		case at < len(c.log):
			if have := c.log[at]; !sameEntry(have.Entry, d.Entry) || have.Verdict != d.Verdict {
				c.fail("slot %d: replica %d is handed %s, before it was %s", d.Slot, n.id, show(d), show(have))
			}
		case at == len(c.log):
			c.first(n, d)
		default:
			c.fail("replica %d is handed slot %d, nobody was handed %d", n.id, d.Slot, len(c.log)+1)
		}
	}
}

// first takes in a slot that nobody was handed before.
func (c *checker) first(n *node, d paxosgroup.Delivered) {
	if len(c.bases) == 0 {
		c.bases = append(c.bases, paxosgroup.Base{Membership: c.membership})
	}
	if !c.durable(d) {
		c.fail("slot %d: %s is handed to replica %d, but no quorum has flushed it", d.Slot, show(d), n.id)
	}
	c.log = append(c.log, d)
	if err := c.order.next(d); err != nil {
		c.fail("slot %d: %w", d.Slot, err)
	}
	if d.Verdict == paxosgroup.Void {
		c.void++
	}
	if d.Entry.Kind == paxosgroup.KindOpening && d.Verdict == paxosgroup.Effective {
		c.terms++
	}
	if m, ok := c.membership.Next(d.Entry); ok {
		c.membership = m
		c.changes++
	}
	last := c.bases[len(c.bases)-1]
	last.Slot, last.Membership = d.Slot, c.membership
	if d.Entry.Kind == paxosgroup.KindOpening && d.Verdict == paxosgroup.Effective {
		last.Judge = paxosgroup.Judge{Term: d.Entry.Term, Region: d.Entry.Region, Incarnation: d.Entry.Incarnation, Next: 1}
	} else if d.Entry.Kind == paxosgroup.KindData && d.Verdict == paxosgroup.Effective {
		last.Judge.Next++
	}
	c.bases = append(c.bases, last)
}

// durable looks for a ballot at which a quorum of the slot's membership has
// flushed the entry.
func (c *checker) durable(d paxosgroup.Delivered) bool {
	for v, by := range c.votes {
		if v.slot == d.Slot && c.membership.HasPhase2(func(id paxosgroup.ReplicaID) bool {
			e, ok := by[id]
			return ok && sameEntry(e, d.Entry)
		}) {
			return true
		}
	}
	return false
}

func (c *checker) flushed(n *node, r paxosgroup.Record) {
	if r.Kind != paxosgroup.RecordAccept || int(r.Slot) <= len(c.log) {
		return
	}
	v := vote{r.Slot, r.Ballot}
	if c.votes[v] == nil {
		c.votes[v] = map[paxosgroup.ReplicaID]paxosgroup.Entry{}
	}
	for id, e := range c.votes[v] {
		if !sameEntry(e, r.Entry) {
			c.fail("slot %d at ballot %v: replicas %d and %d accepted different entries", r.Slot, r.Ballot, id, n.id)
		}
	}
	c.votes[v][n.id] = r.Entry
	for old := range c.votes { // what is handed out needs no proof any more
		if int(old.slot) <= len(c.log) {
			delete(c.votes, old)
		}
	}
}

// sent keeps what a message says its sender will never forget.
func (c *checker) sent(n *node, m paxosgroup.Message) {
	switch m.Kind {
	case paxosgroup.MsgPromise, paxosgroup.MsgAccepted, paxosgroup.MsgPrepare:
		if n.vouched.Less(m.Ballot) {
			n.vouched = m.Ballot
		}
	}
}

func (c *checker) restarted(n *node, st paxosgroup.Restored) {
	p := st.Promised
	if p.Less(n.vouched) {
		c.fail("replica %d restarts with promise %v, but has sent what rests on %v", n.id, p, n.vouched)
	}
	n.promised = p
}

func (c *checker) status(w *world, n *node) {
	s := n.core.Status()
	if s.Promised.Less(n.promised) {
		c.fail("promise of replica %d falls from %v to %v", n.id, n.promised, s.Promised)
	}
	n.promised = s.Promised
	n.leaseUntil = s.LeaseUntil
}

// leases looks at what every replica believes, by its own clock, also while it
// is paused: it will look at that clock when it wakes.
func (c *checker) leases(w *world) {
	var holder *node
	for _, n := range w.nodes {
		if n.core == nil || n.leaseUntil <= n.clock(w.now) {
			continue
		}
		if holder != nil {
			c.fail("replicas %d and %d both hold the lease at %v", holder.id, n.id, w.now)
		}
		holder = n
	}
}

func (c *checker) offered(term paxosgroup.Ballot, number uint64, payload []byte) {
	if err := c.order.offer(term, number, payload); err != nil {
		c.fail("%w", err)
	}
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

func (p *primaryOrder) offer(term paxosgroup.Ballot, number uint64, payload []byte) error {
	if int(number) != len(p.offers[term])+1 {
		return fmt.Errorf("term %v: number %d offered after %d", term, number, len(p.offers[term]))
	}
	p.offers[term] = append(p.offers[term], payload)
	return nil
}

func (p *primaryOrder) next(d paxosgroup.Delivered) error {
	e := d.Entry
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
