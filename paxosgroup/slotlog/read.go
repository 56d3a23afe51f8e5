package slotlog

import (
	"fmt"
	"slices"

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

const (
	// readSlotsMax, readBytesMax and readGapMax bound what is found at once, and
	// what is read at once, records in between that are not asked for included.
	readSlotsMax = 1024
	readBytesMax = 1 << 20
	readGapMax   = 4 << 10
)

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
	for from <= to {
		found, err := l.find(s.group, from, to, maxBytes-total)
		if err == nil {
			err = fetch(found)
		}
		if err != nil {
			return entries, fmt.Errorf("read slot %d of group %d: %w", from, s.group, err)
		}
		if len(found) == 0 {
			break
		}
		for _, p := range found {
			entry, err := p.decode(s.group, from)
			if err != nil {
				return entries, fmt.Errorf("read slot %d of group %d: %w", from, s.group, err)
			}
			total += len(entry.Payload)
			if len(entries) > 0 && total > maxBytes {
				return entries, nil
			}
			entries = append(entries, paxosgroup.SlotEntry{Slot: from, Entry: entry})
			from++
		}
	}
	return entries, nil
}

// place is where a slot's record is, and the record once it was read.
type place struct {
	at    location
	file  File
	frame []byte
}

func (p place) decode(g paxosgroup.GroupID, slot paxosgroup.Slot) (paxosgroup.Entry, error) {
	r, err := decodeRecord(p.frame, uint64(p.at.sequence), int64(p.at.offset))
	if err != nil || r.group != g || r.slot != slot {
		what := "the index points at another record"
		if err != nil {
			what = err.Error()
		}
		return paxosgroup.Entry{}, &CorruptError{
			File: segmentName(uint64(p.at.sequence)), Offset: position(int64(p.at.offset)), Group: g, Slot: slot, What: what,
		}
	}
	return r.entry, nil
}

// find returns where the consecutive slots from from on are, at least one and as
// many as are worth maxBytes, with those that are not flushed yet copied from
// memory. Called with files held.
func (l *Log) find(g paxosgroup.GroupID, from, to paxosgroup.Slot, maxBytes int) ([]place, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if at, ok := l.missed[g]; ok && from >= at {
		return nil, l.err
	} else if ok {
		to = min(to, at-1)
	}
	gr := l.groups[g]
	if gr == nil {
		return nil, nil
	}
	if from <= gr.state.base.Slot {
		return nil, ErrCompacted
	}
	var found []place
	for slot := from; slot <= to && len(found) < readSlotsMax && (maxBytes > 0 || len(found) == 0); slot++ {
		p := place{at: gr.index.get(slot)}
		if p.at == (location{}) {
			break
		}
		if b := l.pending(p.at); b != nil {
			start := int64(p.at.offset) - b.offset
			p.frame = slices.Clone(b.buf[start : start+int64(p.at.size)])
		} else if p.file = l.segment(p.at.sequence).file; p.file == nil {
			return nil, ErrClosed
		}
		maxBytes -= int(p.at.size)
		found = append(found, p)
	}
	return found, nil
}

// fetch reads the records that are in files: those that lie near each other at
// once. Called with files held.
func fetch(places []place) error {
	for i := 0; i < len(places); {
		first := places[i]
		if first.file == nil {
			i++
			continue
		}
		start := int64(first.at.offset)
		end := start + int64(first.at.size)
		n := i + 1
		for ; n < len(places); n++ {
			at := places[n].at
			if places[n].file != first.file || int64(at.offset) < end || int64(at.offset) > end+readGapMax ||
				int64(at.offset)+int64(at.size)-start > readBytesMax {
				break
			}
			end = int64(at.offset) + int64(at.size)
		}
		b, err := readAt(first.file, start, int(end-start))
		if err != nil {
			return fmt.Errorf("at %d of segment %d: %w", position(start), first.at.sequence, err)
		}
		for ; i < n; i++ {
			from := int64(places[i].at.offset) - start
			places[i].frame = b[from : from+int64(places[i].at.size)]
		}
	}
	return nil
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
