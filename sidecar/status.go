package sidecar

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	"quorate/paxosgroup"
	"quorate/paxosgroup/runner"
	"quorate/sidecar/admin"
	"quorate/sidecar/config"
	"quorate/sidecar/sidecarpb"
)

// backend answers operators, the SQL face and the other regions. It exists from
// the sidecar's start; the shard is there once it takes part.
type backend struct {
	cfg     *config.Config
	peers   *regionClients
	version admin.VersionInfo
	log     *slog.Logger

	mu    sync.Mutex
	shard *shard
	id    identity
	note  string // what the sidecar waits for before it takes part
	last  map[string]admin.RegionStatus
}

// say tells what the sidecar waits for, in the log where it is news.
func (b *backend) say(note string) {
	b.mu.Lock()
	news := note != b.note && note != ""
	b.note = note
	b.mu.Unlock()
	if news {
		b.log.Info("not taking part yet", "waiting", note)
	}
}

func (b *backend) run(s *shard, id identity) {
	b.mu.Lock()
	b.shard, b.id = s, id
	b.mu.Unlock()
}

func (b *backend) running() (*shard, identity, string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.shard, b.id, b.note
}

// Version implements admin.Backend.
func (b *backend) Version() admin.VersionInfo { return b.version }

// peerStatusWithin bounds how long another region's answer is waited for.
const peerStatusWithin = 700 * time.Millisecond

// Status implements admin.Backend.
func (b *backend) Status(ctx context.Context, all bool) (admin.ClusterStatus, error) {
	s, id, note := b.running()
	cs := admin.ClusterStatus{Cluster: b.cfg.Cluster, Region: b.cfg.Region}
	var own admin.RegionStatus
	if s == nil {
		own = admin.RegionStatus{Name: b.cfg.Region, Reachable: true, State: admin.StateStarting, Role: admin.RoleFollower, Health: note}
	} else {
		own = s.regionStatus()
		cs.Leader = own.Leader
		m := s.group.Status().Membership
		cs.DurabilityRegions, cs.Voters = durability(m), m.Voters()
		cs.Phase1, cs.Phase2 = m.Quorums()
	}
	regions := make([]admin.RegionStatus, len(b.cfg.Regions))
	var wg sync.WaitGroup
	for i, r := range b.cfg.Regions {
		if r.Name == b.cfg.Region {
			regions[i] = own
			continue
		}
		if !all {
			continue
		}
		wg.Go(func() { regions[i] = b.ask(ctx, r.Name, id.ClusterID) })
	}
	wg.Wait()
	if !all {
		cs.Regions = []admin.RegionStatus{own}
		return cs, nil
	}
	var highest paxosgroup.Slot
	for _, r := range regions {
		highest = max(highest, r.Chosen)
		if r.Reachable && r.Writable && r.Role == admin.RoleLeader && r.LeaseLeft > 0 {
			cs.Leader = r.Name
		}
	}
	for i := range regions {
		if regions[i].Kind == config.KindWitness {
			continue
		}
		regions[i].LagSlots = uint64(highest - min(highest, regions[i].Applied))
	}
	cs.Regions = regions
	return cs, nil
}

func (b *backend) ask(ctx context.Context, region string, clusterID uint64) admin.RegionStatus {
	ctx, cancel := context.WithTimeout(ctx, peerStatusWithin)
	defer cancel()
	c, err := b.peers.cluster(region)
	var reply *sidecarpb.RegionReply
	if err == nil {
		reply, err = c.Region(ctx, &sidecarpb.RegionRequest{ClusterId: clusterID})
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		r := b.last[region]
		r.Name, r.Reachable, r.Healthy, r.CaughtUp, r.Writable, r.LeaseLeft = region, false, false, false, false, 0
		r.Health = "does not answer: " + status.Convert(err).Message()
		return r
	}
	r := admin.RegionStatus{
		Name: region, Reachable: true, ReplicaID: paxosgroup.ReplicaID(reply.ReplicaId), Role: reply.Role, State: reply.State,
		Leader: reply.Leader, Writable: reply.Writable,
		Ballot:    paxosgroup.Ballot{Counter: reply.BallotCounter, Replica: paxosgroup.ReplicaID(reply.BallotReplica)},
		LeaseLeft: time.Duration(reply.LeaseLeftNs), Chosen: paxosgroup.Slot(reply.Chosen), Applied: paxosgroup.Slot(reply.Applied),
		Lag: time.Duration(reply.LagNs), CaughtUp: reply.Applied >= reply.Chosen, Healthy: reply.Healthy, Health: reply.Health,
		Incarnation: paxosgroup.Incarnation(reply.Incarnation), Kind: reply.Kind, Base: paxosgroup.Slot(reply.Base), Durable: paxosgroup.Slot(reply.Durable),
		FeedNext: paxosgroup.Slot(reply.FeedNext),
	}
	if theirs := time.Duration(reply.LeaseDurationNs); theirs != b.cfg.Consensus.LeaseDuration {
		r.Healthy = false
		r.Health = fmt.Sprintf("consensus.lease_duration is %v there and %v here: a lease is safe only if all regions have the same", theirs, b.cfg.Consensus.LeaseDuration)
	}
	b.last[region] = r
	return r
}

// heard returns what was last heard of another region.
func (b *backend) heard(region string) admin.RegionStatus {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.last[region]
}

// regionStatus tells how this region is, without asking anybody.
func (s *shard) regionStatus() admin.RegionStatus {
	st := s.group.Status()
	now := s.now()
	feedNext := s.feedNext()
	s.mu.Lock()
	defer s.mu.Unlock()
	r := admin.RegionStatus{
		Name: s.cfg.Region, Reachable: true, ReplicaID: st.ID, State: s.state,
		Ballot: st.Ballot, Base: st.Base, Chosen: st.Chosen, Applied: s.applied, Incarnation: s.incarnation, Void: st.Void,
		Durable: s.durable, FeedNext: feedNext, LogBytes: uint64(s.logBytes()),
		Lag: s.chosenAt.lag(s.applied, s.learned, time.Now()), Healthy: s.health == "", Health: "ok",
	}
	r.LagSlots = uint64(st.Chosen - min(st.Chosen, s.applied))
	r.CaughtUp = s.applied >= st.Chosen && s.state != admin.StateStarting && s.state != admin.StateSeeding
	if s.state == admin.StateWitness { // has nothing to apply to
		r.Applied, r.Lag, r.LagSlots, r.CaughtUp = 0, 0, 0, st.Leader != 0
	}
	switch st.Role {
	case paxosgroup.Leader:
		r.Role = admin.RoleLeader
		if st.LeaseUntil > now {
			r.LeaseLeft = st.LeaseUntil.Sub(now)
			r.Writable = s.open && s.proposing == st.Ballot
		}
	case paxosgroup.Candidate:
		r.Role = admin.RoleCandidate
	default:
		r.Role = admin.RoleFollower
	}
	r.Kind = memberKind(paxosgroup.Learner) // one that is not in the membership yet
	for _, m := range st.Membership.Members {
		if m.ID == st.ID {
			r.Kind = memberKind(m.Kind)
			switch m.Kind {
			case paxosgroup.Learner:
				r.Role = admin.RoleLearner
			case paxosgroup.Witness:
				r.Role = admin.RoleWitness
			}
		}
		if m.ID == st.Leader {
			r.Leader = m.Region
		}
	}
	switch {
	case r.Role == admin.RoleLeader && r.LeaseLeft == 0:
		r.Healthy, r.Health = false, "no quorum of regions answers: writes wait"
	case r.Role == admin.RoleCandidate || r.Leader == "":
		r.Healthy, r.Health = false, "no leader is heard of: there is none, or this region is cut off, or it is no longer a member"
	}
	if r.Healthy && r.Role == admin.RoleLeader {
		if _, changes := wantedMembership(s.cfg, st.Membership); len(changes) > 0 {
			r.Health = "ok, but region.yaml asks for another membership, which paxosctl member apply would make: " + strings.Join(changes, ", ")
		}
	}
	switch full, low := s.logRoom(); {
	case full:
		r.Healthy, r.Health = false, "the disk of "+s.cfg.Log.Where()+" is full: this region accepts nothing and does not lead until there is room; free some, it goes on by itself"
	case low:
		r.Healthy, r.Health = false, "the disk of "+s.cfg.Log.Where()+" has no room for the next file of the log: this region should not lead, and will soon accept nothing; free some"
	}
	if s.divergent != "" {
		r.Healthy, r.Health = false, s.divergent
	}
	if s.health != "" {
		r.Health = s.health
	}
	return r
}

// regionReply implements clusterServing.
func (s *shard) regionReply(context.Context) (*sidecarpb.RegionReply, error) {
	r := s.regionStatus()
	return &sidecarpb.RegionReply{
		Region: r.Name, ReplicaId: uint32(r.ReplicaID), Incarnation: uint64(r.Incarnation), Role: r.Role, State: r.State,
		Writable: r.Writable, Leader: r.Leader, BallotCounter: r.Ballot.Counter, BallotReplica: uint32(r.Ballot.Replica),
		LeaseLeftNs: int64(r.LeaseLeft), Chosen: uint64(r.Chosen), Applied: uint64(r.Applied), LagNs: int64(r.Lag),
		Healthy: r.Healthy, Health: r.Health, LeaseDurationNs: int64(s.cfg.Consensus.LeaseDuration),
		Kind: r.Kind, Base: uint64(r.Base), Durable: uint64(r.Durable), FeedNext: uint64(r.FeedNext),
	}, nil
}

// Transfer implements admin.Backend: it asks the leader's sidecar, which may be
// this one.
func (b *backend) Transfer(ctx context.Context, to string) error {
	known := false
	for _, r := range b.cfg.Regions {
		known = known || r.Name == to
	}
	if !known {
		return fmt.Errorf("%w: %q", admin.ErrUnknownRegion, to)
	}
	s, id, note := b.running()
	if s == nil {
		return fmt.Errorf("%w: %s", admin.ErrNoLeader, note)
	}
	leader := s.regionStatus().Leader
	switch leader {
	case "":
		return admin.ErrNoLeader
	case to:
		return nil
	case b.cfg.Region:
		_, err := s.transfer(ctx, to)
		return err
	}
	c, err := b.peers.cluster(leader)
	if err != nil {
		return err
	}
	if _, err := c.Transfer(ctx, &sidecarpb.TransferRequest{ClusterId: id.ClusterID, To: to}); err != nil {
		return &admin.CannotLeadError{Region: to, Reason: status.Convert(err).Message()}
	}
	return nil
}

// transfer implements clusterServing: it hands leadership to a region and
// returns for how long no writes were taken.
func (s *shard) transfer(ctx context.Context, to string) (time.Duration, error) {
	st := s.group.Status()
	if st.Role != paxosgroup.Leader {
		return 0, &admin.NotLeaderError{Leader: s.leaderRegion()}
	}
	var target paxosgroup.ReplicaID
	for _, m := range st.Membership.Members {
		if m.Region == to && m.Kind == paxosgroup.Voter {
			target = m.ID
		}
	}
	if target == 0 {
		return 0, &admin.CannotLeadError{Region: to, Reason: "it has no voter with a database"}
	}
	s.mu.Lock()
	se := s.session
	s.mu.Unlock()
	if se == nil {
		return 0, errors.New("this region's PostgreSQL is not connected")
	}
	if r := s.others.ask(ctx, to, s.clusterID); !r.Reachable || !r.Healthy || r.State != admin.StateFollowing {
		reason := r.Health
		if r.Reachable {
			reason = fmt.Sprintf("it is %s: %s", r.State, r.Health)
		}
		return 0, &admin.CannotLeadError{Region: to, Reason: reason}
	}
	var pause time.Duration
	req := request{done: make(chan error, 1), do: func(ctx context.Context) (err error) {
		pause, err = se.handOver(ctx, target)
		return err
	}}
	select {
	case se.requests <- req:
	case <-se.done:
		return 0, errors.New("the connection to this region's PostgreSQL ended")
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	// The request runs to its end whoever waits for it.
	select {
	case err := <-req.done:
		return pause, err
	case <-se.done:
		return 0, errors.New("the connection to this region's PostgreSQL ended")
	}
}

// ApplyMembers implements admin.Backend: it asks the leader's sidecar, which may
// be this one.
func (b *backend) ApplyMembers(ctx context.Context, dryRun bool) ([]string, error) {
	s, id, note := b.running()
	if s == nil {
		return nil, fmt.Errorf("%w: %s", admin.ErrNoLeader, note)
	}
	leader := s.regionStatus().Leader
	switch leader {
	case "":
		return nil, admin.ErrNoLeader
	case b.cfg.Region:
		return s.applyMembers(ctx, dryRun)
	}
	c, err := b.peers.cluster(leader)
	if err != nil {
		return nil, err
	}
	reply, err := c.ApplyMembers(ctx, &sidecarpb.ApplyMembersRequest{ClusterId: id.ClusterID, DryRun: dryRun})
	if err != nil {
		return nil, fmt.Errorf("region %s, which leads: %s", leader, status.Convert(err).Message())
	}
	return reply.Changes, nil
}

// leaveWithin bounds how long an ending sidecar tries to hand leadership over.
const leaveWithin = 3 * time.Second

// leave gives up leadership in order before the sidecar ends: to the region that
// has applied most if it takes it, else to whoever is elected. Clients of this
// region are refused from then on, not left waiting.
func (s *shard) leave(ctx context.Context) {
	st := s.group.Status()
	if st.Role != paxosgroup.Leader {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, leaveWithin)
	defer cancel()
	if !s.transferToAny(ctx) {
		s.group.Resign()
	}
}

// transferToAny hands leadership to the region that has applied most of those
// that take it, and reports whether one did.
func (s *shard) transferToAny(ctx context.Context) bool {
	st := s.group.Status()
	peers := slices.Clone(st.Peers)
	slices.SortFunc(peers, func(a, b paxosgroup.PeerStatus) int { return cmp.Compare(b.Applied, a.Applied) })
	for _, p := range peers {
		if s.now().Sub(p.LastHeard) > time.Second || ctx.Err() != nil {
			continue
		}
		for _, m := range st.Membership.Members {
			if m.ID != p.ID || m.Kind != paxosgroup.Voter {
				continue
			}
			pause, err := s.transfer(ctx, m.Region)
			if err == nil {
				s.log.Info("leadership handed over", "to", m.Region, "pause", pause)
				return true
			}
			s.log.Warn("leadership was not taken", "by", m.Region, "err", err)
		}
	}
	return false
}

// ReadLog implements admin.Backend.
func (b *backend) ReadLog(ctx context.Context, from uint64, limit int, changes bool, yield func(admin.LogEntry) error) error {
	s, _, note := b.running()
	if s == nil {
		return errors.New(note)
	}
	slot := max(paxosgroup.Slot(from), s.group.Status().Base+1)
	if from != 0 && slot != paxosgroup.Slot(from) {
		return admin.ErrCompacted
	}
	for n := 0; limit == 0 || n < limit; {
		chosen, _ := s.group.Chosen()
		if slot > chosen {
			return nil
		}
		batch, err := s.group.Read(slot, 1<<20)
		if errors.Is(err, runner.ErrCompacted) {
			return admin.ErrCompacted
		}
		if err != nil {
			return err
		}
		for _, d := range batch {
			if err := ctx.Err(); err != nil {
				return err
			}
			e, err := readable(d, s.group, s.relations, changes)
			if err != nil {
				return err
			}
			if err := yield(e); err != nil {
				return err
			}
			slot = d.Slot + 1
			if n++; limit > 0 && n >= limit {
				return nil
			}
		}
	}
	return nil
}
