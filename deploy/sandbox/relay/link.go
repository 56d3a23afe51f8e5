package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// link is one connection through a relay: near is the side that called, far the
// target.
type link struct {
	relay *Relay
	near  *net.TCPConn

	mu          sync.Mutex
	far         *net.TCPConn // nil until dialled
	closed      bool
	interrupted bool
	lines       []*line
	alarms      []*alarm
}

// longPast, as a deadline, ends whatever waits on a connection.
var longPast = time.Unix(1, 0)

// run carries the connection until both directions have ended.
func (l *link) run() {
	defer l.close()
	wire := l.relay.wire
	wire.add(l)
	defer wire.remove(l)

	// The handshake: a round trip before the caller could send a byte.
	if wire.oneWay > 0 {
		opening, err := l.alarm()
		if err != nil {
			abort(l.near)
			return
		}
		if opening.sleepUntil(time.Now().Add(wire.RoundTrip())) != nil {
			return
		}
	}
	if !wire.await(l.relay.done) {
		return
	}
	conn, err := net.Dial("tcp", l.relay.target)
	if err != nil {
		abort(l.near)
		return
	}
	far := conn.(*net.TCPConn)
	if !l.setFar(far) {
		far.Close()
		return
	}

	var both sync.WaitGroup
	both.Go(func() { l.carry(l.near, far) })
	both.Go(func() { l.carry(far, l.near) })
	both.Wait()
}

// carry moves bytes from one side to the other until from ends.
func (l *link) carry(from, to *net.TCPConn) {
	if l.relay.wire.oneWay == 0 {
		l.carryNow(from, to)
		return
	}
	line, alarm, err := l.line()
	if err != nil {
		abort(from)
		abort(to)
		return
	}
	var reading sync.WaitGroup
	reading.Go(func() { l.fill(line, from) })
	l.drain(line, alarm, to)
	reading.Wait()
}

// carryNow is carry for a wire without delay: no line in between.
func (l *link) carryNow(from, to *net.TCPConn) {
	buffer := make([]byte, chunkBytes)
	broken := false
	for {
		n, err := l.read(from, buffer)
		if n > 0 && !broken {
			broken = !l.write(to, buffer[:n])
		}
		if err != nil {
			l.finish(to, !errors.Is(err, io.EOF))
			return
		}
	}
}

// fill reads onto the line.
func (l *link) fill(line *line, from *net.TCPConn) {
	oneWay := l.relay.wire.oneWay
	for {
		space := line.space()
		if space == nil {
			return
		}
		n, err := l.read(from, space)
		due := time.Now().Add(oneWay)
		line.put(n, due)
		if err != nil {
			line.end(due, !errors.Is(err, io.EOF))
			return
		}
	}
}

// drain writes what is due off the line.
func (l *link) drain(line *line, alarm *alarm, to *net.TCPConn) {
	broken := false
	for {
		due, last, ok := line.next()
		if !ok || alarm.sleepUntil(due) != nil {
			return
		}
		if !l.afterMending(alarm) {
			return
		}
		if last {
			line.mu.Lock()
			reset := line.reset
			line.mu.Unlock()
			l.finish(to, reset)
			return
		}
		for {
			bytes := line.due(time.Now())
			if len(bytes) == 0 {
				break
			}
			if !broken { // else read on, so that the sender's end is seen
				broken = !l.write(to, bytes)
			}
			line.take(len(bytes))
		}
	}
}

// afterMending returns when the wire is whole and what was held on it while it
// was cut has had its way.
func (l *link) afterMending(alarm *alarm) bool {
	wire := l.relay.wire
	for {
		if !wire.await(l.relay.done) {
			return false
		}
		_, mendedAt := wire.state()
		arrival := mendedAt.Add(wire.oneWay)
		if !time.Now().Before(arrival) {
			return true
		}
		if alarm.sleepUntil(arrival) != nil {
			return false
		}
	}
}

// read reads from a side; while the wire is cut it does not. An error is the
// end of this side.
func (l *link) read(from *net.TCPConn, into []byte) (int, error) {
	for {
		n, err := from.Read(into)
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		// The wire was cut during the read.
		if !l.relay.wire.await(l.relay.done) {
			return n, net.ErrClosed
		}
		if n > 0 {
			return n, nil
		}
	}
}

// write hands bytes to a side, only while the wire is whole. It reports false
// when that side takes no more.
func (l *link) write(to *net.TCPConn, bytes []byte) bool {
	wire := l.relay.wire
	pace := &wire.pace[0]
	if to == l.near {
		pace = &wire.pace[1]
	}
	for len(bytes) > 0 {
		allowed := pace.allow(len(bytes), l.relay.done)
		if !wire.await(l.relay.done) {
			return false
		}
		wire.writing.RLock()
		if wire.IsCut() {
			wire.writing.RUnlock()
			continue
		}
		n, err := to.Write(bytes[:allowed])
		wire.writing.RUnlock()
		bytes = bytes[n:]
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			abort(to)
			return false
		}
	}
	return true
}

// finish tells a side that the other has ended.
func (l *link) finish(to *net.TCPConn, reset bool) {
	if !l.relay.wire.await(l.relay.done) {
		return
	}
	if reset {
		abort(to)
		return
	}
	_ = to.CloseWrite() // an error: that side is gone as well
}

// interrupt makes whatever waits on the connection come out, until resume. The
// wire calls it, holding its lock.
func (l *link) interrupt() { l.setDeadline(true) }

// resume undoes interrupt.
func (l *link) resume() { l.setDeadline(false) }

func (l *link) setDeadline(interrupted bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.interrupted = interrupted
	l.applyDeadline(l.near)
	if l.far != nil {
		l.applyDeadline(l.far)
	}
}

// applyDeadline is called with mu held. An error means a closed connection,
// which needs no interruption.
func (l *link) applyDeadline(c *net.TCPConn) {
	var at time.Time
	if l.interrupted {
		at = longPast
	}
	_ = c.SetDeadline(at)
}

func (l *link) setFar(far *net.TCPConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.far = far
	l.applyDeadline(far)
	return true
}

func (l *link) alarm() (*alarm, error) {
	a, err := newAlarm()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		a.close()
		return nil, net.ErrClosed
	}
	l.alarms = append(l.alarms, a)
	return a, nil
}

func (l *link) line() (*line, *alarm, error) {
	a, err := l.alarm()
	if err != nil {
		return nil, nil, err
	}
	line := newLine()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, nil, net.ErrClosed
	}
	l.lines = append(l.lines, line)
	return line, a, nil
}

// close ends everything of the link; run returns soon after.
func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	l.near.Close()
	if l.far != nil {
		l.far.Close()
	}
	for _, line := range l.lines {
		line.close()
	}
	for _, a := range l.alarms {
		a.close()
	}
}

// abort resets a connection.
func abort(c *net.TCPConn) {
	_ = c.SetLinger(0) // an error: it is closed already
	c.Close()
}
