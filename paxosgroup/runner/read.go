package runner

import (
	"context"
	"errors"
	"fmt"

	"quorate/paxosgroup"
)

// ErrUnconfirmed says that no leader could be shown to lead, so nobody knows up
// to where one must read. Asking again is right, once a leader is known and a
// quorum of the voters can be reached.
var ErrUnconfirmed = errors.New("no leader was confirmed by a quorum in time: ask again when a quorum of the regions is reachable")

// ErrReadsBusy says that as many reads wait for their index as may.
var ErrReadsBusy = errors.New("too many reads wait for a leader to be confirmed: make fewer, or come again later")

// readsMax bounds the reads of a group that wait for their index.
const readsMax = 4096

// ReadIndex asks for the slot up to which one must have applied to see all that
// was acknowledged to anybody by now. answer is called once, by a Step, with
// ErrUnconfirmed after two lease durations at the latest. ErrReadsBusy says that
// too many wait, and that answer will not be called.
func (g *EngineGroup) ReadIndex(now paxosgroup.Instant, answer func(paxosgroup.Slot, error)) error {
	if g.failure != nil {
		return g.failure
	}
	if len(g.reads) >= readsMax {
		return ErrReadsBusy
	}
	if g.reads == nil {
		g.reads = make(map[uint64]func(paxosgroup.Slot, error))
	}
	g.readID++
	g.reads[g.readID] = answer
	g.core.ReadIndex(now, g.readID)
	g.engine.touch(g)
	return nil
}

func (g *EngineGroup) answerRead(q paxosgroup.ReadResult) {
	answer := g.reads[q.ID]
	delete(g.reads, q.ID)
	if len(g.reads) == 0 {
		g.reads = nil
	}
	switch {
	case answer == nil:
	case q.OK:
		answer(q.Slot, nil)
	default:
		answer(0, ErrUnconfirmed)
	}
}

// failReads answers those that wait when the runner stops.
func (g *EngineGroup) failReads(err error) {
	for _, answer := range g.reads {
		answer(0, err)
	}
	g.reads = nil
}

// ReadIndex returns the slot up to which one must have applied to see all that
// was acknowledged to anybody before the call: a read after that is
// linearizable. A leader with a lease answers at once, one without after a round
// trip to a quorum, which many calls share; a follower asks the leader. The slot
// may be above what Chosen shows here: wait for it. It may be called on any
// replica, and returns ErrUnconfirmed after two lease durations, ErrReadsBusy if
// 4096 wait, a *FailedError, ErrStopped, or why ctx ended.
func (g *Group) ReadIndex(ctx context.Context) (paxosgroup.Slot, error) {
	type result struct {
		slot paxosgroup.Slot
		err  error
	}
	answered := make(chan result, 1)
	r := g.runner
	r.mu.Lock()
	r.submit(call{
		do: func(now paxosgroup.Instant) {
			if err := g.engine.ReadIndex(now, func(s paxosgroup.Slot, err error) { answered <- result{s, err} }); err != nil {
				answered <- result{err: err}
			}
		},
		fail: func(err error) { answered <- result{err: err} },
	}, r.resting)
	var a result
	select {
	case a = <-answered:
	case <-ctx.Done():
		a.err = context.Cause(ctx)
	}
	if a.err != nil {
		return 0, fmt.Errorf("read index of group %d: %w", g.id, a.err)
	}
	return a.slot, nil
}
