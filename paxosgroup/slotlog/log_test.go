package slotlog

import (
	"bytes"
	"fmt"
	"testing"

	"quorate/paxosgroup"
)

func open(t testing.TB, cfg Config) (*Log, map[paxosgroup.GroupID]paxosgroup.Restored) {
	t.Helper()
	l, restored, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, restored
}

func appendWait(t testing.TB, l *Log, g paxosgroup.GroupID, recs ...paxosgroup.Record) {
	t.Helper()
	done := make(chan error, 1)
	l.Append(g, recs, func(err error) { done <- err })
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func accept(slot paxosgroup.Slot, counter uint64, payload string) paxosgroup.Record {
	return paxosgroup.Record{
		Kind: paxosgroup.RecordAccept, Slot: slot, Ballot: paxosgroup.Ballot{Counter: counter, Replica: 1},
		Entry: paxosgroup.Entry{
			Kind: paxosgroup.KindData, Term: paxosgroup.Ballot{Counter: counter, Replica: 1}, Number: uint64(slot),
			Region: "r1", Incarnation: 7, Session: 1 << 40, Sequence: 300, Payload: []byte(payload),
		},
	}
}

func learn(slot paxosgroup.Slot, payload string) paxosgroup.Record {
	r := accept(slot, 1, payload)
	r.Kind, r.Ballot = paxosgroup.RecordLearn, paxosgroup.Ballot{}
	return r
}

func chosen(slot paxosgroup.Slot) paxosgroup.Record {
	return paxosgroup.Record{Kind: paxosgroup.RecordChosen, Slot: slot}
}

func payloads(t testing.TB, l *Log, g paxosgroup.GroupID, from, to paxosgroup.Slot) []string {
	t.Helper()
	entries, err := l.Group(g).Chosen(from, to, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for i, e := range entries {
		if e.Slot != from+paxosgroup.Slot(i) {
			t.Fatalf("entry %d has slot %d, want %d", i, e.Slot, from+paxosgroup.Slot(i))
		}
		out = append(out, string(e.Entry.Payload))
	}
	return out
}

func TestReopenGivesBackEverything(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), SegmentBytes: 16 << 10}
	l, restored := open(t, cfg)
	if len(restored) != 0 {
		t.Fatalf("new log restored %v", restored)
	}
	const groups, slots = 5, 200
	for s := paxosgroup.Slot(1); s <= slots; s++ {
		for g := paxosgroup.GroupID(1); g <= groups; g++ {
			l.Append(g, []paxosgroup.Record{accept(s, 3, fmt.Sprintf("g%d s%d %s", g, s, bytes.Repeat([]byte{'x'}, int(s))))}, func(err error) {
				if err != nil {
					t.Error(err)
				}
			})
		}
	}
	appendWait(t, l, 1, chosen(150), paxosgroup.Record{Kind: paxosgroup.RecordPromise, Ballot: paxosgroup.Ballot{Counter: 9, Replica: 2}})
	if got := l.Stats().Segments; got < 3 {
		t.Fatalf("%d segments, want several", got)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}

	l, restored = open(t, cfg)
	if len(restored) != groups {
		t.Fatalf("restored %d groups, want %d", len(restored), groups)
	}
	r := restored[1]
	if r.Chosen != 150 || r.Promised != (paxosgroup.Ballot{Counter: 9, Replica: 2}) || len(r.Accepted) != 50 || r.Accepted[0].Slot != 151 {
		t.Fatalf("restored chosen %d, promised %v, %d accepted", r.Chosen, r.Promised, len(r.Accepted))
	}
	if r := restored[2]; r.Chosen != 0 || len(r.Accepted) != slots || r.Promised.Counter != 3 {
		t.Fatalf("restored chosen %d, promised %v, %d accepted", r.Chosen, r.Promised, len(r.Accepted))
	}
	for g := paxosgroup.GroupID(1); g <= groups; g++ {
		got := payloads(t, l, g, 1, slots)
		if len(got) != slots {
			t.Fatalf("group %d: read %d slots, want %d", g, len(got), slots)
		}
		for i, p := range got {
			if want := fmt.Sprintf("g%d s%d %s", g, i+1, bytes.Repeat([]byte{'x'}, i+1)); p != want {
				t.Fatalf("group %d slot %d: %q, want %q", g, i+1, p, want)
			}
		}
	}
}
