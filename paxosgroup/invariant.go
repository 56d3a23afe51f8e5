package paxosgroup

import (
	"strconv"
	"time"
)

// invariant panics if cond does not hold. It guards what a bug would turn into
// lost or diverging data: stopping is safe, since promises are on disk, and
// carrying on may not be.
func invariant(cond bool, format string, args ...any) {
	if !cond {
		panic("paxosgroup: broken invariant: " + explain(format, args))
	}
}

// explain puts args in the places of a format's verbs. Unlike fmt it does not
// hold on to them: an assertion on the way of every entry would allocate for
// each of its arguments, though it never fails.
func explain(format string, args []any) string {
	out := make([]byte, 0, 128)
	for i := 0; i < len(format); i++ {
		if format[i] != '%' || i+1 == len(format) || len(args) == 0 {
			out = append(out, format[i])
			continue
		}
		for i++; i+1 < len(format) && (format[i] == '+' || format[i] == '#'); i++ {
		}
		out = appendValue(out, args[0])
		args = args[1:]
	}
	return string(out)
}

func appendValue(out []byte, v any) []byte {
	switch v := v.(type) {
	case Ballot:
		out = strconv.AppendUint(out, v.Counter, 10)
		out = append(out, '.')
		return strconv.AppendUint(out, uint64(v.Replica), 10)
	case Slot:
		return strconv.AppendUint(out, uint64(v), 10)
	case ReplicaID:
		return strconv.AppendUint(out, uint64(v), 10)
	case uint64:
		return strconv.AppendUint(out, v, 10)
	case int:
		return strconv.AppendInt(out, int64(v), 10)
	case Instant:
		return strconv.AppendInt(out, int64(v), 10)
	case time.Duration:
		return append(out, v.String()...)
	case string:
		return append(out, v...)
	case Membership:
		for i, x := range v.Members {
			if i > 0 {
				out = append(out, ' ')
			}
			out = strconv.AppendUint(out, uint64(x.ID), 10)
			out = append(out, ':')
			out = strconv.AppendUint(out, uint64(x.Kind), 10)
		}
		return out
	}
	return append(out, '?')
}

// sameValue reports whether two entries are the same proposal. A leadership
// writes each (term, number, kind) once, so the payload need not be compared;
// its length is, which costs nothing.
func sameValue(a, b Entry) bool {
	return a.Kind == b.Kind && a.Term == b.Term && a.Number == b.Number &&
		a.Incarnation == b.Incarnation && a.Session == b.Session && a.Sequence == b.Sequence && a.Region == b.Region && len(a.Payload) == len(b.Payload)
}
