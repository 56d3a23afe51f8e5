package slotlog

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// write is the log's goroutine: it writes and flushes what has gathered while
// it was flushing, then calls the callbacks.
func (l *Log) write() {
	defer close(l.stopped)
	for range l.work {
		for {
			did, closing := l.turn()
			if !did && closing {
				return
			}
			if !did {
				break
			}
		}
	}
}

// Flush does what the log's goroutine does in one turn, for an owner who chose
// Config.Manual: it writes and flushes what has gathered, calls the callbacks and
// reports whether there was anything. It must not be called from a callback, nor
// by two goroutines at once.
func (l *Log) Flush() bool {
	if !l.cfg.Manual {
		panic("slotlog: Flush of a log that has a goroutine for it")
	}
	did, _ := l.turn()
	return did
}

// turn flushes once and reports whether there was anything to do.
func (l *Log) turn() (did, closing bool) {
	batches, callbacks, closing := l.take()
	if len(batches) > 0 {
		l.flush(batches)
	}
	for _, durable := range callbacks {
		l.mu.Lock()
		err := l.err
		l.mu.Unlock()
		durable(err)
	}
	return len(batches) > 0 || len(callbacks) > 0, closing
}

// take returns the batches to flush now, and callbacks that wait for nothing
// but these.
func (l *Log) take() (batches []*batch, callbacks []func(error), closing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b := l.building; b != nil {
		switch {
		case b.flush || len(b.buf) > lazyBytesMax || l.closed || l.err != nil:
			l.seal()
		default:
			callbacks, b.callbacks = b.callbacks, nil
		}
	}
	return append(batches, l.queue...), callbacks, l.closed
}

// flush makes the batches durable and calls their callbacks.
func (l *Log) flush(batches []*batch) {
	l.mu.Lock()
	err := l.err
	l.mu.Unlock()
	if err == nil {
		if err = l.writeBatches(batches); err != nil {
			l.mu.Lock()
			l.fail(err)
			l.mu.Unlock()
		}
	}

	l.mu.Lock()
	l.queue = l.queue[len(batches):]
	if len(l.queue) == 0 {
		l.queue = nil
	}
	for _, b := range batches {
		l.queued -= len(b.buf)
		if err == nil {
			for s, n := range b.released {
				s.entries -= n
			}
			l.recycle(b)
		}
	}
	if err == nil {
		l.unused = append(l.unused, l.detachUnused(batches[len(batches)-1].seg)...)
	}
	l.room.Broadcast()
	l.mu.Unlock()

	// Callbacks first: deleting files can wait, commits cannot.
	for _, b := range batches {
		for _, durable := range b.callbacks {
			durable(err)
		}
	}
	if err := l.remove(); err != nil {
		l.cfg.Logger.Warn("slot log keeps a segment it does not need", "dir", l.cfg.Dir, "err", err)
	}
}

// writeBatches writes batches in order. A segment is flushed before its
// successor is begun.
func (l *Log) writeBatches(batches []*batch) error {
	var dirty *segment
	for _, b := range batches {
		if len(b.buf) == 0 {
			continue
		}
		if dirty != nil && dirty != b.seg {
			if err := l.sync(dirty); err != nil {
				return err
			}
		}
		if b.seg.file == nil {
			if err := l.create(b.seg); err != nil {
				return err
			}
		}
		if _, err := b.seg.file.WriteAt(b.buf, b.offset); err != nil {
			return fmt.Errorf("write %d bytes at %d of segment %d: %w", len(b.buf), b.offset, b.seg.sequence, full(err))
		}
		dirty = b.seg
		l.mu.Lock()
		l.stats.Batches++
		l.stats.Bytes += uint64(len(b.buf))
		l.mu.Unlock()
	}
	if dirty == nil {
		return nil
	}
	return l.sync(dirty)
}

func (l *Log) sync(s *segment) error {
	if err := s.file.Datasync(); err != nil {
		return fmt.Errorf("flush segment %d: %w", s.sequence, full(err))
	}
	l.mu.Lock()
	l.stats.Flushes++
	l.mu.Unlock()
	return nil
}

// create gives s its file and has the next one prepared meanwhile.
func (l *Log) create(s *segment) error {
	p := <-l.prepared
	if p.err == nil && p.file == nil || p.file != nil && s.size != l.cfg.SegmentBytes {
		// None was prepared, or this one has to be longer.
		if p.file != nil {
			p.err = p.file.Close()
		}
		if p.err == nil {
			p.file, p.err = prepareSegment(l.cfg.FS, l.cfg.Dir, s.size)
		}
	}
	if p.err != nil {
		l.prepared <- preparedSegment{}
		return p.err
	}
	if err := publishSegment(l.cfg.FS, l.cfg.Dir, p.file, s); err != nil {
		l.prepared <- preparedSegment{}
		return errors.Join(err, p.file.Close())
	}
	l.mu.Lock()
	s.file = p.file
	l.mu.Unlock()
	l.prepare()
	return nil
}

// prepare makes the next segment's file in the background: Close, or the next
// create, waits for it.
func (l *Log) prepare() {
	if l.cfg.Manual {
		l.prepared <- preparedSegment{} // made when it is needed
		return
	}
	go func() {
		f, err := prepareSegment(l.cfg.FS, l.cfg.Dir, l.cfg.SegmentBytes)
		if err != nil {
			l.cfg.Logger.Warn("slot log cannot prepare its next segment", "dir", l.cfg.Dir, "err", err)
			// Tried again when it is needed: there may be room by then.
			err = nil
		}
		l.prepared <- preparedSegment{file: f, err: err}
	}()
}

// detachUnused takes the oldest segments off the log that no entry is in, up to
// the one whose flush has just ended: it begins with every group's state.
// Called with mu held.
func (l *Log) detachUnused(current *segment) []*segment {
	n := 0
	for n < len(l.segments) && l.segments[n] != current && l.segments[n].entries == 0 {
		n++
	}
	dead := l.segments[:n:n]
	l.segments = l.segments[n:]
	return dead
}

// remove deletes the files of unused segments, oldest first, once nobody reads
// them. One that cannot be deleted stays with all behind it until the next time,
// so that what is there is always without a gap.
func (l *Log) remove() error {
	if len(l.unused) == 0 {
		return nil
	}
	l.files.Lock()
	defer l.files.Unlock()
	for len(l.unused) > 0 {
		s := l.unused[0]
		if s.file != nil {
			if err := s.file.Close(); err != nil {
				return err
			}
			s.file = nil
		}
		if err := l.cfg.FS.Remove(filepath.Join(l.cfg.Dir, segmentName(s.sequence))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := l.cfg.FS.SyncDir(l.cfg.Dir); err != nil {
			return err
		}
		l.unused = l.unused[1:]
	}
	return nil
}
