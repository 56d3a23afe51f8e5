package runner

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
	"quorate/paxosgroup/slotlog"
)

// cluster is sidecars' consensus in one process: real files, real gRPC.
type cluster struct {
	t         testing.TB
	dir       string
	groups    int
	nodes     []*node
	addresses map[paxosgroup.ReplicaID]string
	configure func(*GroupConfig)
	between   func(paxosgroup.ReplicaID, Log) Log
	open      func(paxosgroup.ReplicaID) (diskLog, map[paxosgroup.GroupID]paxosgroup.Restored, error)
}

// diskLog is a *slotlog.Log, or a *slotlog.Set.
type diskLog interface {
	Log
	Stats() slotlog.Stats
	Close() error
}

// node is one replica of every group.
type node struct {
	id        paxosgroup.ReplicaID
	runner    *Runner
	log       diskLog
	transport *peer.Transport
	server    *grpc.Server
	cancel    context.CancelFunc
	running   *sync.WaitGroup
	runErr    error
}

func startCluster(t testing.TB, replicas, groups int, configure func(*GroupConfig)) *cluster {
	t.Helper()
	return startClusterOn(t, replicas, groups, configure, nil)
}

// startClusterOn puts something between each runner and its log.
func startClusterOn(t testing.TB, replicas, groups int, configure func(*GroupConfig), between func(paxosgroup.ReplicaID, Log) Log) *cluster {
	t.Helper()
	c := &cluster{between: between, t: t, dir: t.TempDir(), groups: groups, configure: configure}
	c.open = func(id paxosgroup.ReplicaID) (diskLog, map[paxosgroup.GroupID]paxosgroup.Restored, error) {
		return slotlog.Open(slotlog.Config{Dir: filepath.Join(c.dir, fmt.Sprint(id)), SegmentBytes: 4 << 20})
	}
	c.startAll(replicas)
	return c
}

func (c *cluster) startAll(replicas int) {
	t := c.t
	c.addresses = make(map[paxosgroup.ReplicaID]string)
	listeners := make([]net.Listener, replicas)
	for i := range replicas {
		listeners[i] = listen(t)
		c.addresses[paxosgroup.ReplicaID(i+1)] = listeners[i].Addr().String()
	}
	c.nodes = make([]*node, replicas)
	for i := range replicas {
		c.startOn(i, listeners[i])
	}
	t.Cleanup(func() {
		for i := range c.nodes {
			c.stop(i)
		}
	})
}

func (c *cluster) membership() paxosgroup.Membership {
	m := paxosgroup.Membership{NextID: paxosgroup.ReplicaID(len(c.nodes) + 1)}
	for i := range c.nodes {
		m.Members = append(m.Members, paxosgroup.Member{ID: paxosgroup.ReplicaID(i + 1), Region: fmt.Sprintf("r%d", i+1), Kind: paxosgroup.Voter})
	}
	return m
}

func (c *cluster) groupConfig(id paxosgroup.GroupID, replica paxosgroup.ReplicaID) GroupConfig {
	gc := GroupConfig{
		Core: paxosgroup.Config{
			Group: id, ID: replica, Region: fmt.Sprintf("r%d", replica), Seed: uint64(replica),
			// Two cores run all of it, and the race detector slows it further.
			HeartbeatInterval: 200 * time.Millisecond, ElectionTimeoutMin: 500 * time.Millisecond,
			PreferredRegion: fmt.Sprintf("r%d", int(id)%len(c.nodes)+1),
		},
		Bootstrap: c.membership(),
	}
	if c.configure != nil {
		c.configure(&gc)
	}
	return gc
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return listener
}

func (c *cluster) start(i int) {
	c.t.Helper()
	listener, err := net.Listen("tcp", c.addresses[paxosgroup.ReplicaID(i+1)])
	if err != nil {
		c.t.Fatal(err)
	}
	c.startOn(i, listener)
}

func (c *cluster) startOn(i int, listener net.Listener) {
	c.t.Helper()
	n := &node{id: paxosgroup.ReplicaID(i + 1), running: new(sync.WaitGroup)}
	log, restored, err := c.open(n.id)
	if err != nil {
		c.t.Fatal(err)
	}
	n.log = log
	n.transport, err = peer.New(peer.Config{ClusterID: "test", Self: n.id, Deliver: func(from paxosgroup.ReplicaID, batch []peer.GroupMessage) {
		n.runner.Deliver(from, batch)
	}})
	if err != nil {
		c.t.Fatal(err)
	}
	cfg := Config{Log: log, Restored: restored, Transport: n.transport}
	if c.between != nil {
		cfg.Log = c.between(n.id, log)
	}
	for g := range c.groups {
		cfg.Groups = append(cfg.Groups, c.groupConfig(paxosgroup.GroupID(g+1), n.id))
	}
	n.runner, err = New(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	n.server = grpc.NewServer(peer.ServerOptions()...)
	n.transport.Register(n.server)
	n.transport.SetPeers(c.addresses)
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(context.Background())
	n.running.Go(func() { n.server.Serve(listener) })
	n.running.Go(func() { n.transport.Run(ctx) })
	n.running.Go(func() { n.runErr = n.runner.Run(ctx) })
	c.nodes[i] = n
}

func (c *cluster) stop(i int) {
	n := c.nodes[i]
	if n == nil {
		return
	}
	c.nodes[i] = nil
	n.cancel()
	n.server.Stop()
	n.running.Wait()
	if err := n.log.Close(); err != nil {
		c.t.Error(err)
	}
}

// leader returns the replica that leads a group, once one does.
func (c *cluster) leader(id paxosgroup.GroupID) *Group {
	c.t.Helper()
	var leader *Group
	eventually(c.t, fmt.Sprintf("group %d has a leader", id), 20*time.Second, func() bool {
		for _, n := range c.nodes {
			if n != nil {
				if g := n.runner.Group(id); g.Status().Role == paxosgroup.Leader && g.Status().LeaseUntil > BootTime() {
					leader = g
					return true
				}
			}
		}
		return false
	})
	return leader
}

// propose proposes at whichever replica leads. That does not make it chosen.
func (c *cluster) propose(id paxosgroup.GroupID, payload string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		for _, n := range c.nodes {
			if n == nil {
				continue
			}
			_, _, err := n.runner.Group(id).Propose(ctx, []byte(payload))
			if err == nil {
				return nil
			}
			if ctx.Err() != nil {
				return err
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// payloads reads the effective data entries of a replica from the start.
func payloads(t testing.TB, g *Group) (out []string, all []paxosgroup.Delivered) {
	t.Helper()
	next := g.Status().Base + 1
	for {
		entries, err := g.Read(next, 10_000)
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			return out, all
		}
		for _, d := range entries {
			if d.Slot != next {
				t.Fatalf("slot %d follows %d", d.Slot, next-1)
			}
			next++
			if d.Entry.Kind == paxosgroup.KindData && d.Verdict == paxosgroup.Effective {
				out = append(out, string(d.Entry.Payload))
			}
			all = append(all, d)
		}
	}
}

// awaitEqual waits until every running replica of a group has at least count
// effective entries and as much as the others, then compares all they read.
func (c *cluster) awaitEqual(id paxosgroup.GroupID, count int) {
	c.t.Helper()
	var chosen paxosgroup.Slot
	eventually(c.t, fmt.Sprintf("replicas of group %d agree on what is chosen", id), 20*time.Second, func() bool {
		chosen = 0
		for _, n := range c.nodes {
			if n == nil {
				continue
			}
			s, _ := n.runner.Group(id).Chosen()
			if chosen == 0 {
				chosen = s
			}
			// An opening came first.
			if s != chosen || s <= paxosgroup.Slot(count) {
				return false
			}
			if data, _ := payloads(c.t, n.runner.Group(id)); len(data) < count {
				return false
			}
		}
		return true
	})
	var want []paxosgroup.Delivered
	for _, n := range c.nodes {
		if n == nil {
			continue
		}
		_, all := payloads(c.t, n.runner.Group(id))
		if want == nil {
			want = all
			continue
		}
		for i := range min(len(all), len(want)) {
			if !reflect.DeepEqual(all[i], want[i]) {
				c.t.Fatalf("group %d slot %d: replica %d has %+v, want %+v", id, all[i].Slot, n.id, all[i], want[i])
			}
		}
	}
}

func eventually(t testing.TB, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}
