package sim

import (
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/runner"
	"quorate/paxosgroup/slotlog/simdisk"
)

// chaos brings a plan about.
type chaos struct {
	w    *world
	plan plan
	over bool
	lost *host // its disk is, and it is a member yet
	done map[string]int
}

const hostsMax = 14

var errDisk = errors.New("input/output error of the simulated disk")

func (c *chaos) begin() {
	w, p := c.w, c.plan
	c.done = map[string]int{}
	w.loss, w.repeat, w.slow, w.delayMax, w.flushMax, w.ppmMax = p.loss, p.repeat, p.slow, p.delayMax, p.flushMax, p.ppmMax
	w.begin()
	for _, g := range w.groups {
		if p.resting && g.id == 1 {
			continue
		}
		for range p.clients {
			w.addClient(g)
		}
	}
	c.bulk()
	for _, f := range p.faults {
		w.after(f.at, func() {
			if !c.over && c.strike(f) {
				c.done[f.kind]++
			}
		})
	}
}

// bulk proposes now and then a few entries through whoever believes that it leads.
func (c *chaos) bulk() {
	c.w.after(c.w.random(2*c.plan.bulkEvery), func() {
		if c.over {
			return
		}
		for _, h := range c.w.hosts {
			if !h.up() {
				continue
			}
			for _, g := range c.w.groups {
				if h.up() && h.group(g.id).Brief().Role == paxosgroup.Leader {
					if c.quiet(g) {
						continue
					}
					for range 1 + c.w.rng.IntN(8) {
						c.w.offer(h, g.id, c.w.rng.IntN(c.plan.sizeMax))
					}
					g.readIndex(h)
				}
			}
		}
		c.bulk()
	})
}

// quiet reports whether a group is to rest, as one does in some worlds, most of the
// time: its disk and its leases are then renewed for the sake of others alone.
func (c *chaos) quiet(g *groupCheck) bool {
	return c.plan.resting && g.id == 1 && c.w.rng.IntN(64) > 0
}

// offer proposes the next payload through a host, and reports whether it was
// taken at once.
func (w *world) offer(h *host, g paxosgroup.GroupID, size int) bool { return *w.hand(h, g, size) }

// hand is offer; what it returns turns true when the entry is taken, which may
// be when what was proposed before is flushed.
func (w *world) hand(h *host, g paxosgroup.GroupID, size int) *bool {
	w.offers++
	taken := false
	c := w.group(g)
	p := &runner.Proposal{Payload: fmtPayload(w.offers, size), Wait: w.waits && w.offers%2 == 0}
	p.Answered = func(p *runner.Proposal) {
		if p.Err == nil {
			taken = true
			if p.Wait {
				c.confirmed = append(c.confirmed, string(p.Payload))
			}
		}
	}
	c.proposed[string(p.Payload)] = true
	h.turn(func(paxosgroup.Instant) { h.group(g).Propose(p) })
	return &taken
}

func (c *chaos) host(n uint64) *host { return c.w.hosts[int(n%uint64(len(c.w.hosts)))] }

// target is a host, every third time the leader of a group.
func (c *chaos) target(f fault) *host {
	if f.b%3 == 0 {
		if l := c.w.leader(c.group(f.a).id); l != nil {
			return l
		}
	}
	return c.host(f.a)
}

func (c *chaos) group(n uint64) *groupCheck { return c.w.groups[int(n%uint64(len(c.w.groups)))] }

// strike does what the fault says, and reports whether it made a difference.
func (c *chaos) strike(f fault) bool {
	switch f.kind {
	case "crash", "tear", "kill", "pause", "suspend", "failflush", "failwrite", "full", "truncate", "lose", "retire":
		h := c.target(f)
		return !h.gone && h.engine != nil && c.strikeHost(f, h)
	case "cut", "split", "isolate", "heal":
		return c.strikeNetwork(f)
	case "transfer", "resign", "change", "shortlived", "deaf", "stutter", "relay", "farback", "handover", "estrange":
		g := c.group(f.a)
		l := c.w.leader(g.id)
		return l != nil && c.strikeLeader(f, g, l)
	}
	panic("unknown fault " + f.kind)
}

func (c *chaos) strikeHost(f fault, h *host) bool {
	w := c.w
	switch f.kind {
	case "crash":
		h.crash()
		h.startAfter(f.lasts)
	case "tear":
		h.tear()
		h.startAfter(f.lasts)
	case "kill":
		h.end()
		h.startAfter(f.lasts / 8)
	case "pause":
		h.pause(f.lasts)
	case "suspend":
		if !h.up() {
			return false
		}
		h.suspend(f.lasts + 600*time.Millisecond) // less cannot be told from setting a clock
	case "failflush":
		h.failNext(simdisk.OpSync)
		if f.c%2 == 0 { // and then the power goes, before or after a restart
			w.after(f.lasts/8, func() {
				if h.engine != nil && !c.over {
					h.crash()
					h.startAfter(f.lasts)
				}
			})
		}
	case "failwrite":
		h.failNext(simdisk.OpWrite)
	case "full":
		h.shortUntil = w.now + f.lasts
		h.disk.SetSpace(1)
		h.planFlush()
		w.after(f.lasts, func() { h.disk.SetSpace(0) })
	case "truncate":
		return c.truncate(f, h)
	case "lose":
		return c.lose(h)
	case "retire":
		return c.retire(h)
	}
	return true
}

// tear is a power failure in the middle of a flush.
func (h *host) tear() {
	if h.log != nil && h.up() {
		h.failNext(simdisk.OpSync)
		h.log.Flush()
	}
	h.crash()
}

func (h *host) failNext(op string) {
	h.disk.SetFault(func(o, _ string) error {
		if o == op {
			return errDisk
		}
		return nil
	})
}

// truncate cuts a log where the host has applied, as if an image were there.
func (c *chaos) truncate(f fault, h *host) bool {
	g := c.group(f.c)
	v := h.view(g.id)
	if !h.up() || v.delivered < 20 {
		return false
	}
	did := false
	h.turn(func(now paxosgroup.Instant) {
		did = h.group(g.id).Truncate(now, v.delivered-paxosgroup.Slot(f.lasts%c.plan.keepMax)) == nil
	})
	return did
}

func (c *chaos) strikeNetwork(f fault) bool {
	w := c.w
	both := f.b%3 > 0
	sever := func(side func(*host) bool) {
		for _, a := range w.hosts {
			for _, b := range w.hosts {
				if x, y := side(a), side(b); x && !y || both && x != y {
					w.cut[link{a.id, b.id}] = true
				}
			}
		}
	}
	switch f.kind {
	case "cut":
		w.cut[link{c.host(f.a).id, c.host(f.b).id}] = true
	case "split":
		sever(func(h *host) bool { return f.a>>(h.id%32)&1 == 1 })
	case "isolate":
		l := w.leader(c.group(f.a).id)
		if l == nil {
			return false
		}
		inward := f.c%2 == 0 // of one-way cuts
		sever(func(h *host) bool { return (h == l) == inward })
	case "heal":
		clear(w.cut)
	}
	return true
}

func (c *chaos) strikeLeader(f fault, g *groupCheck, l *host) bool {
	did := false
	switch f.kind {
	case "transfer":
		members := l.group(g.id).Status().Membership.Members
		to := members[f.b%uint64(len(members))].ID
		l.turn(func(now paxosgroup.Instant) { did = l.group(g.id).Transfer(now, to) == nil })
	case "resign":
		l.turn(func(now paxosgroup.Instant) { l.group(g.id).Resign(now) })
		did = true
	case "change":
		m, ok := c.drawChange(f, g, l.group(g.id).Status())
		if !ok || l.engine == nil {
			return false
		}
		l.turn(func(now paxosgroup.Instant) { did = l.group(g.id).ChangeMembership(now, m) == nil })
	case "deaf":
		other := c.host(f.b)
		c.w.cut[link{l.id, other.id}], c.w.cut[link{other.id, l.id}] = true, f.c%3 > 0
		c.w.after(c.plan.lease/2+c.plan.lease*time.Duration(f.c%1000)/1000, func() {
			if l.up() && !c.over {
				l.pause(c.plan.lease/3 + f.lasts*2/3)
			}
		})
		did = true
	case "stutter":
		for _, h := range c.w.hosts {
			if h != c.host(f.b) {
				c.w.cut[link{l.id, h.id}] = true
			}
		}
		c.w.after(f.lasts/20, func() {
			if f.c%2 == 0 && l.up() && !c.over {
				l.crash()
				l.startAfter(f.lasts)
			}
		})
		did = true
	case "relay":
		did = c.relay(f, l)
	case "farback":
		c.farBack(f, l)
		did = true
	case "handover":
		did = c.handOver(f, g, l)
	case "estrange":
		c.estrange(f, g, l)
		did = true
	case "shortlived":
		l.crash()
		l.startAfter(f.lasts)
		c.w.after(1200*time.Millisecond+f.lasts/2, func() {
			if next := c.w.leader(g.id); next != nil && !c.over {
				next.crash()
				next.startAfter(f.lasts)
			}
		})
		did = true
	}
	return did
}

// sever cuts what goes from some hosts to others, and reports how many links.
func (w *world) sever(from, to func(*host) bool) {
	for _, a := range w.hosts {
		for _, b := range w.hosts {
			if a != b && from(a) && to(b) {
				w.cut[link{a.id, b.id}] = true
			}
		}
	}
}

func some(bits uint64) func(*host) bool {
	return func(h *host) bool { return bits>>(h.id%32)&1 == 1 }
}

func only(l *host) func(*host) bool { return func(h *host) bool { return h == l } }

func not(f func(*host) bool) func(*host) bool { return func(h *host) bool { return !f(h) } }

func anyone(*host) bool { return true }

// relay takes a leader away that a few have just heard, and these with it: when
// they come back, others have led, and each has accepted something else.
func (c *chaos) relay(f fault, l *host) bool {
	w, heard := c.w, some(f.b)
	w.sever(only(l), not(heard))
	w.after(f.lasts/40, func() {
		if c.over || !l.up() {
			return
		}
		switch f.c % 3 {
		case 0:
			l.crash()
			l.startAfter(f.lasts / 4)
		case 1:
			l.pause(c.plan.lease + f.lasts/2)
		default:
			w.sever(only(l), anyone)
			w.sever(anyone, only(l))
		}
		if f.c/3%4 > 0 {
			w.sever(heard, not(heard))
			w.sever(not(heard), heard)
		}
		w.after(c.plan.lease/2+f.lasts/3, func() { clear(w.cut) })
	})
	return true
}

// farBack has what is sent to a leader take about a lease, and then nothing that
// it sends arrives: its answers are of a time long past.
func (c *chaos) farBack(f fault, l *host) {
	w := c.w
	lag := c.plan.lease/4 + c.plan.lease*time.Duration(f.c%1000)/1600
	w.lag[l.id] = lag
	w.after(c.plan.lease+f.lasts/8, func() { w.sever(only(l), anyone) })
	w.after(2*c.plan.lease+lag+f.lasts/4, func() {
		delete(w.lag, l.id)
		clear(w.cut)
	})
}

// handOver transfers leadership from one that hears little, or nothing.
func (c *chaos) handOver(f fault, g *groupCheck, l *host) bool {
	w, deaf := c.w, some(f.c)
	if f.c%3 > 0 {
		deaf = anyone
	}
	members := l.group(g.id).Status().Membership.Members
	to := members[f.b%uint64(len(members))].ID
	w.sever(deaf, only(l))
	did := false
	l.turn(func(now paxosgroup.Instant) { did = l.group(g.id).Transfer(now, to) == nil })
	w.after(f.lasts/4, func() { clear(w.cut) })
	return did
}

// estrange keeps a leader away until another may lead, and then lets it meet only
// some of the others again, or all but its successor.
func (c *chaos) estrange(f fault, g *groupCheck, l *host) {
	w := c.w
	w.sever(only(l), anyone)
	w.sever(anyone, only(l))
	w.after(c.plan.lease+c.plan.lease*time.Duration(100+f.c%800)/1000, func() {
		meets := some(f.b)
		if next := w.leader(g.id); f.b%4 > 0 && next != l {
			meets = not(only(next))
		}
		for _, h := range w.hosts {
			if meets(h) {
				delete(w.cut, link{l.id, h.id})
				delete(w.cut, link{h.id, l.id})
			}
		}
	})
	w.after(2*c.plan.lease+f.lasts/2, func() { clear(w.cut) })
}

// drawChange draws what a group's membership is to become. A member whose disk
// is lost goes first.
func (c *chaos) drawChange(f fault, g *groupCheck, s paxosgroup.Status) (paxosgroup.Membership, bool) {
	rng := rand.New(rand.NewPCG(f.b, f.c))
	m := s.Membership
	if m.Joint() { // take it back, or leave it
		return paxosgroup.Membership{Members: m.Outgoing.Members, Phase1: m.Outgoing.Phase1, Phase2: m.Outgoing.Phase2, NextID: m.NextID}, rng.IntN(4) == 0
	}
	m.Members = slices.Clone(m.Members)
	remove := func(i int) { m.Members = slices.Delete(m.Members, i, i+1) }
	add := func(kind paxosgroup.MemberKind) {
		if h := c.fresh(m, g); h != nil {
			m.Members = append(m.Members, paxosgroup.Member{ID: h.id, Region: h.region, Kind: kind})
			m.NextID = h.id + 1
		}
	}
	if c.lost != nil {
		if i := slices.IndexFunc(m.Members, func(x paxosgroup.Member) bool { return x.ID == c.lost.id }); i >= 0 {
			kind := m.Members[i].Kind
			remove(i)
			if rng.IntN(4) > 0 || m.Voters() < 3 || leaders(m) < 2 {
				add(kind)
			}
			m.Phase1, m.Phase2 = 0, 0
			return m, m.Voters() > 0
		}
	}
	for range 1 + rng.IntN(3) {
		switch rng.IntN(5) {
		case 0, 1: // replace
			add(paxosgroup.Voter)
			fallthrough
		case 2:
			remove(rng.IntN(len(m.Members)))
		case 3:
			add([]paxosgroup.MemberKind{paxosgroup.Voter, paxosgroup.Learner, paxosgroup.Witness}[rng.IntN(3)])
		case 4:
			drawKinds(rng, &m)
		}
		if len(m.Members) == 0 {
			return m, false
		}
	}
	drawQuorums(rng, &m)
	return m, m.Voters() >= 3 && m.Voters() <= 7 && leaders(m) >= 2
}

// fresh returns a host whose id was never used in the group.
func (c *chaos) fresh(m paxosgroup.Membership, g *groupCheck) *host {
	for _, h := range c.w.hosts {
		if h.id >= m.NextID && !h.gone {
			return h
		}
	}
	if len(c.w.hosts) >= hostsMax || c.w.err != nil {
		return nil
	}
	id := paxosgroup.ReplicaID(len(c.w.hosts) + 1)
	if id < m.NextID {
		return nil
	}
	return c.w.addHost(id, "r"+string(rune('1'+(int(id)-1)%7)))
}

// lose takes a disk away for good, if what is configured survives that.
func (c *chaos) lose(h *host) bool {
	if c.lost != nil {
		for _, g := range c.w.groups {
			if isMember(g.membership, c.lost.id) {
				return false
			}
			if l := c.w.leader(g.id); l != nil && isMember(l.group(g.id).Status().Membership, c.lost.id) {
				return false
			}
		}
	}
	for _, g := range c.w.groups {
		if !survivesLoss(g.membership) {
			return false
		}
		for _, o := range c.w.hosts { // nor may anybody be about to enter what does not
			if o.engine != nil && !survivesLoss(o.group(g.id).Status().Membership) {
				return false
			}
		}
		if l := c.w.leader(g.id); l == nil || l.group(g.id).Status().Change != paxosgroup.ChangeNone {
			return false
		}
	}
	h.end()
	h.disk.Lose()
	h.gone, c.lost = true, h
	return true
}

func isMember(m paxosgroup.Membership, id paxosgroup.ReplicaID) bool {
	_, ok := m.Member(id)
	return ok
}

// survivesLoss reports whether a group can lose any voter with its disk and go on.
func survivesLoss(m paxosgroup.Membership) bool {
	if len(m.Members) == 0 {
		return true // of one that has yet to join
	}
	p1, p2 := m.Quorums()
	return !m.Joint() && p2 >= 2 && max(p1, p2) < m.Voters() && leaders(m) >= 2
}

// retire switches off a host that was removed from all groups, once the leaders
// say that it may go.
func (c *chaos) retire(h *host) bool {
	for _, g := range c.w.groups {
		l := c.w.leader(g.id)
		if l == nil || isMember(g.membership, h.id) {
			return false
		}
		s := l.group(g.id).Status()
		if s.LeaseUntil <= l.clock() || s.Change != paxosgroup.ChangeNone || isMember(s.Membership, h.id) || h.id >= s.Membership.NextID {
			return false
		}
	}
	h.end()
	h.gone = true
	return true
}

// end stops all faults and brings everyone back that is to come back.
func (c *chaos) end() {
	w := c.w
	c.over = true
	w.loss, w.repeat, w.slow, w.delayMax, w.flushMax = 0, 0, 0, 40*time.Millisecond, 2*time.Millisecond
	clear(w.cut)
	clear(w.lag)
	for _, h := range w.hosts {
		h.disk.SetFault(nil)
		h.disk.SetSpace(0)
		h.shortUntil = w.now
		if h.engine != nil {
			h.planFlush()
		}
		if h.pausedUntil > w.now {
			h.pausedUntil = w.now
			h.wakeAt = 0
			h.wake(w.now)
		}
		if h.engine == nil && !h.gone {
			h.start()
		}
	}
}
