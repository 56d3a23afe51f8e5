package runner

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"quorate/paxosgroup"
)

// proposal waits for the loop to hand it to the core.
type proposal struct {
	payload []byte
	only    paxosgroup.Ballot // the one term in which it may be proposed; zero: any
	done    chan struct{}     // gets a token when the loop has answered

	mu        sync.Mutex
	answered  bool // by the loop: what follows is set
	abandoned bool // by the caller, who is gone; never with answered
	term      paxosgroup.Ballot
	number    uint64
	err       error
}

var proposals = sync.Pool{New: func() any { return &proposal{done: make(chan struct{}, 1)} }}

// Propose hands an entry to the leader's core and returns the number it has in
// the leader's term. It waits for room in the window, in order of arrival. That
// the entry is proposed says nothing of its being chosen: read the log for that.
// An error means that it was not proposed: a *NotLeaderError, ErrStopped or the
// end of ctx. The payload must not be changed afterwards.
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
	p := proposals.Get().(*proposal)
	p.payload, p.only = payload, only
	g.runner.submit(call{group: g, proposal: p})
	select {
	case <-p.done:
	case <-ctx.Done():
		if p.abandon() {
			return paxosgroup.Ballot{}, 0, fmt.Errorf("propose to group %d: %w", g.id, context.Cause(ctx))
		}
		<-p.done
	}
	term, number, err = p.term, p.number, p.err
	p.payload, p.answered, p.err = nil, false, nil
	proposals.Put(p)
	if err != nil {
		return paxosgroup.Ballot{}, 0, fmt.Errorf("propose to group %d: %w", g.id, err)
	}
	return term, number, nil
}

// abandon gives the proposal up, unless it has been answered.
func (p *proposal) abandon() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.abandoned = !p.answered
	return p.abandoned
}

// answer has offer answer the caller, if there still is one. It reports false if
// offer would rather be asked again.
func (p *proposal) answer(offer func() (paxosgroup.Ballot, uint64, error)) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.abandoned {
		return true
	}
	term, number, err := offer()
	if errors.Is(err, paxosgroup.ErrWindowFull) {
		return false
	}
	p.term, p.number, p.err, p.answered = term, number, err, true
	p.done <- struct{}{}
	return true
}

func (p *proposal) reject(err error) {
	p.answer(func() (paxosgroup.Ballot, uint64, error) { return paxosgroup.Ballot{}, 0, err })
}

// propose hands over what the window has room for.
func (g *Group) propose(now paxosgroup.Instant) {
	n := 0
	for n < len(g.waiting) {
		p := g.waiting[n]
		if !p.answer(func() (paxosgroup.Ballot, uint64, error) {
			if !p.only.IsZero() {
				if ballot, leads := g.core.Leading(); !leads || ballot != p.only {
					return ballot, 0, g.notLeader(paxosgroup.ErrNotLeader)
				}
			}
			term, number, err := g.core.Propose(now, p.payload)
			return term, number, g.notLeader(err)
		}) {
			break
		}
		n++
	}
	rest := copy(g.waiting, g.waiting[n:])
	clear(g.waiting[rest:])
	g.waiting = g.waiting[:rest]
}

// failProposals answers those that wait when the runner stops.
func (g *Group) failProposals(err error) {
	for _, p := range g.waiting {
		p.reject(err)
	}
	g.waiting = nil
}
