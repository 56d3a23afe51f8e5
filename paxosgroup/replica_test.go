package paxosgroup

import (
	"errors"
	"slices"
	"testing"
	"time"
)

// lab is one replica whose peers are played by the test.
type lab struct {
	t       *testing.T
	r       *Replica
	now     Instant
	records []Record
	got     []Delivered
}

func (l *lab) Chosen(from, to Slot, maxBytes int) ([]SlotEntry, error) {
	var out []SlotEntry
	for s := from; s <= to; s++ {
		i := slices.IndexFunc(l.got, func(d Delivered) bool { return d.Slot == s })
		if i < 0 {
			return nil, errors.New("not stored")
		}
		out = append(out, SlotEntry{Slot: s, Entry: l.got[i].Entry})
	}
	return out, nil
}

func five() Membership {
	m := Membership{NextID: 6}
	for id := ReplicaID(1); id <= 5; id++ {
		m.Members = append(m.Members, Member{ID: id, Region: "r", Kind: Voter})
	}
	return m
}

func newLab(t *testing.T, id ReplicaID, restarted bool) *lab {
	t.Helper()
	l := &lab{t: t, now: Instant(time.Hour)}
	r, err := New(Config{Group: 1, ID: id, Region: "r", Seed: 7, RestartedWithState: restarted},
		Restored{Base: Base{Membership: five()}}, l, l.now)
	if err != nil {
		t.Fatal(err)
	}
	l.r = r
	return l
}

// held takes what is due and flushes nothing.
func (l *lab) held() (send, afterSync []Message, seq uint64) {
	for {
		rd, ok := l.r.Ready()
		if !ok {
			return send, afterSync, seq
		}
		send, afterSync, seq = append(send, rd.Send...), append(afterSync, rd.AfterSync...), rd.Seq
		l.records, l.got = append(l.records, rd.Persist...), append(l.got, rd.Delivered...)
	}
}

// settle flushes until nothing is due, and returns all that was sent.
func (l *lab) settle() (out []Message) {
	for {
		send, after, seq := l.held()
		if seq == 0 {
			return out
		}
		out = append(append(out, send...), after...)
		l.r.Persisted(l.now, seq)
	}
}

func (l *lab) step(m Message) []Message {
	l.t.Helper()
	m.To = l.r.cfg.ID
	if err := l.r.Step(l.now, m); err != nil {
		l.t.Fatal(err)
	}
	return l.settle()
}

func (l *lab) pass(d time.Duration) (out []Message) {
	for end := l.now.Add(d); l.now < end; {
		l.now = min(l.now.Add(10*time.Millisecond), end)
		l.r.Tick(l.now)
		out = append(out, l.settle()...)
	}
	return out
}

func only(msgs []Message, k MessageKind) []Message {
	return slices.DeleteFunc(slices.Clone(msgs), func(m Message) bool { return m.Kind != k })
}

// passUntil lets time pass until a message of a kind is sent.
func (l *lab) passUntil(k MessageKind) Message {
	l.t.Helper()
	for range 1000 {
		for _, m := range only(l.pass(10*time.Millisecond), k) {
			if k != MsgPreVote || m.Ballot == l.r.ballot { // else it measures only
				return m
			}
		}
	}
	l.t.Fatalf("no message of kind %d within 10 s", k)
	return Message{}
}

func data(term Ballot, number uint64, payload string) Entry {
	return Entry{Kind: KindData, Term: term, Number: number, Region: "r", Payload: []byte(payload)}
}

// prepare brings the replica to phase 1 and returns its ballot.
func (l *lab) prepare() Ballot {
	l.t.Helper()
	pv := l.passUntil(MsgPreVote)
	for id := ReplicaID(2); id <= 3; id++ {
		l.step(Message{Kind: MsgPreVoteReply, From: id, Ballot: pv.Ballot, Granted: true, SentAt: pv.SentAt})
	}
	if l.r.stage != preparing {
		l.t.Fatalf("stage %d after a quorum of pre-votes", l.r.stage)
	}
	return l.r.ballot
}

// lead makes replica 1 leader, its opening chosen and its lease held.
func (l *lab) lead() Ballot {
	l.t.Helper()
	b := l.prepare()
	l.step(Message{Kind: MsgPromise, From: 2, Ballot: b})
	l.step(Message{Kind: MsgPromise, From: 3, Ballot: b})
	for id := ReplicaID(2); id <= 3; id++ {
		l.step(Message{Kind: MsgAccepted, From: id, Ballot: b, Slots: []Slot{1}})
		l.step(Message{Kind: MsgHeartbeatAck, From: id, Ballot: b, SentAt: l.r.lead.heartbeatAt, Granted: true, Chosen: 1})
	}
	if s := l.r.Status(); s.Role != Leader || s.Chosen != 1 || s.Judge.Term != b {
		l.t.Fatalf("not leading: %+v", s)
	}
	return b
}

func heartbeat(from ReplicaID, b Ballot, at Instant) Message {
	return Message{Kind: MsgHeartbeat, From: from, Ballot: b, SentAt: at}
}

func TestLeaseIsHonouredFromReceipt(t *testing.T) {
	b := Ballot{5, 2}
	prepare := Message{Kind: MsgPrepare, From: 3, Ballot: Ballot{9, 3}, Slot: 1}
	tests := []struct {
		name  string
		after time.Duration
		alter func(*Message)
		want  MessageKind
	}{
		{"just before it ends", 1499 * time.Millisecond, func(*Message) {}, MsgReject},
		{"when it has ended", 1500 * time.Millisecond, func(*Message) {}, MsgPromise},
		{"its own holder campaigns", 0, func(m *Message) { m.From, m.Ballot = 2, Ballot{9, 2} }, MsgPromise},
		{"handed over by its holder", 0, func(m *Message) { m.Transfer, m.Released = true, b }, MsgPromise},
		{"handed over by an earlier leadership", 0, func(m *Message) { m.Transfer, m.Released = true, Ballot{4, 2} }, MsgReject},
		{"claims a transfer without a name", 0, func(m *Message) { m.Transfer = true }, MsgReject},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t, 1, false)
			l.step(heartbeat(2, b, 77))
			l.now = l.now.Add(tc.after)
			m := prepare
			tc.alter(&m)
			if out := l.step(m); len(only(out, tc.want)) != 1 {
				t.Errorf("answers %+v, want kind %d", out, tc.want)
			}
		})
	}
}

func TestReleaseFreesOnlyItsOwnLease(t *testing.T) {
	l := newLab(t, 1, false)
	l.step(heartbeat(2, Ballot{5, 2}, 77))
	l.step(Message{Kind: MsgHeartbeat, From: 2, Ballot: Ballot{4, 2}, Transfer: true})
	prepare := Message{Kind: MsgPrepare, From: 3, Ballot: Ballot{9, 3}, Slot: 1}
	if out := l.step(prepare); len(only(out, MsgReject)) != 1 {
		t.Errorf("an older leadership's release freed the lease: %+v", out)
	}
	l.step(Message{Kind: MsgHeartbeat, From: 2, Ballot: Ballot{5, 2}, Transfer: true})
	if out := l.step(prepare); len(only(out, MsgPromise)) != 1 {
		t.Errorf("a released lease is still honoured: %+v", out)
	}
}

func TestRestartedGrantorWaitsOneLease(t *testing.T) {
	l := newLab(t, 1, true)
	l.now = l.now.Add(1499 * time.Millisecond)
	if out := l.step(Message{Kind: MsgPrepare, From: 3, Ballot: Ballot{9, 3}, Slot: 1}); len(only(out, MsgReject)) != 1 {
		t.Errorf("a restarted replica answers %+v", out)
	}
	pv := Message{Kind: MsgPreVote, From: 3, Ballot: Ballot{9, 3}, SentAt: 5}
	if out := only(l.step(pv), MsgPreVoteReply); len(out) != 1 || out[0].Granted {
		t.Errorf("a restarted replica answers a pre-vote with %+v", out)
	}
	l.now = l.now.Add(time.Millisecond)
	if out := l.step(Message{Kind: MsgPrepare, From: 3, Ballot: Ballot{9, 3}, Slot: 1}); len(only(out, MsgPromise)) != 1 {
		t.Errorf("after a lease it answers %+v", out)
	}
}

func TestLeaderCountsItsLeaseFromSending(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	sent := l.r.lead.heartbeatAt
	l.now = l.now.Add(90 * time.Millisecond)
	for _, id := range []ReplicaID{2, 3, 4} { // late echoes of the same heartbeat
		l.step(Message{Kind: MsgHeartbeatAck, From: id, Ballot: b, SentAt: sent, Granted: true})
	}
	want := sent.Add(1500*time.Millisecond - 3*time.Millisecond - 1) // 1000 ppm of each clock
	if got := l.r.Status().LeaseUntil; got != want {
		t.Errorf("lease until %d, want %d", got-sent, want-sent)
	}
}

func TestTwoGrantsOfFiveAreNoLease(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	l.pass(1600 * time.Millisecond)
	l.step(Message{Kind: MsgHeartbeatAck, From: 2, Ballot: b, SentAt: l.now, Granted: true})
	if got := l.r.Status().LeaseUntil; got != 0 {
		t.Errorf("the grants of the leader and one other are a lease until %d", got)
	}
}

func TestNothingIsSentAtABallotBeforeItsPromiseIsFlushed(t *testing.T) {
	l := newLab(t, 1, false)
	pv := l.passUntil(MsgPreVote)
	for id := ReplicaID(2); id <= 3; id++ {
		if err := l.r.Step(l.now, Message{Kind: MsgPreVoteReply, From: id, To: 1, Ballot: pv.Ballot, Granted: true, SentAt: pv.SentAt}); err != nil {
			t.Fatal(err)
		}
	}
	send, after, seq := l.held()
	if len(send) != 0 || len(only(after, MsgPrepare)) != 4 {
		t.Errorf("sends %+v, and after the flush %+v; want Prepare to four, all after", send, after)
	}
	for id := ReplicaID(2); id <= 3; id++ { // a repeated ballot, say, was answered sooner
		if err := l.r.Step(l.now, Message{Kind: MsgPromise, From: id, To: 1, Ballot: pv.Ballot}); err != nil {
			t.Fatal(err)
		}
	}
	if l.r.stage != preparing {
		t.Error("the own promise counts before it is flushed")
	}
	l.r.Persisted(l.now, seq)
	if l.r.stage != proposing {
		t.Error("three flushed promises of five do not end phase 1")
	}
}

func TestOwnAcceptanceCountsWhenFlushed(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	if _, _, err := l.r.Propose(l.now, []byte("x")); err != nil {
		t.Fatal(err)
	}
	send, _, seq := l.held()
	if len(only(send, MsgAccept)) != 4 {
		t.Fatalf("sends %+v before its own flush, want Accept to four", send)
	}
	for id := ReplicaID(2); id <= 3; id++ {
		if err := l.r.Step(l.now, Message{Kind: MsgAccepted, From: id, To: 1, Ballot: b, Slots: []Slot{2}}); err != nil {
			t.Fatal(err)
		}
	}
	if l.r.chosen != 1 {
		t.Fatal("chosen with two flushed copies and one that is not")
	}
	l.r.Persisted(l.now, seq)
	if l.r.chosen != 2 {
		t.Fatal("not chosen with three flushed copies")
	}
}

func TestRecoveryTakesTheHighestBallot(t *testing.T) {
	for _, order := range [][]int{{0, 1}, {1, 0}} {
		l := newLab(t, 1, false)
		l.r.highest = Ballot{5, 5}
		b := l.prepare()
		old, young := data(Ballot{1, 4}, 1, "old"), data(Ballot{1, 5}, 1, "young")
		promises := []Message{
			{Kind: MsgPromise, From: 2, Ballot: b, Accepted: []AcceptedEntry{{Slot: 2, Ballot: Ballot{1, 4}, Entry: old}}},
			{Kind: MsgPromise, From: 3, Ballot: b, Accepted: []AcceptedEntry{{Slot: 2, Ballot: Ballot{1, 5}, Entry: young}}},
		}
		var out []Message
		for _, i := range order {
			out = append(out, l.step(promises[i])...)
		}
		acc := only(out, MsgAccept)
		if len(acc) == 0 || len(acc[0].Entries) != 3 {
			t.Fatalf("proposes %+v, want gap, inherited, opening", acc)
		}
		e := acc[0].Entries
		if e[0].Entry.Kind != KindNoOp || string(e[1].Entry.Payload) != "young" || e[1].Entry.Term != young.Term || e[2].Entry.Kind != KindOpening {
			t.Errorf("proposes %+v", e)
		}
	}
}

func TestFollowerLearnsOnlyWhatItAcceptedAtTheLeadersBallot(t *testing.T) {
	l := newLab(t, 1, false)
	old := Ballot{5, 2}
	l.step(Message{Kind: MsgAccept, From: 2, Ballot: old, Entries: []SlotEntry{{1, data(old, 1, "old")}}})
	out := l.step(Message{Kind: MsgHeartbeat, From: 3, Ballot: Ballot{6, 3}, Chosen: 1})
	if l.r.chosen != 0 {
		t.Fatal("an older leader's entry was taken for the chosen one")
	}
	if f := only(out, MsgFetch); len(f) != 1 || f[0].Slot != 1 || f[0].To != 3 {
		t.Fatalf("sends %+v, want a fetch of slot 1 from replica 3", out)
	}
	l.step(Message{Kind: MsgLearn, From: 3, Slot: 1, Chosen: 1, Entries: []SlotEntry{{1, data(Ballot{6, 3}, 1, "new")}}})
	if len(l.got) != 1 || string(l.got[0].Entry.Payload) != "new" {
		t.Errorf("delivered %+v", l.got)
	}
}

// A leader that learns of another's entry in its slot was deposed: announcing
// the slot as chosen would make followers take its own entry there.
func TestLearningAnothersEntryDeposes(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	if _, _, err := l.r.Propose(l.now, []byte("mine")); err != nil {
		t.Fatal(err)
	}
	l.settle()
	out := l.step(Message{Kind: MsgLearn, From: 2, Slot: 2, Chosen: 2, Entries: []SlotEntry{{2, data(Ballot{9, 2}, 1, "theirs")}}})
	out = append(out, l.pass(50*time.Millisecond)...)
	if l.r.role != Follower {
		t.Fatal("still leads")
	}
	for _, m := range out {
		if m.Ballot == b && m.Chosen > 1 {
			t.Errorf("announces slot %d as chosen at its old ballot: %+v", m.Chosen, m)
		}
	}
}

func TestChosenIsToldSoonWhenNothingFollows(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	if _, _, err := l.r.Propose(l.now, []byte("x")); err != nil {
		t.Fatal(err)
	}
	l.settle()
	l.step(Message{Kind: MsgAccepted, From: 2, Ballot: b, Slots: []Slot{2}})
	l.step(Message{Kind: MsgAccepted, From: 3, Ballot: b, Slots: []Slot{2}})
	if due := l.r.NextDeadline(); due > l.now.Add(hedgeDelay) {
		t.Errorf("nothing is due for %v", due.Sub(l.now))
	}
	out := only(l.pass(hedgeDelay), MsgHeartbeat)
	if len(out) != 4 || out[0].Chosen != 2 || out[0].SentAt != 0 {
		t.Errorf("sends %+v, want the chosen slot to four, and no request for a lease", out)
	}
}

func TestWindowBoundsSlotsAndBytes(t *testing.T) {
	l := newLab(t, 1, false)
	l.lead()
	n := 0
	for ; ; n++ {
		if _, _, err := l.r.Propose(l.now, []byte("x")); err != nil {
			if !errors.Is(err, ErrWindowFull) {
				t.Fatal(err)
			}
			break
		}
	}
	if n != 8192 {
		t.Errorf("%d slots were taken, want 8192", n)
	}
	l = newLab(t, 1, false)
	l.lead()
	if _, _, err := l.r.Propose(l.now, make([]byte, 20<<20)); err != nil {
		t.Errorf("an entry larger than the window, alone: %v", err)
	}
	if _, _, err := l.r.Propose(l.now, []byte("x")); !errors.Is(err, ErrWindowFull) {
		t.Errorf("behind it: %v", err)
	}
}

func TestPreVoteRefusals(t *testing.T) {
	ask := Message{Kind: MsgPreVote, From: 3, Ballot: Ballot{9, 3}, SentAt: 5}
	tests := []struct {
		name  string
		setup func(l *lab, m *Message)
		want  bool
	}{
		{"nothing stands in the way", func(*lab, *Message) {}, true},
		{"its ballot is not above the promised one", func(l *lab, m *Message) {
			l.step(Message{Kind: MsgPrepare, From: 3, Ballot: Ballot{9, 3}, Slot: 1})
		}, false},
		{"a leader was heard just now", func(l *lab, m *Message) {
			l.step(Message{Kind: MsgHeartbeat, From: 2, Ballot: Ballot{5, 2}})
		}, false},
		{"a lease is honoured, the leader not heard for long", func(l *lab, m *Message) {
			l.step(heartbeat(2, Ballot{5, 2}, 7))
			l.now = l.now.Add(time.Second)
		}, false},
		{"it was removed and does not know", func(l *lab, m *Message) { m.From, m.Ballot.Replica = 9, 9 }, false},
		{"it was added and knows more", func(l *lab, m *Message) { m.From, m.Ballot.Replica, m.Chosen = 9, 9, 4 }, true},
		{"its database is far behind this one's", func(l *lab, m *Message) {
			l.step(Message{Kind: MsgHeartbeat, From: 2, Ballot: Ballot{5, 2}})
			l.r.SetApplied(5000)
			l.now = l.now.Add(500 * time.Millisecond)
		}, false},
		{"so it is, but nobody else came", func(l *lab, m *Message) {
			l.step(Message{Kind: MsgHeartbeat, From: 2, Ballot: Ballot{5, 2}})
			l.r.SetApplied(5000)
			l.now = l.now.Add(1100 * time.Millisecond)
		}, true},
		{"far behind one that cannot lead", func(l *lab, m *Message) {
			l.step(Message{Kind: MsgHeartbeat, From: 2, Ballot: Ballot{5, 2}})
			l.r.SetApplied(5000)
			l.r.SetElectable(false)
			l.now = l.now.Add(500 * time.Millisecond)
		}, true},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t, 1, false)
			m := ask
			tc.setup(l, &m)
			out := only(l.step(m), MsgPreVoteReply)
			if len(out) != 1 || out[0].Granted != tc.want || out[0].SentAt != 5 {
				t.Errorf("answers %+v, want granted %v", out, tc.want)
			}
		})
	}
}

func TestStepRefusesBadInput(t *testing.T) {
	e := data(Ballot{1, 2}, 1, "")
	for name, m := range map[string]Message{
		"unknown kind":        {Kind: 99, From: 2, To: 1},
		"from itself":         {Kind: MsgFetch, From: 1, To: 1},
		"for another":         {Kind: MsgFetch, From: 2, To: 3},
		"another's ballot":    {Kind: MsgHeartbeat, From: 2, To: 1, Ballot: Ballot{1, 3}},
		"no ballot":           {Kind: MsgPrepare, From: 2, To: 1},
		"slot zero":           {Kind: MsgAccept, From: 2, To: 1, Ballot: Ballot{1, 2}, Entries: []SlotEntry{{0, e}}},
		"slots out of order":  {Kind: MsgLearn, From: 2, To: 1, Entries: []SlotEntry{{2, e}, {1, e}}},
		"unknown entry":       {Kind: MsgLearn, From: 2, To: 1, Entries: []SlotEntry{{1, Entry{Kind: 7}}}},
		"accepted at nothing": {Kind: MsgPromise, From: 2, To: 1, Accepted: []AcceptedEntry{{Slot: 1, Entry: e}}},
	} {
		l := newLab(t, 1, false)
		if err := l.r.Step(l.now, m); !errors.Is(err, ErrMessage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
