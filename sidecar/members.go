package sidecar

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"quorate/paxosgroup"
	"quorate/sidecar/config"
)

// kindOf returns the member kind of a region's configured one.
func kindOf(kind string) paxosgroup.MemberKind {
	switch kind {
	case config.KindWitness:
		return paxosgroup.Witness
	case config.KindLearner:
		return paxosgroup.Learner
	}
	return paxosgroup.Voter
}

// firstMembership is that of a cluster that is made with the configuration.
func firstMembership(cfg *config.Config) paxosgroup.Membership {
	m := paxosgroup.Membership{Phase1: cfg.Consensus.Phase1Quorum, Phase2: cfg.Consensus.Phase2Quorum}
	for i, r := range cfg.Regions {
		m.Members = append(m.Members, paxosgroup.Member{ID: paxosgroup.ReplicaID(i + 1), Region: r.Name, Kind: kindOf(r.Kind)})
	}
	m.NextID = paxosgroup.ReplicaID(len(cfg.Regions) + 1)
	return m
}

// databasesOf counts the voters that have a database.
func databasesOf(m paxosgroup.Membership) int {
	n := 0
	for _, member := range m.Members {
		if member.Kind == paxosgroup.Voter {
			n++
		}
	}
	return n
}

// durability is how many regions may be lost for good without the loss of an
// acknowledged commit.
func durability(m paxosgroup.Membership) int {
	phase1, phase2 := m.Quorums()
	return config.Durability(m.Voters(), databasesOf(m), phase1, phase2)
}

func configured(cfg *config.Config, region string) (config.Region, bool) {
	for _, r := range cfg.Regions {
		if r.Name == region {
			return r, true
		}
	}
	return config.Region{}, false
}

// wantedMembership returns the membership that the configuration asks for, from
// the one in force, and the differences in words. A region that has no member
// yet gets one by starting its sidecar; one whose successor is catching up is
// left to that.
func wantedMembership(cfg *config.Config, now paxosgroup.Membership) (next paxosgroup.Membership, changes []string) {
	next = now
	next.Members = nil
	of := map[string]int{}
	for _, member := range now.Members {
		of[member.Region]++
	}
	for _, member := range now.Members {
		r, listed := configured(cfg, member.Region)
		if !listed {
			changes = append(changes, fmt.Sprintf("region %s is removed", member.Region))
			continue
		}
		if kind := kindOf(r.Kind); kind != member.Kind && of[member.Region] == 1 {
			changes = append(changes, fmt.Sprintf("region %s becomes a %s, it is a %s", member.Region, memberKind(kind), memberKind(member.Kind)))
			member.Kind = kind
		}
		next.Members = append(next.Members, member)
	}
	next.Phase1, next.Phase2 = cfg.Consensus.Phase1Quorum, cfg.Consensus.Phase2Quorum
	was1, was2 := now.Quorums()
	if phase1, phase2 := next.Quorums(); phase1 != was1 || phase2 != was2 {
		changes = append(changes, fmt.Sprintf("quorums become %d and %d, they are %d and %d", phase1, phase2, was1, was2))
	}
	return next, changes
}

// applyMembers implements clusterServing.
func (s *shard) applyMembers(ctx context.Context, dryRun bool) ([]string, error) {
	st := s.group.Status()
	if st.Role != paxosgroup.Leader {
		return nil, errors.New("this region does not lead any more: ask again")
	}
	next, changes := wantedMembership(s.cfg, st.Membership)
	if len(changes) == 0 && next.Phase1 == st.Membership.Phase1 && next.Phase2 == st.Membership.Phase2 {
		return nil, nil
	}
	if err := next.Validate(); err != nil {
		return nil, fmt.Errorf("what the configuration asks for cannot be: %w", err)
	}
	if dryRun {
		return changes, nil
	}
	if err := s.group.ChangeMembership(ctx, next); err != nil {
		return nil, err
	}
	s.log.Info("membership changed to what the configuration says", "changes", changes)
	return changes, nil
}

// addReplica implements clusterServing: it gives a region that lost its disk, or
// is new, a new replica, which learns until it has caught up.
func (s *shard) addReplica(ctx context.Context, region string) (paxosgroup.ReplicaID, paxosgroup.Membership, error) {
	st := s.group.Status()
	if st.Role != paxosgroup.Leader {
		return 0, st.Membership, fmt.Errorf("region %s does not lead", s.cfg.Region)
	}
	m := st.Membership
	m.Members = slices.Clone(m.Members)
	members := m.Members[:0]
	for _, member := range m.Members {
		// A learner of that region is one that was added and lost its disk again.
		if member.Region != region || member.Kind != paxosgroup.Learner {
			members = append(members, member)
		}
	}
	id := m.NextID
	m.NextID++
	m.Members = append(members, paxosgroup.Member{ID: id, Region: region, Kind: paxosgroup.Learner})
	if err := s.group.ChangeMembership(ctx, m); err != nil {
		return 0, m, fmt.Errorf("add replica %d of region %s: %w", id, region, err)
	}
	return id, s.group.Status().Membership, nil
}

// nearlyCaughtUp is how many slots behind a learner may be to become a voter.
const nearlyCaughtUp = 100

// admitted returns the membership in which the learner of an id has become what
// its region's old replica is, in whose place it comes, or else what the
// configuration says; false if it is to stay a learner.
func admitted(cfg *config.Config, now paxosgroup.Membership, id paxosgroup.ReplicaID) (paxosgroup.Membership, bool) {
	learner, ok := now.Member(id)
	if !ok || learner.Kind != paxosgroup.Learner {
		return now, false
	}
	r, _ := configured(cfg, learner.Region)
	kind := kindOf(r.Kind)
	m := now
	m.Members = nil
	for _, member := range now.Members {
		switch {
		case member.ID == id:
		case member.Region == learner.Region:
			kind = member.Kind
		default:
			m.Members = append(m.Members, member)
		}
	}
	if kind == paxosgroup.Learner {
		return now, false
	}
	learner.Kind = kind
	m.Members = append(m.Members, learner)
	if m.Validate() != nil { // one voter more than the quorums in force are made for
		m.Phase1, m.Phase2 = cfg.Consensus.Phase1Quorum, cfg.Consensus.Phase2Quorum
	}
	return m, true
}

// admit gives learners that caught up the vote they are to have, in place of
// their region's old replica, while this region leads.
func (s *shard) admit(ctx context.Context) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		st := s.group.Status()
		if st.Role != paxosgroup.Leader {
			continue
		}
		for _, p := range st.Peers {
			if p.Chosen+nearlyCaughtUp < st.Chosen || p.Chosen == 0 || s.now().Sub(p.LastHeard) > time.Second {
				continue
			}
			m, ok := admitted(s.cfg, st.Membership, p.ID)
			if !ok {
				continue
			}
			member, _ := m.Member(p.ID)
			if err := s.group.ChangeMembership(ctx, m); err != nil {
				s.log.Warn("a replica that caught up was not given its vote", "replica", p.ID, "region", member.Region, "err", err)
			} else {
				s.log.Info("replica votes", "replica", p.ID, "region", member.Region, "kind", memberKind(member.Kind))
			}
			break
		}
	}
}

// lowestBase implements clusterServing: where this region's log begins.
func (s *shard) lowestBase() (paxosgroup.Base, error) {
	return s.group.BaseAt(s.group.Status().Base)
}
