package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"quorate/paxosgroup"
	"quorate/sidecar/config"
	"quorate/sidecar/sidecarpb"
)

// party is one sidecar's part in making a cluster, over real gRPC.
type party struct {
	cfg    config.Config
	empty  bool
	member *membership
	server *grpc.Server
	peers  *regionClients
}

// parties starts n sidecars' memberships that know each other's addresses.
func parties(t *testing.T, n int) []*party {
	t.Helper()
	var all []*party
	var regions []config.Region
	var listeners []net.Listener
	for i := range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
		regions = append(regions, config.Region{Name: fmt.Sprintf("r%d", i+1), Peer: l.Addr().String()})
	}
	for i := range n {
		cfg := config.Default()
		cfg.Cluster, cfg.Region, cfg.Regions, cfg.DataDir = "c", regions[i].Name, regions, filepath.Join(t.TempDir())
		p := &party{cfg: cfg, empty: true}
		p.start(t, listeners[i])
		all = append(all, p)
	}
	return all
}

func (p *party) start(t *testing.T, l net.Listener) {
	t.Helper()
	id, err := loadIdentity(p.cfg.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	p.peers = newRegionClients(&p.cfg)
	p.member = newMembership(&p.cfg, id, p.peers, slog.New(slog.DiscardHandler), func() (bool, string) { return p.empty, "" })
	p.server = grpc.NewServer()
	sidecarpb.RegisterClusterServer(p.server, p.member)
	var serving sync.WaitGroup
	serving.Go(func() { p.server.Serve(l) })
	t.Cleanup(func() {
		p.server.Stop()
		p.peers.close()
		serving.Wait()
	})
}

// enter has the given parties await their identities and returns them, or the
// errors, after at most the time given.
func enterAll(t *testing.T, within time.Duration, ps ...*party) ([]identity, []error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	ids, errs := make([]identity, len(ps)), make([]error, len(ps))
	var wg sync.WaitGroup
	for i, p := range ps {
		wg.Go(func() { ids[i], errs[i] = p.member.await(ctx, func(string) {}) })
	}
	wg.Wait()
	return ids, errs
}

func TestClusterIsMadeWithEveryRegionUp(t *testing.T) {
	all := parties(t, 3)
	// Two of three: nobody may begin, since the third could have been a member.
	if _, errs := enterAll(t, 700*time.Millisecond, all[1], all[2]); errs[0] == nil || errs[1] == nil {
		t.Fatal("a region took part before the first one made the cluster")
	}
	ids, errs := enterAll(t, 10*time.Second, all...)
	for i, err := range errs {
		if err != nil {
			t.Fatalf("r%d: %v", i+1, err)
		}
		if ids[i].ClusterID != ids[0].ClusterID || ids[i].ReplicaID != paxosgroup.ReplicaID(i+1) || ids[i].Life != sidecarpb.Life_LIFE_MEMBER {
			t.Errorf("r%d is %+v", i+1, ids[i])
		}
		if kept, err := loadIdentity(all[i].cfg.DataDir); err != nil || kept.ReplicaID != ids[i].ReplicaID {
			t.Errorf("r%d kept %+v, %v", i+1, kept, err)
		}
	}
}

// serving stands for the shard of a member that leads.
type servingStub struct{ added []string }

func (s *servingStub) addReplica(_ context.Context, region string) (paxosgroup.ReplicaID, paxosgroup.Membership, error) {
	s.added = append(s.added, region)
	return 4, paxosgroup.Membership{Members: []paxosgroup.Member{{ID: 1, Region: "r1", Kind: paxosgroup.Voter}}, NextID: 5}, nil
}
func (s *servingStub) regionReply(context.Context) (*sidecarpb.RegionReply, error) {
	return nil, errors.New("not asked")
}
func (s *servingStub) applyMembers(context.Context, bool) ([]string, error)    { return nil, nil }
func (s *servingStub) lowestBase() (paxosgroup.Base, error)                    { return paxosgroup.Base{}, nil }
func (s *servingStub) transfer(context.Context, string) (time.Duration, error) { return 0, nil }

func TestALostDiskComesBackAsANewReplica(t *testing.T) {
	all := parties(t, 3)
	if _, errs := enterAll(t, 10*time.Second, all...); errors.Join(errs...) != nil {
		t.Fatal(errs)
	}
	leader := &servingStub{}
	all[1].member.serve(leader)

	lost := all[0] // the coordinator itself: it must not make another cluster
	lost.server.Stop()
	lost.peers.close()
	lost.cfg.DataDir = t.TempDir()
	l, err := net.Listen("tcp", lost.cfg.Regions[0].Peer)
	if err != nil {
		t.Fatal(err)
	}
	lost.start(t, l)
	ids, errs := enterAll(t, 10*time.Second, lost)
	if errs[0] != nil {
		t.Fatal(errs[0])
	}
	if ids[0].ReplicaID != 4 || ids[0].Life != sidecarpb.Life_LIFE_JOINING || len(leader.added) != 1 || leader.added[0] != "r1" {
		t.Errorf("came back as %+v, the leader added %v", ids[0], leader.added)
	}
}

func TestWhatCannotBecomeAClusterIsRefused(t *testing.T) {
	t.Run("two databases that are not empty", func(t *testing.T) {
		all := parties(t, 3)
		all[0].empty, all[2].empty = false, false
		_, errs := enterAll(t, 3*time.Second, all...)
		if errs[0] == nil || !strings.Contains(errs[0].Error(), "r1 and r3 both hold tables") {
			t.Errorf("the coordinator: %v", errs[0])
		}
	})
	t.Run("one database that is not empty is the others' origin", func(t *testing.T) {
		all := parties(t, 3)
		all[1].empty = false
		ids, errs := enterAll(t, 10*time.Second, all...)
		for i := range all {
			if errs[i] != nil || ids[i].Origin != "r2" {
				t.Errorf("r%d: origin %q, %v", i+1, ids[i].Origin, errs[i])
			}
		}
	})
	t.Run("a sidecar of another cluster", func(t *testing.T) {
		all := parties(t, 3)
		all[2].cfg.Cluster = "other"
		_, errs := enterAll(t, 3*time.Second, all[0])
		if errs[0] == nil || !strings.Contains(errs[0].Error(), `cluster "other"`) {
			t.Errorf("%v", errs[0])
		}
	})
	t.Run("another region at an address", func(t *testing.T) {
		all := parties(t, 3)
		all[0].peers.addrs["r2"] = all[2].cfg.Regions[2].Peer
		_, errs := enterAll(t, 3*time.Second, all[0])
		if errs[0] == nil || !strings.Contains(errs[0].Error(), `is region "r3", not "r2"`) {
			t.Errorf("%v", errs[0])
		}
	})
	t.Run("an empty disk beside a full database", func(t *testing.T) {
		all := parties(t, 3)
		if _, errs := enterAll(t, 10*time.Second, all...); errors.Join(errs...) != nil {
			t.Fatal(errs)
		}
		lost := &party{cfg: all[0].cfg}
		lost.cfg.DataDir = t.TempDir()
		lost.peers = newRegionClients(&lost.cfg)
		defer lost.peers.close()
		lost.member = newMembership(&lost.cfg, nil, lost.peers, slog.New(slog.DiscardHandler), func() (bool, string) { return false, "" })
		_, errs := enterAll(t, 3*time.Second, lost)
		if errs[0] == nil || !strings.Contains(errs[0].Error(), "its database is not empty") {
			t.Errorf("%v", errs[0])
		}
	})
}
