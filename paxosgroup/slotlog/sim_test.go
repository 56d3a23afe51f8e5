package slotlog_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	"quorate/paxosgroup"
	"quorate/paxosgroup/slotlog"
	"quorate/paxosgroup/slotlog/simdisk"
)

var (
	simSeed  = flag.Uint64("sim.seed", 0, "replay this seed; 0 takes those of the suite")
	simSeeds = flag.Uint64("sim.seeds", 150, "how many seeds")
)

// TestNothingAcknowledgedIsLost writes, crashes and fails a log's disk at random,
// and compares what comes back with what was handed in.
func TestNothingAcknowledgedIsLost(t *testing.T) {
	if *simSeed != 0 {
		newWorld(t, *simSeed).run()
		return
	}
	for seed := uint64(1); seed <= *simSeeds; seed++ {
		newWorld(t, seed).run()
		if t.Failed() {
			t.Fatalf("replay: go test ./paxosgroup/slotlog -run '^%s$' -sim.seed=%d", t.Name(), seed)
		}
	}
}

// TestSameSeedSameBytes: a manual log on a simulated disk is deterministic.
func TestSameSeedSameBytes(t *testing.T) {
	first, second := newWorld(t, 7), newWorld(t, 7)
	first.run()
	second.run()
	if !slices.Equal(first.disk.Files(), second.disk.Files()) {
		t.Fatalf("files %v and %v", first.disk.Files(), second.disk.Files())
	}
	for _, name := range first.disk.Files() {
		a, _ := first.disk.ReadFile(name)
		b, _ := second.disk.ReadFile(name)
		if !slices.Equal(a, b) {
			t.Errorf("%s differs", name)
		}
	}
}

// model is what a group was told to keep. Where there are several values, the
// first is acknowledged and any may come back.
type model struct {
	promised   []paxosgroup.Ballot
	base       []paxosgroup.Slot
	slots      map[paxosgroup.Slot]*cell
	top        paxosgroup.Slot
	chosen     paxosgroup.Slot
	nextBallot uint64
}

type cell struct {
	acked    bool // the first version is
	versions []string
}

type world struct {
	t      *testing.T
	seed   uint64
	rng    *rand.Rand
	disk   *simdisk.Disk
	log    manual
	groups []*model
	err    error
}

// manual is a *slotlog.Log, or a *slotlog.Set.
type manual interface {
	Append(g paxosgroup.GroupID, recs []paxosgroup.Record, durable func(error))
	Group(g paxosgroup.GroupID) paxosgroup.Storage
	Flush() bool
	Close() error
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), disk: simdisk.New(seed)}
	for range 3 {
		w.groups = append(w.groups, &model{slots: map[paxosgroup.Slot]*cell{}, promised: []paxosgroup.Ballot{{}}, base: []paxosgroup.Slot{0}})
	}
	return w
}

func (w *world) run() {
	w.open()
	for range 400 {
		switch n := w.rng.IntN(100); {
		case n < 55:
			w.append()
		case n < 90:
			w.log.Flush()
		case n < 93:
			w.disk.Crash()
			w.open()
		case n < 95:
			w.disk.Kill()
			w.open()
		case n < 97:
			if err := w.log.Close(); err != nil && w.err == nil {
				w.t.Errorf("seed %d: close: %v", w.seed, err)
			}
			w.open()
		default:
			w.failOnce()
		}
		if w.t.Failed() {
			return
		}
	}
}

// failOnce has the next operation of some kind fail, and the log restarted.
func (w *world) failOnce() {
	fail := []string{simdisk.OpWrite, simdisk.OpSync, simdisk.OpRename, simdisk.OpAllocate, simdisk.OpSyncDir}[w.rng.IntN(5)]
	failed := false
	w.disk.SetFault(func(op, _ string) error {
		if op == fail && !failed {
			failed = true
			return syscall.EIO
		}
		return nil
	})
	for range 5 {
		w.append()
		w.log.Flush()
	}
	w.disk.SetFault(nil)
	if w.rng.IntN(2) == 0 {
		w.disk.Kill()
	} else {
		w.disk.Crash()
	}
	w.open()
}

func (w *world) append() {
	g := w.rng.IntN(len(w.groups))
	m := w.groups[g]
	var recs []paxosgroup.Record
	var acks []func()
	for range 1 + w.rng.IntN(3) {
		switch n := w.rng.IntN(10); {
		case n < 6:
			slot := m.chosen + 1 + paxosgroup.Slot(w.rng.IntN(8))
			m.nextBallot++
			payload := fmt.Sprintf("%d/%d/%d %s", g, slot, m.nextBallot, strings.Repeat(string(rune('a'+w.rng.IntN(26))), w.rng.IntN(2000)))
			ballot := paxosgroup.Ballot{Counter: m.nextBallot, Replica: 1}
			recs = append(recs, paxosgroup.Record{Kind: paxosgroup.RecordAccept, Slot: slot, Ballot: ballot,
				Entry: paxosgroup.Entry{Kind: paxosgroup.KindData, Term: ballot, Number: 1, Region: "r", Payload: []byte(payload)}})
			c := m.slots[slot]
			if c == nil {
				c = &cell{}
				m.slots[slot] = c
			}
			c.versions = append(c.versions, payload)
			m.promised = append(m.promised, ballot)
			m.top = max(m.top, slot)
			acks = append(acks, func() {
				if i := slices.Index(c.versions, payload); i >= 0 {
					c.acked, c.versions = true, c.versions[i:]
				}
				m.promise(ballot)
			})
		case n < 7:
			m.nextBallot++
			ballot := paxosgroup.Ballot{Counter: m.nextBallot, Replica: 2}
			recs = append(recs, paxosgroup.Record{Kind: paxosgroup.RecordPromise, Ballot: ballot})
			m.promised = append(m.promised, ballot)
			acks = append(acks, func() { m.promise(ballot) })
		case n < 9:
			// Chosen is told only of slots that hold something.
			for m.slots[m.chosen+1] != nil && w.rng.IntN(4) > 0 {
				m.chosen++
			}
			recs = append(recs, paxosgroup.Record{Kind: paxosgroup.RecordChosen, Slot: m.chosen})
		default:
			b := paxosgroup.Base{Slot: m.chosen, Membership: paxosgroup.Membership{NextID: 2, Members: []paxosgroup.Member{{ID: 1, Region: "r", Kind: paxosgroup.Voter}}}}
			recs = append(recs, paxosgroup.Record{Kind: paxosgroup.RecordBase, Base: &b})
			m.base = append(m.base, b.Slot)
			acks = append(acks, func() {
				for len(m.base) > 1 && m.base[0] < b.Slot {
					m.base = m.base[1:]
				}
			})
		}
	}
	w.log.Append(paxosgroup.GroupID(g+1), recs, func(err error) {
		if err != nil {
			w.err = err
			return
		}
		for _, ack := range acks {
			ack()
		}
	})
}

func (m *model) promise(b paxosgroup.Ballot) {
	for len(m.promised) > 1 && m.promised[0].Less(b) {
		m.promised = m.promised[1:]
	}
}

// open starts the log again and checks what it gives back.
func (w *world) open() {
	l, restored, err := slotlog.Open(slotlog.Config{Dir: "/log", SegmentBytes: 8 << 10, FS: w.disk, Manual: true})
	if err != nil {
		w.t.Fatalf("seed %d: %v", w.seed, err)
	}
	w.log, w.err = l, nil
	for g, m := range w.groups {
		m.check(w.t, l, w.seed, g, restored[paxosgroup.GroupID(g+1)])
	}
}

func (m *model) check(t testing.TB, log manual, seed uint64, g int, r paxosgroup.Restored) {
	fail := func(format string, args ...any) {
		t.Helper()
		t.Errorf("seed %d: group %d: %s", seed, g+1, fmt.Sprintf(format, args...))
	}
	if r.Promised.Less(m.promised[0]) {
		fail("promised %v, was %v", r.Promised, m.promised[0])
	}
	if !slices.Contains(m.base, r.Base.Slot) || r.Base.Slot < m.base[0] {
		fail("base %d, may be %v", r.Base.Slot, m.base)
	}
	if r.Chosen > m.chosen {
		fail("chosen %d, was at most %d", r.Chosen, m.chosen)
	}
	got := map[paxosgroup.Slot]string{}
	for _, a := range r.Accepted {
		got[a.Slot] = string(a.Entry.Payload)
	}
	entries, err := log.Group(paxosgroup.GroupID(g+1)).Chosen(r.Base.Slot+1, r.Chosen, 1<<30)
	if err != nil {
		fail("%v", err)
	}
	for _, e := range entries {
		got[e.Slot] = string(e.Entry.Payload)
	}
	for slot := r.Base.Slot + 1; slot <= m.top; slot++ {
		p, ok := got[slot]
		c := m.slots[slot]
		switch {
		case !ok && c != nil && c.acked:
			fail("slot %d is lost", slot)
		case ok && (c == nil || !slices.Contains(c.versions, p)):
			fail("slot %d holds %.20q", slot, p)
		}
	}
	// What came back is what there is.
	m.promised, m.base, m.chosen = []paxosgroup.Ballot{r.Promised}, []paxosgroup.Slot{r.Base.Slot}, r.Chosen
	clear(m.slots)
	for slot, p := range got {
		m.slots[slot] = &cell{acked: true, versions: []string{p}}
	}
}
