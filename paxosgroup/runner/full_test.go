package runner

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"quorate/paxosgroup"
)

// fullLog is a log whose disk the test fills and empties.
type fullLog struct {
	Log
	full atomic.Bool
}

func (l *fullLog) Full() bool { return l.full.Load() }

func TestFullDiskIsWaitedOut(t *testing.T) {
	t.Parallel()
	logs := make(map[paxosgroup.ReplicaID]*fullLog)
	c := startClusterOn(t, 3, 1, nil, func(id paxosgroup.ReplicaID, l Log) Log {
		logs[id] = &fullLog{Log: l}
		return logs[id]
	})
	g := c.leader(1)
	c.proposeMany(1, 0, 20, 10)
	c.awaitEqual(1, 20) // what is on its way when leadership is given up may be lost
	full := g.Status().ID
	logs[full].full.Store(true)
	// The one with the full disk gives way, and the others go on.
	eventually(t, "another leads", 20*time.Second, func() bool {
		for _, n := range c.nodes {
			if n.id != full && n.runner.Group(1).Status().Role == paxosgroup.Leader {
				return true
			}
		}
		return false
	})
	if _, _, err := g.Propose(t.Context(), []byte("x")); !errors.Is(err, ErrFull) || !errors.Is(err, paxosgroup.ErrNotLeader) {
		t.Errorf("proposing to a full log: %v", err)
	}
	c.proposeMany(1, 20, 20, 10)
	eventually(t, "they are chosen", 20*time.Second, func() bool { // a leader that goes may leave void ones behind
		data, _ := payloads(t, c.leader(1))
		return len(data) == 40
	})
	if d, err := g.Read(1, 1<<20); err != nil || len(d) == 0 {
		t.Errorf("reading from a full log: %d entries, %v", len(d), err)
	}
	if data, _ := payloads(t, g); len(data) >= 40 {
		t.Errorf("%d entries learned by a full log", len(data))
	}
	// All are full: nobody leads. And then there is room. (What was not chosen
	// before would not become effective any more.)
	eventually(t, "the others have chosen what was proposed", 20*time.Second, func() bool {
		data, _ := payloads(t, c.leader(1))
		return len(data) >= 40
	})
	for _, l := range logs {
		l.full.Store(true)
	}
	eventually(t, "nobody leads", 20*time.Second, func() bool {
		for _, n := range c.nodes {
			if n.runner.Group(1).Status().Role == paxosgroup.Leader {
				return false
			}
		}
		return true
	})
	for _, l := range logs {
		l.full.Store(false)
	}
	c.leader(1)
	c.proposeMany(1, 40, 10, 10)
	c.awaitEqual(1, 50)
}
