package sim

import (
	"slices"
	"testing"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
)

// onlyElectable lets the given replica campaign and nobody else.
func (w *world) onlyElectable(id paxosgroup.ReplicaID) {
	for _, n := range w.hosts {
		if n.engine != nil {
			n.group(1).SetElectable(n.id == id)
		}
	}
}

// elect waits until a replica leads with a lease and its opening is chosen.
func (w *world) elect(t *testing.T, id paxosgroup.ReplicaID) *host {
	t.Helper()
	w.onlyElectable(id)
	n := w.host(id)
	if !w.runUntil(20*time.Second, func() bool {
		s := n.group(1).Status()
		return s.Role == paxosgroup.Leader && s.LeaseUntil > n.clock() && s.Judge.Term == s.Ballot
	}) {
		t.Fatalf("replica %d was not elected: %v%s", id, w.err, w.describe())
	}
	return n
}

// isolate cuts a replica off from all others.
func (w *world) isolate(id paxosgroup.ReplicaID) {
	for _, n := range w.hosts {
		w.cut[link{id, n.id}], w.cut[link{n.id, id}] = true, true
	}
}

func (w *world) mustOffer(t *testing.T, n *host) {
	t.Helper()
	if taken := w.hand(n, 1, 8); !w.runUntil(5*time.Millisecond, func() bool { return *taken }) {
		t.Fatalf("host %d takes no proposal", n.id)
	}
}

// finish heals everything and waits until all are equal.
func (w *world) finish(t *testing.T) {
	t.Helper()
	clear(w.cut)
	w.drop = nil
	for _, n := range w.hosts {
		if n.engine == nil {
			n.start()
		}
	}
	before := len(w.group(1).log)
	if !w.runUntil(20*time.Second, func() bool { return w.settled(w.group(1), before) }) {
		t.Fatalf("not all equal after healing: %v%s", w.err, w.describe())
	}
}

// verdictsOf judges the log anew and reports what regions that obey these
// verdicts would notice.
func (w *world) verdictsOf(judge func(paxosgroup.Entry) paxosgroup.Verdict) error {
	order := newPrimaryOrder()
	order.offers = w.group(1).order.offers
	for _, d := range w.group(1).log {
		d.Verdict = judge(d.Entry)
		if err := order.next(d); err != nil {
			return err
		}
	}
	return nil
}

// gullible is the safeguard switched off: what is chosen counts, as in plain
// Multi-Paxos.
func gullible(e paxosgroup.Entry) paxosgroup.Verdict {
	if e.Kind == paxosgroup.KindNoOp {
		return paxosgroup.Void
	}
	return paxosgroup.Effective
}

func carries(m paxosgroup.Message, number uint64) bool {
	return m.Kind == paxosgroup.MsgAccept && slices.ContainsFunc(m.Entries, func(e paxosgroup.SlotEntry) bool {
		return e.Entry.Kind == paxosgroup.KindData && e.Entry.Number == number
	})
}

// One leader pipelines A and B, B built on A. Only B reaches anybody. The next
// leader must choose B, and a no-op in A's slot: B must count for nothing.
func TestGapInPipelineVoidsSuccessor(t *testing.T) {
	t.Run("gap_in_pipeline_voids_successor", func(t *testing.T) {
		w := newWorld(1, voters(5), 1, nil).begin()
		one := w.elect(t, 1)
		w.drop = func(m paxosgroup.Message) bool {
			return carries(m, 1) || carries(m, 2) && m.To != 3
		}
		w.mustOffer(t, one)
		w.run(5 * time.Millisecond) // so that no Accept carries both
		w.mustOffer(t, one)
		slotA := one.group(1).Status().LastSlot - 1
		w.run(150 * time.Millisecond)
		one.crash()
		w.drop = nil
		w.isolate(5) // so that the quorum has replica 3
		two := w.elect(t, 2)
		w.mustOffer(t, two)
		w.finish(t)

		a, b := w.group(1).log[slotA-1], w.group(1).log[slotA]
		if a.Entry.Kind != paxosgroup.KindNoOp {
			t.Errorf("slot of A holds %s, want a no-op: the scenario did not come about", show(a))
		}
		if b.Entry.Number != 2 || b.Entry.Term.Replica != 1 || b.Verdict != paxosgroup.Void {
			t.Errorf("slot of B holds %s, want entry 2 of replica 1, void", show(b))
		}
		if w.err != nil {
			t.Error(w.err)
		}
		judge := paxosgroup.Judge{}
		if err := w.verdictsOf(judge.Judge); err != nil {
			t.Errorf("judged log: %v", err)
		}
		if err := w.verdictsOf(gullible); err == nil {
			t.Error("without judging, B would have to be seen without A; it was not")
		}
	})
}

// An Accept of a dead leader is long on its way. Another region leads, and
// chooses entries that the late one knows nothing of. Then the late Accept is
// accepted by a replica that never heard of the second leader, and a third one
// must choose it.
func TestLateAcceptOfOldBallot(t *testing.T) {
	t.Run("late_accept_of_old_ballot", func(t *testing.T) {
		w := newWorld(2, voters(5), 1, nil).begin()
		one := w.elect(t, 1)
		w.run(300 * time.Millisecond)
		var late *paxosgroup.Message
		w.drop = func(m paxosgroup.Message) bool {
			if m.Kind == paxosgroup.MsgAccept && m.To == 5 && carries(m, 3) && len(m.Entries) == 1 {
				late = &m
			}
			return m.Kind == paxosgroup.MsgAccept && m.From == 1
		}
		for range 3 {
			w.mustOffer(t, one)
			w.run(5 * time.Millisecond) // so that each has an Accept of its own
		}
		slot := one.group(1).Status().LastSlot
		w.run(50 * time.Millisecond)
		if late == nil {
			t.Fatal("no Accept to delay")
		}
		one.crash()
		w.isolate(5)
		two := w.elect(t, 2)
		w.mustOffer(t, two)
		if !w.runUntil(time.Second, func() bool { return int(slot)-1 == len(w.group(1).log) }) {
			t.Fatalf("log is %d long, want it to end before slot %d", len(w.group(1).log), slot)
		}
		w.run(300 * time.Millisecond)
		two.crash()
		w.arrive(w.host(5), peer.GroupMessage{Group: 1, Message: *late})
		clear(w.cut)
		w.elect(t, 3) // with 4 and 5, there is nobody else
		w.finish(t)

		if d := w.group(1).log[slot-1]; d.Entry.Term.Replica != 1 || d.Entry.Number != 3 || d.Verdict != paxosgroup.Void {
			t.Errorf("slot %d holds %s, want entry 3 of replica 1, void", slot, show(d))
		}
		if w.err != nil {
			t.Error(w.err)
		}
		judge := paxosgroup.Judge{}
		if err := w.verdictsOf(judge.Judge); err != nil {
			t.Errorf("judged log: %v", err)
		}
		if err := w.verdictsOf(gullible); err == nil {
			t.Error("without judging, the late entry would have to undo the second leader's; it did not")
		}
	})
}

// wan are one-way delays between five places, replica 1 being 12, 25, 60 and
// 80 ms of round trip from the others.
func wan(a, b paxosgroup.ReplicaID) time.Duration {
	roundTrips := [5][5]int{
		{0, 12, 25, 60, 80},
		{12, 0, 20, 65, 85},
		{25, 20, 0, 70, 95},
		{60, 65, 70, 0, 110},
		{80, 85, 95, 110, 0},
	}
	return time.Duration(roundTrips[a-1][b-1]) * time.Millisecond / 2
}

func TestFailoverTime(t *testing.T) {
	var took []time.Duration
	for seed := uint64(1); seed <= 40; seed++ {
		w := newWorld(seed, voters(5), 1, func(c *paxosgroup.Config) { c.PreferredRegion = "r1" })
		w.oneWay = wan
		w.begin()
		if !w.runUntil(20*time.Second, func() bool { l := w.leader(1); return l != nil && l.view(1).leaseUntil > l.clock() }) {
			t.Fatalf("seed %d: no leader", seed)
		}
		w.run(time.Second + time.Duration(seed)*7*time.Millisecond)
		dead := w.leader(1)
		dead.crash()
		start, before := w.now, len(w.group(1).log)
		var offeredAt time.Duration
		if !w.runUntil(20*time.Second, func() bool {
			if l := w.leader(1); l != nil && w.now > offeredAt+20*time.Millisecond && w.offer(l, 1, 10) {
				offeredAt = w.now
			}
			last := len(w.group(1).log)
			return last > before && w.group(1).log[last-1].Entry.Kind == paxosgroup.KindData
		}) {
			t.Fatalf("seed %d: no entry after the leader died%s", seed, w.describe())
		}
		if w.err != nil {
			t.Fatalf("seed %d: %v", seed, w.err)
		}
		took = append(took, w.now-start)
	}
	slices.Sort(took)
	median, worst := took[len(took)/2], took[len(took)-1]
	t.Logf("leader lost to first entry chosen: median %v, worst %v", median, worst)
	if median > 3500*time.Millisecond || worst > 8*time.Second {
		t.Errorf("median %v, worst %v; want at most 3.5 s and 8 s", median, worst)
	}
}

func TestTransferIsQuick(t *testing.T) {
	var worst time.Duration
	for seed := uint64(1); seed <= 10; seed++ {
		w := newWorld(seed, voters(5), 1, nil).begin()
		w.oneWay = wan
		one := w.elect(t, 1)
		for _, n := range w.hosts {
			n.group(1).SetElectable(true)
		}
		for range 20 {
			w.mustOffer(t, one)
		}
		start := w.now
		if err := one.group(1).Transfer(one.clock(), 3); err != nil {
			t.Fatal(err)
		}
		three := w.host(3)
		if !w.runUntil(time.Second, func() bool { return w.offer(three, 1, 8) }) {
			t.Fatalf("seed %d: replica 3 does not lead a second after the transfer%s", seed, w.describe())
		}
		worst = max(worst, w.now-start)
		w.finish(t)
		if w.err != nil || w.group(1).void > 0 {
			t.Fatalf("seed %d: %d void, %v", seed, w.group(1).void, w.err)
		}
	}
	t.Logf("longest pause of a transfer: %v", worst)
	if worst > 300*time.Millisecond {
		t.Errorf("a transfer took %v, longer than draining and an election without waiting", worst)
	}
}

// Replica 2 has not heard the leader for so long that it honours no lease any
// more; the others have, when the leader is paused. They must not let replica 2
// lead until that lease has run out: the leader would wake up believing in it.
func TestLeaseOfPausedLeader(t *testing.T) {
	w := newWorld(3, voters(5), 1, nil).begin()
	one := w.elect(t, 1)
	w.onlyElectable(2)
	w.cut[link{1, 2}] = true
	w.run(1600 * time.Millisecond)
	until := one.view(1).leaseUntil
	if until <= one.clock() {
		t.Fatal("the leader holds no lease")
	}
	one.pause(5 * time.Second)
	two := w.host(2)
	if !w.runUntil(4*time.Second, func() bool { return two.view(1).leaseUntil > two.clock() }) {
		t.Fatalf("replica 2 does not lead: %v%s", w.err, w.describe())
	}
	if one.clock() < until {
		t.Error("replica 2 holds a lease while that of the paused leader runs")
	}
	w.run(3 * time.Second)
	if w.err != nil {
		t.Error(w.err)
	}
}
