package runner

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"quorate/paxosgroup"
)

// Proposal is a data entry on its way into the log. It belongs to the engine
// from EngineGroup.Propose until it is answered; only Abandon may be called
// meanwhile, from any goroutine.
type Proposal struct {
	Payload []byte            // must not be changed, now or later
	Only    paxosgroup.Ballot // the one term in which it may be proposed; zero: any
	// Answered is called once, unless it was abandoned, when the core has taken
	// the proposal or would not.
	Answered func(*Proposal)

	// The answer.
	Term   paxosgroup.Ballot
	Number uint64
	Err    error

	state atomic.Uint32
}

// The states of a proposal.
const (
	proposalQueued uint32 = iota
	proposalOffered
	proposalAnswered
	proposalAbandoned
)

// Abandon gives the proposal up, and reports whether it could: if not, it has
// been answered, or is at this moment.
func (p *Proposal) Abandon() bool {
	for {
		switch p.state.Load() {
		case proposalQueued:
			if p.state.CompareAndSwap(proposalQueued, proposalAbandoned) {
				return true
			}
		case proposalOffered: // for as long as the core takes to look at it
			runtime.Gosched()
		default:
			return false
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

// proposals are those that wait for room in the window, oldest first.
type proposals struct {
	max     int
	waiting []*Proposal
}

// Propose hands in an entry, to be offered to the core at the next Step and
// answered then or, if there is no room in the window, when there is.
func (g *EngineGroup) Propose(p *Proposal) {
	w := &g.proposals
	if len(w.waiting) >= w.max {
		p.reject(fmt.Errorf("%w: %d (make fewer, or come again later)", ErrBusy, len(w.waiting)))
		return
	}
	w.waiting = append(w.waiting, p)
	g.engine.touch(g)
}

// offer hands over what the window has room for.
func (g *EngineGroup) offer(now paxosgroup.Instant) {
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
		p.answer(term, number, err)
	}
	if n == 0 {
		return
	}
	rest := copy(w.waiting, w.waiting[n:])
	clear(w.waiting[rest:])
	w.waiting = w.waiting[:rest]
}

// take has the core take one proposal.
func (g *EngineGroup) take(now paxosgroup.Instant, p *Proposal) (paxosgroup.Ballot, uint64, error) {
	if !p.Only.IsZero() {
		if ballot, leads := g.core.Leading(); !leads || ballot != p.Only {
			return ballot, 0, g.notLeader(paxosgroup.ErrNotLeader)
		}
	}
	term, number, err := g.core.Propose(now, p.Payload)
	return term, number, g.notLeader(err)
}

// failProposals answers those that wait when nothing will be done any more.
func (g *EngineGroup) failProposals(err error) {
	for _, p := range g.proposals.waiting {
		p.reject(err)
	}
	g.proposals.waiting = nil
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
// ErrStopped or the end of ctx. The payload must not be changed afterwards.
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

func (g *Group) proposeIn(ctx context.Context, only paxosgroup.Ballot, payload []byte) (term paxosgroup.Ballot, number uint64, err error) {
	p := proposalPool.Get().(*proposal)
	p.Payload, p.Only = payload, only
	p.state.Store(proposalQueued)
	g.runner.propose(g.engine, &p.Proposal)
	select {
	case <-p.done:
	case <-ctx.Done():
		if p.Abandon() {
			return paxosgroup.Ballot{}, 0, fmt.Errorf("propose to group %d: %w", g.id, context.Cause(ctx))
		}
		<-p.done
	}
	term, number, err = p.Term, p.Number, p.Err
	p.Payload, p.Err = nil, nil
	proposalPool.Put(p)
	if err != nil {
		return paxosgroup.Ballot{}, 0, fmt.Errorf("propose to group %d: %w", g.id, err)
	}
	return term, number, nil
}
