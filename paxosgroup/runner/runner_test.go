package runner

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"quorate/paxosgroup"
	"quorate/paxosgroup/slotlog"
)

func TestHundredGroupsShareFlushes(t *testing.T) {
	const groups, each = 100, 20
	c := startCluster(t, 5, groups, nil)
	for id := paxosgroup.GroupID(1); id <= groups; id++ {
		c.leader(id)
	}
	type before struct{ flushes, batches uint64 }
	start := make([]before, len(c.nodes))
	for i, n := range c.nodes {
		start[i] = before{n.log.Stats().Flushes, n.runner.Stats().Batches}
	}
	var proposing errgroup.Group
	for id := paxosgroup.GroupID(1); id <= groups; id++ {
		proposing.Go(func() error {
			for k := range each {
				if err := c.propose(id, fmt.Sprintf("group %d entry %d", id, k)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := proposing.Wait(); err != nil {
		t.Fatal(err)
	}
	for id := paxosgroup.GroupID(1); id <= groups; id++ {
		c.awaitEqual(id, each)
	}
	for i, n := range c.nodes {
		flushes := n.log.Stats().Flushes - start[i].flushes
		batches := n.runner.Stats().Batches - start[i].batches
		t.Logf("replica %d: %d sets of records of %d groups in %d flushes", n.id, batches, groups, flushes)
		if flushes == 0 || batches < 3*flushes {
			t.Errorf("replica %d: %d sets of records took %d flushes: one flush does not serve several groups", n.id, batches, flushes)
		}
	}
}

// proposeMany hands in entries first, first+1, … and fails the test if it cannot.
func (c *cluster) proposeMany(id paxosgroup.GroupID, first, count, size int) {
	c.t.Helper()
	for k := first; k < first+count; k++ {
		if err := c.propose(id, fmt.Sprintf("%d %s", k, strings.Repeat("x", size))); err != nil {
			c.t.Fatal(err)
		}
	}
}

func TestKilledReplicaReturnsAndCatchesUp(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 5, 3, func(gc *GroupConfig) {
		gc.RecentEntriesMax = 50    // so that most is read from disk
		gc.Core.WindowSlotsMax = 64 // and the one that was away is far outside
	})
	for id := paxosgroup.GroupID(1); id <= 3; id++ {
		c.leader(id)
		c.proposeMany(id, 0, 100, 100)
		c.awaitEqual(id, 100)
	}
	c.stop(4)
	// Far beyond what a window or a follower's memory holds.
	for id := paxosgroup.GroupID(1); id <= 3; id++ {
		c.proposeMany(id, 100, 500, 100)
	}
	c.start(4)
	for id := paxosgroup.GroupID(1); id <= 3; id++ {
		c.awaitEqual(id, 600)
	}
	// All at once, and everything is still there.
	for i := range c.nodes {
		c.stop(i)
	}
	for i := range c.nodes {
		c.start(i)
	}
	for id := paxosgroup.GroupID(1); id <= 3; id++ {
		c.leader(id)
		c.proposeMany(id, 600, 10, 100)
		c.awaitEqual(id, 610)
		data, _ := payloads(t, c.nodes[4].runner.Group(id))
		for k, p := range data {
			if !strings.HasPrefix(p, fmt.Sprintf("%d ", k)) {
				t.Fatalf("group %d: entry %d is %.20q", id, k, p)
			}
		}
	}
}

func TestAnotherReplicaLeadsWhenTheLeaderIsKilled(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 5, 1, nil)
	first := c.leader(1).Status()
	c.proposeMany(1, 0, 50, 10)
	c.awaitEqual(1, 50) // what is only proposed may die with the leader
	c.stop(int(first.ID) - 1)
	second := c.leader(1).Status()
	if second.ID == first.ID || !first.Ballot.Less(second.Ballot) {
		t.Fatalf("replica %d at %v after replica %d at %v", second.ID, second.Ballot, first.ID, first.Ballot)
	}
	c.proposeMany(1, 50, 50, 10)
	c.start(int(first.ID) - 1)
	c.awaitEqual(1, 100)
}

func TestReadFromMemoryAndDiskAgree(t *testing.T) {
	t.Parallel()
	small := startCluster(t, 3, 1, func(gc *GroupConfig) { gc.RecentEntriesMax = 5 })
	small.leader(1)
	small.proposeMany(1, 0, 20, 10)
	// Terms change, so openings and what they void are in the log as well.
	for k := range 4 {
		small.leader(1).Resign()
		small.proposeMany(1, 20*(k+1), 20, 10)
	}
	small.awaitEqual(1, 20) // what was proposed last in a term may be lost
	for _, n := range small.nodes {
		g := n.runner.Group(1)
		_, all := payloads(t, g)
		var judge paxosgroup.Judge
		for _, d := range all {
			if want := judge.Judge(d.Entry); d.Verdict != want {
				t.Fatalf("replica %d slot %d: verdict %d, want %d", n.id, d.Slot, d.Verdict, want)
			}
			base, err := g.BaseAt(d.Slot)
			if err != nil {
				t.Fatal(err)
			}
			if base.Slot != d.Slot || !base.Judge.Equal(judge) {
				t.Fatalf("replica %d: base at slot %d is %+v, want judge %+v", n.id, d.Slot, base, judge)
			}
		}
	}
}

func TestReadBounds(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1, 1, nil)
	g := c.leader(1)
	c.proposeMany(1, 0, 5, 1000)
	eventually(t, "chosen", 5*time.Second, func() bool { s, _ := g.Chosen(); return s >= 6 })
	last, _ := g.Chosen()
	if _, err := g.Read(0, 1); !errors.Is(err, ErrCompacted) {
		t.Errorf("slot 0: error %v", err)
	}
	if d, err := g.Read(last+1, 1); err != nil || d != nil {
		t.Errorf("beyond the end: %v, %v", d, err)
	}
	if d, err := g.Read(2, 0); err != nil || len(d) != 1 {
		t.Errorf("at least one: %d entries, %v", len(d), err)
	}
	if _, err := g.BaseAt(last + 1); err == nil {
		t.Error("a base beyond what is chosen")
	}
}

func TestProposeWhereItCannotBe(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, 1, nil)
	leader := c.leader(1)
	for _, n := range c.nodes {
		g := n.runner.Group(1)
		if g == leader {
			continue
		}
		eventually(t, "followers know the leader", 5*time.Second, func() bool { return g.Status().Leader == leader.Status().ID })
		_, _, err := g.Propose(t.Context(), []byte("x"))
		nl, ok := errors.AsType[*NotLeaderError](err)
		if !ok || !errors.Is(err, paxosgroup.ErrNotLeader) || nl.Leader != leader.Status().ID {
			t.Errorf("replica %d: error %v", n.id, err)
		}
	}
	if _, err := leader.ProposeIn(t.Context(), paxosgroup.Ballot{Counter: 1 << 40, Replica: 1}, []byte("x")); !errors.Is(err, paxosgroup.ErrNotLeader) {
		t.Errorf("another term: error %v", err)
	}
}

func TestProposeWaitsForRoomAndGivesUpWithItsContext(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, 1, func(gc *GroupConfig) { gc.Core.WindowSlotsMax = 4 })
	g := c.leader(1)
	before, _ := payloads(t, g)
	// Without the others nothing is chosen, and the window fills.
	for i, n := range c.nodes {
		if n.runner.Group(1) != g {
			c.stop(i)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	taken := 0
	for {
		if _, _, err := g.Propose(ctx, []byte("x")); err != nil {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			break
		}
		taken++
	}
	if taken > 4+1 {
		t.Errorf("%d proposals taken by a window of 4", taken)
	}
	if after, _ := payloads(t, g); len(after) != len(before) {
		t.Errorf("%d entries chosen without a quorum", len(after)-len(before))
	}
	for i := range c.nodes {
		if c.nodes[i] == nil {
			c.start(i)
		}
	}
	c.leader(1)
	if err := c.propose(1, "after"); err != nil {
		t.Fatal(err)
	}
	c.awaitEqual(1, 1)
}

func TestTransfer(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 5, 1, nil)
	g := c.leader(1)
	c.proposeMany(1, 0, 20, 10)
	to := g.Status().ID%5 + 1
	if err := g.Transfer(t.Context(), to); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the successor leads", 5*time.Second, func() bool {
		return c.nodes[to-1].runner.Group(1).Status().Role == paxosgroup.Leader
	})
	if err := g.Transfer(t.Context(), to); !errors.Is(err, paxosgroup.ErrNotLeader) {
		t.Errorf("transfer by a follower: %v", err)
	}
}

func TestGroupAddedAtRunTime(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, 1, nil)
	for _, n := range c.nodes {
		if _, err := n.runner.AddGroup(t.Context(), c.groupConfig(7, n.id)); err != nil {
			t.Fatal(err)
		}
		if _, err := n.runner.AddGroup(t.Context(), c.groupConfig(7, n.id)); err == nil {
			t.Fatal("added twice")
		}
	}
	c.leader(7)
	c.proposeMany(7, 0, 10, 10)
	c.awaitEqual(7, 10)
}

func TestLearnerJoinsByImage(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, 1, nil)
	g := c.leader(1)
	c.proposeMany(1, 0, 30, 10)
	s, _ := g.Chosen()
	base, err := g.BaseAt(s)
	if err != nil {
		t.Fatal(err)
	}
	m := g.Status().Membership
	m.Members = append(append([]paxosgroup.Member(nil), m.Members...), paxosgroup.Member{ID: 4, Region: "r4", Kind: paxosgroup.Learner})
	m.NextID = 5
	if err := g.ChangeMembership(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	// A replica without a past, whose membership comes with the image.
	c.nodes = append(c.nodes, nil)
	c.configure = func(gc *GroupConfig) { gc.Bootstrap = paxosgroup.Membership{} }
	listener := listen(t)
	c.addresses[4] = listener.Addr().String()
	for _, n := range c.nodes[:3] {
		n.transport.SetPeers(c.addresses)
	}
	c.startOn(3, listener)
	joined := c.nodes[3].runner.Group(1)
	if err := joined.Restart(t.Context(), base); err != nil {
		t.Fatal(err)
	}
	if _, err := joined.Read(s, 1); !errors.Is(err, ErrCompacted) {
		t.Errorf("reading at the base: %v", err)
	}
	c.proposeMany(1, 30, 30, 10)
	check := func(joined *Group) {
		t.Helper()
		last, _ := g.Chosen()
		eventually(t, "the learner has it all", 10*time.Second, func() bool { got, _ := joined.Chosen(); return got >= last })
		for slot := s + 1; slot <= last; slot++ {
			want, err := g.Read(slot, 0)
			if err != nil {
				t.Fatal(err)
			}
			got, err := joined.Read(slot, 0)
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Fatalf("slot %d: %+v, want %+v (%v)", slot, got, want, err)
			}
		}
	}
	check(joined)
	c.stop(3)
	c.start(3)
	check(c.nodes[3].runner.Group(1))
}

func TestRunEndsWhenTheLogFails(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1, 1, nil)
	g := c.leader(1)
	n := c.nodes[0]
	n.log.Close() // beneath the runner
	_, _, err := g.Propose(t.Context(), []byte("x"))
	for err == nil {
		_, _, err = g.Propose(t.Context(), []byte("x"))
	}
	if !errors.Is(err, ErrStopped) || !errors.Is(err, slotlog.ErrClosed) {
		t.Errorf("Propose: %v", err)
	}
	c.stop(0)
	if !errors.Is(n.runErr, slotlog.ErrClosed) {
		t.Errorf("Run: %v", n.runErr)
	}
}
