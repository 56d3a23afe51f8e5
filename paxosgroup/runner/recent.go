package runner

import (
	"sort"

	"quorate/paxosgroup"
)

// recent holds the newest chosen entries, consecutive, up to a bound. They lie
// in chunks, which are filled once and never changed, so that readers share them.
// What is forgotten at the front is freed a chunk at a time.
type recent struct {
	bytesMax   int
	entriesMax int
	chunks     []chunk // oldest first; none is empty, and the last one is being filled
	head       int     // of the first chunk, what is still held
	count      int     // held
	bytes      int     // held
}

// chunk is entries that lie together.
type chunk struct {
	entries []paxosgroup.Delivered
	bytes   int
}

const (
	// deliveredWeight is about what an entry takes beside its payload.
	deliveredWeight = 128

	// A chunk is as large as all before it, within bounds: a group at rest, one of
	// a thousand, is to take little.
	chunkEntriesMin = 8
	chunkEntriesMax = 1024
	chunkBytesMax   = 1 << 20 // from which nothing is added
)

func weight(d *paxosgroup.Delivered) int { return deliveredWeight + len(d.Entry.Payload) }

func (r *recent) add(d *paxosgroup.Delivered) {
	last := len(r.chunks) - 1
	if last < 0 || len(r.chunks[last].entries) == cap(r.chunks[last].entries) || r.chunks[last].bytes >= chunkBytesMax {
		room := min(max(r.count, chunkEntriesMin), chunkEntriesMax)
		r.chunks = append(r.chunks, chunk{entries: make([]paxosgroup.Delivered, 0, room)})
		last++
	}
	c := &r.chunks[last]
	c.entries = append(c.entries, *d)
	c.bytes += weight(d)
	r.bytes += weight(d)
	r.count++
	for r.count > 1 && (r.bytes > r.bytesMax || r.count > r.entriesMax) {
		r.forget()
	}
}

// forget lets go of the oldest entry.
func (r *recent) forget() {
	c := &r.chunks[0]
	r.bytes -= weight(&c.entries[r.head])
	r.count--
	r.head++
	if r.head == len(c.entries) {
		*c = chunk{}
		r.chunks, r.head = r.chunks[1:], 0
	}
}

func (r *recent) reset() {
	r.chunks, r.head, r.count, r.bytes = nil, 0, 0, 0
}

// first returns the oldest slot held, or 0 if none is.
func (r *recent) first() paxosgroup.Slot {
	if r.count == 0 {
		return 0
	}
	return r.chunks[0].entries[r.head].Slot
}

// read returns entries from a slot that is held, at least one, and beyond it up
// to maxBytes of payload. They are shared and must not be changed.
func (r *recent) read(from paxosgroup.Slot, maxBytes int) []paxosgroup.Delivered {
	// The chunk before the first one that begins above from.
	i := sort.Search(len(r.chunks), func(i int) bool { return r.chunks[i].entries[0].Slot > from }) - 1
	held := r.chunks[i].entries
	held = held[from-held[0].Slot:]
	n, total := 0, 0
	for n < len(held) {
		total += len(held[n].Entry.Payload)
		if n > 0 && total > maxBytes {
			break
		}
		n++
	}
	return held[:n:n]
}

// find returns the slot of a session's effective entry, or 0 if it is not held.
func (r *recent) find(session, sequence uint64) paxosgroup.Slot {
	for i := len(r.chunks) - 1; i >= 0; i-- {
		entries := r.chunks[i].entries
		if i == 0 {
			entries = entries[r.head:]
		}
		for k := len(entries) - 1; k >= 0; k-- {
			if d := &entries[k]; d.Entry.Session == session && d.Entry.Sequence == sequence && d.Verdict == paxosgroup.Effective {
				return d.Slot
			}
		}
	}
	return 0
}

// cut forgets what is at or below s.
func (r *recent) cut(s paxosgroup.Slot) {
	for r.count > 0 && r.first() <= s {
		r.forget()
	}
}
