package sequence

import (
	"time"

	"quorate/replication/entry"
)

// How far ahead marks are logged, in steps of the sequence. A failover skips at
// most that many values, besides those PostgreSQL itself skips.
const (
	marginMin = 1 << 10
	marginMax = 1 << 20

	// A mark that is asked for again sooner than marginSoon doubles the margin,
	// later than marginLate halves it.
	marginSoon = time.Second
	marginLate = time.Minute

	// A sequence with bounds keeps at least 15/16 of what is left of its range.
	roomShare = 16
)

// Tracker knows the chosen marks of this database's own term and says which
// must be chosen next. It is not safe for concurrent use. A new term starts with
// a new Tracker: it asks for a mark of each sequence that was used.
type Tracker struct {
	sequences map[name]*tracked
}

type name struct{ schema, name string }

type tracked struct {
	oid    uint32
	margin uint64    // steps
	asked  time.Time // when a mark was last asked for

	chosen      int64
	hasChosen   bool
	proposed    int64
	hasProposed bool

	seen    int64 // reach at the last reading
	hasSeen bool
	reset   bool // the sequence went back: only the mark proposed since covers it
}

// NewTracker returns a Tracker that knows of no marks.
func NewTracker() *Tracker { return &Tracker{sequences: make(map[name]*tracked)} }

// Need returns the marks to be proposed for the sample: those without which it
// is not Covered, and those that will be needed soon. Samples must be given in
// the order they were taken. It may be asked again if a proposal came to nothing.
func (t *Tracker) Need(sample Sample) []entry.Mark {
	var marks []entry.Mark
	present := make(map[name]bool, len(sample.States))
	for i := range sample.States {
		s := &sample.States[i]
		key := name{s.Schema, s.Name}
		present[key] = true
		if value, ok := t.of(key, s).need(s, sample.At); ok {
			marks = append(marks, entry.Mark{Schema: s.Schema, Name: s.Name, Value: value})
		}
	}
	for key := range t.sequences {
		if !present[key] {
			delete(t.sequences, key)
		}
	}
	return marks
}

func (t *Tracker) of(key name, s *State) *tracked {
	e := t.sequences[key]
	if e == nil || e.oid != s.OID && e.oid != 0 {
		e = &tracked{margin: marginMin} // new, or another one of that name
		t.sequences[key] = e
	}
	e.oid = s.OID
	return e
}

func (e *tracked) need(s *State, at time.Time) (int64, bool) {
	reach := s.reach()
	if !s.Locked {
		// setval, RESTART or CYCLE took it back: the mark must go back as well,
		// or a failover would undo what was acknowledged.
		if e.hasSeen && s.beyond(e.seen, reach) {
			e.reset, e.hasChosen, e.hasProposed = true, false, false
		}
		e.seen, e.hasSeen = reach, true
		// While the sequence was locked, its mark was put far ahead; unless a
		// nearer one is on its way, ask for it, though this one covers all.
		const steps = 4 * marginMax
		onItsWay := e.hasProposed && e.proposed != e.chosen
		if e.hasChosen && !onItsWay && s.distance(e.chosen, reach)/max(s.stride(), 1) > steps {
			return e.ask(s, reach, at), true
		}
	}
	if !s.Called && !e.reset {
		return 0, false // nothing was handed out; the first value writes WAL
	}
	if !e.covers(s) {
		return e.ask(s, reach, at), true
	}
	// More than half used up, and no farther mark on its way.
	soon := s.ahead(reach, e.steps(s, reach)/2)
	if s.beyond(soon, e.chosen) && !(e.hasProposed && s.beyond(e.proposed, soon)) {
		return e.ask(s, reach, at), true
	}
	return 0, false
}

// ask decides on the next mark.
func (e *tracked) ask(s *State, reach int64, at time.Time) int64 {
	if !e.asked.IsZero() {
		switch since := at.Sub(e.asked); {
		case since < marginSoon:
			e.margin = min(2*e.margin, marginMax)
		case since > marginLate:
			e.margin = max(e.margin/2, marginMin)
		}
	}
	e.asked = at
	if s.Called {
		reach = s.ahead(reach, e.steps(s, reach))
	}
	e.proposed, e.hasProposed = reach, true
	return reach
}

// steps is the margin, less where little is left of the range.
func (e *tracked) steps(s *State, reach int64) uint64 {
	return min(e.margin, s.room(reach)/max(s.stride(), 1)/roomShare)
}

func (e *tracked) covers(s *State) bool {
	if e.reset {
		return false
	}
	return !s.Called || e.hasChosen && !s.beyond(s.reach(), e.chosen)
}

// Chosen takes note of marks of this database's own term that are effective.
func (t *Tracker) Chosen(marks []entry.Mark) {
	for _, m := range marks {
		key := name{m.Schema, m.Name}
		e := t.sequences[key]
		if e == nil {
			e = &tracked{margin: marginMin}
			t.sequences[key] = e
		}
		if e.reset && !(e.hasProposed && m.Value == e.proposed) {
			continue // asked for before the sequence went back
		}
		e.chosen, e.hasChosen, e.reset = m.Value, true, false
	}
}

// Covered reports whether the chosen marks cover the sample. It is true of a
// sample only after Need was asked about it and what it returned was Chosen.
func (t *Tracker) Covered(sample Sample) bool {
	for i := range sample.States {
		s := &sample.States[i]
		e := t.sequences[name{s.Schema, s.Name}]
		if e == nil || e.oid != s.OID || !e.covers(s) {
			return false
		}
	}
	return true
}
