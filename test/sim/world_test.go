package sim

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"time"

	"quorate/paxosgroup"
)

const tick = 10 * time.Millisecond

// node is one region's replica with its disk and clock.
type node struct {
	id     paxosgroup.ReplicaID
	region string
	core   *paxosgroup.Replica // nil while crashed
	disk   *disk
	life   int // grows with every crash

	ppm         int64 // of its clock
	offset      paxosgroup.Instant
	pausedUntil time.Duration
	backlog     []paxosgroup.Message
	gone        bool // for good
	removed     bool

	delivered  paxosgroup.Slot // in this life
	leaseUntil paxosgroup.Instant
	promised   paxosgroup.Ballot // highest seen in Status
	vouched    paxosgroup.Ballot // highest that a message it sent rests on
}

func (n *node) clock(t time.Duration) paxosgroup.Instant {
	return n.offset + paxosgroup.Instant(t) + paxosgroup.Instant(int64(t)/1_000_000*n.ppm)
}

type event struct {
	at  time.Duration
	seq uint64
	do  func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	old := *e
	x := old[len(old)-1]
	old[len(old)-1] = event{}
	*e = old[:len(old)-1]
	return x
}

type link struct{ from, to paxosgroup.ReplicaID }

// world is all of it.
type world struct {
	rng   *rand.Rand
	now   time.Duration
	queue events
	seq   uint64
	nodes []*node // by id; grows when members are replaced
	check *checker
	first paxosgroup.Membership
	tune  func(*paxosgroup.Config)

	// The network.
	loss, repeat float64
	delayMin     time.Duration
	delayMax     time.Duration
	slow         float64 // share of messages that take much longer
	flushMax     time.Duration
	cut          map[link]bool
	drop         func(paxosgroup.Message) bool                 // a scenario's own
	oneWay       func(a, b paxosgroup.ReplicaID) time.Duration // instead of delayMin to delayMax

	offers int
	sent   int
}

func newWorld(seed uint64, size int, tune func(*paxosgroup.Config)) *world {
	w := &world{
		rng: rand.New(rand.NewPCG(seed, 0x5eed)), check: newChecker(), tune: tune,
		delayMin: time.Millisecond, delayMax: 40 * time.Millisecond, flushMax: 3 * time.Millisecond,
		cut: map[link]bool{},
	}
	for i := 1; i <= size; i++ {
		w.first.Members = append(w.first.Members, paxosgroup.Member{
			ID: paxosgroup.ReplicaID(i), Region: fmt.Sprintf("r%d", i), Kind: paxosgroup.Voter,
		})
	}
	w.first.NextID = paxosgroup.ReplicaID(size + 1)
	w.check.membership = w.first
	for i := 1; i <= size; i++ {
		w.addNode(paxosgroup.ReplicaID(i), fmt.Sprintf("r%d", i))
	}
	return w
}

func (w *world) addNode(id paxosgroup.ReplicaID, region string) *node {
	n := &node{
		id: id, region: region, disk: newDisk(paxosgroup.Base{Membership: w.first}),
		ppm: w.rng.Int64N(1801) - 900, offset: paxosgroup.Instant(1 + w.rng.Int64N(int64(time.Hour))),
	}
	w.nodes = append(w.nodes, n)
	w.start(n, false)
	return n
}

func (w *world) node(id paxosgroup.ReplicaID) *node {
	for _, n := range w.nodes {
		if n.id == id {
			return n
		}
	}
	return nil
}

func (w *world) after(d time.Duration, do func()) {
	w.seq++
	heap.Push(&w.queue, event{at: w.now + d, seq: w.seq, do: do})
}

func (w *world) start(n *node, again bool) {
	cfg := paxosgroup.Config{
		Group: 1, ID: n.id, Region: n.region, Seed: w.rng.Uint64(), RestartedWithState: again,
		WindowSlotsMax: 32, WindowBytesMax: 4 << 10, TickInterval: tick, ClockDriftPPMMax: 1000,
	}
	if w.tune != nil {
		w.tune(&cfg)
	}
	if n.disk.cut > n.disk.now.Slot && n.disk.cut <= n.disk.top {
		// A log that was cut starts at the cut.
		b := w.check.baseAt(n.disk.cut)
		n.disk.now = b
	}
	st := n.disk.restored()
	w.check.restarted(n, st)
	core, err := paxosgroup.New(cfg, st, n.disk, n.clock(w.now))
	if err != nil {
		panic(fmt.Sprintf("restart replica %d: %v", n.id, err))
	}
	n.core, n.delivered, n.backlog, n.leaseUntil, n.pausedUntil = core, st.Chosen, nil, 0, 0
	core.SetIncarnation(paxosgroup.Incarnation(uint64(n.id)<<32 + uint64(n.life)))
	w.settle(n)
	w.tickAgain(n, n.life)
}

func (w *world) crash(n *node) {
	n.core = nil
	n.life++
	n.leaseUntil = 0
	for _, r := range n.disk.crash(w.rng) {
		w.check.flushed(n, r)
	}
}

// tickAgain calls Tick at the stated interval, by the node's own clock or so.
func (w *world) tickAgain(n *node, life int) {
	w.after(tick-time.Duration(w.rng.Int64N(int64(2*time.Millisecond))), func() {
		if n.life != life || n.core == nil {
			return
		}
		if w.now >= n.pausedUntil {
			w.wake(n)
			n.core.Tick(n.clock(w.now))
			w.settle(n)
		}
		w.tickAgain(n, life)
	})
}

// wake hands over what arrived during a pause, in some order relative to the
// first Tick after it.
func (w *world) wake(n *node) {
	backlog := n.backlog
	n.backlog = nil
	for _, m := range backlog {
		w.step(n, m)
	}
}

func (w *world) step(n *node, m paxosgroup.Message) {
	if err := n.core.Step(n.clock(w.now), m); err != nil {
		panic(fmt.Sprintf("replica %d refuses %+v: %v", n.id, m, err))
	}
	n.core.SetApplied(n.delivered)
	w.settle(n)
}

// settle pays what the core is owed.
func (w *world) settle(n *node) {
	for {
		rd, ok := n.core.Ready()
		if !ok {
			break
		}
		w.sendAll(n, rd.Send)
		n.disk.append(rd.Persist)
		w.check.delivered(n, rd.Delivered)
		upto, life := len(n.disk.recs), n.life
		w.after(time.Duration(w.rng.Int64N(int64(w.flushMax)+1)), func() { w.flushed(n, life, upto, rd) })
		if rd.Snapshot {
			w.seed(n)
		}
	}
	w.check.status(w, n)
}

func (w *world) flushed(n *node, life, upto int, rd paxosgroup.Ready) {
	if n.life != life {
		return
	}
	if w.now < n.pausedUntil { // a paused process does nothing, its disk neither
		w.after(n.pausedUntil-w.now, func() { w.flushed(n, life, upto, rd) })
		return
	}
	// Flushes end in order: those of earlier Readies first.
	if n.disk.flushed < upto {
		for i := n.disk.flushed; i < upto; i++ {
			w.check.flushed(n, n.disk.recs[i])
		}
		n.disk.flushed = upto
	}
	w.sendAll(n, rd.AfterSync)
	n.core.Persisted(n.clock(w.now), rd.Seq)
	w.settle(n)
}

// seed gives a replica that fell behind every log an image of another's state.
func (w *world) seed(n *node) {
	var best paxosgroup.Slot
	for _, o := range w.nodes {
		if o.core != nil && o != n {
			best = max(best, o.delivered)
		}
	}
	if best <= n.delivered {
		return
	}
	life := n.life
	w.after(50*time.Millisecond, func() {
		if n.life != life || n.core == nil || best <= n.delivered {
			return
		}
		n.core.Restart(n.clock(w.now), w.check.baseAt(best))
		n.delivered = best
		w.check.seeded++
		w.settle(n)
	})
}

func (w *world) sendAll(n *node, msgs []paxosgroup.Message) {
	for _, m := range msgs {
		w.check.sent(n, m)
		to := w.node(m.To)
		if to == nil || w.cut[link{m.From, m.To}] || w.drop != nil && w.drop(m) {
			continue
		}
		copies := 1
		if w.rng.Float64() < w.loss {
			copies = 0
		} else if w.rng.Float64() < w.repeat {
			copies = 2
		}
		for range copies {
			d := w.delayMin + time.Duration(w.rng.Int64N(int64(w.delayMax-w.delayMin)+1))
			if w.oneWay != nil {
				d = w.oneWay(m.From, m.To)
			}
			if w.rng.Float64() < w.slow {
				d += time.Duration(w.rng.Int64N(int64(3 * time.Second)))
			}
			w.sent++
			w.after(d, func() { w.arrive(to, m) })
		}
	}
}

func (w *world) arrive(n *node, m paxosgroup.Message) {
	switch {
	case n.core == nil:
	case w.now < n.pausedUntil:
		if len(n.backlog) < 2000 {
			n.backlog = append(n.backlog, m)
		}
	default:
		w.step(n, m)
	}
}

// run lets d pass.
func (w *world) run(d time.Duration) {
	w.runUntil(d, func() bool { return false })
}

// runUntil lets time pass until ok or for d, and reports whether ok came.
func (w *world) runUntil(d time.Duration, ok func() bool) bool {
	end := w.now + d
	for len(w.queue) > 0 && w.queue[0].at <= end {
		if ok() {
			return true
		}
		e := heap.Pop(&w.queue).(event)
		w.now = e.at
		e.do()
		w.check.leases(w)
		if w.check.err != nil {
			return false
		}
	}
	w.now = end
	return ok()
}

// leader returns the running replica that leads at the highest ballot.
func (w *world) leader() *node {
	var best *node
	var ballot paxosgroup.Ballot
	for _, n := range w.nodes {
		if n.core == nil || w.now < n.pausedUntil {
			continue
		}
		if s := n.core.Status(); s.Role == paxosgroup.Leader && ballot.Less(s.Ballot) {
			best, ballot = n, s.Ballot
		}
	}
	return best
}

// offer proposes the next payload through a node, if it takes it.
func (w *world) offer(n *node, size int) error {
	w.offers++
	payload := fmt.Appendf(nil, "%d:%0*d", w.offers, size, 0)
	term, number, err := n.core.Propose(n.clock(w.now), payload)
	if err != nil {
		return err
	}
	w.check.offered(term, number, payload)
	w.settle(n)
	return nil
}
