package paxosgroup

import (
	"flag"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var exploreStates = flag.Int("explore.states", 50_000, "how many distinct states TestExplore looks at in each of its bounds at most; `make explore` takes more")

// exploration is a search through all that can happen within bounds.
type exploration struct {
	bounds bounds
	limit  int64

	visited [256]struct {
		mu     sync.Mutex
		hashes map[uint64]struct{}
	}
	states, steps, open atomic.Int64
	handed, data        atomic.Int64 // states in which anything, or a data entry, was handed out

	mu     sync.Mutex
	idle   *sync.Cond
	stack  []*model // to be looked at by whoever has nothing to do
	failed error
	at     *model
	over   bool
}

// explore looks at every state that the bounds allow, or limit of them, and
// returns the first fault with how it came about.
func explore(b bounds, limit int, workers int) (*exploration, error) {
	x := &exploration{bounds: b, limit: int64(limit)}
	x.idle = sync.NewCond(&x.mu)
	for i := range x.visited {
		x.visited[i].hashes = map[uint64]struct{}{}
	}
	first, err := newModel(b)
	if err != nil {
		return x, err
	}
	x.visit(first)
	x.stack, x.open = []*model{first}, atomic.Int64{}
	x.open.Store(1)
	var all sync.WaitGroup
	for i := range workers {
		all.Go(func() { x.work(uint64(i)) })
	}
	all.Wait()
	return x, x.failed
}

const leapOneIn = 8

// visit reports whether a state is new.
func (x *exploration) visit(m *model) bool {
	h := m.hash()
	v := &x.visited[h>>56]
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, known := v.hashes[h]; known {
		return false
	}
	v.hashes[h] = struct{}{}
	x.states.Add(1)
	if n := len(m.seen.handed); n > 0 {
		x.handed.Add(1)
		if m.seen.handed[n-1].Entry.Kind == KindData {
			x.data.Add(1)
		}
	}
	return true
}

// work goes depth first, so that what waits stays short, but for a leap now and
// then: where there is more than can be looked at, one corner of it would be all
// that is seen.
func (x *exploration) work(seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 0))
	var own []*model
	for {
		if len(own) == 0 {
			x.mu.Lock()
			for len(x.stack) == 0 && !x.over {
				x.idle.Wait()
			}
			if x.over {
				x.mu.Unlock()
				return
			}
			n := (len(x.stack) + 1) / 2
			own = append(own, x.stack[:n]...)
			x.stack = x.stack[n:]
			x.mu.Unlock()
		}
		top := len(own) - 1
		if rng.IntN(leapOneIn) == 0 {
			leap := rng.IntN(len(own))
			own[leap], own[top] = own[top], own[leap]
		}
		m := own[top]
		own = own[:len(own)-1]
		before := len(own)
		m.next(x.bounds, func(to *model, err error) {
			x.steps.Add(1)
			if err != nil {
				x.fail(to, err)
			} else if x.visit(to) {
				own = append(own, to)
			}
		})
		if x.open.Add(int64(len(own)-before)-1) == 0 || x.states.Load() >= x.limit {
			x.stop()
		}
		if len(own) > 64 && x.mu.TryLock() {
			if len(x.stack) == 0 {
				x.stack = append(x.stack, own[:32]...)
				own = append(own[:0], own[32:]...)
				x.idle.Broadcast()
			}
			x.mu.Unlock()
		}
		if x.done() {
			return
		}
	}
}

func (x *exploration) done() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.over
}

func (x *exploration) stop() {
	x.mu.Lock()
	x.over = true
	x.idle.Broadcast()
	x.mu.Unlock()
}

func (x *exploration) fail(m *model, err error) {
	x.mu.Lock()
	if x.failed == nil {
		x.failed, x.at = err, m
	}
	x.over = true
	x.idle.Broadcast()
	x.mu.Unlock()
}

// exhaustive are the bounds that are looked at. Each asks for another kind of
// trouble: all of it at once is more than fits into any time.
var exhaustive = []bounds{
	{name: "one election, data, a crash", candidates: []int{1}, elections: 1, proposals: 1, crashes: 1},
	{name: "one election, data, repeats", candidates: []int{1}, elections: 1, proposals: 1, repeats: 2},
	{name: "two elections", candidates: []int{1, 2}, elections: 2},
	{name: "two elections of one", candidates: []int{1}, elections: 2, crashes: 1},
	{name: "two elections, data", candidates: []int{1, 2}, elections: 2, proposals: 1},
	{name: "two elections, a crash", candidates: []int{1, 2}, elections: 2, crashes: 1},
	{name: "phase 1 of three, phase 2 of one", phase1: 3, phase2: 1, candidates: []int{1, 2}, elections: 2, proposals: 1},
	{name: "phase 1 of one, phase 2 of three", phase1: 1, phase2: 3, candidates: []int{1, 2}, elections: 2, proposals: 1},
	{name: "a joint change of quorums", candidates: []int{1, 2}, elections: 2, changes: []func(Membership) Membership{
		func(m Membership) Membership { m.Phase1, m.Phase2 = 3, 1; return m },
	}},
	{name: "a joint change of members", candidates: []int{1, 2}, elections: 2, changes: []func(Membership) Membership{
		func(m Membership) Membership { m.Members = m.Members[1:]; return m },
	}},
	{name: "all at once", candidates: []int{1, 2, 3}, elections: 2, proposals: 2, crashes: 1, repeats: 1, refusals: true, impatient: true},
}

// TestExplore runs the real core of three replicas through every order of events
// within small bounds: any message on its way arrives next, or never, or twice;
// flushes end when they like; crashes lose what is not flushed.
func TestExplore(t *testing.T) {
	var states, steps int64
	start := time.Now()
	for _, b := range exhaustive {
		began := time.Now()
		x, err := explore(b, *exploreStates, runtime.GOMAXPROCS(0))
		if err != nil {
			t.Errorf("%s: %v%s", b.name, err, x.at.path)
			continue
		}
		if x.handed.Load() == 0 || b.proposals > 0 && x.data.Load() == 0 {
			t.Errorf("%s: of %d states %d have anything chosen, and %d a data entry: the explorer explores nothing", b.name, x.states.Load(), x.handed.Load(), x.data.Load())
		}
		how := "all there are"
		if x.states.Load() >= x.limit {
			how = "the bound, there are more"
		}
		t.Logf("%-34s %8d states (%s), %9d steps, %.0f states/s", b.name, x.states.Load(), how, x.steps.Load(), float64(x.states.Load())/time.Since(began).Seconds())
		states, steps = states+x.states.Load(), steps+x.steps.Load()
	}
	t.Logf("explore: %d distinct states, %d steps, %.0f states/s, no violation: %v", states, steps, float64(states)/time.Since(start).Seconds(), !t.Failed())
}

// TestExploreCanFail gives the explorer replicas that it must not pass.
func TestExploreCanFail(t *testing.T) {
	for _, b := range []bounds{
		{name: "acceptors answer before their flush", candidates: []int{1, 2}, elections: 2, crashes: 1, hasty: true},
		{name: "restarts forget the promise", candidates: []int{1, 2}, elections: 2, crashes: 1, forgetful: true},
		{name: "restarts forget what was accepted", candidates: []int{1, 2}, elections: 2, crashes: 1, amnesiac: true},
	} {
		t.Run(b.name, func(t *testing.T) {
			x, err := explore(b, 1_000_000, runtime.GOMAXPROCS(0))
			if err == nil {
				t.Fatalf("%d states, and nothing was found", x.states.Load())
			}
			t.Logf("after %d states: %v", x.states.Load(), err)
		})
	}
}
