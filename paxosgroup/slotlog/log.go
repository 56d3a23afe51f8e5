package slotlog

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"quorate/paxosgroup"
)

// Config says where and how a log is kept.
type Config struct {
	Dir          string
	SegmentBytes int64 // length of a segment, rounded up to whole sectors; 0 means 64 MiB
	// QueueBytesMax is how much may wait for the disk before Crowded asks for no
	// more. 0 means 64 MiB.
	QueueBytesMax int
	Logger        *slog.Logger // nil discards
	FS            FS           // nil is the operating system's
	// RetryInterval is how long a log that found no room waits before it looks
	// again. 0 means 1 s.
	RetryInterval time.Duration
	// Manual leaves the log without goroutines: its owner calls Flush. With an FS that does the same each time, so does the log.
	Manual bool
}

const (
	segmentBytesDefault = 64 << 20
	segmentBytesMin     = 4 << 10
	segmentBytesMax     = 2 << 30
	queueBytesDefault   = 64 << 20
	// lazyBytesMax is how much of records that nobody waits for may gather
	// before they are written on their own account.
	lazyBytesMax = 1 << 20
	// reserveShare is the part of a segment that is left when Full is told.
	reserveShare = 8
)

func (c *Config) fill() error {
	if c.Dir == "" {
		return errors.New("slot log: no directory given")
	}
	if c.SegmentBytes == 0 {
		c.SegmentBytes = segmentBytesDefault
	}
	if c.SegmentBytes < segmentBytesMin || c.SegmentBytes > segmentBytesMax {
		return fmt.Errorf("slot log: segments of %d bytes (want %d to %d)", c.SegmentBytes, segmentBytesMin, segmentBytesMax)
	}
	c.SegmentBytes = (c.SegmentBytes + sectorBytes - 1) / sectorBytes * sectorBytes
	if c.RetryInterval == 0 {
		c.RetryInterval = time.Second
	}
	if c.QueueBytesMax == 0 {
		c.QueueBytesMax = queueBytesDefault
	}
	if c.FS == nil {
		c.FS = osFS{}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Stats counts since Open.
type Stats struct {
	Flushes  uint64 // fdatasync calls that made records durable
	Batches  uint64 // writes
	Appends  uint64 // calls of Append
	Records  uint64
	Bytes    uint64 // written, framing included
	Cleaned  uint64 // bytes written anew to free old segments
	Segments int    // files now
	Queued   int    // bytes that wait for the disk now
}

// Log is an open log. Its methods may be called from any goroutine.
type Log struct {
	cfg  Config
	lock io.Closer

	// files keeps segment files open while they are read. Taken before mu.
	files sync.RWMutex

	mu       sync.Mutex
	err      error // why nothing is written any more
	closed   bool
	groups   map[paxosgroup.GroupID]*group
	missed   map[paxosgroup.GroupID]paxosgroup.Slot // from which on entries are not known to be the newest: the log has failed
	segments []*segment                             // consecutive; Append fills the last
	offset   int64                                  // where the next batch of the last segment begins
	number   uint64                                 // of the next batch
	queue    []*batch                               // sealed, oldest first, those being written included
	building *batch                                 // nil, or open for more
	queued   int                                    // bytes in queue and building
	spare    [][]byte                               // buffers of flushed batches, to be filled again
	stats    Stats

	// What keeps the log from taking more; see Full.
	full      atomic.Bool
	low       atomic.Bool // spareless, for everybody
	crowded   atomic.Bool // see Crowded
	spareless bool        // there is no room for the next segment
	blocked   bool        // what is queued waits for one
	retry     bool        // it is time to look again
	timer     *time.Timer // that says so

	work    chan struct{} // holds a token when the writer has something to do
	stopped chan struct{} // closed when the writer has ended

	// The writer's.
	prepared chan preparedFile // holds the next segment's file, or that there is none
	pool     []preparedFile    // of earlier segments, to be prepared next
	unused   []*segment        // not needed any more, to go to the pool or away, oldest first
	frame    []byte            // a batch as it is written
}

type group struct {
	state state
	index index
}

// Append adds records of a group, in order, and calls durable once they and all
// earlier ones are flushed, or with the error that stopped the log. It does not
// wait for the disk: who appends looks at Crowded before taking what leads to
// records. While the log is Full, it fails for good when twice QueueBytesMax wait.
// Records are seen by readers when Append returns. The payloads are copied.
//
// Callbacks run one at a time, in the order of Append, on the log's goroutine:
// they must not block, nor call Append. Records of which none NeedsFlush cause no
// flush; their callback runs when all before them are flushed.
func (l *Log) Append(g paxosgroup.GroupID, recs []paxosgroup.Record, durable func(error)) {
	size := 0
	flush := false
	var bad error
	for _, r := range recs {
		size += recordHeaderBytes + bodySizeMax(r)
		flush = flush || r.NeedsFlush()
		if err := checkRecord(r); err != nil && bad == nil {
			bad = fmt.Errorf("append to slot log of group %d: %w", g, err)
		}
	}

	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		durable(ErrClosed)
		return
	}
	if bad == nil {
		bad = l.checkReach(g, recs)
	}
	if bad == nil && l.blocked && l.queued+size > 2*l.cfg.QueueBytesMax {
		bad = fmt.Errorf("append to slot log of group %d: %w, and %d bytes wait for it", g, ErrFull, l.queued)
	}
	if bad != nil && l.err == nil {
		// What the core handed out cannot be kept, so nothing may rest on it.
		l.fail(bad)
	}
	if l.err == nil {
		for _, r := range recs {
			l.put(g, r)
		}
		l.stats.Appends++
	} else {
		l.miss(g, recs)
	}
	b := l.open()
	b.callbacks = append(b.callbacks, durable)
	b.flush = b.flush || flush
	l.setFull()
	l.mu.Unlock()
	l.wake()
}

// Full reports whether the disk has no room for the log to grow. Who appends
// should stop taking what leads to records then, as soon as it sees it: what is
// left of the last segment is for what frees room, such as a base. What is in the
// log can be read. It ends by itself when there is room. It costs a load.
func (l *Log) Full() bool { return l.full.Load() }

// Low reports whether the disk has no room for the next segment, so that the log
// will be Full when the last is filled. Who can have others do the appending
// should, while there is room for what is under way. It ends by itself when there
// is room. It costs a load.
func (l *Log) Low() bool { return l.low.Load() }

// Crowded reports whether more than QueueBytesMax wait for the disk, which does
// not keep up or hangs. Who appends should take nothing more that leads to records
// until it ends, rather than wait: what can be done without the disk, goes on. It
// is the same for all groups, and costs a load.
func (l *Log) Crowded(paxosgroup.GroupID) bool { return l.crowded.Load() }

// setFull brings Full, Low and Crowded up to date. Called with mu held.
func (l *Log) setFull() {
	l.low.Store(l.spareless)
	l.crowded.Store(l.queued > l.cfg.QueueBytesMax)
	full := l.blocked
	if l.spareless {
		last, end := l.segments[len(l.segments)-1], l.offset
		if l.building != nil {
			end = l.building.end()
		}
		full = full || capacity(last.size)-end < capacity(l.cfg.SegmentBytes)/reserveShare
	}
	if full != l.full.Load() {
		l.full.Store(full)
		if full {
			l.cfg.Logger.Warn("slot log is full: nothing is accepted until there is room", "dir", l.cfg.Dir)
		} else {
			l.cfg.Logger.Info("slot log has room again", "dir", l.cfg.Dir)
		}
	}
}

// miss notes which slots were handed in after a failure: an older entry that is
// here must not pass for what they hold now. Called with mu held.
func (l *Log) miss(g paxosgroup.GroupID, recs []paxosgroup.Record) {
	for _, r := range recs {
		switch r.Kind {
		case paxosgroup.RecordAccept, paxosgroup.RecordLearn, paxosgroup.RecordBase:
			slot := r.Slot
			if r.Kind == paxosgroup.RecordBase {
				slot = 0
			}
			if at, ok := l.missed[g]; !ok || slot < at {
				if l.missed == nil {
					l.missed = make(map[paxosgroup.GroupID]paxosgroup.Slot)
				}
				l.missed[g] = slot
			}
		}
	}
}

func (l *Log) wake() {
	select {
	case l.work <- struct{}{}:
	default:
	}
}

// checkReach refuses slots that no window explains.
func (l *Log) checkReach(g paxosgroup.GroupID, recs []paxosgroup.Record) error {
	gr := l.groups[g]
	if gr == nil {
		gr = &group{}
	}
	known := max(gr.state.base.Slot, gr.state.chosen, gr.index.last)
	for _, r := range recs {
		switch r.Kind {
		case paxosgroup.RecordBase:
			known = max(known, r.Base.Slot)
		case paxosgroup.RecordAccept, paxosgroup.RecordLearn, paxosgroup.RecordChosen:
			if r.Slot > known+slotsAheadMax {
				return fmt.Errorf("append to slot log of group %d: slot %d is too far above slot %d", g, r.Slot, known)
			}
			known = max(known, r.Slot)
		}
	}
	return nil
}

// open returns the batch that takes the next record. Called with mu held.
func (l *Log) open() *batch {
	if l.building == nil {
		l.building = &batch{seg: l.segments[len(l.segments)-1], offset: l.offset}
	}
	return l.building
}

// put encodes one record and brings the index up to date. Called with mu held.
func (l *Log) put(g paxosgroup.GroupID, r paxosgroup.Record) {
	gr := l.groups[g]
	if gr == nil {
		gr = &group{}
		l.groups[g] = gr
	}
	switch r.Kind {
	case paxosgroup.RecordPromise, paxosgroup.RecordAccept:
		gr.state.promise(r.Ballot)
	case paxosgroup.RecordChosen:
		gr.state.chosen = max(gr.state.chosen, r.Slot)
	case paxosgroup.RecordBase:
		gr.state.promise(r.Ballot)
		gr.state.restart(*r.Base)
	}
	size := bodySizeMax(r)
	b := l.reserve(recordHeaderBytes + size)
	at, frame := b.end(), len(b.buf)
	b.buf = appendRecord(b.buf, b.seg.sequence, at, recordType(r.Kind), g, func(dst []byte) []byte {
		return appendBody(dst, r, gr.state.promised)
	})
	b.records++
	l.queued += len(b.buf) - frame
	l.stats.Records++

	switch r.Kind {
	case paxosgroup.RecordAccept, paxosgroup.RecordLearn:
		if r.Slot > gr.state.base.Slot {
			l.place(gr, b, r.Slot, at, len(b.buf)-frame)
		}
	case paxosgroup.RecordBase:
		gr.index.dropThrough(r.Base.Slot, func(old location) { l.release(b, old) })
	}
}

// place notes that the slot's latest record is at offset at of b. Called with mu
// held.
func (l *Log) place(gr *group, b *batch, slot paxosgroup.Slot, at int64, size int) {
	old := gr.index.set(slot, location{uint32(b.seg.sequence), uint32(at), uint32(size)})
	b.seg.live += int64(size)
	l.release(b, old)
}

// release takes a record off what its segment is needed for once b is flushed:
// until then a crash may need it.
func (l *Log) release(b *batch, old location) {
	if old != (location{}) {
		b.release(l.segment(old.sequence), int64(old.size))
	}
}

func (l *Log) segment(sequence uint32) *segment {
	return l.segments[uint64(sequence)-l.segments[0].sequence]
}

// reserve returns the open batch with room for size bytes in its segment,
// having begun a new segment if the last has none. Called with mu held.
func (l *Log) reserve(size int) *batch {
	b := l.open()
	if len(b.buf) == 0 {
		b.buf = l.buffer()
		l.queued += batchHeaderBytes
	}
	// The seal may have to begin a sector of its own.
	if nextSector(b.end()+int64(size))+sealBytes <= capacity(b.seg.size) {
		return b
	}
	// The seal says that nothing follows, so that a file which lost its end shows.
	frame := len(b.buf)
	b.buf = appendRecord(b.buf, b.seg.sequence, b.end(), typeSeal, 0, nil)
	b.records++
	l.queued += len(b.buf) - frame
	l.seal()
	return l.begin(size)
}

// begin starts a segment behind the last, which is sealed, with room for size
// bytes, and returns its first batch, which holds the state of every group.
// Called with mu held.
func (l *Log) begin(size int) *batch {
	next := &segment{sequence: l.segments[len(l.segments)-1].sequence + 1}
	stateBytes := 0
	for _, gr := range l.groups {
		stateBytes += recordHeaderBytes + stateSize(gr.state)
	}
	// The header, the batch and a seal, each with what is left of its sector.
	sectors := (batchHeaderBytes+stateBytes+size)/sectorData + 3
	next.size = max(l.cfg.SegmentBytes, int64(sectors)*sectorBytes)
	l.segments = append(l.segments, next)
	l.offset = sectorData
	return l.putStates()
}

// putStates makes the first batch of a segment. Called with mu held.
func (l *Log) putStates() *batch {
	b := l.open()
	b.buf = l.buffer()
	b.flush = true
	for _, g := range slices.Sorted(maps.Keys(l.groups)) {
		gr := l.groups[g]
		b.buf = appendRecord(b.buf, b.seg.sequence, b.end(), typeState, g, func(dst []byte) []byte {
			return appendState(dst, gr.state)
		})
		b.records++
	}
	l.queued += len(b.buf)
	return b
}

const (
	spareBuffersMax = 4
	spareBytesMax   = 4 << 20 // of one
)

// buffer returns one with room for a batch's header. Called with mu held.
func (l *Log) buffer() []byte {
	if n := len(l.spare); n > 0 {
		b := l.spare[n-1][:batchHeaderBytes]
		l.spare = l.spare[:n-1]
		clear(b)
		return b
	}
	return make([]byte, batchHeaderBytes, 16<<10)
}

// recycle keeps the buffer of a flushed batch. Readers copy out of it with mu
// held, and no longer find it. Called with mu held.
func (l *Log) recycle(b *batch) {
	if len(l.spare) < spareBuffersMax && cap(b.buf) >= batchHeaderBytes && cap(b.buf) <= spareBytesMax {
		l.spare = append(l.spare, b.buf)
	}
	b.buf = nil
}

// seal closes the open batch and queues it. Called with mu held.
func (l *Log) seal() {
	b := l.building
	l.building = nil
	if len(b.buf) > 0 {
		b.seal(l.number)
		l.number++
		l.offset = nextSector(b.end())
	}
	l.queue = append(l.queue, b)
}

// fail stops the log for good. Called with mu held.
func (l *Log) fail(err error) {
	if l.err == nil {
		l.err = err
		l.cfg.Logger.Error("slot log stops: this replica answers nothing until it is restarted", "dir", l.cfg.Dir, "err", err)
	}
}

// Err returns the error that stopped the log for good, or nil.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Stats returns the counters.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	s.Segments = len(l.segments)
	s.Queued = l.queued
	return s
}

// Close flushes what was appended, calls the callbacks and releases the
// directory. It returns the error that stopped the log, if one did.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		<-l.stopped
		return nil
	}
	l.closed = true
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	if l.cfg.Manual {
		for l.Flush() {
		}
		close(l.stopped)
	}
	l.wake()
	<-l.stopped

	l.files.Lock()
	defer l.files.Unlock()
	errs := []error{l.err}
	if p := <-l.prepared; p.file != nil {
		if errs = append(errs, p.file.Close()); p.name == preparedName {
			errs = append(errs, l.cfg.FS.Remove(filepath.Join(l.cfg.Dir, p.name)))
		}
	}
	for _, p := range l.pool {
		errs = append(errs, p.file.Close())
	}
	for _, s := range append(l.unused, l.segments...) {
		if s.file != nil {
			errs = append(errs, s.file.Close())
			s.file = nil
		}
	}
	errs = append(errs, l.lock.Close())
	return errors.Join(errs...)
}
