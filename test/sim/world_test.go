package sim

import (
	"fmt"
	"math/rand/v2"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
)

type link struct{ from, to paxosgroup.ReplicaID }

// world is all of it.
type world struct {
	rng   *rand.Rand
	now   time.Duration
	queue agenda
	seq   uint64
	trace uint64 // of all that happened
	steps int

	hosts  []*host // by id; grows when members are replaced
	groups []*groupCheck
	first  paxosgroup.Membership
	tune   func(*paxosgroup.Config)
	err    error

	// The network.
	loss, repeat float64
	delayMin     time.Duration
	delayMax     time.Duration
	slow         float64 // share of messages that take much longer
	flushMax     time.Duration
	ppmMax       int64
	cut          map[link]bool
	lag          map[paxosgroup.ReplicaID]time.Duration        // of what is sent to it
	drop         func(paxosgroup.Message) bool                 // a scenario's own
	oneWay       func(a, b paxosgroup.ReplicaID) time.Duration // instead of delayMin to delayMax
	clients      []*client
	shared       bool // heartbeats are shared by all groups of two hosts
	leaseUnsafe  bool // clocks are worse than what leases are made for
	waits        bool // every second proposal of offer waits until it is effective
	segmentBytes int64

	offers, sent, seeded, refused int
}

func voters(n int) paxosgroup.Membership {
	m := paxosgroup.Membership{NextID: paxosgroup.ReplicaID(n + 1)}
	for i := 1; i <= n; i++ {
		m.Members = append(m.Members, paxosgroup.Member{ID: paxosgroup.ReplicaID(i), Region: fmt.Sprintf("r%d", i), Kind: paxosgroup.Voter})
	}
	return m
}

// newWorld makes a calm world whose groups all begin with the members of first.
func newWorld(seed uint64, first paxosgroup.Membership, groups int, tune func(*paxosgroup.Config)) *world {
	w := &world{
		rng: rand.New(rand.NewPCG(seed, 0x5eed)), first: first, tune: tune,
		delayMin: time.Millisecond, delayMax: 40 * time.Millisecond, flushMax: 3 * time.Millisecond, ppmMax: 900,
		cut: map[link]bool{}, lag: map[paxosgroup.ReplicaID]time.Duration{}, segmentBytes: segmentBytes,
	}
	for g := 1; g <= groups; g++ {
		w.groups = append(w.groups, newGroupCheck(w, paxosgroup.GroupID(g), first))
	}
	return w
}

// begin starts the first members.
func (w *world) begin() *world {
	for _, m := range w.first.Members {
		w.addHost(m.ID, m.Region)
	}
	return w
}

func (w *world) fail(format string, args ...any) {
	if w.err == nil {
		w.err = fmt.Errorf(format, args...)
	}
}

func (w *world) host(id paxosgroup.ReplicaID) *host {
	if id < 1 || int(id) > len(w.hosts) {
		return nil
	}
	return w.hosts[id-1]
}

func (w *world) group(id paxosgroup.GroupID) *groupCheck { return w.groups[id-1] }

func (w *world) after(d time.Duration, do func()) {
	w.seq++
	w.queue.push(event{at: w.now + d, seq: w.seq, do: do})
}

func (w *world) random(d time.Duration) time.Duration {
	return time.Duration(w.rng.Int64N(int64(d) + 1))
}

// note makes the trace tell this run from any other.
func (w *world) note(parts ...uint64) {
	h := w.trace
	for _, p := range parts {
		h = (h ^ p) * 0x9e3779b97f4a7c15
		h ^= h >> 29
	}
	w.trace = h
}

// sendAll puts messages on their way.
func (w *world) sendAll(h *host, g paxosgroup.GroupID, msgs []paxosgroup.Message) {
	for _, m := range msgs {
		w.note(uint64(g), uint64(m.Kind), uint64(m.From)<<32|uint64(m.To), m.Ballot.Counter, uint64(m.Slot), uint64(m.Chosen))
		if g != 0 {
			w.group(g).sent(h, m)
		}
		to := w.host(m.To)
		if to == nil || w.cut[link{h.id, m.To}] || w.drop != nil && w.drop(m) {
			continue
		}
		copies := 1
		if w.loss > 0 && w.rng.Float64() < w.loss {
			copies = 0
		} else if w.repeat > 0 && w.rng.Float64() < w.repeat {
			copies = 2
		}
		for range copies {
			d := w.delayMin + w.random(w.delayMax-w.delayMin)
			if w.oneWay != nil {
				d = w.oneWay(h.id, m.To)
			}
			d += w.lag[m.To]
			if w.slow > 0 && w.rng.Float64() < w.slow {
				d += w.random(3 * time.Second)
			}
			w.sent++
			w.after(d, func() { w.arrive(to, peer.GroupMessage{Group: g, Message: m}) })
		}
	}
}

const backlogMax = 2000 // messages that wait for a paused process

func (w *world) arrive(h *host, m peer.GroupMessage) {
	switch {
	case h.engine == nil:
	case w.now < h.pausedUntil:
		if len(h.backlog) < backlogMax {
			h.backlog = append(h.backlog, m)
		}
	default:
		h.deliver(m)
	}
}

// run lets d pass.
func (w *world) run(d time.Duration) { w.runUntil(d, func() bool { return false }) }

// runUntil lets time pass until ok or for d, and reports whether ok came.
func (w *world) runUntil(d time.Duration, ok func() bool) bool {
	end := w.now + d
	for len(w.queue) > 0 && w.queue[0].at <= end {
		if ok() {
			return true
		}
		e := w.queue.pop()
		w.now = e.at
		w.steps++
		e.do()
		if w.err != nil {
			return false
		}
	}
	w.now = end
	return ok()
}

// leader returns the running host that leads a group at the highest ballot.
func (w *world) leader(g paxosgroup.GroupID) *host {
	var best *host
	var ballot paxosgroup.Ballot
	for _, h := range w.hosts {
		if h.engine == nil || w.now < h.pausedUntil {
			continue
		}
		if b := h.group(g).Brief(); b.Role == paxosgroup.Leader && ballot.Less(b.Ballot) {
			best, ballot = h, b.Ballot
		}
	}
	return best
}
