// Package admintest serves package admin's service for a cluster that is kept in
// memory: real servers on loopback, whose backend holds a log and a leader and
// nothing else. It is for tests of the service and of its clients.
package admintest

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"quorate/paxosgroup"
	"quorate/sidecar/admin"
)

// Cluster is a cluster of regions that all see the same.
type Cluster struct {
	mu      sync.Mutex
	regions []*Region
	leader  string
	counter uint64 // of the leader's ballot
	log     []admin.LogEntry
	base    paxosgroup.Slot

	// TransferPause is how long nobody takes writes in a transfer. Set it
	// before the first.
	TransferPause time.Duration
}

// Region is one region of a Cluster; it is its server's backend.
type Region struct {
	Name    string
	Address string // of its server

	cluster *Cluster
	id      paxosgroup.ReplicaID
	stop    func()
	change  func(*admin.RegionStatus)
}

// Start serves a cluster whose first region leads, until the test ends.
func Start(t *testing.T, names ...string) *Cluster {
	t.Helper()
	c := &Cluster{leader: names[0], counter: 1}
	for i, name := range names {
		r := &Region{Name: name, cluster: c, id: paxosgroup.ReplicaID(i + 1)}
		c.regions = append(c.regions, r)
		c.serve(t, r)
	}
	return c
}

func (c *Cluster) serve(t *testing.T, r *Region) {
	t.Helper()
	registry := prometheus.NewRegistry()
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{Name: "admintest_replica_id", Help: "The region's replica id."})
	gauge.Set(float64(r.id))
	registry.MustRegister(gauge)
	s, err := admin.NewServer(admin.Config{Address: "127.0.0.1:0", Backend: r, Gatherer: registry, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	r.Address = s.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("server of %s: %v", r.Name, err)
		}
	})
	t.Cleanup(r.stop)
}

// Region returns the region of a name.
func (c *Cluster) Region(name string) *Region {
	for _, r := range c.regions {
		if r.Name == name {
			return r
		}
	}
	panic("admintest: no region " + name)
}

// Stop ends a region's server and waits for it. The region goes on to count as
// a member; if it led, nobody leads.
func (c *Cluster) Stop(name string) {
	c.Region(name).stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leader == name {
		c.leader = ""
	}
}

// Append adds entries to the log; their slots are filled in.
func (c *Cluster) Append(entries ...admin.LogEntry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range entries {
		e.Slot = c.chosen() + 1
		c.log = append(c.log, e)
	}
}

// Compact cuts the log up to slot.
func (c *Cluster) Compact(slot paxosgroup.Slot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log = slices.Clone(c.log[slot-c.base:])
	c.base = slot
}

// Change has a region's status altered before it is told.
func (c *Cluster) Change(name string, change func(*admin.RegionStatus)) {
	r := c.Region(name)
	c.mu.Lock()
	defer c.mu.Unlock()
	r.change = change
}

func (c *Cluster) chosen() paxosgroup.Slot { return c.base + paxosgroup.Slot(len(c.log)) }

// Status is the backend's.
func (r *Region) Status(_ context.Context, all bool) (admin.ClusterStatus, error) {
	c := r.cluster
	c.mu.Lock()
	defer c.mu.Unlock()
	s := admin.ClusterStatus{Cluster: "demo", Region: r.Name, Leader: c.leader,
		DurabilityRegions: (len(c.regions) - 1) / 2, Phase1: len(c.regions)/2 + 1, Phase2: len(c.regions)/2 + 1, Voters: len(c.regions)}
	for _, other := range c.regions {
		if all || other == r {
			s.Regions = append(s.Regions, other.status())
		}
	}
	return s, nil
}

func (r *Region) status() admin.RegionStatus {
	c := r.cluster
	s := admin.RegionStatus{
		Name: r.Name, Reachable: true, ReplicaID: r.id,
		Role: admin.RoleFollower, State: admin.StateFollowing, Leader: c.leader,
		Ballot: paxosgroup.Ballot{Counter: c.counter, Replica: 1},
		Base:   c.base, Chosen: c.chosen(), Applied: c.chosen(),
		CaughtUp: true, Healthy: true, Health: "ok", Incarnation: 0xabc, Kind: "voter",
	}
	if c.leader == r.Name {
		s.Role, s.State, s.Writable, s.LeaseLeft = admin.RoleLeader, admin.StateLeading, true, 1200*time.Millisecond
	}
	if r.change != nil {
		r.change(&s)
	}
	return s
}

// Transfer is the backend's.
func (r *Region) Transfer(ctx context.Context, to string) error {
	c := r.cluster
	c.mu.Lock()
	leader := c.leader
	known := slices.ContainsFunc(c.regions, func(o *Region) bool { return o.Name == to })
	c.mu.Unlock()
	switch {
	case leader == "":
		return admin.ErrNoLeader
	case !known:
		return admin.ErrUnknownRegion
	case leader != r.Name:
		return &admin.NotLeaderError{Leader: leader}
	}
	set := func(name string) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.leader = name
		c.counter++
	}
	set("")
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(c.TransferPause):
	}
	set(to)
	return nil
}

// ReadLog is the backend's.
func (r *Region) ReadLog(_ context.Context, from uint64, limit int, changes bool, yield func(admin.LogEntry) error) error {
	c := r.cluster
	c.mu.Lock()
	base, entries := c.base, slices.Clone(c.log)
	c.mu.Unlock()
	if from == 0 {
		from = uint64(base) + 1
	}
	if from <= uint64(base) {
		return admin.ErrCompacted
	}
	if from > uint64(base)+uint64(len(entries)) {
		return nil
	}
	entries = entries[from-uint64(base)-1:]
	if limit > 0 && limit < len(entries) {
		entries = entries[:limit]
	}
	for _, e := range entries {
		if !changes {
			e.Changes = nil
		}
		if err := yield(e); err != nil {
			return err
		}
	}
	return nil
}

// ApplyMembers is the backend's; the membership is always as configured.
func (r *Region) ApplyMembers(context.Context, bool) ([]string, error) {
	r.cluster.mu.Lock()
	defer r.cluster.mu.Unlock()
	if r.cluster.leader == "" {
		return nil, admin.ErrNoLeader
	}
	return nil, nil
}

// Version is the backend's.
func (r *Region) Version() admin.VersionInfo {
	return admin.VersionInfo{Version: "v1.2.3", Commit: "0123456789ab", GoVersion: "go1.26.0", Protocol: 1, Postgres: "15.18"}
}
