package slotlog

import (
	"fmt"

	"quorate/paxosgroup"
)

// Group returns a reader of the group's entries.
func (l *Log) Group(g paxosgroup.GroupID) paxosgroup.Storage {
	return &storage{log: l, group: g}
}

type storage struct {
	log   *Log
	group paxosgroup.GroupID
}

// Chosen returns what was last accepted or learned in consecutive slots from
// from to to. That these are chosen the caller knows. It ends early at a slot
// that holds nothing, and returns ErrCompacted if from is at or below the base.
// The payloads are the caller's.
func (s *storage) Chosen(from, to paxosgroup.Slot, maxBytes int) ([]paxosgroup.SlotEntry, error) {
	l := s.log
	l.files.RLock()
	defer l.files.RUnlock()
	var entries []paxosgroup.SlotEntry
	total := 0
	for slot := from; slot <= to; slot++ {
		entry, found, err := l.entry(s.group, slot)
		if err != nil {
			return entries, fmt.Errorf("read slot %d of group %d: %w", slot, s.group, err)
		}
		if !found {
			break
		}
		total += len(entry.Payload)
		if len(entries) > 0 && total > maxBytes {
			break
		}
		entries = append(entries, paxosgroup.SlotEntry{Slot: slot, Entry: entry})
	}
	return entries, nil
}

// entry reads one slot. Called with files held.
func (l *Log) entry(g paxosgroup.GroupID, slot paxosgroup.Slot) (paxosgroup.Entry, bool, error) {
	frame, at, file, err := l.find(g, slot)
	if err != nil || frame == nil {
		return paxosgroup.Entry{}, false, err
	}
	if file != nil {
		if _, err := file.ReadAt(frame, int64(at.offset)); err != nil {
			return paxosgroup.Entry{}, false, fmt.Errorf("at %d of segment %d: %w", at.offset, at.sequence, err)
		}
	}
	r, err := decodeRecord(frame, uint64(at.sequence), int64(at.offset))
	if err != nil || r.group != g || r.slot != slot {
		what := "the index points at another record"
		if err != nil {
			what = err.Error()
		}
		return paxosgroup.Entry{}, false, &CorruptError{
			File: segmentName(uint64(at.sequence)), Offset: int64(at.offset), Group: g, Slot: slot, What: what,
		}
	}
	return r.entry, true, nil
}

// find returns the frame of a slot, copied from memory if it is not flushed yet;
// else a buffer of its size and the file to read it from.
func (l *Log) find(g paxosgroup.GroupID, slot paxosgroup.Slot) ([]byte, location, File, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if at, ok := l.missed[g]; ok && slot >= at {
		return nil, location{}, nil, l.err
	}
	gr := l.groups[g]
	if gr == nil {
		return nil, location{}, nil, nil
	}
	if slot <= gr.state.base.Slot {
		return nil, location{}, nil, ErrCompacted
	}
	at := gr.index.get(slot)
	if at == (location{}) {
		return nil, location{}, nil, nil
	}
	frame := make([]byte, at.size)
	if b := l.pending(at); b != nil {
		copy(frame, b.buf[int64(at.offset)-b.offset:])
		return frame, at, nil, nil
	}
	file := l.segment(at.sequence).file
	if file == nil {
		return nil, location{}, nil, ErrClosed
	}
	return frame, at, file, nil
}

// pending returns the batch in memory that holds the location. Called with mu
// held.
func (l *Log) pending(at location) *batch {
	holds := func(b *batch) bool {
		return b.seg.sequence == uint64(at.sequence) && b.offset <= int64(at.offset) && int64(at.offset) < b.end()
	}
	if l.building != nil && holds(l.building) {
		return l.building
	}
	for _, b := range l.queue {
		if holds(b) {
			return b
		}
	}
	return nil
}
