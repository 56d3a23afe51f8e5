package paxosgroup

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// bounds are what one exploration allows to happen.
type bounds struct {
	name           string
	phase1, phase2 int
	candidates     []int // which replicas may ever campaign
	elections      int   // how many campaigns begin, which is how many ballots there are
	proposals      int   // entries handed in, over all leaderships
	crashes        int   // each loses whatever is not flushed; recovery is at once
	repeats        int   // messages that arrive once more
	refusals       bool  // they arrive too; else whoever is refused never hears of it
	impatient      bool  // what is fetched is asked for again at every occasion
	changes        []func(Membership) Membership

	// What the explorer must find: acceptors that answer before their flush, and
	// restarts that forget the promise, or what was accepted.
	hasty, forgetful, amnesiac bool
}

const replicas = 3

// model is one state of three replicas, their disks and what is on its way. What
// it points to is shared between models and never changed.
type model struct {
	nodes     [replicas]*modelNode
	flight    []*letter // by hash; one that is never taken out is lost
	seen      *history
	elections int
	proposals int
	crashes   int
	repeats   int
	changes   int
	path      *path
}

// path is how a model came about, last first.
type path struct {
	action string
	before *path
}

func (p *path) String() string {
	var steps []string
	for ; p != nil; p = p.before {
		steps = append(steps, p.action)
	}
	slices.Reverse(steps)
	out := ""
	for i, s := range steps {
		out += fmt.Sprintf("\n%4d  %s", i+1, s)
	}
	return out
}

type modelNode struct {
	core     *Replica
	flushed  image  // what a restart finds
	written  image  // what Storage reads
	owed     []owed // Readies that wait for their flush, in order
	promised Ballot // highest that was seen
	vouched  Ballot // highest that a message that was sent rests on
	hash     uint64
}

type owed struct {
	seq       uint64
	records   []Record
	afterSync []Message
}

type letter struct {
	message Message
	hash    uint64
}

// image is what records add up to.
type image struct {
	base     Base
	promised Ballot
	chosen   Slot
	entries  []AcceptedEntry // last accepted or learned, ascending; learned: Ballot is zero
}

var errNotStored = errors.New("not stored")

// Chosen implements Storage.
func (d *image) Chosen(from, to Slot, _ int) ([]SlotEntry, error) {
	var out []SlotEntry
	for _, e := range d.entries {
		if e.Slot >= from && e.Slot <= to {
			out = append(out, SlotEntry{Slot: e.Slot, Entry: e.Entry})
		}
	}
	if from <= d.base.Slot || to > d.chosen || len(out) != int(to-from)+1 {
		return nil, errNotStored
	}
	return out, nil
}

// with returns the image after more records; d stays as it is.
func (d image) with(records []Record) image {
	d.entries = slices.Clone(d.entries)
	raise := func(b Ballot) {
		if d.promised.Less(b) {
			d.promised = b
		}
	}
	for _, r := range records {
		switch r.Kind {
		case RecordPromise:
			raise(r.Ballot)
		case RecordAccept, RecordLearn:
			raise(r.Ballot)
			i, found := slices.BinarySearchFunc(d.entries, r.Slot, func(e AcceptedEntry, s Slot) int { return cmp.Compare(e.Slot, s) })
			e := AcceptedEntry{Slot: r.Slot, Ballot: r.Ballot, Entry: r.Entry}
			if found {
				d.entries[i] = e
			} else {
				d.entries = slices.Insert(d.entries, i, e)
			}
			if r.Kind == RecordLearn {
				d.chosen = max(d.chosen, r.Slot)
			}
		case RecordChosen:
			d.chosen = max(d.chosen, r.Slot)
		case RecordBase:
			d.base, d.chosen = *r.Base, max(d.chosen, r.Base.Slot)
			d.entries = slices.DeleteFunc(d.entries, func(e AcceptedEntry) bool { return e.Slot <= r.Base.Slot })
		}
	}
	return d
}

func (d image) restored() Restored {
	st := Restored{Base: d.base, Promised: d.promised, Chosen: d.chosen}
	for _, e := range d.entries {
		if e.Slot > d.chosen {
			st.Accepted = append(st.Accepted, e)
		}
	}
	return st
}

const present = Instant(time.Hour) // when everything happens

func newModel(b bounds) (*model, error) {
	m := &model{seen: &history{}}
	first := Membership{NextID: 9, Phase1: b.phase1, Phase2: b.phase2}
	for id := ReplicaID(1); id <= replicas; id++ {
		first.Members = append(first.Members, Member{ID: id, Region: fmt.Sprintf("r%d", id), Kind: Voter})
	}
	m.seen.membership = first
	for i := range m.nodes {
		n := &modelNode{flushed: image{base: Base{Membership: first}}}
		n.written = n.flushed
		m.nodes[i] = n
		if err := m.restart(i); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// change returns a copy of m in which node i may be changed.
func (m *model) change(b bounds, i int) *model {
	out := *m
	n := *m.nodes[i]
	n.core = deepCopy(n.core)
	n.core.store = &n.written
	n.core.rng = rand.New(rand.NewPCG(1, 1))
	n.core.passTime(b)
	n.owed = slices.Clone(n.owed)
	out.nodes[i] = &n
	return &out
}

// passTime has all happen that only time stands in the way of: leases have run
// out, and what is to be told soon is told now. Nobody may rely on a clock.
func (r *Replica) passTime(b bounds) {
	r.grantedUntil, r.restartUntil, r.quietUntil = 0, 0, 0
	if r.lead.noticeAt != 0 {
		r.lead.noticeAt = present
	}
	if b.impatient && r.fetch.until != 0 {
		r.fetch.until = present
	}
}

// restart gives node i the core that its flushed records make.
func (m *model) restart(i int) error {
	n := m.nodes[i]
	n.written, n.owed = n.flushed, nil
	core, err := New(Config{
		Group: 1, ID: ReplicaID(i + 1), Region: fmt.Sprintf("r%d", i+1), WindowSlotsMax: 4, WindowBytesMax: 1 << 10,
		LeaseDuration: 2 * time.Duration(present), // no leadership is over because a copy of it is of long ago
	}, n.flushed.restored(), &n.written, present)
	if err != nil {
		return err
	}
	n.core = core
	if core.promised.Less(n.vouched) {
		return fmt.Errorf("replica %d restarts with promise %v, but has sent what rests on %v", i+1, core.promised, n.vouched)
	}
	n.promised = core.promised
	n.rehash()
	return nil
}

// settle pays what the core of node i is owed. With no crash to come, flushes
// are at once: when else they end, only a crash can tell.
func (m *model) settle(b bounds, i int) error {
	n := m.nodes[i]
	for {
		rd, ok := n.core.Ready()
		if !ok {
			break
		}
		m.post(n, rd.Send)
		if b.hasty {
			m.post(n, rd.AfterSync)
			rd.AfterSync = nil
		}
		n.written = n.written.with(rd.Persist)
		needed := slices.ContainsFunc(rd.Persist, Record.NeedsFlush)
		if err := m.accepted(i, rd.Persist, false); err != nil {
			return err
		}
		if !needed && len(n.owed) == 0 {
			n.flushed = n.flushed.with(rd.Persist)
			m.post(n, rd.AfterSync)
		} else {
			n.owed = append(n.owed, owed{rd.Seq, rd.Persist, rd.AfterSync})
		}
		if err := m.delivered(i, rd.Delivered); err != nil {
			return err
		}
		if m.crashes >= b.crashes {
			for len(n.owed) > 0 {
				if err := m.flush(i); err != nil {
					return err
				}
			}
		}
	}
	if n.core.promised.Less(n.promised) {
		return fmt.Errorf("promise of replica %d falls from %v to %v", i+1, n.promised, n.core.promised)
	}
	n.promised = n.core.promised
	n.renumber()
	n.rehash()
	return nil
}

// flush ends the oldest flush of node i that is under way.
func (m *model) flush(i int) error {
	n := m.nodes[i]
	o := n.owed[0]
	n.owed = n.owed[1:]
	n.flushed = n.flushed.with(o.records)
	if err := m.accepted(i, o.records, true); err != nil {
		return err
	}
	m.post(n, o.afterSync)
	n.core.Persisted(present, o.seq)
	return nil
}

// renumber counts Readies from the oldest that is not flushed, so that states
// do not differ by how many there ever were.
func (n *modelNode) renumber() {
	floor := n.core.seq
	if len(n.owed) > 0 {
		floor = n.owed[0].seq - 1
	}
	n.core.seq -= floor
	for i := range n.owed {
		n.owed[i].seq -= floor
	}
	for i := range n.core.own {
		n.core.own[i].seq -= floor
	}
}

func (n *modelNode) rehash() {
	h := deepHash(0, n.core)
	h = deepHash(h, &n.flushed)
	h = deepHash(h, &n.written)
	h = deepHash(h, &n.owed)
	n.hash = mix(mix(h, n.vouched.Counter), uint64(n.vouched.Replica))
}

// post puts messages on their way. What only a clock asks for is left out: beats
// for leases, which have always run out here, and probes of round trips.
func (m *model) post(n *modelNode, messages []Message) {
	for _, x := range messages {
		switch x.Kind {
		case MsgPromise, MsgAccepted, MsgPrepare:
			if n.vouched.Less(x.Ballot) {
				n.vouched = x.Ballot
			}
		case MsgPreVote, MsgPreVoteReply, MsgHeartbeatAck:
			continue
		case MsgHeartbeat:
			if x.SentAt != 0 || x.Transfer {
				continue
			}
		}
		if x.To < 1 || x.To > replicas {
			continue
		}
		l := &letter{message: x, hash: deepHash(0, &x)}
		at, there := slices.BinarySearchFunc(m.flight, l.hash, func(l *letter, h uint64) int { return cmp.Compare(l.hash, h) })
		if !there { // the same message twice is a repeat, of which there are few
			m.flight = slices.Insert(slices.Clone(m.flight), at, l)
		}
	}
}

// forgetDead takes away what node i will never again do more about than refuse.
// It counts as lost.
func (m *model) forgetDead(b bounds, i int) {
	core := m.nodes[i].core
	dead := func(l *letter) bool {
		x := l.message
		if int(x.To) != i+1 {
			return !b.refusals && x.Kind == MsgReject
		}
		switch x.Kind {
		case MsgReject:
			return !b.refusals || core.stage == idle
		case MsgPrepare, MsgAccept, MsgHeartbeat:
			return x.Ballot.Less(core.promised)
		case MsgPromise, MsgAccepted:
			return !core.promised.Less(x.Ballot) && core.ballot != x.Ballot
		}
		return false
	}
	if slices.ContainsFunc(m.flight, dead) {
		m.flight = slices.DeleteFunc(slices.Clone(m.flight), dead)
	}
}

func (m *model) hash() uint64 {
	h := deepHash(0, m.seen)
	for _, n := range m.nodes {
		h = mix(h, n.hash)
	}
	for _, l := range m.flight {
		h = mix(h, l.hash)
	}
	for _, v := range []int{m.elections, m.proposals, m.crashes, m.repeats, m.changes} {
		h = mix(h, uint64(v))
	}
	return h
}

// next calls each with every state that one action leads to, or with what is
// wrong with it.
func (m *model) next(b bounds, each func(*model, error)) {
	act := func(i int, label func() string, do func(*model, *modelNode) error) {
		out := m.change(b, i)
		out.path = &path{action: label(), before: m.path}
		err := func() (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = fmt.Errorf("panic: %v", p)
				}
			}()
			if err := do(out, out.nodes[i]); err != nil {
				return err
			}
			if err := out.settle(b, i); err != nil {
				return err
			}
			out.forgetDead(b, i)
			return nil
		}()
		each(out, err)
	}
	for i, n := range m.nodes {
		who := fmt.Sprintf("replica %d ", i+1)
		if m.elections < b.elections && slices.Contains(b.candidates, i+1) && n.core.stage == idle && n.core.canCampaignAt(present) {
			act(i, func() string { return who + "campaigns" }, func(out *model, n *modelNode) error {
				out.elections++
				n.core.now = present
				n.core.startPrepare(Ballot{})
				return nil
			})
		}
		if m.proposals < b.proposals && n.core.role == Leader {
			act(i, func() string { return who + "takes a proposal" }, func(out *model, n *modelNode) error {
				out.proposals++
				_, _, err := n.core.Propose(present, []byte{byte('a' + m.proposals)})
				if errors.Is(err, ErrWindowFull) {
					return nil
				}
				return err
			})
		}
		if m.changes < len(b.changes) && n.core.role == Leader {
			act(i, func() string { return who + "is to change the membership" }, func(out *model, n *modelNode) error {
				out.changes++
				n.core.changeNow(b.changes[m.changes](n.core.membership))
				return nil
			})
		}
		if len(n.owed) > 0 {
			act(i, func() string { return who + "flushes" }, func(out *model, n *modelNode) error { return out.flush(i) })
		}
		if m.crashes < b.crashes {
			act(i, func() string { return who + "crashes and restarts" }, func(out *model, n *modelNode) error {
				out.crashes++
				if b.forgetful {
					n.flushed.promised = Ballot{}
				}
				if b.amnesiac {
					n.flushed.entries = n.flushed.entries[:n.flushed.chosen]
				}
				return out.restart(i)
			})
		}
	}
	for k, l := range m.flight {
		i := int(l.message.To) - 1
		step := func(_ *model, n *modelNode) error { return n.core.Step(present, l.message) }
		act(i, func() string { return describeLetter(l.message) }, func(out *model, n *modelNode) error {
			out.flight = slices.Delete(slices.Clone(out.flight), k, k+1)
			return step(out, n)
		})
		if m.repeats < b.repeats {
			act(i, func() string { return describeLetter(l.message) + ", to come once more" }, func(out *model, n *modelNode) error {
				out.repeats++
				return step(out, n)
			})
		}
	}
}

// canCampaignAt is canCampaign once every lease has run out.
func (r *Replica) canCampaignAt(now Instant) bool {
	return r.membership.leads(r.cfg.ID) && now > r.leaseHonouredUntil()
}

// changeNow begins a change as if its voters had granted the lease and had
// caught up.
func (r *Replica) changeNow(m Membership) {
	l := &r.lead
	m = m.normalized()
	m.Epoch = r.membership.Epoch + 1
	if l.change != nil || r.membership.Joint() || !l.phase1 || l.next <= l.recoveredMax {
		return
	}
	if out := r.membership.Incoming(); !m.Incoming().sameVotes(out) {
		m.Outgoing = &out
	}
	if m.Validate() != nil {
		return
	}
	c := &change{to: m, quorums: r.quorumsOf(m)}
	if c.quorums.phase1(r.bits.set(l.promised)) {
		r.proposeChange(c)
	}
}

func describeLetter(m Message) string {
	out := fmt.Sprintf("%d takes kind %d of %d, ballot %v, slot %d, chosen %d", m.To, m.Kind, m.From, m.Ballot, m.Slot, m.Chosen)
	for _, s := range m.Slots {
		out += fmt.Sprintf(", slot %d", s)
	}
	for _, a := range m.Accepted {
		out += fmt.Sprintf(", %d: %v %v/%d at %v", a.Slot, a.Entry.Kind, a.Entry.Term, a.Entry.Number, a.Ballot)
	}
	for _, e := range m.Entries {
		out += fmt.Sprintf(", %d: %v %v/%d", e.Slot, e.Entry.Kind, e.Entry.Term, e.Entry.Number)
	}
	return out
}
