package paxosgroup

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// wide are one-way delays between five places, replica 1 being 12, 25, 60 and 80
// ms of round trip from the others, each with up to a tenth of jitter.
func (f *flock) wide(a, b ReplicaID) time.Duration {
	roundTrips := [5][5]int{
		{0, 12, 25, 60, 80},
		{12, 0, 20, 65, 85},
		{25, 20, 0, 70, 95},
		{60, 65, 70, 0, 110},
		{80, 85, 95, 110, 0},
	}
	d := time.Duration(roundTrips[a-1][b-1]) * time.Millisecond / 2
	return d + time.Duration(f.rng.Int64N(int64(d)/10+1))
}

// TestElectionsEndInTheFirst loses a leader a thousand times. An election is a
// round of candidacies at one ballot counter: it failed if another had to follow.
func TestElectionsEndInTheFirst(t *testing.T) {
	losses := 1000
	if testing.Short() {
		losses = 100
	}
	for _, tc := range []struct {
		name      string
		wide      bool
		preferred string
	}{
		{"no delay", false, ""},
		{"no delay, preferred region", false, "r1"},
		{"five regions", true, ""},
		{"five regions, preferred region", true, "r1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var took []time.Duration
			first, alone := 0, 0
			const each = 50
			for seed := uint64(1); len(took) < losses; seed++ {
				f := newFlock(t, seed, 5, 1, true, func(c *Config) { c.PreferredRegion = tc.preferred })
				f.flushMax = time.Millisecond
				if tc.wide {
					f.delay = f.wide
				}
				for range each {
					if !f.run(20*time.Second, f.led) {
						t.Fatalf("seed %d: no leader", seed)
					}
					f.run(3*time.Second+time.Duration(f.rng.Int64N(int64(time.Second))), nil)
					lost := f.leader(0)
					if lost == nil {
						continue
					}
					before := lost.members[0].core.ballot
					clear(f.prepared)
					f.crash(lost)
					start := f.now
					if !f.run(20*time.Second, f.led) {
						t.Fatalf("seed %d: no leader after %d was lost", seed, lost.id)
					}
					took = append(took, f.now-start)
					if f.leader(0).members[0].core.ballot.Counter == before.Counter+1 {
						first++
					}
					if len(f.prepared) == 1 {
						alone++
					}
					f.start(lost)
				}
			}
			slices.Sort(took)
			at := func(share float64) time.Duration {
				return took[min(len(took)-1, int(share*float64(len(took))))].Round(time.Millisecond)
			}
			share := 100 * float64(first) / float64(len(took))
			t.Logf("of %d elections %.1f %% ended in the first, %.1f %% had one candidate; lost to lease held: p5 %v, median %v, p95 %v, p99 %v, worst %v",
				len(took), share, 100*float64(alone)/float64(len(took)), at(0.05), at(0.5), at(0.95), at(0.99), at(1))
			if share < 95 {
				t.Errorf("%.1f %% ended in the first election, want 95 %%", share)
			}
		})
	}
}

// TestLeadersKeepTheirPlace: what leaves the leader a quorum costs no leadership.
func TestLeadersKeepTheirPlace(t *testing.T) {
	for _, preferred := range []string{"", "r1", "r3"} {
		for _, tc := range []struct {
			name   string
			hinder func(f *flock, l *process)
		}{
			{"a link of the leader is down", func(f *flock, l *process) {
				o := ReplicaID(1 + uint32(l.id)%5)
				f.cut[[2]ReplicaID{l.id, o}], f.cut[[2]ReplicaID{o, l.id}] = true, true
			}},
			{"a link from the leader is down", func(f *flock, l *process) { f.cut[[2]ReplicaID{l.id, ReplicaID(1 + uint32(l.id)%5)}] = true }},
			{"a link to the leader is down", func(f *flock, l *process) { f.cut[[2]ReplicaID{ReplicaID(1 + uint32(l.id)%5), l.id}] = true }},
			{"two links to the leader are down", func(f *flock, l *process) {
				for i := range uint32(2) {
					f.cut[[2]ReplicaID{ReplicaID(1 + (uint32(l.id)+i)%5), l.id}] = true
				}
			}},
			{"the leader is slow", func(f *flock, l *process) {
				// Half a second's pause every second.
				var again func()
				again = func() {
					l.pausedUntil = f.now + 500*time.Millisecond
					f.after(time.Second, again)
				}
				again()
			}},
			{"a follower is slow", func(f *flock, l *process) {
				o := f.procs[uint32(l.id)%5]
				var again func()
				again = func() {
					o.pausedUntil = f.now + 2*time.Second
					f.after(2500*time.Millisecond, again)
				}
				again()
			}},
		} {
			for _, beats := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, preferred %q, beats %v", tc.name, preferred, beats), func(t *testing.T) {
					f := newFlock(t, 1, 5, 2, beats, func(c *Config) { c.PreferredRegion = preferred })
					f.delay = f.wide
					if !f.run(20*time.Second, f.led) {
						t.Fatal("no leader")
					}
					f.run(3*time.Second, nil)
					terms := slices.Clone(f.tenures)
					tc.hinder(f, f.leader(0))
					for range 120 {
						f.run(500*time.Millisecond, nil)
						for g := range f.groups {
							if l := f.leader(g); l != nil {
								f.propose(l, g)
							}
						}
					}
					if !slices.Equal(f.tenures, terms) {
						t.Errorf("%v leaderships by group, were %v", f.tenures, terms)
					}
				})
			}
		}
	}
}

// TestHandBack: leadership comes to be due to the preferred region once that is
// fit, and one that does not keep it is offered it more and more seldom.
func TestHandBack(t *testing.T) {
	hand := func(f *flock) {
		l := f.leader(0)
		if l == nil {
			return
		}
		c := l.members[0].core
		if to := c.Status().HandBackDue; to != 0 {
			f.enter(l, l.lives, func() {
				if err := c.Transfer(l.clock(f.now), to); err != nil {
					f.t.Error(err)
				}
				f.settle(l, 0)
			})
		}
	}
	tune := func(c *Config) { c.PreferredRegion, c.HandBack = "r1", true }
	start := func(t *testing.T) *flock {
		f := newFlock(t, 3, 5, 1, true, tune)
		f.delay = f.wide
		f.isolate(1, true)
		if !f.run(20*time.Second, f.led) {
			t.Fatal("no leader")
		}
		f.run(20*time.Second, func() bool { hand(f); return false })
		if f.leader(0).id == 1 {
			t.Fatal("the preferred one leads, cut off as it is")
		}
		return f
	}
	t.Run("when it is well again", func(t *testing.T) {
		f := start(t)
		clear(f.cut)
		begun := f.now
		if !f.run(20*time.Second, func() bool { hand(f); l := f.leader(0); return l != nil && l.id == 1 }) {
			t.Fatal("leadership did not come back within 20 s")
		}
		if f.now-begun < handBackFor*1500*time.Millisecond {
			t.Errorf("handed back after %v, before anybody could know that it stays", f.now-begun)
		}
		f.run(time.Second, nil) // its opening is chosen
		terms := f.tenures[0]
		f.run(time.Minute, func() bool { hand(f); return false })
		if f.tenures[0] != terms {
			t.Error("leadership moved again")
		}
	})
	t.Run("no ping-pong when it is flaky", func(t *testing.T) {
		f := start(t)
		clear(f.cut)
		terms := f.tenures[0]
		// Well for 15 s, lost for 10, and so on for ten minutes.
		for range 24 {
			f.run(15*time.Second, func() bool { hand(f); return false })
			f.isolate(1, true)
			f.run(10*time.Second, func() bool { hand(f); return false })
			clear(f.cut)
		}
		moves := f.tenures[0] - terms
		t.Logf("%d changes of leadership in ten minutes", moves)
		if moves > 12 {
			t.Errorf("%d changes of leadership in ten minutes", moves)
		}
	})
}
