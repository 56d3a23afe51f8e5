package slotlog

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"
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
// reports whether there was anything. While the disk is full it looks for room
// again. It must not be called from a callback, nor by two goroutines at once.
func (l *Log) Flush() bool {
	if !l.cfg.Manual {
		panic("slotlog: Flush of a log that has a goroutine for it")
	}
	l.mu.Lock()
	l.retry = true
	l.mu.Unlock()
	did, _ := l.turn()
	return did
}

// turn flushes once and reports whether there was anything to do.
func (l *Log) turn() (did, closing bool) {
	batches, callbacks, retry, closing := l.take()
	if retry {
		l.prepareAgain()
	}
	done := l.flush(batches)
	if done == len(batches) {
		l.call(callbacks)
	} else {
		// They wait for all before them.
		l.mu.Lock()
		last := l.queue[len(l.queue)-1]
		last.callbacks = append(last.callbacks, callbacks...)
		l.mu.Unlock()
	}
	if done > 0 {
		// After the callbacks: this can wait, commits cannot.
		if err := l.retire(); err != nil {
			l.cfg.Logger.Warn("slot log keeps a segment it does not need", "dir", l.cfg.Dir, "err", err)
		}
		l.clean()
	}
	return done > 0 || done == len(batches) && len(callbacks) > 0, closing
}

func (l *Log) call(callbacks []func(error)) {
	if len(callbacks) == 0 {
		return
	}
	l.mu.Lock()
	err := l.err
	l.mu.Unlock()
	for _, durable := range callbacks {
		durable(err)
	}
}

// take returns the batches to flush now, callbacks that wait for nothing but
// these, and whether it is time to look for room again.
func (l *Log) take() (batches []*batch, callbacks []func(error), retry, closing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	retry, l.retry = l.retry, false
	if l.blocked && !retry && !l.closed && l.err == nil {
		return nil, nil, false, false
	}
	if b := l.building; b != nil {
		switch {
		case b.flush || len(b.buf) > lazyBytesMax || l.closed || l.err != nil:
			l.seal()
		default:
			callbacks, b.callbacks = b.callbacks, nil
		}
	}
	return append(batches, l.queue...), callbacks, retry, l.closed
}

// flush makes the batches durable, as many as there is room for, calls their
// callbacks and returns how many are dealt with.
func (l *Log) flush(batches []*batch) int {
	if len(batches) == 0 {
		return 0
	}
	l.mu.Lock()
	err := l.err
	l.mu.Unlock()
	done := 0
	if err == nil {
		done, err = l.writeBatches(batches)
	}

	l.mu.Lock()
	if err != nil && errors.Is(err, ErrFull) && !l.closed && l.err == nil {
		// Nothing was written: it can be tried again.
		l.block(err)
		batches, err = batches[:done], nil
	} else {
		l.blocked = false
	}
	if err != nil {
		l.fail(err)
		done = len(batches)
	}
	l.queue = l.queue[len(batches):]
	if len(l.queue) == 0 {
		l.queue = nil
	}
	for _, b := range batches {
		l.queued -= len(b.buf)
		if err == nil {
			for s, n := range b.released {
				s.live -= n
			}
			l.recycle(b)
		}
	}
	if err == nil && done > 0 {
		l.detachUnused(batches[done-1].seg)
	}
	l.setFull()
	l.mu.Unlock()

	for _, b := range batches {
		for _, durable := range b.callbacks {
			durable(err)
		}
	}
	return done
}

// writeBatches writes batches in order and returns how many are flushed. A
// segment is flushed before its successor is begun.
func (l *Log) writeBatches(batches []*batch) (done int, err error) {
	var dirty *segment
	for i, b := range batches {
		if dirty != nil && dirty != b.seg {
			if err := l.sync(dirty); err != nil {
				return done, err
			}
			dirty, done = nil, i
		}
		if len(b.buf) == 0 {
			continue
		}
		if b.seg.file == nil {
			if err := l.create(b.seg); err != nil {
				return done, err
			}
		}
		l.frame = appendStamped(l.frame[:0], b.buf, b.seg.sequence, b.offset)
		if _, err := b.seg.file.WriteAt(l.frame, position(b.offset)); err != nil {
			return done, fmt.Errorf("write %d bytes at %d of segment %d: %w", len(l.frame), b.offset, b.seg.sequence, err)
		}
		dirty = b.seg
		l.mu.Lock()
		l.stats.Batches++
		l.stats.Bytes += uint64(len(l.frame))
		l.mu.Unlock()
		if cap(l.frame) > spareBytesMax {
			l.frame = nil
		}
	}
	if dirty != nil {
		if err := l.sync(dirty); err != nil {
			return done, err
		}
	}
	return len(batches), nil
}

func (l *Log) sync(s *segment) error {
	if err := s.file.Datasync(); err != nil {
		return fmt.Errorf("flush segment %d: %w", s.sequence, err)
	}
	l.mu.Lock()
	l.stats.Flushes++
	l.mu.Unlock()
	return nil
}

// create gives s its file and has the next one prepared meanwhile. ErrFull says
// that nothing has changed.
func (l *Log) create(s *segment) error {
	p := <-l.prepared
	if s.size != l.cfg.SegmentBytes {
		// Larger than all others: the prepared one is for the next.
		l.prepared <- p
		var err error
		if p, err = makeFile(l.cfg.FS, l.cfg.Dir, largeName, s.size); err != nil {
			return err
		}
		return l.publish(p, s)
	}
	if p.file == nil {
		var err error
		if p, err = makeFile(l.cfg.FS, l.cfg.Dir, preparedName, s.size); err != nil {
			l.prepared <- preparedFile{}
			return err
		}
	}
	if err := l.publish(p, s); err != nil {
		l.prepared <- preparedFile{}
		return err
	}
	l.prepare()
	return nil
}

func (l *Log) publish(p preparedFile, s *segment) error {
	l.mu.Lock()
	named := *s // Append counts records in s meanwhile
	l.mu.Unlock()
	if err := p.publish(l.cfg.FS, l.cfg.Dir, &named); err != nil {
		return errors.Join(err, p.file.Close())
	}
	l.mu.Lock()
	s.file = named.file
	l.mu.Unlock()
	return nil
}

// prepare sees to the next segment's file: one that is not used any more, or else
// a new one, made in the background. Close, or the next create, waits for it.
func (l *Log) prepare() {
	if n := len(l.pool); n > 0 {
		p := l.pool[n-1]
		l.pool = l.pool[:n-1]
		l.offer(p)
		return
	}
	if l.cfg.Manual {
		l.offer(l.makeNext())
		return
	}
	go func() { l.offer(l.makeNext()) }()
}

func (l *Log) makeNext() preparedFile {
	p, err := makeFile(l.cfg.FS, l.cfg.Dir, preparedName, l.cfg.SegmentBytes)
	if err != nil {
		l.mu.Lock()
		known := l.spareless
		l.mu.Unlock()
		if !known { // it is tried again every RetryInterval
			l.cfg.Logger.Warn("slot log cannot prepare its next segment", "dir", l.cfg.Dir, "err", err)
		}
	}
	return p
}

// offer puts the next segment's file, or that there is none, where create finds
// it.
func (l *Log) offer(p preparedFile) {
	l.mu.Lock()
	l.spareless = p.file == nil
	if l.spareless {
		l.retryLater()
	}
	l.setFull()
	l.mu.Unlock()
	l.prepared <- p
}

// prepareAgain tries once more if there was no room for the next segment.
func (l *Log) prepareAgain() {
	select {
	case p := <-l.prepared:
		if p.file == nil {
			l.prepare()
		} else {
			l.prepared <- p
		}
	default: // under way
	}
}

// block notes that what is queued waits for room. Called with mu held.
func (l *Log) block(err error) {
	if !l.blocked {
		l.cfg.Logger.Warn("slot log waits for room: nothing is accepted until there is some", "dir", l.cfg.Dir, "err", err)
	}
	l.blocked = true
	l.retryLater()
}

// retryLater has the writer look for room again. Called with mu held.
func (l *Log) retryLater() {
	if l.cfg.Manual || l.closed {
		return
	}
	if l.timer != nil {
		l.timer.Stop()
	}
	l.timer = time.AfterFunc(l.cfg.RetryInterval, func() {
		l.mu.Lock()
		l.retry = true
		l.mu.Unlock()
		l.wake()
	})
}

// detachUnused takes the oldest segments off the log that no entry is in, up to
// the one whose flush has just ended: it begins with every group's state.
// Called with mu held.
func (l *Log) detachUnused(current *segment) {
	n := 0
	for n < len(l.segments) && l.segments[n] != current && l.segments[n].live == 0 {
		n++
	}
	l.unused = append(l.unused, l.segments[:n]...)
	l.segments = l.segments[n:]
}

// poolMax bounds the files kept to be used again, beside the prepared one.
const poolMax = 2

// retire takes the files of unused segments away, oldest first, once nobody
// reads them: to be used again, or deleted. One for which that fails stays with
// all behind it until the next time, so that what is there is always without a
// gap.
func (l *Log) retire() error {
	if len(l.unused) == 0 {
		return nil
	}
	l.files.Lock()
	defer l.files.Unlock()
	for len(l.unused) > 0 {
		s := l.unused[0]
		p := preparedFile{s.file, unusedName(s.sequence)}
		from, to := filepath.Join(l.cfg.Dir, segmentName(s.sequence)), filepath.Join(l.cfg.Dir, p.name)
		keep := s.size == l.cfg.SegmentBytes && len(l.pool) < poolMax
		var err error
		if keep {
			err = l.cfg.FS.Rename(from, to)
		} else {
			err = l.cfg.FS.Remove(from)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		// Before the next goes, and before anything is written to this one: a name
		// that comes back must find what belongs to it.
		if err := l.cfg.FS.SyncDir(l.cfg.Dir); err != nil {
			return err
		}
		l.unused = l.unused[1:]
		if !keep {
			if err := s.file.Close(); err != nil {
				return err
			}
			continue
		}
		l.pool = append(l.pool, p)
	}
	l.mu.Lock()
	spareless := l.spareless
	l.mu.Unlock()
	if spareless {
		l.prepareAgain()
	}
	return nil
}
