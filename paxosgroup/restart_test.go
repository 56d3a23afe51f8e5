package paxosgroup

import (
	"testing"
	"time"
)

func TestRestartKeepsPromiseAndWhatIsAbove(t *testing.T) {
	l := newLab(t, 1, false)
	b := Ballot{5, 2}
	l.step(Message{Kind: MsgAccept, From: 2, Ballot: b, Entries: []SlotEntry{{7, data(b, 7, "below")}, {12, data(b, 12, "above")}}})
	l.records = nil
	base := Base{Slot: 10, Judge: Judge{Term: b, Next: 11}, Membership: five()}
	l.r.Restart(l.now, base)
	l.settle()
	if len(l.records) != 3 || l.records[0].Kind != RecordBase || l.records[0].Base.Slot != 10 ||
		l.records[1].Kind != RecordPromise || l.records[1].Ballot != b ||
		l.records[2].Kind != RecordAccept || l.records[2].Slot != 12 || l.records[2].Ballot != b {
		t.Errorf("persists %+v", l.records)
	}
	l.step(Message{Kind: MsgAccept, From: 2, Ballot: b, Chosen: 12, Entries: []SlotEntry{{11, data(b, 11, "next")}}})
	if len(l.got) != 2 || l.got[0].Slot != 11 || l.got[0].Verdict != Effective || l.got[1].Verdict != Effective {
		t.Errorf("delivered %+v; want 11 and 12, effective by the judge of the image", l.got)
	}
	if s := l.r.Status(); s.Base != 10 || s.Promised != b {
		t.Errorf("%+v", s)
	}
	// An older image changes nothing.
	l.records = nil
	l.r.Restart(l.now, Base{Slot: 11, Membership: five()})
	l.settle()
	if len(l.records) != 0 || l.r.Status().Base != 10 {
		t.Errorf("an image that the log already covers persists %+v", l.records)
	}
}

// fetchRounds plays a replica that fetches slot 1 until a snapshot is wanted or
// some rounds have passed, and reports whether it is. Each peer answers by its
// turn, or not at all.
func fetchRounds(t *testing.T, l *lab, rounds int, answer func(peer ReplicaID, round int) *Message) bool {
	t.Helper()
	asked := map[ReplicaID]int{}
	for range 200 * rounds {
		rd, _ := l.r.Ready()
		if rd.Snapshot {
			return true
		}
		for _, f := range only(rd.Send, MsgFetch) {
			asked[f.To]++
			if asked[f.To] > rounds {
				return false
			}
			if m := answer(f.To, asked[f.To]); m != nil {
				m.From, m.To = f.To, 1
				if err := l.r.Step(l.now, *m); err != nil {
					t.Fatal(err)
				}
			}
		}
		l.now = l.now.Add(20 * time.Millisecond)
		l.r.Tick(l.now)
	}
	t.Fatalf("asked %v times, and neither gave up nor went on", asked)
	return false
}

func TestSnapshotOnlyIfNobodyCanServe(t *testing.T) {
	needs := func(base Slot) *Message { return &Message{Kind: MsgNeedSnapshot, Slot: base} }
	lacks := &Message{Kind: MsgLearn, Slot: 1}
	for _, tc := range []struct {
		name   string
		answer func(peer ReplicaID, round int) *Message
		want   bool
	}{
		{"below the base of all", func(ReplicaID, int) *Message { return needs(8) }, true},
		{"below one base, the rest have not learned it either", func(p ReplicaID, _ int) *Message {
			if p == 2 {
				return needs(8)
			}
			return lacks
		}, true},
		{"below one base, the rest are gone", func(p ReplicaID, _ int) *Message {
			if p == 2 {
				return needs(8)
			}
			return nil
		}, true},
		{"nobody has it, and nobody has cut it", func(ReplicaID, int) *Message { return lacks }, false},
		{"they cannot read their logs", func(ReplicaID, int) *Message { return needs(0) }, false},
		{"all are gone", func(ReplicaID, int) *Message { return nil }, false},
		{"one is there and its answer is lost", func(p ReplicaID, _ int) *Message {
			if p == 3 {
				return &Message{Kind: MsgReject, Ballot: Ballot{1, 5}}
			}
			return needs(8)
		}, false},
		{"the second look finds otherwise", func(p ReplicaID, round int) *Message {
			if p == 3 && round%2 == 0 {
				return &Message{Kind: MsgReject, Ballot: Ballot{1, 5}}
			}
			return needs(8)
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t, 1, false)
			l.r.SetElectable(false)
			if err := l.r.Step(l.now, Message{Kind: MsgHeartbeat, From: 2, To: 1, Ballot: Ballot{5, 2}, Chosen: 9}); err != nil {
				t.Fatal(err)
			}
			if got := fetchRounds(t, l, 5, func(p ReplicaID, round int) *Message {
				l.now = l.now.Add(time.Millisecond) // it takes a little
				return tc.answer(p, round)
			}); got != tc.want {
				t.Errorf("an image is wanted: %v", got)
			}
		})
	}
}

// A candidate whose promises tell of a prefix that nobody has as entries any more
// gives up and leaves it to others, until it has an image.
func TestCandidateBehindEveryBaseGivesUp(t *testing.T) {
	l := newLab(t, 1, false)
	serve := func() *Message { return &Message{Kind: MsgNeedSnapshot, Slot: 8} }
	prepared := 0
	snapshot := false
	for range 2000 {
		l.now = l.now.Add(10 * time.Millisecond)
		l.r.Tick(l.now)
		rd, ok := l.r.Ready()
		if !ok {
			continue
		}
		l.r.Persisted(l.now, rd.Seq)
		if snapshot = snapshot || rd.Snapshot; rd.Snapshot {
			prepared = 0 // from now on it has to be quiet
		}
		for _, m := range append(rd.Send, rd.AfterSync...) {
			out := Message{From: m.To, To: 1, Ballot: m.Ballot, SentAt: m.SentAt, Chosen: 9}
			switch m.Kind {
			case MsgPreVote:
				out.Kind, out.Granted = MsgPreVoteReply, true
			case MsgPrepare:
				prepared++
				out.Kind = MsgPromise
			case MsgFetch:
				out = *serve()
				out.From, out.To = m.To, 1
			default:
				continue
			}
			if err := l.r.Step(l.now, out); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !snapshot || prepared > 4 || l.r.Status().Role == Leader {
		t.Fatalf("snapshot wanted: %v; %d Prepares sent after that; %v", snapshot, prepared, l.r.Status().Role)
	}
	l.r.Restart(l.now, Base{Slot: 9, Membership: five()})
	l.settle()
	for range 1000 {
		l.now = l.now.Add(10 * time.Millisecond)
		l.r.Tick(l.now)
		for _, m := range l.settle() {
			out := Message{From: m.To, To: 1, Ballot: m.Ballot, SentAt: m.SentAt, Chosen: 9}
			switch m.Kind {
			case MsgPreVote:
				out.Kind, out.Granted = MsgPreVoteReply, true
			case MsgPrepare:
				out.Kind = MsgPromise
			default:
				continue
			}
			if err := l.r.Step(l.now, out); err != nil {
				t.Fatal(err)
			}
		}
		if l.r.Status().Role == Leader {
			return
		}
	}
	t.Errorf("with the image it never leads")
}

func TestTruncate(t *testing.T) {
	l := newLab(t, 1, false)
	b := Ballot{5, 2}
	l.step(Message{Kind: MsgAccept, From: 2, Ballot: b, Chosen: 2, Entries: []SlotEntry{
		{1, Entry{Kind: KindOpening, Term: b}}, {2, data(b, 1, "x")}, {3, data(b, 2, "y")}}})
	base := Base{Slot: 1, Judge: Judge{Term: b, Next: 1}, Membership: five()}
	l.records = nil
	l.r.Truncate(l.now, Base{Slot: 3, Membership: five()}) // above what is chosen
	if l.settle(); len(l.records) != 0 {
		t.Errorf("cut above the chosen prefix: %+v", l.records)
	}
	l.r.Truncate(l.now, base)
	l.settle()
	if len(l.records) != 1 || l.records[0].Kind != RecordBase || l.records[0].Base.Slot != 1 {
		t.Errorf("persists %+v", l.records)
	}
	if s := l.r.Status(); s.Base != 1 || s.Chosen != 2 || s.Promised != b || s.Judge.Next != 2 {
		t.Errorf("%+v", s)
	}
	if out := only(l.step(Message{Kind: MsgFetch, From: 3, Slot: 1}), MsgNeedSnapshot); len(out) != 1 || out[0].Slot != 1 {
		t.Errorf("a fetch below the base is answered %+v", out)
	}
	if out := only(l.step(Message{Kind: MsgFetch, From: 3, Slot: 2}), MsgLearn); len(out) != 1 || len(out[0].Entries) != 1 {
		t.Errorf("a fetch above the base is answered %+v", out)
	}
}
