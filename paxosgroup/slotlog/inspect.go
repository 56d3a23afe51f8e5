package slotlog

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"quorate/paxosgroup"
)

// Report is what Inspect finds out about a directory.
type Report struct {
	Dir      string
	Segments int
	Bytes    int64 // of the segments' files
	Batches  int   // flushes that a start would take in
	Records  int   // in them
	Groups   []GroupReport
	Torn     *TornWrite      // nil: the log ends with a whole batch
	Damage   []*CorruptError // the first of each segment; none: the log is sound
}

// GroupReport is what a start would give back of a group. Where the log is
// damaged, it is what stands before the damage.
type GroupReport struct {
	Group    paxosgroup.GroupID
	Promised paxosgroup.Ballot
	Base     paxosgroup.Slot
	Chosen   paxosgroup.Slot
	Last     paxosgroup.Slot // highest that holds an entry; 0: none
	Entries  int             // slots above the base that hold one
	Bytes    int64           // of their records
}

// TornWrite is what a write left behind that a crash cut short. It is sound:
// nobody was answered before its flush. The next start cuts it off.
type TornWrite struct {
	File   string
	Offset int64 // in the file, where the write began
	Bytes  int64 // from there to the end of the last sector that was written
}

// Behind counts what can still be read in a damaged log from the damaged batch on,
// the segments behind it included. A start takes none of it.
type Behind struct {
	Batches int // whole ones
	Records int
	Entries int // accepted or learned: as many of Records
	Groups  []GroupSpan
}

// GroupSpan is the entries of a group among those.
type GroupSpan struct {
	Group       paxosgroup.GroupID
	Entries     int
	First, Last paxosgroup.Slot
}

func (b *Behind) add(r record) {
	b.Records++
	if r.kind != typeAccept && r.kind != typeLearn {
		return
	}
	b.Entries++
	i, ok := slices.BinarySearchFunc(b.Groups, r.group, func(s GroupSpan, g paxosgroup.GroupID) int { return cmp.Compare(s.Group, g) })
	if !ok {
		b.Groups = slices.Insert(b.Groups, i, GroupSpan{Group: r.group, First: r.slot, Last: r.slot})
	}
	s := &b.Groups[i]
	s.Entries++
	s.First, s.Last = min(s.First, r.slot), max(s.Last, r.slot)
}

// spansShown is how many groups are told of in one line.
const spansShown = 5

// String tells it in one line.
func (b Behind) String() string {
	if b.Records == 0 {
		return "nothing can be read behind it"
	}
	text := fmt.Sprintf("readable behind it: batches %d, records %d, entries %d", b.Batches, b.Records, b.Entries)
	var spans []string
	for i, s := range b.Groups {
		if i == spansShown {
			spans = append(spans, fmt.Sprintf("%d groups more", len(b.Groups)-i))
			break
		}
		spans = append(spans, fmt.Sprintf("group %d: %d in slots %d to %d", s.Group, s.Entries, s.First, s.Last))
	}
	if len(spans) > 0 {
		text += " (" + strings.Join(spans, ", ") + ")"
	}
	return text
}

// Inspected is one record of the log, as Inspect found it.
type Inspected struct {
	File    string
	Segment uint64
	Offset  int64 // in the file
	Size    int   // of the record's frame, without the stamps between its sectors
	Batch   uint64
	Kind    string // promise, accept, learn, chosen, base, state or seal
	Group   paxosgroup.GroupID
	// Slot is that of accept, learn and chosen, the chosen one of state, and that
	// of the base of base.
	Slot paxosgroup.Slot
	// Ballot is that of promise, accept and learn, and the promised one of base and
	// state.
	Ballot paxosgroup.Ballot
	Entry  paxosgroup.Entry // of accept and learn. Its payload is good until the next record
	Base   *paxosgroup.Base // of base and state
	Behind bool             // it lies behind damage: a start would not take it
}

var recordNames = map[recordType]string{
	typePromise: "promise", typeAccept: "accept", typeLearn: "learn", typeChosen: "chosen",
	typeBase: "base", typeState: "state", typeSeal: "seal",
}

// ErrNoLog says that a directory holds no segment.
var ErrNoLog = errors.New("there is no slot log")

// Inspect reads the log in dir as a start would, changes nothing, and hands its
// records to visit (unless nil) in the order in which they were written; behind
// damage, those that can still be read. Damage and a torn write are told in the
// report, not by the error. That one is ErrLocked while another process has the
// log open, ErrNoLog where there is none, *VersionError, that of visit, or one of
// the file system. A segment is held in memory at a time.
func Inspect(dir string, visit func(Inspected) error) (Report, error) {
	lock, err := lockShared(dir)
	if err != nil {
		return Report{Dir: dir}, err
	}
	report, err := inspect(osFS{}, dir, visit)
	if lock != nil {
		err = errors.Join(err, lock.Close())
	}
	return report, err
}

// lockShared keeps a sidecar out while the log is read, and creates no file.
func lockShared(dir string) (io.Closer, error) {
	f, err := os.Open(filepath.Join(dir, lockName))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil // a copy, or nobody ever opened it
	case err != nil:
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("slot log in %s: a running sidecar uses it (stop it first, or look at a copy): %w", dir, ErrLocked)
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// inspect is Inspect without the lock.
func inspect(files FS, dir string, visit func(Inspected) error) (Report, error) {
	in := &inspection{
		report: Report{Dir: dir}, visit: visit,
		rec: recovery{dir: dir, log: &Log{groups: make(map[paxosgroup.GroupID]*group)}, votes: make(map[paxosgroup.GroupID]*votes)},
	}
	names, err := files.ReadDir(dir)
	if err != nil {
		return in.report, err
	}
	sequences := sequencesOf(names)
	if len(sequences) == 0 {
		return in.report, fmt.Errorf("%w in %s (no file there is named as %s)", ErrNoLog, dir, segmentName(1))
	}
	for i, sequence := range sequences {
		if i > 0 && sequence != sequences[i-1]+1 {
			in.damaged(missing(sequences[i-1] + 1))
		}
		if err := in.segment(files, sequence, i == len(sequences)-1); err != nil {
			return in.report, err
		}
	}
	return in.report, in.finish()
}

// inspection is the state of one Inspect.
type inspection struct {
	report Report
	visit  func(Inspected) error
	rec    recovery // fed up to the first damage
	number uint64   // of the next batch; 1: not known
	taken  int64    // offset of the last record of the segment that was taken in
}

// visitError is what visit returned, which is no fault of the log.
type visitError struct{ error }

// damaged notes damage, and returns it.
func (in *inspection) damaged(c *CorruptError) *CorruptError {
	c.Behind = new(Behind)
	in.report.Damage = append(in.report.Damage, c)
	in.number = 1
	return c
}

func (in *inspection) segment(files FS, sequence uint64, last bool) error {
	name := segmentName(sequence)
	f, err := files.OpenFile(filepath.Join(in.rec.dir, name), os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	b, err := in.rec.read(f, name)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	in.report.Segments++
	in.report.Bytes += int64(len(b))
	seg := &segment{sequence: sequence, size: int64(len(b))}
	if l := in.rec.log; len(in.report.Damage) == 0 {
		l.segments = append(l.segments, seg)
	}
	in.taken = 0
	batch := uint64(0)
	found, err := scanSegment(b, name, sequence, last, max(1, in.number), func(h batchHeader, r placedRecord) error {
		first := h.number != batch
		batch = h.number
		if len(in.report.Damage) > 0 {
			if first {
				in.batchBehind()
			}
			return in.readBehind(name, sequence, h, r)
		}
		if err := in.rec.take(seg, r); err != nil {
			return err
		}
		in.report.Records++
		in.taken = r.offset
		if first {
			in.report.Batches++
		}
		return in.show(name, sequence, h, r, false)
	})
	for id, v := range in.rec.votes {
		v.own(in.rec.log.groups[id].state.chosen)
	}
	if v, ok := errors.AsType[visitError](err); ok {
		return v.error
	}
	if c, ok := errors.AsType[*CorruptError](err); ok {
		in.damaged(c)
		return in.survey(b, found, name, sequence)
	}
	if err != nil {
		return err
	}
	in.number = found.header.number + 1
	if found.torn > 0 {
		in.report.Torn = &TornWrite{File: name, Offset: position(found.end), Bytes: int64(found.torn) * sectorBytes}
	}
	return nil
}

// show hands a record to visit.
func (in *inspection) show(name string, sequence uint64, h batchHeader, r placedRecord, behind bool) error {
	if in.visit == nil {
		return nil
	}
	i := Inspected{
		File: name, Segment: sequence, Offset: position(r.offset), Size: r.size, Batch: h.number, Kind: recordNames[r.kind],
		Group: r.group, Slot: r.slot, Ballot: r.ballot, Entry: r.entry, Behind: behind,
	}
	if r.kind == typeBase || r.kind == typeState {
		i.Base = &r.base
	}
	if r.kind == typeBase {
		i.Slot = r.base.Slot
	}
	if err := in.visit(i); err != nil {
		return visitError{err}
	}
	return nil
}

// readBehind counts a record behind all the damage so far.
func (in *inspection) readBehind(name string, sequence uint64, h batchHeader, r placedRecord) error {
	for _, c := range in.report.Damage {
		c.Behind.add(r.record)
	}
	return in.show(name, sequence, h, r, true)
}

func (in *inspection) batchBehind() {
	for _, c := range in.report.Damage {
		c.Behind.Batches++
	}
}

// survey reads what can be read of a segment from the damage on, which scan found
// and the last of the report is.
func (in *inspection) survey(b []byte, found scan, name string, sequence uint64) error {
	if found.data == nil {
		found.states, found.data = examine(b, sequence)
	}
	for at := found.end; at < int64(len(found.data)); {
		h, ok := readBatchHeader(found.data[at:], sequence, at)
		if !ok || found.header.number != 0 && h.number <= found.header.number {
			at += sectorData
			continue
		}
		end := at + batchHeaderBytes + int64(h.length)
		records := salvage(found.data[at:end], sequence, at)
		for _, r := range records {
			if r.offset <= in.taken {
				continue
			}
			if err := in.readBehind(name, sequence, h, r); err != nil {
				return errors.Unwrap(err)
			}
		}
		if len(records) == int(h.records) {
			in.batchBehind()
		}
		at = nextSector(end)
	}
	return nil
}

// salvageBytesMax bounds how much is looked at to find the next record where the
// length of one is damaged, as a multiple of the batch.
const salvageBytesMax = 16

// salvage returns the records of a batch, which stands at offset, that can be
// read, whatever became of those between.
func salvage(b []byte, sequence uint64, offset int64) (records []placedRecord) {
	budget := salvageBytesMax * len(b)
	for at := batchHeaderBytes; at+recordHeaderBytes <= len(b) && budget > 0; {
		// Cheaper than a checksum, and most bytes do not pass it.
		if _, ok := recordNames[recordType(b[at+8])]; !ok || b[at+9]|b[at+10]|b[at+11] != 0 {
			at++
			continue
		}
		size := recordHeaderBytes + int(binary.LittleEndian.Uint32(b[at:]))
		if size > len(b)-at {
			at++
			continue
		}
		r, err := decodeRecord(b[at:], sequence, offset+int64(at))
		if err != nil {
			budget -= size
			at++
			continue
		}
		records = append(records, placedRecord{r, offset + int64(at)})
		at += r.size
	}
	return records
}

// finish checks what takes the whole log, and sums up.
func (in *inspection) finish() error {
	if len(in.report.Damage) == 0 {
		_, err := in.rec.restored()
		if c, ok := errors.AsType[*CorruptError](err); ok {
			in.damaged(c)
		} else if err != nil {
			return err
		}
	}
	for _, id := range slices.Sorted(maps.Keys(in.rec.log.groups)) {
		gr := in.rec.log.groups[id]
		g := GroupReport{Group: id, Promised: gr.state.promised, Base: gr.state.base.Slot, Chosen: gr.state.chosen, Last: gr.index.last}
		gr.index.each(func(_ paxosgroup.Slot, at location) bool {
			g.Entries++
			g.Bytes += int64(at.size)
			return true
		})
		in.report.Groups = append(in.report.Groups, g)
	}
	return nil
}

// explain adds to the error of a start what lies behind the damage.
func explain(err error, files FS, dir string) error {
	c, ok := errors.AsType[*CorruptError](err)
	if !ok || c.Behind != nil {
		return err
	}
	report, inspectErr := inspect(files, dir, nil)
	for _, d := range report.Damage {
		// Not having read it all, it knows less than it would tell.
		if inspectErr == nil && d.File == c.File && d.Offset == c.Offset {
			c.Behind = d.Behind
		}
	}
	return err
}

// sequencesOf returns the sequence numbers of the segments among names, ascending.
func sequencesOf(names []string) (sequences []uint64) {
	for _, name := range names {
		if sequence, ok := parseSegmentName(name); ok {
			sequences = append(sequences, sequence)
		}
	}
	slices.Sort(sequences)
	return sequences
}

func missing(sequence uint64) *CorruptError {
	return &CorruptError{File: segmentName(sequence), What: "the file is missing"}
}
