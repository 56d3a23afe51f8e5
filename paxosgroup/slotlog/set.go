package slotlog

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"quorate/paxosgroup"
)

// SetConfig says where a set of logs is kept.
type SetConfig struct {
	// Config is that of each log; Dir is not used, and QueueBytesMax holds for each.
	Config
	// Dirs are the directories, in an order that decides where new groups go when
	// several have equally few. A directory that is not of the set yet is added.
	Dirs []string
	// Draw returns a number that no other set has; nil draws it at random.
	Draw func() uint64
}

const setDirsMax = 64

// Set is several logs in directories of their own, on different disks: each group
// lives in one, and the loss of one stops only its groups. Its methods may be
// called from any goroutine.
//
// Which group lives where is on the disk in every directory before the group's
// first record is written anywhere. So any one directory that is left tells which
// groups lived in those that are lost, and none of them is ever begun anew. In
// return new groups are begun only while all directories are there.
type Set struct {
	cfg   Config
	parts []*part // as configured

	where atomic.Pointer[map[paxosgroup.GroupID]*part]

	placing sync.Mutex // held while files are written
	record  *setRecord // as it is in all files; but for the generation, which is the highest ever tried
}

// part is one directory of a set.
type part struct {
	path   string
	number uint32
	record *setRecord // as found at start; nil if there was none
	log    *Log       // nil if the directory was lost at start
	lost   error      // then: why

	lock     io.Closer // until the log has it
	restored map[paxosgroup.GroupID]paxosgroup.Restored
}

// LostError says that the directory in which a group lives is lost, or that its
// log has stopped. The group is not to be run: it could deny what it promised.
type LostError struct {
	Dir string
	Err error
}

func (e *LostError) Error() string {
	return fmt.Sprintf("log directory %s is lost: %v (its groups are stopped here, others go on: mount it, or put its files back, and restart; "+
		"if it is gone for good, move data_dir and all of log.dirs away, not this one alone, and start again, and the region joins as a new replica)", e.Dir, e.Err)
}

func (e *LostError) Unwrap() error { return e.Err }

// OpenSet opens the logs of all directories and returns what they hold for each
// group. Directories that hold nothing are made a set. In one that exists, a
// directory that is missing or cannot be read stops only the groups that live
// there, of which Lost tells; an error is returned if none can be read, if a
// group is found where it does not belong, if a directory that holds groups is
// not named any more, or as by Open if another process uses one.
func OpenSet(cfg SetConfig) (*Set, map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	if len(cfg.Dirs) == 0 || len(cfg.Dirs) > setDirsMax {
		return nil, nil, fmt.Errorf("slot log: %d directories (want 1 to %d)", len(cfg.Dirs), setDirsMax)
	}
	cfg.Dir = cfg.Dirs[0]
	if err := cfg.fill(); err != nil {
		return nil, nil, err
	}
	if cfg.Draw == nil {
		cfg.Draw = func() uint64 {
			var b [8]byte
			rand.Read(b[:]) // never fails
			return binary.LittleEndian.Uint64(b[:])
		}
	}
	s := &Set{cfg: cfg.Config}
	for i, dir := range cfg.Dirs {
		dir = filepath.Clean(dir)
		if len(dir) > setPathBytesMax || slices.ContainsFunc(s.parts, func(p *part) bool { return p.path == dir }) {
			return nil, nil, fmt.Errorf("slot log: directory %q (number %d) is named twice, or its name is too long", dir, i+1)
		}
		s.parts = append(s.parts, &part{path: dir})
	}
	restored, err := s.load(cfg.Draw)
	if err != nil {
		errs := []error{fmt.Errorf("open slot log: %w", err)}
		for _, p := range s.parts {
			errs = append(errs, p.close())
		}
		return nil, nil, errors.Join(errs...)
	}
	return s, restored, nil
}

func (p *part) close() error {
	switch {
	case p.log != nil:
		return p.log.Close()
	case p.lock != nil:
		return p.lock.Close()
	}
	return nil
}

func (s *Set) load(draw func() uint64) (map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	for _, p := range s.parts {
		if err := p.find(s.cfg.FS); err != nil {
			return nil, err
		}
	}
	newest, err := s.newest()
	if err != nil {
		return nil, err
	}
	fresh := newest == nil
	if fresh {
		newest = &setRecord{id: draw(), next: 1, groups: map[paxosgroup.GroupID]uint32{}}
	}
	s.record = newest.clone()
	changed, err := s.enroll()
	if err != nil {
		return nil, err
	}
	if err := s.open(); err != nil {
		return nil, err
	}
	restored, err := s.gather(fresh)
	if err != nil {
		return nil, err
	}
	unready := func(d setDir) bool { return !d.ready }
	switch lost := s.firstLost(); {
	case lost == nil && changed:
		s.record.generation++
	case lost == nil:
	case s.record.next != newest.next:
		return nil, fmt.Errorf("a log directory is new, and another one is lost: %w (add the new one when all others are there)", lost)
	default:
		s.record = newest.clone() // what has changed is found again when all are there
	}
	if err := s.writeRecord(); err != nil {
		return nil, err
	}
	if s.firstLost() == nil && slices.ContainsFunc(s.record.dirs, unready) {
		// All have the file now: whoever lacks it from here on has lost it.
		for i := range s.record.dirs {
			s.record.dirs[i].ready = true
		}
		s.record.generation++
		if err := s.writeRecord(); err != nil {
			return nil, err
		}
	}
	where := make(map[paxosgroup.GroupID]*part)
	for g, number := range s.record.groups {
		where[g] = s.parts[slices.IndexFunc(s.parts, func(p *part) bool { return p.number == number })]
	}
	s.where.Store(&where)
	for _, p := range s.parts {
		if p.lost != nil {
			s.cfg.Logger.Error("a directory of the slot log is lost; its groups are stopped, others go on",
				"dir", p.path, "groups", s.record.groupsOf(p.number), "err", p.lost)
		}
	}
	return restored, nil
}

// writeRecord writes the record where it is not yet: first where groups live, so
// that a log which was alone until now never lacks it once another has it.
func (s *Set) writeRecord() error {
	for _, inhabited := range []bool{true, false} {
		for _, p := range s.parts {
			behind := p.log != nil && (p.record == nil || p.record.generation != s.record.generation)
			if behind && inhabited == (len(s.record.groupsOf(p.number)) > 0) {
				if err := writeSet(s.cfg.FS, p.path, s.record, p.number); err != nil {
					return err
				}
				p.record = s.record.clone()
			}
		}
	}
	return nil
}

// find looks for what the directory's file says, and locks it if there is one.
func (p *part) find(files FS) error {
	_, err := readSet(files, p.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if p.lock, err = lockDir(files, p.path); errors.Is(err, ErrLocked) {
		return err
	}
	if err == nil {
		p.record, err = readSet(files, p.path) // another process may just have ended
	}
	if err == nil {
		p.number = p.record.own
		var names []string
		if names, err = files.ReadDir(p.path); err == nil {
			var sequences []uint64
			if sequences, err = segmentsOf(names); err == nil && len(sequences) == 0 {
				err = errors.New("the files of the log are gone")
			}
		}
	}
	p.lost = err
	return nil
}

// newest returns the newest record of what was found, nil if there is none.
func (s *Set) newest() (*setRecord, error) {
	var newest *setRecord
	var lost []error
	for i, p := range s.parts {
		if p.lost != nil {
			lost = append(lost, &LostError{p.path, p.lost})
		}
		if p.record == nil {
			continue
		}
		for _, q := range s.parts[:i] {
			if q.record == nil {
				continue
			}
			if q.record.id != p.record.id {
				return nil, fmt.Errorf("%s and %s belong to different sets (name the directories of one)", q.path, p.path)
			}
			if q.number == p.number {
				return nil, fmt.Errorf("%s and %s are the same directory of the set: one is a copy (name the one that was used last)", q.path, p.path)
			}
		}
		if newest == nil || p.record.generation > newest.generation {
			newest = p.record
		}
	}
	if newest == nil && len(lost) > 0 {
		return nil, errors.Join(lost...)
	}
	return newest, nil
}

// enroll gives the parts that say nothing themselves their numbers, and takes into
// the record what the configuration has changed, of which it reports whether
// there is any.
func (s *Set) enroll() (changed bool, err error) {
	before := s.record.dirs
	s.record.dirs = nil
	for _, p := range s.parts {
		known := func(d setDir) bool { return d.number == p.number }
		if p.record == nil {
			known = func(d setDir) bool {
				return d.path == p.path && !slices.ContainsFunc(s.parts, func(q *part) bool { return q.record != nil && q.number == d.number })
			}
		}
		d := setDir{path: p.path}
		if i := slices.IndexFunc(before, known); i >= 0 {
			d.number, d.ready = before[i].number, before[i].ready
		}
		switch {
		case d.number == 0 && p.record != nil:
			return false, fmt.Errorf("%s was taken out of the set before (name another directory, or empty this one, if that is certain)", p.path)
		case d.number == 0 && p.lost != nil:
			return false, &LostError{p.path, p.lost}
		case d.ready && p.record == nil && p.lost == nil:
			p.lost = fmt.Errorf("it has no file %s: it is empty, or not mounted", setName)
		case d.number == 0, p.record == nil && p.lost == nil:
			// A number of its own even where one was given in vain: what has that one
			// may turn up again, with less in it.
			d.number = s.record.next
			s.record.next++
		}
		p.number = d.number
		s.record.dirs = append(s.record.dirs, d)
	}
	for _, d := range before {
		if slices.ContainsFunc(s.parts, func(p *part) bool { return p.number == d.number }) {
			continue
		}
		if in := s.record.groupsOf(d.number); len(in) > 0 {
			return false, fmt.Errorf("log directory %s is not named any more, and groups %v live there (name it, in log.dirs)", d.path, in)
		}
	}
	return !slices.Equal(before, s.record.dirs), nil
}

// firstLost says why one of the directories is not there, or returns nil.
func (s *Set) firstLost() error {
	for _, p := range s.parts {
		if err := p.failed(); err != nil {
			return err
		}
	}
	return nil
}

// failed returns a *LostError if the part does not work, or nil.
func (p *part) failed() error {
	err := p.lost
	if p.log != nil {
		err = p.log.Err()
	}
	if err == nil {
		return nil
	}
	return &LostError{p.path, err}
}

// open opens the logs of all parts that are not lost, at once where they have
// disks of their own and nobody minds the order.
func (s *Set) open() error {
	refused := make([]error, len(s.parts))
	var opening sync.WaitGroup
	for i, p := range s.parts {
		if p.lost != nil {
			if p.lock != nil {
				refused[i] = p.lock.Close()
				p.lock = nil
			}
			continue
		}
		if s.cfg.Manual {
			refused[i] = s.openPart(p)
			continue
		}
		opening.Go(func() { refused[i] = s.openPart(p) })
	}
	opening.Wait()
	if err := errors.Join(refused...); err != nil {
		return err
	}
	var lost []error
	for _, p := range s.parts {
		lost = append(lost, p.failed())
	}
	if !slices.Contains(lost, nil) {
		return errors.Join(lost...)
	}
	return nil
}

func (s *Set) openPart(p *part) error {
	cfg := s.cfg
	cfg.Dir = p.path
	if p.record == nil {
		if err := cfg.FS.MkdirAll(p.path, 0o700); err != nil {
			return fmt.Errorf("create directory of slot log: %w", full(err))
		}
		var err error
		if p.lock, err = lockDir(cfg.FS, p.path); err != nil {
			return err
		}
		if err := refuseSet(cfg.FS, p.path); err != nil {
			return err // made by another process just now
		}
	}
	lock := p.lock
	p.lock = nil // which the log has now
	var err error
	p.log, p.restored, err = openLocked(cfg, lock)
	if err != nil && p.record == nil {
		return err // nothing rests on it yet
	}
	p.lost = err
	return nil
}

// gather returns what all parts hold, if it is where it belongs.
func (s *Set) gather(fresh bool) (map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	restored := make(map[paxosgroup.GroupID]paxosgroup.Restored)
	adopted := ""
	for _, p := range s.parts {
		if fresh && len(p.restored) > 0 {
			if adopted != "" {
				return nil, fmt.Errorf("%s and %s each hold a log of their own, and at most one can be made part of a set", adopted, p.path)
			}
			adopted = p.path
		}
		for _, g := range slices.Sorted(maps.Keys(p.restored)) {
			number, known := s.record.groups[g]
			switch {
			case fresh: // a log that was alone until now
				s.record.groups[g] = p.number
			case !known:
				return nil, fmt.Errorf("%s holds group %d, which does not live there (name the directories in log.dirs that were used last)", p.path, g)
			case number != p.number:
				return nil, fmt.Errorf("%s holds group %d, which lives in another directory (move away the one that is a copy)", p.path, g)
			}
			restored[g] = p.restored[g]
		}
		p.restored = nil
	}
	return restored, nil
}

// Place sees to it that each of the groups has a directory to live in: where it
// lives already, or else the one with the fewest groups. It writes and flushes a
// file in every directory for those that are new, and returns an error if one of
// the groups cannot be run: a *LostError if its directory is lost, or because any
// is lost and the group is new. It is called before anything else is asked for a
// group; Append does it otherwise, and then it may block.
func (s *Set) Place(groups ...paxosgroup.GroupID) error {
	var errs []error
	unplaced := false
	where := *s.where.Load()
	for _, g := range groups {
		if p := where[g]; p == nil {
			unplaced = true
		} else if err := p.failed(); err != nil {
			errs = append(errs, fmt.Errorf("group %d: %w", g, err))
		}
	}
	if unplaced {
		if err := s.placeNew(groups); err != nil {
			errs = append(errs, fmt.Errorf("begin groups in the slot log: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (s *Set) placeNew(groups []paxosgroup.GroupID) error {
	s.placing.Lock()
	defer s.placing.Unlock()
	if err := s.firstLost(); err != nil {
		return fmt.Errorf("a new group is begun only when all directories are there, so that each tells of it: %w", err)
	}
	where := maps.Clone(*s.where.Load())
	count := make(map[*part]int)
	for _, p := range where {
		count[p]++
	}
	next := s.record.clone()
	for _, g := range groups {
		if where[g] != nil {
			continue
		}
		emptiest := slices.MinFunc(s.parts, func(a, b *part) int { return count[a] - count[b] })
		count[emptiest]++
		where[g], next.groups[g] = emptiest, emptiest.number
	}
	// Each try has a generation of its own: one that fails half way is less than
	// the next, and nothing was written for its groups.
	s.record.generation++
	next.generation = s.record.generation
	for _, p := range s.parts {
		if err := writeSet(s.cfg.FS, p.path, next, p.number); err != nil {
			return err
		}
	}
	s.record = next
	s.where.Store(&where)
	return nil
}

// part returns where a group lives, nil if nowhere yet.
func (s *Set) part(g paxosgroup.GroupID) *part { return (*s.where.Load())[g] }

// Append is Log.Append in the directory that the group lives in: callbacks of one
// directory run one at a time, in the order of Append, those of several at once.
// A group that cannot be kept gets the error of Place.
func (s *Set) Append(g paxosgroup.GroupID, recs []paxosgroup.Record, durable func(error)) {
	p := s.part(g)
	if p == nil {
		if err := s.Place(g); err != nil {
			durable(err)
			return
		}
		p = s.part(g)
	}
	if p.log == nil {
		durable(p.failed())
		return
	}
	p.log.Append(g, recs, durable)
}

// Group returns a reader of the group's entries. Of a group whose directory was
// lost at start it reads nothing but a *LostError.
func (s *Set) Group(g paxosgroup.GroupID) paxosgroup.Storage { return setStorage{s, g} }

type setStorage struct {
	set   *Set
	group paxosgroup.GroupID
}

func (r setStorage) Chosen(from, to paxosgroup.Slot, maxBytes int) ([]paxosgroup.SlotEntry, error) {
	p := r.set.part(r.group)
	switch {
	case p == nil:
		return nil, nil
	case p.log == nil:
		return nil, fmt.Errorf("read slot %d of group %d: %w", from, r.group, p.failed())
	}
	return p.log.Group(r.group).Chosen(from, to, maxBytes)
}

// Lost returns a *LostError if the directory that the group lives in was lost or
// has stopped, else nil.
func (s *Set) Lost(g paxosgroup.GroupID) error {
	if p := s.part(g); p != nil {
		return p.failed()
	}
	return nil
}

// Full reports whether any of the disks has no room for its log to grow; see
// Log.Full.
func (s *Set) Full() bool {
	return slices.ContainsFunc(s.parts, func(p *part) bool { return p.log != nil && p.log.Full() })
}

// FullFor is Full of the disk that the group lives on.
func (s *Set) FullFor(g paxosgroup.GroupID) bool {
	p := s.part(g)
	return p != nil && p.log != nil && p.log.Full()
}

// LowFor is Low of the disk that the group lives on.
func (s *Set) LowFor(g paxosgroup.GroupID) bool {
	p := s.part(g)
	return p != nil && p.log != nil && p.log.Low()
}

// Crowded reports whether too much waits for the disk that the group lives on;
// see Log.Crowded.
func (s *Set) Crowded(g paxosgroup.GroupID) bool {
	p := s.part(g)
	return p != nil && p.log != nil && p.log.Crowded(g)
}

// Flush is Log.Flush of each, in order.
func (s *Set) Flush() bool {
	did := false
	for _, p := range s.parts {
		did = p.log != nil && p.log.Flush() || did
	}
	return did
}

// Stats returns the sums of the counters.
func (s *Set) Stats() Stats {
	var sum Stats
	for _, p := range s.parts {
		if p.log == nil {
			continue
		}
		one := p.log.Stats()
		sum.Flushes += one.Flushes
		sum.Batches += one.Batches
		sum.Appends += one.Appends
		sum.Records += one.Records
		sum.Bytes += one.Bytes
		sum.Cleaned += one.Cleaned
		sum.Segments += one.Segments
		sum.Queued += one.Queued
	}
	return sum
}

// Close closes the logs, as Log.Close does. It returns the errors that stopped
// any.
func (s *Set) Close() error {
	var errs []error
	for _, p := range s.parts {
		errs = append(errs, p.close())
	}
	return errors.Join(errs...)
}
