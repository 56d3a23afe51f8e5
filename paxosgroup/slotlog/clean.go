package slotlog

import (
	"maps"
	"slices"

	"quorate/paxosgroup"
)

const (
	// cleanSegmentsMin and cleanShare say when the oldest segments are cleaned: at
	// least so many, in which all together this part of one is in use. So what is
	// written anew is at most a sixteenth of what is won, and a log that is cut in
	// order is never copied.
	cleanSegmentsMin = 4
	cleanShare       = 4
	// cleanBytesMax bounds what is copied in one turn of the writer.
	cleanBytesMax = 1 << 20
)

// clean writes records that alone keep old segments, those of idle groups, once
// more at the end of the log, some at a time. They are flushed with what comes
// next, and the segments go once that is.
func (l *Log) clean() {
	l.files.RLock()
	defer l.files.RUnlock()
	l.mu.Lock()
	limit := l.cleanable()
	var places []place
	var owners []slotOf
	if limit != 0 {
		places, owners = l.inUse(limit)
	}
	l.mu.Unlock()
	if len(places) == 0 || fetch(places) != nil {
		return // what cannot be read stays where it is
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, p := range places {
		gr := l.groups[owners[i].group]
		if _, err := p.decode(owners[i].group, owners[i].slot); err != nil || l.err != nil || l.closed || gr.index.get(owners[i].slot) != p.at {
			continue
		}
		t, body := recordType(p.frame[8]), p.frame[recordHeaderBytes:]
		b := l.reserve(len(p.frame))
		at, start := b.end(), len(b.buf)
		b.buf = appendRecord(b.buf, b.seg.sequence, at, t, owners[i].group, func(dst []byte) []byte { return append(dst, body...) })
		b.records++
		b.flush = true
		l.queued += len(b.buf) - start
		l.stats.Cleaned += uint64(len(b.buf) - start)
		l.place(gr, b, owners[i].slot, at, len(b.buf)-start)
	}
	l.wake()
}

// slotOf names a record.
type slotOf struct {
	group paxosgroup.GroupID
	slot  paxosgroup.Slot
}

// cleanable returns the sequence number of the last segment to be cleaned, or 0.
// Called with mu held.
func (l *Log) cleanable() uint64 {
	if l.spareless || l.err != nil || l.closed {
		return 0
	}
	used, limit := int64(0), uint64(0)
	for i, s := range l.segments[:len(l.segments)-1] {
		used += s.live
		if s.file == nil || used > l.cfg.SegmentBytes/cleanShare {
			break
		}
		if i+1 >= cleanSegmentsMin {
			limit = s.sequence
		}
	}
	return limit
}

// inUse returns the first records in the segments up to limit. Called with mu
// held.
func (l *Log) inUse(limit uint64) ([]place, []slotOf) {
	var places []place
	var owners []slotOf
	size := 0
	for _, g := range slices.Sorted(maps.Keys(l.groups)) {
		gr := l.groups[g]
		gr.index.each(func(slot paxosgroup.Slot, at location) bool {
			if uint64(at.sequence) <= limit {
				places = append(places, place{at: at, file: l.segment(at.sequence).file})
				owners = append(owners, slotOf{g, slot})
				size += int(at.size)
			}
			return size < cleanBytesMax
		})
	}
	return places, owners
}
