package runner

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"quorate/paxosgroup"
)

// group returns the group of a node that runs.
func (c *cluster) group(i int) *Group { return c.nodes[i].runner.Group(1) }

func TestProposeAndWaitTellsTheSlot(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, 1, nil)
	g := c.leader(1)
	var mu sync.Mutex
	slots := make(map[paxosgroup.Slot]string)
	var proposing errgroup.Group
	for k := range 1024 {
		proposing.Go(func() error {
			payload := fmt.Sprint(k)
			if k%7 == 0 { // among those that nobody waits for
				_, _, err := g.Propose(t.Context(), []byte("x"))
				return err
			}
			slot, err := g.ProposeAndWait(t.Context(), []byte(payload))
			mu.Lock()
			defer mu.Unlock()
			slots[slot] = payload
			return err
		})
	}
	if err := proposing.Wait(); err != nil {
		t.Fatal(err)
	}
	for slot, payload := range slots {
		d, err := g.Read(slot, 0)
		if err != nil || len(d) != 1 || d[0].Verdict != paxosgroup.Effective || string(d[0].Entry.Payload) != payload {
			t.Fatalf("slot %d: %+v, want effective %q (%v)", slot, d, payload, err)
		}
	}
}

func TestProposalOfALostLeadershipHasAnUnknownOutcome(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, 1, nil)
	g := c.leader(1)
	for i, n := range c.nodes {
		if n.runner.Group(1) != g {
			c.stop(i)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := g.ProposeAndWait(ctx, []byte("x")); !errors.Is(err, ErrUnknownOutcome) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("its context ended: %v", err)
	}
	_, err := g.ProposeAndWait(t.Context(), []byte("y"))
	if _, ok := errors.AsType[*UnknownOutcomeError](err); !ok || errors.Is(err, paxosgroup.ErrNotLeader) {
		t.Errorf("leadership was lost: %v", err)
	}
	if _, err := g.ProposeAndWait(t.Context(), []byte("z")); !errors.Is(err, paxosgroup.ErrNotLeader) || errors.Is(err, ErrUnknownOutcome) {
		t.Errorf("it does not lead: %v", err)
	}
}

// TestProposeOnceThroughChangesOfLeadership has clients repeat what they do not
// know the outcome of, wherever there is a leader, while leaders come and go.
func TestProposeOnceThroughChangesOfLeadership(t *testing.T) {
	t.Parallel()
	const clients, each = 8, 40
	c := startCluster(t, 3, 1, func(gc *GroupConfig) {
		gc.Core.LeaseDuration = 600 * time.Millisecond
	})
	c.leader(1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var clientsDone, resigning sync.WaitGroup
	stop := make(chan struct{})
	resigning.Go(func() {
		for k := 0; ; k++ {
			select {
			case <-stop:
				return
			case <-time.After(150 * time.Millisecond):
				for i := range c.nodes {
					if c.group(i).Status().Role == paxosgroup.Leader {
						c.group(i).Resign()
					}
				}
			}
		}
	})
	var mu sync.Mutex
	attempts := 0
	for client := range clients {
		clientsDone.Go(func() {
			for sequence := uint64(1); sequence <= each; sequence++ {
				for i := client; ; i++ {
					mu.Lock()
					attempts++
					mu.Unlock()
					_, err := c.group(i%3).ProposeOnce(ctx, uint64(client+1), sequence, fmt.Append(nil, client, sequence))
					if err == nil {
						break
					}
					if ctx.Err() != nil {
						t.Errorf("client %d: %v", client, err)
						return
					}
					time.Sleep(2 * time.Millisecond)
				}
			}
		})
	}
	clientsDone.Wait()
	close(stop)
	resigning.Wait()
	c.awaitEqual(1, clients*each)
	data, all := payloads(t, c.group(0))
	if len(data) != clients*each {
		t.Errorf("%d entries effective, want %d", len(data), clients*each)
	}
	seen := make(map[string]bool)
	for _, p := range data {
		if seen[p] {
			t.Errorf("%q is effective twice", p)
		}
		seen[p] = true
	}
	t.Logf("%d attempts, %d slots, %d of them void", attempts, len(all), c.group(0).Status().Void)

	// A repetition long after is a success.
	leader := c.leader(1)
	if _, err := leader.ProposeOnce(ctx, 1, each, []byte("again")); err != nil {
		t.Error(err)
	}
	// And the judge with its sessions is the same however it is made.
	var judge paxosgroup.Judge
	for _, d := range all {
		judge.Judge(d.Entry)
		if base, err := c.group(0).BaseAt(d.Slot); err != nil || !base.Judge.Equal(judge) {
			t.Fatalf("base at slot %d is %+v, want judge %+v (%v)", d.Slot, base, judge, err)
		}
	}
}
