package runner

import (
	"fmt"
	"testing"

	"quorate/paxosgroup"
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
	done := make(chan struct{})
	for id := paxosgroup.GroupID(1); id <= groups; id++ {
		go func() {
			defer func() { done <- struct{}{} }()
			for k := range each {
				c.propose(id, fmt.Sprintf("group %d entry %d", id, k))
			}
		}()
	}
	for range groups {
		<-done
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
