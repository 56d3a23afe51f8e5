package slotlog

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

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
	if err := refuseSet(cfg.FS, cfg.Dir); err != nil {
		return nil, nil, errors.Join(err, lock.Close())
	}
	return openLocked(cfg, lock)
}

// openLocked opens the log of a directory that is locked. The lock goes with the log,
// or with the error.
func openLocked(cfg Config, lock io.Closer) (*Log, map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	l := &Log{
		cfg:      cfg,
		lock:     lock,
		groups:   make(map[paxosgroup.GroupID]*group),
		number:   1,
		work:     make(chan struct{}, 1),
		stopped:  make(chan struct{}),
		prepared: make(chan preparedFile, 1),
	}
	restored, err := l.load()
	if err != nil {
		errs := []error{fmt.Errorf("open slot log in %s: %w", cfg.Dir, explain(err, cfg.FS, cfg.Dir))}
		for _, s := range l.segments {
			if s.file != nil {
				errs = append(errs, s.file.Close())
			}
		}
		for _, p := range l.pool {
			errs = append(errs, p.file.Close())
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
	names, err := l.cfg.FS.ReadDir(l.cfg.Dir)
	if err != nil {
		return nil, err
	}
	sequences, err := segmentsOf(names)
	if err != nil {
		return nil, err
	}
	if err := l.takeUnused(names); err != nil {
		return nil, err
	}
	rec := recovery{dir: l.cfg.Dir, log: l, votes: make(map[paxosgroup.GroupID]*votes)}
	for i, sequence := range sequences {
		if err := rec.load(sequence, i == len(sequences)-1); err != nil {
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
	// Or between two segments.
	switch {
	case rec.sealed:
		l.begin(0)
	case len(l.groups) > 0 && l.offset == sectorData:
		l.putStates()
	}
	if len(l.segments) == 0 {
		first := &segment{sequence: 1, size: l.cfg.SegmentBytes}
		p, err := makeFile(l.cfg.FS, l.cfg.Dir, preparedName, first.size)
		if err != nil {
			return nil, err
		}
		if err := p.publish(l.cfg.FS, l.cfg.Dir, first); err != nil {
			return nil, errors.Join(err, p.file.Close())
		}
		l.segments = []*segment{first}
		l.offset = sectorData
	}
	return restored, nil
}

// segmentsOf returns the sequence numbers of the segments among names, ascending
// and without a gap.
func segmentsOf(names []string) ([]uint64, error) {
	sequences := sequencesOf(names)
	for i := 1; i < len(sequences); i++ {
		if sequences[i] != sequences[i-1]+1 {
			return nil, missing(sequences[i-1] + 1)
		}
	}
	return sequences, nil
}

// takeUnused removes what an earlier process had prepared, and keeps of the
// files to be used again as many as fit.
func (l *Log) takeUnused(names []string) error {
	for _, name := range slices.Sorted(slices.Values(names)) {
		path := filepath.Join(l.cfg.Dir, name)
		if strings.HasSuffix(name, unusedSuffix) && len(l.pool) < poolMax {
			f, err := l.cfg.FS.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			if size, err := f.Size(); err == nil && size == l.cfg.SegmentBytes {
				l.pool = append(l.pool, preparedFile{f, name})
				continue
			}
			if err := f.Close(); err != nil {
				return err
			}
		}
		if strings.HasSuffix(name, unusedSuffix) || name == preparedName || name == largeName {
			if err := l.cfg.FS.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove prepared segment: %w", err)
			}
		}
	}
	return nil
}

// recovery is the state of one reading of the directory.
type recovery struct {
	dir    string
	log    *Log
	buf    []byte // the segment being read
	votes  map[paxosgroup.GroupID]*votes
	sealed bool // the segment read last is
}

// votes are a group's entries that are not judged yet: those above its chosen
// slot, and those that wait for one below them.
type votes struct {
	at      paxosgroup.Judged // judged up to here
	pending map[paxosgroup.Slot]vote
	shared  []paxosgroup.Slot // whose payload is in the buffer of the segment being read
}

type vote struct {
	ballot  paxosgroup.Ballot
	learned bool
	entry   paxosgroup.Entry
}

// restart forgets what a base covers.
func (v *votes) restart(b paxosgroup.Base) {
	if b.Slot <= v.at.Slot && v.at.Slot != 0 {
		return
	}
	v.at = paxosgroup.Judged{Base: b, Configured: b.Slot}
	v.at.Judge = b.Judge.Clone() // which Judge changes
	for slot := range v.pending {
		if slot <= b.Slot {
			delete(v.pending, slot)
		}
	}
}

// judge goes on up to chosen, or to a slot that comes later in the log.
func (v *votes) judge(chosen paxosgroup.Slot) {
	for v.at.Slot < chosen {
		next, ok := v.pending[v.at.Slot+1]
		if !ok {
			return
		}
		delete(v.pending, v.at.Slot+1)
		v.at.Slot++
		v.at.Judge.Judge(next.entry)
		if m, ok := v.at.Membership.Next(next.entry); ok {
			v.at.Membership, v.at.Configured = m, v.at.Slot
		}
	}
}

// own copies the payloads that are in the segment's buffer and still needed:
// most were chosen, and so forgotten, in the same segment.
func (v *votes) own(chosen paxosgroup.Slot) {
	for _, slot := range v.shared {
		e, ok := v.pending[slot]
		if !ok {
			continue
		}
		if slot <= chosen && e.entry.Kind != paxosgroup.KindConfig {
			e.entry.Payload = nil // only to be judged
		}
		e.entry.Payload = slices.Clone(e.entry.Payload)
		v.pending[slot] = e
	}
	v.shared = v.shared[:0]
}

// scan is what reading a segment finds out beside its records.
type scan struct {
	header    batchHeader // of the last batch
	lastBatch int64       // where that begins
	end       int64       // offset behind it, at a sector
	torn      int         // sectors behind the end that a write which was cut short left behind, up to the last
	sealed    bool

	data   []byte // of the sectors, without stamps; nil if the segment header is damaged
	states []sectorState
}

// load reads one segment into the log.
func (rec *recovery) load(sequence uint64, last bool) error {
	l := rec.log
	name := segmentName(sequence)
	file, err := l.cfg.FS.OpenFile(filepath.Join(l.cfg.Dir, name), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	seg := &segment{sequence: sequence, file: file}
	l.segments = append(l.segments, seg)
	b, err := rec.read(file, name)
	if err != nil {
		return err
	}
	seg.size = int64(len(b))
	found, err := scanSegment(b, name, sequence, last, l.number, func(_ batchHeader, r placedRecord) error { return rec.take(seg, r) })
	if err != nil {
		return err
	}
	for id, v := range rec.votes {
		v.own(l.groups[id].state.chosen)
	}
	rec.sealed = found.sealed
	l.offset, l.number = found.end, found.header.number+1
	if !last {
		return nil
	}
	return rec.settle(seg, name, found)
}

// read reads a whole segment file. The result is good until the next.
func (rec *recovery) read(f File, name string) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if int64(cap(rec.buf)) < size {
		rec.buf = make([]byte, size)
	}
	b := rec.buf[:size]
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return b, nil
}

// settle makes sure that what was read of the last segment is what the disk has:
// it cuts off what a write that was cut short has left, and writes the last batch
// again. That one may be in memory alone, since a flush that failed leaves its
// pages there, marked as clean, and no later flush would write them. Each batch
// before it had been flushed before the next was begun.
func (rec *recovery) settle(seg *segment, name string, found scan) error {
	if found.torn > 0 {
		at := position(found.end)
		if _, err := seg.file.WriteAt(make([]byte, found.torn*sectorBytes), at); err != nil {
			return fmt.Errorf("cut torn write at %d of %s: %w", at, name, err)
		}
		rec.log.cfg.Logger.Warn("slot log: cut off a write that did not end before the last stop; nothing rested on it",
			"file", filepath.Join(rec.dir, name), "offset", at, "bytes", found.torn*sectorBytes)
	}
	if found.lastBatch != 0 {
		b, err := readAt(seg.file, found.lastBatch, batchHeaderBytes+int(found.header.length))
		if err == nil {
			_, err = seg.file.WriteAt(appendStamped(nil, b, seg.sequence, found.lastBatch), position(found.lastBatch))
		}
		if err != nil {
			return fmt.Errorf("write the last batch of %s again: %w", name, err)
		}
	}
	if err := seg.file.Datasync(); err != nil {
		return fmt.Errorf("flush the end of %s: %w", name, err)
	}
	return nil
}

type placedRecord struct {
	record
	offset int64
}

// scanSegment reads the segment that the file bytes b hold, of which the first
// batch has the given number (1 if that is not known), and hands its records to
// take. It strips the stamps off b in place. Only in the last segment may a write
// have been cut short.
func scanSegment(b []byte, name string, sequence uint64, last bool, number uint64, take func(batchHeader, placedRecord) error) (scan, error) {
	found := scan{header: batchHeader{number: number - 1}, end: sectorData}
	if err := checkSegmentHeader(b, int64(len(b)), name, sequence); err != nil {
		return found, err
	}
	states, data := examine(b, sequence)
	found.states, found.data = states, data
	if states[0] != sectorWritten {
		return found, &CorruptError{File: name, What: "the stamp of the segment header is damaged"}
	}
	damaged := func(offset int64, format string, args ...any) error {
		return &CorruptError{File: name, Offset: position(offset), What: fmt.Sprintf(format, args...)}
	}
	for !found.sealed && found.end+batchHeaderBytes <= int64(len(data)) {
		h, ok := readBatchHeader(data[found.end:], sequence, found.end)
		if !ok || states[found.end/sectorData] != sectorWritten {
			break
		}
		if h.number != found.header.number+1 && found.header.number != 0 {
			return found, damaged(found.end, "batch %d follows batch %d", h.number, found.header.number)
		}
		end := found.end + batchHeaderBytes + int64(h.length)
		records, err := readBatch(data[found.end:nextSector(end)], h, sequence, found.end)
		if err == nil {
			for i := found.end / sectorData; i < nextSector(end)/sectorData; i++ {
				if states[i] != sectorWritten {
					err = damaged(i*sectorData, "the stamp of a sector is damaged")
				}
			}
		}
		if err != nil {
			// A batch that was cut short lacks sectors, and has no others that are
			// not what was written.
			torn := false
			for i := found.end / sectorData; i < nextSector(end)/sectorData; i++ {
				if states[i] == sectorRotten {
					return found, damaged(i*sectorData, "a sector is not what was written")
				}
				torn = torn || states[i] == sectorOld
			}
			if !last || !torn {
				return found, located(err, name)
			}
			break
		}
		for _, r := range records {
			if found.sealed {
				return found, damaged(r.offset, "a record follows the seal")
			}
			found.sealed = r.kind == typeSeal
			if err := take(h, r); err != nil {
				return found, located(err, name)
			}
		}
		found.header, found.lastBatch, found.end = h, found.end, nextSector(end)
	}
	if !last && !found.sealed {
		switch i := found.end / sectorData; {
		case i >= int64(len(states)) || states[i] == sectorOld:
			return found, damaged(found.end, "the segment has no end, though another follows: writes to it are lost")
		case states[i] == sectorRotten:
			return found, damaged(found.end, "the stamp of a sector is damaged")
		}
		return found, damaged(found.end, "the header of a batch does not match its checksum")
	}
	if !last {
		return found, nil
	}
	return found, found.tail(name, sequence)
}

// examine strips the stamps off the sectors in b and tells what they say.
func examine(b []byte, sequence uint64) ([]sectorState, []byte) {
	states := make([]sectorState, len(b)/sectorBytes)
	for i := range states {
		states[i] = stateOf(b[i*sectorBytes:], sequence, int64(i))
	}
	return states, strip(b, 0)
}

// tail checks what lies behind the last good batch of the last segment: what an
// earlier life of the file left, or the trace of a write that was cut short.
func (found *scan) tail(name string, sequence uint64) error {
	data, states := found.data, found.states
	first := int(found.end / sectorData)
	for i := first; i < len(states); i++ {
		offset := int64(i) * sectorData
		header, ok := readBatchHeader(data[offset:], sequence, offset)
		switch {
		case i == first && states[i] == sectorRotten, i == first && states[i] == sectorWritten && !ok:
			// A sector is written whole or not at all.
			return &CorruptError{File: name, Offset: position(offset), What: "the header of a batch does not match its checksum"}
		case i > first && ok && header.number > found.header.number+1:
			// A batch is begun only when all before it is flushed.
			return &CorruptError{File: name, Offset: position(found.end),
				What: fmt.Sprintf("batch %d is not readable, but batch %d at %d is", found.header.number+1, header.number, position(offset))}
		}
		if states[i] == sectorWritten {
			found.torn = i + 1 - first
		}
	}
	return nil
}

// readBatch decodes the records of a batch that stands at offset.
func readBatch(b []byte, h batchHeader, sequence uint64, offset int64) ([]placedRecord, error) {
	records := make([]placedRecord, 0, min(int(h.records), len(b)/recordHeaderBytes))
	end := batchHeaderBytes + int(h.length)
	at := batchHeaderBytes
	for range h.records {
		r, err := decodeRecord(b[at:end], sequence, offset+int64(at))
		if err != nil {
			return nil, &CorruptError{Offset: position(offset + int64(at)), What: err.Error()}
		}
		records = append(records, placedRecord{r, offset + int64(at)})
		at += r.size
	}
	if at != end || !isZero(b[end:]) {
		return nil, &CorruptError{Offset: position(offset + int64(at)), What: "a batch holds more than its records"}
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
	gr, v := l.groups[r.group], rec.votes[r.group]
	if gr == nil {
		gr, v = &group{}, &votes{pending: make(map[paxosgroup.Slot]vote)}
		l.groups[r.group], rec.votes[r.group] = gr, v
	}
	release := func(old location) {
		if old != (location{}) {
			l.segment(old.sequence).live -= int64(old.size)
		}
	}
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
			return &CorruptError{Offset: position(r.offset), Group: r.group, Slot: r.slot, What: fmt.Sprintf("slot is too far above slot %d", known)}
		}
		release(gr.index.set(r.slot, location{uint32(seg.sequence), uint32(r.offset), uint32(r.size)}))
		seg.live += int64(r.size)
		if r.slot > v.at.Slot {
			learned := r.kind == typeLearn || v.pending[r.slot].learned
			v.pending[r.slot] = vote{ballot: r.ballot, learned: learned, entry: r.entry}
			v.shared = append(v.shared, r.slot)
			v.judge(gr.state.chosen)
		}
	case typeChosen:
		gr.state.chosen = max(gr.state.chosen, r.slot)
		v.judge(gr.state.chosen)
	case typeBase, typeState:
		gr.state.promise(r.ballot)
		if r.kind == typeState {
			gr.state.chosen = max(gr.state.chosen, r.slot)
		}
		gr.state.restart(r.base)
		gr.index.dropThrough(r.base.Slot, release)
		v.restart(r.base)
		v.judge(gr.state.chosen)
	}
	return nil
}

// restored checks that nothing is missing and returns what the cores start from.
func (rec *recovery) restored() (map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	restored := make(map[paxosgroup.GroupID]paxosgroup.Restored)
	for _, id := range slices.Sorted(maps.Keys(rec.log.groups)) {
		gr, v := rec.log.groups[id], rec.votes[id]
		// What was learned is chosen, whether or not that was recorded too.
		for v.at.Slot == gr.state.chosen && v.pending[gr.state.chosen+1].learned {
			gr.state.chosen++
			v.judge(gr.state.chosen)
		}
		if v.at.Slot < gr.state.chosen {
			return nil, &CorruptError{File: segmentName(rec.log.segments[0].sequence), Group: id, Slot: v.at.Slot + 1,
				What: "the slot is chosen and its entry is in none of the files: an older file is missing"}
		}
		at := v.at
		at.Judge = at.Judge.Clone()
		r := paxosgroup.Restored{Base: gr.state.base, Promised: gr.state.promised, Chosen: gr.state.chosen, Judged: &at}
		for slot, e := range v.pending {
			ballot := e.ballot
			if e.learned {
				// Behind a gap the core takes no chosen entry, so it gets it as a vote.
				// Every ballot from the chosen one on has this entry: the promised one
				// is as good as the one it was chosen at.
				ballot = gr.state.promised
			}
			r.Accepted = append(r.Accepted, paxosgroup.AcceptedEntry{Slot: slot, Ballot: ballot, Entry: e.entry})
		}
		slices.SortFunc(r.Accepted, func(a, b paxosgroup.AcceptedEntry) int { return cmp.Compare(a.Slot, b.Slot) })
		restored[id] = r
	}
	return restored, nil
}
