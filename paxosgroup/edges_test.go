package paxosgroup

import (
	"testing"
	"time"
)

// TestNobodyCampaignsInALeaseItGranted: a voter that asks for pre-votes grants the
// old leader, who was only paused, another lease. Three cores, one clock, no loss;
// only the order of arrival is chosen.
func TestNobodyCampaignsInALeaseItGranted(t *testing.T) {
	now := Instant(time.Hour)
	m := Membership{NextID: 4}
	for id := ReplicaID(1); id <= 3; id++ {
		m.Members = append(m.Members, Member{ID: id, Region: "r", Kind: Voter})
	}
	labs := map[ReplicaID]*lab{}
	for id := ReplicaID(1); id <= 3; id++ {
		l := &lab{t: t, now: now}
		r, err := New(Config{Group: 1, ID: id, Region: "r", Seed: uint64(id)}, Restored{Base: Base{Membership: m}}, l, now)
		if err != nil {
			t.Fatal(err)
		}
		l.r = r
		labs[id] = l
	}
	var wire []Message
	take := func(id ReplicaID) { labs[id].now = now; wire = append(wire, labs[id].settle()...) }
	deliver := func(ok func(Message) bool) int {
		n := 0
		for i := 0; i < len(wire); {
			x := wire[i]
			if !ok(x) {
				i++
				continue
			}
			wire = append(wire[:i:i], wire[i+1:]...)
			labs[x.To].r.Step(now, x)
			take(x.To)
			n++
			i = 0
		}
		return n
	}
	all := func(Message) bool { return true }
	lead := func() ReplicaID {
		for id := ReplicaID(1); id <= 3; id++ {
			if labs[id].r.Status().LeaseUntil > now {
				return id
			}
		}
		return 0
	}
	tick := func(ids ...ReplicaID) {
		now += Instant(10 * time.Millisecond)
		for _, id := range ids {
			labs[id].r.Tick(now)
			take(id)
		}
	}
	for lead() == 0 {
		tick(1, 2, 3)
		deliver(all)
	}
	a := lead()
	b, c := a%3+1, (a+1)%3+1
	// a is paused until b asks for pre-votes (swap b and c if c asks first).
	for labs[b].r.stage != asking || labs[b].r.now < labs[b].r.grantedUntil {
		tick(b, c)
		deliver(func(x Message) bool { return x.Kind == MsgPreVoteReply && !(x.From == c || x.From == b) })
		if labs[c].r.stage == asking {
			b, c = c, b
		}
		if now > Instant(2*time.Hour) {
			t.Fatal("nobody asks")
		}
	}
	// c gives its pre-vote; the reply is on its way.
	deliver(func(x Message) bool { return x.Kind == MsgPreVote && x.To == c && x.From == b })
	// a resumes and sends a heartbeat, which reaches b, and later c.
	now += Instant(20 * time.Millisecond)
	labs[a].r.Tick(now)
	take(a)
	deliver(func(x Message) bool { return x.Kind == MsgHeartbeat && x.From == a && x.To == b })
	deliver(func(x Message) bool { return x.Kind == MsgHeartbeatAck && x.To == a })
	if labs[a].r.Status().LeaseUntil <= now {
		t.Fatal("the old leader was granted no lease: the test shows nothing")
	}
	// now b and c talk; the link between a and both is slow.
	bc := func(x Message) bool { return x.From == b && x.To == c || x.From == c && x.To == b }
	deliver(bc)
	la, lb := labs[a].r.Status().LeaseUntil, labs[b].r.Status().LeaseUntil
	if la > now && lb > now {
		t.Errorf("replica %d holds the lease for %v at ballot %v and replica %d for %v at ballot %v", a, la.Sub(now), labs[a].r.ballot, b, lb.Sub(now), labs[b].r.ballot)
	}
}

func TestANonMemberIsAtRest(t *testing.T) {
	l := &lab{t: t, now: Instant(time.Hour)}
	r, err := New(Config{Group: 1, ID: 7, Region: "r", Seed: 7}, Restored{}, l, l.now)
	if err != nil {
		t.Fatal(err)
	}
	l.r = r
	l.pass(2 * time.Second)
	if d := r.NextDeadline(); d <= l.now {
		t.Errorf("non-member: next deadline %v in the past after Tick", l.now.Sub(d))
	}
}

func TestAnImageReplacesWhatWasDelivered(t *testing.T) {
	l := newLab(t, 1, false)
	b := Ballot{Counter: 5, Replica: 2}
	m := Message{Kind: MsgLearn, From: 2, To: 1, Ballot: b, Slot: 1, Chosen: 1, Entries: []SlotEntry{{Slot: 1, Entry: Entry{Kind: KindOpening, Term: b, Region: "r"}}}}
	if err := l.r.Step(l.now, m); err != nil {
		t.Fatal(err)
	}
	l.r.Restart(l.now, Base{Slot: 50, Membership: five()})
	rd, _ := l.r.Ready()
	if len(rd.Delivered) > 0 {
		t.Errorf("one Ready has Delivered slot %d and a base at 50", rd.Delivered[0].Slot)
	}
}

func TestTheSlotThatAllWaitForIsAcceptedWhateverItsSize(t *testing.T) {
	l := &lab{t: t, now: Instant(time.Hour)}
	r, err := New(Config{Group: 1, ID: 1, Region: "r", Seed: 7, WindowBytesMax: 1 << 20}, Restored{Base: Base{Membership: five()}}, l, l.now)
	if err != nil {
		t.Fatal(err)
	}
	l.r = r
	b5, b6 := Ballot{Counter: 5, Replica: 2}, Ballot{Counter: 6, Replica: 3}
	e := Entry{Kind: KindData, Term: b5, Number: 1, Payload: make([]byte, 3<<20)}
	if len(only(l.step(Message{Kind: MsgAccept, From: 2, Ballot: b5, Entries: []SlotEntry{{Slot: 1, Entry: e}}}), MsgAccepted)) == 0 {
		t.Fatal("not accepted the first time")
	}
	l.pass(2 * time.Second)
	l.step(Message{Kind: MsgPrepare, From: 3, Ballot: b6, Slot: 1})
	out := l.step(Message{Kind: MsgAccept, From: 3, Ballot: b6, Entries: []SlotEntry{{Slot: 1, Entry: e}}})
	if len(only(out, MsgAccepted)) == 0 {
		t.Errorf("the entry that is recovered is never accepted again: slot 1 cannot be decided")
	}
}
