package slotlog

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"quorate/paxosgroup"
)

// Open opens the log of a directory, which it creates if need be, and returns
// what it holds for each group. An error says what is wrong with the directory
// and what to do: *CorruptError, *VersionError, ErrLocked, ErrFull or one of the
// file system.
func Open(cfg Config) (*Log, map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	if err := cfg.fill(); err != nil {
		return nil, nil, err
	}
	if err := cfg.FS.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("create directory of slot log: %w", full(err))
	}
	lock, err := lockDir(cfg.FS, cfg.Dir)
	if err != nil {
		return nil, nil, err
	}
	l := &Log{
		cfg:      cfg,
		lock:     lock,
		groups:   make(map[paxosgroup.GroupID]*group),
		number:   1,
		work:     make(chan struct{}, 1),
		stopped:  make(chan struct{}),
		prepared: make(chan preparedSegment, 1),
	}
	l.room.L = &l.mu
	restored, err := l.load()
	if err != nil {
		errs := []error{fmt.Errorf("open slot log in %s: %w", cfg.Dir, err)}
		for _, s := range l.segments {
			if s.file != nil {
				errs = append(errs, s.file.Close())
			}
		}
		return nil, nil, errors.Join(append(errs, lock.Close())...)
	}
	l.prepare()
	if !cfg.Manual {
		go l.write()
		l.wake()
	}
	return l, restored, nil
}

// load reads every segment, cuts a torn tail and leaves the log ready to be
// appended to.
func (l *Log) load() (map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	sequences, err := listSegments(l.cfg.FS, l.cfg.Dir)
	if err != nil {
		return nil, err
	}
	if err := l.cfg.FS.Remove(filepath.Join(l.cfg.Dir, preparedName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove prepared segment: %w", err)
	}
	rec := recovery{log: l, votes: make(map[paxosgroup.GroupID]*votes)}
	for i, sequence := range sequences {
		if err := rec.segment(sequence, i == len(sequences)-1); err != nil {
			return nil, err
		}
	}
	restored, err := rec.restored()
	if err != nil {
		return nil, err
	}
	// The last process may have ended before it flushed the names.
	if err := l.cfg.FS.SyncDir(l.cfg.Dir); err != nil {
		return nil, err
	}
	// The process may have ended between two segments.
	switch {
	case rec.sealed:
		l.begin(0)
	case len(l.groups) > 0 && l.offset == segmentHeaderBytes:
		l.putStates()
	}
	if len(l.segments) == 0 {
		first := &segment{sequence: 1, size: l.cfg.SegmentBytes}
		f, err := prepareSegment(l.cfg.FS, l.cfg.Dir, first.size)
		if err != nil {
			return nil, err
		}
		if err := publishSegment(l.cfg.FS, l.cfg.Dir, f, first); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		first.file = f
		l.segments = []*segment{first}
		l.offset = segmentHeaderBytes
	}
	return restored, nil
}

// listSegments returns the sequence numbers of the segments, ascending and
// without a gap.
func listSegments(files FS, dir string) ([]uint64, error) {
	names, err := files.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var sequences []uint64
	for _, name := range names {
		if sequence, ok := parseSegmentName(name); ok {
			sequences = append(sequences, sequence)
		}
	}
	slices.Sort(sequences)
	for i := 1; i < len(sequences); i++ {
		if sequences[i] != sequences[i-1]+1 {
			return nil, &CorruptError{File: segmentName(sequences[i-1] + 1), What: "the file is missing"}
		}
	}
	return sequences, nil
}

// recovery is the state of one reading of the directory.
type recovery struct {
	log    *Log
	votes  map[paxosgroup.GroupID]*votes
	sealed bool // the segment read last is
}

// votes are a group's entries above its chosen slot.
type votes struct {
	accepted map[paxosgroup.Slot]paxosgroup.AcceptedEntry
	learned  map[paxosgroup.Slot]paxosgroup.Entry
}

func (v *votes) forgetThrough(s paxosgroup.Slot) {
	for slot := range v.accepted {
		if slot <= s {
			delete(v.accepted, slot)
		}
	}
	for slot := range v.learned {
		if slot <= s {
			delete(v.learned, slot)
		}
	}
}

// segment reads one file from end to end.
func (rec *recovery) segment(sequence uint64, last bool) error {
	l := rec.log
	name := segmentName(sequence)
	path := filepath.Join(l.cfg.Dir, name)
	file, err := l.cfg.FS.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	seg := &segment{sequence: sequence, file: file}
	l.segments = append(l.segments, seg)
	b, err := readAll(file)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if err := checkSegmentHeader(b, name, sequence); err != nil {
		return err
	}
	seg.size = int64(len(b))

	offset := int64(segmentHeaderBytes)
	lastBatch := offset
	rec.sealed = false
	for !rec.sealed && offset+batchHeaderBytes <= seg.size {
		h, ok := readBatchHeader(b[offset:], sequence, offset)
		if !ok {
			break
		}
		end := offset + batchHeaderBytes + int64(h.length)
		if l.number != h.number && l.number != 1 {
			return &CorruptError{File: name, Offset: offset, What: fmt.Sprintf("batch %d follows batch %d", h.number, l.number-1)}
		}
		records, err := readBatch(b[offset:end], h, sequence, offset)
		if err != nil {
			// A batch that was cut short lacks sectors.
			if !last || zeroSectors(b[offset:end], offset) <= int(h.zeroSectors) {
				return located(err, name)
			}
			break
		}
		for _, r := range records {
			if rec.sealed {
				return &CorruptError{File: name, Offset: r.offset, What: "a record follows the seal"}
			}
			rec.sealed = r.kind == typeSeal
			if err := rec.take(seg, r); err != nil {
				return located(err, name)
			}
		}
		l.number = h.number + 1
		lastBatch, offset = offset, end
	}
	if !last && !rec.sealed {
		return &CorruptError{File: name, Offset: offset, What: "the segment has no end, though another follows"}
	}
	l.offset = offset
	if last && lastBatch < offset {
		// What is read here may be in memory alone: a flush that failed leaves its
		// pages there, marked as clean, and no later flush would write them. Each
		// batch but the last had been flushed before the next was begun.
		if _, err := file.WriteAt(b[lastBatch:offset], lastBatch); err != nil {
			return fmt.Errorf("write the last batch of %s again: %w", name, err)
		}
		if err := file.Datasync(); err != nil {
			return fmt.Errorf("flush the last batch of %s: %w", name, err)
		}
	}
	return rec.tail(seg, b, offset, name)
}

func readAll(f File) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, err
	}
	return b, nil
}

// tail checks what lies behind the last good batch: nothing, or the trace of a
// write that was cut short, which is cut off.
func (rec *recovery) tail(seg *segment, b []byte, offset int64, name string) error {
	tail := b[offset:]
	if isZero(tail) {
		return nil
	}
	// A header is written whole or not at all.
	if len(tail) >= batchHeaderBytes && !isZero(tail[:batchHeaderBytes]) {
		if _, ok := readBatchHeader(tail, seg.sequence, offset); !ok {
			return &CorruptError{File: name, Offset: offset, What: "the header of a batch does not match its checksum"}
		}
	}
	// A batch is begun only when all before it is flushed: what has a valid batch
	// behind it was whole once.
	for at := offset + batchAlign; at+batchHeaderBytes <= seg.size; at += batchAlign {
		if _, ok := readBatchHeader(b[at:], seg.sequence, at); ok {
			return &CorruptError{File: name, Offset: offset, What: fmt.Sprintf("a batch is not readable, but the one at offset %d is", at)}
		}
	}
	end := len(tail)
	for end > 0 && tail[end-1] == 0 {
		end--
	}
	if _, err := seg.file.WriteAt(make([]byte, end), offset); err != nil {
		return fmt.Errorf("cut torn write at %d of %s: %w", offset, name, err)
	}
	if err := seg.file.Datasync(); err != nil {
		return fmt.Errorf("cut torn write at %d of %s: %w", offset, name, err)
	}
	rec.log.cfg.Logger.Warn("slot log: cut off a write that did not end before the last stop; nothing rested on it",
		"file", filepath.Join(rec.log.cfg.Dir, name), "offset", offset, "bytes", end)
	return nil
}

type placedRecord struct {
	record
	offset int64
}

// readBatch decodes the records of a batch that stands at offset.
func readBatch(b []byte, h batchHeader, sequence uint64, offset int64) ([]placedRecord, error) {
	var records []placedRecord
	at := batchHeaderBytes
	for range h.records {
		r, err := decodeRecord(b[at:], sequence, offset+int64(at))
		if err != nil {
			return nil, &CorruptError{Offset: offset + int64(at), What: err.Error()}
		}
		records = append(records, placedRecord{r, offset + int64(at)})
		at += r.size
	}
	if len(b)-at >= batchAlign || !isZero(b[at:]) {
		return nil, &CorruptError{Offset: offset + int64(at), What: "the padding of a batch is not empty"}
	}
	return records, nil
}

// located fills in the file of a CorruptError.
func located(err error, name string) error {
	if c, ok := errors.AsType[*CorruptError](err); ok {
		c.File = name
	}
	return err
}

// take brings a record into the group's state.
func (rec *recovery) take(seg *segment, r placedRecord) error {
	if r.kind == typeSeal {
		return nil
	}
	l := rec.log
	gr := l.groups[r.group]
	if gr == nil {
		gr = &group{}
		l.groups[r.group] = gr
		rec.votes[r.group] = &votes{
			accepted: make(map[paxosgroup.Slot]paxosgroup.AcceptedEntry),
			learned:  make(map[paxosgroup.Slot]paxosgroup.Entry),
		}
	}
	v := rec.votes[r.group]
	switch r.kind {
	case typePromise:
		gr.state.promise(r.ballot)
	case typeAccept, typeLearn:
		if r.kind == typeAccept {
			gr.state.promise(r.ballot)
		}
		if r.slot <= gr.state.base.Slot {
			return nil
		}
		known := max(gr.state.base.Slot, gr.state.chosen, gr.index.last)
		if r.slot > known+slotsAheadMax {
			return &CorruptError{Offset: r.offset, Group: r.group, Slot: r.slot, What: fmt.Sprintf("slot is too far above slot %d", known)}
		}
		old := gr.index.set(r.slot, location{uint32(seg.sequence), uint32(r.offset), uint32(r.size)})
		seg.entries++
		if old != (location{}) {
			l.segment(old.sequence).entries--
		}
		if r.slot > gr.state.chosen {
			// The payload shares the segment's bytes: copied, or they all stay.
			entry := r.entry
			entry.Payload = slices.Clone(entry.Payload)
			if r.kind == typeLearn {
				v.learned[r.slot] = entry
			} else {
				v.accepted[r.slot] = paxosgroup.AcceptedEntry{Slot: r.slot, Ballot: r.ballot, Entry: entry}
			}
		}
	case typeChosen:
		gr.state.chosen = max(gr.state.chosen, r.slot)
		v.forgetThrough(gr.state.chosen)
	case typeBase, typeState:
		gr.state.promise(r.ballot)
		if r.kind == typeState {
			gr.state.chosen = max(gr.state.chosen, r.slot)
		}
		gr.state.restart(r.base)
		gr.index.dropThrough(r.base.Slot, func(old location) { l.segment(old.sequence).entries-- })
		v.forgetThrough(gr.state.chosen)
	}
	return nil
}

// restored checks that nothing is missing and returns what the cores start from.
func (rec *recovery) restored() (map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	restored := make(map[paxosgroup.GroupID]paxosgroup.Restored)
	for _, id := range slices.Sorted(maps.Keys(rec.log.groups)) {
		gr := rec.log.groups[id]
		for slot := gr.state.base.Slot + 1; slot <= gr.state.chosen; slot++ {
			if gr.index.get(slot) == (location{}) {
				return nil, &CorruptError{File: segmentName(rec.log.segments[0].sequence), Group: id, Slot: slot,
					What: "the slot is chosen and its entry is in none of the files: an older file is missing"}
			}
		}
		v := rec.votes[id]
		// What was learned is chosen, whether or not that was recorded too.
		for {
			if _, ok := v.learned[gr.state.chosen+1]; !ok {
				break
			}
			gr.state.chosen++
		}
		v.forgetThrough(gr.state.chosen)
		for slot, entry := range v.learned {
			// Behind a gap the core takes no chosen entry, so it gets it as a vote.
			// Every ballot from the chosen one on has this entry: the promised one
			// is as good as the one it was chosen at.
			v.accepted[slot] = paxosgroup.AcceptedEntry{Slot: slot, Ballot: gr.state.promised, Entry: entry}
		}
		r := paxosgroup.Restored{Base: gr.state.base, Promised: gr.state.promised, Chosen: gr.state.chosen}
		for _, a := range v.accepted {
			r.Accepted = append(r.Accepted, a)
		}
		slices.SortFunc(r.Accepted, func(a, b paxosgroup.AcceptedEntry) int { return cmp.Compare(a.Slot, b.Slot) })
		restored[id] = r
	}
	return restored, nil
}
