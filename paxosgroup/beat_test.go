package paxosgroup

import (
	"testing"
	"time"
)

// Lives of the processes of replicas 1 and 2, and one that came after.
const (
	life1      = 1001
	life2      = 2001
	life2After = 2002
)

// beating returns a replica that shares beats.
func beating(t *testing.T) (*lab, *Beats) {
	t.Helper()
	l, b := newLab(t, 1, false), NewBeats(1, life1, 100*time.Millisecond)
	l.r.Share(b)
	return l, b
}

// neighbour is another group's replica in the same process.
func (l *lab) neighbour() *lab {
	l.t.Helper()
	n := newLab(l.t, 1, false)
	n.r.Share(l.r.beats)
	return n
}

// registers has leader 2 ask for registration, and returns under what generation
// that is.
func (l *lab) registers(b Ballot, life, generation uint64) uint64 {
	l.t.Helper()
	m := heartbeat(2, b, 77)
	m.Shared, m.Life, m.Generation = true, life, generation
	acks := only(l.step(m), MsgHeartbeatAck)
	if len(acks) != 1 || !acks[0].Shared || acks[0].Life != life1 || acks[0].Generation == 0 {
		l.t.Fatalf("asked for registration, it answers %+v", acks)
	}
	return acks[0].Generation
}

// hears has a beat of replica 2's process come in, and returns the answers.
func hears(l *lab, life, generation uint64) []Message {
	return l.r.beats.Step(l.now, Message{Kind: MsgBeat, From: 2, To: 1, SentAt: l.now, Life: life, Generation: generation})
}

// promisesTo reports whether replica 3 gets a promise.
func promisesTo(l *lab, b Ballot) bool {
	return len(only(l.step(Message{Kind: MsgPrepare, From: 3, Ballot: b, Slot: 1}), MsgPromise)) == 1
}

// covered makes replica 1 leader and registers it with followers 2 and 3, whose
// processes have lives 2001 and 3001, under generation 1.
func covered(t *testing.T) (*lab, *Beats) {
	t.Helper()
	l, b := beating(t)
	term := l.lead()
	for m := l.passUntil(MsgHeartbeat); !m.Shared; m = l.passUntil(MsgHeartbeat) {
	}
	for id := ReplicaID(2); id <= 3; id++ {
		l.step(Message{
			Kind: MsgHeartbeatAck, From: id, Ballot: term, SentAt: l.r.lead.heartbeatAt, Granted: true, Chosen: 1,
			Shared: true, Life: uint64(id)*1000 + 1, Generation: 1,
		})
	}
	return l, b
}

// acked has the followers answer a beat, and returns by how much the lease has
// grown.
func acked(l *lab, alter func(*Message)) time.Duration {
	l.r.Tick(l.now)
	before := l.r.LeaseUntil()
	for id := ReplicaID(2); id <= 3; id++ {
		m := Message{Kind: MsgBeatAck, From: id, To: 1, SentAt: l.now, Life: uint64(id)*1000 + 1, Generation: 1, ID: life1}
		alter(&m)
		l.r.beats.Step(l.now, m)
	}
	return l.r.LeaseUntil().Sub(before)
}

func TestWhichAcksOfBeatsRenewALease(t *testing.T) {
	for _, tc := range []struct {
		name  string
		alter func(*Message)
		want  time.Duration
	}{
		{"under which it is registered", func(*Message) {}, 50 * time.Millisecond},
		{"sent before it was registered, and after what registered it", func(m *Message) { m.SentAt -= Instant(20 * time.Millisecond) }, 30 * time.Millisecond},
		{"of a follower that restarted, and counts from one again", func(m *Message) { m.Life++ }, 0},
		{"of a later generation", func(m *Message) { m.Generation++ }, 0},
		{"to a beat of an earlier life of the leader", func(m *Message) { m.ID-- }, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, _ := covered(t)
			l.now = l.r.lead.heartbeatAt.Add(50 * time.Millisecond)
			if got := acked(l, tc.alter); got != tc.want {
				t.Errorf("the lease grows by %v, want %v", got, tc.want)
			}
		})
	}
}

// TestAnAckOfThePastIsNotTakenForTheNewest: generations were learned in the order
// of the beats that were answered, not of the answers.
func TestAnAckOfThePastIsNotTakenForTheNewest(t *testing.T) {
	l, b := covered(t)
	l.now = l.now.Add(50 * time.Millisecond)
	b.Step(l.now, Message{Kind: MsgBeatAck, From: 2, To: 1, SentAt: l.now, Life: life2, Generation: 2, ID: life1})
	b.Step(l.now, Message{Kind: MsgBeatAck, From: 2, To: 1, SentAt: l.now - 1, Life: life2, Generation: 1, ID: life1})
	if k := b.link(2); k.generation != 2 || k.ackedAt != l.now {
		t.Errorf("registers under generation %d, acked at %d; want 2, %d", k.generation, k.ackedAt, l.now)
	}
}

// TestBeatsOfANewLifeAreNoGrants: the leader's process restarted, and leads
// nothing of what it led.
func TestBeatsOfANewLifeAreNoGrants(t *testing.T) {
	l, _ := beating(t)
	l.registers(Ballot{5, 2}, life2, 1)
	l.now = l.now.Add(time.Second)
	hears(l, life2After, 1)
	l.now = l.now.Add(500 * time.Millisecond)
	if !promisesTo(l, Ballot{9, 3}) {
		t.Error("the beat of a later life of its leader's process counts as a heartbeat")
	}
}

// TestAPromiseEndsRegistration: whoever promised somebody else does not go on
// granting a lease because another group of the process does.
func TestAPromiseEndsRegistration(t *testing.T) {
	l, _ := beating(t)
	n := l.neighbour()
	b := Ballot{5, 2}
	before := l.registers(b, life2, 1)
	if same := n.registers(b, life2, 1); same != before {
		t.Fatalf("one group is registered under generation %d, the next under %d", before, same)
	}
	if out := l.step(Message{Kind: MsgPrepare, From: 3, Ballot: Ballot{9, 3}, Slot: 1, Transfer: true, Released: b}); len(only(out, MsgPromise)) != 1 {
		t.Fatalf("its leader's successor is answered %+v", out)
	}
	if acks := hears(l, life2, 1); len(acks) != 1 || acks[0].Generation <= before {
		t.Errorf("beats are acked under %+v, want a generation above %d", acks, before)
	}
}

// TestAReleaseEndsRegistration is the same for a leader that steps down.
func TestAReleaseEndsRegistration(t *testing.T) {
	l, _ := beating(t)
	before := l.registers(Ballot{5, 2}, life2, 1)
	l.step(Message{Kind: MsgHeartbeat, From: 2, Ballot: Ballot{5, 2}, Transfer: true})
	if acks := hears(l, life2, 1); len(acks) != 1 || acks[0].Generation <= before {
		t.Errorf("beats are acked under %+v, want a generation above %d", acks, before)
	}
	if !promisesTo(l, Ballot{9, 3}) {
		t.Error("a lease that was released is granted anew by a beat")
	}
}

// TestAGrantOutlivesItsGeneration: what was granted while a generation lasted is
// honoured after its end, by those too that have not looked meanwhile.
func TestAGrantOutlivesItsGeneration(t *testing.T) {
	l, _ := beating(t)
	n := l.neighbour()
	b := Ballot{5, 2}
	l.registers(b, life2, 1)
	n.registers(b, life2, 1)
	for range 20 { // as many generations end as are remembered, and more
		l.now = l.now.Add(time.Second)
		n.now = l.now
		before := l.registers(b, life2, 1)
		n.registers(b, life2, 1)
		if acks := hears(l, life2, 1); len(acks) != 1 || acks[0].Generation != before {
			t.Fatalf("a beat is acked by %+v, want generation %d", acks, before)
		}
		l.step(Message{Kind: MsgHeartbeat, From: 2, Ballot: b, Transfer: true}) // it leaves
		b.Counter++
		l.step(heartbeat(2, b, 78))
		n.r.absorb()
	}
	l.registers(b, life2, 1)
	n.registers(b, life2, 1)
	l.now = l.now.Add(time.Second)
	n.now = l.now
	hears(l, life2, 1) // the leader counts on this
	l.step(Message{Kind: MsgHeartbeat, From: 2, Ballot: b, Transfer: true})
	n.now = n.now.Add(1499 * time.Millisecond)
	if promisesTo(n, Ballot{99, 3}) {
		t.Error("a lease that a beat granted is forgotten with its generation")
	}
	n.now = n.now.Add(time.Millisecond)
	if !promisesTo(n, Ballot{99, 3}) {
		t.Error("a lease is honoured for longer than it was granted")
	}
}

// TestWhatALeaderEndedIsPassedOver: a leadership that has ended at its leader is
// not renewed by the beats of that process, and nothing late brings it back.
func TestWhatALeaderEndedIsPassedOver(t *testing.T) {
	l, _ := beating(t)
	b := Ballot{5, 2}
	l.registers(b, life2, 1)
	if acks := hears(l, life2, 2); len(acks) != 1 {
		t.Fatalf("a beat of the next generation is acked by %+v", acks)
	}
	if acks := hears(l, life2, 1); len(acks) != 0 {
		t.Errorf("a beat of an older generation is acked by %+v", acks)
	}
	late := heartbeat(2, b, 76)
	late.Shared, late.Life, late.Generation = true, life2, 1
	if acks := only(l.step(late), MsgHeartbeatAck); len(acks) != 1 || acks[0].Shared {
		t.Errorf("a registration of an older generation is answered %+v", acks)
	}
	for range 3 {
		l.now = l.now.Add(500 * time.Millisecond)
		hears(l, life2, 2)
	}
	if !promisesTo(l, Ballot{9, 3}) {
		t.Error("the lease of a leadership that has ended is renewed by beats")
	}
}
