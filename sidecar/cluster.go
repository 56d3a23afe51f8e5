package sidecar

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"quorate/paxosgroup"
	"quorate/sidecar/config"
	"quorate/sidecar/sidecarpb"
)

// membership makes, finds or rejoins the cluster, and answers the others while
// they do so.
//
// A cluster is made once, with every region up: the first region of the list
// coordinates. It gives each sidecar an identity (Prepare) and lets nobody take
// part (Activate) before all have theirs on disk. So whoever is empty later has
// lost its disk, and nobody ever votes with an empty memory under its old name.
type membership struct {
	cfg     *config.Config
	dataDir string
	log     *slog.Logger
	peers   *regionClients

	// dbState is asked while the sidecar has no part in a cluster yet.
	dbState func() (empty bool, problem string)
	// join, region and transfer are set once the sidecar takes part.
	updating sync.Mutex // held over a change of the identity; taken before mu
	mu       sync.Mutex
	id       *identity
	changed  chan struct{} // closed and replaced when id changes
	serving  clusterServing
	sidecarpb.UnimplementedClusterServer
}

// clusterServing is what the running shard answers the other regions.
type clusterServing interface {
	addReplica(ctx context.Context, region string) (paxosgroup.ReplicaID, paxosgroup.Membership, error)
	regionReply(ctx context.Context) (*sidecarpb.RegionReply, error)
	transfer(ctx context.Context, to string) (time.Duration, error)
	applyMembers(ctx context.Context, dryRun bool) ([]string, error)
	lowestBase() (paxosgroup.Base, error)
}

func newMembership(cfg *config.Config, id *identity, peers *regionClients, log *slog.Logger, dbState func() (bool, string)) *membership {
	return &membership{cfg: cfg, dataDir: cfg.DataDir, log: log, peers: peers, dbState: dbState, id: id, changed: make(chan struct{})}
}

func (m *membership) serve(s clusterServing) {
	m.mu.Lock()
	m.serving = s
	m.mu.Unlock()
}

func (m *membership) current() (*identity, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.id, m.changed
}

// update replaces the identity by what change makes of the current one (nil if
// there is none yet), on disk first. A change that returns nil leaves it. Changes
// come one after the other: what one saw still holds when it is written.
func (m *membership) update(change func(now *identity) (*identity, error)) error {
	m.updating.Lock()
	defer m.updating.Unlock()
	now, _ := m.current()
	next, err := change(now)
	if err != nil || next == nil {
		return err
	}
	if err := next.save(m.dataDir); err != nil {
		return err
	}
	m.mu.Lock()
	m.id = next
	close(m.changed)
	m.changed = make(chan struct{})
	m.mu.Unlock()
	return nil
}

// takePart makes a prepared sidecar of that cluster a member.
func (m *membership) takePart(clusterID uint64) error {
	return m.update(func(now *identity) (*identity, error) {
		switch {
		case now == nil || now.ClusterID != clusterID:
			return nil, status.Error(codes.FailedPrecondition, "not prepared for this cluster")
		case now.Life != sidecarpb.Life_LIFE_PREPARED:
			return nil, nil
		}
		member := *now
		member.Life = sidecarpb.Life_LIFE_MEMBER
		return &member, nil
	})
}

// mark changes the identity of a sidecar that has one.
func (m *membership) mark(change func(id *identity)) error {
	return m.update(func(now *identity) (*identity, error) {
		next := *now
		change(&next)
		if reflect.DeepEqual(next, *now) {
			return nil, nil
		}
		return &next, nil
	})
}

// markFounded records that the region's database has been set up once: an empty
// one is from then on one that was lost.
func (m *membership) markFounded() error { return m.mark(func(id *identity) { id.Founded = true }) }

// markReplace records why the database must be replaced, or, with "", that it
// has been.
func (m *membership) markReplace(why string) error {
	return m.mark(func(id *identity) { id.Replace = why })
}

func regionNames(cfg *config.Config) []string {
	names := make([]string, len(cfg.Regions))
	for i, r := range cfg.Regions {
		names[i] = r.Name
	}
	return names
}

func regionKinds(cfg *config.Config) []string {
	kinds := make([]string, len(cfg.Regions))
	for i, r := range cfg.Regions {
		kinds[i] = memberKind(kindOf(r.Kind))
	}
	return kinds
}

// await returns this sidecar's identity as a member or as one that joins, and
// makes or joins the cluster if need be. It tells through say what it waits for.
func (m *membership) await(ctx context.Context, say func(string)) (identity, error) {
	for {
		id, changed := m.current()
		if id != nil && (id.Life == sidecarpb.Life_LIFE_MEMBER && id.Superseded == "" || id.Life == sidecarpb.Life_LIFE_JOINING) {
			return *id, nil
		}
		waiting, err := m.attempt(ctx, id)
		if err != nil {
			return identity{}, err
		}
		say(waiting)
		select {
		case <-ctx.Done():
			return identity{}, ctx.Err()
		case <-changed:
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// attempt takes one step towards membership and says what is still missing.
func (m *membership) attempt(ctx context.Context, id *identity) (waiting string, err error) {
	if id != nil && id.Superseded != "" {
		// The database is this cluster's, so it can be replaced by an image.
		return m.joinRunning(ctx)
	}
	probes := make(map[string]*sidecarpb.ProbeReply, len(m.cfg.Regions))
	var missing []string
	for _, r := range m.cfg.Regions {
		if r.Name == m.cfg.Region {
			empty, problem := m.dbState()
			p := &sidecarpb.ProbeReply{Region: r.Name, Life: sidecarpb.Life_LIFE_EMPTY, DatabaseEmpty: empty, DatabaseProblem: problem}
			if id != nil {
				p.Life, p.ClusterId, p.ReplicaId = id.Life, id.ClusterID, uint32(id.ReplicaID)
			}
			probes[r.Name] = p
			continue
		}
		p, err := m.probe(ctx, r.Name)
		if err != nil {
			if isMismatch(err) {
				return "", fmt.Errorf("region %s at %s: %s", r.Name, r.Peer, status.Convert(err).Message())
			}
			missing = append(missing, r.Name)
			continue
		}
		if p.Region != r.Name {
			return "", fmt.Errorf("regions: the sidecar at %s is region %q, not %q: correct its address in the configuration", r.Peer, p.Region, r.Name)
		}
		probes[r.Name] = p
	}
	for _, r := range m.cfg.Regions {
		p := probes[r.Name]
		if p == nil || p.Life != sidecarpb.Life_LIFE_MEMBER {
			continue
		}
		// The cluster exists. Prepared sidecars wait to be activated; an empty
		// one has lost its disk.
		if id != nil {
			if id.ClusterID != p.ClusterId {
				return "", fmt.Errorf("region %s belongs to cluster %016x, this sidecar was prepared for %016x: move data_dir %s away to join as a new replica", r.Name, p.ClusterId, id.ClusterID, m.dataDir)
			}
			return "", m.takePart(p.ClusterId)
		}
		own := probes[m.cfg.Region]
		if own.DatabaseProblem != "" {
			return own.DatabaseProblem, nil
		}
		if !own.DatabaseEmpty {
			return "", errors.New("postgres.dsn: this region has no identity in the running cluster, but its database is not empty: empty it (drop and create the database) so that it can be seeded from another region")
		}
		return m.joinRunning(ctx)
	}
	if len(missing) > 0 {
		return "a new cluster is made when every region is up; not reached: " + fmt.Sprint(missing), nil
	}
	if m.cfg.Regions[0].Name != m.cfg.Region {
		return "waiting for region " + m.cfg.Regions[0].Name + " to make the cluster", nil
	}
	return m.found(ctx, id, probes)
}

// found makes the cluster. Every region answered, none is a member.
func (m *membership) found(ctx context.Context, id *identity, probes map[string]*sidecarpb.ProbeReply) (string, error) {
	origin := ""
	for _, r := range m.cfg.Regions {
		p := probes[r.Name]
		if p.DatabaseProblem != "" {
			return fmt.Sprintf("region %s: %s", r.Name, p.DatabaseProblem), nil
		}
		if p.DatabaseEmpty {
			continue
		}
		if origin != "" {
			return "", fmt.Errorf("the databases of regions %s and %s both hold tables: one region may start with an existing database, the others must be empty", origin, r.Name)
		}
		origin = r.Name
	}
	own := identity{
		Cluster: m.cfg.Cluster, Region: m.cfg.Region, ReplicaID: 1, Origin: origin,
		Life: sidecarpb.Life_LIFE_PREPARED,
	}
	if id != nil { // a coordinator that was stopped half way goes on with what it began
		own.ClusterID = id.ClusterID
	} else {
		var b [8]byte
		rand.Read(b[:])
		own.ClusterID = binary.LittleEndian.Uint64(b[:])
	}
	own.Membership = paxosgroup.EncodeMembership(firstMembership(m.cfg))
	err := m.update(func(now *identity) (*identity, error) {
		if now != nil && now.Life != sidecarpb.Life_LIFE_PREPARED {
			return nil, fmt.Errorf("this sidecar already belongs to cluster %016x", now.ClusterID)
		}
		prepared := own
		return &prepared, nil
	})
	if err != nil {
		return "", err
	}
	for i, r := range m.cfg.Regions {
		if r.Name == m.cfg.Region {
			continue
		}
		c, err := m.peers.cluster(r.Name)
		if err != nil {
			return "", err
		}
		callCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err = c.Prepare(callCtx, &sidecarpb.PrepareRequest{
			Cluster: m.cfg.Cluster, ClusterId: own.ClusterID, ReplicaId: uint32(i + 1), Membership: own.Membership, Origin: origin,
		})
		cancel()
		if err != nil {
			return fmt.Sprintf("region %s does not take its identity: %s", r.Name, status.Convert(err).Message()), nil
		}
	}
	// All have their identity on disk. From here on an empty sidecar is one
	// that lost it.
	if err := m.takePart(own.ClusterID); err != nil {
		return "", err
	}
	m.log.Info("cluster made", "cluster", m.cfg.Cluster, "cluster_id", fmt.Sprintf("%016x", own.ClusterID), "origin", origin)
	for _, r := range m.cfg.Regions { // a hint: whoever misses it sees a member at its next probe
		if c, err := m.peers.cluster(r.Name); err == nil && r.Name != m.cfg.Region {
			callCtx, cancel := context.WithTimeout(ctx, 2*time.Second)
			_, _ = c.Activate(callCtx, &sidecarpb.ActivateRequest{ClusterId: own.ClusterID})
			cancel()
		}
	}
	return "", nil
}

// joinRunning asks the cluster for a new replica id.
func (m *membership) joinRunning(ctx context.Context) (string, error) {
	var last error
	for _, r := range m.cfg.Regions {
		if r.Name == m.cfg.Region {
			continue
		}
		c, err := m.peers.cluster(r.Name)
		if err != nil {
			return "", err
		}
		callCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
		reply, err := c.Join(callCtx, &sidecarpb.JoinRequest{Cluster: m.cfg.Cluster, Region: m.cfg.Region})
		cancel()
		if err != nil {
			last = err
			continue
		}
		m.log.Info("joining as a new replica", "replica", reply.ReplicaId)
		return "", m.update(func(now *identity) (*identity, error) {
			if now != nil && now.Superseded == "" {
				return nil, nil // prepared meanwhile: the cluster was not running after all
			}
			return &identity{
				Cluster: m.cfg.Cluster, ClusterID: reply.ClusterId, Region: m.cfg.Region, ReplicaID: paxosgroup.ReplicaID(reply.ReplicaId),
				Life: sidecarpb.Life_LIFE_JOINING, Membership: reply.Membership, Founded: true,
			}, nil
		})
	}
	return fmt.Sprintf("asking to join the running cluster: %s", status.Convert(last).Message()), nil
}

func (m *membership) probe(ctx context.Context, region string) (*sidecarpb.ProbeReply, error) {
	c, err := m.peers.cluster(region)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	phase1, phase2 := m.cfg.Quorums()
	return c.Probe(ctx, &sidecarpb.ProbeRequest{
		Cluster: m.cfg.Cluster, Region: m.cfg.Region, Regions: regionNames(m.cfg), Kinds: regionKinds(m.cfg),
		Phase1Quorum: uint32(phase1), Phase2Quorum: uint32(phase2), LeaseDurationNs: int64(m.cfg.Consensus.LeaseDuration),
	})
}

// Mismatches are told apart from an unreachable peer by this code.
func isMismatch(err error) bool { return status.Code(err) == codes.FailedPrecondition }

// Probe implements sidecarpb.ClusterServer.
func (m *membership) Probe(_ context.Context, req *sidecarpb.ProbeRequest) (*sidecarpb.ProbeReply, error) {
	if req.Cluster != m.cfg.Cluster {
		return nil, status.Errorf(codes.FailedPrecondition, "this sidecar belongs to cluster %q, the caller (region %s) to %q: correct the addresses in its configuration", m.cfg.Cluster, req.Region, req.Cluster)
	}
	if names := regionNames(m.cfg); !slices.Equal(names, req.Regions) {
		return nil, status.Errorf(codes.FailedPrecondition, "region %s lists the regions %v, region %s lists %v: the lists must be equal, in the same order", m.cfg.Region, names, req.Region, req.Regions)
	}
	if theirs := time.Duration(req.LeaseDurationNs); theirs != m.cfg.Consensus.LeaseDuration {
		return nil, status.Errorf(codes.FailedPrecondition, "region %s has consensus.lease_duration %v, region %s has %v: a lease is safe only if all have the same", m.cfg.Region, m.cfg.Consensus.LeaseDuration, req.Region, theirs)
	}
	id, _ := m.current()
	if id == nil || id.Life != sidecarpb.Life_LIFE_MEMBER {
		// What the cluster is made with. Later the membership says it.
		if kinds := regionKinds(m.cfg); !slices.Equal(kinds, req.Kinds) {
			return nil, status.Errorf(codes.FailedPrecondition, "region %s has the regions %v as %v, region %s has them as %v: regions[].kind must be the same in all", m.cfg.Region, regionNames(m.cfg), kinds, req.Region, req.Kinds)
		}
		if phase1, phase2 := m.cfg.Quorums(); uint32(phase1) != req.Phase1Quorum || uint32(phase2) != req.Phase2Quorum {
			return nil, status.Errorf(codes.FailedPrecondition, "region %s has quorums of %d in phase 1 and %d in phase 2, region %s has %d and %d: consensus.phase1_quorum and phase2_quorum must be the same in all", m.cfg.Region, phase1, phase2, req.Region, req.Phase1Quorum, req.Phase2Quorum)
		}
	}
	empty, problem := m.dbState()
	reply := &sidecarpb.ProbeReply{Region: m.cfg.Region, Life: sidecarpb.Life_LIFE_EMPTY, DatabaseEmpty: empty, DatabaseProblem: problem}
	if id != nil {
		reply.Life, reply.ClusterId, reply.ReplicaId = id.Life, id.ClusterID, uint32(id.ReplicaID)
	}
	return reply, nil
}

// Prepare implements sidecarpb.ClusterServer.
func (m *membership) Prepare(_ context.Context, req *sidecarpb.PrepareRequest) (*sidecarpb.PrepareReply, error) {
	if req.Cluster != m.cfg.Cluster {
		return nil, status.Errorf(codes.FailedPrecondition, "this sidecar belongs to cluster %q, not %q", m.cfg.Cluster, req.Cluster)
	}
	// A prepared sidecar never voted, so it may be prepared anew.
	err := m.update(func(now *identity) (*identity, error) {
		if now != nil && now.Life != sidecarpb.Life_LIFE_PREPARED {
			return nil, status.Errorf(codes.AlreadyExists, "region %s already belongs to cluster %016x", m.cfg.Region, now.ClusterID)
		}
		return &identity{
			Cluster: req.Cluster, ClusterID: req.ClusterId, Region: m.cfg.Region, ReplicaID: paxosgroup.ReplicaID(req.ReplicaId),
			Life: sidecarpb.Life_LIFE_PREPARED, Membership: req.Membership, Origin: req.Origin,
		}, nil
	})
	if err != nil {
		return nil, asStatus(err)
	}
	return &sidecarpb.PrepareReply{}, nil
}

// asStatus keeps an error that is one already.
func asStatus(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Internal, err.Error())
}

// Activate implements sidecarpb.ClusterServer.
func (m *membership) Activate(_ context.Context, req *sidecarpb.ActivateRequest) (*sidecarpb.ActivateReply, error) {
	if err := m.takePart(req.ClusterId); err != nil {
		return nil, asStatus(err)
	}
	return &sidecarpb.ActivateReply{}, nil
}

var errNotServing = status.Error(codes.Unavailable, "this sidecar does not take part yet")

func (m *membership) running(clusterID uint64) (clusterServing, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.serving == nil || m.id == nil {
		return nil, errNotServing
	}
	if clusterID != m.id.ClusterID {
		return nil, status.Errorf(codes.FailedPrecondition, "this sidecar belongs to cluster %016x, not %016x", m.id.ClusterID, clusterID)
	}
	return m.serving, nil
}

// Join implements sidecarpb.ClusterServer.
func (m *membership) Join(ctx context.Context, req *sidecarpb.JoinRequest) (*sidecarpb.JoinReply, error) {
	if req.Cluster != m.cfg.Cluster {
		return nil, status.Errorf(codes.FailedPrecondition, "this sidecar belongs to cluster %q, not %q", m.cfg.Cluster, req.Cluster)
	}
	if !slices.Contains(regionNames(m.cfg), req.Region) {
		return nil, status.Errorf(codes.FailedPrecondition, "region %q is not in this cluster's list %v", req.Region, regionNames(m.cfg))
	}
	id, _ := m.current()
	if id == nil {
		return nil, errNotServing
	}
	s, err := m.running(id.ClusterID)
	if err != nil {
		return nil, err
	}
	replica, members, err := s.addReplica(ctx, req.Region)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &sidecarpb.JoinReply{ClusterId: id.ClusterID, ReplicaId: uint32(replica), Membership: paxosgroup.EncodeMembership(members)}, nil
}

// Region implements sidecarpb.ClusterServer.
func (m *membership) Region(ctx context.Context, req *sidecarpb.RegionRequest) (*sidecarpb.RegionReply, error) {
	s, err := m.running(req.ClusterId)
	if err != nil {
		return nil, err
	}
	return s.regionReply(ctx)
}

// Transfer implements sidecarpb.ClusterServer.
func (m *membership) Transfer(ctx context.Context, req *sidecarpb.TransferRequest) (*sidecarpb.TransferReply, error) {
	s, err := m.running(req.ClusterId)
	if err != nil {
		return nil, err
	}
	pause, err := s.transfer(ctx, req.To)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return &sidecarpb.TransferReply{PauseNs: int64(pause)}, nil
}

// ApplyMembers implements sidecarpb.ClusterServer.
func (m *membership) ApplyMembers(ctx context.Context, req *sidecarpb.ApplyMembersRequest) (*sidecarpb.ApplyMembersReply, error) {
	s, err := m.running(req.ClusterId)
	if err != nil {
		return nil, err
	}
	changes, err := s.applyMembers(ctx, req.DryRun)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return &sidecarpb.ApplyMembersReply{Changes: changes}, nil
}

// Base implements sidecarpb.ClusterServer.
func (m *membership) Base(_ context.Context, req *sidecarpb.BaseRequest) (*sidecarpb.BaseReply, error) {
	s, err := m.running(req.ClusterId)
	if err != nil {
		return nil, err
	}
	base, err := s.lowestBase()
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &sidecarpb.BaseReply{Base: paxosgroup.EncodeBase(base)}, nil
}

// regionClients holds one connection to each other region's sidecar, for
// everything that is not Paxos messages.
type regionClients struct {
	mu    sync.Mutex
	conns map[string]*grpc.ClientConn
	addrs map[string]string
}

func newRegionClients(cfg *config.Config) *regionClients {
	c := &regionClients{conns: map[string]*grpc.ClientConn{}, addrs: map[string]string{}}
	for _, r := range cfg.Regions {
		c.addrs[r.Name] = r.Peer
	}
	return c
}

// conn returns the connection to a region, made at first use.
func (c *regionClients) conn(region string) (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if conn := c.conns[region]; conn != nil {
		return conn, nil
	}
	addr, ok := c.addrs[region]
	if !ok {
		return nil, fmt.Errorf("region %q is not in the configuration", region)
	}
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnectBackoff, MinConnectTimeout: 2 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
	)
	if err != nil {
		return nil, fmt.Errorf("region %s at %s: %w", region, addr, err)
	}
	c.conns[region] = conn
	return conn, nil
}

func (c *regionClients) cluster(region string) (sidecarpb.ClusterClient, error) {
	conn, err := c.conn(region)
	if err != nil {
		return nil, err
	}
	return sidecarpb.NewClusterClient(conn), nil
}

func (c *regionClients) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		conn.Close()
	}
	c.conns = map[string]*grpc.ClientConn{}
}
