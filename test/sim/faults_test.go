package sim

import (
	"time"

	"quorate/paxosgroup"
)

// chaos starts everything that goes wrong, for as long as on says so.
type chaos struct {
	w  *world
	on bool

	replacing bool
	old       paxosgroup.ReplicaID
	fresh     paxosgroup.ReplicaID
	region    string
	since     time.Duration
	kinds     map[string]int
}

func (c *chaos) every(mean time.Duration, do func()) {
	c.w.after(time.Duration(c.w.rng.Int64N(int64(2*mean))), func() {
		if c.on {
			do()
			c.every(mean, do)
		}
	})
}

// begin draws how bad this world is, and lets it begin.
func (c *chaos) begin() {
	w := c.w
	c.on, c.kinds = true, map[string]int{}
	w.loss = []float64{0, 0.01, 0.05, 0.2}[w.rng.IntN(4)]
	w.repeat = []float64{0, 0.02, 0.1}[w.rng.IntN(3)]
	w.slow = []float64{0, 0.005, 0.03}[w.rng.IntN(3)]
	w.delayMax = []time.Duration{2, 20, 60, 120}[w.rng.IntN(4)] * time.Millisecond
	w.flushMax = []time.Duration{1, 5, 50}[w.rng.IntN(3)] * time.Millisecond
	c.every(time.Duration(5+w.rng.IntN(60))*time.Millisecond, c.propose)
	faults := []struct {
		name string
		mean time.Duration
		do   func() bool
	}{
		{"crash", 1500 * time.Millisecond, c.crash},
		{"pause", 2500 * time.Millisecond, c.pause},
		{"cut", 2 * time.Second, c.cut},
		{"heal", 2 * time.Second, c.heal},
		{"transfer", 2 * time.Second, c.transfer},
		{"resign", 6 * time.Second, c.resign},
		{"replace", 500 * time.Millisecond, c.replace},
		{"shorten", 4 * time.Second, c.shorten},
	}
	for _, f := range faults {
		if w.rng.IntN(4) == 0 { // every world lacks some, so that none hides another
			continue
		}
		mean := f.mean * time.Duration(1+w.rng.IntN(3))
		c.every(mean, func() {
			if f.do() {
				c.kinds[f.name]++
			}
		})
	}
}

func (c *chaos) any() *node { return c.w.nodes[c.w.rng.IntN(len(c.w.nodes))] }

// propose offers a few entries to whoever believes that it leads.
func (c *chaos) propose() {
	for _, n := range c.w.nodes {
		if n.core == nil || c.w.now < n.pausedUntil {
			continue
		}
		for range 1 + c.w.rng.IntN(8) {
			if c.w.offer(n, c.w.rng.IntN(200)) != nil {
				break
			}
		}
	}
}

func (c *chaos) crash() bool {
	n := c.any()
	if n.core == nil || n.gone {
		return false
	}
	c.w.crash(n)
	life := n.life
	c.w.after(time.Duration(c.w.rng.Int64N(int64(4*time.Second))), func() {
		if n.life == life && n.core == nil && !n.gone {
			c.w.start(n, true)
		}
	})
	return true
}

func (c *chaos) pause() bool {
	n := c.any()
	if n.core == nil {
		return false
	}
	n.pausedUntil = c.w.now + time.Duration(c.w.rng.Int64N(int64(3*time.Second)))
	return true
}

// cut takes away one direction of one pair, or one side from the other.
func (c *chaos) cut() bool {
	w := c.w
	if w.rng.IntN(2) == 0 {
		a, b := c.any(), c.any()
		w.cut[link{a.id, b.id}] = true
		return true
	}
	side := w.rng.Uint64()
	both := w.rng.IntN(3) > 0
	for i, a := range w.nodes {
		for j, b := range w.nodes {
			if x, y := side>>i&1, side>>j&1; x < y || both && x != y {
				w.cut[link{a.id, b.id}] = true
			}
		}
	}
	return true
}

func (c *chaos) heal() bool {
	clear(c.w.cut)
	return true
}

func (c *chaos) transfer() bool {
	n := c.w.leader()
	return n != nil && n.core.Transfer(n.clock(c.w.now), c.any().id) == nil
}

func (c *chaos) resign() bool {
	n := c.w.leader()
	if n == nil {
		return false
	}
	n.core.Resign(n.clock(c.w.now))
	c.w.settle(n)
	return true
}

// shorten cuts a log where the replica has delivered.
func (c *chaos) shorten() bool {
	n := c.any()
	if n.core == nil || n.delivered < 20 {
		return false
	}
	n.disk.cut = max(n.disk.cut, n.delivered-paxosgroup.Slot(c.w.rng.IntN(20)))
	return true
}

// replace takes one step in replacing a member: a replica is lost with its disk,
// a new one joins as a learner, then takes the lost one's vote.
func (c *chaos) replace() bool {
	w := c.w
	l := w.leader()
	if l == nil {
		return false
	}
	m := l.core.Status().Membership
	if !c.replacing {
		if len(w.nodes) > 12 {
			return false
		}
		old := m.Members[w.rng.IntN(len(m.Members))]
		c.replacing, c.old, c.fresh, c.region, c.since = true, old.ID, m.NextID, old.Region, w.now
		if n := w.node(old.ID); w.rng.IntN(2) == 0 && n.core != nil { // else it is only taken out
			w.crash(n)
			n.gone = true
		}
		if w.node(c.fresh) == nil {
			w.addNode(c.fresh, c.region)
		}
		return true
	}
	change := m
	change.Members = append([]paxosgroup.Member(nil), m.Members...)
	switch x, ok := m.Member(c.fresh); {
	case m.Joint() && w.rng.IntN(4) == 0: // take it back, or ask for what is under way
		change = paxosgroup.Membership{Members: m.Outgoing.Members, Phase1: m.Outgoing.Phase1, Phase2: m.Outgoing.Phase2, NextID: m.NextID}
	case m.Joint():
		return false
	case !ok && w.rng.IntN(2) == 0:
		change.Members = append(change.Members, paxosgroup.Member{ID: c.fresh, Region: c.region, Kind: paxosgroup.Learner})
		change.NextID = max(change.NextID, c.fresh+1)
	case !ok || x.Kind == paxosgroup.Learner:
		change.Members = nil
		for _, y := range m.Members {
			if y.ID != c.old && y.ID != c.fresh {
				change.Members = append(change.Members, y)
			}
		}
		change.Members = append(change.Members, paxosgroup.Member{ID: c.fresh, Region: c.region, Kind: paxosgroup.Voter})
		change.NextID = max(change.NextID, c.fresh+1)
		n := change.Voters()
		change.Phase2 = 2 + w.rng.IntN(n-2) // of any sizes that leave both phases possible with one lost
		change.Phase1 = n + 1 - change.Phase2
	default:
		if l.core.Status().Change != paxosgroup.ChangeNone {
			return false
		}
		c.replacing = false
		w.node(c.old).removed = true
		return false
	}
	err := l.core.ProposeMembership(l.clock(w.now), change)
	w.settle(l)
	return err == nil
}

// end stops all faults and brings everyone back that is to come back.
func (c *chaos) end() {
	w := c.w
	c.on = false
	w.loss, w.repeat, w.slow, w.delayMax, w.flushMax = 0, 0, 0, 40*time.Millisecond, 2*time.Millisecond
	clear(w.cut)
	for _, n := range w.nodes {
		n.pausedUntil = min(n.pausedUntil, w.now)
		if n.core == nil && !n.gone {
			w.start(n, true)
		}
	}
}
