package relay

import (
	"sync"
	"time"
)

const (
	// lineBytesMax bounds what one direction of a connection holds. At 65 ms
	// one way, the longest of the world's table, it lets 500 MB/s through.
	lineBytesMax = 32 << 20
	chunkBytes   = 128 << 10
	readBytesMin = 8 << 10 // less room than this at a chunk's end is not read into
	marksMax     = 1 << 16
)

// line is the delay line of one direction: bytes go in at its end, each with
// the instant at which it is due, and come out at its head. One goroutine puts,
// another takes.
type line struct {
	mu     sync.Mutex
	moved  sync.Cond // anything below changed
	chunks []*chunk  // the first holds the oldest bytes, the last has the room
	marks  []mark    // oldest first; together they cover all held bytes
	held   int
	ended  bool // nothing more goes in
	reset  bool // … because the sender reset the connection
	endDue time.Time
	closed bool
}

type chunk struct {
	bytes      [chunkBytes]byte
	start, end int // the held bytes
}

type mark struct {
	count int
	due   time.Time
}

var chunkPool = sync.Pool{New: func() any { return new(chunk) }}

func newLine() *line {
	l := &line{}
	l.moved.L = &l.mu
	return l
}

// space returns room to read into, waiting while the line is full. It returns
// nil when the line is closed.
func (l *line) space() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.closed && (l.held >= lineBytesMax || len(l.marks) >= marksMax) {
		l.moved.Wait()
	}
	if l.closed {
		return nil
	}
	if n := len(l.chunks); n == 0 || chunkBytes-l.chunks[n-1].end < readBytesMin {
		c := chunkPool.Get().(*chunk)
		c.start, c.end = 0, 0
		l.chunks = append(l.chunks, c)
	}
	tail := l.chunks[len(l.chunks)-1]
	return tail.bytes[tail.end:]
}

// put says that count bytes were read into the space last given.
func (l *line) put(count int, due time.Time) {
	if count == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.chunks[len(l.chunks)-1].end += count
	l.held += count
	l.marks = append(l.marks, mark{count, due})
	l.moved.Broadcast()
}

// end says that nothing follows, and when that is due.
func (l *line) end(due time.Time, reset bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended, l.reset, l.endDue = true, reset, due
	l.moved.Broadcast()
}

// next waits until something is on the line and returns when it is due. With
// last, all bytes are out and the end itself is due. ok is false when the line
// was closed.
func (l *line) next() (due time.Time, last, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.closed && len(l.marks) == 0 && !l.ended {
		l.moved.Wait()
	}
	switch {
	case l.closed:
		return time.Time{}, false, false
	case len(l.marks) > 0:
		return l.marks[0].due, false, true
	}
	return l.endDue, true, true
}

// due returns the bytes at the head that are due at now, as far as they lie
// together; they stay on the line until taken.
func (l *line) due(now time.Time) []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || len(l.chunks) == 0 {
		return nil
	}
	head, count := l.chunks[0], 0
	for _, m := range l.marks {
		if m.due.After(now) || count >= head.end-head.start {
			break
		}
		count += m.count
	}
	return head.bytes[head.start:min(head.start+count, head.end)]
}

// take removes count bytes from the head.
func (l *line) take(count int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	head := l.chunks[0]
	head.start += count
	l.held -= count
	if head.start == head.end && (len(l.chunks) > 1 || chunkBytes-head.end < readBytesMin) {
		// Else the chunk is the one being read into.
		l.chunks = l.chunks[1:]
		chunkPool.Put(head)
	}
	done := 0
	for count > 0 {
		m := &l.marks[done]
		n := min(count, m.count)
		m.count -= n
		count -= n
		if m.count == 0 {
			done++
		}
	}
	l.marks = l.marks[done:] // append makes room anew when the end is reached
	l.moved.Broadcast()
}

// close ends both sides. The chunks go to the garbage collector, since the
// reader may still be reading into one.
func (l *line) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.chunks, l.marks = nil, nil
	l.moved.Broadcast()
}
