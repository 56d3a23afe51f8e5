package paxosgroup

import "testing"

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

// A replica that is behind every peer's log asks for an image, and one that is
// behind some fetches from the others.
func TestSnapshotOnlyIfNobodyHasTheEntries(t *testing.T) {
	l := newLab(t, 1, false)
	l.step(Message{Kind: MsgHeartbeat, From: 2, Ballot: Ballot{5, 2}, Chosen: 9})
	asked := map[ReplicaID]bool{}
	to := ReplicaID(2)
	for range 4 {
		if asked[to] {
			t.Fatalf("replica %d is asked twice, others never: %v", to, asked)
		}
		asked[to] = true
		if err := l.r.Step(l.now, Message{Kind: MsgNeedSnapshot, From: to, To: 1, Slot: 8}); err != nil {
			t.Fatal(err)
		}
		rd, _ := l.r.Ready()
		if rd.Snapshot != (len(asked) == 4) {
			t.Errorf("snapshot %v after %d of 4 had nothing", rd.Snapshot, len(asked))
		}
		if f := only(rd.Send, MsgFetch); len(f) == 1 {
			to = f[0].To
		}
	}
}
