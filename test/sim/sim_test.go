package sim

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"quorate/paxosgroup"
)

var (
	simSeed   = flag.Uint64("sim.seed", 0, "replay this one seed, and shrink what fails")
	simSeeds  = flag.Int("sim.seeds", 1000, "how many seeds to run, from -sim.from on")
	simFrom   = flag.Uint64("sim.from", 1, "first seed")
	simFirst  = flag.Bool("sim.first", false, "stop at the first seed that fails")
	simCover  = flag.Bool("sim.coverage", true, "with 100 seeds or more, want every kind of fault to have happened")
	simShrink = flag.Bool("sim.shrink", true, "look for the least that makes a failing seed fail")
)

const (
	healFor   = 25 * time.Second // within which all must be equal after the faults
	stableFor = 2 * time.Second  // for which one leader leads in the end
)

// result is what a run came to.
type result struct {
	err   error
	steps int
	trace uint64
	did   map[string]int
}

// summary is printed last.
var summary string

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if summary != "" {
		fmt.Println(summary)
	}
	os.Exit(code)
}

func TestSafetyUnderFaults(t *testing.T) {
	from, n := *simFrom, *simSeeds
	if *simSeed != 0 {
		from, n = *simSeed, 1
	}
	if testing.Short() {
		n = min(n, 150)
	}
	total, steps, failed, seeds := map[string]int{}, 0, 0, 0
	start := time.Now()
	runSeeds(from, n, func(seed uint64, r result) (goOn bool) {
		seeds++
		steps += r.steps
		for k, v := range r.did {
			total[k] += v
		}
		if r.err == nil {
			return true
		}
		failed++
		t.Errorf("seed %d: %v\nreplay: go test ./test/sim -run '^%s$' -sim.seed=%d", seed, r.err, t.Name(), seed)
		if *simShrink && failed == 1 {
			least, why := shrink(drawPlan(seed), 60*time.Second)
			t.Logf("seed %d: the least that was found to fail: %v\n%v", seed, why, least)
		}
		return !*simFirst && failed < 5
	})
	var kinds []string
	for _, k := range slices.Sorted(maps.Keys(total)) {
		kinds = append(kinds, fmt.Sprintf("%s %d", k, total[k]))
	}
	t.Logf("%.1f seeds/s: %v", float64(seeds)/time.Since(start).Seconds(), kinds)
	summary = fmt.Sprintf("sim: %d seeds, %d steps, no violation", seeds, steps)
	if failed > 0 {
		summary = fmt.Sprintf("sim: %d seeds, %d steps, %d seeds FAILED", seeds, steps, failed)
	}
	if failed == 0 && n >= 100 && *simCover {
		for _, f := range faultKinds {
			if total[f.name] == 0 {
				t.Errorf("no world had any %s: the simulator does not exercise it", f.name)
			}
		}
		for _, k := range []string{"slots", "void", "terms", "seeded", "changes", "contested", "overruled", "probes"} {
			if total[k] == 0 {
				t.Errorf("no world had any %s: the simulator does not exercise it", k)
			}
		}
	}
}

// runSeeds runs n worlds, as many at a time as there are processors, and hands
// over what became of them one by one, in order of their seeds, until each does
// not want to go on.
func runSeeds(from uint64, n int, each func(uint64, result) bool) {
	const ahead = 4096 // no world takes as long as so many others
	results := make([]chan result, ahead)
	for i := range results {
		results[i] = make(chan result, 1)
	}
	seeds, stop := make(chan int), make(chan struct{})
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for i := range seeds {
				results[i%ahead] <- runPlan(drawPlan(from + uint64(i)))
			}
		})
	}
	workers.Go(func() {
		defer close(seeds)
		for i := range n {
			select {
			case seeds <- i:
			case <-stop:
				return
			}
		}
	})
	for i := range n {
		if !each(from+uint64(i), <-results[i%ahead]) {
			break
		}
	}
	close(stop)
	// What was begun is ended and thrown away.
	done := make(chan struct{})
	go func() { workers.Wait(); close(done) }()
	for {
		for _, c := range results {
			select {
			case <-c:
			default:
			}
		}
		select {
		case <-done:
			return
		case <-time.After(time.Millisecond):
		}
	}
}

// runPlan runs one world from its beginning to its end.
func runPlan(p plan) (r result) {
	w := newWorld(p.seed, p.first, p.groups, func(c *paxosgroup.Config) {
		c.PreferredRegion, c.HandBack = p.preferred, p.handBack
		c.LeaseDuration, c.HeartbeatInterval = p.lease, p.lease/15
		c.ClockDriftPPMMax, c.ElectionTimeoutMin = p.driftPPM, p.election
	})
	w.shared, w.leaseUnsafe, w.waits, w.segmentBytes = p.shared, p.ppmMax > p.driftPPM, true, p.segmentBytes
	c := &chaos{w: w, plan: p}
	defer func() {
		if x := recover(); x != nil {
			r.err = fmt.Errorf("panic: %v", x)
			if *simSeed != 0 && !*simShrink {
				panic(x) // to see where
			}
		}
		if r.err != nil {
			r.err = fmt.Errorf("at %v: %w", w.now, r.err)
		}
		r.steps, r.trace, r.did = w.steps, w.trace, c.done
		if r.did == nil {
			r.did = map[string]int{}
		}
		for _, g := range w.groups {
			r.did["slots"] += len(g.log)
			r.did["void"] += g.void
			r.did["terms"] += g.terms
			r.did["changes"] += g.changes
			r.did["contested"] += g.contested
			r.did["overruled"] += g.overruled
			r.did["probes"] += g.probes
			for _, cl := range w.clients {
				if cl.check == g {
					for _, o := range cl.history {
						if o.done != 0 {
							r.did["operations"]++
						}
					}
				}
			}
		}
		r.did["seeded"] += w.seeded
		r.did["exits"] += w.refused
		r.did["messages"] += w.sent
	}()
	c.begin()
	w.run(p.chaos)
	if w.err == nil {
		c.end()
		w.mustSettle()
	}
	if w.err == nil {
		for _, g := range w.groups {
			if err := g.linearizable(); err != nil {
				w.fail("%w", err)
			}
		}
	}
	r.err = w.err
	return r
}

// mustSettle wants progress in every group within healFor, all replicas equal,
// and after that one leader for a while.
func (w *world) mustSettle() {
	before := make([]int, len(w.groups))
	for i, g := range w.groups {
		before[i] = len(g.log)
	}
	end := w.now + healFor
	for w.now < end && w.err == nil {
		ok := w.runUntil(end-w.now, func() bool {
			for i, g := range w.groups {
				if !w.settled(g, before[i]) {
					return false
				}
			}
			return true
		})
		if w.err != nil || !ok {
			break
		}
		// Equal; now the same leaders for a while, undisturbed.
		terms := make([]paxosgroup.Ballot, len(w.groups))
		for i, g := range w.groups {
			terms[i] = w.leader(g.id).group(g.id).Brief().Ballot
		}
		w.run(stableFor)
		stable := true
		for i, g := range w.groups {
			l := w.leader(g.id)
			stable = stable && l != nil && l.group(g.id).Brief().Ballot == terms[i] && l.group(g.id).LeaseUntil() > l.clock()
		}
		if stable {
			return
		}
	}
	if w.err == nil {
		w.fail("no progress, not all equal, or no leader that stays, %v after the faults ended: %s", healFor, w.describe())
	}
}

// settled reports whether an entry that was offered after the faults is
// effective and every member has been handed the whole log.
func (w *world) settled(g *groupCheck, before int) bool {
	l := w.leader(g.id)
	if l == nil || l.group(g.id).LeaseUntil() <= l.clock() {
		return false
	}
	if last := len(g.log); last <= before || g.log[last-1].Entry.Kind != paxosgroup.KindData || g.log[last-1].Verdict != paxosgroup.Effective {
		if w.now >= g.offeredAt+20*time.Millisecond {
			g.offeredAt = w.now
			w.offer(l, g.id, 10)
		}
		return false
	}
	s := l.group(g.id).Brief()
	if int(l.view(g.id).delivered) != len(g.log) || s.Role != paxosgroup.Leader {
		return false
	}
	for _, m := range g.membership.Members {
		if h := w.host(m.ID); h == nil || !h.gone && int(h.view(g.id).delivered) != len(g.log) {
			return false
		}
	}
	return true
}

func (w *world) describe() string {
	out := ""
	for _, h := range w.hosts {
		if h.engine == nil {
			out += fmt.Sprintf("\n  %d: down, gone %v", h.id, h.gone)
			continue
		}
		for _, g := range w.groups {
			s := h.group(g.id).Status()
			out += fmt.Sprintf("\n  %d group %d of %d slots: %v leader %d ballot %v promised %v base %d chosen %d delivered %d epoch %d members %s joint %v change %d",
				h.id, g.id, len(g.log), s.Role, s.Leader, s.Ballot, s.Promised, s.Base, s.Chosen, h.view(g.id).delivered, s.Membership.Epoch, showMembers(s.Membership), s.Membership.Joint(), s.Change)
		}
	}
	return out
}

func fmtPayload(n, size int) []byte { return fmt.Appendf(nil, "%d:%0*d", n, size, 0) }

// With clocks a hundred times worse than leases allow for, two may hold one and
// reads may be stale; what is chosen is none the less one thing.
func TestAgreementWithAnyClock(t *testing.T) {
	for seed := uint64(1); seed <= 40; seed++ {
		p := drawPlan(seed)
		p.ppmMax, p.clients = 100_000, 0
		if r := runPlan(p); r.err != nil {
			t.Errorf("seed %d: %v", seed, r.err)
		}
	}
}

// One seed, one run.
func TestSameSeedSameTrace(t *testing.T) {
	for seed := uint64(1); seed <= 3; seed++ {
		a, b := runPlan(drawPlan(seed)), runPlan(drawPlan(seed))
		if a.trace != b.trace || a.steps != b.steps {
			t.Errorf("seed %d: trace %x after %d steps, then %x after %d", seed, a.trace, a.steps, b.trace, b.steps)
		}
	}
}
