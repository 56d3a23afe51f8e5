package sim

import (
	"flag"
	"fmt"
	"testing"
	"time"

	"quorate/paxosgroup"
)

var (
	simSeed  = flag.Uint64("sim.seed", 0, "replay this one seed")
	simSeeds = flag.Int("sim.seeds", 100, "how many seeds to run, from -sim.from on")
	simFrom  = flag.Uint64("sim.from", 1, "first seed")
)

const (
	chaosFor = 20 * time.Second
	healFor  = 20 * time.Second // within which all must be equal after the faults
)

func TestSafetyUnderFaults(t *testing.T) {
	from, n := *simFrom, *simSeeds
	if *simSeed != 0 {
		from, n = *simSeed, 1
	}
	total := map[string]int{}
	for seed := from; seed < from+uint64(n); seed++ {
		stats, err := runSeed(seed)
		if err != nil {
			t.Errorf("%v\nreplay: go test ./test/sim -run '^%s$' -sim.seed=%d", err, t.Name(), seed)
		}
		for k, v := range stats {
			total[k] += v
		}
	}
	t.Logf("%d seeds from %d: %v", n, from, total)
	if n >= 20 {
		for _, k := range []string{"crash", "pause", "cut", "transfer", "resign", "replace", "slots", "void", "terms", "seeded", "changes"} {
			if total[k] == 0 {
				t.Errorf("no world had any %s: the simulator does not exercise it", k)
			}
		}
	}
}

func runSeed(seed uint64) (stats map[string]int, err error) {
	var w *world
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("seed %d at %v: panic: %v", seed, w.now, p)
			if *simSeed != 0 {
				panic(p)
			}
		}
	}()
	size := 3 + 2*int(seed%3/2) + 2*int(seed%2) // 3, 5 or 7
	preferred := []string{"", "r1", "r2"}[seed%3]
	w = newWorld(seed, size, func(c *paxosgroup.Config) { c.PreferredRegion = preferred })
	c := &chaos{w: w}
	c.begin()
	w.run(chaosFor)
	if w.check.err == nil {
		c.end()
		before := len(w.check.log)
		ok := w.runUntil(healFor, func() bool { return w.settled(before) })
		if w.check.err == nil && !ok {
			return c.kinds, fmt.Errorf("seed %d: no progress, or not all equal, %v after the faults ended: %s", seed, healFor, w.describe())
		}
	}
	if w.check.err != nil {
		return c.kinds, fmt.Errorf("seed %d at %v: %w", seed, w.now, w.check.err)
	}
	c.kinds["slots"] = len(w.check.log)
	c.kinds["void"] = w.check.void
	c.kinds["terms"] = w.check.terms
	c.kinds["seeded"] = w.check.seeded
	c.kinds["changes"] = w.check.changes
	c.kinds["messages"] = w.sent
	return c.kinds, nil
}

// settled reports whether an entry that was offered after the faults is
// effective and every member has been handed the whole log.
func (w *world) settled(before int) bool {
	l := w.leader()
	if l == nil {
		return false
	}
	s := l.core.Status()
	if s.LeaseUntil <= l.clock(w.now) || s.LastSlot != s.Chosen {
		return false
	}
	if last := len(w.check.log); last <= before+3 || w.check.log[last-1].Entry.Kind != paxosgroup.KindData {
		return w.offer(l, 10) != nil && false
	}
	for _, m := range s.Membership.Members {
		if n := w.node(m.ID); n == nil || !n.gone && int(n.delivered) != len(w.check.log) {
			return false
		}
	}
	return true
}

func (w *world) describe() string {
	out := ""
	for _, n := range w.nodes {
		if n.core == nil {
			out += fmt.Sprintf("\n  %d: down, gone %v", n.id, n.gone)
			continue
		}
		s := n.core.Status()
		out += fmt.Sprintf("\n  %d: %v leader %d ballot %v promised %v base %d last %d chosen %d delivered %d members %v peers %+v", n.id, s.Role, s.Leader, s.Ballot, s.Promised, s.Base, s.LastSlot, s.Chosen, n.delivered, s.Membership, s.Peers)
	}
	return out
}
