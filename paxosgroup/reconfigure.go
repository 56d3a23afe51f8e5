package paxosgroup

import "fmt"

// ProposeMembership starts a change to m, whose epoch it sets. The change is
// made when Status shows the new epoch; it is dropped if the new voters do not
// answer in time or leadership ends first, so a caller looks and asks again.
//
// A lost replica is replaced in two changes: its successor is added as a
// learner, then, caught up, made a voter while the lost one is removed.
func (r *Replica) ProposeMembership(now Instant, m Membership) error {
	r.clock(now)
	l := &r.lead
	if r.role != Leader {
		return ErrNotLeader
	}
	if l.transfer != nil || l.configAt != 0 || l.membership != nil || !l.phase1 {
		return fmt.Errorf("change membership: %w", ErrWindowFull)
	}
	m = m.normalized()
	m.Epoch = r.membership.Epoch + 1
	if err := m.Validate(); err != nil {
		return fmt.Errorf("change membership: %w", err)
	}
	if m.NextID < r.membership.NextID {
		return fmt.Errorf("change membership: %w: next id: %d is below %d", ErrMembership, m.NextID, r.membership.NextID)
	}
	for _, x := range m.Members {
		_, known := r.membership.Member(x.ID)
		if !known && x.ID < r.membership.NextID {
			return fmt.Errorf("change membership: %w: member %d: the id was used before", ErrMembership, x.ID)
		}
		if !known && x.Kind.votes() {
			return fmt.Errorf("change membership: %w: member %d: must be a learner first", ErrMembership, x.ID)
		}
	}
	l.membershipFloor = r.reportedLease()
	l.membership, l.membershipUntil = &m, r.now.Add(2*r.cfg.LeaseDuration)
	r.tryProposeMembership()
	return nil
}

// tryProposeMembership proposes the wanted membership as soon as its voters
// grant the lease for as long as anybody was told that it holds: once the entry
// is chosen, theirs are the only promises that keep others from leading.
func (r *Replica) tryProposeMembership() {
	l := &r.lead
	if l.membership == nil || l.configAt != 0 {
		return
	}
	switch until := r.leaseUntil(*l.membership); {
	case until > r.now && until >= l.membershipFloor:
		r.propose(Entry{
			Kind: KindConfig, Term: r.ballot, Region: r.cfg.Region, Incarnation: l.incarnation,
			Payload: EncodeMembership(*l.membership),
		})
	case r.now >= l.membershipUntil:
		l.membership = nil
	}
}
