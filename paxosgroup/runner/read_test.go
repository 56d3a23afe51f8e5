package runner

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"quorate/paxosgroup"
)

func TestReadIndexIsNeverBehindWhatIsAcknowledged(t *testing.T) {
	c := startCluster(t, 3, 2, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for i := range 5 {
		for id := paxosgroup.GroupID(1); id <= 2; id++ {
			if err := c.propose(id, fmt.Sprint("v", i)); err != nil {
				t.Fatal(err)
			}
			l := c.leader(id)
			eventually(t, "what was proposed is chosen", 10*time.Second, func() bool {
				s := l.Status()
				chosen, _ := l.Chosen()
				return s.Role != paxosgroup.Leader || chosen == s.LastSlot
			})
			known, _ := l.Chosen()
			for _, n := range c.nodes {
				s, err := n.runner.Group(id).ReadIndex(ctx)
				if err != nil || s < known {
					t.Errorf("replica %d group %d: slot %d, %v; %d was known to be chosen before", n.id, id, s, err, known)
				}
			}
		}
	}
	// With nobody to confirm it, no leader answers once its lease is over.
	c.leader(1)
	l := c.leader(1).Status().ID
	for i := range c.nodes {
		if c.nodes[i].id != l {
			c.stop(i)
		}
	}
	g := c.nodes[l-1].runner.Group(1)
	eventually(t, "the lease is over", 10*time.Second, func() bool { return g.Status().LeaseUntil < BootTime() })
	if s, err := g.ReadIndex(ctx); !errors.Is(err, ErrUnconfirmed) {
		t.Errorf("alone: slot %d, %v; want that nobody confirms it", s, err)
	}
}

// Groups at rest are carried by beats, and their leases are seen to stand.
func TestLeasesOfGroupsAtRestStand(t *testing.T) {
	c := startCluster(t, 3, 50, nil)
	for g := range c.groups {
		c.leader(paxosgroup.GroupID(g + 1))
	}
	for _, n := range c.nodes {
		for g := range c.groups {
			r := n.runner.Group(paxosgroup.GroupID(g + 1))
			eventually(t, "followers know what is chosen", 10*time.Second, func() bool { s, _ := r.Chosen(); r.SetApplied(s); return s > 0 })
		}
	}
	time.Sleep(2 * time.Second)
	terms := make([]paxosgroup.Ballot, c.groups)
	for g := range c.groups {
		terms[g] = c.leader(paxosgroup.GroupID(g + 1)).Status().Ballot
	}
	before := make([]uint64, len(c.nodes))
	for i, n := range c.nodes {
		for _, p := range n.transport.Peers() {
			before[i] += p.Sent
		}
	}
	const watch = 3 * time.Second
	for end := time.Now().Add(watch); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		for g := range c.groups {
			led := false
			for _, n := range c.nodes {
				s := n.runner.Group(paxosgroup.GroupID(g + 1)).Status()
				led = led || s.Role == paxosgroup.Leader && s.LeaseUntil > BootTime() && s.Ballot == terms[g]
			}
			if !led {
				t.Fatalf("group %d: nobody holds the lease of %v any more", g+1, terms[g])
			}
		}
	}
	for i, n := range c.nodes {
		sent := uint64(0)
		for _, p := range n.transport.Peers() {
			sent += p.Sent
		}
		// Two peers, a beat and an ack to each five times a second.
		if most := uint64(2 * 2 * 5 * 2 * watch / time.Second); sent-before[i] > most {
			t.Errorf("replica %d sent %d messages in %v, want at most %d", n.id, sent-before[i], watch, most)
		}
	}
}
