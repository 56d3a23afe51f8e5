package paxosgroup

import "fmt"

// invariant panics if cond does not hold. It guards what a bug would turn into
// lost or diverging data: stopping is safe, since promises are on disk, and
// carrying on may not be.
func invariant(cond bool, format string, args ...any) {
	if !cond {
		panic("paxosgroup: broken invariant: " + fmt.Sprintf(format, args...))
	}
}

// sameValue reports whether two entries are the same proposal. A leadership
// writes each (term, number, kind) once, so the payload need not be compared;
// its length is, which costs nothing.
func sameValue(a, b Entry) bool {
	return a.Kind == b.Kind && a.Term == b.Term && a.Number == b.Number &&
		a.Incarnation == b.Incarnation && a.Session == b.Session && a.Sequence == b.Sequence && a.Region == b.Region && len(a.Payload) == len(b.Payload)
}
