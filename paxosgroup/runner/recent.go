package runner

import "quorate/paxosgroup"

// recent holds the newest chosen entries, consecutive, up to a bound.
type recent struct {
	bytesMax   int
	entriesMax int
	entries    []paxosgroup.Delivered
	head       int // of what is still held
	bytes      int
}

// deliveredWeight is about what an entry takes beside its payload.
const deliveredWeight = 128

func (r *recent) add(d paxosgroup.Delivered) {
	r.entries = append(r.entries, d)
	r.bytes += deliveredWeight + len(d.Entry.Payload)
	for len(r.entries)-r.head > 1 && (r.bytes > r.bytesMax || len(r.entries)-r.head > r.entriesMax) {
		r.bytes -= deliveredWeight + len(r.entries[r.head].Entry.Payload)
		r.entries[r.head] = paxosgroup.Delivered{}
		r.head++
	}
	if r.head > len(r.entries)/2 && r.head > 1024 {
		n := copy(r.entries, r.entries[r.head:])
		clear(r.entries[n:])
		r.entries, r.head = r.entries[:n], 0
	}
}

func (r *recent) reset() {
	r.entries, r.head, r.bytes = nil, 0, 0
}

// first returns the oldest slot held, or 0 if none is.
func (r *recent) first() paxosgroup.Slot {
	if r.head == len(r.entries) {
		return 0
	}
	return r.entries[r.head].Slot
}

// read returns a copy of the entries from a slot that is held, at least one, and
// beyond it up to maxBytes of payload.
func (r *recent) read(from paxosgroup.Slot, maxBytes int) []paxosgroup.Delivered {
	held := r.entries[r.head+int(from-r.first()):]
	n, total := 0, 0
	for n < len(held) {
		total += len(held[n].Entry.Payload)
		if n > 0 && total > maxBytes {
			break
		}
		n++
	}
	return append([]paxosgroup.Delivered(nil), held[:n]...)
}

// find returns the slot of a session's effective entry, or 0 if it is not held.
func (r *recent) find(session, sequence uint64) paxosgroup.Slot {
	for i := len(r.entries) - 1; i >= r.head; i-- {
		if d := &r.entries[i]; d.Entry.Session == session && d.Entry.Sequence == sequence && d.Verdict == paxosgroup.Effective {
			return d.Slot
		}
	}
	return 0
}

// cut forgets what is at or below s.
func (r *recent) cut(s paxosgroup.Slot) {
	for r.head < len(r.entries) && r.entries[r.head].Slot <= s {
		r.bytes -= deliveredWeight + len(r.entries[r.head].Entry.Payload)
		r.entries[r.head] = paxosgroup.Delivered{}
		r.head++
	}
}
