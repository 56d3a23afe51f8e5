package paxosgroup

import (
	"testing"
	"time"
)

func TestInvariantSaysWhatBroke(t *testing.T) {
	defer func() {
		want := "paxosgroup: broken invariant: slot 7 at 3.2 by 2 in 5ms of 9 1:1, 100%"
		if got := recover(); got != want {
			t.Errorf("panics with %q, want %q", got, want)
		}
	}()
	m := Membership{Members: []Member{{ID: 1, Kind: Voter}}}
	invariant(false, "slot %d at %v by %d in %v of %d %+v, 100%", Slot(7), Ballot{3, 2}, ReplicaID(2), 5*time.Millisecond, 9, m)
}

func TestInvariantThatHoldsAllocatesNothing(t *testing.T) {
	s, b := Slot(1<<40), Ballot{1 << 40, 1 << 20}
	if n := testing.AllocsPerRun(100, func() {
		s++
		invariant(b.Less(Ballot{1 << 50, 1}), "slot %d at %v", s, b)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
