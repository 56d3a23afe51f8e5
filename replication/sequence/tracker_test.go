package sequence

import (
	"math"
	"testing"
	"time"

	"quorate/replication/entry"
)

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func ascending(last, log int64, called bool) State {
	return State{OID: 1, Schema: "public", Name: "s", Increment: 1, Min: 1, Max: math.MaxInt64, LastValue: last, LogCount: log, Called: called}
}

func sampleOf(at time.Duration, s State) Sample {
	return Sample{At: start.Add(at), States: []State{s}}
}

// settle proposes what the tracker needs for the sample, and has it chosen.
func settle(t *testing.T, tr *Tracker, s Sample) []entry.Mark {
	t.Helper()
	marks := tr.Need(s)
	tr.Chosen(marks)
	if !tr.Covered(s) {
		t.Fatalf("%+v is not covered by the marks it needed, %v", s.States, marks)
	}
	return marks
}

func TestReachCountsValuesHandedOutWithoutWAL(t *testing.T) {
	for _, tc := range []struct {
		name string
		s    State
		want int64
	}{
		{"never called", State{Increment: 1, Min: 1, Max: 100, LastValue: 1, LogCount: 0}, 1},
		{"ascending", State{Increment: 1, Min: 1, Max: 100, LastValue: 3, LogCount: 30, Called: true}, 33},
		{"steps", State{Increment: 10, Min: 1, Max: 1000, LastValue: 3, LogCount: 30, Called: true}, 303},
		{"at its bound", State{Increment: 10, Min: 1, Max: 100, LastValue: 93, LogCount: 30, Called: true}, 100},
		{"descending", State{Increment: -2, Min: -1000, Max: -1, LastValue: -5, LogCount: 30, Called: true}, -65},
		{"descending at its bound", State{Increment: -2, Min: -10, Max: -1, LastValue: -5, LogCount: 30, Called: true}, -10},
		{"end of the type", State{Increment: 1, Min: 1, Max: math.MaxInt64, LastValue: math.MaxInt64 - 3, LogCount: 32, Called: true}, math.MaxInt64},
		{"largest step", State{Increment: math.MinInt64, Min: math.MinInt64, Max: math.MaxInt64, LastValue: math.MaxInt64, LogCount: 32, Called: true}, math.MinInt64},
		{"whole range", State{Increment: math.MaxInt64, Min: math.MinInt64, Max: math.MaxInt64, LastValue: math.MinInt64, LogCount: 1, Called: true}, -1},
	} {
		if got := tc.s.reach(); got != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.want)
		}
	}
}

func TestMarksGoAheadOfASequence(t *testing.T) {
	tr := NewTracker()
	if marks := settle(t, tr, sampleOf(0, ascending(1, 0, false))); len(marks) != 0 {
		t.Fatalf("a sequence never used needs %v", marks)
	}
	s := sampleOf(0, ascending(1, 32, true))
	if tr.Covered(s) {
		t.Fatal("covered without a mark")
	}
	marks := settle(t, tr, s)
	if len(marks) != 1 || marks[0] != (entry.Mark{Schema: "public", Name: "s", Value: 33 + marginMin}) {
		t.Fatalf("%v", marks)
	}
	// Up to half the margin it needs nothing; then one more, of which nothing waits.
	if marks := tr.Need(sampleOf(time.Second, ascending(400, 32, true))); len(marks) != 0 {
		t.Fatalf("%v", marks)
	}
	s = sampleOf(time.Second, ascending(800, 32, true))
	marks = tr.Need(s)
	if len(marks) != 1 || marks[0].Value <= 33+marginMin || !tr.Covered(s) {
		t.Fatalf("%v, covered: %v", marks, tr.Covered(s))
	}
	if again := tr.Need(s); len(again) != 0 {
		t.Fatalf("asks again while a mark is on its way: %v", again)
	}
	// A jump beyond any margin waits until a mark of its own is chosen.
	s = sampleOf(2*time.Second, ascending(5_000_000, 32, true))
	tr.Chosen(marks)
	if tr.Covered(s) {
		t.Fatal("a jump is covered by an old mark")
	}
	lost := tr.Need(s)
	if again := tr.Need(s); len(again) != 1 || again[0].Value < lost[0].Value {
		t.Fatalf("a lost proposal is not repeated: %v, %v", lost, again)
	}
	settle(t, tr, s)
}

func TestMarginAdaptsWithinBounds(t *testing.T) {
	tr := NewTracker()
	last, at, proposals := int64(1), time.Duration(0), 0
	for range 2000 { // 100 000 values a second for 20 s
		if marks := settle(t, tr, sampleOf(at, ascending(last, 32, true))); len(marks) > 0 {
			proposals++
			if ahead := marks[0].Value - last - 32; ahead < marginMin || ahead > marginMax {
				t.Fatalf("margin of %d", ahead)
			}
		}
		last += 1000
		at += 10 * time.Millisecond
	}
	if proposals > 60 {
		t.Fatalf("%d marks for 2000 samples", proposals)
	}
	// Slow use brings it down again.
	for range 40 {
		at += 10 * time.Minute
		last += 2_000_000
		settle(t, tr, sampleOf(at, ascending(last, 32, true)))
	}
	at += 10 * time.Minute
	last += 2_000_000
	if marks := settle(t, tr, sampleOf(at, ascending(last, 32, true))); marks[0].Value != last+32+marginMin {
		t.Fatalf("margin of %d", marks[0].Value-last-32)
	}
}

func TestMarkGoesBackWithTheSequence(t *testing.T) {
	tr := NewTracker()
	settle(t, tr, sampleOf(0, ascending(50_000, 32, true)))
	late := []entry.Mark{{Schema: "public", Name: "s", Value: 90_000}}

	s := sampleOf(time.Second, ascending(10, 0, true)) // setval(10)
	marks := tr.Need(s)
	if len(marks) != 1 || marks[0].Value < 10 || marks[0].Value > 10+2*marginMin {
		t.Fatalf("%v", marks)
	}
	if tr.Chosen(late); tr.Covered(s) {
		t.Fatal("covered by a mark asked for before it went back")
	}
	tr.Chosen(marks)
	if !tr.Covered(s) {
		t.Fatal("not covered by its own mark")
	}

	s = sampleOf(2*time.Second, ascending(1, 0, false)) // RESTART
	if marks := settle(t, tr, s); len(marks) != 1 || marks[0].Value != 1 {
		t.Fatalf("%v", marks)
	}
	// CYCLE, descending.
	down := State{OID: 2, Schema: "public", Name: "d", Increment: -1, Min: -100_000, Max: -1, LastValue: -99_990, LogCount: 5, Called: true}
	settle(t, tr, sampleOf(3*time.Second, down))
	down.LastValue, down.LogCount = -1, 32
	if marks := settle(t, tr, sampleOf(4*time.Second, down)); len(marks) != 1 || marks[0].Value > -33 || marks[0].Value < -33-2*marginMin {
		t.Fatalf("%v", marks)
	}
}

func TestShortRangesAreNotUsedUpByMargins(t *testing.T) {
	tr := NewTracker()
	for last := int64(1); last <= 120; last++ {
		s := ascending(last, 0, true)
		s.Max = 120
		for _, m := range settle(t, tr, sampleOf(0, s)) {
			if m.Value > 120 || m.Value-last > (120-last)/roomShare {
				t.Fatalf("mark %d at %d of 120", m.Value, last)
			}
		}
	}
}

func TestAnotherSequenceOfTheSameNameNeedsItsOwnMark(t *testing.T) {
	tr := NewTracker()
	settle(t, tr, sampleOf(0, ascending(1000, 32, true)))
	other := ascending(5, 32, true)
	other.OID = 9
	if s := sampleOf(0, other); tr.Covered(s) || len(settle(t, tr, s)) != 1 {
		t.Fatal("covered by the dropped one's mark")
	}
	tr.Need(Sample{At: start})
	if len(tr.sequences) != 0 {
		t.Fatal("a dropped sequence is remembered")
	}
}

func TestMarkComesBackAfterALock(t *testing.T) {
	tr := NewTracker()
	settle(t, tr, sampleOf(0, ascending(100, 32, true)))
	bound := ascending(100+lockedSteps, 0, true)
	bound.Locked = true
	settle(t, tr, sampleOf(time.Second, bound))
	s := sampleOf(2*time.Second, ascending(101, 31, true))
	marks := tr.Need(s)
	if !tr.Covered(s) || len(marks) != 1 || marks[0].Value > 132+2*marginMin {
		t.Fatalf("%v", marks)
	}
	if again := tr.Need(s); len(again) != 0 {
		t.Fatalf("asks again while it is on its way: %v", again)
	}
}
