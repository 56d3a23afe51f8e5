package runner

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"quorate/paxosgroup"
)

// Proposal is a data entry on its way into the log. It belongs to the engine
// from EngineGroup.Propose until it is answered; only Abandon may be called
// meanwhile, from any goroutine.
type Proposal struct {
	Payload []byte            // must not be changed, now or later
	Only    paxosgroup.Ballot // the one term in which it may be proposed; zero: any
	// Session and Sequence, unless zero, make it one of those of which at most
	// one becomes effective; see paxosgroup.Session.
	Session, Sequence uint64
	// Wait has it answered when it is effective, not when the core has taken it.
	Wait bool
	// Answered is called once, unless it was abandoned: when the core has taken
	// the proposal or would not, or when what became of it is known.
	Answered func(*Proposal)

	// The answer.
	Term   paxosgroup.Ballot
	Number uint64
	Slot   paxosgroup.Slot // with Wait: where it is effective; 0 if it was so before, too long ago to say where
	Err    error

	state atomic.Uint32
}

// The states of a proposal.
const (
	proposalQueued uint32 = iota
	proposalOffered
	proposalTaken // and waits to be effective
	proposalAnswered
	proposalAbandoned
)

// Abandon gives the proposal up, and reports whether it could: if not, it has
// been answered, or is at this moment. One with Wait may have been taken, and
// become effective all the same.
func (p *Proposal) Abandon() bool {
	gone, _ := p.abandon()
	return gone
}

func (p *Proposal) abandon() (gone, taken bool) {
	for {
		switch s := p.state.Load(); s {
		case proposalQueued, proposalTaken:
			if p.state.CompareAndSwap(s, proposalAbandoned) {
				return true, s == proposalTaken
			}
		case proposalOffered: // for as long as the core takes to look at it
			runtime.Gosched()
		default:
			return false, false
		}
	}
}

func (p *Proposal) answer(term paxosgroup.Ballot, number uint64, err error) {
	p.Term, p.Number, p.Err = term, number, err
	p.state.Store(proposalAnswered)
	p.Answered(p)
}

// reject answers a proposal that no engine has, or that waits.
func (p *Proposal) reject(err error) {
	if p.state.CompareAndSwap(proposalQueued, proposalOffered) {
		p.answer(paxosgroup.Ballot{}, 0, err)
	}
}

// ErrBusy says that as many proposals wait for room as may.
var ErrBusy = errors.New("too many proposals wait already")

// ErrFull says that the log has no room for more. This replica has given up
// leadership, so that it comes with a *NotLeaderError.
var ErrFull = errors.New("the disk of the log is full (free some: it goes on by itself when there is room)")

// ErrUnknownOutcome says that a proposal was made and it is not known what
// became of it: it may be effective, now or later, or never.
var ErrUnknownOutcome = errors.New("it is not known whether the entry is or becomes effective")

// UnknownOutcomeError is the ErrUnknownOutcome of a leadership that was lost.
type UnknownOutcomeError struct {
	Term   paxosgroup.Ballot    // in which it was proposed
	Leader paxosgroup.ReplicaID // now, as believed; 0 if none is known
}

func (e *UnknownOutcomeError) Error() string {
	return fmt.Sprintf("leadership %v was lost with the proposal on its way: %v (read the log, or repeat it in its session at replica %d)", e.Term, ErrUnknownOutcome, e.Leader)
}

func (e *UnknownOutcomeError) Unwrap() error { return ErrUnknownOutcome }

// proposals are those that wait: for room in the window, oldest first, and in
// flight, to become effective. Since numbers are dense in a term, those in
// flight are a queue, of which each entry that has its turn takes the first.
type proposals struct {
	max       int
	waiting   []*Proposal
	heldUntil paxosgroup.Instant // those waiting gather until then; 0 if they do not

	term     paxosgroup.Ballot // of those in flight
	inFlight ring              // nil where nobody waits
	first    uint64            // number of the first in flight
	arrived  []*Proposal       // to be told
}

// ring is a queue that reuses its room.
type ring struct {
	slots   []*Proposal // a power of two
	head, n int
}

func (r *ring) push(p *Proposal) {
	if r.n == len(r.slots) {
		grown := make([]*Proposal, max(64, 2*len(r.slots)))
		for i := range r.n {
			grown[i] = r.slots[(r.head+i)&(len(r.slots)-1)]
		}
		r.slots, r.head = grown, 0
	}
	r.slots[(r.head+r.n)&(len(r.slots)-1)] = p
	r.n++
}

func (r *ring) pop() *Proposal {
	p := r.slots[r.head]
	r.slots[r.head] = nil
	r.head = (r.head + 1) & (len(r.slots) - 1)
	r.n--
	return p
}

// tell answers those that have arrived. It is done after all else, since each
// has a goroutine to wake.
func (w *proposals) tell() {
	for i, p := range w.arrived {
		w.arrived[i] = nil
		p.Answered(p)
	}
	w.arrived = w.arrived[:0]
}

// settled ends a wait; tell tells of it.
func (w *proposals) settled(p *Proposal, s paxosgroup.Slot, err error) {
	if p == nil || !p.state.CompareAndSwap(proposalTaken, proposalOffered) {
		return // nobody waits, or no longer
	}
	p.Slot, p.Err = s, err
	p.state.Store(proposalAnswered)
	w.arrived = append(w.arrived, p)
}

// arrived takes in a delivered data entry of the term whose proposals are in
// flight. Called with the guard held.
func (g *EngineGroup) arrived(d *paxosgroup.Delivered) {
	w := &g.proposals
	for w.inFlight.n > 0 && w.first <= d.Entry.Number {
		own := w.first == d.Entry.Number
		w.first++
		p := w.inFlight.pop()
		switch {
		case p == nil:
		case own && d.Verdict == paxosgroup.Effective:
			w.settled(p, d.Slot, nil)
		case own && p.Session != 0 && g.history.judge.Effective(p.Session, p.Sequence):
			w.settled(p, g.recent.find(p.Session, p.Sequence), nil)
		default: // void, because another leader's term is in force
			w.settled(p, 0, g.notLeader(paxosgroup.ErrNotLeader))
		}
	}
}

// giveUpWaiting answers those in flight if their term is over here.
func (g *EngineGroup) giveUpWaiting() {
	w := &g.proposals
	if w.inFlight.n == 0 {
		return
	}
	if ballot, leads := g.core.Leading(); leads && ballot == w.term {
		return
	}
	leader := g.core.Brief().Leader
	for w.inFlight.n > 0 {
		w.settled(w.inFlight.pop(), 0, &UnknownOutcomeError{Term: w.term, Leader: leader})
	}
	w.tell()
}

// Propose hands in an entry, to be offered to the core at the next Step and
// answered then or, if there is no room in the window, when there is.
func (g *EngineGroup) Propose(p *Proposal) {
	if g.failure != nil {
		p.reject(g.failure)
		return
	}
	w := &g.proposals
	if len(w.waiting) >= w.max {
		p.reject(fmt.Errorf("%w: %d (make fewer, or come again later)", ErrBusy, len(w.waiting)))
		return
	}
	w.waiting = append(w.waiting, p)
	g.engine.touch(g)
}

// gatherTime is for how long proposals are held at most while those before them
// are on their way to the disk.
const gatherTime = time.Millisecond

// gathers reports whether proposals are held, so that what comes during a flush
// makes one message to each follower and one more flush. At rest nothing is; and
// the disk may be slow, where those of a quorum are not: so not for long, unless
// too much waits for it already.
func (g *EngineGroup) gathers(now paxosgroup.Instant) bool {
	w := &g.proposals
	if len(w.waiting) > 0 && g.crowded() {
		w.heldUntil = now.Add(crowdedRetry)
		return true
	}
	if g.unflushed == 0 || len(w.waiting) == 0 {
		w.heldUntil = 0
		return false
	}
	if w.heldUntil == 0 {
		w.heldUntil = now.Add(gatherTime)
	}
	return now < w.heldUntil
}

// offer hands over what the window has room for.
func (g *EngineGroup) offer(now paxosgroup.Instant) {
	if g.gathers(now) {
		return
	}
	w := &g.proposals
	n, last := 0, len(w.waiting) // those that callbacks add come later
	for ; n < last; n++ {
		p := w.waiting[n]
		if !p.state.CompareAndSwap(proposalQueued, proposalOffered) {
			continue // abandoned
		}
		term, number, err := g.take(now, p)
		if errors.Is(err, paxosgroup.ErrWindowFull) {
			p.state.Store(proposalQueued)
			break
		}
		if err == nil && number != 0 {
			if w.inFlight.n == 0 {
				w.term, w.first = term, number
			}
			if p.Wait {
				p.Term, p.Number = term, number
				w.inFlight.push(p)
				p.state.Store(proposalTaken)
				continue
			}
			if w.inFlight.n > 0 {
				w.inFlight.push(nil)
			}
		}
		p.answer(term, number, err)
	}
	if n == 0 {
		return
	}
	rest := copy(w.waiting, w.waiting[n:])
	clear(w.waiting[rest:])
	w.waiting = w.waiting[:rest]
	if rest == 0 {
		w.heldUntil = 0
	}
}

// take has the core take one proposal.
func (g *EngineGroup) take(now paxosgroup.Instant, p *Proposal) (paxosgroup.Ballot, uint64, error) {
	if !p.Only.IsZero() {
		if ballot, leads := g.core.Leading(); !leads || ballot != p.Only {
			return ballot, 0, g.notLeader(paxosgroup.ErrNotLeader)
		}
	}
	if p.Session != 0 && p.Wait && g.history.judge.Effective(p.Session, p.Sequence) {
		p.Slot = g.recent.find(p.Session, p.Sequence)
		return paxosgroup.Ballot{}, 0, nil
	}
	if g.full {
		b := g.core.Brief()
		return b.Ballot, 0, fmt.Errorf("%w: %w", ErrFull, &NotLeaderError{Leader: b.Leader, Ballot: b.Ballot})
	}
	term, number, err := g.core.ProposeOnce(now, p.Session, p.Sequence, p.Payload)
	return term, number, g.notLeader(err)
}

// failProposals answers those that wait when nothing will be done any more.
func (g *EngineGroup) failProposals(err error) {
	for _, p := range g.proposals.waiting {
		p.reject(err)
	}
	g.proposals.waiting = nil
	w := &g.proposals
	for w.inFlight.n > 0 {
		w.settled(w.inFlight.pop(), 0, fmt.Errorf("%w: %w", ErrUnknownOutcome, err))
	}
	w.tell()
}

// proposal is a Proposal that a goroutine waits for.
type proposal struct {
	Proposal
	done chan struct{} // gets a token when it is answered
}

var proposalPool = sync.Pool{New: func() any {
	p := &proposal{done: make(chan struct{}, 1)}
	p.Answered = func(*Proposal) { p.done <- struct{}{} }
	return p
}}

// Propose hands an entry to the leader's core and returns the number it has in
// the leader's term. It waits for room in the window, in order of arrival. That
// the entry is proposed says nothing of its being chosen: read the log for that.
// An error means that it was not proposed: a *NotLeaderError, ErrBusy,
// ErrFull, a *FailedError, ErrStopped or the end of ctx. The payload must not be changed afterwards.
func (g *Group) Propose(ctx context.Context, payload []byte) (term paxosgroup.Ballot, number uint64, err error) {
	return g.proposeIn(ctx, paxosgroup.Ballot{}, payload)
}

// ProposeIn is Propose in one term and no other: if this replica leads in
// another by the time there is room, that is a *NotLeaderError.
func (g *Group) ProposeIn(ctx context.Context, term paxosgroup.Ballot, payload []byte) (number uint64, err error) {
	if term.IsZero() {
		return 0, fmt.Errorf("propose to group %d: %w", g.id, &NotLeaderError{})
	}
	_, number, err = g.proposeIn(ctx, term, payload)
	return number, err
}

func (g *Group) proposeIn(ctx context.Context, only paxosgroup.Ballot, payload []byte) (paxosgroup.Ballot, uint64, error) {
	p := proposalPool.Get().(*proposal)
	p.Payload, p.Only = payload, only
	if err := g.await(ctx, p); err != nil {
		return paxosgroup.Ballot{}, 0, err
	}
	term, number := p.Term, p.Number
	p.recycle()
	return term, number, nil
}

// ProposeAndWait proposes an entry and returns when it is effective, with its
// slot. It waits for room in the window, in order of arrival. An error that is an
// ErrUnknownOutcome says that the entry was proposed, and leadership lost or ctx
// ended before it was known what became of it; with any other it is not and will
// not be effective. The payload must not be changed afterwards.
func (g *Group) ProposeAndWait(ctx context.Context, payload []byte) (paxosgroup.Slot, error) {
	p := proposalPool.Get().(*proposal)
	p.Payload, p.Wait = payload, true
	if err := g.await(ctx, p); err != nil {
		return 0, err
	}
	slot := p.Slot
	p.recycle()
	return slot, nil
}

// ProposeOnce is ProposeAndWait for an entry that may have been proposed before:
// here, or at another replica that led. However often it is called with a
// session and sequence number, one entry of them becomes effective at most; if
// that has happened, it is a success, whose slot is 0 if it is too long ago to
// say. A session is named by a number that no other has, and not 0. It has one
// proposal outstanding at a time, and each one after has a higher number: see
// paxosgroup.Session. If leadership is lost and won again meanwhile, the entry is
// proposed again; if another replica leads, the error names it, and the entry
// may be proposed there with the same numbers.
func (g *Group) ProposeOnce(ctx context.Context, session, sequence uint64, payload []byte) (paxosgroup.Slot, error) {
	if session == 0 || sequence == 0 {
		return 0, fmt.Errorf("propose to group %d: session %d, sequence number %d: must not be 0", g.id, session, sequence)
	}
	var unknown *UnknownOutcomeError // of an earlier attempt
	for {
		changed := g.StatusChanged()
		p := proposalPool.Get().(*proposal)
		p.Payload, p.Wait, p.Session, p.Sequence = payload, true, session, sequence
		err := g.await(ctx, p)
		if err == nil {
			slot := p.Slot
			p.recycle()
			return slot, nil
		}
		nl, notLeader := errors.AsType[*NotLeaderError](err)
		u, lost := errors.AsType[*UnknownOutcomeError](err)
		switch {
		case lost:
			unknown = u
		case !notLeader:
			return 0, err
		case unknown == nil:
			return 0, err
		case nl.Leader != 0:
			// As long as the earlier attempt may be chosen, this is no plain refusal.
			return 0, fmt.Errorf("propose to group %d: %w", g.id, &UnknownOutcomeError{Term: unknown.Term, Leader: nl.Leader})
		default:
			select {
			case <-changed:
			case <-ctx.Done():
				return 0, fmt.Errorf("propose to group %d: %w: %w", g.id, ErrUnknownOutcome, context.Cause(ctx))
			}
		}
	}
}

// await hands p in and waits for its answer. If that is an error, p is gone.
func (g *Group) await(ctx context.Context, p *proposal) error {
	p.state.Store(proposalQueued)
	g.runner.propose(g.engine, &p.Proposal)
	select {
	case <-p.done:
	case <-ctx.Done():
		switch gone, taken := p.abandon(); {
		case taken:
			return fmt.Errorf("propose to group %d: %w: %w", g.id, ErrUnknownOutcome, context.Cause(ctx))
		case gone:
			return fmt.Errorf("propose to group %d: %w", g.id, context.Cause(ctx))
		}
		<-p.done
	}
	if p.Err == nil {
		return nil
	}
	err := fmt.Errorf("propose to group %d: %w", g.id, p.Err)
	p.recycle()
	return err
}

// recycle makes an answered proposal a blank one.
func (p *proposal) recycle() {
	p.Payload, p.Only, p.Session, p.Sequence, p.Wait = nil, paxosgroup.Ballot{}, 0, 0, false
	p.Slot, p.Err = 0, nil
	proposalPool.Put(p)
}
