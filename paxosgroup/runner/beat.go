package runner

import (
	"container/heap"
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"quorate/paxosgroup"
)

// drawLife returns a number that no other life of this process ever has.
func drawLife() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint64(b[:])
}

// share has heartbeats of a group carried by the beats of all. The transport
// knows a process by its replicas' id, so that is one.
func (e *Engine) share(g *EngineGroup) error {
	if e.cfg.Life == 0 {
		return nil
	}
	id := g.core.ID()
	if e.beats == nil {
		// Six to a lease: a group at rest need not notice a lost leader before
		// its lease is over, and each beat wakes ten goroutines.
		e.beats = paxosgroup.NewBeats(id, e.cfg.Life, max(g.beat, g.lease/6))
	}
	if first := e.order[0].core.ID(); first != id {
		return fmt.Errorf("runner: group %d is to be run by replica %d in the process of replica %d", g.id, id, first)
	}
	g.core.Share(e.beats)
	return nil
}

// beat sends the beats that are due.
func (e *Engine) beat(now paxosgroup.Instant) {
	if e.beats == nil {
		return
	}
	if out := e.beats.Tick(now); len(out) > 0 {
		e.cfg.Transport.Send(0, out)
	}
	e.woken(now)
}

// gather has the deadlines of groups at rest fall upon those of beats.
func (e *Engine) gather(now, deadline paxosgroup.Instant) paxosgroup.Instant {
	if e.beats == nil {
		return deadline
	}
	return e.beats.Gather(now, deadline)
}

// woken asks all groups anew when they are due, after the rare events that may
// have brought that nearer. That it moved away needs no such thing: a group that
// is ticked too soon says so.
func (e *Engine) woken(now paxosgroup.Instant) {
	if e.beats == nil || !e.beats.Woken() {
		return
	}
	for _, g := range e.order {
		if g.failure != nil {
			continue
		}
		if at := e.gather(now, g.core.NextDeadline()); !g.dirty && at < g.deadline {
			g.deadline = at
			heap.Fix(&e.due, g.heapIndex)
		}
	}
}
