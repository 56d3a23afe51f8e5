package relay

import (
	"sync"
	"time"
)

// Wire is the connection between two regions, in both directions. Several
// relays may run over one. Its methods are safe for concurrent use.
type Wire struct {
	oneWay time.Duration

	// writing is held shared while bytes are handed to a receiver, exclusively
	// while the wire is cut or mended.
	writing sync.RWMutex

	pace [2]pace // of what comes from the callers' side, and from the targets'

	mu       sync.Mutex    // taken after writing, if both
	whole    chan struct{} // closed while the wire is not cut
	cut      bool
	mendedAt time.Time
	links    map[*link]struct{}
}

// NewWire returns a wire on which every byte takes oneWay; 0 is no delay.
func NewWire(oneWay time.Duration) *Wire {
	whole := make(chan struct{})
	close(whole)
	return &Wire{oneWay: oneWay, whole: whole, links: map[*link]struct{}{}}
}

// RoundTrip returns the delay there and back.
func (w *Wire) RoundTrip() time.Duration { return 2 * w.oneWay }

// SetRate limits the wire to so many bytes a second in each direction, all its
// connections together; 0 is no limit. What was being held back is let go at the
// new rate.
func (w *Wire) SetRate(bytesPerSecond int64) {
	for i := range w.pace {
		w.pace[i].set(bytesPerSecond)
	}
}

// pace shares out the rate of one direction.
type pace struct {
	mu      sync.Mutex
	rate    int64     // bytes per second; 0: no limit
	free    time.Time // when what was let through so far is through
	changed chan struct{}
}

// pacedBytesMax is how much is let through at a time.
const pacedBytesMax = 1400

func (p *pace) set(rate int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rate, p.free = rate, time.Time{}
	if p.changed != nil {
		close(p.changed)
	}
	p.changed = make(chan struct{})
}

// allow returns how many of count bytes may be written, when their turn has come.
func (p *pace) allow(count int, done <-chan struct{}) int {
	p.mu.Lock()
	if p.rate == 0 {
		p.mu.Unlock()
		return count
	}
	count = min(count, pacedBytesMax)
	now := time.Now()
	if p.free.Before(now) {
		p.free = now
	}
	turn := p.free
	p.free = turn.Add(time.Duration(int64(count) * int64(time.Second) / p.rate))
	changed := p.changed
	p.mu.Unlock()
	if wait := turn.Sub(now); wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-changed:
		case <-done:
		}
	}
	return count
}

// IsCut reports whether the wire is cut.
func (w *Wire) IsCut() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cut
}

// Cut silences the wire and returns when nothing can arrive any more.
func (w *Wire) Cut() {
	w.mu.Lock()
	if w.cut {
		w.mu.Unlock()
		return
	}
	w.cut = true
	w.whole = make(chan struct{})
	// Whoever is blocked in a read or a write comes out and finds the wire cut.
	for l := range w.links {
		l.interrupt()
	}
	w.mu.Unlock()
	w.writing.Lock()
	//lint:ignore SA2001 it waits for the last write
	w.writing.Unlock()
}

// Mend undoes Cut.
func (w *Wire) Mend() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.cut {
		return
	}
	w.cut = false
	w.mendedAt = time.Now()
	for l := range w.links {
		l.resume()
	}
	close(w.whole)
}

// state returns a channel that is closed while the wire is whole, and when it
// was last mended.
func (w *Wire) state() (whole <-chan struct{}, mendedAt time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.whole, w.mendedAt
}

// await returns when the wire is whole, or false when done is closed first.
func (w *Wire) await(done <-chan struct{}) bool {
	for {
		whole, _ := w.state()
		select {
		case <-done:
			return false
		case <-whole:
			if !w.IsCut() {
				return true
			}
		}
	}
}

func (w *Wire) add(l *link) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.links[l] = struct{}{}
	if w.cut {
		l.interrupt()
	}
}

func (w *Wire) remove(l *link) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.links, l)
}
