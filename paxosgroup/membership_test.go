package paxosgroup

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

func TestQuorumsMustIntersect(t *testing.T) {
	tests := []struct {
		name           string
		voters         int
		phase1, phase2 int
		want1, want2   int
		fault          string
	}{
		{"five regions survive two losses", 5, 0, 0, 3, 3, ""},
		{"seven regions survive three", 7, 0, 0, 4, 4, ""},
		{"four, as half way through a change", 4, 0, 0, 3, 3, ""},
		{"commit at the nearest region, elect with four", 5, 4, 2, 4, 2, ""},
		{"phase 1 left to be a majority", 5, 0, 4, 3, 4, ""},
		{"two quorums side by side", 5, 3, 2, 0, 0, "do not intersect"},
		{"more than there are", 3, 4, 3, 0, 0, "not within"},
		{"less than none", 3, -1, 3, 0, 0, "not within"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			m := Membership{Phase1: tc.phase1, Phase2: tc.phase2, NextID: 99}
			for i := range tc.voters {
				m.Members = append(m.Members, Member{ID: ReplicaID(i + 1), Kind: Voter})
			}
			m.Members = append(m.Members, Member{ID: 50, Kind: Learner}) // never counted
			err := m.Validate()
			if tc.fault != "" {
				if err == nil || !strings.Contains(err.Error(), tc.fault) {
					t.Fatalf("validates with %v, want %q", err, tc.fault)
				}
				return
			}
			if p1, p2 := m.Quorums(); err != nil || p1 != tc.want1 || p2 != tc.want2 {
				t.Errorf("quorums %d and %d, %v; want %d and %d", p1, p2, err, tc.want1, tc.want2)
			}
		})
	}
}

// A change that a dead leader left in its slot is chosen after all, when another
// change has been made meanwhile: it must not be undone.
func TestStaleChangeTakesNoEffect(t *testing.T) {
	now := five()
	now.Epoch = 3
	next := five()
	for epoch, want := range map[uint64]bool{2: false, 3: false, 4: true, 5: false} {
		next.Epoch = epoch
		if _, ok := now.Next(Entry{Kind: KindConfig, Payload: EncodeMembership(next)}); ok != want {
			t.Errorf("a change made for epoch %d takes: %v", epoch, ok)
		}
	}
	if _, ok := now.Next(Entry{Kind: KindConfig, Payload: []byte("nonsense")}); ok {
		t.Error("nonsense takes")
	}
}

// One that was started without a membership follows the changes in the log, of
// which the first was made for the membership that it does not know.
func TestAMembershipIsLearnedFromTheFirstChange(t *testing.T) {
	first := five()
	out := first.Incoming()
	joint := voters(7, 1, 2, 6)
	joint.Epoch, joint.Outgoing = 1, &out
	last := voters(7, 1, 2, 6)
	last.Epoch = 2
	known, unknown := first, Membership{}
	for _, next := range []Membership{last, joint, joint, last} {
		e := Entry{Kind: KindConfig, Payload: EncodeMembership(next)}
		var took, takes bool
		known, took = known.Next(e)
		unknown, takes = unknown.Next(e)
		if took != takes {
			t.Errorf("the change to epoch %d takes %v, and %v where nothing is known", next.Epoch, took, takes)
		}
	}
	if !reflect.DeepEqual(known, unknown) || unknown.Epoch != 2 {
		t.Errorf("learned %+v, want %+v", unknown, known)
	}
}

func TestMembershipEncodingRoundTrips(t *testing.T) {
	m := five()
	m.Epoch, m.Phase1, m.Phase2 = 1<<40, 4, 2
	m.Members[2].Kind, m.Members[3].Kind = Witness, Learner
	got, err := DecodeMembership(EncodeMembership(m))
	if err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzDecodeMembership(f *testing.F) {
	f.Add(EncodeMembership(five()))
	f.Add([]byte{1, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeMembership(b)
		if err == nil && !bytes.Equal(EncodeMembership(m), b) {
			t.Fatalf("re-encoded %x, want %x", EncodeMembership(m), b)
		}
	})
}
