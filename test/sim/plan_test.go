package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"quorate/paxosgroup"
)

// plan is all that is to go wrong in a world, drawn before it begins, so that
// parts of it can be left out to see whether it still fails.
type plan struct {
	seed      uint64
	profile   string
	first     paxosgroup.Membership
	groups    int
	clients   int // of each group
	preferred string
	shared    bool // heartbeats
	handBack  bool
	lease     time.Duration
	election  time.Duration // least timeout; 0: what it is by itself
	ppmMax    int64
	driftPPM  int64 // what leases allow for
	loss      float64
	repeat    float64
	slow      float64
	delayMax  time.Duration
	flushMax  time.Duration
	bulkEvery time.Duration // between bursts of proposals
	sizeMax   int           // of their payloads
	resting   bool          // group 1 does little
	keepMax   time.Duration // logs are cut up to fewer slots, so many, below what is applied

	segmentBytes int64
	chaos        time.Duration
	faults       []fault
}

// fault is one thing that happens at a time. What a, b and c mean, its kind says;
// they are taken modulo what there is by then.
type fault struct {
	at      time.Duration
	kind    string
	a, b, c uint64
	lasts   time.Duration
}

func (f fault) String() string {
	return fmt.Sprintf("%8v  %-10s a=%d b=%d c=%d lasts=%v", f.at.Round(time.Microsecond), f.kind, f.a, f.b, f.c, f.lasts.Round(time.Microsecond))
}

func (p plan) String() string {
	out := p.profile + fmt.Sprintf(": members %s, %d groups, %d clients each, preferred %q (hand back %v), shared beats %v, leases of %v, clocks within %d ppm\nloss %v, repeats %v, slow %v, delay up to %v, flush up to %v, bursts every %v, for %v",
		showMembers(p.first), p.groups, p.clients, p.preferred, p.handBack, p.shared, p.lease, p.ppmMax, p.loss, p.repeat, p.slow, p.delayMax, p.flushMax, p.bulkEvery, p.chaos)
	for _, f := range p.faults {
		out += "\n" + f.String()
	}
	return out
}

func showMembers(m paxosgroup.Membership) string {
	var parts []string
	for _, x := range m.Members {
		parts = append(parts, fmt.Sprintf("%d%c", x.ID, "?vwl"[min(x.Kind, 3)]))
	}
	p1, p2 := m.Quorums()
	return fmt.Sprintf("%s (%d, %d)", strings.Join(parts, " "), p1, p2)
}

// kinds of faults, with the mean time between two of one kind.
var faultKinds = []struct {
	name string
	mean time.Duration
}{
	{"crash", 1500 * time.Millisecond},    // power failure of host a
	{"tear", 3 * time.Second},             // the same while it writes
	{"kill", 4 * time.Second},             // its process ends, its disk keeps what was written
	{"pause", 2 * time.Second},            // its process stands still
	{"suspend", 6 * time.Second},          // it stands still with its clock
	{"cut", 1500 * time.Millisecond},      // one direction between a and b
	{"split", 2 * time.Second},            // by the bits of a, in both directions or one
	{"isolate", 3 * time.Second},          // the leader of group a, in both directions or one
	{"heal", 1500 * time.Millisecond},     // all cuts
	{"transfer", time.Second},             // leadership of group a to b
	{"resign", 5 * time.Second},           // leader of group a
	{"change", 500 * time.Millisecond},    // membership of group a
	{"retire", 2 * time.Second},           // switch off whoever was removed from all groups
	{"lose", 4 * time.Second},             // a disk, for good
	{"failflush", 5 * time.Second},        // of host a
	{"failwrite", 6 * time.Second},        // of host a
	{"full", 5 * time.Second},             // the disk of host a
	{"truncate", 1500 * time.Millisecond}, // the log of host a
	{"deaf", 3 * time.Second},             // the leader of group a is cut off from b, and then stands still for about a lease
	{"stutter", 2 * time.Second},          // the leader of group a reaches only b, and soon crashes or is cut off
	{"shortlived", 4 * time.Second},       // the leader of group a crashes, and soon its successor
	{"relay", 6 * time.Second},            // the leader of group a is lost with those that heard it last
	{"farback", 8 * time.Second},          // the way to the leader of group a takes about a lease, and then it is not heard
	{"handover", 6 * time.Second},         // transfer to b while the leader of group a is deaf
	{"estrange", 8 * time.Second},         // the leader of group a comes back to only some of the others
}

const chaosFor = 8 * time.Second

// profile is a kind of trouble that a world has more of than others do: these
// faults alone, in these mean times.
type profile struct {
	name   string
	faults map[string]time.Duration
	shape  func(*plan, *rand.Rand)
}

const ms = time.Millisecond

// profiles are taken in turn by seed. The first has some of everything.
var profiles = []profile{
	{"mixed", nil, nil},
	{"storm", map[string]time.Duration{
		"relay": 500 * ms, "shortlived": 3000 * ms, "stutter": 3000 * ms, "pause": 2000 * ms, "split": 3000 * ms, "heal": 2000 * ms,
		"crash": 3000 * ms, "change": 1500 * ms, "retire": 700 * ms,
	}, func(p *plan, rng *rand.Rand) {
		p.first, p.groups, p.preferred = voters(3+2*rng.IntN(2)), 1, ""
		p.lease, p.election, p.chaos = 300*ms, 40*ms, 6*time.Second
		p.delayMax = []time.Duration{5 * ms, 20 * ms, 60 * ms}[rng.IntN(3)]
		p.slow = []float64{0, 0.01}[rng.IntN(2)]
	}},
	{"slow clock", map[string]time.Duration{
		"farback": 1200 * ms, "estrange": 1500 * ms, "deaf": 1500 * ms, "pause": 2000 * ms, "isolate": 4000 * ms, "heal": 3000 * ms, "crash": 5000 * ms,
		"suspend": 1500 * ms,
	}, func(p *plan, rng *rand.Rand) {
		p.first, p.preferred = voters(3+rng.IntN(3)), ""
		p.lease, p.election, p.ppmMax, p.driftPPM = 600*ms, 40*ms, 49_000, 50_000
		p.shared, p.resting = rng.IntN(4) > 0, rng.IntN(2) == 0
		p.delayMax = []time.Duration{2 * ms, 10 * ms, 30 * ms}[rng.IntN(3)]
		p.bulkEvery = time.Duration(10+rng.IntN(300)) * ms
	}},
	{"transfer storm", map[string]time.Duration{
		"handover": 500 * ms, "transfer": 800 * ms, "estrange": 1000 * ms, "cut": 2000 * ms, "heal": 1000 * ms, "pause": 2000 * ms, "resign": 4000 * ms, "change": 1500 * ms, "retire": 700 * ms,
	}, func(p *plan, rng *rand.Rand) {
		p.lease, p.election, p.groups, p.shared = 600*ms, 40*ms, 1+rng.IntN(3), rng.IntN(4) > 0
		p.clients, p.resting = 1+rng.IntN(3), rng.IntN(2) == 0
		p.delayMax = []time.Duration{2 * ms, 10 * ms, 40 * ms}[rng.IntN(3)]
		p.bulkEvery = time.Duration(10+rng.IntN(300)) * ms
	}},
	{"disk", map[string]time.Duration{
		"truncate": 150 * ms, "crash": 800 * ms, "tear": 600 * ms, "kill": 1500 * ms, "failflush": 800 * ms, "failwrite": 1500 * ms, "full": 4000 * ms,
		"split": 3000 * ms, "isolate": 3000 * ms, "heal": 1000 * ms, "transfer": 2000 * ms, "lose": 6000 * ms, "change": 3000 * ms,
	}, func(p *plan, rng *rand.Rand) {
		p.first = voters(3 + rng.IntN(3))
		p.groups, p.resting, p.keepMax, p.segmentBytes = 2, true, 1+time.Duration(rng.IntN(3)), 4<<10
		p.clients = rng.IntN(2)
		p.sizeMax = []int{100, 1000}[rng.IntN(2)]
		p.lease = 600 * ms
	}},
}

func drawPlan(seed uint64) plan {
	rng := rand.New(rand.NewPCG(seed, 0x91a2))
	pick := func(of ...time.Duration) time.Duration { return of[rng.IntN(len(of))] }
	p := plan{
		seed: seed, first: voters(3 + rng.IntN(5)), groups: []int{1, 1, 2, 3}[rng.IntN(4)], clients: rng.IntN(5), ppmMax: 900, chaos: chaosFor,
		shared: rng.IntN(3) > 0, handBack: rng.IntN(3) == 0,
		lease:     pick(1500, 1500, 600) * time.Millisecond,
		preferred: []string{"", "r1", "r2"}[rng.IntN(3)],
		loss:      []float64{0, 0.01, 0.05, 0.2}[rng.IntN(4)],
		repeat:    []float64{0, 0.02, 0.1}[rng.IntN(3)],
		slow:      []float64{0, 0.005, 0.03}[rng.IntN(3)],
		delayMax:  pick(2, 20, 60, 120) * time.Millisecond,
		flushMax:  pick(1, 5, 50) * time.Millisecond,
		bulkEvery: time.Duration(10+rng.IntN(80)) * time.Millisecond,
		sizeMax:   200, keepMax: 20, driftPPM: 1000, segmentBytes: segmentBytes,
	}
	special := profiles[seed%uint64(len(profiles))]
	p.profile = special.name
	if special.shape != nil {
		special.shape(&p, rng)
	}
	drawKinds(rng, &p.first)
	drawQuorums(rng, &p.first)
	mood := 1 + rng.IntN(3)
	for _, k := range faultKinds {
		mean := k.mean
		if special.faults != nil {
			if mean = special.faults[k.name]; mean == 0 {
				continue
			}
		}
		if rng.IntN(3) == 0 { // every world lacks some, so that none hides another
			continue
		}
		if special.faults == nil {
			mean *= time.Duration(mood)
		}
		for at := time.Duration(rng.Int64N(int64(2 * mean))); at < p.chaos; at += 1 + time.Duration(rng.Int64N(int64(2*mean))) {
			p.faults = append(p.faults, fault{at, k.name, rng.Uint64() >> 32, rng.Uint64() >> 32, rng.Uint64() >> 32, time.Duration(rng.Int64N(int64(3 * time.Second)))})
		}
	}
	slices.SortStableFunc(p.faults, func(a, b fault) int { return int(a.at - b.at) })
	return p
}

// drawKinds makes some members witnesses or learners, as long as three vote and
// two could lead.
func drawKinds(rng *rand.Rand, m *paxosgroup.Membership) {
	for i := range m.Members {
		before := m.Members[i].Kind
		switch rng.IntN(8) {
		case 0:
			m.Members[i].Kind = paxosgroup.Witness
		case 1:
			m.Members[i].Kind = paxosgroup.Learner
		}
		if m.Voters() < 3 || leaders(*m) < 2 {
			m.Members[i].Kind = before
		}
	}
}

func leaders(m paxosgroup.Membership) int {
	n := 0
	for _, x := range m.Members {
		if x.Kind == paxosgroup.Voter {
			n++
		}
	}
	return n
}

// drawQuorums draws sizes that intersect, mostly such that any one voter may be
// lost.
func drawQuorums(rng *rand.Rand, m *paxosgroup.Membership) {
	n := m.Voters()
	m.Phase1, m.Phase2 = 0, 0
	switch rng.IntN(5) {
	case 0, 1, 2:
		if n >= 3 {
			m.Phase2 = 2 + rng.IntN(n-2)
			m.Phase1 = n + 1 - m.Phase2
		}
	case 3:
		if rng.IntN(3) == 0 {
			m.Phase2 = 1 + rng.IntN(n)
			m.Phase1 = n + 1 - m.Phase2
		}
	}
}
