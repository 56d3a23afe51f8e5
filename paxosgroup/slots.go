package paxosgroup

import "slices"

// slotState is a slot above the chosen prefix: what was accepted there, and for
// the proposer at that ballot, who is known to have accepted it.
type slotState struct {
	slot   Slot // 0: nothing is here
	ballot Ballot
	entry  Entry
	acks   uint64 // bits of who has accepted, by bitTable
}

// slotRing holds the slots above the chosen prefix, each at its number modulo the
// ring's length. The ring grows when two meet in one place. What is held lies
// close together, since nothing is accepted far above the chosen prefix: so the
// ring is at most about twice as long as the distance between its ends.
type slotRing struct {
	places []slotState // a power of two
	count  int
}

const (
	slotRingMin  = 4
	slotRingKept = 1024 // a longer one is let go of when it is empty
)

// at returns the state of s, or nil if there is none. It is valid until the next
// put or drop.
func (l *slotRing) at(s Slot) *slotState {
	if l.count == 0 {
		return nil
	}
	if st := &l.places[s&Slot(len(l.places)-1)]; st.slot == s && s != 0 {
		return st
	}
	return nil
}

// put makes room for s, in place of what was there, and returns it to be filled.
func (l *slotRing) put(s Slot) *slotState {
	invariant(s > 0, "slot %d is none", s)
	for {
		if n := Slot(len(l.places)); n > 0 {
			st := &l.places[s&(n-1)]
			switch st.slot {
			case 0:
				l.count++
				st.slot = s
				return st
			case s:
				return st
			}
		}
		l.grow()
	}
}

func (l *slotRing) grow() {
	old := l.places
	l.places = make([]slotState, max(slotRingMin, 2*len(old)))
	for i := range old {
		if s := old[i].slot; s != 0 {
			l.places[s&Slot(len(l.places)-1)] = old[i] // what was apart stays apart
		}
	}
}

// drop forgets s.
func (l *slotRing) drop(s Slot) {
	st := l.at(s)
	if st == nil {
		return
	}
	*st = slotState{}
	l.count--
	if l.count == 0 && len(l.places) > slotRingKept {
		l.places = nil
	}
}

// slots returns what is held, ascending.
func (l *slotRing) slots() []Slot {
	out := make([]Slot, 0, l.count)
	for i := range l.places {
		if s := l.places[i].slot; s != 0 {
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return out
}
